"""Train the toy: warm up a small MoE on sums with slips, then sharpen it by RL with PR2.

    python train_toy.py                          # warm-up (cached) and RL, minutes on a laptop
    python train_toy.py --method r3 --seed 1     # another method, another seed
    python train_toy.py --resume runs/NAME       # go on with a run that was stopped or killed
    python train_toy.py --compare r3 pr2 pr2:alpha=0.3,loss=delta        # side by side
    python train_toy.py --checkpoint OLMoE-1B-7B --prompts 32            # a real checkpoint
    torchrun --nproc-per-node 8 train_toy.py --checkpoint OLMoE-1B-7B    # on eight GPUs

A run's folder holds config.json (every flag), metrics.jsonl (one line per rollout batch) and
checkpoint/step-N (the last two; `latest` names the one to trust), written by torch's distributed
checkpoint: resume only runs of your own. The method is in pr2_mini.py.
"""

import argparse
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
import time
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch says so when imported
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said of one process

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
import torch.nn.functional as F
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import pr2_mini
from pr2_mini import AdditionTask, ModelConfig, MoETransformer, RLConfig, expect, generate

# ------------------------------------------------------------------------------------- Flags


DEFAULTS = RLConfig()
FLAGS = {  # name: (default, help)
    "method": (DEFAULTS.method, "one of " + ", ".join(pr2_mini.METHODS)),
    "seed": (0, "of the base model and of everything after it"),
    "steps": (300, "rollout batches; with --compare 60 unless given"),
    "prompts": (DEFAULTS.prompts, "prompts per rollout batch"),
    "samples": (DEFAULTS.samples, "responses per prompt"),
    "mini_steps": (DEFAULTS.mini_steps, "kappa, updates per rollout batch"),
    "epochs": (DEFAULTS.epochs, "passes over each rollout batch"),
    "micro_tokens": (DEFAULTS.micro_tokens, "most tokens of a forward pass, 0 = a whole mini-step"),
    "rollout_dtype": (DEFAULTS.rollout_dtype, "precision of the rollouts: fp32, bf16 or fp8"),
    "learning_rate": (DEFAULTS.learning_rate, "of AdamW"),
    "router_multiplier": (50.0, "learning rate of the routers over the model's"),
    "clip_multiplier": (DEFAULTS.clip_multiplier, "of the method's clip range, inf = no clipping"),
    "alpha": (DEFAULTS.alpha, "learning rate of the predictors over the model's"),
    "predictor_loss": (DEFAULTS.predictor_loss, "post or delta"),
    "cached_positions": (DEFAULTS.cached_positions, "T_c per response, 0 = all"),
    "operands": (3, "numbers in a sum"),
    "largest": (9, "largest number in a sum"),
    "experts": (32, "N, experts per layer"),
    "experts_per_token": (4, "k, experts that a token visits"),
    "checkpoint": ("", "Hugging Face folder to train in place of the toy, on word problems"),
    "template": ("{problem}\nAnswer:", "prompt for a checkpoint, around {problem}"),
    "response_length": (0, "most new tokens, 0 = what the task needs"),
    "trainable": ("", "regular expression: train only weights whose names it matches"),
    "device": ("auto", "cpu, cuda or mps; auto is cuda if there is one, else cpu"),
    "base_dir": ("base", "where warmed-up base models are cached"),
    "out": ("", "folder of the run; by default a new one in runs/"),
    "save_every": (20, "rollout batches between checkpoints"),
    "resume": ("", "folder of a run to continue"),
    "memory": (0, "print what a --checkpoint run on so many processes needs, and stop"),
    "seeds": (3, "runs per variant of --compare"),
}
ONLY_ONCE = {"out", "resume", "memory", "seeds"}  # flags that are not settings of a run
# Other defaults with --checkpoint: large models learn slowly, and their routers need no help.
PUBLISHED = {"learning_rate": 1e-6, "router_multiplier": 1.0, "alpha": 1000.0}
PUBLISHED |= {"rollout_dtype": "bf16", "micro_tokens": 16384}


def parse(arguments: list[str]) -> tuple[dict, list[str] | None]:
    """The flags that were given, and the variants if it was --compare."""
    parser = argparse.ArgumentParser(
        description="Train a toy MoE by RL with Predictive Routing Replay (PR2).",
        usage="python train_toy.py [FLAG VALUE ...]    (--help lists the flags)",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, (default, text) in FLAGS.items():
        text += f" (default: {default})" if default != "" else ""
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(default), help=text, metavar="")
    text = "train variants, METHOD or METHOD:flag=value,..., from the same base models"
    parser.add_argument("--compare", nargs="*", metavar="VARIANT", help=text)
    text = "print where the time goes, and the ratios to transformers if that is installed"
    parser.add_argument("--benchmark", action="store_true", help=text)
    given = vars(parser.parse_args(arguments))
    return given, given.pop("compare", None)


