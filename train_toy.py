"""Train the toy: warm up a small MoE on sums with slips, then sharpen it by RL with PR2.

    python train_toy.py                          # warm-up (cached) and RL, minutes on a laptop
    python train_toy.py --method r3 --seed 1     # another method, another seed
    python train_toy.py --resume runs/NAME       # go on with a run that was stopped or killed
    python train_toy.py --compare r3 pr2 pr2:alpha=0.3,loss=delta        # side by side

A run's folder holds config.json (every flag), metrics.jsonl (one line per rollout batch) and
checkpoint/step-N (the last two; `latest` names the one to trust). The method is in pr2_mini.py.
"""

import argparse
import dataclasses
import functools
import hashlib
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
from collections.abc import Callable
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch says so when imported

import torch
import torch.nn.functional as F
from tqdm import tqdm

import pr2_mini
from pr2_mini import AdditionTask, ModelConfig, MoETransformer, RLConfig, expect, generate

# ------------------------------------------------------------------------------------- Flags


DEFAULTS = RLConfig()
FLAGS = {  # name: (default, help)
    "method": (DEFAULTS.method, "one of " + ", ".join(pr2_mini.METHODS)),
    "seed": (0, "of the base model and of everything after it"),
    "steps": (250, "rollout batches; with --compare 60 unless given"),
    "prompts": (DEFAULTS.prompts, "prompts per rollout batch"),
    "samples": (DEFAULTS.samples, "responses per prompt"),
    "mini_steps": (DEFAULTS.mini_steps, "kappa, updates per rollout batch"),
    "epochs": (DEFAULTS.epochs, "passes over each rollout batch"),
    "micro_batch": (DEFAULTS.micro_batch, "responses per forward pass, 0 = a whole mini-step"),
    "rollout_dtype": (DEFAULTS.rollout_dtype, "precision of the rollouts: fp32, bf16 or fp8"),
    "learning_rate": (DEFAULTS.learning_rate, "of AdamW"),
    "router_multiplier": (20.0, "learning rate of the routers over the model's"),
    "alpha": (DEFAULTS.alpha, "learning rate of the predictors over the model's"),
    "predictor_loss": (DEFAULTS.predictor_loss, "post or delta"),
    "cached_positions": (DEFAULTS.cached_positions, "T_c per response, 0 = all"),
    "operands": (3, "numbers in a sum"),
    "largest": (9, "largest number in a sum"),
    "experts": (64, "N, experts per layer"),
    "experts_per_token": (8, "k, experts that a token visits"),
    "device": ("auto", "cpu, cuda or mps; auto is cuda if there is one, else cpu"),
    "base_dir": ("base", "where warmed-up base models are cached"),
    "out": ("", "folder of the run; by default a new one in runs/"),
    "save_every": (20, "rollout batches between checkpoints"),
    "resume": ("", "folder of a run to continue"),
    "seeds": (3, "runs per variant of --compare"),
}
ONLY_ONCE = {"out", "resume", "seeds"}  # flags that are not settings of a run


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
        parser.add_argument(
            "--" + name.replace("_", "-"), type=type(default), help=text, metavar=""
        )
    text = (
        "train variants, METHOD or METHOD:flag=value,..., from the same base models, side by side"
    )
    parser.add_argument("--compare", nargs="*", metavar="VARIANT", help=text)
    text = "print where the time goes, and the ratios to transformers if that is installed"
    parser.add_argument("--benchmark", action="store_true", help=text)
    given = vars(parser.parse_args(arguments))
    return given, given.pop("compare", None)


def settings(given: dict) -> dict:
    """Every setting of a run: the given ones, and the defaults of the others."""
    flags = {name: default for name, (default, _) in FLAGS.items()} | given
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
    task = AdditionTask(flags["operands"], flags["largest"])
    model = ModelConfig(
        vocab_size=len(task.characters),
        num_experts=flags["experts"],
        num_experts_per_tok=flags["experts_per_token"],
        max_position_embeddings=task.prompt_length + task.response_length,
    )
    names = set(inspect.signature(RLConfig).parameters) & set(flags)
    rl = RLConfig(max_new_tokens=task.response_length, **{name: flags[name] for name in names})
    expect(flags["steps"] > 0, f"--steps is {flags['steps']}; expected at least 1")
    expect(flags["save_every"] > 0, f"--save-every is {flags['save_every']}; expected at least 1")
    return task, model, rl


