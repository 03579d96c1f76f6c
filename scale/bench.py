"""Where the time of an RL step goes, and how pr2_mini compares with transformers.

OMP_NUM_THREADS=1 python -m scale.bench        # minutes; the toy's model and settings
"""

import statistics
import time
from collections import defaultdict
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


def timed(call: Callable, taken: list[float]) -> Callable:
    """The call, which now adds to the list how many milliseconds it took."""

    def timed_call(*arguments):
        torch.get_device_module().synchronize()  # of a GPU; on CPUs it does nothing
        start = time.perf_counter()
        result = call(*arguments)
        torch.get_device_module().synchronize()
        taken.append(1000 * (time.perf_counter() - start))
        return result

    return timed_call


def in_turn(calls: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round. All take turns, so that a slow spell of the machine
    hits all alike; the first round only warms up."""
    taken = defaultdict(list)
    for _ in range(rounds + 1):
        for name, call in calls.items():
            timed(call, taken[name])()
    return {name: times[1:] for name, times in taken.items()}


def median_ratio(some: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(some, others, strict=True))


def rl_step_of(changes: dict, phases: dict[str, list[float]]) -> Callable:
    """A function that makes an RL step and adds to `phases` how long each of them took in all."""
    settings = train_toy.Settings(**changes, eos=(-1,))  # no response ends early
    task = train_toy.build_task(settings)
    settings.max_new_tokens = task.response_length
    model = train_toy.untrained_model(task, settings)
    engine = RolloutEngine(model, settings)
    optimizer = pr2_mini.make_optimizer(model, settings)
    problems = task.problems(settings.prompts, train_toy.generator_for("benchmark"))
    prompts, pads = [tensor.to(settings.device) for tensor in task.prompts(problems)]
    arguments = (model, engine, optimizer, settings, prompts, pads, lambda seen: seen.tokens.sum(1))

    def step():
        calls = {"roll_out": [], "old_pass": []}  # of which old_pass is called kappa times
        clocks = {name: timed(getattr(pr2_mini, name), taken) for name, taken in calls.items()}
        with mock.patch.multiple(pr2_mini, **clocks):
            pr2_mini.rl_step(*arguments)
        for name, taken in calls.items():
            phases[name].append(sum(taken))

    return step


def time_phases(rounds: int) -> None:
    """A table with a row for each method."""
    phases = {name: defaultdict(list) for name in VARIANTS}
    steps = {name: rl_step_of(changes, phases[name]) for name, changes in VARIANTS.items()}
    taken = in_turn(steps, rounds)
    print("\n| RL step, ms | rollout | old pass | update | whole | over grpo |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, times in taken.items():
        whole = statistics.median(times)
        rollout = statistics.median(phases[name]["roll_out"][1:])
        old_pass = statistics.median(phases[name]["old_pass"][1:])
        update = whole - rollout - old_pass
        over = median_ratio(times, taken["grpo"]) - 1
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
    sampling = {"do_sample": True, "num_return_sequences": 8, "max_new_tokens": 16}
    ids = torch.randint(2, 32, (512, 28), device=device)
    prompts = ids[:64, :12]
    pads = torch.zeros(64, dtype=torch.int64, device=device)

    def train_on(logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()

    calls = {
        "training step": lambda: train_on(model(ids)[0]),
        "their training step": lambda: train_on(peer(input_ids=ids, use_cache=False).logits),
        "generation": lambda: generate(model, rl, prompts, pads),
        "their generation": lambda: peer.generate(prompts, **sampling),
    }
    taken = in_turn(calls, rounds)
    print(f"\n| transformers {transformers.__version__} | pr2_mini, ms | theirs, ms | ratio |")
    print("| --- | --- | --- | --- |")
    for name in ("training step", "generation"):
        ours = taken[name]
        theirs = taken[f"their {name}"]
        medians = f"{statistics.median(ours):.0f} | {statistics.median(theirs):.0f}"
        print(f"| {name} | {medians} | {median_ratio(theirs, ours):.2f} |")


def main(rounds: int = 20) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {rounds}")
    time_phases(rounds)
    time_beside_transformers(rounds)


if __name__ == "__main__":
    main()
