"""Train the toy: warm up a small MoE on sums with slips, then sharpen it by RL with PR2.

    python train_toy.py                            # warm-up (cached) and RL, minutes on a laptop
    python train_toy.py --method r3 --seed 1       # another method, another seed
    python train_toy.py --resume runs/NAME         # go on after a stop or, with --steps, for longer
    python train_toy.py --compare r3 pr3 pr3:prediction=momentum       # side by side, three seeds

A run's folder holds config.json (every setting), metrics.jsonl (a line for each rollout batch),
checkpoint.pt and, if matplotlib is installed, run.png. The method is in pr2_mini.py.
"""

import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import statistics
import sys
import time
import warnings
from argparse import SUPPRESS, ArgumentParser
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal, get_args

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch can do without it

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import cuda
from tqdm import tqdm

import pr2_mini
from pr2_mini import AdditionTask, MicroBatch, ModelConfig, MoETransformer, RLConfig


# --------------------------------------------------------------------------------- 1. Settings
@dataclass
class Settings(RLConfig):
    """Every setting of a run: an RL step's, and these. Each is a flag, its comment the help."""

    max_new_tokens: int = 0  # longest response, 0 = what the task needs
    mini_steps: int = 4  # kappa, updates per rollout batch
    router_multiplier: float = 10.0  # learning rate of the routers W over the policy's (ours)
    seed: int = 0  # of the base model and of everything after it
    steps: int = 45  # rollout batches
    prompts: int = 64  # per rollout batch
    operands: int = 11  # numbers in a sum
    largest: int = 2  # largest number in a sum
    slip: float = 0.08  # share of the sums in the warm-up's text that are off by one
    warm_up: int = 600  # steps of the warm-up
    layers: int = 4  # of the model
    experts: int = 32  # N, experts per layer
    expert_width: int = 32  # of one expert
    experts_per_token: int = 4  # k; top-1 is not renormalised, or its router would not learn
    device: Literal["cpu", "cuda", "mps"] = "cuda" if cuda.is_available() else "cpu"  # of it all
    base_dir: str = "base"  # where warmed-up base models are kept


source_of = cache(inspect.getsource)  # of what this process runs; files may be edited meanwhile
NO_SETTINGS = {"out", "resume", "compare", "seeds"}  # flags that are none
# Defaults with --compare: a regime where replay changes what is learned, with one expert a token,
# coarse rollouts, fast routers and short sums.
COMPARE_DEFAULTS = {"operands": 3, "largest": 9, "slip": 0.35, "warm_up": 300, "experts": 16}
COMPARE_DEFAULTS.update(expert_width=64, experts_per_token=1, rollout_dtype="fp8", mini_steps=8)
COMPARE_DEFAULTS.update(router_multiplier=30.0, steps=100)


def parser_of(settings: type, usage: str) -> ArgumentParser:
    """A parser with a flag for each setting; the comment in a setting's line is its help."""
    parser = ArgumentParser(usage=usage, argument_default=SUPPRESS, allow_abbrev=False)
    source = source_of(RLConfig) + source_of(settings)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    for field in fields(settings):
        if field.name in ("eos", "pad"):  # the task's
            continue
        kind = type(field.default)
        if field.name not in comments or kind not in (int, float, str):
            raise ValueError(
                f"setting {field.name}: expected an int, a float or a str as default, and behind it"
                " a comment, which is the flag's help; for a switch take 0 and 1, or two words"
            )
        text = f"{comments[field.name]} (default: {field.default})".replace("%", "%%")
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=kind, choices=get_args(field.type) or None, help=text)
    return parser


