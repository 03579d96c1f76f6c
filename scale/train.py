"""Train a real checkpoint on questions and answers with the loop of pr2_mini.py.

    python -m scale.train --checkpoint OLMoE-1B-7B --data train.jsonl --out runs/olmoe
    torchrun --nproc-per-node 8 -m scale.train --checkpoint DIR --data FILE --engine vllm
    ... --resume runs/NAME                         # goes on, on another number of processes too

Every process rolls out its share of each mini-step's prompts. Weights are float32 masters; FSDP2
computes in bfloat16. A run's folder holds config.json, metrics.jsonl (a line for each rollout
batch), the last two checkpoints step-N and, in the end, model-N, a Hugging Face folder.
"""

import importlib
import importlib.util
import json
import math
import os
import sys
import time
import uuid
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from pr2_mini import RLConfig, generate, make_optimizer, over_processes, rl_step
from scale import checkpoints, processes
from scale.checkpoints import CheckpointError
from scale.processes import PROCESSES, RANK
from scale.questions import DataError, Questions
from train_toy import check_ranges, digest, generator_for, parser_of, save


# --------------------------------------------------------------------------------- 1. Settings
@dataclass
class Settings(RLConfig):
    """Every setting of a run: an RL step's, and these. Each is a flag, its comment the help."""

    learning_rate: float = 1e-6  # of the policy
    alpha: float = 0.1  # rate of W_p over the routers'; of the paper's 1e3 see scale/README.md
    feature_share: float = 0.125  # share of the tokens whose h_old is kept to train W_p
    rollout_dtype: Literal["fp32", "bf16", "fp8"] = "bf16"  # precision of the rollout engine
    rollout_batch: int = 64  # most responses (or one prompt's) that the built-in engine has at once
    micro_batch: int = 8  # most responses in one training pass or evaluation, 0 = all
    max_new_tokens: int = 512  # longest response
    checkpoint: str = ""  # Hugging Face folder
    data: str = ""  # JSON-lines file, each line with a "question" and an "answer"
    system: str = ""  # system prompt for a checkpoint with a chat template
    prompt_length: int = 1024  # longer prompts are left out
    engine: Literal["built-in", "vllm"] = "built-in"  # what samples
    dtype: Literal["fp32", "bf16"] = "bf16"  # precision of the training engine
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # of it all
    out: str = "runs/scale"  # folder of the run
    seed: int = 0  # of prompts and samples
    steps: int = 100  # rollout batches
    prompts: int = 32  # per rollout batch
    save_every: int = 20  # rollout batches between checkpoints
    evaluated: int = 64  # held-out questions, every ten rollout batches
    track: Literal["none", "wandb", "trackio"] = "none"  # where metrics go besides a file


USAGE = "python -m scale.train --checkpoint DIR --data FILE [--FLAG VALUE ...]"
PARSER = parser_of(Settings, USAGE)
PARSER.add_argument("--resume", help="folder of a run to go on with; its settings are kept")
MAY_CHANGE = {"checkpoint", "data", "device", "steps", "save_every", "evaluated", "track"}
# What a run has left that was killed before its first checkpoint; a new run takes its place.
BEGUN = "config.json config.json.partial metrics.jsonl metrics.jsonl.partial run.lock partial"


def refuse(applies: bool, sentence: str) -> None:
    if applies:
        PARSER.error(sentence)