def find_device(name: str) -> torch.device:
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f'device "{name}" is not available here; try --device cpu') from None


# ------------------------------------------------------------------------------------- Files


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a file beside `path` and moves it there: all of it or none of it."""
    partial = path.with_name(path.name + ".partial")
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
    empty = not any(folder.iterdir())
    expect(empty, f"{folder} is not empty; choose another --out, or continue it with --resume")


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


def save_checkpoint(folder: Path, step: int, content: dict) -> None:
    """Writes checkpoint/step-N, then points `latest` at it, then drops all but the last two."""
    checkpoints = folder / "checkpoint"
    new = checkpoints / f"step-{step}"
    new.mkdir(parents=True, exist_ok=True)
    torch_save(content, new / "state.pt")
    write_atomically(checkpoints / "latest", lambda partial: partial.write_text(new.name))
    steps = sorted(checkpoints.glob("step-*"), key=lambda path: int(path.name[5:]))
    for old in steps[:-2]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, flags: dict, device: torch.device) -> dict:
    latest = folder / "checkpoint" / "latest"
    expect(latest.is_file(), f"{folder} has no checkpoint yet; start the run again in a new folder")
    content = torch_load(latest.with_name(latest.read_text()) / "state.pt", device)
    for name, value in content["config"].items():
        same = name == "steps" or flags.get(name) == value
        expect(same, f"the checkpoint in {folder} has {name} {value}, not {flags.get(name)}")
    return content


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


def answers(
    model: MoETransformer, task: AdditionTask, problems: list[str], temperature: float = 0.0
) -> list[str]:
    """Problems with the model's answers, "7+5+9=12,21."; the same samples in every call."""
    device = model.embed.weight.device
    prompts = task.encode(problems, task.prompt_length, left=True).to(device)
    options = {"eos": task.eos, "pad": task.pad, "temperature": temperature}
    options["generator"] = torch.Generator(device).manual_seed(0)
    return task.decode(generate(model, prompts, task.response_length, **options).tokens)


def show(title: str, model: MoETransformer, task: AdditionTask, problems: list[str]) -> None:
    """Prints sampled answers: greedy ones are mostly right before RL too."""
    for text in answers(model, task, problems, temperature=1.0):
        print(f"{title:<16} {text}  {'right' if task.rewards([text]).item() else 'wrong'}")


