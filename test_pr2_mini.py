"""What must be true of PR2 mini: one fact a test, in the order of the file it tests."""

import contextlib
import copy
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import DTensor

import pr2_mini
import train_toy
from pr2_mini import (
    AdditionTask,
    InputError,
    MoETransformer,
    generate,
    group_advantages,
    make_optimizer,
    overlap,
    predictor_loss,
    predictor_weights,
    rl_step,
    rollout_engine,
    set_momentum_predictor,
)

try:
    import transformers
    from safetensors import torch as safetensors

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
except ImportError:
    transformers = None

torch.set_num_threads(1)  # the tensors are tiny; a second thread would only wait
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
parametrize = pytest.mark.parametrize
PAD = 0
EOS = 1
METHODS = ("grpo", "gspo", "r2", "r3", "pr2", "pr2-trainer")
PREDICTING = ("pr2", "pr2-trainer")
PREDICTORS = ("learned", "momentum")
PRECISIONS = ("fp32", "bf16", "fp8")


def table(names, *rows):
    """A test for each row."""
    return parametrize(names, rows)


def tiny_config(**changes):
    settings = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    settings.update(moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2)
    settings.update(changes)
    return pr2_mini.ModelConfig(**settings)


def tiny_model(**changes):
    torch.manual_seed(0)
    return MoETransformer(tiny_config(**changes)).to(DEVICE)


def randomise_predictor(model):
    """A predictor that changes about half of the routes."""
    torch.manual_seed(1)
    for router in model.routers:
        nn.init.normal_(router.predictor.weight, std=0.1)
    return model


@pytest.fixture
def model():
    return randomise_predictor(tiny_model())