def check_ranges(settings: RLConfig, parser: ArgumentParser) -> None:
    """Ends the program where a number is out of range. A count is at least 1, or 0 if that is a
    default of it, here or in RLConfig; everything else is at least 0. All are below 2^31."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        least = 0
        if type(value) is int:
            least = min(1, field.default, getattr(RLConfig, field.name, 1))
        if type(value) in (int, float) and not least <= value < 2**31:
            parser.error(f"{field.name} is {value}; expected {least} or more, below 2^31")
    if settings.samples < 2:
        parser.error("samples must be 2 or more: responses to one prompt are compared")
    if not 0 < settings.feature_share <= 1:
        parser.error("feature_share must be above 0 and at most 1")
    if settings.temperature == 0:
        parser.error("temperature must be above 0")
    if settings.beta1 >= 1:
        parser.error("beta1 must be below 1")


PARSER = parser_of(Settings, "python train_toy.py [--FLAG VALUE ...]")
PARSER.add_argument("--out", type=Path, help="folder of the run; default: a new one in runs/")
PARSER.add_argument("--resume", type=Path, help="folder of a run to go on with")
PARSER.add_argument(
    "--compare",
    nargs="*",
    metavar="METHOD[:setting=value,...]",
    help=f"variants, side by side; other defaults: {COMPARE_DEFAULTS}",
)
PARSER.add_argument("--seeds", type=int, help="runs per variant of --compare (default: 3)")


def settings_of(values: dict) -> Settings:
    """The settings among values by name, checked."""
    s = Settings(**{name: values[name] for name in values if name not in NO_SETTINGS})
    check_ranges(s, PARSER)
    refuse(s.prompts % s.mini_steps != 0, "prompts must be a multiple of mini_steps")
    refuse(s.slip > 1, "slip must be at most 1")
    refuse(s.experts_per_token > s.experts, "experts_per_token must not exceed experts")
    refuse(s.expert_width % 8 != 0, "expert_width must be a multiple of 8")
    available = torch.get_device_module(s.device).is_available()
    refuse(not available, f"device {s.device} is not available here")
    build_task(s)
    return s


def refuse(applies: bool, sentence: str) -> None:
    """Ends the program with one sentence and exit code 2."""
    if applies:
        PARSER.error(sentence)


def build_task(settings: Settings) -> AdditionTask:
    """The only function that knows which task it is; its class says what any task needs."""
    sums = (settings.largest + 1) ** settings.operands
    refuse(settings.operands < 2, "operands must be 2 or more")
    refuse(sums < 100, "operands and largest make fewer than 100 sums; raise one of them")
    return AdditionTask(settings.operands, settings.largest)


# --------------------------------------------------------------------------------- 2. Base model
def warm_up(model: MoETransformer, task: AdditionTask, settings: Settings) -> None:
    """Supervised training on worked solutions with slips, so that RL has something to sharpen: it
    cannot teach what is never sampled, and has nothing to do where every sample is right."""
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0, fused=True)
    width = task.prompt_length + task.response_length
    for step in tqdm(range(settings.warm_up), "warm-up", leave=False):
        # A linear ramp, then a cosine down to a twentieth.
        cosine = 0.525 + 0.475 * math.cos(math.pi * step / settings.warm_up)
        optimizer.param_groups[0]["lr"] = 3e-3 * min((step + 1) / 20, cosine)
        # 1536 tokens in the layout of a rollout, of which the solutions are to be learned.
        problems = task.problems(max(1, 1536 // width), generator)
        prompts, pads = task.prompts(problems)
        solutions = task.solutions(problems, settings.slip, generator)
        tokens = torch.cat([prompts, solutions], dim=1).to(settings.device)
        real = tokens[:, 1:] != task.pad
        answer = real.clone()
        answer[:, : task.prompt_length - 1] = False
        logits, trace = model(tokens[:, :-1], pads.to(settings.device))
        loss = F.cross_entropy(logits[answer], tokens[:, 1:][answer])
        # Switch Transformer's load balancing loss N sum_j f_j P_j, mean over layers: f_j is the
        # share of slots that went to expert j, P_j its mean probability.
        N = settings.experts
        probability = trace.logits[:, real].softmax(-1).mean(1)  # (L, N)
        chosen = trace.experts[:, real].flatten(1).long()  # (L, slots)
        load = torch.stack([layer.bincount(minlength=N) for layer in chosen]) / chosen.shape[1]
        balance = N * (load * probability).sum(-1).mean()
        optimizer.zero_grad()
        (loss + 0.01 * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def untrained_model(task: AdditionTask, settings: Settings) -> MoETransformer:
    config = ModelConfig(
        vocab_size=task.vocab_size,
        num_hidden_layers=settings.layers,
        moe_intermediate_size=settings.expert_width,
        num_experts=settings.experts,
        num_experts_per_tok=settings.experts_per_token,
        norm_topk_prob=settings.experts_per_token > 1,
    )
    torch.manual_seed(settings.seed)
    return MoETransformer(config).to(settings.device)


def warm_up_or_load(model: MoETransformer, task: AdditionTask, settings: Settings) -> None:
    """Warms the model up, or takes what an earlier run has kept. A file's name depends on all that
    it is made of: settings, parameters, and the code of the model, the task and the warm-up."""
    of_a_run = {"steps", "prompts", "base_dir"} | {field.name for field in fields(RLConfig)}
    made_of = [f"{name} {value}" for name, value in vars(settings).items() if name not in of_a_run]
    made_of += [f"{name} {tuple(weight.shape)}" for name, weight in model.state_dict().items()]
    code = [ModelConfig, untrained_model, warm_up, pr2_mini.rotate]
    code += type(task).__mro__[:-1]  # the task's class and those it inherits from
    code += dict.fromkeys(type(module) for module in model.modules())
    made_of += [source_of(each) for each in code]
    path = Path(settings.base_dir) / f"{type(task).__name__}-{settings.seed}-{digest(made_of)}.pt"
    with FileLock(f"{path}.lock"):  # another process may be making the same one
        if not path.exists():
            warm_up(model, task, settings)
            save(model.state_dict(), path)
        weights = torch.load(path, map_location=settings.device)
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    fits = {name: weight.shape for name, weight in weights.items()} == shapes
    refuse(not fits, f"{path} is another model's; delete it, or give another --base-dir")
    model.load_state_dict(weights)


def save(content: dict | str, path: Path) -> None:
    """Tensors or text: all of the file or none of it, whenever the process is killed."""
    unfinished = Path(f"{path}.partial")
    if isinstance(content, str):
        unfinished.write_text(content)
    else:
        torch.save(content, unfinished)
    os.replace(unfinished, path)


# ----------------------------------------------------------------------------------- 3. Training
def digest(value: object) -> str:
    """Twelve hexadecimal digits of a hash of what repr shows of a value."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def generator_for(*key: object, device: str = "cpu") -> torch.Generator:
    """Random numbers that depend on nothing but the key, so that no state has to be saved."""
    return torch.Generator(device).manual_seed(int(digest(key), 16))