def train(flags: dict, folder: Path, resume: bool = False, shared_bar: tqdm | None = None) -> int:
    """Runs or continues a run; returns the exit code. Quiet where it is given a bar to move."""
    task, model_config, config = configurations(flags)
    device, seed = find_device(flags["device"]), flags["seed"]
    metrics_path = folder / "metrics.jsonl"
    if resume:
        state = load_checkpoint(folder, flags, device)
        model = MoETransformer(model_config).to(device)
    else:
        make_folder(folder)
        model, origin = base_model(model_config, task, seed, device, Path(flags["base_dir"]))
        if not shared_bar:
            print(f"base model       {origin}")
        text = json.dumps(flags, indent=2) + "\n"
        write_atomically(folder / "config.json", lambda partial: partial.write_text(text))
    optimizer = pr2_mini.make_optimizer(model, config)
    rates = [group["lr"] for group in optimizer.param_groups]
    engine = pr2_mini.rollout_engine(model, config.rollout_dtype)
    prompts_from = torch.Generator().manual_seed(seed + 1)  # on the CPU: the same on every device
    samples_from = torch.Generator(device).manual_seed(seed + 2)
    held_out = task.problems(128, torch.Generator().manual_seed(0), held_out=True)
    step = skipped_in_a_row = 0
    history: list[dict] = []
    if resume:
        try:
            step, skipped_in_a_row = state["step"], state["skipped_in_a_row"]
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            prompts_from.set_state(state["prompts_from"].cpu())
            samples_from.set_state(state["samples_from"].cpu())
        except (KeyError, RuntimeError, ValueError):
            raise ValueError(f"the checkpoint in {folder} is of another pr2_mini.py") from None
        lines = metrics_path.read_text().splitlines(keepends=True)[:step]
        expect(
            len(lines) == step,
            f"{metrics_path} lacks lines; expected the {step} up to the checkpoint",
        )
        history = [json.loads(line) for line in lines]
        write_atomically(metrics_path, lambda partial: partial.write_text("".join(lines)))

    def save() -> None:
        content = {"config": flags, "step": step, "skipped_in_a_row": skipped_in_a_row}
        content |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        content |= {
            "prompts_from": prompts_from.get_state(),
            "samples_from": samples_from.get_state(),
        }
        save_checkpoint(folder, step, content)

    def reward(rollout: pr2_mini.Rollout) -> torch.Tensor:
        return task.rewards(task.decode(rollout.tokens))

    stop: list[int] = []  # A signal ends the run after the rollout batch that it falls in.

    def on_signal(number: int, frame: object) -> None:
        if stop:  # the second one at once
            raise KeyboardInterrupt
        stop.append(number)

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, on_signal)
    if not resume:
        save()
    if not shared_bar:
        show("before RL" if step == 0 else f"at step {step}", model, task, held_out[:3])
    bar = shared_bar or tqdm(total=flags["steps"], initial=step, desc=f"RL with {config.method}")
    with open(metrics_path, "a") as log:
        while step < flags["steps"] and not stop and skipped_in_a_row < 10:
            # Adam's first steps are as large as its rate allows and would scramble the routers.
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(1.0, (step + 1) / 10)
            problems = task.problems(config.prompts, prompts_from)
            prompts = task.encode(problems, task.prompt_length, left=True).to(device)
            metrics = pr2_mini.rl_step(
                model, engine, optimizer, config, prompts, reward, samples_from
            )
            metrics["greedy_accuracy"] = task.rewards(answers(model, task, held_out)).mean().item()
            step += 1
            for i in range(1, config.mini_steps * config.epochs + 1):
                skipped_in_a_row = skipped_in_a_row + 1 if metrics[f"skipped/{i}"] else 0
            row = {"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()}
            history.append(row)
            print(json.dumps(row), file=log, flush=True)
            # Weights that have begun to fail are not worth keeping: the last good ones stay.
            if step % flags["save_every"] == 0 and skipped_in_a_row == 0:
                save()
            live = {"reward": f"{metrics['reward']:.2f}"}
            live["agreement"] = f"{100 * metrics['agreement']:.1f}%"
            live["largest_ratio"] = f"{ratio(metrics['log_ratio_max']):.2g}"
            if total := sum(row["skipped"] for row in history):
                live["skipped"] = total
            bar.set_postfix(live, refresh=False)
            bar.update()
    if not shared_bar:
        bar.close()
    command = f"python train_toy.py --resume {folder}" if not shared_bar else "the same command"
    if skipped_in_a_row >= 10:
        print(
            f"stopped: the loss or gradient of {skipped_in_a_row} updates in a row was not finite; "
            f"the last good checkpoint is kept. Lower --learning-rate, or look into it: {command}",
            file=sys.stderr,
        )
        return 1
    if skipped_in_a_row == 0:
        save()
    if stop:
        print(f"stopped after step {step}; continue with: {command}")
        return 128 + stop[0]
    if shared_bar:
        return 0
    show("after RL", model, task, held_out[:3])
    summarise(history, config)
    print(f"wrote            {metrics_path}")
    if plot := pyplot():
        prompts = task.encode(task.problems(config.prompts, prompts_from), task.prompt_length, True)
        V = pr2_mini.aim(model, optimizer) if config.method == "pr2-cf" else None
        collected = (model, engine, config, prompts.to(device), reward, samples_from)
        mini_steps, _ = pr2_mini.collect(*collected)
        for i, batches in enumerate(mini_steps[:-1], 1):  # what the last mini-step will find
            pr2_mini.mini_step(model, optimizer, config, batches, i, V)
        draw_run(plot, history, *watch(model, config, mini_steps[-1][0], task), folder)
    return 0


@torch.no_grad()
def watch(
    model: MoETransformer, config: RLConfig, batch: pr2_mini.Slice, task: AdditionTask
) -> tuple[list[str], torch.Tensor]:
    """One response of a micro-batch, by token, and the state (L, tokens) of its routes.

    0: the replayed set is the current one, and so is the stale one; 1: only the replayed one is;
    2: only the stale one is; 3: neither.
    """
    forward = (model, *batch[:3], config.temperature)
    _, trace = pr2_mini.response_logprobs(*forward, replay=batch.replay)
    logits = pr2_mini.at_response(trace.logits, batch.mask)
    k = batch.reference.shape[-1]
    current = logits.topk(k).indices.to(batch.stale.dtype)
    replayed, stale = (pr2_mini.shared(r, current) == k for r in (batch.reference, batch.stale))
    states = torch.where(replayed, 1 - stale.int(), 3 - stale.int())
    lengths = batch.mask.sum(1).tolist()
    by_response = states.split(lengths, 1)
    row = max(range(len(lengths)), key=lambda r: int((by_response[r] > 0).sum()))
    tokens = batch.tokens[row][-batch.mask.shape[1] :][batch.mask[row]]
    return [task.characters[token] for token in tokens], by_response[row].cpu()


def ratio(log_ratio: float | None) -> float:
    return math.exp(min(log_ratio, 700)) if log_ratio is not None else math.nan


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
        f"mean |log mu_old - log pi_old| {mean('mismatch_logprob', history):.4f}"
    )
    seconds = [f"{name} {mean(f'seconds_{name}', history):.3f}" for name in pr2_mini.PHASES]
    print(f"seconds per step {', '.join(seconds)}")