def draws(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def padded_batch(*lengths):
    """Left-padded random tokens (B, T) and which of them are real (B, T)."""
    attend = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    tokens = torch.randint(2, 20, attend.shape, generator=draws())
    return tokens.masked_fill(~attend, PAD).to(DEVICE), attend.to(DEVICE)


TOKENS, _ = padded_batch(8, 8)
PROMPTS, _ = padded_batch(5, 3, 4, 2)
H = torch.randn(32, 32, generator=draws()).to(DEVICE)  # inputs of a router
# Sets of distinct experts for TOKENS that have nothing to do with the router.
ROUTE = torch.rand(2, 2, 8, 8, generator=draws()).topk(2).indices.to(DEVICE)


def close(actual, expected, tolerance=1e-5):
    """Equal but for float32 sums taken in another order."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def same_bits(some, others):
    """Of two dictionaries of tensors."""
    torch.testing.assert_close(some, others, rtol=0, atol=0)


def gradients(model, tokens, **forward):
    """Of a loss that every logit enters, by name; none for parameters that it does not reach."""
    model.zero_grad()
    logits, _ = model(tokens, **forward)
    logits.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------- 1. Router and predictor
@table(
    ("make", "message"),
    (lambda: tiny_config(num_experts_per_tok=9), "num_experts_per_tok is 9; expected at most"),
    (lambda: tiny_config(num_experts_per_tok=1), "top-1 never learns under norm_topk_prob"),
    (lambda: tiny_config(num_key_value_heads=3), "num_attention_heads / num_key_value_heads"),
    (lambda: tiny_config(head_dim=7), "head_dim / 2"),
    (lambda: tiny_config(qk_norm="layer"), 'qk_norm is "layer"'),
    (lambda: tiny_config(hidden_size=0), "hidden_size is 0"),
    (lambda: tiny_model(max_position_embeddings=7)(TOKENS), "8 positions exceed"),
    (lambda: tiny_model()(TOKENS, replay=ROUTE[..., :1]), "the routes have shape"),
    (lambda: tiny_model()(TOKENS, replay=ROUTE.float()), "have dtype torch.float32"),
    (lambda: tiny_model()(TOKENS, replay=ROUTE + 7), "outside 0..7"),
    (lambda: tiny_model()(TOKENS, replay=ROUTE - 1), "outside 0..7"),
    (lambda: tiny_model()(TOKENS, replay=ROUTE // 8), "one expert twice"),
    (lambda: tiny_settings(method="ppo"), 'method is "ppo"; expected one of'),
    (lambda: run_step(tiny_model(), tiny_settings(mini_steps=3)), "4 prompts do not divide"),
    (lambda: AdditionTask(2, 8), "too few sums"),
    (lambda: train_toy.VLLMEngine(None, tiny_config(qk_norm="full")), "vLLM runs OLMoE with"),
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@parametrize("renormalise", [True, False])
@parametrize("picked_by", ["rho_hat", "rho_hat alone", "replay"])
def test_experts_are_picked_and_weighed_as_asked(renormalise, picked_by):
    router = randomise_predictor(tiny_model(norm_topk_prob=renormalise)).routers[0]
    p = F.linear(H, router.weight)
    predicted = p + 0.5 * F.linear(H, router.predictor.weight)
    if picked_by == "replay":
        picked = ROUTE.flatten(0, 2)
        weights, experts, logits = router(H, replay=picked)
    else:
        picked = predicted.topk(2).indices
        weights, experts, logits = router(H, horizon=0.5, only_pick=picked_by == "rho_hat alone")
    rho = (predicted if picked_by == "rho_hat" else p).softmax(-1).gather(-1, experts)
    close(logits, p)
    close(weights, rho / rho.sum(-1, keepdim=True) if renormalise else rho)
    assert (overlap(experts, picked) == 2).all()
    assert not (overlap(experts, p.topk(2).indices) == 2).all()


def test_router_computes_in_float32_in_a_bfloat16_model():
    model = tiny_model().bfloat16()
    _, trace = model(TOKENS, keep_inputs=True)
    expected = F.linear(trace.inputs[1].float(), model.routers[1].weight.float())
    close(trace.logits[1], expected)  # bfloat16 would be off by 1e-2


@parametrize("top_k", [1, 2])
@parametrize("horizon", [None, 1.0])
def test_replay_gives_gradient_to_its_experts_and_the_router_alone(top_k, horizon):
    model = tiny_model(num_experts_per_tok=top_k, norm_topk_prob=top_k > 1)
    route = torch.arange(top_k, device=DEVICE).expand(2, 2, 8, top_k)
    found = gradients(model, TOKENS, replay=route, horizon=horizon)
    experts = found["blocks.0.moe.gate_up"]
    assert experts[:top_k].any()
    assert not experts[top_k:].any()
    router = found["blocks.0.moe.router.weight"]
    assert router.abs().max() > 1e-6  # rounding noise would be 1e-9
    assert not any("predictor" in name for name in found)


def test_forced_set_whose_probabilities_underflow_is_renormalised():
    router = tiny_model().routers[0]
    router.weight.data.zero_()
    router.weight.data[:6] = 1.0
    h = torch.full((1, 32), 10.0, device=DEVICE)  # logits of 320 and 0
    weights, _, p = router(h, replay=torch.tensor([[6, 7]], device=DEVICE))
    weights[0, 0].backward()
    assert p.softmax(-1)[0, 6] == 0
    assert weights.tolist() == [[0.5, 0.5]]
    assert router.weight.grad.isfinite().all()


@table(
    ("kind", "expected", "slope"),
    # KL((3/4, 1/4) || (1/2, 1/2)) and KL((9/10, 1/10) || (3/4, 1/4))
    ("post", 0.75 * math.log(1.5) + 0.25 * math.log(0.5), 6 * (1 / 2 - 3 / 4)),
    ("delta", 0.9 * math.log(1.2) + 0.1 * math.log(0.4), 6 * (3 / 4 - 9 / 10)),
)
def test_predictor_loss_and_gradient_are_those_of_a_hand_computed_example(kind, expected, slope):
    log_3 = math.log(3)
    inputs = torch.tensor([2.0]).expand(2, 3, 1)  # two layers, three tokens, D = 1, N = 2
    weight = torch.tensor([[log_3 / 2], [0.0]]).repeat(2, 1, 1).requires_grad_()  # b = (ln 3, 0)
    old_logits = torch.tensor([0.0, log_3]).expand(2, 3, 2)
    logits = torch.tensor([log_3, 0.0]).repeat(2, 3, 1).requires_grad_()
    found = predictor_loss(inputs, old_logits, logits, weight, kind)
    found.backward()
    assert found.item() == pytest.approx(6 * expected, rel=1e-5)
    close(weight.grad, torch.tensor([[slope], [-slope]]).expand(2, 2, 1))
    assert logits.grad is None


@parametrize("kind", ["post", "delta"])
def test_predictor_gradient_equals_finite_differences_and_reaches_nothing_else(kind):
    torch.manual_seed(0)
    inputs = torch.randn(2, 5, 4)
    old_logits = torch.randn(2, 5, 8)
    logits = torch.randn(2, 5, 8, requires_grad=True)
    weight = torch.randn(2, 8, 4, requires_grad=True)
    step = 1e-2 * torch.randn(2, 8, 4)
    above = predictor_loss(inputs, old_logits, logits, weight + step, kind)
    below = predictor_loss(inputs, old_logits, logits, weight - step, kind)
    predictor_loss(inputs, old_logits, logits, weight, kind).backward()
    rise = float((weight.grad * 2 * step).sum())
    assert rise == pytest.approx((above - below).item(), rel=1e-3)  # an error of step squared
    assert logits.grad is None


# ----------------------------------------------------------------- 2. The transformer around it
def test_grouped_experts_equal_a_loop_over_experts():
    moe = tiny_model().blocks[0].moe
    h = H.view(2, 16, 32).requires_grad_()
    output, _, _ = moe(h, None, None, False)
    weights, experts, _ = moe.router(h)
    expected = torch.zeros_like(h)
    for j in range(8):
        gate, up = (h @ moe.gate_up[j].T).chunk(2, dim=-1)
        share = (weights * (experts == j)).sum(-1, keepdim=True)
        expected = expected + share * (F.silu(gate) * up) @ moe.down[j].T
    close(output, expected)
    sources = [h, moe.gate_up, moe.down, moe.router.weight]
    found = torch.autograd.grad(output.square().sum(), sources)
    reference = torch.autograd.grad(expected.square().sum(), sources)
    close(found, reference, tolerance=1e-4)  # sums over all tokens, so a few more roundings


@parametrize("lengths", [(8, 8), (8, 5, 3)])
def test_cached_forward_equals_full_forward(lengths, model):
    tokens, attend = padded_batch(*lengths)
    full, _ = model(tokens, attend=attend)
    cache = pr2_mini.Cache(8)
    parts = []
    for piece in tokens.split([3, 1, 4], dim=1):
        seen = None if attend.all() else attend[:, : cache.used + piece.shape[1]]
        logits, _ = model(piece, attend=seen, cache=cache)
        parts.append(logits)
    close(torch.cat(parts, dim=1)[attend], full[attend])


@parametrize("qk_norm", ["head", "full", "none"])
def test_padded_rows_equal_unpadded_rows_whatever_the_padding(qk_norm):
    model = tiny_model(qk_norm=qk_norm)
    tokens, attend = padded_batch(8, 5, 3)
    padded, _ = model(tokens.masked_fill(~attend, 7), attend=attend)
    for row, real in enumerate(attend):
        close(padded[row, real], model(tokens[row, None, real])[0][0])


@parametrize("lengths", [(8, 8), (8, 5, 3)])
@parametrize("renormalise", [True, False])
@parametrize("horizon", [None, 1.0])
def test_replay_is_bitwise(lengths, renormalise, horizon):
    model = randomise_predictor(tiny_model(norm_topk_prob=renormalise))
    tokens, attend = padded_batch(*lengths)
    logits, trace = model(tokens, attend=attend, horizon=horizon)
    again, same = model(tokens, attend=attend, horizon=horizon, replay=trace.experts)
    assert torch.equal(again, logits)
    assert torch.equal(same.experts, trace.experts)


def test_replay_is_bitwise_under_compilation_and_activation_checkpointing(model):
    logits, _ = model(TOKENS, replay=ROUTE)
    compiled = torch.compile(model, backend="eager")  # which needs no C++ compiler
    assert torch.equal(compiled(TOKENS, replay=ROUTE)[0], logits)
    plain = gradients(model, TOKENS, replay=ROUTE)
    for layer, block in enumerate(model.blocks):
        model.blocks[layer] = checkpoint_wrapper(block)
    again = gradients(model, TOKENS, replay=ROUTE)
    close(list(again.values()), list(plain.values()), tolerance=0)


@parametrize(("dtype", "experts"), [(torch.uint8, 8), (torch.uint16, 300), (torch.int32, 300)])
def test_replay_takes_any_integer_type_and_any_order_within_a_set(dtype, experts):
    model = tiny_model(num_experts=experts)
    logits, trace = model(TOKENS)
    replay = trace.experts.flip(-1).to(dtype)
    assert (replay.long().max() > 255) == (experts == 300)
    close(model(TOKENS, replay=replay)[0], logits)


# ---------------------------------------------------------------------------------- 3. Rollout
def sample(model, prompts=PROMPTS, new=10, seed=0, eos=EOS, pad=PAD, **options):
    generator = draws(seed, prompts.device)
    return generate(model, prompts, new, eos=eos, pad=pad, generator=generator, **options)


def beside_forward(model, rollout, horizon, temperature=1.0):
    """For what share of the tokens a full forward pass takes the same experts, and the largest
    difference between the log-probabilities."""
    tokens = rollout.tokens[:, :-1]
    attend = rollout.attend[:, :-1]
    start = rollout.prompt_length
    logits, trace = model(tokens, attend=attend, horizon=horizon)
    logits = logits[:, start - 1 :] / (temperature or 1.0)
    expected = -F.cross_entropy(logits.mT, rollout.tokens[:, start:], reduction="none")
    gaps = rollout.logprobs - expected * rollout.attend[:, start:]
    live = attend & rollout.attend[:, 1:]
    same = overlap(rollout.experts, trace.experts)[:, live] == 2
    return same.float().mean().item(), gaps.abs().max().item()


@parametrize("temperature", [1.0, 0.7, 0])
@parametrize("horizon", [None, 1.0])
@parametrize("lengths", [(5, 3, 4, 2), (5, 5)])
def test_rollout_with_its_cache_equals_a_full_forward(temperature, horizon, lengths, model):
    prompts, _ = padded_batch(*lengths)
    rollout = sample(model, prompts, samples=4, temperature=temperature, horizon=horizon)
    share, gap = beside_forward(model, rollout, horizon, temperature)
    assert share > 0.99  # a tie may fall either way
    assert gap < 3e-5
    attend = rollout.attend[:, :-1]
    model(rollout.tokens[:, :-1], attend=attend, replay=rollout.experts)  # valid at padding too


def test_samples_follow_the_softmax_at_the_temperature(model):
    prompt = PROMPTS[:1]
    rollout = sample(model, prompt, new=1, samples=10_000, temperature=0.5)
    share = rollout.tokens[:, -1].bincount(minlength=20) / 10_000
    logits, _ = model(prompt)
    p = (2 * logits[0, -1]).softmax(-1)
    assert (share - p).abs().max() < 0.025  # five deviations


@parametrize("number", [0.0, 1e-45, 3e38, math.inf])
def test_token_of_probability_zero_is_never_sampled(number, model, monkeypatch):
    model.lm_head.weight.data *= 1e4
    model.lm_head.weight.data[0] = 0  # the first of equals would be token 0
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda race, **_: race.fill_(number))
    assert (sample(model, eos=-1).logprobs > -100).all()  # e^-104 is 0 in float32


@parametrize("eos", [EOS, [EOS], [EOS, 7, 12]])
def test_response_ends_at_its_first_end_token_and_padding_follows(eos, model):
    rollout = sample(model, samples=16, eos=eos)
    ids = {eos} if eos == EOS else set(eos)
    lengths = rollout.attend[:, 5:].sum(1)
    assert lengths.min() < lengths.max() == 10
    for row, length in enumerate(lengths.tolist()):
        response = rollout.tokens[row, 5:].tolist()
        assert length == 10 or response[length - 1] in ids
        assert not ids & set(response[: length - 1])
        assert set(response[length:]) <= {PAD}


def test_finished_responses_do_not_change_the_others_and_negative_eos_never_ends(model):
    ending = sample(model, samples=16)
    endless = sample(model, samples=16, eos=-1)
    assert endless.attend[:, 5:].all() and not ending.attend[:, 5:].all()
    assert torch.equal(ending.tokens[ending.attend], endless.tokens[ending.attend])


@table(
    ("lengths", "token", "column", "pad"),
    ((5, 5), PAD, 0, 18),  # a prompt may begin with the id of padding
    ((5, 3), EOS, 3, EOS),  # and padding may have the id of the end, which is real elsewhere
)
def test_attend_tells_padding_from_tokens_of_its_id(lengths, token, column, pad, model):
    prompts, attend = padded_batch(*lengths)
    prompts[~attend] = token
    prompts[:, column] = token
    given = sample(model, prompts, attend=attend, samples=8)
    other = sample(model, prompts, pad=pad, samples=8)
    assert torch.equal(given.attend, other.attend)
    assert torch.equal(given.tokens[given.attend], other.tokens[other.attend])


def test_each_prompt_has_its_own_horizon(model):
    horizon = torch.tensor([0.0, 0.5, 1.0, 3.0], device=DEVICE)
    together = sample(model, temperature=0, horizon=horizon)
    for row in range(4):
        alone = sample(model, temperature=0, horizon=float(horizon[row]))
        same = overlap(together.experts, alone.experts) == 2
        assert same[:, row].all()


@parametrize("tie", [True, False])
@parametrize("precision", PRECISIONS)
def test_engine_rounds_all_but_routers_and_only_fp8_rounds_further(tie, precision):
    model = randomise_predictor(tiny_model(tie_word_embeddings=tie))
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)  # 1 would be the same in every precision
    engine = rollout_engine(model, precision)
    pr2_mini.synchronise(engine, model, precision)
    for name, weight in engine.named_parameters():
        exact = model.get_parameter(name)
        if precision != "fp32" and "router" not in name:
            exact = exact.bfloat16()
        further = any(word in name for word in ("_proj", "gate_up", "down"))
        assert weight.dtype == exact.dtype
        assert torch.equal(weight, exact) != (precision == "fp8" and further), name
        close(weight, exact, tolerance=0.04)  # fp8 has steps of 1/16 of a weight
        assert not weight.requires_grad


# ----------------------------------------------------------------------------------- 4. Losses
def test_group_advantages_of_a_hand_computed_example():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    # Unbiased deviations: sqrt((0.75^2 + 3 * 0.25^2) / 3) = 1/2 and sqrt(4 * 0.5^2 / 3) = sqrt(1/3)
    half = 0.75**0.5
    expected = torch.tensor([[1.5, -0.5, -0.5, -0.5], [half, half, -half, -half]])
    close(group_advantages(rewards), expected)
    for responses in (1, 8):  # the mean of eight 0.7 is not 0.7 in float32
        assert not group_advantages(torch.full((2, responses), 0.7)).any()


@table(
    ("ratio", "advantage", "loss", "slope"),
    (1.0, 2.0, -2.0, -2.0),
    (1.5, 2.0, -2.56, 0.0),  # risen past 1.28 and still wanted: clipped
    (0.5, 2.0, -1.0, -2.0),  # fallen though wanted: pulled back
    (0.5, -2.0, 1.6, 0.0),  # fallen past 0.8 and still unwanted: clipped
    (1.5, -2.0, 3.0, 2.0),  # risen though unwanted: pulled back
)
def test_ppo_loss_clips_only_what_went_far_enough(ratio, advantage, loss, slope):
    log_ratio = torch.tensor(math.log(ratio), requires_grad=True)
    found = pr2_mini.ppo_loss(log_ratio, torch.tensor(advantage), 0.2, 0.28)
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-5)
    assert log_ratio.grad.item() == pytest.approx(slope * ratio, rel=1e-5)  # by the log


@parametrize("advantage", [-1.0, 0.0, 1.0])
@parametrize("extreme", [-1e4, -100.0, 100.0, 1e4])
@parametrize("sequences", [True, False])
def test_extreme_ratio_has_a_finite_loss_and_gradient(advantage, extreme, sequences):
    tokens = torch.full((1, 2), extreme, requires_grad=True)
    log_ratio = pr2_mini.sequence_log_ratio(tokens, torch.ones(1, 2)) if sequences else tokens
    loss = pr2_mini.ppo_loss(log_ratio, torch.tensor([[advantage]]), 0.2, 0.28).sum()
    loss.backward()
    assert loss.isfinite()
    assert tokens.grad.isfinite().all()


def test_sequence_log_ratio_is_the_mean_over_the_response():
    log_ratio = torch.tensor([[0.1, 0.3, 0.2], [0.4, -0.2, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    close(pr2_mini.sequence_log_ratio(log_ratio, mask), torch.tensor([[0.2], [0.1]]))


@table(
    ("kind", "weights"),
    ("none", [1, 1, 1, 1, 1, 1]),
    ("tis", [0.4, 0.6, 1.5, 2, 2, 2]),
    ("icepop", [0, 0.6, 1.5, 4.9, 0, 0]),
)
def test_importance_weights_of_known_ratios(kind, weights):
    log_ratios = torch.tensor([0.4, 0.6, 1.5, 4.9, 5.1, math.inf]).log()
    found = pr2_mini.importance_weights(log_ratios, torch.zeros(6), kind)
    assert found.tolist() == pytest.approx(weights)


# ------------------------------------------------------------------------------ 5. One RL step
def tiny_settings(**changes):
    settings = {"samples": 2, "max_new_tokens": 8, "learning_rate": 1e-2, "max_grad_norm": 1e9}
    settings.update(changes)
    return pr2_mini.RLConfig(**settings)


def share_of_even_tokens(rollout):
    """A reward that differs within a group."""
    return (rollout.tokens[:, rollout.prompt_length :] % 2 == 0).float().mean(1)


def record_passes(model):
    """A list to which every forward pass of the model is added."""
    passes = []

    def add(_, arguments, given, output):
        seen = SimpleNamespace(tokens=arguments[0], experts=output[1].experts, given=given)
        passes.append(seen)

    model.register_forward_hook(add, with_kwargs=True)
    return passes


def warmed_up(model, config, fit=(1.0, 1.0)):
    """An optimizer after 60 equal gradients of the routers, and the sums behind their gain."""
    optimizer = make_optimizer(model, config)
    torch.manual_seed(3)
    for router in model.routers:
        router.weight.grad = torch.randn_like(router.weight)
        router.drift_fit.copy_(torch.tensor(fit))
    before = copy.deepcopy(model.state_dict())
    for _ in range(60):
        optimizer.step()
    model.load_state_dict(before)
    return optimizer


def run_step(model, config, optimizer=None, reward=share_of_even_tokens):
    """An RL step on four prompts: the metrics, and what was seen on the way."""
    engine = rollout_engine(model, config.rollout_dtype)
    optimizer = optimizer or make_optimizer(model, config)
    seen = SimpleNamespace(passes=record_passes(model), engine_passes=record_passes(engine))

    def keep_rollout(rollout):
        seen.rollout = rollout
        return reward(rollout)

    generator = draws(0, DEVICE)
    seen.metrics = rl_step(model, engine, optimizer, config, PROMPTS, keep_rollout, generator)
    return seen


def comparable(metrics):
    """Without what the clock says, and what only a predictor has."""
    other = ("seconds", "predictor_loss")
    return {name: value for name, value in metrics.items() if not name.startswith(other)}


def old_batch(model, rollout, config, i=2):
    """What the old pass makes of all eight responses."""
    advantages = group_advantages(share_of_even_tokens(rollout).view(4, 2)).flatten()
    generator = draws(0, DEVICE)
    return pr2_mini.old_pass(model, config, rollout, advantages, torch.arange(8), i, generator)[0]


@parametrize(("predictor", "m"), [("learned", [1, 1, 1]), ("momentum", [0, 0.5, 0.75])])
def test_horizon_of_each_mini_step(predictor, m):
    config = tiny_settings(predictor=predictor, beta1=0.5)
    assert [config.horizon(i) for i in (1, 2, 3)] == m


@parametrize("tie", [True, False])
def test_optimizer_has_each_parameter_once_in_the_group_with_its_rate(tie):
    model = tiny_model(tie_word_embeddings=tie)
    config = tiny_settings(learning_rate=0.1, router_multiplier=3.0, alpha=50.0, beta1=0.8)
    groups = make_optimizer(model, config).param_groups
    policy, routers, predictors = [group["params"] for group in groups]
    assert len(policy + routers + predictors) == len(list(model.parameters()))
    assert routers == [router.weight for router in model.routers]
    assert predictors == [router.predictor.weight for router in model.routers]
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.3, 5.0])
    assert [group["betas"][0] for group in groups] == [0.8, 0.8, 0.0]


# The table of passes in the head of pr2_mini.py; None = top-k of the pass itself.
@table(
    ("method", "rollout_m", "old_m", "old_replay", "update_replay"),
    ("grpo", None, None, None, None),
    ("gspo", None, None, None, None),
    ("r2", None, None, None, "old pass"),
    ("pr2-trainer", None, 1.0, None, "old pass"),
    ("r3", None, None, "rollout", "rollout"),
    ("pr2", 1.0, None, "rollout", "rollout"),
)
def test_experts_of_each_pass(method, rollout_m, old_m, old_replay, update_replay, model):
    seen = run_step(model, tiny_settings(method=method, mini_steps=1))
    old, update = seen.passes
    rolled = seen.rollout.experts[:, :, : old.tokens.shape[1]]
    recorded = {"rollout": rolled, "old pass": old.experts}
    for step in seen.engine_passes:
        m = step.given["horizon"]
        assert m is None if rollout_m is None else (m == rollout_m).all()
    assert old.given["horizon"] == old_m
    for one, expected in [(old, old_replay), (update, update_replay)]:
        replay = one.given["replay"]
        assert (replay is None) == (expected is None)
        assert replay is None or torch.equal(replay, recorded[expected])


@parametrize("dtype", PRECISIONS)
@parametrize("predictor", PREDICTORS)
@parametrize("method", METHODS)
def test_ratio_is_exactly_one_at_the_first_mini_step(method, predictor, dtype, model):
    config = tiny_settings(method=method, predictor=predictor, rollout_dtype=dtype, micro_batch=3)
    metrics = run_step(model, config, warmed_up(model, config)).metrics
    assert metrics["log_ratio_max/1"] == 0
    assert metrics["log_ratio_max/2"] > 0


@parametrize("dtype", PRECISIONS)
@parametrize("predictor", PREDICTORS)
@parametrize("methods", [("pr2", "r3"), ("pr2-trainer", "r2")])
def test_zero_predictor_or_gain_is_plain_replay_bit_for_bit(methods, predictor, dtype):
    metrics = []
    weights = []
    for method in methods:
        model = tiny_model()
        config = tiny_settings(method=method, predictor=predictor, rollout_dtype=dtype, alpha=0.0)
        seen = run_step(model, config, warmed_up(model, config, fit=(0.0, 1.0)))
        metrics.append(comparable(seen.metrics))
        weights.append(dict(model.named_parameters()))
    assert metrics[0] == metrics[1]
    same_bits(weights[0], weights[1])


@parametrize("predictor", PREDICTORS)
@parametrize("method", METHODS)
def test_micro_batches_bound_a_pass_and_change_a_step_by_rounding_only(method, predictor):
    weights = []
    for micro_batch, longest in ((0, 4), (3, 3), (9, 4)):
        model = randomise_predictor(tiny_model())
        config = tiny_settings(method=method, predictor=predictor, micro_batch=micro_batch)
        optimizer = warmed_up(model, config)
        for group in optimizer.param_groups:
            group["eps"] = 1.0  # else Adam makes a full step of the rounding of a zero gradient
            group["lr"] = 1.0
        passes = run_step(model, config, optimizer).passes
        assert max(len(one.tokens) for one in passes) == longest
        weights.append(dict(model.named_parameters()))
    assert (weights[0]["embed.weight"] - tiny_model().embed.weight).abs().max() > 0.01
    close(weights[1:], [weights[0]] * 2, tolerance=1e-4)


@parametrize(("micro_batch", "longest"), [(0, 4), (3, 3), (9, 4)])
def test_passes_take_all_prompts_in_order_in_micro_batches(micro_batch, longest, model):
    seen = run_step(model, tiny_settings(micro_batch=micro_batch))
    prompts = [one.tokens[:, :5] for one in seen.passes]
    assert max(map(len, prompts)) == longest
    expected = PROMPTS.repeat_interleave(2, dim=0)  # two samples each
    expected = torch.cat([expected, expected])  # the old pass, and the updates
    assert torch.equal(torch.cat(prompts), expected)


def test_predictor_features_are_of_a_share_of_the_tokens(model):
    rollout = sample(model, samples=2)
    everything = old_batch(model, rollout, tiny_settings())
    share = old_batch(model, rollout, tiny_settings(cached_share=0.5))
    assert 0.2 < share.cached.float().mean() < 0.8
    assert torch.equal(share.inputs, everything.inputs[:, share.cached])
    assert torch.equal(share.old_logits, everything.old_logits[:, share.cached])


@parametrize("method", ["r3", "gspo"])
@parametrize("importance", ["none", "tis", "icepop"])
def test_loss_is_a_weighted_mean_over_tokens_but_over_sequences_for_gspo(method, importance, model):
    config = tiny_settings(method=method, importance=importance, rollout_dtype="fp8")
    seen = run_step(copy.deepcopy(model), config)
    batch = old_batch(model, seen.rollout, config)
    assert (batch.importance == 1).all() == (importance == "none")
    mask = batch.mask[:4]  # the first mini-step's, whose ratio is 1
    losses = -batch.advantages[:4] * batch.importance[:4] * mask
    expected = losses.sum() / mask.sum()
    if method == "gspo":
        expected = (losses.sum(1) / mask.sum(1)).mean()
    close(seen.metrics["loss/1"], expected.item())


def test_predictor_trains_on_the_mean_over_its_tokens_from_mini_step_2_on(model):
    config = tiny_settings(learning_rate=0.0)  # so that p stays p_old
    optimizer = make_optimizer(model, config)
    weight = model.routers[1].predictor.weight
    found = []
    optimizer.register_step_pre_hook(lambda *_: found.append(weight.grad))
    seen = run_step(model, config, optimizer)
    batch = old_batch(model, seen.rollout, config)
    second = slice(int(batch.mask[:4].sum()), None)  # tokens of the second mini-step
    p_old = batch.old_logits[:, second]
    W_p = predictor_weights(model)
    loss = predictor_loss(batch.inputs[:, second], p_old, p_old, W_p) / p_old.shape[1]
    assert found[0] is None
    close(found[1], torch.autograd.grad(loss, weight)[0])


@parametrize(("bad", "skipped"), [(8, 1), (4, 0)])
def test_update_that_is_not_finite_is_skipped_and_counted(bad, skipped, model):
    rewards = torch.tensor([1.0, 0.0] * 4)
    rewards[:bad] = math.nan
    before = model.embed.weight.detach().clone()
    metrics = run_step(model, tiny_settings(), reward=lambda _: rewards).metrics
    assert metrics["skipped/1"] == 1
    assert metrics["skipped/2"] == skipped
    assert torch.equal(model.embed.weight, before) == (skipped == 1)


# ------------------------------------------------------------------------- 6. What is measured
@table(
    ("name", "ratio", "advantage", "total"),
    ("agreement", 1.0, 1.0, 3.0),  # (1 + 2/3 + 1/3 + 0 in layer 1, 4 in layer 2) / 2
    ("no_deviation", 1.0, 1.0, 2.5),
    ("deviations_1", 1.0, 1.0, 0.5),
    ("deviations_2", 1.0, 1.0, 0.5),
    ("deviations_3_or_more", 1.0, 1.0, 0.5),
    ("stale_agreement", 1.0, 1.0, 11 / 3),
    ("stale_no_deviation", 1.0, 1.0, 3.0),
    ("coverage_gap", 1.0, 1.0, 1.2),  # (0.18 + 0.22 + 0.46 + 0.82 + 4 * 0.18) / 2
    ("regret", 1.0, 1.0, 0.48),  # without 0.18 everywhere
    ("agreement_layer1", 1.0, 1.0, 2.0),
    ("agreement_layer2", 1.0, 1.0, 4.0),
    ("stale_kl", 1.0, 1.0, 1.240007),  # 4 * (ln 6 - the entropy of rho)
    ("clipfrac_high", 1.3, 1.0, 1.0),
    ("clipfrac_high", 1.25, 1.0, 0.0),
    ("clipfrac_high", 1.3, -1.0, 0.0),
    ("clipfrac_low", 0.75, -1.0, 1.0),
    ("clipfrac_low", 0.85, -1.0, 0.0),
    ("clipfrac_low", 0.7, 1.0, 0.0),
    ("approx_kl", 1.5, 1.0, 0.5 - math.log(1.5)),
    ("log_ratio_mean", 0.5, 1.0, math.log(2)),
)
def test_measures_of_known_routes_and_a_known_ratio(name, ratio, advantage, total):
    """Two layers, a response of four tokens, and a fifth that is padding. Today's top-3 is
    {0, 1, 2} everywhere; in the second layer nothing has changed."""
    unchanged = [[0, 1, 2]] * 5
    recorded = [[2, 0, 1], [0, 1, 3], [0, 3, 4], [3, 4, 5], [3, 4, 5]]
    stale = [[0, 1, 2], [0, 1, 2], [0, 1, 5], [0, 1, 5]]
    batch = pr2_mini.Batch(
        tokens=None,
        attend=None,
        mask=torch.tensor([[True, True, True, True, False]]),
        advantages=torch.tensor([[advantage]]),
        recorded=torch.tensor([[recorded], [unchanged]], dtype=torch.int16),
        stale=torch.tensor([stale, unchanged[:4]]),
        cached=torch.tensor([True, False, True, False]),
        old_logits=torch.zeros(2, 2, 6),
    )
    log_ratio = torch.tensor([[math.log(ratio), 0.0, 0.0, 0.0, 0.0]])
    rho = torch.tensor([0.40, 0.30, 0.12, 0.08, 0.06, 0.04])
    router_logits = rho.log().expand(2, 4, 6)
    found = pr2_mini.measure(batch, log_ratio, log_ratio, router_logits, tiny_settings())
    assert float(found[name]) == pytest.approx(total, rel=1e-5)


@parametrize("method", METHODS)
@parametrize("dtype", PRECISIONS)
def test_only_engines_that_compute_alike_match(method, dtype, model):
    config = tiny_settings(method=method, rollout_dtype=dtype, temperature=0.7)
    metrics = run_step(model, config).metrics
    alike = dtype == "fp32" and method not in PREDICTING
    assert (metrics["mismatch_route"] == 0) == alike
    assert (metrics["mismatch_token"] == 0) == alike
    assert (metrics["mismatch_logprob"] < 1e-5) == alike
    assert metrics["stale_agreement/1"] == metrics["stale_no_deviation/1"] == 1
    assert metrics["stale_agreement/2"] < 1


def test_rewards_and_responses_of_a_known_rollout():
    tokens = torch.tensor([[EOS, 5, 12, PAD], [EOS, 5, 6, 7]])  # after prompts of one token
    rollout = pr2_mini.Rollout(tokens, tokens != PAD, None, None, prompt_length=1)
    rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    metrics = pr2_mini.measure_rollout(rollout, rewards, tiny_settings(eos=[EOS, 12]), {})
    assert [metrics["reward"], metrics["response_length"]] == [0.75, 2.5]
    assert metrics["zero_variance"] == metrics["truncated"] == 0.5


# ---------------------------------------------- 7. Ours: a predictor that reads Adam's momentum
MOMENTUM = tiny_settings(predictor="momentum", learning_rate=1e-3)


@parametrize("updates", [1, 3])
def test_momentum_predicts_the_updates_that_follow_if_gradients_average_out(updates, model):
    optimizer = warmed_up(model, MOMENTUM)
    V = set_momentum_predictor(model, optimizer)
    weight = model.routers[1].weight
    before = weight.detach().clone()
    weight.grad.zero_()
    for _ in range(updates):
        optimizer.step()
    change = weight - before
    error = MOMENTUM.horizon(updates + 1) * V[1] - change
    # Bias correction and the second moment move a little on the way: 1 % a step at 60 steps.
    assert error.norm() < 0.01 * updates * change.norm()


def test_fresh_optimizer_predicts_nothing(model):
    assert not set_momentum_predictor(model, make_optimizer(model, MOMENTUM)).any()
    assert not predictor_weights(model).any()


def unrelated(b):
    """As large as b; the products of the two sum to 0."""
    first, second = b.chunk(2, dim=1)
    return torch.cat([second, -first], dim=1)


@table(
    ("drifts", "gain"),
    ([lambda b: b], 1.0),
    ([lambda b: 0.5 * b + unrelated(b)], 0.5),  # least squares
    ([lambda b: 0.5 * b + 7.0], 0.5),  # what all experts of a token gain alike routes nobody
    ([lambda b: 2.0 * b], 1.0),
    ([lambda b: -1.0 * b], 0.0),
    ([torch.clone, torch.zeros_like], 0.85 / 1.85),  # the past counts less by and by
    ([lambda b: 0.5 * b, lambda b: b * math.nan], 0.5),
)
def test_gain_is_the_share_of_the_prediction_that_came_true(drifts, gain, model):
    optimizer = warmed_up(model, MOMENTUM, fit=(0.0, 0.0))
    for drift in drifts:
        V = set_momentum_predictor(model, optimizer)
        b = torch.randn(2, 4000, 32, generator=draws()).to(DEVICE) @ V.mT
        pr2_mini.fit_momentum_predictor(model, b, drift(b))
    set_momentum_predictor(model, optimizer)
    close(predictor_weights(model), gain * V, tolerance=1e-6)


@parametrize("method", PREDICTING)
def test_momentum_predicts_and_is_fitted_at_the_horizon_of_the_mini_step(method, model):
    config = tiny_settings(method=method, predictor="momentum")
    optimizer = warmed_up(model, config)
    V = set_momentum_predictor(model, optimizer, forget=1.0)
    before = copy.deepcopy(model)
    seen = run_step(model, config, optimizer)
    assert seen.metrics["agreement/1"] == 1  # horizon 0, plain replay
    assert seen.metrics["agreement/2"] != seen.metrics["stale_agreement/2"]
    batch = old_batch(before, seen.rollout, config)
    inputs = batch.inputs[1, int(batch.mask[:4].sum()) :]  # tokens of the second mini-step
    predicted = config.horizon(2) * inputs @ V[1].T
    predicted = predicted - predicted.mean(-1, keepdim=True)
    close(model.routers[1].drift_fit[1], 0.85 + predicted.square().sum())
    assert model.routers[1].predictor.weight not in optimizer.state


# --------------------------------------------------------------------------------- 8. Toy task
def test_reward_is_for_a_right_answer_after_well_formed_sums():
    right = ["12,21.", "13,21."]  # only the final answer counts
    wrong = ["12,22.", "12,21", "21.", "12,12,21.", ",21.", "12,21.3.", "12,+21.", "1_2,21.", ""]
    rewards = AdditionTask().rewards(["7+5+9="] * 11, right + wrong)
    assert rewards.tolist() == [1.0] * 2 + [0.0] * 9


def test_decoding_undoes_encoding_and_prompts_are_padded_on_the_left():
    task = AdditionTask(3, 99)
    tokens, attend = task.prompts(["7+5+9=", "12+34+56="])
    assert task.decode(tokens) == ["___7+5+9=", "12+34+56="]
    assert attend.sum(1).tolist() == [6, 9] and attend[:, -6:].all()
    assert task.decode(task.encode(["_034,680._"])) == ["_034,680."]


@parametrize("task", [AdditionTask(3, 9), AdditionTask(2, 20), AdditionTask(4, 120)])
def test_problems_are_sums_of_the_numbers_asked_for_and_fit_with_their_solutions(task):
    problems = task.problems(300, draws())
    numbers = [list(map(int, text.rstrip("=").split("+"))) for text in problems]
    assert {len(row) for row in numbers} == {task.operands}
    assert [min(map(min, numbers)), max(map(max, numbers))] == [0, task.largest]
    longest = "+".join([str(task.largest)] * task.operands) + "="
    assert len(longest) == task.prompt_length
    for seed in range(20):
        assert len(task.solve(longest, 1.0, draws(seed))) <= task.response_length


def test_an_eighth_of_the_problems_is_held_out_and_never_occurs_in_training():
    training = set(AdditionTask().problems(9000, draws()))
    held_out = set(AdditionTask().problems(4000, draws(), held_out=True))
    assert training and not training & held_out
    assert len(held_out) / 1000 == pytest.approx(1 / 8, abs=0.03)


@parametrize("slip", [0.0, 0.25, 1.0])
def test_slips_make_solutions_wrong(slip):
    task = AdditionTask(2, 20)  # one sum
    problems = task.problems(1000, draws())
    generator = draws(1)
    solutions = [task.solve(problem, slip, generator) for problem in problems]
    right = task.rewards(problems, solutions).mean().item()
    assert right == pytest.approx(1 - slip, abs=0.07 * (slip > 0))


# --------------------------------------------------------------------------- 9. Real checkpoints
HF_TOKENS = torch.tensor([[0, 0, 5, 6, 11], [7, 8, 9, 10, 12]])  # 0 is padding
HF_REAL = HF_TOKENS != 0
GATE = "model.layers.1.mlp.gate.weight"


@pytest.fixture(scope="session")
def extras():
    if transformers is None or importlib.util.find_spec("math_verify") is None:
        pytest.skip("pip install transformers math-verify")


def hf_model(kind, folder, **changes):
    """A tiny random model of transformers, saved to the folder."""
    settings = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24}
    settings.update(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    settings.update(num_experts=8, num_experts_per_tok=2, initializer_range=0.2)
    settings.update(max_position_embeddings=64, eos_token_id=[1, 2], pad_token_id=0)
    if kind == "qwen3_moe":
        settings.update(moe_intermediate_size=16, head_dim=16, norm_topk_prob=True)
    settings.update(changes)
    torch.manual_seed(0)
    hf_config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(hf_config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # 1 everywhere would hide a norm that is left out
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return model


def edit_json(path, name, value):
    content = json.loads(path.read_text()) | {name: value}
    path.write_text(json.dumps(content))


def load(folder, dtype=torch.float32):
    return MoETransformer.from_pretrained(folder, dtype=dtype).requires_grad_(False)


def hf_load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def compare(model, theirs, **forward):
    """What the two compute for real tokens, and that they take the same experts."""
    logits, trace = model(HF_TOKENS, attend=HF_REAL, **forward)
    output = theirs(HF_TOKENS, attention_mask=HF_REAL.long(), output_router_logits=True)
    close(logits[HF_REAL], output.logits[HF_REAL], tolerance=1e-4)
    p = torch.stack(output.router_logits).view(trace.logits.shape)[:, HF_REAL]
    same = overlap(trace.experts[:, HF_REAL], p.topk(2).indices) == 2
    best = p.topk(3).values
    clear = best[..., 1] - best[..., 2] > 1e-4 * p.abs().max()  # else rounding may decide
    assert clear.float().mean() > 0.9 and same[clear].all()


@pytest.fixture(params=["qwen3_moe", "olmoe", "mixtral"])
def saved(extras, request, tmp_path):
    """A model of transformers, and the same loaded from tmp_path / "model"."""
    theirs = hf_model(request.param, tmp_path / "model")
    return theirs, randomise_predictor(load(tmp_path / "model"))


def test_loaded_model_routes_computes_and_replays_as_transformers_does(saved):
    theirs, model = saved
    compare(model, theirs)
    _, trace = model(HF_TOKENS, attend=HF_REAL)
    compare(model, theirs, replay=trace.experts.flip(-1))


@parametrize("kind", ["qwen3_moe", "olmoe"])
@parametrize("value", [True, False])
def test_loaded_model_heeds_its_config(extras, kind, value, tmp_path):
    theirs = hf_model(kind, tmp_path, norm_topk_prob=value, tie_word_embeddings=value)
    model = load(tmp_path)
    compare(model, theirs)
    assert (model.lm_head.weight is model.embed.weight) == value


def test_stacked_experts_are_taken_without_a_copy(saved, tmp_path, monkeypatch):
    original = transformers.PreTrainedModel.from_pretrained.__func__
    seen = []

    def keep(cls, *arguments, **options):
        result = original(cls, *arguments, **options)
        seen.append(result[0].model.layers[1].mlp.experts.gate_up_proj.data_ptr())
        return result

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(keep))
    assert [load(tmp_path / "model").blocks[1].moe.gate_up.data_ptr()] == seen


def test_greedy_rollout_equals_the_generation_of_transformers(saved):
    theirs, model = saved
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = theirs.generate(HF_TOKENS, attention_mask=HF_REAL.long(), **settings)
    rollout = sample(model, HF_TOKENS, new=8, eos=-1, temperature=0)
    assert torch.equal(rollout.tokens, expected)


@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_model_is_the_same_and_only_routers_keep_float32(dtype, saved, tmp_path):
    model = randomise_predictor(load(tmp_path / "model", dtype=dtype))
    assert model.blocks[1].moe.gate_up.dtype == dtype
    assert torch.equal(model.routers[1].weight, saved[1].routers[1].weight)
    model.save_pretrained(tmp_path / "again")
    same_bits(load(tmp_path / "again", dtype=dtype).state_dict(), model.state_dict())


def test_transformers_loads_the_saved_folder_and_its_generation_config(saved, tmp_path):
    transformers.GenerationConfig(eos_token_id=[3, 4]).save_pretrained(tmp_path / "model")
    load(tmp_path / "model").save_pretrained(tmp_path / "again")
    again = hf_load(tmp_path / "again")
    same_bits(again.state_dict(), saved[0].state_dict())
    assert again.generation_config.eos_token_id == [3, 4]


def test_folded_folder_routes_by_the_prediction_in_any_engine(saved, tmp_path):
    saved[1].save_pretrained(tmp_path / "folded", horizon=0.5)
    compare(saved[1], hf_load(tmp_path / "folded"), horizon=0.5)
    assert not predictor_weights(load(tmp_path / "folded")).any()


@parametrize("qk_norm", ["head", "full", "none"])
def test_model_built_here_is_saved_as_the_family_of_its_norm(extras, qk_norm, tmp_path):
    model = tiny_model(qk_norm=qk_norm).cpu()
    model.save_pretrained(tmp_path / "model")
    compare(model, hf_load(tmp_path / "model"))


def test_refused_save_writes_nothing(extras, model, tmp_path):
    with pytest.raises(InputError, match="exists; choose another folder"):
        model.save_pretrained(tmp_path)
    model = tiny_model(qk_norm="none", norm_topk_prob=False)
    with pytest.raises(InputError, match="mixtral checkpoint cannot have norm_topk_prob False"):
        model.save_pretrained(tmp_path / "model")
    assert not any(tmp_path.iterdir())


@parametrize("error", [OSError, KeyboardInterrupt])
def test_failure_while_saving_leaves_nothing_behind(extras, error, model, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(safetensors, "save_file", fail)
    with pytest.raises(error):
        model.save_pretrained(tmp_path / "model")
    assert not any(tmp_path.iterdir())


@table(
    ("name", "value"),
    ("model_type", "qwen2_moe"),
    ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
    ("sliding_window", 16),
    ("attention_bias", True),
    ("clip_qkv", 8.0),
    ("hidden_act", "gelu"),
    ("mlp_only_layers", [0]),
    ("decoder_sparse_step", 2),
    ("quantization_config", {"quant_method": "fp8"}),
)
def test_setting_that_is_not_implemented_is_refused_by_name(extras, name, value, tmp_path):
    hf_model("olmoe", tmp_path)
    edit_json(tmp_path / "config.json", name, value)
    with pytest.raises(InputError, match=name.replace("_", ".")):  # "rope scaling"
        load(tmp_path)


@table(
    ("edit", "message"),
    (lambda weights: weights.pop(GATE), f"missing_keys, as {GATE}"),
    (lambda weights: weights.update(extra=H), "unexpected_keys, as extra"),
    (lambda weights: weights.update({GATE: H[:7]}), f"mismatched_keys, .*{GATE}"),
    (lambda weights: weights[GATE][3, 3].fill_(math.nan), f"{GATE} .*not finite"),
)
def test_weights_that_do_not_fit_are_refused(extras, edit, message, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = safetensors.load_file(path)
    edit(weights)
    safetensors.save_file(weights, path, {"format": "pt"})
    with pytest.raises(InputError, match=message):
        load(tmp_path / "model")


@parametrize("name", ["config.json", "model.safetensors", "predictor/model.safetensors"])
@parametrize("damage", [lambda path: os.truncate(path, 50), Path.unlink])
def test_damaged_folder_is_refused(extras, name, damage, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    damage(tmp_path / "model" / name)
    with pytest.raises(InputError, match=str(tmp_path / "model")):
        load(tmp_path / "model")


# ==================================================================================== train_toy.py
HERE = Path(__file__).resolve().parent
SMALL = (
    "--operands 2 --layers 2 --experts 4 --experts-per-token 2 --expert-width 16 --prompts 4 "
    "--samples 4 --device cpu --save-every 4 --largest 9 --warm-up 300 --slip 0.35 "
    "--router-multiplier 50 --mini-steps 2 --rollout-dtype fp32"
)


def toy(flags, code=0, figures=False):
    """What `python train_toy.py FLAGS`, in this process, prints until it ends with the code."""
    output = io.StringIO()
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        if not figures:  # as if matplotlib were not installed: drawing takes longer than the run
            patch.setitem(sys.modules, "matplotlib", None)
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            try:
                found = train_toy.main(flags.split())
            except SystemExit as stop:  # of argparse
                found = stop.code
    assert found == code, errors.getvalue()
    return SimpleNamespace(output=output.getvalue(), errors=errors.getvalue())


def refusal(flags):
    """The sentence with which the command refuses."""
    return re.findall("error: .*", toy(flags, code=2).errors)[-1]


def settings_of(flags):
    return train_toy.make_settings(train_toy.parse(flags.split())[1])


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The flags of a small run whose base models, of seeds 0 and 1, are there: twice the same."""
    folder = tmp_path_factory.mktemp("base")
    flags = f"{SMALL} --base-dir {folder}"
    settings = settings_of(flags)
    task, config, _ = train_toy.build_task(settings)
    train_toy.base_model(config, task, settings, torch.device("cpu"))
    (path,) = folder.iterdir()
    shutil.copy(path, folder / path.name.replace("seed0", "seed1"))
    return flags


@pytest.fixture(scope="session")
def finished(base, tmp_path_factory):
    """An uninterrupted run of 10 rollout batches."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = toy(f"{base} --steps 10 --out {folder}", figures=True)
    return SimpleNamespace(folder=folder, output=done.output)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(finished.folder, tmp_path / "copy"))


def rows(folder):
    """metrics.jsonl without the timings, which no two runs share."""
    history = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        history.append({name: row[name] for name in row if not name.startswith("seconds")})
    return history


def newest(folder):
    return train_toy.checkpoints_of(folder)[-1].name


def checkpoint_of(folder):
    """The tensors and the progress of a toy's newest checkpoint."""
    settings = train_toy.Settings(**train_toy.read_json(folder / "config.json"))
    _, config, rl = train_toy.build_task(settings)
    model = MoETransformer(config)
    tensors = train_toy.tensors_of(model, make_optimizer(model, rl))
    return tensors, train_toy.load_checkpoint(folder, model, tensors)


def same_run(folder, other):
    """The same metrics, weights and optimizer, bit for bit."""
    assert rows(folder) == rows(other)
    same_bits(checkpoint_of(folder)[0], checkpoint_of(other)[0])


# ------------------------------------------------------------------------------------ 1. Settings
@table(
    ("flags", "message"),
    ("--method ppo", "argument --method: invalid choice: 'ppo'"),
    ("--seed one", "argument --seed: invalid int value: 'one'"),
    ("--meth r3", "unrecognized arguments: --meth r3"),
    ("--steps 0", "steps 0; expected a number of at least 1"),
    ("--seed -1", "seed -1; expected a number of at least 0"),
    ("--prompts 63", "63 prompts do not divide into 2 mini-steps"),
    ("--operands 1", "1 numbers up to 2 make too few sums"),
    ("--max-new-tokens 2043", "2048 positions; lower --max-new-tokens"),
    ("--compare pr2:alpha=big", 'pr2:alpha=big": argument --alpha: invalid float value'),
    ("--compare pr2:out=run", 'has "out", which is not a setting'),
    ("--compare pr2:seed=1", "changes seed, which is no setting of a variant"),
    ("--compare pr2:alpha=1e999", "alpha inf; expected"),
    ("--compare pr2:beta=1", 'has "beta", which is not a setting'),
    ("--compare pr2 pr2:alpha=2", "names pr2:alpha=2 twice"),
    ("--compare r3 --method r2", "takes methods as variants, not as --method"),
    ("--compare r3 --resume run", "goes on by itself"),
    ("--engine vllm", "--engine vllm needs --checkpoint"),
    ("--engine vllm --checkpoint x --rollout-dtype fp8", "rolls out in fp32 or bf16"),
    ("--benchmark --device tpu", 'device "tpu" is not available'),
    ("--benchmark --checkpoint x", "--benchmark times the toy; leave out --checkpoint"),
)
def test_bad_flag_is_refused_before_anything_is_written(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(flags)
    assert not any(tmp_path.iterdir())


def test_regime_of_compare_is_what_the_readme_says():
    text = (HERE / "README.md").read_text().replace("\n", " ")
    (flags,) = re.findall(r"than the default run, `(--operands [^`]+)`", text)
    assert train_toy.parse(flags.split())[1] == train_toy.COMPARE_DEFAULTS


def test_every_setting_is_a_flag_with_its_help_and_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    text = toy("--help").output
    for field in train_toy.SETTINGS:
        flag = "--" + field.name.replace("_", "-")
        assert re.search(rf"{flag} \S+\s+\w.* \(default: {re.escape(str(field.default))}\)", text)


@parametrize("mistake", [lambda: int("seven"), lambda: list(zip([1], [], strict=True))])
def test_bug_of_a_fork_keeps_its_traceback(mistake, base, tmp_path, monkeypatch):
    monkeypatch.setattr(AdditionTask, "rewards", lambda *_: mistake())
    with pytest.raises(ValueError, match=r"invalid literal|zip\(\)") as raised:
        toy(f"{base} --steps 1 --out {tmp_path}")
    assert raised.type is ValueError  # and not InputError, which is one too


# ------------------------------------------------------------------------------ 3. A run's files
def test_metrics_have_one_flat_line_for_each_rollout_batch(finished):
    history = rows(finished.folder)
    assert [row["step"] for row in history] == list(range(1, 11))
    assert [row["step"] for row in history if "greedy_accuracy" in row] == [1, 10]
    assert all(type(value) in (int, float) for row in history for value in row.values())
    names = "reward truncated entropy mismatch_token held_out_accuracy agreement/2 approx_kl/2"
    assert set(names.split()) <= history[0].keys()
    assert {"clipfrac_low/2", "skipped/2", "predictor_loss/2"} <= history[0].keys()


def test_run_counts_the_right_answers_before_and_after(finished):
    lines = finished.output.split("held-out problem")[1].splitlines()
    problems = {line.split()[0] for line in lines[1:9]}
    assert len(problems) == 8
    assert all(zlib.crc32(problem.encode()) % 8 == 0 for problem in problems)
    counts = [re.findall(r" (\d) of 8\b", line) for line in lines[1:9]]
    before, after = zip(*counts, strict=True)
    assert lines[9] == f"right before     {sum(map(int, before))} of 64"
    assert lines[10] == f"right after      {sum(map(int, after))} of 64"


def test_last_two_checkpoints_are_kept_and_nothing_half_written(finished):
    names = {path.name for path in finished.folder.iterdir()}
    kept = {path.name for path in (finished.folder / "checkpoint").iterdir()}
    assert names - {"run.png"} == {"config.json", "metrics.jsonl", "checkpoint"}
    assert kept == {"step-8", "step-10"}
    assert newest(finished.folder) == "step-10"


def test_default_folder_is_new_for_a_run_and_depends_on_all_that_is_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_toy.time, "strftime", lambda _: "now")
    monkeypatch.setattr(train_toy, "train", mock.Mock(side_effect=InputError("no run")))
    compared = ["r3 r2", "r3", "r3", "r3 --seeds 2", "r3 --alpha 1", "r3 --seed 1", "r3:alpha=1"]
    for flags in ["", ""] + [f"--compare {variants}" for variants in compared]:
        assert "no run" in refusal(flags)
    names = sorted(path.name for path in Path("runs").iterdir())
    assert [name.split("-")[0] for name in names] == ["compare"] * 6 + ["pr2"] * 2


@table(
    ("name", "message"),
    ("checkpoint/step-4", "--resume it"),
    ("notes.txt", "notes.txt"),
    ("metrics.jsonl", "metrics"),
)
def test_folder_that_is_not_empty_is_refused_and_left_alone(name, message, base, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    assert message in refusal(f"{base} --out {tmp_path}")
    assert (tmp_path / name).read_text() == "precious"
    assert "cannot write" in refusal(f"{base} --out {tmp_path / name}")


@parametrize("flags", ["--out", "--resume", f"{SMALL} --compare r3 --out"])
def test_folder_that_another_process_holds_is_refused(flags, copied):
    with train_toy.claim(copied):
        assert f"{copied} belongs to a run that is still going" in refusal(f"{flags} {copied}")


def killed(flags, owner, name, call):
    """A run that ends when owner.name has done its work for that time."""
    function = getattr(owner, name)
    calls = []

    def dying(*arguments, **options):
        result = function(*arguments, **options)
        calls.append(name)
        if len(calls) == call:
            raise SystemExit("killed")
        return result

    with mock.patch.object(owner, name, dying), pytest.raises(SystemExit, match="killed"):
        train_toy.main(flags.split())


@table(
    ("owner", "name", "call", "begun"),
    (train_toy, "open_device", 1, False),
    (train_toy.os, "replace", 1, False),  # config.json is there
    (train_toy.dcp, "save", 1, False),
    (train_toy.os, "replace", 2, False),  # step.partial is complete, but not yet step-0
    (Path, "rename", 2, True),  # step-0 is there
    (train_toy.dcp, "save", 2, True),  # the weights are there, progress.json is not
    (Path, "rename", 6, True),  # step-8 is there, and step-0 still is
    (pr2_mini, "rl_step", 6, True),
)
def test_run_killed_at_any_moment_resumes_to_the_same_bits_or_begins_anew(
    owner, name, call, begun, base, finished, tmp_path
):
    flags = f"{base} --steps 10 --out {tmp_path / 'run'}"
    killed(flags, owner, name, call)
    assert bool(train_toy.checkpoints_of(tmp_path / "run")) == begun
    toy(f"--resume {tmp_path / 'run'}" if begun else flags)
    same_run(tmp_path / "run", finished.folder)


@parametrize(
    ("owner", "name", "words"),
    [(pr2_mini, "rl_step", "to go on: --resume"), (train_toy.dcp, "save", "it had no checkpoint")],
)
def test_interrupted_run_says_how_to_go_on(owner, name, words, base, tmp_path, monkeypatch):
    monkeypatch.setattr(owner, name, mock.Mock(side_effect=KeyboardInterrupt()))
    done = toy(f"{base} --steps 2 --out {tmp_path / 'run'}", code=130)
    assert f"\nstopped; {words}" in done.errors


def test_more_steps_and_other_folders_may_be_given_on_resume_and_no_other_flags(copied, finished):
    assert f"--alpha 0.5 contradicts {copied}" in refusal(f"--resume {copied} --alpha 0.5")
    with open(copied / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "rew')  # as a kill in the middle of a line leaves it
    done = toy(f"--resume {copied} --steps 12 --base-dir elsewhere --method pr2")
    assert "pip install matplotlib" in done.output
    assert [row["step"] for row in rows(copied)] == list(range(1, 13))
    assert rows(copied)[:10] == rows(finished.folder)
    assert train_toy.read_json(copied / "config.json")["steps"] == 12


@table(
    ("name", "content", "message"),
    ("config.json", '{"steps": true}', "argument --steps: invalid int value: 'True'"),
    ("config.json", '{"colour": 3}', 'has "colour", which is not a setting'),
    ("config.json", "{}", "config.json lacks alpha"),
    ("config.json", "[]", "config.json is damaged: expected a JSON object"),
    ("config.json", "{", "config.json is missing or damaged"),
    ("checkpoint", None, "has no checkpoint; start the run again with --out"),
    ("checkpoint/step-10/progress.json", None, "progress.json is missing or damaged"),
    ("checkpoint/step-10/progress.json", '{"before": [], "history": []}', "json is damaged"),
    ("checkpoint/step-10/progress.json", '{"step": 10}', "progress.json is damaged"),
    ("checkpoint/step-10/.metadata", "torn", "step-10 is damaged or of another model"),
    ("checkpoint/step-10/__0_0.distcp", "torn", "step-10 is damaged or of another model"),
)
def test_damaged_piece_of_a_run_is_named(name, content, message, copied):
    (copied / name).rename(copied / "old")
    if content is not None:
        (copied / name).write_text(content)
    said = refusal(f"--resume {copied}")
    assert message in said
    assert str(copied) in said


def test_checkpoint_with_weights_that_are_not_finite_is_refused_by_name(copied):
    tensors, progress = checkpoint_of(copied)
    tensors["blocks.1.moe.down"].view(-1)[7] = math.inf
    shutil.rmtree(copied / "checkpoint" / "step-10")
    train_toy.save_checkpoint(copied, tensors, progress)
    message = refusal(f"--resume {copied}")
    assert "step-10 has blocks.1.moe.down with values that are not finite" in message


NO_SPACE = OSError(28, "No space left on device")
OF_A_PROCESS = train_toy.CheckpointException("", {0: (NO_SPACE, [])})
OF_TORCH = RuntimeError("[enforce fail at inline_container.cc:672]")


@table(
    ("owner", "name", "error", "free", "message"),
    (train_toy.os, "fsync", NO_SPACE, 10**9, "config.json: the disk is full; 1000 MB"),
    (train_toy.dcp, "save", NO_SPACE, 10**9, "step-11: the disk is full; 1000 MB are free"),
    (train_toy.dcp, "save", OF_A_PROCESS, 10**9, "step-11: the disk is full; 1000 MB"),
    (train_toy.dcp, "save", OF_TORCH, 0, "step-11: the disk is full; 0 MB are free"),
    (train_toy.dcp, "save", OF_TORCH, 10**9, "step-11: [enforce fail at inline_container"),
)
def test_full_disk_is_called_so(owner, name, error, free, message, copied, monkeypatch):
    monkeypatch.setattr(owner, name, mock.Mock(side_effect=error))
    monkeypatch.setattr(train_toy.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    said = refusal(f"--resume {copied} --steps 11")
    assert f"cannot write {copied}" in said
    assert message in said
    monkeypatch.undo()
    assert newest(copied) == "step-10"
    toy(f"--resume {copied}")


# --------------------------------------------------------------------------------- 4. Base model
@parametrize(("experts", "loss"), [([0, 1, 2, 3] * 2, 1.0), ([0] * 8, 4.0), ([0, 1] * 4, 2.0)])
def test_load_balancing_loss_of_a_known_load_does_not_count_padding(experts, loss):
    routes = torch.tensor(experts + [3] * 5).view(1, 1, 13, 1)
    logits = 100.0 * F.one_hot(routes[..., 0], 4)
    real = torch.arange(13)[None] < 8
    assert float(train_toy.load_balancing_loss(routes, logits, real)) == pytest.approx(loss)


def test_base_model_is_made_once_and_can_add_but_often_slips(finished):
    assert re.match(r"base model       \S+seed0-cpu.pt\n", finished.output)
    first = rows(finished.folder)[0]
    assert 0.2 < first["held_out_accuracy"] < 0.8
    assert first["zero_variance"] < 1


def test_truncated_base_model_is_refused_by_name(base, tmp_path):
    flags, source = base.split(" --base-dir ")
    for path in Path(source).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:1000])
    message = refusal(f"{flags} --base-dir {tmp_path} --out {tmp_path / 'run'}")
    assert "seed0-cpu.pt is damaged or of another version; delete it" in message


# ------------------------------------------------------------------------------------ 6. Training
def test_rl_improves_the_reward(base, tmp_path):
    """A batch's reward has a standard error of about 0.04, a mean of 5 of 0.02; 0.05 is asked."""
    flags = base.replace("--prompts 4", "--prompts 16").replace("--save-every 4", "--save-every 99")
    toy(f"{flags} --steps 50 --out {tmp_path / 'run'}")
    rewards = [row["reward"] for row in rows(tmp_path / "run")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.05


def test_run_whose_last_update_is_skipped_says_so_and_fails(base, tmp_path):
    done = toy(f"{base} --steps 3 --learning-rate 1e38 --out {tmp_path}", code=1)
    skipped = [row["skipped/1"] + row["skipped/2"] for row in rows(tmp_path)]
    assert f"{sum(skipped):.0f} updates were not finite and were skipped" in done.errors
    assert skipped[-1] > 0
    assert done.errors.endswith("the checkpoint kept is step-0\n")


def test_run_goes_on_after_updates_that_were_skipped_and_counts_them(base, tmp_path, monkeypatch):
    factors = iter([math.nan])  # of the first rollout batch's rewards

    def rewards(_, problems, responses):
        right = (torch.arange(len(problems)) % 2).float()
        return right * next(factors, 1.0) if len(problems) == 16 else right

    monkeypatch.setattr(AdditionTask, "rewards", rewards)
    done = toy(f"{base} --steps 2 --out {tmp_path}")
    assert done.errors.endswith("\n2 updates were not finite and were skipped\n")
    assert newest(tmp_path) == "step-2"
    assert [row["reward"] is None for row in rows(tmp_path)] == [True, False]


# ---------------------------------------------------------------------------------- 8. Comparison
COMPARED = ["r3", "pr2:alpha=1e-2", "pr2:alpha=1e+2,predictor=momentum"]


@pytest.fixture(scope="session")
def compared(base, tmp_path_factory):
    """A comparison of three variants over two seeds: its flags, and what it printed."""
    folder = tmp_path_factory.mktemp("compared") / "all"
    flags = f"--compare {' '.join(COMPARED)} --seeds 2 --steps 3 {base}"
    done = toy(f"{flags} --out {folder}", figures=True)
    return SimpleNamespace(folder=folder, flags=flags, output=done.output)


def times(folder):
    """When the metrics of each run were written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/metrics.jsonl")}


def test_every_variant_and_seed_has_a_folder_and_starts_from_the_same_base(compared):
    names = sorted(name.rpartition("-")[0] for name in times(compared.folder))
    assert names == ["pr2-seed0", "pr2-seed0", "pr2-seed1", "pr2-seed1", "r3-seed0", "r3-seed1"]
    first = {rows(path)[0]["reward"] for path in compared.folder.glob("*-seed0-*")}
    assert len(first) == 1
    configs = map(train_toy.read_json, compared.folder.glob("pr2-seed1-*/config.json"))
    changed = {(config["alpha"], config["predictor"]) for config in configs}
    assert changed == {(0.01, "learned"), (100.0, "momentum")}


def test_comparison_prints_a_table_and_writes_its_numbers(compared):
    lines = [line for line in compared.output.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines] == ["variant", "---", *COMPARED]
    assert len({line.count("|") for line in lines}) == 1
    content = json.loads((compared.folder / "compare.json").read_text())
    (run,) = compared.folder.glob("r3-seed1-*")
    rewards = [row["reward"] for row in rows(run)]
    assert list(content["runs"]) == list(content["table"]) == COMPARED
    assert content["runs"]["r3"][1]["reward"] == pytest.approx(sum(rewards) / 3)


def test_finished_comparison_is_summed_up_again_without_training(compared, monkeypatch):
    numbers = (compared.folder / "compare.json").read_text()
    for folder in compared.folder.glob("r3-*"):  # killed while the checkpoint was removed
        (folder / "checkpoint.partial" / "step-3").mkdir(parents=True)
    monkeypatch.setattr(train_toy, "train", mock.Mock(side_effect=AssertionError()))
    done = toy(f"{compared.flags} --out {compared.folder}")
    assert "pip install matplotlib" in done.output
    assert (compared.folder / "compare.json").read_text() == numbers


@parametrize("content", ['{"step": 1', '{"step": 2}\n', "3\n3\n3\n"])
def test_damaged_metrics_of_a_finished_run_are_named(content, compared, tmp_path):
    folder = shutil.copytree(compared.folder, tmp_path / "copy")
    (path,) = folder.glob("r3-seed1-*/metrics.jsonl")
    path.write_text(content)
    message = f"{path} is damaged: expected the rollout batches 1 to 3"
    assert message in refusal(f"{compared.flags} --out {folder}")


def test_comparison_that_was_killed_goes_on_where_it_was(compared, tmp_path):
    flags = f"{compared.flags} --out {tmp_path}"
    killed(flags, pr2_mini, "rl_step", call=5)
    before = times(tmp_path)
    toy(flags)
    after = times(tmp_path)
    assert [after[name] == before[name] for name in sorted(before)] == [False, True]  # pr2, r3
    for name in after:
        assert rows(tmp_path / name) == rows(compared.folder / name)


@table(
    ("column", "value", "changes"),
    ("agreement/2", 25.0, {"agreement/2": 0.25}),
    ("removed/2", 25.0, {"agreement/2": 0.85, "stale_agreement/2": 0.8}),
    ("removed/2", None, {"agreement/2": 1.0, "stale_agreement/2": 1.0}),
    ("clipfrac", 0.5, {"clipfrac_low/2": 0.1, "clipfrac_high/2": 0.4}),
    ("log10 largest ratio", 2.0, {"log_ratio_max/1": math.log(100), "log_ratio_max/2": 0.1}),
    ("reward", None, {"reward": None}),
)
def test_summary_of_a_known_run(column, value, changes, finished):
    row = rows(finished.folder)[0]
    row.update(changes)
    assert train_toy.summary([row])[column] == pytest.approx(value)


def test_summary_settles_after_ten_batches_and_has_rewards_of_the_end(finished):
    history = [dict(row) for row in 3 * rows(finished.folder)]
    for step, row in enumerate(history, start=1):
        row["agreement/2"] = 0.9 if step > 10 else 0.0
        row["reward"] = 0.5 if step > 20 else 0.0
    found = train_toy.summary(history)
    assert found["agreement/2"] == pytest.approx(90)
    assert [found["reward"], found["reward, second half"]] == pytest.approx([0.5, 1 / 3])


def test_table_has_means_and_students_intervals_of_paired_differences():
    r3 = [{"reward": reward, "removed/2": 0.0, "KL": 1.0} for reward in (1.0, 3.0)]
    first = {"reward": 3.0, "removed/2": 10.0, "KL": None}
    second = {"reward": 5.0, "removed/2": 30.0, "KL": 1.0}
    table = train_toy.table_of({"r3": r3, "pr2": [first, second]})
    assert table["r3"]["reward"] == pytest.approx([2.0, 12.71])  # of the mean: sqrt 2 / sqrt 2
    assert table["pr2"]["reward"] == [4.0, 0.0]  # the differences are 2 and 2
    assert table["pr2"]["removed/2"] == pytest.approx([20.0, 127.1])  # a difference already
    assert table["pr2"]["KL"] == [None, None]
    assert train_toy.interval([1.0]) is None
    assert train_toy.interval([0.0, 1.0] * 6) == pytest.approx(0.3318, rel=0.01)


# ------------------------------------------------------------------------------------- 9. Figures
def test_figures_are_drawn(finished, compared):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    for path in (finished.folder / "run.png", compared.folder / "compare.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


@parametrize(
    ("recorded", "stale", "word"),
    [(True, True, "recorded"), (True, False, "prediction"), (False, True, "stale"), (0, 0, "both")],
)
def test_picture_tells_what_prediction_caught_from_what_it_missed(recorded, stale, word):
    model = tiny_model(num_hidden_layers=1)  # whose router no replay moves
    config = tiny_settings(method="pr2")
    batch = old_batch(model, sample(model, samples=2), config)
    current = pr2_mini.response_logprobs(model, batch, 1.0)[1].experts
    wrong = (current + 1) % 8
    batch.recorded = current if recorded else wrong
    batch.stale = pr2_mini.at_response(current if stale else wrong, batch.mask)
    task = SimpleNamespace(decode=lambda ids: ids[:, 0].tolist())
    tokens, states = train_toy.route_states(model, config, task, batch)
    longest = batch.mask.sum(1).argmax()
    response = batch.tokens[longest, -batch.mask.shape[1] :][batch.mask[longest]]
    assert tokens == response.tolist()
    assert states.shape == (1, len(tokens))
    assert {list(train_toy.STATES)[state].split()[0] for state in states[0]} == {word}


# ----------------------------------------------------------------------------------- 10. Benchmark
def test_benchmark_prints_its_rows(extras, capsys, monkeypatch):
    def call_twice(calls, rounds):
        for call in calls + calls:
            call()
        return [[2.0], [4.0], [2.0], [5.0]][: len(calls)]

    monkeypatch.setattr(train_toy, "milliseconds", call_twice)
    assert train_toy.benchmark(settings_of(SMALL)) == 0
    lines = capsys.readouterr().out.splitlines()
    ends = [(line.split(" | ")[0], line.split(" | ")[-2:]) for line in lines if " | " in line]
    assert ends[2] == ("| grpo", ["2", "+0.0 % |"])
    assert ends[3] == ("| pr2, learned", ["4", "+100.0 % |"])
    assert ends[4] == ("| pr2, momentum", ["2", "+0.0 % |"])
    assert lines[-2:] == ["| training step | 2 | 4 | 2.00 |", "| generation | 2 | 5 | 2.50 |"]


# ------------------------------------------------------------------ 5. Questions for a checkpoint
SPECIAL = ["<pad>", "<eos>", "<user>", "<bot>", "<bos>", "<system>"]  # ids 0 to 5
TEMPLATE = (
    "<bos>{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def save_tokenizer(folder, template=TEMPLATE, limits=False, **changes):
    """A tokenizer of bytes that writes <bos> before every text, and may store limits of length."""
    import tokenizers

    tokens = SPECIAL + sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(tokens)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 4)]
    )
    if limits:
        inner.enable_truncation(max_length=9)
        inner.enable_padding(length=99, pad_id=0, pad_token="<pad>")
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "additional_special_tokens": SPECIAL}
    names.update(changes)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def asked(flags):
    return train_toy.Questions(settings_of(flags))


def warm_up_on_words(folder, steps):
    """Makes a Qwen3-MoE folder with a chat template and a file of 200 sums in words, like GSM8K's,
    that the model has learned from answers of which a third are off by one; returns their flags."""
    words = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    words = (words + " fifteen sixteen seventeen eighteen nineteen").split()
    with open(folder / "sums.jsonl", "w") as file:
        for a, b in itertools.product(range(20), range(10)):
            question = f"What is {words[a]} plus {words[b]}?"
            row = {"question": question, "answer": f"Count on from {a}.\n#### {a + b}"}
            file.write(json.dumps(row) + "\n")
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32}
    model = tiny_model(vocab_size=262, max_position_embeddings=256, **sizes).cpu()
    model.save_pretrained(folder / "random")
    save_tokenizer(folder / "random")
    flags = f"--checkpoint {folder / 'random'} --data {folder / 'sums.jsonl'} --device cpu"
    task = asked(flags)
    questions = task.training + task.held_out
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0)
    generator = draws()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min((step + 1) / 20, 1.05 - step / steps)
        texts = []
        for row in torch.randint(200, (64,), generator=generator).tolist():
            slip = [0, 0, 0, 0, 1, -1][torch.randint(6, (), generator=generator)]
            written = str(int(questions[row].answer) + slip)
            ids = task.tokenizer(written, add_special_tokens=False)["input_ids"]
            texts.append(torch.tensor([*questions[row].ids, *ids, EOS]))
        tokens = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_side="left")
        answer = (tokens == 3).cumsum(1)[:, :-1] > 0  # from the token that the template ends with
        logits, trace = model(tokens[:, :-1], attend=tokens[:, :-1] != PAD)
        loss = F.cross_entropy(logits[answer], tokens[:, 1:][answer])
        balance = train_toy.load_balancing_loss(trace.experts, trace.logits, answer)
        optimizer.zero_grad()
        (loss + 0.01 * balance).backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    return flags.replace("random", "model")


@pytest.fixture(scope="session")
def words(extras, tmp_path_factory):
    """The flags of a checkpoint and its questions."""
    return warm_up_on_words(tmp_path_factory.mktemp("words"), steps=150)


@pytest.fixture
def other_tokenizer(words, tmp_path):
    """A function that gives the checkpoint another tokenizer, and returns the flags."""

    def change(**options):
        unwanted = shutil.ignore_patterns("*token*", "chat_template*")
        shutil.copytree(words.split()[1], tmp_path / "model", ignore=unwanted)
        save_tokenizer(tmp_path / "model", **options)
        return f"{words} --checkpoint {tmp_path / 'model'}"

    return change


@parametrize("limits", [False, True])  # a stored padding and truncation must not leak in
@table(
    ("template", "flags", "prompt"),
    (TEMPLATE, "", "<bos><user>What is 0 plus 0?<bot>"),
    (TEMPLATE, "--system Think.", "<bos><system>Think.<user>What is 0 plus 0?<bot>"),
    (None, "", "<bos>What is 0 plus 0?\nAnswer:"),
)
def test_prompt_is_templated_or_plain(template, flags, prompt, limits, other_tokenizer):
    task = asked(f"{other_tokenizer(template=template, limits=limits)} {flags}")
    assert task.tokenizer.decode(task.encode("What is 0 plus 0?")) == prompt


@parametrize(
    ("config", "generation", "ends"),
    [(None, None, [1]), ([7, 8], None, [1, 7, 8]), (1, [9, 1], [1, 9]), (7, 9, [1, 7, 9])],
)
def test_every_end_token_ends_a_response(config, generation, ends, other_tokenizer, tmp_path):
    flags = other_tokenizer()
    edit_json(tmp_path / "model" / "config.json", "eos_token_id", config)
    edit_json(tmp_path / "model" / "generation_config.json", "eos_token_id", generation)
    assert asked(flags).eos == ends


@parametrize("pad", [None, "<eos>"])
def test_padding_may_be_the_end_token(pad, other_tokenizer):
    task = asked(other_tokenizer(pad_token=pad))
    problems = [train_toy.Question("Why?", "", ids) for ids in ((1, 7, 1), (8,))]
    tokens, attend = task.prompts(problems)
    assert task.pad == 1
    assert tokens.tolist() == [[1, 7, 1], [1, 1, 8]]
    assert attend.tolist() == [[True, True, True], [False, False, True]]


def test_prompts_that_are_too_long_are_left_out_and_counted(words, tmp_path, capsys):
    path = tmp_path / "sums.jsonl"
    long = json.dumps({"question": 100 * "long ", "answer": 1}) + "\n"
    path.write_text(Path(words.split()[3]).read_text() + 3 * long)
    task = asked(f"{words} --data {path} --prompt-length 99")
    assert "left out         3 prompts of more than 99 tokens" in capsys.readouterr().out
    assert len(task.training + task.held_out) == 200


@parametrize(
    ("written", "answer"),
    [("We add.\n#### 12", "12"), (" 12 ", "12"), (12, "12"), (r"#### \frac12", r"$\frac12$")],
)
def test_answer_is_what_follows_the_hashes_or_bare(extras, written, answer, tmp_path):
    row = {"question": "a\u2028b\x85", "answer": written}  # str.splitlines would break it there
    (tmp_path / "one.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert train_toy.read_questions(tmp_path / "one.jsonl") == [("a\u2028b\x85", answer)]


@parametrize("line", ['{"question": "Why?"}', '{"question": ', "", "[1, 2]", "3"])
def test_bad_line_is_named_by_its_number(line, words, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "Why?", "answer": "1"}\n' + line + "\n")
    assert f"line 2 of {path} is not" in refusal(f"{words} --data {path}")


@table(
    ("changes", "flags", "message"),
    ({}, "--data nowhere", "--checkpoint needs --data, a JSON-lines file"),
    ({}, "--data /dev/null", "--checkpoint needs --data, a JSON-lines file"),
    ({}, "--checkpoint /nowhere", "/nowhere holds no config.json; expected a Hugging Face"),
    ({}, "", "exceed the model's 256 positions; lower --max-new-tokens"),
    ({}, "--prompt-length 5", "0 questions to train on and 0 held out"),
    ({"eos_token": None}, "", "names no eos_token_id"),
    ({"template": None}, "--system Think.", "--system needs a checkpoint with a chat template"),
)
def test_bad_checkpoint_is_refused(changes, flags, message, other_tokenizer, tmp_path):
    said = refusal(f"{other_tokenizer(**changes)} {flags} --out {tmp_path / 'run'}")
    assert message in said
    assert not (tmp_path / "run").exists()


def test_missing_package_is_named_with_its_pip_command(words, monkeypatch):
    monkeypatch.setattr(train_toy.importlib.util, "find_spec", lambda _: None)
    assert refusal(words).endswith("pip install math-verify")
    assert refusal(f"{words} --engine vllm").endswith("pip install vllm")
    assert refusal("--track wandb").endswith("pip install wandb")
    with pytest.raises(InputError, match="pip install numpy"):
        train_toy.open_device("cpu", sharded=True)


def test_an_eighth_of_the_questions_is_held_out_and_never_trained_on(words):
    task = asked(words)
    held_out = set(task.problems(999, draws(), held_out=True))
    training = set(task.problems(9999, draws()))
    checksums = [zlib.crc32(problem.text.encode()) % 8 for problem in training]
    assert 0 not in checksums and not training & held_out
    assert len(training) + len(held_out) == 200


@table(
    ("expected", "responses", "reward"),
    ("12", ["12", "12.0", "That makes $12.00", "The answer is 12.", "12 apples"], 1.0),
    ("12", ["7 + 5 = 12", r"\boxed{12}", "so $12$", "#### 12", "12 dollars"], 1.0),
    ("1,200", ["1200", "1,200", "$1,200.00"], 1.0),
    (r"$\frac{1}{2}$", ["0.5", r"\boxed{\frac{1}{2}}"], 1.0),
    ("-3", ["-3", "$-3$"], 1.0),
    ("12", ["13", "120", "1.2", "-12", "no idea", "", r"\boxed{13}"], 0.0),
    ("1/2", ["2", "1/3", "0.2", "1"], 0.0),
)
def test_reward_of_a_response(extras, expected, responses, reward):
    problems = [train_toy.Question("Why?", expected, ())] * len(responses)
    found = train_toy.Questions.rewards(None, problems, responses)
    assert found.tolist() == [reward] * len(responses)


def test_response_that_never_ended_earns_nothing(words):
    task, _, rl = train_toy.build_task(settings_of(f"{words} --max-new-tokens 2"))
    tokens = torch.tensor([[7, *task.tokenizer("2")["input_ids"][1:], end] for end in (EOS, 7)])
    real = torch.ones_like(tokens, dtype=torch.bool)
    rollout = pr2_mini.Rollout(tokens, real, logprobs=None, experts=None, prompt_length=1)
    question = train_toy.Question("Why?", "2", ())
    task.decode = lambda ids: ["2", "2"]
    assert train_toy.judge(task, rl, [question, question], rollout)[1].tolist() == [1.0, 0.0]


# ------------------------------------------------------------------------------- Many processes
EVERY_METHOD = [*((method, "learned") for method in METHODS), ("pr2", "momentum")]
TOGETHER = {method: {"method": method} for method in METHODS}
TOGETHER["momentum"] = {"method": "pr2", "predictor": "momentum"}
TOGETHER["micro-batches"] = {"method": "gspo", "micro_batch": 3}
TOGETHER["not finite"] = {"method": "pr2"}


def without_chance(engine, prompts, new, *, samples, temperature, horizon, generator, **options):
    """`generate`, but greedy: the samples differ in the first token of their prompts."""
    prompts = prompts.repeat_interleave(samples, dim=0)
    prompts[:, 0] += torch.arange(len(prompts)) % samples
    if horizon is not None:
        horizon = horizon.repeat_interleave(samples)
    return generate(engine, prompts, new, temperature=0.0, horizon=horizon, **options)


def train_together(case):
    """RL steps by this process and the others, if there are any: what it found."""
    ends = list(range(1, 20, 2))  # half of all tokens, so that responses differ in length
    config = tiny_settings(eos=ends, max_new_tokens=6, max_grad_norm=0.1, **TOGETHER[case])
    device, mesh = train_toy.open_device("cpu", sharded=False)
    model = randomise_predictor(tiny_model()).cpu()
    engine = train_toy.place(rollout_engine(model, "fp32"), device, mesh, None)
    model = train_toy.place(model, device, mesh, None)
    optimizer = make_optimizer(model, config)
    for group in optimizer.param_groups:
        group["eps"] = 1e-2  # or Adam would turn the rounding of a zero gradient into a full step
    prompts = torch.randint(2, 18, (8, 3), generator=draws())
    mine = torch.arange(8).view(2, train_toy.PROCESSES, -1)[:, train_toy.RANK].flatten()
    rewards = torch.rand(8, 2, generator=draws())
    if case == "not finite":
        rewards[-1, -1] = math.nan
    seen = SimpleNamespace(metrics=[], lengths=[], weights={}, sharded=[])

    def reward(rollout):
        seen.lengths += rollout.attend[:, rollout.prompt_length :].sum(1).tolist()
        return rewards[mine].flatten()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pr2_mini, "generate", without_chance)
        for _ in range(2 if case == "momentum" else 1):  # at first it has no momentum
            found = rl_step(model, engine, optimizer, config, prompts[mine], reward)
            seen.metrics.append(comparable(found))
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            seen.sharded.append(name)
            parameter = parameter.full_tensor()
        seen.weights[name] = parameter.detach().clone()
    return seen


def whole_and_killed(folder, flags, call):
    """What each of two processes does: a whole run, and another in which the second of them dies
    at a call of rl_step, and the first with it. Not by `toy`: vLLM wants a real output."""
    dist.destroy_process_group = lambda: None  # one group is enough for all runs of a process
    assert train_toy.main(f"{flags} --out {folder}/whole".split()) == 0
    if train_toy.RANK == 1:
        killed(f"{flags} --out {folder}/killed", pr2_mini, "rl_step", call)
    else:
        train_toy.main(f"{flags} --out {folder}/killed".split())
    os.kill(os.getpid(), signal.SIGKILL)


def worker(folder, base, words):
    """What each of the two processes of the fixture `together` does. In the end they die."""
    sys.modules["matplotlib"] = None  # drawing takes longer than the runs
    found = {case: train_together(case) for case in TOGETHER}
    torch.save(found, f"{folder}/{train_toy.RANK}")
    dist.destroy_process_group = lambda: None
    rates = "--learning-rate 1e-3 --alpha 10 --router-multiplier 5"
    sizes = "--prompts 8 --samples 4 --steps 2 --max-new-tokens 4"
    for method, predictor in EVERY_METHOD:
        run = f"{words} {rates} {sizes} --method {method} --predictor {predictor}"
        toy(f"{run} --out {folder}/{method}-{predictor}")
    whole_and_killed(folder, f"{base} --steps 8", call=6)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def launch(*command, dies=False):
    """Runs a command that succeeds, unless it dies. It has one thread, as here: another number
    would sum in another order."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE, env=environment, text=True, capture_output=True)
    assert (done.returncode != 0) == dies, done.stderr
    print(done.stderr)


def call_of(function, *arguments):
    """The command that calls a function of this file."""
    module = Path(__file__).stem
    return [sys.executable, "-c", f"import {module}; {module}.{function.__name__}{arguments!r}"]


@pytest.fixture(scope="session")
def together(base, words, tmp_path_factory):
    """The folder in which two processes have worked until one of them was killed, what the two
    found in every case, and what one process finds."""
    folder = tmp_path_factory.mktemp("together")
    launch(*TORCHRUN, "--no-python", *call_of(worker, str(folder), base, words), dies=True)
    assert (folder / "killed").exists()
    ranks = [torch.load(folder / str(rank), weights_only=False) for rank in range(2)]
    single = {case: train_together(case) for case in TOGETHER}
    return SimpleNamespace(folder=folder, ranks=ranks, single=single)


@parametrize("case", list(TOGETHER))
def test_two_processes_train_as_one_does(case, together):
    single = together.single[case]
    first, second = (found[case] for found in together.ranks)
    same_bits(first.weights, second.weights)
    for name, weight in single.weights.items():
        close(first.weights[name], weight)
    assert sorted(first.lengths + second.lengths) == sorted(single.lengths)
    for found in (first, second):
        assert found.sharded == [name for name in single.weights if ".router." not in name]
        for row, expected in zip(found.metrics, single.metrics, strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-5, nan_ok=True)
            assert [row["skipped/1"], row["skipped/2"]] == [0, case == "not finite"]


def test_killed_job_resumes_to_the_same_bits_on_as_many_processes(together, tmp_path):
    folder = shutil.copytree(together.folder / "killed", tmp_path / "run")
    assert newest(folder) == "step-4"
    launch(*TORCHRUN, train_toy.__file__, "--resume", str(folder))
    same_run(folder, together.folder / "whole")


@parametrize(
    ("flags", "message"),
    [("", "torchrun needs --out"), ("--compare --out run", "--compare runs in one process")],
)
def test_bad_flag_under_torchrun_is_refused(flags, message, monkeypatch):
    monkeypatch.setattr(train_toy, "PROCESSES", 2)
    assert message in refusal(flags)


def test_job_trains_a_checkpoint_in_float32(together, words):
    before = load(words.split()[1]).state_dict()
    folder = together.folder / "pr2-learned"
    after = load(folder / "model-2").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"embed.weight", "blocks.0.moe.router.weight", "blocks.1.moe.down"} <= moved
    assert "blocks.1.moe.router.predictor.weight" in moved
    reader = train_toy.dcp.FileSystemReader(folder / "checkpoint" / "step-2")
    kept = reader.read_metadata().state_dict_metadata.values()
    assert {tensor.properties.dtype for tensor in kept} == {torch.float32}


def test_warmed_up_checkpoint_answers_some_questions_and_not_all(together):
    rewards = [row["reward"] for row in rows(together.folder / "grpo-learned")]
    assert all(0.1 < reward < 0.9 for reward in rewards)


@parametrize(("method", "predictor"), EVERY_METHOD)
def test_checkpoint_trained_by_each_method_generates_in_transformers(method, predictor, together):
    folder = together.folder / f"{method}-{predictor}" / "model-2"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("<bos><user>What is two plus six?<bot>", add_special_tokens=False)
    tokens = torch.tensor([prompt["input_ids"]])
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": EOS}
    expected = hf_load(folder).generate(tokens, **settings)
    rollout = generate(load(folder), tokens, 4, eos=EOS, pad=PAD, temperature=0.0)
    assert torch.equal(expected, rollout.tokens[:, : expected.shape[1]])


def test_job_goes_on_in_one_process_with_moved_files(together, words, tmp_path):
    folder = shutil.copytree(together.folder / "pr2-learned", tmp_path / "run")
    moved = shutil.copytree(Path(words.split()[3]).parent, tmp_path / "moved")
    flags = f"--checkpoint {moved / 'model'} --data {moved / 'sums.jsonl'}"
    done = toy(f"--resume {folder} --steps 3 {flags}")
    assert f"wrote             {folder / 'model-3'}" in done.output
    assert rows(folder)[:2] == rows(together.folder / "pr2-learned")


# ---------------------------------------------------------------- 6. vLLM as the rollout engine
needs_vllm = pytest.mark.skipif(
    transformers is None or importlib.util.find_spec("vllm") is None,
    reason="pip install transformers vllm",
)
VLLM = "--engine vllm --rollout-dtype fp32 --device cpu --prompts 4 --samples 2"


def use_vllm(kind, folder):
    """What a process of its own, since vLLM changes a process, finds in its rollouts."""
    folder = Path(folder)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32, "vocab_size": 262}
    hf_model(kind, folder / "model", rms_norm_eps=1e-5, norm_topk_prob=kind != "olmoe", **sizes)
    settings = settings_of(f"--checkpoint {folder / 'model'} {VLLM} --max-new-tokens 6")
    settings.eos = list(range(1, 200, 3))
    model = load(folder / "model").requires_grad_(True)
    engine = train_toy.VLLMEngine(settings, model.config)
    tokens = torch.randint(2, 200, (4, 5), generator=draws())
    attend = torch.arange(5) >= torch.tensor([[0], [2], [0], [4]])
    found = {"sets": [], "gaps": [], "lengths": [], "steps": {}}
    for method in ("grpo", "r3", "pr2", "pr2-trainer"):
        for router in model.routers:
            nn.init.zeros_(router.predictor.weight)  # then all engines compute alike
        config = train_toy.dataclasses.replace(settings, method=method)
        arguments = (engine, make_optimizer(model, config), config, tokens, share_of_even_tokens)
        found["steps"][method] = rl_step(model, *arguments, draws(), attend)
    randomise_predictor(model)
    for _ in range(3):
        for horizon in (None, torch.tensor([0.0, 1.0, 0.0, 1.0])):
            rollout = engine.rollout(model, tokens, attend, horizon, draws())
            m = None if horizon is None else horizon.repeat_interleave(2)
            share, gap = beside_forward(model, rollout, m)
            found["sets"].append(share)
            found["gaps"].append(gap)
            found["lengths"] += rollout.attend[:, 5:].sum(1).tolist()
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    (folder / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="session", params=["qwen3_moe", "olmoe", "mixtral"])
def vllm_found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    launch(*call_of(use_vllm, request.param, str(folder)))
    return json.loads((folder / "found.json").read_text())


@needs_vllm
def test_vllm_rolls_out_as_forward_does_before_and_after_updates_of_its_weights(vllm_found):
    assert vllm_found["sets"] == [1.0] * 6
    assert max(vllm_found["gaps"]) < 1e-4
    assert min(vllm_found["lengths"]) < max(vllm_found["lengths"]) == 6


@needs_vllm
@parametrize("method", ["grpo", "r3", "pr2", "pr2-trainer"])
def test_rl_step_on_the_routes_of_vllm(method, vllm_found):
    metrics = vllm_found["steps"][method]
    assert metrics["mismatch_route"] == 0.0
    assert metrics["mismatch_logprob"] < 1e-4
    assert metrics["skipped/2"] == 0.0 and metrics["grad_norm/2"] > 0.0


@needs_vllm
def test_job_with_vllm_resumes_to_the_same_bits(words, tmp_path):
    flags = f"{words} {VLLM} --max-new-tokens 4 --predictor momentum --steps 3 --save-every 1"
    call = call_of(whole_and_killed, str(tmp_path), flags, 2)
    launch(*TORCHRUN, "--no-python", *call, dies=True)
    assert newest(tmp_path / "killed") == "step-1"
    launch(*TORCHRUN, train_toy.__file__, "--resume", str(tmp_path / "killed"))
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert all(row["reward"] > 0.1 for row in rows(tmp_path / "whole"))


@parametrize("package", ["wandb", "trackio"])
def test_metrics_are_tracked_without_a_network(package, base, tmp_path, monkeypatch):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"pip install {package}")
    tracked = tmp_path / "tracked"
    for name in ("HOME", "WANDB_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(name, str(tracked))
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracked.mkdir()
    toy(f"{base} --track {package} --steps 2 --out {tmp_path / 'run'}")
    written = [path.read_bytes() for path in tracked.rglob("*") if path.is_file()]
    assert any(b"stale_agreement/2" in content for content in written)