def respond(model, task, config: Settings, problems: list, samples: int, temperature: float):
    """The training model's responses and their rewards; the same model samples the same."""
    prompts, pads = [tensor.to(config.device) for tensor in task.prompts(problems)]
    config = replace(config, samples=samples, temperature=temperature)
    generator = generator_for("answers", device=config.device)
    rollout = pr2_mini.generate(model, config, prompts, pads, generator)
    responses = task.decode(rollout.tokens[:, prompts.shape[1] :])
    rewards = task.rewards(problems, rollout)
    return responses, pr2_mini.checked_rewards(rewards, len(problems), samples)


def train(settings: Settings, folder: Path, alone: bool = True) -> list[dict]:
    """A run, or the rest of one, and if it is alone a report; returns the rows of metrics.jsonl."""
    lock = FileLock(folder / "run.lock")  # the system lets go of it when the process ends
    try:
        lock.acquire(timeout=0)
    except Timeout:
        PARSER.error(f"another process is at work in {folder}; wait for it")
    checkpoint = folder / "checkpoint.pt"
    state = torch.load(checkpoint, map_location=settings.device) if checkpoint.exists() else {}
    history = state.get("history", [])
    done = len(history)
    refuse(done > settings.steps, f"{folder} has {done} rollout batches; give more --steps")
    save(json.dumps(vars(settings), indent=2), folder / "config.json")

    # Build.
    task = build_task(settings)
    length = settings.max_new_tokens or task.response_length
    config = replace(settings, max_new_tokens=length, eos=task.eos, pad=task.pad)
    # Different held-out problems, the same before and after RL, and many to measure on.
    drawn = task.problems(64, generator_for("showcase"), held_out=True)
    examples = list(dict.fromkeys(drawn))[:8]
    held_out = task.problems(256, generator_for("held out"), held_out=True)
    model = untrained_model(task, settings)
    respond(model, task, config, examples, 2, settings.temperature)  # a bug shows here at once
    warm_up_or_load(model, task, settings)
    before = respond(model, task, config, examples, 8, settings.temperature) if alone else None
    engine = pr2_mini.RolloutEngine(model, config)
    optimizer = pr2_mini.make_optimizer(model, config)
    rates = [group["lr"] for group in optimizer.param_groups]

    # Maybe resume. What was written after the last checkpoint is made again.
    if history:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))

    # Loop.
    routes = None
    bar = tqdm(range(done + 1, settings.steps + 1), f"RL with {settings.method}")
    for step in bar:
        # Ours: Adam's first steps are as large as its rate allows and would scramble the routers.
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, step / 10)
        if alone and config.recorder and step == settings.steps:
            routes = record_routes(model, engine, optimizer, config, task, examples)

        # One rollout batch.
        problems = task.problems(settings.prompts, generator_for("prompts", settings.seed, step))
        prompts, pads = [tensor.to(settings.device) for tensor in task.prompts(problems)]
        reward = partial(task.rewards, problems)
        generator = generator_for("samples", settings.seed, step, device=settings.device)
        start = time.perf_counter()
        row = pr2_mini.rl_step(model, engine, optimizer, config, prompts, pads, reward, generator)
        row["seconds"] = time.perf_counter() - start
        log_ratios = [row[f"log_ratio_max/{i}"] for i in mini_steps_of(row)]
        log_ratio = float(torch.tensor(log_ratios).max())  # NaN if any is: shown as e^700
        row["largest_ratio"] = math.exp(min(700.0, log_ratio))  # pi_theta / pi_old or its inverse
        row["skipped"] = sum(row[f"skipped/{i}"] for i in mini_steps_of(row))

        # Evaluate the training model on problems that are never trained on.
        due = step % 10 == 0 or step in (1, settings.steps)
        if due:
            for name, temperature in (("held_out", settings.temperature), ("greedy", 0.0)):
                _, rewards = respond(model, task, config, held_out, 1, temperature)
                row[name] = float(rewards.mean())

        # Write. A checkpoint is worth keeping only while updates succeed.
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        history.append({"step": step, **finite})
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(history[-1]) + "\n")
        if due and not row["skipped"]:
            state = {"history": history, "model": model.state_dict()}
            state["optimizer"] = optimizer.state_dict()
            save(state, checkpoint)
        bar.set_postfix(reward=f"{row['reward']:.2f}", refresh=False)

    if alone:
        after = respond(model, task, config, examples, 8, settings.temperature)
        report(history, examples, before, after)
        if routes is not None:
            print_routes(model, config, task, routes)
        draw({settings.method: [history]}, folder / "run.png")
    lock.release()
    return history