# ------------------------------------------------------------------------ Comparison and figures

DEVIATIONS = ("1", "2", "3_or_more")
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # Student's t, 1 to 9


def parse_variant(text: str) -> dict:
    """ "pr2:alpha=0.3,loss=delta" -> {"method": "pr2", "alpha": 0.3, "predictor_loss": "delta"}."""
    method, _, changes = text.partition(":")
    flags = {"method": method}
    for change in filter(None, changes.split(",")):
        name, _, value = change.partition("=")
        name = {"loss": "predictor_loss"}.get(name, name.replace("-", "_"))
        known = name in FLAGS and name not in ONLY_ONCE | {"method", "seed", "steps", "base_dir"}
        expect(known, f'variant "{text}" changes "{name}", which is not a setting; see --help')
        try:
            flags[name] = type(FLAGS[name][0])(value)
        except ValueError:
            raise ValueError(f'variant "{text}" gives {name} the bad value "{value}"') from None
    return flags


def summary(history: list[dict]) -> dict[str, float]:
    """One number per column of the table, from one run."""
    settled = history[10:] or history  # the learning rate rises over the first ten batches

    def mean(*names: str) -> float:
        values = [row[name] for row in settled for name in names if row.get(name) is not None]
        return len(names) * statistics.fmean(values) if values else math.nan

    def seconds(row: dict) -> float:
        return sum(row[f"seconds_{phase}"] for phase in pr2_mini.PHASES)

    steps = [name.rpartition("/")[2] for name in history[0] if name.startswith("no_deviation/")]
    columns = {"reward at the last rollout": history[-1]["reward"]}
    columns |= {"greedy accuracy": history[-1]["greedy_accuracy"]}
    for kind in ("no_deviation", "stale_no_deviation", "agreement", "stale_agreement"):
        columns |= {f"{kind}/{i}": mean(f"{kind}/{i}") for i in steps}
    columns |= {f"deviations_{n}": mean(f"deviations_{n}/{steps[-1]}") for n in DEVIATIONS}
    columns |= {"coverage gap": mean("coverage_gap"), "KL": mean("approx_kl")}
    columns |= {"clipfrac": mean("clipfrac_low", "clipfrac_high")}
    columns |= {"largest ratio": max(ratio(row["log_ratio_max"]) for row in settled)}
    columns |= {"mismatch": mean("mismatch_logprob"), "route mismatch": mean("mismatch_route")}
    return columns | {"s/step": statistics.median(map(seconds, settled))}


def interval(values: list[float], base: list[float] | None) -> tuple[float, float]:
    """Mean over seeds, and half the 95 % interval of it or of its paired difference to `base`."""
    pairs = values if base is None else [a - b for a, b in zip(values, base, strict=True)]
    n = len(pairs)
    width = T95[min(n - 1, 9) - 1] * statistics.stdev(pairs) / math.sqrt(n) if n > 1 else math.nan
    return statistics.fmean(values), width