def settings(given: dict) -> dict:
    """Every setting of a run: the given ones, and the defaults of the others."""
    flags = {name: default for name, (default, _) in FLAGS.items()}
    flags |= (PUBLISHED if given.get("checkpoint") else {}) | given
    if flags["device"] == "auto":
        flags["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: value for name, value in flags.items() if name not in ONLY_ONCE}


def resumed(given: dict, folder: Path) -> dict:
    """The settings of the run in this folder; only --steps may differ from them."""
    saved = read_config(folder)
    for name, value in given.items():
        flag, same = "--" + name.replace("_", "-"), name == "steps" or saved.get(name) == value
        expect(same, f"{flag} {value} contradicts the run in {folder}: {saved.get(name)}")
    return saved | given


def configurations(flags: dict) -> tuple[AdditionTask, ModelConfig, RLConfig]:
    """What the flags mean; raises ValueError for flags that do not fit together."""
    if flags["checkpoint"]:
        folder = Path(flags["checkpoint"])
        model = pr2_mini.config_from(pr2_mini.read(folder / "config.json"))
        task = WordProblems(folder, flags["operands"], flags["largest"], flags["template"])
    else:
        task = AdditionTask(flags["operands"], flags["largest"])
        longest = max(task.response_length, flags["response_length"])
        model = ModelConfig(
            vocab_size=len(task.characters),
            num_experts=flags["experts"],
            num_experts_per_tok=flags["experts_per_token"],
            max_position_embeddings=task.prompt_length + longest,
        )
    names = set(inspect.signature(RLConfig).parameters) & set(flags)
    values = {name: flags[name] for name in names} | {"eos": task.eos, "pad": task.pad}
    values |= {"max_new_tokens": flags["response_length"] or task.response_length}
    rl = RLConfig(recompute=bool(flags["checkpoint"]), **values)
    expect(flags["steps"] > 0, f"--steps is {flags['steps']}; expected at least 1")
    expect(flags["save_every"] > 0, f"--save-every is {flags['save_every']}; expected at least 1")
    share = rl.mini_steps * Processes.count
    message = f"{rl.prompts} prompts do not divide into {rl.mini_steps} mini-steps on "
    message += f"{Processes.count} processes; expected a multiple of {share}"
    expect(rl.prompts % share == 0, message)
    return task, model, rl


# --------------------------------------------------------------------------------- Processes


class Processes:
    """The processes that train together: those that torchrun has started, or this one alone."""

    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def __init__(self, device: str, sharded: bool):
        several = self.count > 1
        name = f"cuda:{os.environ['LOCAL_RANK']}" if several and device == "cuda" else device
        try:
            self.device = torch.zeros(1, device=name).device
        except (RuntimeError, AssertionError, NotImplementedError):
            raise ValueError(f'device "{name}" is not available here; try --device cpu') from None
        self.mesh = None
        if sharded or several:
            missing = importlib.util.find_spec("numpy") is None
            expect(not missing, "torch's processes talk by way of numpy: pip install numpy")
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            single = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
            if not dist.is_initialized():
                dist.init_process_group(backend, **({} if several else single))
            self.mesh = dist.init_device_mesh(self.device.type, (self.count,))

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """The values of all processes, stacked."""
        if self.count == 1:
            return pr2_mini.alone(values)
        everyone = values.new_empty(self.count * values.numel())
        dist.all_gather_single(everyone, values.flatten())
        return everyone.view(self.count, *values.shape)

    def place(self, model: MoETransformer, dtype: torch.dtype | None = None) -> MoETransformer:
        """Moves the model to the device. Where it is sharded (FSDP2), each process keeps its part
        of every block and computes in dtype; routers and predictors are small and stay whole."""
        if self.mesh is None:
            return model.to(self.device)
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        whole = {p for router in model.routers for p in router.to(self.device).parameters()}
        for module in [*model.blocks, model]:
            fully_shard(module, mesh=self.mesh, mp_policy=policy, ignored_params=whole)
        return model


# ------------------------------------------------------------------------------------- Files


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a file beside `path` and moves it there: all of it or none of it, also
    where two runs make the same base model at once."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def torch_save(content: dict, path: Path) -> None:
    try:
        write_atomically(path, lambda partial: torch.save(content, partial))
    except RuntimeError as error:  # torch's own word for a full disk
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from None


def torch_load(path: Path, device: torch.device | str = "cpu") -> dict:
    """A file of tensors and plain values; never runs code from it."""
    expect(path.is_file(), f"{path} does not exist")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # torch raises half a dozen types for a file that is not its own
        raise ValueError(f"{path} is truncated or not a checkpoint of train_toy.py") from None
    known = isinstance(content, dict) and "config" in content and "model" in content
    expect(known, f"{path} is not a checkpoint of train_toy.py")
    return content


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else "Permission denied"
    except OSError as error:
        reason = error.strerror
    expect(not reason, f"cannot write the folder {folder} ({reason}); choose another --out")


def read_config(folder: Path) -> dict:
    path = folder / "config.json"
    expect(path.is_file(), f"{folder} holds no config.json; expected the folder of a run")
    try:
        saved = json.loads(path.read_text())
    except ValueError:
        saved = None
    complete = isinstance(saved, dict) and saved.keys() == FLAGS.keys() - ONLY_ONCE
    expect(complete, f"{path} is damaged, or not of a run of this version of train_toy.py")
    return saved


def everything(model: MoETransformer, optimizer: torch.optim.Optimizer) -> dict:
    """Every tensor of a run by name, for a checkpoint: of the model and, filled in here instead of
    by the first step, of AdamW."""
    tensors = dict(model.state_dict())
    for name, p in model.named_parameters():
        if p.requires_grad:
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | moments
            tensors |= {f"{name}.{key}": tensor for key, tensor in optimizer.state[p].items()}
    return tensors


def save_checkpoint(folder: Path, tensors: dict, progress: dict, rank: int) -> None:
    """Writes checkpoint/step-N, then points `latest` at it, then drops all but the last two."""
    checkpoints = folder / "checkpoint"
    new = checkpoints / f"step-{progress['step']}"
    partial = new.with_name(new.name + ".partial")
    if not new.exists():
        try:
            dcp.save(tensors, checkpoint_id=partial, no_dist=not dist.is_initialized())
        except (Exception, CheckpointException) as error:  # torch's own is not an Exception
            raise OSError(f"cannot write {new}: {str(error).strip().splitlines()[-1]}") from None
    if rank == 0:
        if partial.exists():
            (partial / "progress.json").write_text(json.dumps(progress))
            partial.rename(new)
        write_atomically(checkpoints / "latest", lambda path: path.write_text(new.name))
        steps = sorted(checkpoints.glob("step-*[0-9]"), key=lambda path: int(path.name[5:]))
        for old in steps[:-2]:
            shutil.rmtree(old)


def load_checkpoint(folder: Path, tensors: dict) -> dict:
    """Fills the tensors from the newest checkpoint, written by any number of processes."""
    latest = folder / "checkpoint" / "latest"
    expect(latest.is_file(), f"{folder} has no checkpoint yet; start the run again in a new folder")
    path = latest.with_name(latest.read_text())
    try:
        progress = json.loads((path / "progress.json").read_text())
        dcp.load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (Exception, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{path} is damaged or of another pr2_mini.py: {reason}") from None
    return progress


# ----------------------------------------------------------------------------------- Warm-up


def warm_up(model: MoETransformer, task: AdditionTask, seed: int) -> None:
    """Supervised training on worked sums with slips, so that RL has something to sharpen.

    RL cannot teach a skill that is never sampled, and has nothing to do where every sample is
    right. A model trained on sums of which a third slip by one can add but often does not.
    """
    steps, rows, slip, rate = 300, 128, 0.35, 3e-3
    device = model.embed.weight.device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.98), weight_decay=0, fused=True)
    ramp = [min((s + 1) / 20, 0.525 + 0.475 * math.cos(math.pi * s / steps)) for s in range(steps)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: ramp[min(s, steps - 1)])
    for _ in (bar := tqdm(range(steps), "warm-up", leave=False)):
        problems = task.problems(rows, generator)
        texts = [problem + task.solve(problem, slip, generator) for problem in problems]
        tokens = task.encode(texts, task.prompt_length + task.response_length).to(device)
        ends = torch.tensor([[len(problem)] for problem in problems], device=device)
        columns = torch.arange(1, tokens.shape[1], device=device)
        asked = (columns < ends) | (tokens[:, 1:] == task.pad)
        logits, trace = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:].masked_fill(asked, -100))
        balance = pr2_mini.load_balancing_loss(trace.experts, trace.logits)
        optimizer.zero_grad()
        (loss + 0.01 * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def base_model(
    config: ModelConfig, task: AdditionTask, seed: int, device: torch.device, folder: Path
) -> tuple[MoETransformer, str]:
    """The warmed-up model, from the cache if the very same one was made before; and how."""
    code = Path(pr2_mini.__file__).read_text() + inspect.getsource(warm_up) + torch.__version__
    key = {"model": vars(config), "task": vars(task), "seed": seed, "device": device.type}
    digest = hashlib.sha256((code + json.dumps(key)).encode()).hexdigest()[:16]
    path = folder / f"{digest}.pt"
    torch.manual_seed(seed)
    model = MoETransformer(config).to(device)
    if path.is_file():
        model.load_state_dict(torch_load(path, device)["model"])
        return model, f"{path} (cached)"
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    warm_up(model, task, seed)
    torch_save({"config": key, "model": model.state_dict()}, path)
    return model, f"{path} (warmed up in {time.perf_counter() - start:.0f} s)"


# -------------------------------------------------------------------------------- RL training


class WordProblems:
    """Arithmetic in words, for a checkpoint and its own tokenizer: an AdditionTask's methods.
    The answer is the last integer of the response."""

    names, things = ("Ann", "Ben", "Cleo", "Dan", "Eve"), ("apples", "books", "coins", "shells")
    gains, losses = ("buys", "finds", "makes"), ("loses", "sells", "drops")
    response_length = 256

    def __init__(self, folder: Path, operands: int, largest: int, template: str):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError("--checkpoint needs tokenizers: pip install tokenizers") from None
        expect("{problem}" in template, f'--template "{template}" does not contain {{problem}}')
        expect(operands > 1 and largest > 0, "--operands and --largest must be at least 2 and 1")
        self.operands, self.largest, self.template = operands, largest, template
        path, ids = folder / "tokenizer.json", pr2_mini.read(folder / "config.json")
        expect(path.is_file(), f"{folder} has no tokenizer.json; expected it beside config.json")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        size, most = self.tokenizer.get_vocab_size(), ids["vocab_size"]
        expect(size <= most, f"{path} has {size} tokens; expected at most the model's {most}")
        if (generation := folder / "generation_config.json").is_file():
            ids |= pr2_mini.read(generation)
        ends = ids.get("eos_token_id")
        self.eos = (ends or [None])[0] if isinstance(ends, list) else ends
        expect(self.eos is not None, f"{folder / 'config.json'} names no eos_token_id")
        self.pad = self.eos if ids.get("pad_token_id") is None else ids["pad_token_id"]

    def problems(self, count: int, generator: torch.Generator, held_out: bool = False) -> list[str]:
        """`count` problems, all from the training part or all from the held-out part."""
        found: list[str] = []

        def draw(options: Sequence) -> object:
            return options[int(torch.randint(len(options), (), generator=generator))]

        while len(found) < count:
            name, thing = draw(self.names), draw(self.things)
            numbers = [draw(range(self.largest + 1)) for _ in range(self.operands)]
            text = f"{name} has {numbers[0]} {thing}. "
            for number in numbers[1:]:
                text += f"{name} {draw(self.gains + self.losses)} {number}. "
            text += f"How many {thing} does {name} have now?"
            if (zlib.crc32(text.encode()) % 8 == 0) == held_out:
                found.append(text)
        return found

    def prompts(self, problems: list[str]) -> torch.Tensor:
        """Problems -> (len(problems), P) int64 ids, padded on the left."""
        texts = [self.template.replace("{problem}", problem) for problem in problems]
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        width = max(map(len, rows))
        return torch.tensor([[self.pad] * (width - len(row)) + row for row in rows])

    def decode(self, ids: torch.Tensor) -> list[str]:
        return self.tokenizer.decode_batch(ids.tolist())

    def rewards(self, problems: list[str], responses: list[str]) -> torch.Tensor:
        """1.0 where the last integer of the response is the answer, else 0.0."""
        right = []
        for problem, response in zip(problems, responses, strict=True):
            changes = re.findall(r"(\w+) (\d+)", problem)
            signed = [(-1) ** (verb in self.losses) * int(number) for verb, number in changes]
            answer = sum(signed)
            right.append(re.findall(r"-?\d+", response)[-1:] == [str(answer)])
        return torch.tensor(right).float()


def generator_for(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Random numbers that depend on nothing but the key, so that no state has to be saved."""
    seed = hashlib.sha256(repr(key).encode()).digest()[:8]
    return torch.Generator(device).manual_seed(int.from_bytes(seed, "big") >> 1)


def trainable(expression: str, model: MoETransformer) -> set[str]:
    """The names of the weights to train: those that match, and the predictors."""
    names = {name for name, _ in model.named_parameters()}
    predictors = {name for name in names if ".predictor." in name}
    try:
        found = {name for name in names - predictors if re.search(expression, name)}
    except re.error as error:
        raise ValueError(f'--trainable "{expression}" is no regular expression: {error}') from None
    expect(found, f'--trainable "{expression}" matches no weight; one is called {min(names)}')
    return found | predictors


class Run:
    """A run: its policy, the engine that rolls out, AdamW, its folder, and what it measured."""

    def __init__(self, flags: dict, folder: Path, resume: bool = False):
        self.flags, self.folder, self.log = flags, folder, folder / "metrics.jsonl"
        self.task, model_config, self.config = configurations(flags)
        self.world = world = Processes(flags["device"], bool(flags["checkpoint"]))
        # All processes but the first get their weights from it; a resumed run has a checkpoint.
        model, self.origin = pr2_mini.empty_model(model_config, torch.float32, "cpu"), ""
        trained = trainable(flags["trainable"], model)
        if world.rank == 0 and not resume:
            empty = not folder.is_dir() or not any(folder.iterdir())
            expect(empty, f"{folder} is not empty; choose another --out, or --resume it")
            if path := flags["checkpoint"]:
                model, self.origin = MoETransformer.from_pretrained(path), path
            make_folder(folder)
            if not path:
                cache = Path(flags["base_dir"])
                parts = model_config, self.task, flags["seed"], world.device, cache
                model, self.origin = base_model(*parts)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        values = model.state_dict() if world.rank == 0 else {}
        self.engine = world.place(pr2_mini.rollout_engine(model, self.config.rollout_dtype))
        self.model = world.place(model, torch.bfloat16 if flags["checkpoint"] else None)
        if world.mesh is not None and not resume:
            options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            dcp_state.set_model_state_dict(self.model, values, options=options)
        del values  # of a large model, a second copy
        self.optimizer = pr2_mini.make_optimizer(self.model, self.config)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.tensors = everything(self.model, self.optimizer)
        self.held_out = self.task.problems(128, generator_for("held out"), held_out=True)
        self.progress, self.history = {"step": 0, "skipped_in_a_row": 0}, []
        if resume:
            self.progress = load_checkpoint(folder, self.tensors)
            step, lines = self.progress["step"], self.log.read_text().splitlines()
            short = f"{self.log} lacks lines; expected the {step} up to the checkpoint"
            expect(len(lines) >= step, short)
            self.history = [json.loads(line) for line in lines[:step]]
        self.write(folder / "config.json", json.dumps(flags, indent=2) + "\n")
        self.write(self.log, "".join(json.dumps(row) + "\n" for row in self.history))
        if not resume:
            self.save()

    def write(self, path: Path, text: str) -> None:
        if self.world.rank == 0:
            write_atomically(path, lambda partial: partial.write_text(text))

    def save(self) -> None:
        save_checkpoint(self.folder, self.tensors, self.progress, self.world.rank)

    def respond(self, problems: list[str], temperature: float = 0.0) -> list[str]:
        """The model's responses; the same samples in every call."""
        options = {"eos": self.config.eos, "pad": self.config.pad, "temperature": temperature}
        options |= {"generator": generator_for(0, device=self.world.device)}
        prompts = self.task.prompts(problems).to(self.world.device)
        length, gather = self.config.max_new_tokens, self.world.gather
        rollout = generate(self.model, prompts, length, gather=gather, **options)
        return self.task.decode(rollout.tokens[:, rollout.prompt_length :])

    def show(self, title: str) -> None:
        """Three sampled answers: greedy ones are mostly right before RL too."""
        problems = self.held_out[:3]
        for problem, text in zip(problems, self.respond(problems, 1.0), strict=True):
            verdict = "right" if self.task.rewards([problem], [text]).item() else "wrong"
            print(f"{title:<16} {problem}{' '.join(text.split())}  {verdict}")

    def batch(self) -> tuple:
        """This process's share of the next prompts, and what else `collect` asks for."""
        config, world, key = self.config, self.world, (self.flags["seed"], self.progress["step"])
        for model in (self.model, self.engine) if world.mesh is not None else ():
            model.reshard()  # FSDP2 leaves what is outside the blocks whole after a forward pass
        problems = self.task.problems(config.prompts, generator_for("prompts", *key))
        prompts = self.task.prompts(problems).to(world.device)
        rows = torch.arange(len(problems)).view(config.mini_steps, world.count, -1)
        mine = rows[:, world.rank].flatten()
        asked = [problems[row] for row in mine for _ in range(config.samples)]

        def reward(rollout: pr2_mini.Rollout) -> torch.Tensor:
            responses = self.task.decode(rollout.tokens[:, rollout.prompt_length :])
            return self.task.rewards(asked, responses)

        generator = generator_for("samples", *key, world.rank, device=world.device)
        return prompts[mine], reward, generator, world.gather

    def advance(self) -> dict:
        """One rollout batch; returns its row of metrics.jsonl."""
        step, world = self.progress["step"], self.world
        # Ours: Adam's first steps are as large as its rate allows and would scramble the routers.
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / 10)
        parts = self.model, self.engine, self.optimizer, self.config
        metrics = pr2_mini.rl_step(*parts, *self.batch())
        mine = self.held_out[world.rank :: world.count]
        right = self.task.rewards(mine, self.respond(mine)).sum().to(world.device)
        metrics["greedy_accuracy"] = float(world.gather(right).sum()) / len(self.held_out)
        self.progress["step"] += 1
        for i in range(1, self.config.mini_steps * self.config.epochs + 1):
            failed = self.progress["skipped_in_a_row"] + 1 if metrics[f"skipped/{i}"] else 0
            self.progress["skipped_in_a_row"] = failed
        row = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
        row = {"step": step + 1} | row
        self.history.append(row)
        if world.rank == 0:
            with open(self.log, "a") as log:
                print(json.dumps(row), file=log)
        # Weights that have begun to fail are not worth keeping: the last good ones stay.
        if (step + 1) % self.flags["save_every"] == 0 and not self.progress["skipped_in_a_row"]:
            self.save()
        return row

    def train(self, bar: tqdm) -> int:
        """Rollout batches until the end, a signal or ten failed updates; returns the exit code."""
        stop: list[int] = []  # A signal ends the run after the rollout batch that it falls in.

        def on_signal(number: int, frame: object) -> None:
            if stop:  # the second one at once
                raise KeyboardInterrupt
            stop.append(number)

        before = {name: signal.signal(name, on_signal) for name in (signal.SIGINT, signal.SIGTERM)}
        stopped, progress = 0, self.progress
        while progress["step"] < self.flags["steps"] and progress["skipped_in_a_row"] < 10:
            row = self.advance()
            live = {"reward": f"{row['reward']:.2f}"}
            live["agreement"] = f"{100 * row['agreement']:.1f}%"
            live["largest_ratio"] = f"{ratio(row['log_ratio_max']):.2g}"
            if total := sum(row["skipped"] for row in self.history):
                live["skipped"] = total
            bar.set_postfix(live, refresh=False)
            bar.update()
            here = torch.tensor(stop[0] if stop else 0, device=self.world.device)
            if stopped := int(self.world.gather(here).max()):
                break
        for name, handler in before.items():
            signal.signal(name, handler)
        again = f"repeat the command with --resume {self.folder} (a comparison as it was)"
        if (failed := progress["skipped_in_a_row"]) >= 10:
            print(
                f"stopped: the loss or gradient of {failed} updates in a row was not finite; the "
                f"last good checkpoint is kept. Lower --learning-rate, or look into it: {again}",
                file=sys.stderr,
            )
            return 1
        if failed == 0:
            self.save()
        if stopped:
            print(f"stopped after step {progress['step']}; to go on, {again}")
        return 128 + stopped if stopped else 0

    def report(self) -> None:
        """What a reader wants to know at the end; a trained checkpoint is saved."""
        self.show("after RL")
        summarise(self.history, self.config)
        print(f"wrote            {self.log}")
        if self.flags["checkpoint"]:
            options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
            values = dcp_state.get_model_state_dict(self.model, options=options)
            path = self.folder / f"model-{self.progress['step']}"
            if self.world.rank == 0 and not path.exists():
                whole = pr2_mini.empty_model(self.model.config, torch.bfloat16, "cpu")
                whole.load_state_dict(values)
                whole.source = Path(self.flags["checkpoint"])
                whole.save_pretrained(path)
            print(f"wrote            {path}")
        if plot := pyplot():
            routes = self.routes()
            if self.world.rank == 0:
                draw_run(plot, self.history, *routes, self.folder)

    def routes(self) -> tuple[list[str], torch.Tensor]:
        """A response and its routes, for a picture, as the last mini-step of one more batch finds
        them: what is saved stays as it is."""
        model, optimizer, config, batch = self.model, self.optimizer, self.config, self.batch()
        V = pr2_mini.aim(model, optimizer) if config.method == "pr2-cf" else None
        mini_steps, _ = pr2_mini.collect(model, self.engine, config, *batch)
        for i, batches in enumerate((mini_steps * config.epochs)[:-1], 1):
            pr2_mini.mini_step(model, optimizer, config, batches, i, V, self.world.gather)
        return watch(model, config, mini_steps[-1][0], self.task)


@torch.no_grad()
def watch(
    model: MoETransformer, config: RLConfig, batch: pr2_mini.Slice, task: AdditionTask
) -> tuple[list[str], torch.Tensor]:
    """A response of a micro-batch, 40 tokens at most, and the state (L, tokens) of its routes.

    0: the replayed set is the current one, and so is the one without prediction; 1: only the
    replayed one is; 2: only the one without prediction is; 3: neither.
    """
    forward = (model, *batch[:3], config.temperature)
    _, trace = pr2_mini.response_logprobs(*forward, replay=batch.replay)
    logits = pr2_mini.at_response(trace.logits, batch.mask)
    current, k = pr2_mini.best(logits, batch.engine), batch.engine.shape[-1]
    routes = batch.reference, batch.engine
    replayed, unpredicted = (pr2_mini.shared(route, current) == k for route in routes)
    states = torch.where(replayed, 1 - unpredicted.int(), 3 - unpredicted.int())
    lengths = batch.mask.sum(1).tolist()
    by_response = states.split(lengths, 1)
    row = max(range(len(lengths)), key=lambda r: int((by_response[r] % 2).sum()))
    tokens = batch.tokens[row][-batch.mask.shape[1] :][batch.mask[row]]
    return task.decode(tokens[:40, None]), by_response[row][:, :40].cpu()


def ratio(log_ratio: float | None) -> float:
    return math.exp(min(log_ratio, 700)) if log_ratio is not None else math.inf


def summarise(history: list[dict], config: RLConfig) -> None:
    """Prints what a reader wants to know first; README.md explains every line."""

    def mean(name: str, rows: list[dict]) -> float:
        return statistics.fmean(row[name] for row in rows if row.get(name) is not None)

    first, last = history[:10], history[-10:]
    for name in ("reward", "greedy_accuracy", "entropy"):
        print(f"{name:<16} {mean(name, first):.3f} -> {mean(name, last):.3f}")
    for i in range(1, config.mini_steps * config.epochs + 1):
        print(
            f"agreement/{i:<6} {100 * mean(f'agreement/{i}', history):6.2f} % of slots "
            f"(stale replay {100 * mean(f'stale_agreement/{i}', history):6.2f} %), "
            f"{100 * mean(f'no_deviation/{i}', history):6.2f} % of sets "
            f"(stale replay {100 * mean(f'stale_no_deviation/{i}', history):6.2f} %)"
        )
    largest = max(row["log_ratio_max"] for row in history if row["log_ratio_max"] is not None)
    average = mean("log_ratio_mean", history)
    print(f"largest ratio    {ratio(largest):.3g}, mean |log ratio| {average:.4f}")
    print(
        f"engine mismatch  {100 * mean('mismatch_route', history):.2f} % of routes, "
        f"{100 * mean('mismatch_token', history):.2f} % of tokens in some layer, "
        f"mean |log mu_old - log pi_old| {mean('mismatch_logprob', history):.4f}"
    )
    seconds = [f"{name} {mean(f'seconds_{name}', history):.3f}" for name in pr2_mini.PHASES]
    print(f"seconds per step {', '.join(seconds)}")


def memory(config: ModelConfig, rl: RLConfig, trained: str, processes: int) -> dict[str, float]:
    """Most bytes that each kind of thing takes on one of the processes of a `--checkpoint` run
    (ours), with prompts of 64 tokens and responses that all have full length."""
    model, sizes = pr2_mini.empty_model(config, torch.float32, "meta"), defaultdict(float)
    learning = trainable(trained, model)
    for name, p in model.named_parameters():
        whole = ".router." in name
        bytes_here = p.nbytes / (1 if whole else processes)
        sizes["weights, float32"] += bytes_here
        sizes["gradients"] += bytes_here if name in learning else 0
        sizes["AdamW"] += 2 * bytes_here if name in learning else 0
        halved = rl.rollout_dtype != "fp32" and not whole
        sizes["rollout engine"] += bytes_here / (2 if halved else 1)
    layers, L, D = config.num_hidden_layers, len(model.routers), config.hidden_size
    N, k, width = config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size
    query, key = config.num_attention_heads * config.head_dim, model.blocks[0].attention.widths[1]
    rows, C = rl.prompts * rl.samples // processes, rl.max_new_tokens
    positions = rows * (64 + C - 1)
    tokens = min(rl.micro_tokens or positions, positions // rl.mini_steps)
    block = 2 * (D * (2 * query + 2 * key) + 3 * N * D * width)  # bytes in bfloat16
    sizes["two blocks, embedding and head, gathered"] = 2 * block + 4 * config.vocab_size * D
    sizes["keys and values"] = (
        (4 if rl.rollout_dtype == "fp32" else 2) * positions * 2 * layers * key
    )
    # Bytes per token that one block saves for backward, fitted to what torch reports; every other
    # block keeps its input and router logits.
    saved = 22 * D + 14 * (query + key) + k * (4 * D + 8 * width + 41) + 4 * N
    sizes["activations"] = tokens * (saved + layers * 2 * D + L * 8 * N + 7 * D)
    sizes["logits"] = 3 * 4 * min(tokens, 8192) * config.vocab_size
    sizes["routes"] = positions * L * k * (1 if N <= 256 else 2)
    cached = rows * min(rl.cached_positions or C, C)
    sizes["cached features"] = cached * L * (2 * D + 4 * N) if rl.predicts else 0
    return dict(sizes)


def print_memory(given: dict) -> None:
    flags = settings(given)
    expect(flags["checkpoint"], "--memory needs --checkpoint; the toy fits everywhere")
    expect(given["memory"] > 0, f"--memory is {given['memory']}; expected a number of processes")
    _, model_config, config = configurations(flags)
    needs = memory(model_config, config, flags["trainable"], given["memory"])
    needs["all, if all were at their most at once"] = sum(needs.values())
    for name, size in needs.items():
        print(f"{size / 1e9:8.2f} GB  {name}")


# ------------------------------------------------------------------------ Comparison and figures

T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # Student's t, 1 to 9


def parse_variant(text: str) -> dict:
    """ "pr2:alpha=0.3,loss=delta" -> {"method": "pr2", "alpha": 0.3, "predictor_loss": "delta"}."""
    method, _, changes = text.partition(":")
    flags = {"method": method}
    for change in filter(None, changes.split(",")):
        name, _, value = change.partition("=")
        name = name.replace("-", "_")
        name = {"loss": "predictor_loss", "clip": "clip_multiplier"}.get(name, name)
        known = name in FLAGS and name not in ONLY_ONCE | {"method", "seed", "steps", "base_dir"}
        expect(known, f'variant "{text}" changes "{name}", which is not a setting; see --help')
        try:
            flags[name] = type(FLAGS[name][0])(value)
        except ValueError:
            raise ValueError(f'variant "{text}" gives {name} the bad value "{value}"') from None
    return flags


def summary(history: list[dict]) -> dict[str, float]:
    """One number per column, from one run; "name/i" belongs to mini-step i, in %. Of the deviating
    slots that the rollout engine's own top-k would have had there, "removed" is the share that is
    not there, "excess_removed" the same over those that are there at mini-step 1 already."""
    settled = history[10:] or history  # the learning rate rises over the first ten batches
    mean = {}
    for name in history[0]:
        values = [row[name] for row in settled if row.get(name) is not None]
        mean[name] = statistics.fmean(values) if values else math.nan
    columns = {"reward at the last rollout": history[-1]["reward"]}
    columns["of the last ten"] = statistics.fmean(row["reward"] for row in history[-10:])
    columns["greedy accuracy"] = history[-1]["greedy_accuracy"]
    columns |= {n: 100 * mean[n] for n in mean if re.search("(agreement|deviation.*)/", n)}
    for i in range(2, 1 + sum(name.startswith("agreement/") for name in mean)):
        engine, first = columns[f"engine_agreement/{i}"], columns["engine_agreement/1"]
        gained = columns[f"gained/{i}"] = columns[f"agreement/{i}"] - engine
        excess = first - engine  # a share of less than a quarter of a point would be noise
        for name, of in (("removed", 100 - engine), ("excess_removed", excess * (excess > 0.25))):
            columns[f"{name}/{i}"] = 100 * gained / of if of > 0 else math.nan
    columns |= {"coverage gap": mean["coverage_gap"], "KL": mean["approx_kl"]}
    columns |= {"clipfrac": mean["clipfrac_low"] + mean["clipfrac_high"]}
    largest = max(ratio(row["log_ratio_max"]) for row in settled)
    columns |= {"log10 of the largest ratio": math.log10(largest)}  # seeds differ by factors
    columns |= {"mismatch": mean["mismatch_logprob"], "route mismatch": mean["mismatch_route"]}
    columns |= {"token mismatch": mean["mismatch_token"]}
    times = [sum(row[f"seconds_{phase}"] for phase in pr2_mini.PHASES) for row in settled]
    return columns | {"seconds a step": statistics.median(times)}


def interval(values: list[float], base: list[float] | None) -> tuple[float, float]:
    """Mean over seeds, and half the 95 % interval of it or of its paired difference to `base`."""
    pairs = values if base is None else [a - b for a, b in zip(values, base, strict=True)]
    n, finite = len(pairs), math.isfinite(sum(pairs))
    spread = statistics.stdev(pairs) if n > 1 and finite else math.nan
    return statistics.fmean(values), T95[min(max(n - 1, 1), 9) - 1] * spread / math.sqrt(n)


def compare(given: dict, variants: list[str]) -> int:
    """Trains every variant on every seed; writes the table, compare.json and the figure."""
    variants, first = variants or list(pr2_mini.METHODS), given.get("seed", 0)
    seeds, out = given.pop("seeds", FLAGS["seeds"][0]), given.pop("out", "")
    changed = [f"{name}={value}" for name, value in sorted(given.items()) if name != "seed"]
    out = Path(out or "runs/" + re.sub(r"[^\w.=-]", "-", "-".join(["compare", *changed])))
    expect(seeds > 0, f"--seeds is {seeds}; expected at least 1")
    expect("resume" not in given, "--compare resumes by itself; repeat it without --resume")
    expect("memory" not in given, "--memory and --compare are two commands")
    expect("method" not in given, "--compare takes methods as variants, not as --method")
    for variant in variants:
        expect(variants.count(variant) == 1, f"--compare names {variant} twice")
    runs = {}
    for seed in range(first, first + seeds):
        for variant in variants:
            flags = settings({"steps": 60} | given | parse_variant(variant) | {"seed": seed})
            configurations(flags)
            Processes(flags["device"], sharded=False)
            folder = out / re.sub(r"[^\w.=,-]", "-", f"seed{seed}-{variant}")
            same = not (folder / "config.json").exists() or read_config(folder) == flags
            expect(same, f"{folder} holds a run with other settings; choose another --out")
            runs[variant, seed] = folder, flags
    histories, kept = {variant: [] for variant in variants}, 0
    with tqdm(total=sum(flags["steps"] for _, flags in runs.values()), desc="compare") as bar:
        for (variant, seed), (folder, flags) in runs.items():
            bar.set_description(f"{variant}, seed {seed}")
            log = folder / "metrics.jsonl"
            if log.exists() and len(log.read_text().splitlines()) == flags["steps"]:
                bar.update(flags["steps"])
                kept += 1
            else:
                if (folder / "config.json").exists():
                    shutil.rmtree(folder)  # a run that was killed
                if code := Run(flags, folder).train(bar):
                    if code == 1:
                        print(f"without {variant} the comparison goes on", file=sys.stderr)
                    return code
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            histories[variant].append([json.loads(line) for line in log.read_text().splitlines()])
    columns = {variant: list(map(summary, runs)) for variant, runs in histories.items()}
    table = {variant: {} for variant in variants}
    for variant in variants:
        for name in columns[variant][0]:
            base = [run.get(name) for run in columns[variants[0]]]
            own = name.startswith(("gained", "removed", "excess"))  # a difference in itself
            paired = variant != variants[0] and None not in base and not own
            values = [run[name] for run in columns[variant]]
            table[variant][name] = interval(values, base if paired else None)
    result = {"flags": given, "seeds": seeds, "table": table, "runs": columns}
    valid = json.loads(json.dumps(result), parse_constant={"Infinity": "inf"}.get)  # NaN is null
    text = json.dumps(valid, indent=1) + "\n"
    write_atomically(out / "compare.json", lambda partial: partial.write_text(text))
    print_table(table, seeds)
    again = f", {kept} runs as found: after a change of code choose another --out" if kept else ""
    print(f"wrote            {out / 'compare.json'}{again}")
    draw_comparison(table, histories, out)
    return 0


def print_table(table: dict, seeds: int) -> None:
    """A Markdown table: mean ± half a 95 % interval."""
    print(f"\n{seeds} seeds; ± half a 95 % interval of the paired difference to the first row, or")
    print("of the mean: in that row, in the removed shares, and where it has no such mini-step.")
    print("no_deviation, removed and excess_removed: in %, a value for every mini-step.")
    names = [name.partition("/")[0] for columns in table.values() for name in columns]
    shown = [n for n in dict.fromkeys(names) if not re.search("agreement|engine|ions_|gained", n)]
    print("| variant | " + " | ".join(shown) + " |\n|" + " --- |" * (len(shown) + 1))
    for variant, columns in table.items():
        cells = {name: [] for name in shown}
        for name, (mean, width) in columns.items():
            cell = f"{mean:.3g}" + (f" ± {width:.2g}" if seeds > 1 else "")
            cell = "n/a" if math.isnan(mean) else cell
            cells.get(name.partition("/")[0], []).append(cell)
        print(f"| {variant} | " + " | ".join(map(", ".join, cells.values())) + " |")


def pyplot():
    """matplotlib's pyplot, or None and a word on how to get it."""
    try:
        import matplotlib.pyplot as plot
    except ImportError:
        print("no figure         pip install matplotlib draws one, for this command run again")
        return None
    plot.switch_backend("Agg")
    plot.rcParams.update({"font.size": 9, "savefig.dpi": 100, "svg.hashsalt": "pr2"})
    plot.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    return plot


STATES = {
    "replayed set is still the current one": "#E5E5E5",
    "prediction caught what stale replay would have missed": "#0072B2",
    "stale replay was right, prediction is not": "#E69F00",
    "both miss": "#000000",
}


def draw_run(plot, history: list[dict], tokens: list[str], states: torch.Tensor, out: Path) -> None:
    """run.png: reward and agreement over the run, and the routes of one response."""
    figure = plot.figure(figsize=(9, 5.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3, 2])
    (reward, agreement), grid = top.subplots(1, 2), bottom.subplots()
    last = sum(name.startswith("agreement/") for name in history[0])
    curves = [
        (reward, "reward", 1, "#0072B2", "-", "sampled"),
        (reward, "greedy_accuracy", 1, "#999999", "--", "greedy, held out"),
        (agreement, f"agreement/{last}", 100, "#D55E00", "-", f"replayed, mini-step {last}"),
        (agreement, f"stale_agreement/{last}", 100, "#000000", ":", "stale replay there"),
    ]
    for axes, name, scale, colour, line, label in curves:
        values = [scale * row[name] for row in history]
        axes.plot(range(1, 1 + len(values)), values, line, color=colour, label=label, linewidth=1)
        axes.legend(frameon=False)
    reward.set(title="Reward", xlabel="rollout batch")
    agreement.set(title="Replayed experts that are still current, %", xlabel="rollout batch")
    colours = plot.matplotlib.colors.ListedColormap(list(STATES.values()))
    cells = {"cmap": colours, "vmin": 0, "vmax": 3, "edgecolors": "white", "linewidth": 2}
    grid.pcolormesh(states.tolist(), **cells)
    grid.set(title="The response with most drift at the last mini-step", ylabel="layer")
    grid.set_xticks(
        [i + 0.5 for i in range(len(tokens))], tokens, fontfamily="monospace", parse_math=False
    )
    grid.set_yticks([i + 0.5 for i in range(len(states))], range(1, 1 + len(states)))
    grid.invert_yaxis()
    grid.tick_params(length=0)
    patches = [plot.matplotlib.patches.Patch(color=c, label=name) for name, c in STATES.items()]
    bottom.legend(handles=patches, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(out / "run.png")
    plot.close(figure)
    print(f"wrote            {out / 'run.png'}")


COLOURS = ["#000000", "#999999", "#56B4E9", "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7"]


def draw_comparison(table: dict, histories: dict[str, list[list[dict]]], out: Path) -> None:
    """compare.png and compare.svg: reward, agreement, largest ratio, deviations by variant."""
    if not (plot := pyplot()):
        return
    figure, axes = plot.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    (reward, agreement), (largest, bars) = axes
    methods = set(histories) <= set(pr2_mini.METHODS)  # each has its colour in all such figures
    for place, (variant, runs) in enumerate(histories.items()):
        number = pr2_mini.METHODS.index(variant) if methods else place
        mean = {name: value for name, (value, _) in table[variant].items()}
        style = {"color": COLOURS[number % 8], "linestyle": "-" if number < 8 else "--"}
        marker = style | {"marker": "osv^DPX*"[number % 8], "markersize": 5}
        batches = list(zip(*runs, strict=True))  # the rows of all seeds
        raw = [statistics.fmean(row["reward"] for row in rows) for rows in batches]
        smooth = [statistics.fmean(raw[max(0, i - 4) : i + 1]) for i in range(len(raw))]
        sparse = marker | {"markevery": (number % 8, 8), "linewidth": 1}
        reward.plot(range(1, 1 + len(smooth)), smooth, **sparse)
        peaks = [max(ratio(row["log_ratio_max"]) for row in rows) for rows in batches]
        largest.semilogy(range(1, 1 + len(peaks)), peaks, **sparse)
        x = range(1, 1 + sum(name.startswith("agreement/") for name in mean))
        agreement.plot(x, [mean[f"agreement/{i}"] for i in x], **marker)
        engine = [mean[f"engine_agreement/{i}"] for i in x]
        agreement.plot(x, engine, ":", color=style["color"], linewidth=1)
        end, hatch = 0, "" if number < 8 else "//"
        for name, opacity in (("1", 1), ("2", 0.6), ("3_or_more", 0.3)):
            height = mean[f"deviations_{name}/{x[-1]}"]
            look = {"color": style["color"], "alpha": opacity, "hatch": hatch}
            bars.barh(place, height, left=end, edgecolor="white", **look)
            end += height
        bars.plot(end, place, clip_on=False, **marker)
        unpredicted = 100 - mean[f"engine_no_deviation/{x[-1]}"]
        bars.plot(unpredicted, place, "|", color="black", markersize=14)
    reward.set(title="Reward (mean of 5 batches)", xlabel="rollout batch")
    largest.set(title="Largest PPO ratio of a batch, of any seed", xlabel="rollout batch")
    agreement.set(title="Replayed experts that are still current, %")
    agreement.set_xlabel("mini-step i; dotted: without prediction")
    agreement.xaxis.get_major_locator().set_params(integer=True)
    bars.set(title="Deviating sets at the last mini-step, %")
    bars.set_xlabel("paler: 2, more experts; line: no prediction")
    bars.set_yticks(range(len(histories)), histories)
    bars.invert_yaxis()
    for kind in ("png", "svg"):
        figure.savefig(out / f"compare.{kind}")
    plot.close(figure)
    print(f"wrote            {out / 'compare.png'}, compare.svg")


# --------------------------------------------------------------------------------- Benchmark


def timed(calls: list[Callable], rounds: int) -> list[list[float]]:
    """Milliseconds of every call, in turn, so that a slow spell of the machine hits all alike."""
    taken = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, times in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
    return [times[1:] for times in taken]  # the first round warms up


def middle(values: list[float], digits: int = 0) -> str:
    """Median, and the order statistics that enclose the true one with a confidence of 95 %."""
    values, n = sorted(values), len(values)
    low = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    shown = [f"{v:.{digits}f}" for v in (statistics.median(values), values[low], values[~low])]
    return "{} ({} to {})".format(*shown)


def print_row(*cells: object, head: bool = False) -> None:
    row = "| " + " | ".join(map(str, cells)) + " |"
    print(f"\n{row}\n|" + " --- |" * len(cells) if head else row)


def benchmark(given: dict, rounds: int = 40) -> int:
    """Prints where a step's time goes and how it grows, and the ratios to transformers."""
    expect(not ONLY_ONCE & given.keys(), "--benchmark goes with the settings of a run only")
    flags = settings(given)
    task, shape, rl = configurations(flags)
    device = Processes(flags["device"], sharded=False).device
    print(f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads; medians")
    print("and their 95 % intervals; random weights, every response at its full length")
    problems = task.problems(rl.prompts, torch.Generator().manual_seed(flags["seed"]))
    prompts, steps, runs = task.prompts(problems).to(device), [], {}
    for method in ("grpo", "pr2", "pr2-cf"):
        config, model = dataclasses.replace(rl, method=method, eos=-1), MoETransformer(shape)
        engine = pr2_mini.rollout_engine(model.to(device), config.rollout_dtype)
        state = model, engine, pr2_mini.make_optimizer(model, config), config, prompts
        step = functools.partial(pr2_mini.rl_step, *state, lambda r: r.tokens.sum(1).float())
        runs[method] = []
        steps.append(lambda step=step, run=runs[method]: run.append(step()))
    whole = timed(steps, rounds)
    print_row("RL step, ms", *pr2_mini.PHASES, "whole", "over grpo, %", "tokens/s", head=True)
    for (method, run), taken in zip(runs.items(), whole, strict=True):
        phases = [[1e3 * row[f"seconds_{p}"] for row in run[1:]] for p in pr2_mini.PHASES]
        over = [100 * (a / b - 1) for a, b in zip(taken, whole[0], strict=True)]
        tokens = 1e3 * rl.prompts * rl.samples * task.response_length / statistics.median(taken)
        print_row(method, *map(middle, [*phases, taken]), middle(over, 1), round(tokens))

    def training(rows: int = 256, **changes) -> Callable:
        model = MoETransformer(dataclasses.replace(shape, **changes)).to(device)
        ids = torch.randint(shape.vocab_size, (rows, task.prompt_length), device=device)
        return lambda: F.cross_entropy(model(ids)[0].flatten(0, 1), ids.flatten()).backward()

    curves = {"sequences": {rows: training(rows) for rows in (128, 256, 512, 1024)}}
    curves["k"] = {k: training(num_experts_per_tok=k) for k in (1, 2, 4, 8)}
    curves["N"] = {N: training(num_experts=N) for N in (8, 16, 32, 64, 128)}
    for name, curve in curves.items():
        print_row(name, *curve, head=True)
        print_row("forward and backward, ms", *map(middle, timed(list(curve.values()), rounds)))
    against_transformers(device, rounds // 2)
    return 0


def against_transformers(device: torch.device, rounds: int) -> None:
    """Training steps and sampling, beside the faster of transformers' two implementations."""
    try:
        import transformers
    except ImportError:
        return print("\nno ratios to transformers: pip install transformers")
    shape = ModelConfig(32, moe_intermediate_size=64, num_experts=16, num_experts_per_tok=2)
    model, ids = MoETransformer(shape).to(device), torch.randint(2, 32, (512, 28), device=device)
    prompts, C, G = ids[:64, :12], 16, 8
    forwards = [lambda: model(ids)[0]]
    writers = [lambda: generate(model, prompts, C, eos=-1, pad=0, samples=G)]
    options = {"do_sample": True, "num_return_sequences": G, "max_new_tokens": C}
    config = json.loads(json.dumps(pr2_mini.config_json(model)))
    for kind in ("eager", "grouped_mm"):
        peer = transformers.Qwen3MoeForCausalLM._from_config(
            transformers.Qwen3MoeConfig.from_dict(config), experts_implementation=kind
        ).to(device)
        forwards.append(lambda peer=peer: peer(input_ids=ids, use_cache=False).logits)
        writers.append(functools.partial(peer.generate, prompts, **options))

    def train_on(forward: Callable) -> None:
        F.cross_entropy(forward()[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()

    trainers = [functools.partial(train_on, forward) for forward in forwards]
    version = f"transformers {transformers.__version__}"
    print_row(version, "pr2_mini, ms", "theirs, ms", "ratio", head=True)
    rows = {"training step": trainers, "generation": writers}
    if shutil.which("c++"):  # which torch.compile needs on a CPU
        compiled = torch.compile(model)
        fast = functools.partial(train_on, lambda: compiled(ids)[0])
        rows["training step, ours with torch.compile"] = [fast, *trainers[1:]]
    for name, calls in rows.items():
        own, *theirs = timed(calls, rounds)
        best = min(theirs, key=statistics.median)
        ratios = [b / a for a, b in zip(own, best, strict=True)]
        print_row(name, middle(own), middle(best), middle(ratios, 2))


def main(arguments: list[str]) -> int:
    if Processes.rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open to the end
    try:
        given, variants = parse(arguments)
        alone = Processes.count == 1
        if given.pop("benchmark", False):
            expect(variants is None, "--benchmark and --compare are two commands")
            return benchmark(given)
        if variants is not None:
            expect(alone, "--compare runs in one process; start it without torchrun")
            return compare(given, variants)
        expect("seeds" not in given, "--seeds belongs to --compare; a single run has a --seed")
        if "memory" in given:
            print_memory(given)
            return 0
        if "resume" in given:
            folder = Path(given.pop("resume"))
            run = Run(resumed(given, folder), folder, resume=True)
        else:
            expect(alone or "out" in given, "torchrun needs --out, a folder for all processes")
            flags = settings(given)
            new = Path("runs") / (time.strftime("%Y%m%d-%H%M%S-") + flags["method"])
            run = Run(flags, Path(given.get("out") or new))
            print(f"base model       {run.origin}")
        step, method = run.progress["step"], run.config.method
        run.show(f"at step {step}" if step else "before RL")
        options = {"total": run.flags["steps"], "initial": step, "disable": Processes.rank > 0}
        with tqdm(desc=f"RL with {method}", **options) as bar:
            code = run.train(bar)
        if code == 0:
            run.report()
        return code
    except (ValueError, OSError) as error:
        # All processes find the same fault in flags and files; one word is enough.
        if Processes.rank == 0 or dist.is_initialized():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "by peer" not in str(error):  # gloo's word where another process has gone
            raise
        print(f"process {Processes.rank} stops because another has", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped at once; what was checkpointed before is kept", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