# ------------------------------------------------------------------------------------- 4. Report
def mean_of(rows: list[dict], name: str) -> float:
    """The mean over those rows that have a number there."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.fmean(values) if values else math.nan


def mini_steps_of(columns: dict) -> range:
    """1 to kappa, of a row of metrics.jsonl or of a summary."""
    return range(1, 1 + sum(name.startswith("agreement/") for name in columns))


def summary(history: list[dict]) -> dict[str, float]:
    """A number a column for one run; "name/i" at mini-step i, over batches 11 and later, when the
    learning rate has risen; "held_out" and "greedy" after the last. Of the deviating slots that
    stale replay would have had on the same tokens, "removed" is the share that prediction took
    away, and "removable" the share that the exact change of W would have, on the old inputs. Under
    grpo (measured, not replayed), r3 and pr3 "removed" also counts what the rollout's rounding
    (bf16, fp8) does to the route."""
    settled = history[10:] or history
    columns = {"reward": mean_of(history[-10:], "reward")}
    columns["reward, second half"] = mean_of(history[len(history) // 2 :], "reward")
    columns["held_out"] = mean_of(history[-1:], "held_out")
    columns["greedy"] = mean_of(history[-1:], "greedy")
    for i in mini_steps_of(history[0]):
        for name in ("agreement", "stale_agreement", "no_deviation", "stale_no_deviation"):
            columns[f"{name}/{i}"] = mean_of(settled, f"{name}/{i}")
        stale = columns[f"stale_agreement/{i}"]
        for name, of in (("removed", "agreement"), ("removable", "ideal_agreement")):
            gained = mean_of(settled, f"{of}/{i}") - stale
            columns[f"{name}/{i}"] = gained / (1 - stale) if 1 - stale > 1e-6 else math.nan
    columns["KL"] = mean_of(settled, f"approx_kl/{i}")  # of the last mini-step
    columns["clipfrac"] = mean_of(settled, f"clipfrac/{i}")
    columns["log10 largest ratio"] = math.log10(max(row["largest_ratio"] for row in settled))
    for name in ("mismatch_route", "mismatch_logprob", "seconds"):
        columns[name] = mean_of(settled, name)
    columns["skipped"] = sum(row["skipped"] for row in history)
    return columns


def report(history: list[dict], examples: list, before, after) -> None:
    """The eight problems before and after RL, and the numbers that README.md explains."""
    print(f"\n{'held-out problem':<27} {'before RL':<35} after RL")
    for i, problem in enumerate(examples):
        line = f"{str(problem)[-27:]:<27}"
        for responses, rewards in (before, after):
            line += f" {responses[8 * i][-27:]:<27} {rewards[i].sum():.0f} of 8 "
        print(line.rstrip())
    print(f"right             {before[1].sum():.0f} -> {after[1].sum():.0f} of {after[1].numel()}")
    for name in ("reward", "held_out", "greedy", "entropy", "truncated"):
        print(f"{name:<17} {mean_of(history[:10], name):.3f} -> {mean_of(history[-10:], name):.3f}")
    columns = summary(history)
    print("agreement           slots (stale)       sets (stale)   removed (could be removed)")
    names = "agreement stale_agreement no_deviation stale_no_deviation removed removable"
    for i in mini_steps_of(columns):
        shares = [columns[f"{name}/{i}"] for name in names.split()]
        line = "mini-step {:<7}{:7.2%} ({:.2%}){:9.2%} ({:.2%}){:9.1%} ({:.1%})".format(i, *shares)
        print(line.replace("nan%", "-").replace("(-)", "").rstrip())
    print(f"largest ratio     {10 ** columns['log10 largest ratio']:.3g}")
    for name in ("mismatch_route", "mismatch_logprob", "seconds", "skipped"):
        print(f"{name:<17} {columns[name]:.4g}")


# --------------------------------------------------------------------- 5. A picture of one route
def record_routes(model, engine, optimizer, config: Settings, task, examples) -> MicroBatch:
    """Before the last rollout batch: a response to each example, with the route that is recorded
    for mini-step kappa. What this writes into W_p and the engine, rl_step will write anew."""
    kappa = config.mini_steps
    if config.predicts and config.prediction == "momentum":
        pr2_mini.predict_by_momentum(model, optimizer)
    engine.load(model, config.recorded_horizon("rollout", kappa))
    prompts, pads = [tensor.to(config.device) for tensor in task.prompts(examples)]
    generator = generator_for("route", device=config.device)
    rollout = engine.sample(prompts, pads, generator)
    zeros = torch.zeros(len(rollout.tokens), device=config.device)
    rows = torch.arange(0, len(zeros), config.samples)
    return pr2_mini.old_pass(model, config, rollout, zeros, rows, kappa, generator)


@torch.no_grad()
def print_routes(model, config: Settings, task, batch: MicroBatch) -> None:
    """After the last updates. Of the response with most to see a row a layer, a column a token;
    then how many sets of all responses have which mark."""
    replay = pr2_mini.replay_of(batch, config, updates=True)
    _, trace = pr2_mini.response_logprobs(model, batch, config, replay=replay)
    k = config.experts_per_token
    current = trace.logits.topk(k).indices  # (L, n, k)
    right = pr2_mini.overlap(batch.route[:, batch.at], current) == k  # (L, n)
    stale_right = pr2_mini.overlap(batch.stale, current) == k
    states = 2 * right + stale_right  # (L, n), an index into "x-+."
    response = batch.mask.nonzero()[:, 0]  # (n,) which of the responses a token belongs to
    marks = (states < 3).float().sum(0)  # (n,)
    shown = response == torch.bincount(response, weights=marks).argmax()
    print(f"\nroute of          {task.decode(batch.tokens[:, 1:][batch.at][shown][None])[0]}")
    for layer, row in enumerate(states[:, shown].tolist(), start=1):
        print(f"layer {layer:<11} {''.join('x-+.'[state] for state in row)}")
    counts = states.flatten().bincount(minlength=4).flip(0).tolist()
    line = "all responses     . {} still current, + {} by prediction, - {} lost by it, x {} missed"
    print(line.format(*counts))


# --------------------------------------------------------------------------------- 6. Comparison
def compare(given: dict) -> None:
    """Every variant, on every seed, from the same base models and prompts. A run that is finished
    is kept and one that was stopped is gone on with. given: the flags of the command, by name."""
    refuse("method" in given or "resume" in given, "--compare takes no --method and no --resume")
    refuse(given.get("seeds", 3) < 1, "--seeds must be 1 or more")
    plan = {}
    for variant in given["compare"] or pr2_mini.RECORDS:
        flags = []
        for change in re.split("[:,]", f"method={variant}"):
            name, equals, value = change.partition("=")
            flags.append(f"--{name.replace('_', '-')}{equals}{value}")
        own = vars(PARSER.parse_args(flags))
        shared = own.keys() & (NO_SETTINGS | {"seed", "steps"})
        refuse(bool(shared), f"{variant}: {', '.join(shared)} is the same for all variants")
        values = COMPARE_DEFAULTS | given | own
        settings = settings_of(values)
        seeds = range(settings.seed, settings.seed + given.get("seeds", 3))
        plan[variant] = [replace(settings, seed=seed) for seed in seeds]

    # What other code has made is not gone on with: names depend on these two files, too, and on the
    # task, wherever it is.
    parts = [pr2_mini, sys.modules[__name__], *type(build_task(settings)).__mro__[:-1]]
    code = [source_of(part) for part in parts]
    folder = given.get("out", Path(f"runs/compare-{digest([plan, code])}"))
    made_here = r".*-seed\d+-[0-9a-f]{12}|compare\.(json|png)(\.partial)?|\..*"  # or hidden
    for path in folder.iterdir() if folder.exists() else []:
        foreign = re.fullmatch(made_here, path.name) is None
        refuse(foreign, f"{folder} has {path.name}, which no comparison made; choose another --out")
    histories = {variant: [] for variant in plan}
    for variant, runs in plan.items():
        for settings in runs:
            name = f"{settings.method}-seed{settings.seed}-{digest([settings, code])}"
            histories[variant].append(train(settings, folder / name, alone=False))
    columns = {variant: [summary(run) for run in runs] for variant, runs in histories.items()}
    save(json.dumps(columns, indent=1).replace("NaN", "null"), folder / "compare.json")
    print_table(columns)
    draw(histories, folder / "compare.png")


def print_table(columns: dict[str, list[dict]]) -> None:
    """A column a variant: means over seeds ± half a 95 % interval, of the paired difference to the
    first variant; for that one, and for "removed", a difference already, of the mean."""
    n = len(next(iter(columns.values())))
    t95 = [math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # Student's t
    t = t95[n - 1] if n <= 10 else 1.96 + 2.5 / (n - 1)  # n - 1 degrees of freedom
    print(f"\n{n} seeds; ± half a 95 % interval of the difference to the first variant (in its")
    print("own column, and in rows of what prediction removed or could have: of the mean)\n")
    print("| | " + " | ".join(columns) + " |")
    print("|" + " --- |" * (len(columns) + 1))
    for name in dict.fromkeys(name for runs in columns.values() for name in runs[0]):
        found = [[run.get(name, math.nan) for run in runs] for runs in columns.values()]
        values = torch.tensor(found)  # (variants, n)
        apart = values.clone()
        if not name.startswith("remov"):
            apart[1:] -= values[0]
        spreads = t * apart.std(1, correction=0) / math.sqrt(max(1, n - 1))
        pairs = zip(values.mean(1), spreads, strict=True)
        cells = [f"{mean:.3g} ± {spread:.2g}" for mean, spread in pairs]
        print(f"| {name} | " + " | ".join(cells) + " |")


def draw(histories: dict[str, list[list[dict]]], path: Path) -> None:
    """The figure of a run or of a comparison: a line for each variant, the mean over its runs."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no figure         pip install matplotlib draws one")
        return
    from matplotlib import style
    from matplotlib.figure import Figure

    style.use("petroff10")  # colours that the colour-blind can tell apart
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    reward, held_out, agreement, largest = figure.subplots(2, 2).flat
    for variant, runs in histories.items():
        batches = list(zip(*runs, strict=True))  # each the rows of all runs
        x = range(1, len(batches) + 1)
        means = [mean_of(rows, "reward") for rows in batches]
        smooth = [statistics.fmean(means[max(0, end - 10) : end]) for end in x]
        colour = reward.plot(x, smooth, label=variant)[0].get_color()
        due = [step for step in x if "held_out" in batches[step - 1][0]]
        held_out.plot(due, [mean_of(batches[step - 1], "held_out") for step in due], "o-")
        largest.plot(x, [max(row["largest_ratio"] for row in rows) for rows in batches])
        columns = [summary(run) for run in runs]
        ticks = mini_steps_of(columns[0])
        agreement.plot(ticks, [mean_of(columns, f"agreement/{i}") for i in ticks], "o-")
        stale = [mean_of(columns, f"stale_agreement/{i}") for i in ticks]
        agreement.plot(ticks, stale, ":", color=colour)
    reward.set(title="Sampled reward (mean of 10 batches)", xlabel="rollout batch")
    held_out.set(title="Held-out accuracy", xlabel="rollout batch")
    agreement.set(title="Experts still chosen (dotted: stale)", xlabel="mini-step")
    agreement.locator_params(axis="x", integer=True)
    largest.set(title="Largest PPO ratio of any seed", xlabel="rollout batch", yscale="log")
    reward.legend(frameon=False)
    figure.savefig(path, dpi=100)
    print(f"wrote             {path}")