def compare(given: dict, variants: list[str]) -> int:
    """Trains every variant on every seed; writes the table, compare.json and the figure."""
    variants = variants or list(pr2_mini.METHODS)
    seeds, out = given.pop("seeds", FLAGS["seeds"][0]), Path(given.pop("out", "runs/compare"))
    expect(seeds > 0, f"--seeds is {seeds}; expected at least 1")
    expect(
        "resume" not in given, "--compare resumes by itself; repeat its command without --resume"
    )
    expect("method" not in given, "--compare takes methods as variants, not as --method")
    for variant in variants:
        expect(variants.count(variant) == 1, f"--compare names {variant} twice")
    runs = {}
    for seed in range(given.get("seed", 0), given.get("seed", 0) + seeds):
        for variant in variants:
            flags = settings({"steps": 60} | given | parse_variant(variant) | {"seed": seed})
            configurations(flags)
            find_device(flags["device"])
            folder = out / re.sub(r"[^\w.=,-]", "-", f"seed{seed}-{variant}")
            old = folder / "config.json"
            same = not old.exists() or read_config(folder) == flags
            expect(same, f"{folder} holds a run with other settings; choose another --out")
            runs[variant, seed] = folder, flags
    histories = {}
    with tqdm(total=sum(flags["steps"] for _, flags in runs.values()), desc="compare") as bar:
        for (variant, seed), (folder, flags) in runs.items():
            bar.set_description(f"{variant}, seed {seed}")
            log = folder / "metrics.jsonl"
            done = log.exists() and len(log.read_text().splitlines()) == flags["steps"]
            if not done:
                if (folder / "config.json").exists():
                    shutil.rmtree(folder)  # a run that was killed
                if code := train(flags, folder, shared_bar=bar):
                    return code
            else:
                bar.update(flags["steps"])
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            histories.setdefault(variant, []).append(lines)
    columns = {variant: list(map(summary, runs)) for variant, runs in histories.items()}
    table = {}
    for variant in columns:
        table[variant] = {}
        for name in columns[variant][0]:
            base = [run.get(name) for run in columns[variants[0]]]
            paired = variant != variants[0] and None not in base
            values = [run[name] for run in columns[variant]]
            table[variant][name] = interval(values, base if paired else None)
    result = {"flags": given, "seeds": seeds, "table": table, "runs": columns}
    valid = json.loads(json.dumps(result), parse_constant=lambda _: None)  # no NaN in JSON
    text = json.dumps(valid, indent=1) + "\n"
    write_atomically(out / "compare.json", lambda partial: partial.write_text(text))
    print_table(table, seeds, variants[0])
    draw_comparison(histories, out)
    return 0


def print_table(table: dict, seeds: int, base: str) -> None:
    """A Markdown table: mean ± half a 95 % interval."""
    print(f"\n{seeds} seeds; ± is half the 95 % interval of the paired difference to {base}")
    shown = [
        "reward at the last rollout",
        "greedy accuracy",
        "no deviation, %",
        "(stale replay), %",
    ]
    shown += [
        "coverage gap",
        "clipfrac",
        "largest ratio",
        "KL",
        "mismatch",
        "route mismatch",
        "s/step",
    ]
    print("| variant | " + " | ".join(shown) + " |\n|" + " --- |" * (len(shown) + 1))
    for variant, columns in table.items():
        cells = []
        for name in shown:
            kind = {"no deviation, %": "no_deviation", "(stale replay), %": "stale_no_deviation"}
            names = (
                [n for n in columns if n.startswith(kind[name] + "/")] if name in kind else [name]
            )
            scale = 100 if name in kind else 1
            pairs = [(scale * columns[n][0], scale * columns[n][1]) for n in names]
            cells.append(
                ", ".join(
                    f"{mean:.3g}" + (f" ± {width:.1g}" if seeds > 1 else "")
                    for mean, width in pairs
                )
            )
        print(f"| {variant} | " + " | ".join(cells) + " |")