def parse(arguments: list[str]) -> tuple[Settings, dict]:
    """The settings, and what config.json holds beside them, {} in a new run. What cannot be ends
    the program with one sentence and exit code 2."""
    given = vars(PARSER.parse_args(arguments))
    resume = given.pop("resume", None)
    config = {}
    if resume is not None:
        others = given.keys() - MAY_CHANGE
        refuse(bool(others), f"--resume goes with {sorted(MAY_CHANGE)}, not with {sorted(others)}")
        config = read_config(Path(resume, "config.json"))
        given = config["settings"] | given | {"out": resume}
    settings = Settings(**given)
    check_ranges(settings, PARSER)
    folder = Path(settings.out)
    refuse(folder.is_file(), "--out is a file; expected a folder")
    pieces = settings.mini_steps * PROCESSES
    files = {path.name for path in folder.iterdir()} if folder.exists() else set()
    foreign = RANK == 0 and resume is None and bool(files.difference(BEGUN.split()))
    config_json = Path(settings.checkpoint, "config.json")
    refuse(not config_json.is_file(), f"--checkpoint: there is no file {config_json}")
    refuse(not Path(settings.data).is_file(), f"--data: there is no file {settings.data!r}")
    refuse(foreign, f"{folder} is not empty; --resume it or choose another")
    refuse(f"model-{settings.steps}" in files, f"{folder} is complete; give more --steps")
    refuse(settings.prompts % pieces != 0, f"prompts must be a multiple of {pieces}")
    refuse(settings.evaluated % PROCESSES != 0, f"evaluated must be a multiple of {PROCESSES}")
    refuse(settings.device == "cuda" and not torch.cuda.is_available(), "there is no cuda here")
    vllm = settings.engine == "vllm"
    refuse(vllm and settings.rollout_dtype == "fp8", "vLLM rolls out in fp32 or bf16")
    refuse(vllm and settings.temperature < 0.01, "vLLM samples at temperatures of 0.01 or more")
    for package in (settings.engine, settings.track):
        missing = package in ("vllm", "wandb", "trackio") and not importlib.util.find_spec(package)
        refuse(missing, f"{package} is missing: pip install {package}")
    return settings, config


def read_config(path: Path) -> dict:
    """What a run's config.json holds, its settings as they are for this edition."""
    refuse(not path.is_file(), f"{path} is missing; --resume takes the folder of a run")
    try:
        config = json.loads(path.read_text())
        names = list(config["settings"])
    except (ValueError, LookupError, TypeError):
        PARSER.error(f"{path} is damaged: expected the settings of a run as JSON")
    refuse(set(names) != set(vars(Settings())), f"{path} is of another edition of this program")
    return config


# --------------------------------------------------------------------------------- 2. Training
def evaluate(model, task: Questions, settings: Settings, temperature: float) -> float:
    """Accuracy on held-out questions, which the processes share out and answer in pieces."""
    held_out = task.problems(settings.evaluated, generator_for("held out"), held_out=True)
    mine = held_out[RANK::PROCESSES]
    config = replace(settings, samples=1, temperature=temperature)
    generator = generator_for("answers", RANK, device=settings.device)
    size = settings.micro_batch or len(mine)
    rewards = []
    for first in range(0, len(mine), size):
        part = mine[first : first + size]
        prompts, pads = task.prompts(part, settings.device)
        rewards.append(task.rewards(part, generate(model, config, prompts, pads, generator)))
    return float(over_processes(torch.cat(rewards).mean().to(settings.device)))


