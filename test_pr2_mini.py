"""What must be true of PR2 mini: one fact a test, in the order of the files they test."""

import contextlib
import copy
import gc
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import nn

import pr2_mini
import train_toy
from pr2_mini import AdditionTask, MoETransformer, RLConfig, RolloutEngine, overlap

torch.set_num_threads(1)  # the tensors are tiny; a second thread would only wait
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.use_deterministic_algorithms(DEVICE == "cuda", warn_only=True)  # for what is bit for bit
parametrize = pytest.mark.parametrize
PAD = 0
METHODS = ("grpo", "r2", "pr2", "r3", "pr3")
PRECISIONS = ("fp32", "bf16", "fp8")


def table(names, *rows):  # a test for each row
    return parametrize(names, rows)


def tiny_model(**changes):
    settings = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    settings.update(moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2)
    settings.update(changes)
    torch.manual_seed(0)
    return MoETransformer(pr2_mini.ModelConfig(**settings)).to(DEVICE)


def randomise_predictor(model):
    """A predictor that changes about half of the routes."""
    torch.manual_seed(1)
    for router in model.routers:
        nn.init.normal_(router.predictor, std=0.1)
    return model


@pytest.fixture
def model():
    return randomise_predictor(tiny_model())


def draws(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def padded(*lengths):
    """Left-padded random tokens (B, T), and how many positions of each row are padding (B,)."""
    pads = max(lengths) - torch.tensor(lengths)
    tokens = torch.randint(2, 20, (len(lengths), max(lengths)), generator=draws())
    padding = torch.arange(max(lengths)) < pads[:, None]
    return tokens.masked_fill(padding, PAD).to(DEVICE), pads.to(DEVICE)


PROMPTS, PADS = padded(5, 3, 4, 2)
H = torch.randn(32, 32, generator=draws()).to(DEVICE)  # 32 inputs of a router
ROUTE = torch.rand(32, 8, generator=draws()).topk(2).indices.to(DEVICE)  # any experts for them


def close(actual, expected, tolerance=1e-5):
    """Equal but for float32 sums taken in another order."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def same_bits(some, others):
    torch.testing.assert_close(some, others, rtol=0, atol=0)


def same_sets(route, other):
    return bool((overlap(route, other) == route.shape[-1]).all())


# ---------------------------------------------------------------------- 1. Router and predictor
@parametrize("renormalise", [True, False])
@parametrize("picked_by", ["rho", "rho_hat", "replay"])
def test_whatever_picked_the_set_rho_weighs_it(renormalise, picked_by):
    router = randomise_predictor(tiny_model(norm_topk_prob=renormalise)).routers[0]
    p = F.linear(H, router.weight)
    wanted = p if picked_by == "rho" else p + 0.5 * F.linear(H, router.predictor)
    replay = ROUTE if picked_by == "replay" else None
    horizon = None if picked_by == "rho" else 0.5  # replay comes before prediction
    weights, experts, logits = router(H, replay=replay, horizon=horizon)
    assert same_sets(experts, wanted.topk(2).indices if replay is None else replay)
    assert same_sets(experts, p.topk(2).indices) == (picked_by == "rho")
    rho = p.softmax(-1).gather(-1, experts)
    close(weights, rho / rho.sum(-1, keepdim=True) if renormalise else rho)
    close(logits, p)


def test_set_whose_probabilities_underflow_is_renormalised_and_has_a_finite_gradient():
    router = tiny_model().routers[0]
    router.weight.data.zero_()
    router.weight.data[:6] = 1.0
    h = torch.full((1, 32), 10.0, device=DEVICE)  # logits of 320 and 0
    weights, _, p = router(h, replay=torch.tensor([[6, 7]], device=DEVICE))
    weights[0, 0].backward()
    assert p.softmax(-1)[0, 6] == 0
    assert weights.tolist() == [[0.5, 0.5]]
    assert router.weight.grad.isfinite().all()


@table(  # KL((3/4, 1/4) || (1/2, 1/2)) and KL((9/10, 1/10) || (3/4, 1/4))
    ("matching", "loss", "slope"),
    ("post", 0.75 * math.log(1.5) + 0.25 * math.log(0.5), 1 / 2 - 3 / 4),
    ("delta", 0.9 * math.log(1.2) + 0.1 * math.log(0.4), 3 / 4 - 9 / 10),
)
def test_predictor_loss_and_gradient_of_a_hand_computed_example(matching, loss, slope):
    """Two layers of three tokens, D = 1, N = 2, m = 1/2 and h = 4: m h = 2, and m b = (ln 3, 0)."""
    log_3 = torch.tensor(3.0, dtype=torch.float64).log()
    W_p = torch.stack([log_3 / 2, 0 * log_3])[:, None].requires_grad_()
    h_old = torch.full((2, 3, 1), 4.0, dtype=torch.float64)
    p_old = torch.stack([0 * log_3, log_3]).expand(2, 3, 2)
    p = torch.stack([log_3, 0 * log_3]).repeat(2, 3, 1).requires_grad_()

    def loss_of(W_p):
        return pr2_mini.predictor_loss(p_old, 0.5 * F.linear(h_old, W_p), p, matching)

    loss_of(W_p).backward()
    assert loss_of(W_p).item() == pytest.approx(6 * loss)
    assert W_p.grad.flatten().tolist() == pytest.approx([6 * 2 * slope, 6 * 2 * -slope])
    assert p.grad is None
    assert torch.autograd.gradcheck(loss_of, W_p)  # finite differences


# ---------------------------------------------------------------- 2. What the passes hand on
ALTERNATING = torch.tensor([1.0, 0.0] * 4)  # rewards of two samples to each of four prompts


def tiny_settings(**changes):
    settings = {"samples": 2, "max_new_tokens": 8, "learning_rate": 1e-2, "max_grad_norm": 1e9}
    settings.update(changes)
    return RLConfig(**settings)


def warmed_up(model, config):
    """An optimizer after 60 equal gradients of the routers, and the model as before them."""
    optimizer = pr2_mini.make_optimizer(model, config)
    torch.manual_seed(3)
    for router in model.routers:
        router.weight.grad = torch.randn_like(router.weight)
    before = copy.deepcopy(model.state_dict())
    for _ in range(60):
        optimizer.step()
    model.load_state_dict(before)
    return optimizer


def run_step(model, config, optimizer=None, rewards=ALTERNATING, prompts=PROMPTS, pads=PADS):
    """An RL step on four prompts: its metrics, and what was seen on the way."""
    inner = RolloutEngine(model, config)
    engine = mock.Mock(spec=["load", "sample"], wraps=inner)  # an engine has nothing else
    seen = SimpleNamespace(engine=inner.model, passes=[], batches=[])

    def keep_pass(_, arguments, given, output):
        given.setdefault("horizon", None)
        seen.passes.append(SimpleNamespace(trace=output[1], **given))

    def keep_batch(*arguments):
        seen.batches.append(old_pass(*arguments))
        return seen.batches[-1]

    def keep_rollout(rollout):
        seen.rollout = rollout
        return rewards

    hook = model.register_forward_hook(keep_pass, with_kwargs=True)
    old_pass = pr2_mini.old_pass
    given = (optimizer or pr2_mini.make_optimizer(model, config), config, prompts, pads)
    with mock.patch.object(pr2_mini, "old_pass", keep_batch):
        seen.metrics = pr2_mini.rl_step(model, engine, *given, keep_rollout, draws(0, DEVICE))
    hook.remove()
    seen.horizons = [call.args[1] for call in engine.load.call_args_list]
    seen.routers_only = [call.kwargs["routers_only"] for call in engine.load.call_args_list]
    seen.prompts = [call.args[0] for call in engine.sample.call_args_list]
    return seen


def test_micro_batch_is_cut_after_its_longest_response_and_aligned_with_its_tokens(model):
    before = copy.deepcopy(model)
    config = tiny_settings(micro_batch=1, feature_share=0.5, temperature=0.7, eos=range(1, 10))
    seen = run_step(model, config)
    assert len({batch.mask.shape[1] for batch in seen.batches}) > 1
    for row, batch in enumerate(seen.batches):
        # The response stands from column 5 on; the token in column j is predicted at j - 1.
        end = 5 + int(seen.rollout.mask[row].sum())
        assert batch.tokens.tolist() == seen.rollout.tokens[row, None, :end].tolist()
        assert torch.equal(batch.sampled_experts, seen.rollout.experts[:, row, 4 : end - 1])
        assert torch.equal(batch.sampled_logprobs[0], seen.rollout.logprobs[row, : end - 5])
        logits, trace = before(batch.tokens[:, :-1], batch.pads, replay=batch.route)
        expected = -F.cross_entropy(logits[0, 4:] / 0.7, batch.tokens[0, 5:], reduction="none")
        close(batch.old_logprobs[0], expected.detach())
        same_bits(batch.stale, trace.logits[:, 0, 4:].topk(2).indices.short())
        if row >= 4:  # of mini-step 2
            same_bits(batch.p_old, trace.logits[:, 0, 4:][:, batch.kept])
            same_bits(batch.h_old, trace.inputs[:, 0, 4:][:, batch.kept])


# --------------------------------------------------------------------------- 3. Settings
def test_each_parameter_is_trained_once_in_the_group_of_its_place_whatever_a_fork_adds():
    model = tiny_model()
    router = model.routers[0]
    router.bias = nn.Parameter(torch.zeros(8))
    router.predictor_bias = nn.Parameter(torch.zeros(8))
    model.blocks[1].moe.shared_expert = nn.Linear(32, 32)
    config = tiny_settings(learning_rate=0.1, router_multiplier=3.0, alpha=50.0, beta1=0.8)
    groups = pr2_mini.make_optimizer(model, config).param_groups
    policy, routers, predictors = [group["params"] for group in groups]
    assert len(policy + routers + predictors) == len(list(model.parameters()))
    assert any(parameter is model.blocks[1].moe.shared_expert.bias for parameter in policy)
    same_bits(routers, [router.weight, router.bias, model.routers[1].weight])
    same_bits(predictors, [router.predictor, router.predictor_bias, model.routers[1].predictor])
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.3, 15.0])
    assert [group["betas"] for group in groups] == [(0.8, 0.999), (0.8, 0.999), (0.2, 0.999)]
    assert [group["weight_decay"] for group in groups] == [0, 0, 0]


# ----------------------------------------------------------------------------- 4. One RL step
# The table of passes in the head of pr2_mini.py, at kappa 2: horizons of the waves and of the two
# old passes, and which route old passes and updates replay; None = top-k of rho.
@table(
    ("method", "wave_m", "old_m", "old_replay", "update_replay"),
    ("grpo", [None], [None, None], None, None),
    ("r2", [None], [None, None], None, "old pass"),
    ("pr2", [None], [0.0, 0.7], None, "old pass"),
    ("r3", [None], [None, None], "rollout", "rollout"),
    ("pr3", [0.0, 0.7], [None, None], "rollout", "rollout"),
)
def test_experts_of_each_pass(method, wave_m, old_m, old_replay, update_replay, model):
    seen = run_step(model, tiny_settings(method=method))
    assert seen.horizons == wave_m
    assert [one.horizon for one in seen.passes] == [*old_m, None, None]
    for i, rows in enumerate([slice(0, 4), slice(4, 8)]):
        old = seen.passes[i]
        update = seen.passes[2 + i]
        recorded = {"rollout": seen.rollout.experts[:, rows, : old.trace.experts.shape[2]]}
        recorded["old pass"] = old.trace.experts
        for one, expected in [(old, old_replay), (update, update_replay)]:
            assert (one.replay is None) == (expected is None)
            assert expected is None or torch.equal(one.replay, recorded[expected])


def test_methods_are_those_of_the_table_of_passes_and_one_more_works(monkeypatch):
    assert get_args(RLConfig.__annotations__["method"]) == tuple(pr2_mini.RECORDS) == METHODS
    monkeypatch.setitem(pr2_mini.RECORDS, "mine", ("training", True))
    found = []
    for method in ("mine", "pr2"):
        model = randomise_predictor(tiny_model())
        config = tiny_settings()
        config.method = method
        found.append(run_step(model, config).metrics)
    assert found[0] == found[1]


@table(
    ("changes", "m"),
    ({}, [0, 0.7 / 3, 1.4 / 3, 0.7]),
    ({"shrink": 1.0}, [0, 1 / 3, 2 / 3, 1]),
    ({"schedule": "constant"}, [1]),
    ({"prediction": "momentum", "beta1": 0.5}, [0, 0.5, 0.75, 0.875]),
    ({"prediction": "momentum", "beta1": 0.5, "schedule": "constant"}, [0, 0.5, 0.75, 0.875]),
    ({"mini_steps": 1}, [0]),
    ({"mini_steps": 1, "schedule": "constant"}, [1]),
    ({"method": "r3"}, [None]),
    ({"method": "pr2"}, [None]),
)
def test_each_prompt_is_sampled_with_the_horizon_of_its_mini_step(changes, m, model):
    seen = run_step(model, replace(tiny_settings(mini_steps=4), **changes))
    assert seen.horizons == pytest.approx(m)
    assert seen.routers_only == [False, True, True, True][: len(m)]
    assert [len(prompts) for prompts in seen.prompts] == [4 // len(m)] * len(m)
    assert torch.equal(torch.cat(seen.prompts), PROMPTS)
    assert torch.equal(seen.rollout.tokens[:, :5], PROMPTS.repeat_interleave(2, dim=0))
    assert torch.equal(seen.rollout.pads, PADS.repeat_interleave(2))


@parametrize("rollout_dtype", PRECISIONS)
@parametrize("method", [*METHODS, "pr2 momentum", "pr3 momentum"])
def test_ratio_is_exactly_one_at_mini_step_1(method, rollout_dtype, model):
    method, _, prediction = method.partition(" ")
    config = tiny_settings(method=method, rollout_dtype=rollout_dtype)
    config.prediction = prediction or "learned"
    for micro_batch in (0, 3):
        config.micro_batch = micro_batch
        metrics = run_step(model, config, warmed_up(model, config)).metrics
        assert metrics["log_ratio_max/1"] == 0 < metrics["log_ratio_max/2"]


@parametrize("methods", [("pr2", "r2"), ("pr3", "r3")])
@table(
    ("changes", "make"),
    ({"alpha": 0.0}, tiny_model),
    ({"alpha": 0.0, "schedule": "constant", "rollout_dtype": "fp8"}, tiny_model),
    ({"prediction": "momentum"}, tiny_model),  # before Adam's first step
    ({"mini_steps": 1}, lambda: randomise_predictor(tiny_model())),
)
def test_where_nothing_is_predicted_pr2_is_plain_replay_bit_for_bit(methods, changes, make):
    metrics = []
    weights = []
    for method in methods:
        model = make()
        metrics.append(run_step(model, tiny_settings(method=method, **changes)).metrics)
        weights.append(dict(model.named_parameters()))
    same_bits(weights[0], weights[1])
    assert not torch.equal(weights[0]["embed.weight"], tiny_model().embed.weight)
    assert metrics[0] | metrics[1] == metrics[0]  # which has two more of the predictor


@parametrize("method", METHODS)
def test_micro_batches_change_a_step_by_rounding_only(method):
    metrics = []
    weights = []
    for micro_batch in (0, 3):
        model = randomise_predictor(tiny_model())
        config = tiny_settings(method=method, micro_batch=micro_batch)
        optimizer = pr2_mini.make_optimizer(model, config)
        for group in optimizer.param_groups:
            group["eps"] = 1.0  # else Adam makes a full step of the rounding of a zero gradient
            group["lr"] = 1.0
        metrics.append(run_step(model, config, optimizer).metrics)
        weights.append(dict(model.named_parameters()))
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3, abs=1e-5)
    close(weights[0], weights[1], tolerance=1e-4)


def test_predictor_learns_the_mean_over_its_kept_tokens_from_mini_step_2_on(model):
    config = tiny_settings(mini_steps=4, feature_share=0.5, micro_batch=1)
    config.learning_rate = 0.0  # so that p stays p_old
    optimizer = pr2_mini.make_optimizer(model, config)
    W_p = model.routers[1].predictor
    found = []
    optimizer.register_step_pre_hook(lambda *_: found.append(W_p.grad))
    seen = run_step(model, config, optimizer)
    assert found[0] is None
    for i in (2, 3, 4):
        m = (i - 1) / 3
        loss = 0.0
        kept = 0
        for batch in seen.batches[2 * i - 2 : 2 * i]:  # one for each of two samples
            layers = zip(model.routers, batch.h_old, strict=True)
            m_b = torch.stack([m * F.linear(h_old, router.predictor) for router, h_old in layers])
            loss += pr2_mini.predictor_loss(batch.p_old, m_b, batch.p_old, "post")
            kept += int(batch.kept.sum())
        close(found[i - 1], torch.autograd.grad(loss / kept, W_p)[0])


@parametrize("ratio", ["token", "sequence"])
@parametrize("tis_cap", [0.0, 1.0])
def test_loss_is_a_mean_over_tokens_or_over_sequences_of_their_means(ratio, tis_cap, model):
    config = tiny_settings(ratio=ratio, tis_cap=tis_cap, rollout_dtype="fp8", micro_batch=3)
    seen = run_step(model, replace(config, eos=(1, 2, 3)))
    of_sequences = []
    of_tokens = []
    for batch in seen.batches[:2]:  # the first mini-step's, whose ratios are 1: loss = -A
        weight = torch.ones_like(batch.old_logprobs)
        if tis_cap:
            weight = (batch.old_logprobs - batch.sampled_logprobs).exp().clamp(max=tis_cap)
            assert not (weight == tis_cap).all()
        for row, length in enumerate(batch.mask.sum(1).tolist()):
            losses = (-batch.advantages[row] * weight[row, :length]).tolist()
            of_tokens += losses
            of_sequences.append(sum(losses) / length)
    values = of_tokens if ratio == "token" else of_sequences
    assert seen.metrics["loss/1"] == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-6)


def update(*gradients):
    """An update with those gradients of the policy, its routers and the predictors."""
    model = tiny_model()
    optimizer = pr2_mini.make_optimizer(model, tiny_settings())
    groups = [group["params"] for group in optimizer.param_groups]
    for group, number in zip(groups, gradients, strict=True):
        for parameter in group:
            parameter.grad = torch.full_like(parameter, number)
    return model, groups, pr2_mini.update(optimizer, tiny_settings(max_grad_norm=2.0))


def test_policy_with_its_routers_and_predictors_are_clipped_apart():
    _, (policy, routers, predictors), found = update(3.0, 5.0, 1e3)
    assert not found["skipped"]
    squares = sum(9.0 * p.numel() for p in policy) + sum(25.0 * p.numel() for p in routers)
    assert float(found["grad_norm"]) == pytest.approx(squares**0.5, rel=1e-4)  # before clipping
    assert float(policy[0].grad.max()) == pytest.approx(3 * 2 / squares**0.5, rel=1e-3)
    assert float(routers[0].grad.max()) == pytest.approx(5 * 2 / squares**0.5, rel=1e-3)
    entries = sum(p.numel() for p in predictors)
    assert float(predictors[0].grad.max()) == pytest.approx(2 / entries**0.5, rel=1e-3)


@parametrize("gradients", [(math.inf, 1.0, 1.0), (1.0, math.nan, 1.0), (1.0, 1.0, math.nan)])
def test_update_that_is_not_finite_is_skipped_and_counted(gradients):
    model, _, found = update(*gradients)
    assert found["skipped"]
    same_bits(model.state_dict(), tiny_model().state_dict())


def one_step(**changes):
    return run_step(tiny_model(), tiny_settings(), **changes)


@table(
    ("make", "message"),
    (lambda: tiny_model(num_experts_per_tok=1), "norm_topk_prob never learns"),
    (lambda: tiny_model(hidden_size=36), "hidden_size"),
    (lambda: tiny_model(moe_intermediate_size=12), "moe_intermediate_size"),
    (lambda: run_step(tiny_model(), tiny_settings(mini_steps=3)), "4 prompts do not divide into 3"),
    (lambda: one_step(prompts=PROMPTS.flip(1)), "pads"),  # padded on the right
    (lambda: one_step(pads=torch.zeros_like(PADS)), "pads"),
    (lambda: one_step(pads=5 - PADS), "pads"),  # lengths
    (lambda: one_step(pads=PROMPTS != PAD), "pads"),  # a mask
    (lambda: one_step(rewards=None), "the reward returned .*NoneType.*expected .*4 x 2"),
    (lambda: one_step(rewards=["12,21."] * 8), "the reward returned .*list.*expected .*4 x 2"),
    (lambda: one_step(rewards=ALTERNATING.view(2, 4)), r"the reward returned .*\(2, 4\)"),
    (lambda: one_step(rewards=ALTERNATING * math.nan), "the reward returned .*nan"),
    (lambda: [AdditionTask(2, 0).problems(1, draws(), each) for each in (0, 1)], "held_out"),
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make()


# --------------------------------------------------------------------- 5. The policy's loss
def test_sequence_log_ratio_is_the_mean_over_the_response():
    log_ratio = torch.tensor([[0.1, 0.3, 0.2], [0.4, -0.2, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    close(pr2_mini.sequence_log_ratio(log_ratio, mask), torch.tensor([[0.2], [0.1]]))


@table(
    ("rewards", "advantages"),
    # Unbiased deviations: sqrt((0.75^2 + 3 * 0.25^2) / 3) = 1/2 and sqrt(4 * 0.5^2 / 3) = sqrt(1/3)
    ([1.0, 0.0, 0.0, 0.0], [1.5, -0.5, -0.5, -0.5]),
    ([1.0, 1.0, 0.0, 0.0], [0.75**0.5, 0.75**0.5, -(0.75**0.5), -(0.75**0.5)]),
    ([0.7] * 8, [0.0] * 8),  # whose mean is not 0.7 in float32
    ([0.7], [0.0]),
)
def test_group_advantages_of_a_hand_computed_example(rewards, advantages):
    found = pr2_mini.group_advantages(torch.tensor([rewards, [9.0] * len(rewards)]))
    close(found, torch.tensor([advantages, [0.0] * len(rewards)]))


@table(
    ("ratio", "advantage", "loss", "slope"),
    (1.0, 2.0, -2.0, -2.0),
    (1.5, 2.0, -2.56, 0.0),  # risen past 1.28 and still wanted: clipped
    (0.5, 2.0, -1.0, -2.0),  # fallen though wanted: pulled back
    (0.5, -2.0, 1.6, 0.0),  # fallen past 0.8 and still unwanted: clipped
    (1.5, -2.0, 3.0, 2.0),  # risen though unwanted: pulled back
    (1e38, -2.0, 2 * math.exp(20), 0.0),  # beyond e^20
)
def test_ppo_loss_clips_only_what_went_far_enough(ratio, advantage, loss, slope):
    log_ratio = torch.tensor(math.log(ratio), requires_grad=True)
    found = pr2_mini.ppo_loss(log_ratio, torch.tensor(advantage), 0.2, 0.28)
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-5)
    assert log_ratio.grad.item() == pytest.approx(slope * ratio, rel=1e-5)  # by the log


# --------------------------------------------------------------------------- 6. What is measured
@table(
    ("name", "ratio", "advantage", "total"),
    ("agreement", 1.0, 1.0, 3.0),  # (1 + 2/3 + 1/3 + 0 in layer 1, 4 in layer 2) / 2
    ("no_deviation", 1.0, 1.0, 2.5),
    ("one_deviation", 1.0, 1.0, 0.5),
    ("stale_agreement", 1.0, 1.0, 11 / 3),
    ("stale_no_deviation", 1.0, 1.0, 3.0),
    ("coverage_gap", 1.0, 1.0, 1.2),  # (0.18 + 0.22 + 0.46 + 0.82 + 4 * 0.18) / 2
    ("clipfrac", 1.3, 1.0, 1.0),
    ("clipfrac", 1.3, -1.0, 0.0),
    ("clipfrac", 0.75, -1.0, 1.0),
    ("clipfrac", 0.7, 1.0, 0.0),
    ("approx_kl", 1.5, 1.0, 0.5 - math.log(1.5)),
)
def test_measures_of_known_routes_and_a_known_ratio(name, ratio, advantage, total):
    """Two layers; four tokens, and a fifth that is padding. Today's top-3 is {0, 1, 2} everywhere,
    and in the second layer nothing has changed."""
    unchanged = [[0, 1, 2]] * 5
    recorded = [[2, 0, 1], [0, 1, 3], [0, 3, 4], [3, 4, 5], [3, 4, 5]]
    stale = [[0, 1, 2], [0, 1, 2], [0, 1, 5], [0, 1, 5]]
    response = torch.tensor([[True, True, True, True, False]])
    batch = SimpleNamespace(mask=response, at=response, h_old=None)
    batch.advantages = torch.tensor([[advantage]])
    batch.route = torch.tensor([[recorded], [unchanged]], dtype=torch.int16)
    batch.stale = torch.tensor([stale, unchanged[:4]])
    padding = math.log(ratio) if name == "clipfrac" else 0.0  # which is not counted
    log_ratio = torch.tensor([[math.log(ratio), 0.0, 0.0, 0.0, padding]])
    rho = torch.tensor([0.40, 0.30, 0.12, 0.08, 0.06, 0.04])
    trace = pr2_mini.Trace(None, rho.log().expand(2, 4, 6), None)
    found = pr2_mini.measure(None, log_ratio, batch, trace, tiny_settings())
    assert float(found[name]) == pytest.approx(total, rel=1e-5)


def test_ideal_agreement_is_that_of_a_predictor_which_is_the_change_of_w(model):
    config = tiny_settings(micro_batch=1, learning_rate=0.1, feature_share=0.5, eos=(1, 2, 3))
    before = copy.deepcopy(model)
    optimizer = pr2_mini.make_optimizer(model, config)
    after = []  # the models of the two updates
    optimizer.register_step_pre_hook(lambda *_: after.append(copy.deepcopy(model)))
    seen = run_step(model, config, optimizer)
    same = []
    for batch, one in zip(seen.batches[4:], seen.passes[12:], strict=True):  # of mini-step 2
        for layer, router in enumerate(before.routers):
            router.predictor.data = after[1].routers[layer].weight.data - router.weight.data
            _, predicted, _ = router(batch.h_old[layer], horizon=1.0)
            current = one.trace.logits[layer, batch.kept].topk(2).indices
            same += (overlap(predicted, current) / 2).tolist()
    assert seen.metrics["ideal_agreement/2"] == pytest.approx(sum(same) / len(same), rel=1e-5)
    assert 0.3 < sum(same) / len(same) < 1


def test_metrics_of_a_known_rollout():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rollout = pr2_mini.Rollout(None, None, mask, None, None, ended=torch.arange(4) == 0)
    batch = SimpleNamespace()
    batch.old_logprobs = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -0.5, -0.5]])
    batch.sampled_logprobs = torch.tensor([[-1.5, -1.0, 0.0], [-1.0, -0.5, -1.5]])
    batch.sampled_experts = torch.tensor([[[0, 1]] * 5, [[0, 1]] * 5])
    batch.stale = torch.tensor([[[1, 0]] * 5, [[0, 1]] * 2 + [[0, 2]] * 2 + [[2, 3]]])
    expected = {"reward": 0.625, "zero_variance": 0.25, "truncated": 0.75, "response_length": 2.5}
    expected.update(entropy=1.0, mismatch_logprob=0.5, mismatch_route=0.3)
    rewards = torch.tensor([[1.0, 1.0]] + [[0.0, 1.0]] * 3)
    found = pr2_mini.measure_rollout(rollout, rewards, [batch])
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected)


# ---------------------------------------------- 7. Ours: a predictor that reads Adam's momentum
MOMENTUM = tiny_settings(prediction="momentum", learning_rate=1e-3)


@parametrize("updates", [1, 3])
def test_momentum_predicts_the_updates_that_follow_if_gradients_average_out(updates, model):
    optimizer = warmed_up(model, MOMENTUM)
    pr2_mini.predict_by_momentum(model, optimizer)
    weight = model.routers[1].weight
    before = weight.detach().clone()
    weight.grad.zero_()
    for _ in range(updates):
        optimizer.step()
    change = weight - before
    error = MOMENTUM.horizon(updates + 1) * model.routers[1].predictor - change
    # Bias correction and the second moment move a little on the way: 1 % a step at 60 steps.
    assert error.norm() < 0.01 * updates * change.norm()


def test_momentum_predictor_is_set_before_the_rollout_and_learns_nothing(model):
    optimizer = warmed_up(model, MOMENTUM)
    reference = copy.deepcopy(model)
    pr2_mini.predict_by_momentum(reference, warmed_up(reference, MOMENTUM))
    seen = run_step(model, MOMENTUM, optimizer)
    same_bits(model.routers[1].predictor, reference.routers[1].predictor)
    assert model.routers[1].predictor not in optimizer.state
    folded = reference.routers[1].folded(MOMENTUM.beta1)  # the last wave's
    same_bits(seen.engine.routers[1].weight.data, folded.data)


# --------------------------------------------------------------- 8. A small MoE transformer
def test_grouped_experts_equal_a_loop_over_experts():
    moe = tiny_model().blocks[0].moe
    h = H.view(2, 16, 32)
    output, _, _ = moe(h, None, None)
    weights, experts, _ = moe.router(h)
    expected = torch.zeros_like(h)
    for j in range(8):
        gate, up = (h @ moe.gate_up[j].T).chunk(2, dim=-1)
        share = (weights * (experts == j)).sum(-1, keepdim=True)
        expected = expected + share * (F.silu(gate) * up) @ moe.down[j].T
    close(output, expected)


def test_model_keeps_what_the_module_of_a_fork_has_initialised(monkeypatch):
    class ForkedMoE(pr2_mini.MoE):
        def __init__(self, config):
            super().__init__(config)
            for parameter in self.parameters():
                nn.init.constant_(parameter, 7.0)

    monkeypatch.setattr(pr2_mini, "MoE", ForkedMoE)
    for block in tiny_model().blocks:
        assert all((parameter == 7.0).all() for parameter in block.moe.parameters())


@parametrize("lengths", [(8, 8), (8, 5, 3)])
@parametrize("padding", [PAD, 7])
def test_padded_and_cached_forward_equals_a_forward_of_each_row_alone(lengths, padding, model):
    tokens, pads = padded(*lengths)
    real = tokens != PAD
    tokens = tokens.masked_fill(~real, padding)
    whole, _ = model(tokens, pads)
    cache = {}
    parts = [model(tokens[:, :4], pads, cache)[0]]
    cache = {layer: F.pad(kept, (0, 0, 0, 4)) for layer, kept in cache.items()}
    for column in range(4, 8):
        seen = dict(cache)  # FSDP2 passes a copy, too
        parts.append(model(tokens[:, column, None], pads, seen, start=column)[0])
    for row in range(len(tokens)):
        alone, _ = model(tokens[row, None, real[row]])
        close(whole[row, real[row]], alone[0])
        close(torch.cat(parts, dim=1)[row, real[row]], alone[0])


@parametrize("lengths", [(8, 8), (8, 5, 3)])
@parametrize("renormalise", [True, False])
@parametrize("horizon", [None, 0.5])
def test_forward_chooses_by_rho_or_rho_hat_and_replays_bitwise(lengths, renormalise, horizon):
    model = randomise_predictor(tiny_model(norm_topk_prob=renormalise))
    tokens, pads = padded(*lengths)
    logits, trace = model(tokens, pads, horizon=horizon)
    for layer, router in enumerate(model.routers):
        p_hat = trace.logits[layer] + (horizon or 0) * router.change(trace.inputs[layer])
        assert same_sets(trace.experts[layer], p_hat.topk(2).indices)
    again, same = model(tokens, pads, replay=trace.experts)
    same_bits((again, same), (logits, trace))
    replay = trace.experts.flip(-1).to(torch.uint8)  # any integer type, and any order within a set
    close(model(tokens, pads, replay=replay)[0], logits)


@parametrize("top_k", [1, 2])
def test_replay_gives_gradient_to_its_experts_and_the_router_and_not_to_the_predictor(top_k):
    model = tiny_model(num_experts_per_tok=top_k, norm_topk_prob=top_k > 1)
    route = torch.arange(top_k, device=DEVICE).expand(2, 2, 8, top_k)
    model(padded(8, 8)[0], replay=route, horizon=1.0)[0].square().mean().backward()
    moe = model.blocks[0].moe
    assert moe.gate_up.grad[:top_k].any() and not moe.gate_up.grad[top_k:].any()
    assert moe.router.weight.grad.abs().max() > 1e-6  # rounding noise would be 1e-9
    assert moe.router.predictor.grad is None


# ------------------------------------------------------------------------------- 9. Sampling
def sample(model, prompts=PROMPTS, pads=PADS, seed=0, **changes):
    config = tiny_settings(max_new_tokens=10, **changes)
    return pr2_mini.generate(model, config, prompts, pads, draws(seed, DEVICE))


@parametrize("temperature", [1.0, 0.7, 0])
@parametrize("lengths", [(5, 3, 4, 2), (5, 5)])
def test_rollout_with_its_cache_equals_a_full_forward(temperature, lengths, model):
    prompts, pads = padded(*lengths)
    rollout = sample(model, prompts, pads, temperature=temperature)
    logits, trace = model(rollout.tokens[:, :-1], rollout.pads)
    logits = logits[:, 4:] / (temperature or 1.0)
    expected = -F.cross_entropy(logits.mT, rollout.tokens[:, 5:], reduction="none")
    close(rollout.logprobs, expected.detach() * rollout.mask, tolerance=3e-5)
    for row, length in enumerate(rollout.mask.sum(1).tolist()):
        real = slice(int(rollout.pads[row]), 4 + length)
        assert same_sets(rollout.experts[:, row, real], trace.experts[:, row, real])
    greedy = rollout.tokens[:, 5:] == logits.argmax(-1)
    assert greedy[rollout.mask].all() == (temperature == 0)


def test_samples_follow_the_softmax_at_the_temperature(model):
    rollout = sample(model, PROMPTS[:1], PADS[:1], samples=10_000, temperature=0.5, eos=range(20))
    share = rollout.tokens[:, 5].bincount(minlength=20) / 10_000
    p = (2 * model(PROMPTS[:1])[0][0, -1]).softmax(-1)
    assert (share - p).abs().max() < 0.025  # five deviations


@parametrize("eos", [(1,), (3, 9)])
def test_response_lasts_until_its_first_end_token_and_is_padded_after_it(eos, model):
    rollout = sample(model, samples=16, eos=eos)
    endless = sample(model, samples=16, eos=(-1,))  # whom those that end must not change
    assert endless.mask.all() and not endless.ended.any()
    lengths = rollout.mask.sum(1)
    assert lengths.min() < lengths.max() == 10
    for row, length in enumerate(lengths.tolist()):
        response = rollout.tokens[row, 5:].tolist()
        assert not set(eos) & set(response[: length - 1])
        assert (response[length - 1] in eos) == bool(rollout.ended[row])
        assert set(response[length:]) <= {PAD}
        assert torch.equal(rollout.tokens[row, : 5 + length], endless.tokens[row, : 5 + length])
    assert (rollout.experts[..., 0] != rollout.experts[..., 1]).all()  # a valid set at padding too


@parametrize("rollout_dtype", PRECISIONS)
def test_engine_has_rounded_weights_and_a_later_wave_loads_the_routers_alone(rollout_dtype, model):
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)  # 1 would be the same in every precision
    engine = RolloutEngine(tiny_model(), tiny_settings(rollout_dtype=rollout_dtype))
    engine.load(model, 1.0)
    expected = copy.deepcopy(model)
    for name, weight in model.named_parameters():
        if "router" not in name:
            weight.data.zero_()
    engine.load(model, 0.5, routers_only=True)
    for router in expected.routers:
        router.weight.data += 0.5 * router.predictor.data
    for name, weight in engine.model.named_parameters():
        exact = expected.get_parameter(name)
        if rollout_dtype != "fp32" and "router" not in name:
            exact = exact.bfloat16()
        further = any(word in name for word in ("_proj", "gate_up", "down"))
        assert weight.dtype == exact.dtype
        assert torch.equal(weight, exact) != (rollout_dtype == "fp8" and further), name
        close(weight, exact, tolerance=0.04)  # fp8 has steps of 1/16 of a weight


# ----------------------------------------------------------------------------- 10. A toy task
def judged(task, problems, answers):
    """The rewards of those answers, prompt by prompt."""
    prompts, pads = task.prompts(problems)
    tokens = prompts.repeat_interleave(len(answers) // len(problems), dim=0)
    responses = task.encode([answer.ljust(task.response_length, "_") for answer in answers])
    tokens = torch.cat([tokens, responses], dim=1)
    return task.rewards(problems, pr2_mini.Rollout(tokens, pads, None, None, None, None)).tolist()


def test_reward_is_for_a_right_answer_after_well_formed_sums():
    right = ["12,21.", "13,21."]  # only the final answer counts
    wrong = ["12,22.", "12,21", "21.", "1,1,21.", ",21.", "12,+21.", "1_2,21.", ""]
    other = ["3,6."] + ["12,21."] * 9  # to the second prompt
    found = judged(AdditionTask(3, 99), ["7+5+9=", "1+2+3="], right + wrong + other)
    assert found == [1.0] * 2 + [0.0] * 8 + [1.0] + [0.0] * 9


def test_an_eighth_of_the_problems_is_held_out_and_never_occurs_in_training():
    training = set(AdditionTask(3, 9).problems(9000, draws()))
    held_out = set(AdditionTask(3, 9).problems(4000, draws(), held_out=True))
    assert all(re.fullmatch(r"\d\+\d\+\d=", text) for text in training | held_out)
    assert not training & held_out
    assert len(held_out) / 1000 == pytest.approx(1 / 8, abs=0.03)


@parametrize("slip", [0.0, 0.25, 1.0])
def test_slips_make_solutions_wrong(slip):
    task = AdditionTask(2, 20)  # one sum
    problems = task.problems(1000, draws())
    answers = task.decode(task.solutions(problems, slip, draws(1)))
    wrong = 1 - sum(judged(task, problems, answers)) / 1000
    assert wrong == pytest.approx(slip, abs=0.07 * (slip > 0))


# ==================================================================================== train_toy.py
SMALL = (
    "--operands 2 --largest 9 --slip 0.35 --layers 2 --experts 8 --expert-width 16 --warm-up 30 "
    "--experts-per-token 2 --prompts 8 --samples 4 --mini-steps 2 --device cpu"
)


def toy(flags, figures=False, main=train_toy.main):
    """What a program, `python train_toy.py FLAGS`, prints in this process, and its exit code."""
    code = 0
    output = io.StringIO()
    errors = io.StringIO()
    # As if matplotlib were not installed: drawing takes longer than the run.
    hide = contextlib.nullcontext() if figures else mock.patch.dict("sys.modules", matplotlib=None)
    with hide, contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main(flags.split())
        except SystemExit as stop:
            code = stop.code
    gc.collect()  # a run that was killed lets go of its lock
    return SimpleNamespace(code=code, output=output.getvalue(), errors=errors.getvalue())


def refusal(flags):
    """The sentence with which the command refuses."""
    done = toy(flags)
    assert done.code == 2, done.errors
    return done.errors.splitlines()[-1]


def rows(folder):
    """metrics.jsonl, without what only the clock says."""
    history = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{**row, "seconds": 0.0} for row in history]


def same_run(folder, other):
    """The same metrics, weights and optimizer, bit for bit."""
    assert rows(folder) == rows(other)
    some = torch.load(folder / "checkpoint.pt")
    others = torch.load(other / "checkpoint.pt")
    same_bits(some["model"], others["model"])
    same_bits(some["optimizer"]["state"], others["optimizer"]["state"])
    assert some["optimizer"]["param_groups"] == others["optimizer"]["param_groups"]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The flags of a small run. The first run makes the base model."""
    return f"{SMALL} --base-dir {tmp_path_factory.mktemp('base')}"


@pytest.fixture(scope="session")
def finished(base, tmp_path_factory):
    """An uninterrupted run of three rollout batches."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    done = toy(f"{base} --steps 3 --out {folder}", figures=True)
    return SimpleNamespace(folder=folder, output=done.output)


# ------------------------------------------------------------------------------------ 1. Settings
@table(
    ("line", "mistake"),
    ("colour: int = 3  # of the shed", None),
    ("colour: int = 3", "colour: expected an int, a float or a str"),
    ("colour: bool = True  # of the shed", "colour: expected an int, a float or a str"),
    ("colour: int | None = None  # of the shed", "colour: expected an int, a float or a str"),
)
def test_setting_of_a_fork_is_a_flag_or_its_mistake_is_named(line, mistake, tmp_path, monkeypatch):
    head = "import dataclasses, pr2_mini\n@dataclasses.dataclass\nclass Fork(pr2_mini.RLConfig):\n"
    (tmp_path / "fork.py").write_text(f"{head}    {line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fork", raising=False)
    with pytest.raises(ValueError, match=mistake) if mistake else contextlib.nullcontext():
        parser = train_toy.parser_of(importlib.import_module("fork").Fork, "train")
        assert parser.parse_args(["--colour", "4"]).colour == 4
        assert "of the shed (default: 3)" in parser.format_help()


@table(
    ("flags", "message"),
    ("--method ppo", "argument --method: invalid choice: 'ppo'"),
    ("--seed one", "argument --seed: invalid int value: 'one'"),
    ("--meth r3", "unrecognized arguments: --meth r3"),
    ("--steps 0", "steps is 0; expected 1 or more"),
    (f"--seed {2**64}", "expected 0 or more, below 2^31"),
    ("--prompts 63", "prompts must be a multiple of mini_steps"),
    ("--slip 5", "slip must be at most 1"),
    ("--feature-share 0", "feature_share must be above 0 and at most 1"),
    ("--samples 1", "samples must be 2 or more"),
    ("--beta1 1", "beta1 must be below 1"),
    ("--temperature 0", "temperature must be above 0"),
    ("--device mps" if DEVICE == "cuda" else "--device cuda", "is not available here"),
    ("--resume nowhere", "config.json is missing"),
    ("--resume RUN --alpha 0.5", "only --steps may be given with --resume"),
    ("--resume RUN --steps 2", "has 3 rollout batches; give more --steps"),
    ("--out RUN", "choose another --out"),
    ("--out RUN/config.json", "--out is a file; expected a folder"),
    ("--compare pr3:seed=1", "pr3:seed=1: seed is the same for all variants"),
    ("--compare r3 --out RUN", "which no comparison made"),
)
def test_mistake_changes_nothing(flags, message, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = finished.folder
    before = {path: path.stat().st_mtime_ns for path in run.glob("*.[!l]*")}  # not run.lock
    assert message in refusal(flags.replace("RUN", str(run)))
    assert {path: path.stat().st_mtime_ns for path in run.glob("*.[!l]*")} == before
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------- 2. Base model
NO_WARM_UP = mock.Mock()


def base_name(folder, monkeypatch, sizes=None, edited=None, **changes):
    """The name of the file of a base model; `edited` is a piece of code that has been changed."""
    monkeypatch.setattr(train_toy, "warm_up", NO_WARM_UP)
    monkeypatch.setattr(train_toy, "source_of", lambda each: f"{each} {each is edited}")
    settings = train_toy.Settings(base_dir=str(folder), **changes)
    model = tiny_model(**sizes or {}).to(settings.device)
    train_toy.warm_up_or_load(model, AdditionTask(3, 9), settings)
    return next(folder.glob("*.pt")).name


@table(
    ("changes", "same"),
    ({"method": "r3", "steps": 7, "prompts": 8, "learning_rate": 0.1, "mini_steps": 1}, True),
    ({"slip": 0.5}, False),
    ({"sizes": {"num_experts": 16}}, False),
    ({"edited": AdditionTask}, False),
    ({"edited": pr2_mini.MoE}, False),
    ({"edited": pr2_mini.ModelConfig}, False),
    ({"edited": NO_WARM_UP}, False),
)
def test_name_of_a_base_model_depends_on_what_it_is_made_of(changes, same, tmp_path, monkeypatch):
    name = base_name(tmp_path / "one", monkeypatch)
    assert (base_name(tmp_path / "other", monkeypatch, **changes) == name) == same


def test_names_depend_on_the_code_that_runs_not_on_what_its_file_says_by_now(tmp_path, monkeypatch):
    (tmp_path / "edited.py").write_text("rate = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("edited")
    before = train_toy.source_of(module)
    (tmp_path / "edited.py").write_text("rate = 0.25\n")
    assert train_toy.source_of(module) == before


def test_base_file_that_does_not_fit_is_named_with_both_remedies(finished, base, tmp_path):
    (path,) = Path(base.split()[-1]).glob("*-0-*.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / path.name)
    said = refusal(f"{SMALL} --base-dir {tmp_path} --out {tmp_path / 'run'}")
    assert f"{tmp_path / path.name} is another model's" in said
    assert "delete it, or give another --base-dir" in said


@parametrize("error", [ValueError("of mine"), ZeroDivisionError("of mine")])
def test_bug_in_the_reward_of_a_fork_shows_before_the_warm_up(error, tmp_path, monkeypatch):
    monkeypatch.setattr(AdditionTask, "rewards", mock.Mock(side_effect=error))
    with pytest.raises(type(error), match="of mine"):
        toy(f"{SMALL} --base-dir {tmp_path / 'base'} --out {tmp_path / 'run'}")
    assert not (tmp_path / "base").exists()


# ----------------------------------------------------------------------------------- 3. Training
def test_folder_of_a_run_has_its_last_state_and_a_flat_line_for_each_batch(finished):
    names = {path.name for path in finished.folder.iterdir()} - {"run.png", "run.lock"}
    assert names == {"config.json", "metrics.jsonl", "checkpoint.pt"}
    history = rows(finished.folder)
    assert [row["step"] for row in history] == [1, 2, 3]
    assert ["greedy" in row and "held_out" in row for row in history] == [True, False, True]
    assert all(type(value) in (int, float) for row in history for value in row.values())
    names = "reward truncated entropy mismatch_route agreement/2 approx_kl/2 skipped/2 skipped"
    assert set(names.split()) <= history[1].keys()


def test_folder_at_which_another_process_is_at_work_is_refused(finished):
    with FileLock(finished.folder / "run.lock"):
        assert "another process is at work" in refusal(f"--resume {finished.folder} --steps 4")


def killed(flags, moment, owner, name, call, run=toy):
    """A run that ends before, during or after owner.name does its work for that time."""
    function = getattr(owner, name)
    calls = []

    def dying(*arguments):
        calls.append(name)
        result = function(*arguments) if len(calls) < call or moment == "after" else None
        if len(calls) == call:
            if moment == "during":
                Path(arguments[1]).write_bytes(b"torn")
            raise SystemExit("killed")
        return result

    with mock.patch.object(owner, name, dying):
        assert run(flags).code == "killed"


@table(
    ("death", "begun"),
    (("before", os, "replace", 1), False),  # config.json.partial is there
    (("during", torch, "save", 1), True),
    (("after", os, "replace", 2), True),  # the first checkpoint is there
    (("before", pr2_mini, "rl_step", 3), True),
    (("during", torch, "save", 2), True),
)
def test_run_killed_at_any_moment_resumes_to_the_same_bits(death, begun, base, finished, tmp_path):
    flags = f"{base} --steps 3 --out {tmp_path / 'run'}"
    killed(flags, *death)
    assert (tmp_path / "run" / "config.json").exists() == begun
    assert toy(f"--resume {tmp_path / 'run'}" if begun else flags).code == 0
    same_run(tmp_path / "run", finished.folder)


def test_run_for_more_steps_whose_process_is_killed_equals_a_longer_run(base, finished, tmp_path):
    run = tmp_path / "run"
    toy(f"{base} --steps 1 --out {run}")
    code = """import os, signal, sys, torch, train_toy
torch.set_num_threads(1)  # as here: more would sum in another order
torch.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
train_toy.main(sys.argv[1:])"""
    command = [sys.executable, "-B", "-c", code, "--resume", str(run), "--steps", "3"]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parent, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(rows(run)) == 3 and len(torch.load(run / "checkpoint.pt")["history"]) == 1
    assert toy(f"--resume {run}").code == 0
    same_run(run, finished.folder)


@parametrize(("text", "found"), [('{"seed": ', "is damaged"), ("{}", "is of another edition")])
def test_config_that_is_not_a_whole_one_is_named(text, found, tmp_path):
    (tmp_path / "config.json").write_text(text)
    assert f"{tmp_path / 'config.json'} {found}" in refusal(f"--resume {tmp_path}")


def test_run_whose_last_batch_has_a_skipped_update_says_so_and_fails(base, tmp_path, monkeypatch):
    factors = iter([1.0, 1.0, 1.0, math.nan])  # of the losses of two rollout batches
    loss = pr2_mini.policy_loss
    monkeypatch.setattr(pr2_mini, "policy_loss", lambda *a, **b: next(factors) * loss(*a, **b))
    done = toy(f"{base} --steps 2 --out {tmp_path}")
    assert "an update of the last batch was skipped" in done.code  # a text is an exit code of 1
    assert [row["skipped"] for row in rows(tmp_path)] == [0.0, 1.0]
    assert len(torch.load(tmp_path / "checkpoint.pt")["history"]) == 1


def test_rl_improves_the_reward(tmp_path):
    """A batch's reward has a standard error of 0.04, a mean of 10 of 0.013; 0.05 is asked."""
    flags = f"{SMALL} --warm-up 200 --prompts 16 --samples 8 --steps 40 --router-multiplier 3"
    rates = f"--learning-rate 5e-4 --beta1 0.9 --device {DEVICE} --base-dir {tmp_path / 'base'}"
    toy(f"{flags} {rates} --out {tmp_path / 'run'}")
    rewards = [row["reward"] for row in rows(tmp_path / "run")]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.05


# ------------------------------------------------------------------------------------- 4. Report
def test_report_counts_right_answers_and_says_what_prediction_removed(finished):
    lines = finished.output.split("held-out problem")[1].splitlines()
    problems = {line.split()[0] for line in lines[1:9]}
    assert [zlib.crc32(problem.encode()) % 8 for problem in problems] == [0] * 8
    counts = [re.findall(r" (\d) of 8\b", line) for line in lines[1:9]]
    before, after = [sum(map(int, column)) for column in zip(*counts, strict=True)]
    assert lines[9].split() == ["right", str(before), "->", str(after), "of", "64"]
    columns = train_toy.summary(rows(finished.folder))
    (line,) = re.findall("mini-step 2 .*", finished.output)
    for name in ("agreement", "stale_agreement", "no_deviation", "stale_no_deviation"):
        assert f"{columns[f'{name}/2']:.2%}" in line
    assert line.endswith(f"{columns['removed/2']:.1%} ({columns['removable/2']:.1%})")


def test_summary_of_a_known_history(finished):
    """Of twelve batches, the last two are later than the tenth: the learning rate has risen."""
    row = {**rows(finished.folder)[2], "reward": 0.0, "largest_ratio": 1e9, "skipped": 1.0}
    later = {"agreement/2": 0.85, "stale_agreement/2": 0.8, "ideal_agreement/2": 0.9}
    later.update({"stale_agreement/1": 1.0, "approx_kl/2": None, "clipfrac/2": 0.5})
    later.update({"reward": 1.0, "largest_ratio": 100.0})
    expected = {"reward": 0.2, "reward, second half": 1 / 3, "clipfrac": 0.5, "skipped": 12.0}
    expected.update({"agreement/2": 0.85, "removed/2": 0.25, "removable/2": 0.5, "KL": math.nan})
    expected.update({"removed/1": math.nan, "log10 largest ratio": 2.0})
    found = train_toy.summary([row] * 10 + [{**row, **later}] * 2)
    assert {name: found[name] for name in expected} == pytest.approx(expected, nan_ok=True)


def test_picture_tells_what_prediction_caught_from_what_it_missed(capsys):
    model = tiny_model(num_hidden_layers=1)  # whose router no replay moves
    config = tiny_settings(method="r3", learning_rate=0.0, eos=(-1,), micro_batch=2)
    config.experts_per_token = 2
    batch = run_step(model, config).batches[0]
    current = batch.stale.clone()
    wrong = (current + 1) % 8
    # The first response has nothing to see, the second one all four states.
    recorded_right = torch.tensor([True] * 8 + [False] * 3 + [True] * 5, device=DEVICE)
    stale_right = torch.tensor([True] * 8 + [False, False, True] * 2 + [False, True], device=DEVICE)
    batch.stale = torch.where(stale_right[:, None], current, wrong)
    batch.route[:, batch.at] = torch.where(recorded_right[:, None], current, wrong).short()
    task = SimpleNamespace(decode=lambda ids: [str(ids[0].tolist())])
    train_toy.print_routes(model, config, task, batch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith(str(batch.tokens[1, 5:].tolist()))
    assert lines[2].split() == ["layer", "1", "xx-++.+."]
    counted = ". 10 still current, + 3 by prediction, - 1 lost by it, x 2 missed"
    assert lines[3] == f"all responses     {counted}"


@parametrize("prediction", ["learned", "momentum"])
def test_picture_leaves_the_run_alone(prediction, base, tmp_path):
    flags = f"{base} --steps 3 --prediction {prediction}"
    output = toy(f"{flags} --out {tmp_path / 'alone'}").output
    assert re.search(r"route of .*\nlayer 1 +[x+.-]+\nlayer 2 +[x+.-]+\n", output)
    given = vars(train_toy.PARSER.parse_args(flags.split()))
    train_toy.train(train_toy.settings_of(given), tmp_path / "other", alone=False)
    same_run(tmp_path / "alone", tmp_path / "other")


# ---------------------------------------------------------------------------------- 6. Comparison
COMPARED = ["r3", "pr3:alpha=1e-2", "pr3:alpha=0.5,prediction=momentum"]


@pytest.fixture(scope="session")
def compared(base, tmp_path_factory):
    """A comparison of three variants over two seeds: its flags, and what it printed."""
    folder = tmp_path_factory.mktemp("compared") / "all"
    flags = f"--compare {' '.join(COMPARED)} --seeds 2 --steps 2 {base}"
    done = toy(f"{flags} --out {folder}", figures=True)
    return SimpleNamespace(folder=folder, flags=flags, output=done.output)


def test_every_variant_and_seed_has_a_folder_and_each_seed_one_base_model(compared, base):
    names = sorted(path.name.rpartition("-")[0] for path in compared.folder.glob("*-seed*"))
    assert names == ["pr3-seed0", "pr3-seed0", "pr3-seed1", "pr3-seed1", "r3-seed0", "r3-seed1"]
    bases = sorted(path.name.split("-")[1] for path in Path(base.split()[-1]).glob("*.pt"))
    assert bases == ["0", "1"]


def test_comparison_prints_a_table_and_writes_its_numbers(compared):
    assert f"| | {' | '.join(COMPARED)} |\n| --- |" in compared.output
    content = json.loads((compared.folder / "compare.json").read_text())
    (run,) = compared.folder.glob("r3-seed1-*")
    assert list(content) == COMPARED
    assert content["r3"][1]["reward"] == pytest.approx(sum(row["reward"] for row in rows(run)) / 2)


def test_finished_comparison_is_summed_up_again_without_training(compared, monkeypatch):
    numbers = (compared.folder / "compare.json").read_text()
    (compared.folder / ".DS_Store").touch()  # as macOS leaves behind
    monkeypatch.setattr(pr2_mini, "rl_step", mock.Mock(side_effect=AssertionError()))
    assert toy(f"{compared.flags} --out {compared.folder}").code == 0
    assert (compared.folder / "compare.json").read_text() == numbers


@parametrize("module", [pr2_mini, train_toy])
def test_comparison_is_trained_anew_if_the_code_has_changed(
    module, compared, tmp_path, monkeypatch
):
    shutil.copytree(compared.folder, tmp_path / "all")
    source = train_toy.source_of
    changed = {module: "# edited"}
    monkeypatch.setattr(train_toy, "source_of", lambda each: changed.get(each) or source(each))
    monkeypatch.setattr(pr2_mini, "rl_step", mock.Mock(side_effect=AssertionError("trains")))
    with pytest.raises(AssertionError, match="trains"):
        toy(f"{compared.flags} --out {tmp_path / 'all'}")


@parametrize(("owner", "name", "call"), [(pr2_mini, "rl_step", 8), (os, "replace", 19)])
def test_comparison_that_was_killed_goes_on(owner, name, call, compared, tmp_path):
    """In the fourth run; and when compare.json is written, after three files of each run."""
    flags = f"{compared.flags} --out {tmp_path}"
    killed(flags, "before", owner, name, call)
    assert toy(flags).code == 0
    for folder in compared.folder.glob("*-seed*"):
        same_run(tmp_path / folder.name, folder)


def test_table_has_means_and_students_intervals_of_paired_differences(capsys):
    r3 = [{"reward": reward, "removed/2": 0.0} for reward in (1.0, 3.0)]
    first = {"reward": 3.0, "removed/2": 10.0}
    second = {"reward": 5.0, "removed/2": 30.0}
    train_toy.print_table({"r3": r3, "pr3": [first, second]})
    train_toy.print_table({"r3": [{"twelve": value} for value in [0.0, 1.0] * 6]})
    found = capsys.readouterr().out
    assert "| reward | 2 ± 13 | 4 ± 0 |" in found  # 12.71 sqrt(2) / sqrt(2); differences 2 and 2
    assert "| removed/2 | 0 ± 0 | 20 ± 1.3e+02 |" in found  # a difference already
    assert "| twelve | 0.5 ± 0.33 |" in found  # 2.2 * 0.522 / sqrt(12)


def test_figures_are_drawn(finished, compared):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    for path in (finished.folder / "run.png", compared.folder / "compare.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