def pyplot():
    """matplotlib's pyplot, or None and a word on how to get it."""
    try:
        import matplotlib
    except ImportError:
        print("no figure         pip install matplotlib draws one, for this command run again")
        return None
    matplotlib.use("Agg")
    import matplotlib.colors
    import matplotlib.patches
    import matplotlib.pyplot
    import matplotlib.ticker

    matplotlib.pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False})
    matplotlib.pyplot.rcParams.update({"axes.spines.right": False, "svg.hashsalt": "pr2"})
    return matplotlib.pyplot


STATES = {
    "replayed set is still the current one": "#E5E5E5",
    "prediction caught what stale replay would have missed": "#0072B2",
    "stale replay was right, prediction is not": "#E69F00",
    "both miss": "#000000",
}


def draw_run(plot, history: list[dict], tokens: list[str], states: torch.Tensor, out: Path) -> None:
    """run.png: reward and agreement over the run, and the routes of one response."""
    figure = plot.figure(figsize=(9, 5.6))
    (top, bottom) = figure.subfigures(2, 1, height_ratios=[3, 2])
    reward, agreement = top.subplots(1, 2)
    x = [row["step"] for row in history]
    reward.plot(x, [row["reward"] for row in history], color="#0072B2", label="sampled")
    greedy = [row["greedy_accuracy"] for row in history]
    reward.plot(x, greedy, "--", color="#999999", label="greedy, held out")
    reward.set(title="Reward", xlabel="rollout batch")
    last = max(int(name[10:]) for name in history[0] if name.startswith("agreement/"))
    for name, colour, line in (("agreement", "#D55E00", "-"), ("stale_agreement", "#000000", ":")):
        label = f"{'stale replay' if 'stale' in name else 'replayed'}, mini-step {last}"
        values = [100 * row[f"{name}/{last}"] for row in history]
        agreement.plot(x, values, line, color=colour, label=label, linewidth=1)
    agreement.set(title="Replayed experts that are still current, %", xlabel="rollout batch")
    reward.legend(frameon=False)
    agreement.legend(frameon=False)
    grid = bottom.subplots()
    colours = list(STATES.values())
    picture = [[plot.matplotlib.colors.to_rgb(colours[s]) for s in row] for row in states.tolist()]
    grid.imshow(picture, aspect="auto")
    grid.set(title="The response with most drift in the last mini-step: tokens and layers")
    grid.set(xticks=range(len(tokens)), yticks=range(len(states)), ylabel="layer")
    grid.set_xticklabels(tokens, fontfamily="monospace")
    grid.set_xticks([i - 0.5 for i in range(1, len(tokens))], minor=True)
    grid.set_yticks([i - 0.5 for i in range(1, len(states))], minor=True)
    grid.grid(which="minor", color="white", linewidth=2)
    grid.tick_params(which="both", length=0)
    patches = [plot.matplotlib.patches.Patch(color=c, label=name) for name, c in STATES.items()]
    grid.legend(
        handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False
    )
    top.subplots_adjust(bottom=0.2, left=0.06, right=0.98)
    bottom.subplots_adjust(bottom=0.4, left=0.06, right=0.98)
    figure.savefig(out / "run.png", dpi=150)
    plot.close(figure)
    print(f"wrote            {out / 'run.png'}")


