"""Where the time of an RL step goes, and how pr2_mini compares with transformers.

OMP_NUM_THREADS=1 python -m scale.bench        # minutes; the toy's model and settings
"""

import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
import transformers

import pr2_mini
import train_toy
from pr2_mini import ModelConfig, MoETransformer, RLConfig, RolloutEngine, generate

VARIANTS = {method: {"method": method} for method in pr2_mini.RECORDS}
VARIANTS["pr3, momentum"] = {"method": "pr3", "prediction": "momentum"}


def now() -> float:
    """Milliseconds, when all that was asked for is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * time.perf_counter()


def milliseconds(calls: list[Callable], rounds: int) -> list[list[float]]:
    """Of every call, in turn, so that a slow spell of the machine hits all alike; the first round
    only warms up."""
    taken = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, times in zip(calls, taken, strict=True):
            start = now()
            call()
            times.append(now() - start)
    return [times[1:] for times in taken]


class Timed:
    """A function that counts the milliseconds of its calls."""

    def __init__(self, function: Callable):
        self.function = function
        self.spent = 0.0

    def __call__(self, *arguments):
        start = now()
        result = self.function(*arguments)
        self.spent += now() - start
        return result


def rl_steps(changes: dict, phases: list[Timed], kept: list) -> Callable:
    """A function that makes an RL step and adds to `kept` what each of its phases took."""
    settings = train_toy.Settings(**changes, eos=(-1,))  # no response ends early
    task = train_toy.build_task(settings)
    settings.max_new_tokens = task.response_length
    model = train_toy.untrained_model(task, settings)
    engine = RolloutEngine(model, settings)
    optimizer = pr2_mini.make_optimizer(model, settings)
    problems = task.problems(settings.prompts, train_toy.generator_for("benchmark"))
    prompts, pads = [tensor.to(settings.device) for tensor in task.prompts(problems)]

    def step():
        for phase in phases:
            phase.spent = 0.0
        pr2_mini.rl_step(
            model, engine, optimizer, settings, prompts, pads, lambda seen: seen.tokens.sum(1)
        )
        kept.append([phase.spent for phase in phases])

    return step


def time_phases(rounds: int) -> None:
    """A table with a row for each method."""
    phases = [Timed(pr2_mini.roll_out), Timed(pr2_mini.old_pass)]
    kept = {name: [] for name in VARIANTS}
    steps = [rl_steps(changes, phases, kept[name]) for name, changes in VARIANTS.items()]
    with mock.patch.multiple(pr2_mini, roll_out=phases[0], old_pass=phases[1]):
        taken = milliseconds(steps, rounds)
    print("\n| RL step, ms | rollout | old pass | update | whole | over grpo |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, times in zip(VARIANTS, taken, strict=True):
        rollout, old_pass = map(statistics.median, zip(*kept[name][1:], strict=True))
        whole = statistics.median(times)
        over = statistics.median(a / b for a, b in zip(times, taken[0], strict=True)) - 1
        update = whole - rollout - old_pass
        print(f"| {name} | {rollout:.0f} | {old_pass:.0f} | {update:.0f} | {whole:.0f}", end="")
        print(f" | {over:+.1%} |")


def time_beside_transformers(rounds: int) -> None:
    """A training step of 512 x 28 tokens and 512 x 16 sampled ones, top-2 of 16 experts."""
    device = train_toy.Settings().device
    config = ModelConfig(32, moe_intermediate_size=64, num_experts=16, num_experts_per_tok=2)
    model = MoETransformer(config).to(device)
    hf_config = transformers.Qwen3MoeConfig(**vars(config), eos_token_id=None, pad_token_id=0)
    peer = transformers.Qwen3MoeForCausalLM._from_config(
        hf_config, experts_implementation="grouped_mm"
    ).to(device)
    rl = RLConfig(samples=8, max_new_tokens=16, eos=(-1,))
    ids = torch.randint(2, 32, (512, 28), device=device)
    prompts = ids[:64, :12]
    pads = torch.zeros(64, dtype=torch.int64, device=device)

    def train_on(logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()

    def sample_theirs():
        peer.generate(prompts, do_sample=True, num_return_sequences=8, max_new_tokens=16)

    calls = [
        lambda: train_on(model(ids)[0]),
        lambda: train_on(peer(input_ids=ids, use_cache=False).logits),
        lambda: generate(model, rl, prompts, pads),
        sample_theirs,
    ]
    taken = milliseconds(calls, rounds)
    print(f"\n| transformers {transformers.__version__} | pr2_mini, ms | theirs, ms | ratio |")
    print("| --- | --- | --- | --- |")
    for name, own, other in (("training step", 0, 1), ("generation", 2, 3)):
        ours = statistics.median(taken[own])
        theirs = statistics.median(taken[other])
        ratio = statistics.median(b / a for a, b in zip(taken[own], taken[other], strict=True))
        print(f"| {name} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} |")


def main(rounds: int = 20) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {rounds}")
    time_phases(rounds)
    time_beside_transformers(rounds)


if __name__ == "__main__":
    main()