def train(settings: Settings, config: dict) -> None:
    """A run, or the rest of one. config: of the run that is resumed, or {}."""
    folder = Path(settings.out)
    # Build. Every process reads all questions; the first has the weights, writes and prints.
    # Whatever is wrong with the files is found before any weights are loaded.
    hf_config = checkpoints.config_of(settings.checkpoint)
    model = checkpoints.model_of(hf_config)
    task = Questions(settings, hf_config)
    settings = replace(settings, eos=task.eos, pad=task.pad)
    longest = task.longest + settings.max_new_tokens
    positions = hf_config.max_position_embeddings
    too_long = f"{longest} tokens of prompt and response exceed the model's {positions} positions"
    refuse(longest > positions, f"{too_long}; lower --max-new-tokens or --prompt-length")
    checksum = digest([task.checksum, hf_config.model_type, model.config, task.eos, task.pad])
    same = config.get("checksum", checksum) == checksum
    refuse(not same, f"{folder} was begun with other questions, another tokenizer or another model")
    lock = FileLock(folder / "run.lock")  # the system lets go of it when the process ends
    if RANK == 0:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            PARSER.error(f"another job is at work in {folder}; wait for it")
    mesh = processes.start(settings.device)
    if settings.engine == "vllm":
        from scale.vllm_engine import VLLMEngine

        engine = VLLMEngine(hf_config.model_type, model.config, settings, longest)
    else:
        engine = processes.PiecewiseEngine(model, settings, settings.rollout_batch)
        processes.shard(engine.model, mesh, dtype=None, trains=False)
    processes.shard(model, mesh, torch.bfloat16 if settings.dtype == "bf16" else None, trains=True)
    optimizer = make_optimizer(model, settings)
    rates = [group["lr"] for group in optimizer.param_groups]
    tensors = processes.tensors_of(model, optimizer)

    # Maybe resume. What was written after the last checkpoint is made again.
    history = processes.load_run(folder, tensors)
    done = len(history)
    refuse(done > settings.steps, f"{folder} has {done} rollout batches; give more --steps")
    if not history:
        processes.fill(model, partial(checkpoints.load, settings.checkpoint, dtype=None))
    tracker = None
    if RANK == 0:
        for line in task.omissions():
            print(line)
        tracker = open_files(settings, config, checksum, history)

    # Loop.
    bar = tqdm(range(done + 1, settings.steps + 1), disable=RANK > 0)
    for step in bar:
        # Ours: Adam's first steps are as large as its rate allows and would scramble the routers.
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, step / 10)
        # One rollout batch. This process has its share of the prompts of every mini-step.
        problems = task.problems(settings.prompts, generator_for("prompts", settings.seed, step))
        rows = torch.arange(settings.prompts).view(settings.mini_steps, PROCESSES, -1)[:, RANK]
        mine = [problems[row] for row in rows.flatten().tolist()]
        prompts, pads = task.prompts(mine, settings.device)
        reward = partial(task.rewards, mine)
        generator = generator_for("samples", settings.seed, step, RANK, device=settings.device)
        start = time.perf_counter()
        row = rl_step(model, engine, optimizer, settings, prompts, pads, reward, generator)
        row["seconds"] = time.perf_counter() - start
        if step % 10 == 0 or step in (1, settings.steps):
            row["held_out"] = evaluate(model, task, settings, settings.temperature)
            row["greedy"] = evaluate(model, task, settings, 0.0)
        row["skipped"] = sum(row[f"skipped/{i + 1}"] for i in range(settings.mini_steps))

        # Write. A checkpoint is worth keeping only while updates succeed.
        history.append({"step": step})
        for name, value in row.items():
            history[-1][name] = value if math.isfinite(value) else None
        if RANK == 0:
            with open(folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(history[-1]) + "\n")
            if tracker and step > config["tracked"]:
                tracker.log(row, step=step)
            if step == 1 and row["truncated"] > 0.5:
                ends = task.tokenizer.convert_ids_to_tokens(task.eos)
                endless = f"{row['truncated']:.0%} of the first responses never end"
                print(f"{endless}; they would by {ends}: raise --max-new-tokens?")
        bar.set_postfix(reward=row["reward"], refresh=False)
        if not row["skipped"] and (step % settings.save_every == 0 or step == settings.steps):
            processes.save_run(folder, tensors, history)
    if history[-1]["skipped"]:
        raise SystemExit("an update of the last batch was skipped, so that batch was not saved")
    checkpoints.save(model, settings.checkpoint, folder / f"model-{len(history)}", rank=RANK)
    if RANK == 0:
        evaluated = [row for row in history if "held_out" in row]
        for name in ("reward", "held_out", "greedy"):
            print(f"{name:<17} {evaluated[0][name]:.3f} -> {evaluated[-1][name]:.3f}")
        print(f"wrote             {folder / f'model-{len(history)}'}")
    if tracker:
        tracker.finish()
    torch.distributed.destroy_process_group()


def open_files(settings: Settings, config: dict, checksum: str, history: list[dict]):
    """Writes config.json and metrics.jsonl as of the last checkpoint, and returns the module that
    tracks metrics, or None. A step that was tracked before a kill is not tracked again."""
    folder = Path(settings.out)
    metrics = folder / "metrics.jsonl"
    if config and config["settings"]["track"] == settings.track:  # it has tracked what is there
        written = metrics.read_text().count("\n") if metrics.exists() else 0
        config["tracked"] = max(config["tracked"], written)
    else:
        config["tracked"] = len(history)
        config["run"] = f"{folder.name}-{uuid.uuid4().hex[:8]}"
    config["checksum"] = checksum
    config["settings"] = vars(settings)
    save(json.dumps(config, indent=2), folder / "config.json")
    save("".join(json.dumps(row) + "\n" for row in history), metrics)
    if settings.track == "none":
        return None
    os.environ["WANDB_RUN_ID"] = config["run"]  # trackio knows a run by its name
    tracker = importlib.import_module(settings.track)
    tracker.init(project="pr2-mini", name=config["run"], resume="allow", config=config)
    return tracker


def main(arguments: list[str]) -> None:
    settings, config = parse(arguments)
    try:
        train(settings, config)
    except (DataError, CheckpointError) as error:  # nothing else: a bug keeps its traceback
        PARSER.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