# --------------------------------------------------------------------------------------- 7. Main
def read_config(folder: Path) -> dict:
    """The settings of a run's config.json, checked as flags are."""
    path = folder / "config.json"
    refuse(not path.is_file(), f"{path} is missing; --resume takes the folder of a run")
    try:
        settings = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        PARSER.error(f"{path} is damaged: expected the settings of a run as JSON")
    missing = vars(Settings()).keys() - settings.keys()
    refuse(bool(missing), f"{path} is of another edition: it has no {', '.join(missing)}")
    names = [name for name in settings if name not in ("eos", "pad")]  # those are the task's
    flags = [f"--{name.replace('_', '-')}={settings[name]}" for name in names]
    return vars(PARSER.parse_args(flags))


def main(arguments: list[str]) -> None:
    given = vars(PARSER.parse_args(arguments))
    refuse(given.get("out", Path()).is_file(), "--out is a file; expected a folder")
    if "compare" in given:
        return compare(given)
    refuse("seeds" in given, "--seeds goes with --compare")
    values = given
    if "resume" in given:
        others = given.keys() - {"resume", "steps"}
        refuse(bool(others), "only --steps may be given with --resume; all else is in config.json")
        values = read_config(given["resume"]) | given
    settings = settings_of(values)
    name = f"{settings.method}-seed{settings.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = given.get("resume", given.get("out", Path("runs") / name))
    if "resume" not in given and folder.exists():
        files = {path.name for path in folder.iterdir()} - {"run.lock", "config.json.partial"}
        refuse(bool(files), f"{folder} is not empty; choose another --out, or --resume a run")
    print(f"run               {folder}")
    if train(settings, folder)[-1]["skipped"]:
        raise SystemExit("an update of the last batch was skipped, so that batch was not saved")


if __name__ == "__main__":
    main(sys.argv[1:])