def draw_comparison(histories: dict[str, list[list[dict]]], out: Path) -> None:
    """compare.png and compare.svg: reward, agreement, deviations and largest ratio."""
    plot = pyplot()
    if plot is None:
        return
    colours = [
        "#000000",
        "#999999",
        "#56B4E9",
        "#0072B2",
        "#D55E00",
        "#E69F00",
        "#009E73",
        "#CC79A7",
    ]
    markers = "osv^DPX*"
    figure, ((reward, agreement), (bars, largest)) = plot.subplots(2, 2, figsize=(9, 6.4))
    for number, (variant, runs) in enumerate(histories.items()):
        style = {"color": colours[number % 8], "label": variant, "linewidth": 1.4}

        def curve(name: str, runs: list = runs) -> list[float]:
            rows = zip(*[[row[name] or 0.0 for row in run] for run in runs], strict=True)
            return [statistics.fmean(row) for row in rows]

        def settled(name: str, runs: list = runs) -> float:
            rows = [row[name] for run in runs for row in run[10:] or run if row[name] is not None]
            return 100 * statistics.fmean(rows)

        raw = curve("reward")
        smooth = [statistics.fmean(raw[max(0, i - 4) : i + 1]) for i in range(len(raw))]
        reward.plot(range(1, len(smooth) + 1), smooth, **style)
        steps = [n.rpartition("/")[2] for n in runs[0][0] if n.startswith("no_deviation/")]
        x = [int(i) for i in steps]
        agreement.plot(
            x, [settled(f"no_deviation/{i}") for i in steps], marker=markers[number % 8], **style
        )
        if variant not in ("grpo", "gspo"):
            stale = [settled(f"stale_no_deviation/{i}") for i in steps]
            agreement.plot(x, stale, ":", color=style["color"], linewidth=1)
        places = [n + 0.8 * (number + 0.5) / len(histories) - 0.4 for n in range(3)]
        heights = [settled(f"deviations_{n}/{steps[-1]}") for n in DEVIATIONS]
        bars.bar(places, heights, 0.8 / len(histories), color=style["color"])
        peaks = [max(ratio(run[i]["log_ratio_max"]) for run in runs) for i in range(len(runs[0]))]
        largest.semilogy(range(1, len(peaks) + 1), peaks, **style)
    reward.set(title="Reward (mean of 5 batches)", xlabel="rollout batch")
    agreement.set(title="Sets without deviation, % (dotted: stale replay)", xlabel="mini-step i")
    agreement.xaxis.get_major_locator().set_params(integer=True)
    bars.set(title="Sets with deviating experts, last mini-step, %", xticks=range(3))
    bars.set_xticklabels(["1", "2", "3 or more"])
    largest.yaxis.set_major_formatter(plot.matplotlib.ticker.FormatStrFormatter("%g"))
    largest.yaxis.set_minor_formatter(plot.matplotlib.ticker.NullFormatter())
    largest.set(title="Largest PPO ratio of a batch", xlabel="rollout batch")
    figure.legend(
        *reward.get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    for kind in ("png", "svg"):
        figure.savefig(out / f"compare.{kind}", dpi=150)
    plot.close(figure)
    print(f"wrote            {out}/compare.json, compare.png, compare.svg")


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
    median, *ends = (
        f"{v:.{digits}f}" for v in (statistics.median(values), values[low], values[~low])
    )
    return f"{median} ({ends[0]} to {ends[1]})"


def print_row(*cells: object, head: bool = False) -> None:
    row = "| " + " | ".join(map(str, cells)) + " |"
    print(f"\n{row}\n|" + " --- |" * len(cells) if head else row)


def benchmark(given: dict, rounds: int = 40) -> int:
    """Prints where a step's time goes and how it grows, and the ratios to transformers."""
    expect(not ONLY_ONCE & given.keys(), "--benchmark goes with the settings of a run only")
    flags = settings(given)
    (task, shape, rl), device = configurations(flags), find_device(flags["device"])
    print(f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads; medians")
    print("and their 95 % intervals; random weights, every response at its full length")
    problems = task.problems(rl.prompts, torch.Generator().manual_seed(flags["seed"]))
    prompts, steps, runs = task.encode(problems, task.prompt_length).to(device), [], {}
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
    for name, calls in (("training step", trainers), ("generation", writers)):
        own, *theirs = timed(calls, rounds)
        best = min(theirs, key=statistics.median)
        ratios = [b / a for a, b in zip(own, best, strict=True)]
        print_row(name, middle(own), middle(best), middle(ratios, 2))


def main(arguments: list[str]) -> int:
    try:
        given, variants = parse(arguments)
        if given.pop("benchmark", False):
            expect(variants is None, "--benchmark and --compare are two commands")
            return benchmark(given)
        if variants is not None:
            return compare(given, variants)
        expect("seeds" not in given, "--seeds belongs to --compare; a single run has a --seed")
        if "resume" in given:
            folder = Path(given.pop("resume"))
            return train(resumed(given, folder), folder, resume=True)
        flags = settings(given)
        new = Path("runs") / (time.strftime("%Y%m%d-%H%M%S-") + flags["method"])
        return train(flags, Path(given.get("out") or new))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once; what was checkpointed before is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
