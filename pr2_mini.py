"""Predictive Routing Replay (PR2) in one file: read it top to bottom.

The problem. A Mixture-of-Experts (MoE) layer sends each token to the k of its N experts that a
small router scores highest. In reinforcement learning (RL) a rollout engine samples a batch of
responses. A training engine cuts the batch into kappa pieces and makes one update on each
("off-kappa"), so that the last piece is trained by weights that are kappa - 1 updates newer than
those that sampled it. With every update the routers move, and a token that was sampled through
experts 3 and 7 may be trained through 3 and 9. The PPO ratio pi_theta / pi_old then compares two
different sub-networks and can explode: router drift. Routing replay records the expert set of each
token once, in the rollout engine (R3) or in the training engine (R2), and forces it in the update.
Ratios are tame again, but the set goes stale: an expert that the router has come to prefer since,
and that is not in the recorded set, gets no gradient from that token.

The idea. PR2 keeps the replay but records a *prediction*: a linear predictor beside each router
guesses how the router's logits will have changed by the time the token is trained, and the
predicted top-k is what is recorded and replayed. In training, replay and prediction pick only the
*set* of experts; how much each of them counts is the current router's softmax, so the router keeps
learning. The predictor starts at zero, so that PR2 starts as plain replay.

Notation (the paper's; shapes for one layer and one token). Weights are stored as torch.nn.Linear
stores them, (N, D), so p = h W reads F.linear(h, weight).
  mu_old           the policy that sampled: the rollout engine's, with the weights theta_old
  pi_old, pi_theta the training engine's policy, with theta_old; with today's weights theta
  h                input of the router                                                  D
  W, p = h W       router weight; router logits                                         N
  rho              softmax(p), the routing distribution                                 N
  h_old, p_old     h and p in the training engine with theta_old                        D; N
  W_p, b = h W_p   evolution predictor; the change of the logits that it predicts       N
  m                horizon, a factor on b: the prediction is p + m b; in the paper always 1
  rho_hat          softmax(p + m b), the predictive routing distribution                N
  I, I_hat         TopK(rho), TopK(rho_hat): expert set, predicted expert set           k
  kappa, i         mini-steps: updates, each on its own piece of the batch; i = 1..kappa
  alpha            learning rate of the predictor divided by that of the policy

Which experts run in which pass, and what weighs them. Sections 3 and 5 are this table as code.
                     rollout, mu_old     old pass, pi_old               update, pi_theta
  grpo, gspo         top-k of rho        top-k of rho                   top-k of rho
  r2                 top-k of rho        top-k of rho, recorded here    replay of the old pass
  pr2-trainer        top-k of rho        top-k of rho_hat, recorded     replay of the old pass
  r3                 top-k of rho        replay of the rollout          replay of the rollout
  pr2                top-k of rho_hat    replay of the rollout          replay of the rollout
  weights of the     rho, of that pass;   rho of that pass               rho of that pass
  experts            under pr2 rho_hat
The old pass is a forward pass of the training engine before any update. PPO's ratio is against its
pi_old, since mu_old comes from an engine that may round and, under pr2, weighs by rho_hat.
Our pr2 is what the paper's abstract describes and its appendix C.2 calls Pr3: r3 with prediction.
Our pr2-trainer is the paper's main method Pr2, as its authors run it: r2 with prediction.

A *deviation* is one of the k replayed experts of one token in one layer that the current router
would not choose. The *stale counterfactual* asks how many deviations there would be if the top-k of
p_old had been replayed in that layer. It is measured on the same tokens of the same run: two runs
drift apart and could not be compared token by token.

Sections 1, 3, 4 and 5 are the method; 2 is the transformer around it; 6 measures; 7 is a predictor
of ours, 8 the toy task, 9 real checkpoints.
Paper: Dong et al., arXiv:2606.00395 (v1). What is not the paper's is marked "ours".
"""

import math
import re
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class InputError(ValueError):
    """A mistake in what a user gave: a flag, a file, a checkpoint, an engine's routes. The command
    line turns this class, and no other, into one sentence."""


# ---------------------------------------------------------------------- 1. Router and predictor
@dataclass
class ModelConfig:
    """Shape of the transformer; the names are those of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int = 64  # D
    num_hidden_layers: int = 4  # L
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    moe_intermediate_size: int = 32  # width of one expert
    num_experts: int = 32  # N
    num_experts_per_tok: int = 4  # k
    norm_topk_prob: bool = True  # the weights of the k experts sum to 1
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qk_norm: str = "head"  # of each head (Qwen3-MoE), "full": of all together (OLMoE), or "none"
    max_position_embeddings: int = 2048

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            allowed = (int, float) if field.type is float else (field.type,)
            if type(value) not in allowed or (field.type is int and value < 1):
                kind = "a whole number, 1 or more" if field.type is int else field.type.__name__
                raise InputError(f"{field.name} is {value!r}; expected {kind}")
        N = self.num_experts
        k = self.num_experts_per_tok
        if k > N:
            raise InputError(f"num_experts_per_tok is {k}; expected at most num_experts, {N}")
        if k == 1 and self.norm_topk_prob:  # w / w is 1 whatever the router says
            raise InputError("a router with top-1 never learns under norm_topk_prob; set it False")
        if self.num_attention_heads % self.num_key_value_heads != 0 or self.head_dim % 2 != 0:
            raise InputError(
                "expected num_attention_heads / num_key_value_heads, head_dim / 2 whole"
            )
        if self.qk_norm not in ("head", "full", "none"):
            raise InputError(f'qk_norm is "{self.qk_norm}"; expected "head", "full" or "none"')


class Router(nn.Module):
    """Top-k router with its evolution predictor, in float32 whatever the model's dtype."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))  # W
        self.predictor = nn.Linear(config.hidden_size, config.num_experts, bias=False)  # W_p
        nn.init.zeros_(self.predictor.weight)  # b = 0 and I_hat = I, until it has learned
        self.register_buffer("drift_fit", torch.zeros(2))  # only section 7 uses it

    def folded(self, horizon: float) -> Tensor:
        """W + m W_p (N, D): with it as W any engine routes and weighs by rho_hat, since
        p + m b = h (W + m W_p)."""
        return self.weight + horizon * self.predictor.weight

    def forward(self, h, replay=None, horizon=None, only_pick=False):
        """Which experts run, and how much each of them counts.

        h          (..., D) router inputs
        replay     (..., k) these experts instead of the top-k, or None
        horizon    m: pick, and weigh, by rho_hat instead of rho; None = no prediction
        only_pick  the prediction picks the set, but rho weighs it
        Returns weights (..., k) float32, experts (..., k) int64, router logits p (..., N) float32.
        """
        h = h.float()
        p = F.linear(h, self.weight.float())  # p = h W
        predicted = p
        if horizon is not None:
            # Detached: the policy loss never trains W_p.
            b = F.linear(h, self.predictor.weight.detach().float())
            predicted = p + horizon * b
        if replay is None:
            experts = predicted.topk(self.top_k).indices
        else:
            experts = replay.long()
        # Whoever picked the set, its weights depend on W, so that the router gets gradient.
        weigh_by = p if only_pick else predicted
        if self.norm_topk_prob:  # a softmax over the set is rho on it, divided by its sum there
            weights = weigh_by.gather(-1, experts).softmax(-1)
        else:
            weights = weigh_by.softmax(-1).gather(-1, experts)
        return weights, experts, p


def kl_divergence(target_logits: Tensor, logits: Tensor) -> Tensor:
    """KL( softmax(target_logits) || softmax(logits) ): (..., N) -> (...)."""
    target = target_logits.log_softmax(-1)
    return (target.exp() * (target - logits.log_softmax(-1))).sum(-1)


def predictor_loss(
    inputs: Tensor, old_logits: Tensor, logits: Tensor, weight: Tensor, kind: str = "post"
) -> Tensor:
    """What W_p learns from: the routing distribution that the router really has by now. Summed over
    layers and tokens; the gradient reaches W_p only.

    inputs (L, n, D) h_old; old_logits and logits (L, n, N) p_old and p; weight (L, N, D) W_p
    "post"   KL( rho_theta || softmax(p_old + h_old W_p) ), the paper's post-routing matching
    "delta"  KL( softmax(p - p_old) || softmax(h_old W_p) ), its ablation, delta matching
    """
    b = inputs.float() @ weight.mT
    logits = logits.detach()
    if kind == "post":
        return kl_divergence(logits, old_logits + b).sum()
    return kl_divergence(logits - old_logits, b).sum()


# ----------------------------------------------------------------- 2. The transformer around it
class Trace(NamedTuple):
    """What a forward pass saw at its routers."""

    experts: Tensor  # (L, B, T, k) int16, the experts that ran
    logits: Tensor  # (L, B, T, N) float32, router logits p, without the prediction
    inputs: Tensor | None = None  # (L, B, T, D) router inputs h, detached; with keep_inputs=True


class Cache:
    """Keys and values of up to `length` positions, (B, heads, length, head_dim) by layer."""

    def __init__(self, length: int):
        self.length = length
        self.used = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values of new positions, (B, heads, T, head_dim); returns all so far."""
        B, heads, T, head_dim = k.shape
        if layer not in self.keys:
            self.keys[layer] = k.new_empty(B, heads, self.length, head_dim)
            self.values[layer] = v.new_empty(B, heads, self.length, head_dim)
        end = self.used + T
        self.keys[layer][:, :, self.used : end] = k
        self.values[layer][:, :, self.used : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def repeat(self, samples: int) -> None:
        """Every row stands `samples` times, side by side."""
        for layer in self.keys:
            self.keys[layer] = self.keys[layer].repeat_interleave(samples, dim=0)
            self.values[layer] = self.values[layer].repeat_interleave(samples, dim=0)


# torch.compile has to leave it out: torch 2.13 cannot compile it in float32.
grouped_mm = torch.compiler.disable(F.grouped_mm)


class MoE(nn.Module):
    """A router and N SwiGLU experts, stored stacked and computed by grouped matrix products."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        N = config.num_experts
        D = config.hidden_size
        width = config.moe_intermediate_size
        self.router = Router(config)
        self.gate_up = nn.Parameter(torch.empty(N, 2 * width, D))
        self.down = nn.Parameter(torch.empty(N, D, width))

    def forward(self, h, replay, horizon, only_pick):
        """(B, T, D) -> output (B, T, D), experts (B, T, k) int16, router logits (B, T, N)."""
        weights, experts, p = self.router(h, replay, horizon, only_pick)
        k = experts.shape[-1]
        # A row for each slot (one of the k experts of a token), sorted by expert; grouped_mm wants
        # to know where the rows of each expert end.
        sorted_experts, order = experts.flatten().sort()
        each_expert = torch.arange(len(self.down), device=h.device)
        ends = torch.searchsorted(sorted_experts, each_expert, right=True, out_int32=True)
        rows = h.flatten(0, 1).index_select(0, order // k)  # slot s belongs to token s // k
        gate, up = grouped_mm(rows, self.gate_up.mT, offs=ends).chunk(2, dim=-1)
        rows = grouped_mm(F.silu(gate) * up, self.down.mT, offs=ends)
        # Back to the order of the tokens, and the weighted sum over the k experts of each.
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=h.device)
        outputs = rows.index_select(0, place).view(*experts.shape, -1)
        output = (outputs * weights.to(h.dtype).unsqueeze(-1)).sum(-2)
        return output, experts.to(torch.int16), p


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions: turns each pair of dimensions (j, j + head_dim / 2) by its angle.
    x (B, T, heads, head_dim); cosine and sine (1 or B, T, 1, head_dim / 2)."""
    first, second = x.chunk(2, dim=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat(turned, dim=-1)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and query-key norm."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.qk_norm = config.qk_norm
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        if config.qk_norm == "head":
            self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
        elif config.qk_norm == "full":
            self.q_norm = nn.RMSNorm(query_size, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(key_size, config.rms_norm_eps)

    def forward(self, x, cosine, sine, mask, cache):
        """(B, T, D) -> (B, T, D). mask (B, 1, T, positions) bool, or None = plain causal."""
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        if self.qk_norm == "full":
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = q.unflatten(-1, (-1, self.head_dim))  # (B, T, heads, head_dim)
        k = k.unflatten(-1, (-1, self.head_dim))
        v = v.unflatten(-1, (-1, self.head_dim))
        if self.qk_norm == "head":
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = rotate(q, cosine, sine).transpose(1, 2)  # (B, heads, T, head_dim)
        k = rotate(k, cosine, sine).transpose(1, 2)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.store(self.layer, k, v)
        causal = mask is None and x.shape[1] > 1  # a single new query sees all there is
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer: attention, then the experts, each on a normalised copy of the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.moe_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.moe = MoE(config)

    def forward(self, x, cosine, sine, mask, cache, replay, horizon, only_pick):
        x = x + self.attention(self.attention_norm(x), cosine, sine, mask, cache)
        h = self.moe_norm(x)
        output, experts, p = self.moe(h, replay, horizon, only_pick)
        return x + output, experts, p, h.detach()


class MoETransformer(nn.Module):
    """Decoder-only MoE transformer of the Qwen3-MoE family.

    The route is an argument and a result, never a mode (ours; production code keeps a global
    registry with record and replay switches): given replay=trace.experts and else the same
    arguments, forward repeats bit for bit the pass that returned the trace, under activation
    checkpointing and compilation too."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.hf_configs = None  # transformers' own configurations of a model that was loaded
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, l) for l in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and not name.endswith("predictor.weight"):
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    @property
    def routers(self) -> list[Router]:
        """The routers of the L layers."""
        return [block.moe.router for block in self.blocks]

    def forward(
        self,
        tokens: Tensor,
        *,
        attend: Tensor | None = None,
        cache: Cache | None = None,
        replay: Tensor | None = None,
        horizon: float | Tensor | None = None,
        only_pick: bool = False,
        keep_inputs: bool = False,
        head: bool = True,
    ) -> tuple[Tensor, Trace]:
        """Next-token logits (B, T, vocab_size), and what the routers saw.

        tokens       (B, T) int64; with a cache, only the positions that are not yet in it
        attend       (B, T) bool, False on padding, left or right; None = all tokens are real;
                     with a cache, (B, cache.used + T), of the cached positions too
        replay       (L, B, T, k) integers of any dtype, distinct in a set: these experts run
        horizon      None = no prediction; m, a float or (B,): pick and weigh experts by rho_hat
        only_pick    the prediction picks the experts, but rho weighs them
        keep_inputs  the trace has the router inputs too
        head         False returns the final hidden states (B, T, D) instead of logits
        Raises InputError for more positions than the model has, and for a replay that no forward
        pass of this model on these tokens could have returned.
        """
        B, T = tokens.shape
        start = 0 if cache is None else cache.used
        if start + T > self.config.max_position_embeddings:
            raise InputError(
                f"{start + T} positions exceed max_position_embeddings, "
                f"{self.config.max_position_embeddings}; shorten prompts or responses"
            )
        if replay is not None:
            check_routes(replay, (len(self.blocks), B, T), self.config)
        if isinstance(horizon, Tensor):
            horizon = horizon.expand(B).view(B, 1, 1)  # one for each row, the same at all positions
        if cache is None and attend is not None and attend[:, 0].all():
            attend = None  # No padding on the left, and no query looks to the right.
        x = self.embed(tokens)
        cosine, sine = self.rotary(attend, start, T, x)
        mask = attention_mask(attend, start, T, tokens.device)
        experts = []
        logits = []
        inputs = []
        for layer, block in enumerate(self.blocks):
            route = None if replay is None else replay[layer]
            x, chosen, p, h = block(x, cosine, sine, mask, cache, route, horizon, only_pick)
            experts.append(chosen)
            logits.append(p)
            inputs.append(h)
        if cache is not None:
            cache.used += T
        trace = Trace(torch.stack(experts), torch.stack(logits))
        if keep_inputs:
            trace = trace._replace(inputs=torch.stack(inputs))
        x = self.norm(x)
        return (self.lm_head(x) if head else x), trace

    def rotary(self, attend: Tensor | None, start: int, T: int, x: Tensor):
        """Cosine and sine of the rotary angles of T new positions, (1 or B, T, 1, head_dim / 2).
        Padding has no position of its own: the first real token of every row is at 0."""
        if attend is None:
            positions = torch.arange(start, start + T, device=x.device)[None]
        else:
            positions = (attend.cumsum(-1) - 1).clamp(min=0)[:, start:]
        pair = torch.arange(0, self.config.head_dim, 2, device=x.device)
        frequency = 1 / self.config.rope_theta ** (pair / self.config.head_dim)
        angle = positions[:, :, None, None] * frequency
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu") -> "MoETransformer":
        """The model in a Hugging Face folder, and its W_p if that is there: see section 9."""
        return load_pretrained(Path(path), dtype, device)

    def save_pretrained(self, path, horizon: float | None = None) -> None:
        """Writes a Hugging Face folder. horizon None: W and W_p apart, W_p in predictor/; a number
        m: W + m W_p as the router, since h W + m h W_p = h (W + m W_p): section 9."""
        save_pretrained(self, Path(path), horizon)


def attention_mask(attend: Tensor | None, start: int, T: int, device) -> Tensor | None:
    """(B, 1, T, start + T) bool: which of all positions each of the T new ones sees.
    None where that is plain causal attention, or all of them for a single new position."""
    if attend is None and (start == 0 or T == 1):
        return None
    column = torch.arange(start + T, device=device)
    row = column[start:, None]
    visible = (column <= row)[None, None]
    if attend is not None:
        # A padding position sees itself: a softmax over nothing would be NaN.
        visible = visible & (attend[:, None, None, :] | (column == row))
    return visible


def check_routes(experts: Tensor, expected: tuple[int, int, int], config: ModelConfig) -> None:
    """Raises InputError for routes that are not (L, B, T) sets of k distinct expert ids."""
    shape = (*expected, config.num_experts_per_tok)
    if tuple(experts.shape) != shape:
        raise InputError(f"the routes have shape {tuple(experts.shape)}; expected {shape}")
    if experts.dtype.is_floating_point or experts.dtype in (torch.bool, torch.complex64):
        raise InputError(f"the routes have dtype {experts.dtype}; expected integer expert ids")
    ids = experts.long().sort(-1).values
    if ids[..., 0].min() < 0 or ids[..., -1].max() >= config.num_experts:
        raise InputError(f"a route names an expert outside 0..{config.num_experts - 1}")
    if (ids[..., 1:] == ids[..., :-1]).any():
        raise InputError("a route names one expert twice; the k experts of a token are distinct")


# ---------------------------------------------------------------------------------- 3. Rollout
class Rollout(NamedTuple):
    """B = Q * samples sampled responses, prompt by prompt, with the routes that produced them."""

    tokens: Tensor  # (B, P + C) int64: left-padded prompt, response, padding
    attend: Tensor  # (B, P + C) bool: True on prompt and response, its end token included
    logprobs: Tensor  # (B, C) float32, log mu_old at the sampling temperature; 0 after the end
    experts: Tensor  # (L, B, P + C - 1, k) int16, any valid set at padding and after the end
    prompt_length: int  # P

    def ended(self, eos: int | list[int]) -> Tensor:
        """(B,) bool, which responses have an end token."""
        response = self.tokens[:, self.prompt_length :]
        real = self.attend[:, self.prompt_length :]
        end_tokens = torch.tensor(eos, device=response.device).view(-1)
        return (torch.isin(response, end_tokens) & real).any(1)


def blank_rollout(
    config: ModelConfig, prompts: Tensor, attend: Tensor, samples: int, new: int, pad: int
) -> Rollout:
    """The rollout of (Q, P) prompts before any of the `new` tokens has been sampled."""
    Q, P = prompts.shape
    B = Q * samples
    k = config.num_experts_per_tok
    tokens = F.pad(prompts.repeat_interleave(samples, dim=0), (0, new), value=pad)
    attend = F.pad(attend.repeat_interleave(samples, dim=0), (0, new), value=False)
    logprobs = torch.zeros(B, new, device=prompts.device)
    placeholder = torch.arange(k, dtype=torch.int16, device=prompts.device)  # a valid set
    experts = placeholder.expand(config.num_hidden_layers, B, P + new - 1, k).clone()
    return Rollout(tokens, attend, logprobs, experts, prompt_length=P)


@torch.no_grad()
def generate(
    model: MoETransformer,
    prompts: Tensor,
    max_new_tokens: int,
    *,
    eos: int | list[int],
    pad: int,
    attend: Tensor | None = None,
    samples: int = 1,
    temperature: float = 1.0,
    horizon: float | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Samples responses with a KV cache and records the route of every token but the last.

    prompts      (Q, P) int64, left-padded
    attend       (Q, P) bool, True on the prompt's tokens; None = on all but leading `pad`s
    eos          the id, or any of the ids, that ends a response; -1 never occurs
    temperature  0 is greedy, with log-probabilities at temperature 1
    horizon      None, or m, a float or (Q,): route by rho_hat
    """
    Q, P = prompts.shape
    device = prompts.device
    if attend is None:
        attend = (prompts != pad).cumsum(-1) > 0
    # A prompt is computed once for all its samples.
    cache = Cache(length=P + max_new_tokens - 1)
    padded = not attend.all()
    seen = attend if padded else None
    hidden, trace = model(prompts, attend=seen, cache=cache, horizon=horizon, head=False)
    cache.repeat(samples)
    hidden = hidden.repeat_interleave(samples, dim=0)
    if isinstance(horizon, Tensor):
        horizon = horizon.expand(Q).repeat_interleave(samples)
    rollout = blank_rollout(model.config, prompts, attend, samples, max_new_tokens, pad)
    tokens, attend, logprobs, experts, _ = rollout
    experts[:, :, :P] = trace.experts.repeat_interleave(samples, dim=1)

    end_tokens = torch.tensor(eos, device=device).view(-1)
    finished = torch.zeros(len(tokens), dtype=torch.bool, device=device)
    for column in range(P, P + max_new_tokens):
        logits = model.lm_head(hidden[:, -1]).float()
        log_p = (logits / (temperature or 1.0)).log_softmax(-1)
        if temperature == 0:
            token = log_p.argmax(-1)
        else:
            # An exponential race is a categorical sample. The clamp keeps a token of probability
            # zero from winning, whatever the random numbers: it stays at 0, some other does not.
            race = torch.empty_like(log_p).exponential_(generator=generator)
            token = (log_p.exp() / race.clamp(1e-30, 1e30)).argmax(-1)
        # A response that has ended goes on with padding. All rows step until the last has ended, of
        # any process: those that share a sharded engine must keep step.
        token = token.masked_fill(finished, pad)
        logprob = log_p.gather(-1, token[:, None]).squeeze(-1)
        tokens[:, column] = token
        attend[:, column] = ~finished
        logprobs[:, column - P] = logprob.masked_fill(finished, 0.0)
        finished = finished | torch.isin(token, end_tokens)
        unfinished = max_over_processes((~finished).sum())
        if unfinished == 0 or column == P + max_new_tokens - 1:
            break
        seen = attend[:, : column + 1] if padded else None
        hidden, trace = model(token[:, None], attend=seen, cache=cache, horizon=horizon, head=False)
        experts[:, :, column] = trace.experts[:, :, 0]
    return rollout


def empty_model(config: ModelConfig, device) -> MoETransformer:
    """A model whose memory nobody has written to yet, but for W_p and drift_fit, which are zero."""
    with torch.device("meta"):
        model = MoETransformer(config)
    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed.weight  # to_empty has torn them apart
    for router in model.routers:
        nn.init.zeros_(router.predictor.weight)
        nn.init.zeros_(router.drift_fit)
    return model


def rollout_engine(model: MoETransformer, rollout_dtype: str) -> MoETransformer:
    """A second model of the same shape, for rollouts in a precision of their own; `synchronise`
    gives it its weights. "fp32"; "bf16": weights and arithmetic in bfloat16; "fp8": the same, with
    the weights of experts and projections rounded to float8 first. Routers are always float32."""
    engine = empty_model(model.config, model.routers[0].weight.device)
    if rollout_dtype != "fp32":
        engine.to(torch.bfloat16)
    for router in engine.routers:
        router.float()
    return engine.eval().requires_grad_(False)


@torch.no_grad()
def synchronise(engine: MoETransformer, model: MoETransformer, rollout_dtype: str) -> None:
    """Copies the model's weights into the rollout engine, rounding them to its precision."""
    for sharded in (engine, model):
        if isinstance(sharded, FSDPModule):  # which a forward pass has left partly whole
            sharded.reshard()
    parameters = zip(engine.named_parameters(), model.parameters(), strict=True)
    for (name, target), source in parameters:
        if rollout_dtype == "fp8" and re.search(r"_proj|gate_up|down", name):
            scale = source.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448  # one per row
            source = (source / scale).to(torch.float8_e4m3fn).to(source.dtype) * scale
        target.copy_(source)


# ----------------------------------------------------------------------------------- 4. Losses
def group_advantages(rewards: Tensor) -> Tensor:
    """GRPO: (Q, G) rewards -> (Q, G), (r - mean) / (unbiased std + 1e-6) over each prompt's group.
    A group whose rewards are all equal, or of one response, teaches nothing: 0."""
    if rewards.shape[1] == 1:
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean(1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return (centred / (rewards.std(1, keepdim=True) + 1e-6)).masked_fill(equal, 0.0)


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp, with the log clamped at +-20: one token at e^100 must not make an update NaN (ours)."""
    return log_ratio.clamp(-20.0, 20.0).exp()


def ppo_loss(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """PPO's clipped loss with clip-higher (DAPO), elementwise: -min(r A, clip(r, 1-low, 1+high) A).
    log_ratio = log r = log pi_theta - log pi_old, of tokens or (GSPO) of sequences."""
    ratio = bounded_exp(log_ratio)
    clipped = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def sequence_log_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """GSPO: (B, C) -> (B, 1), the log of (pi_theta(y) / pi_old(y)) ^ (1 / |y|)."""
    return (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)


def importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, kind: str) -> Tensor:
    """(b, c), how much each token's loss counts, since mu_old sampled it and not pi_old.
    "none": 1; "tis": min(pi_old / mu_old, 2); "icepop": pi_old / mu_old in [0.5, 5], 0 outside."""
    if kind == "none":
        return torch.ones_like(old_logprobs)
    ratio = bounded_exp(old_logprobs - rollout_logprobs)
    if kind == "tis":
        return ratio.clamp(max=2.0)
    return ratio.where((ratio >= 0.5) & (ratio <= 5.0), 0.0)


# ------------------------------------------------------------------------------ 5. One RL step
@dataclass
class RLConfig:
    """Settings of one RL step."""

    method: Literal["grpo", "gspo", "r2", "r3", "pr2", "pr2-trainer"] = "pr2"  # table of passes
    predictor: Literal["learned", "momentum"] = "learned"  # of pr2, pr2-trainer; momentum is ours
    predictor_loss: Literal["post", "delta"] = "post"  # what the learned predictor matches
    alpha: float = 2.0  # learning rate of the predictors W_p over the policy's
    cached_share: float = 1.0  # share of the tokens that train the predictor (the paper's T_c)
    importance: Literal["none", "tis", "icepop"] = "none"  # weights of tokens by pi_old / mu_old
    samples: int = 8  # G, responses per prompt
    max_new_tokens: int = 16  # longest response
    eos: int | list[int] = 1  # id or ids that end a response, -1 = none
    pad: int = 0  # id of padding
    temperature: float = 1.0  # of sampling, above 0
    rollout_dtype: Literal["fp32", "bf16", "fp8"] = "fp32"  # precision of the rollout engine
    mini_steps: int = 2  # kappa, updates per rollout batch
    micro_batch: int = 0  # most responses in one forward pass, 0 = a whole mini-step
    learning_rate: float = 2e-4  # of the policy
    router_multiplier: float = 1.0  # learning rate of the routers W over the policy's (ours)
    beta1: float = 0.9  # of Adam; drift is slower and easier to predict with 0.98
    max_grad_norm: float = 1.0  # of the policy, and of the predictors

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in get_args(field.type):
                expected = ", ".join(get_args(field.type))
                raise InputError(f'{field.name} is "{value}"; expected one of {expected}')
        if self.temperature <= 0 or self.mini_steps < 1:
            raise InputError("expected a temperature above 0 and at least one mini-step")

    @property
    def clip(self) -> tuple[float, float]:
        """How far a ratio may fall and rise before its gradient is cut."""
        return (3e-4, 4e-4) if self.method == "gspo" else (0.2, 0.28)

    @property
    def predicts(self) -> bool:
        return self.method in ("pr2", "pr2-trainer")

    def horizon(self, i: int) -> float | None:
        """m for what is trained in mini-step i; None = no prediction. The learned predictor makes
        one guess for all mini-steps, the first too, though nothing has moved there; the momentum
        predictor (section 7) makes one for each."""
        if not self.predicts:
            return None
        if self.predictor == "learned":
            return 1.0
        return sum(self.beta1**j for j in range(1, i))


def make_optimizer(model: MoETransformer, config: RLConfig) -> torch.optim.AdamW:
    """AdamW with a group each for the policy, its routers W and the predictors W_p. The predictors
    have beta1 = 0 (ours): a prediction that averages over past batches lags behind."""
    policy = [p for name, p in model.named_parameters() if ".router." not in name]
    routers = [router.weight for router in model.routers]
    predictors = [router.predictor.weight for router in model.routers]
    rate = config.learning_rate
    groups = [
        {"params": policy},
        {"params": routers, "lr": rate * config.router_multiplier},
        {"params": predictors, "lr": rate * config.alpha, "betas": (0.0, 0.999)},
    ]
    betas = (config.beta1, 0.999)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=0, fused=True)


@dataclass
class Batch:
    """b responses of one micro-batch, n tokens in all; and what theta_old says of them, which
    `old_pass` fills in."""

    tokens: Tensor  # (b, P + c) int64, cut after the longest response
    attend: Tensor  # (b, P + c - 1) bool
    mask: Tensor  # (b, c) bool, True on response tokens
    advantages: Tensor  # (b, 1)
    recorded: Tensor  # (L, b, P + c - 1, k), the route to replay; of grpo and gspo only measured
    old_logprobs: Tensor | None = None  # (b, c) log pi_old
    importance: Tensor | None = None  # (b, c) weight of each token's loss
    stale: Tensor | None = None  # (L, n, k), top-k of p_old
    cached: Tensor | None = None  # (n,) bool, the n' tokens that train the predictor
    old_logits: Tensor | None = None  # (L, n', N), p_old of the cached tokens, from i = 2 on
    inputs: Tensor | None = None  # (L, n', D), h_old of the cached tokens, likewise


def at_response(values: Tensor, mask: Tensor) -> Tensor:
    """(..., b, P + c - 1, x) -> (..., n, x): the positions that predict the n response tokens, each
    one before its token, so among the last c."""
    return values[..., -mask.shape[1] :, :][..., mask, :]


def response_logprobs(model, batch: Batch, temperature: float, **forward) -> tuple[Tensor, Trace]:
    """log pi (b, c) of the response tokens at the sampling temperature, 0 elsewhere, and the Trace.
    `forward`: further arguments of MoETransformer.forward."""
    tokens = batch.tokens
    mask = batch.mask
    hidden, trace = model(tokens[:, :-1], attend=batch.attend, head=False, **forward)
    logits = model.lm_head(at_response(hidden, mask)).float() / temperature  # (n, vocab_size)
    targets = tokens[:, -mask.shape[1] :][mask]
    logprobs = -F.cross_entropy(logits, targets, reduction="none")
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logprobs), trace


@torch.no_grad()
def old_pass(model, config, rollout, advantages, rows, i, generator) -> tuple[Batch, dict]:
    """The training engine's view, before any update, of the rows (b,) of the rollout that mini-step
    i will train: a Batch, and sums over its tokens of how far the two engines are apart."""
    P = rollout.prompt_length
    longest = int(rollout.attend[rows, P:].sum(1).max())
    sampled = rollout.experts[:, rows, : P + longest - 1]
    batch = Batch(
        tokens=rollout.tokens[rows, : P + longest],
        attend=rollout.attend[rows, : P + longest - 1],
        mask=rollout.attend[rows, P : P + longest],
        advantages=advantages[rows, None],
        recorded=sampled,
    )
    # The middle column of the table of passes: r3 and pr2 replay the rollout, the others pick
    # experts here, pr2-trainer by the prediction; rho weighs them in any case.
    batch.old_logprobs, trace = response_logprobs(
        model,
        batch,
        config.temperature,
        replay=sampled if config.method in ("r3", "pr2") else None,
        horizon=config.horizon(i) if config.method == "pr2-trainer" else None,
        only_pick=True,  # no effect without a horizon
        keep_inputs=config.predicts,
    )
    if config.method in ("r2", "pr2-trainer"):
        batch.recorded = trace.experts
    rollout_logprobs = rollout.logprobs[rows, :longest]
    batch.importance = importance_weights(batch.old_logprobs, rollout_logprobs, config.importance)
    p_old = at_response(trace.logits, batch.mask)
    batch.stale = p_old.topk(sampled.shape[-1]).indices.to(torch.int16)

    # Features for the predictor, of a share of the tokens.
    draws = torch.rand(p_old.shape[1], generator=generator, device=p_old.device)
    batch.cached = draws < config.cached_share
    h_old = at_response(trace.inputs, batch.mask) if config.predicts else None
    if i > 1:  # Mini-step 1 finds the routers unmoved: it would only teach W_p to predict 0.
        batch.old_logits = p_old[:, batch.cached]
        batch.inputs = h_old[:, batch.cached] if config.predicts else None

    # What this engine would have taken by the rollout engine's rule: top-k of rho, or of rho_hat.
    expected = batch.stale
    if config.method == "pr2":
        b = h_old.float() @ predictor_weights(model).mT
        expected = (p_old + config.horizon(i) * b).topk(sampled.shape[-1]).indices
    gap = rollout_logprobs - batch.old_logprobs
    return batch, measure_engines(batch, gap, at_response(sampled, batch.mask), expected)


def rl_step(
    model: MoETransformer,
    engine: MoETransformer,
    optimizer: torch.optim.AdamW,
    config: RLConfig,
    prompts: Tensor,
    reward: Callable[[Rollout], Tensor],
    generator: torch.Generator | None = None,
    attend: Tensor | None = None,
) -> dict[str, float]:
    """One rollout batch: samples it, then trains on it in kappa mini-steps. Returns metrics.

    engine     from `rollout_engine`; or an object whose `rollout(model, prompts, attend, horizon,
               generator)` returns what `generate` does, as VLLMEngine in train_toy.py
    prompts    (Q, P) int64, left-padded; attend (Q, P) bool as in `generate`
    reward     maps the Rollout to (Q * samples,) floats
    Of several processes each has as many prompts of its own; the metrics are those of all.
    A metric "name/i" belongs to mini-step i; section 6 says what they mean.
    """
    Q = len(prompts)
    G = config.samples
    kappa = config.mini_steps
    if Q % kappa != 0:
        raise InputError(f"{Q} prompts do not divide into {kappa} mini-steps of equal size")
    policy, routers, predictors = [group["params"] for group in optimizer.param_groups]
    momentum = config.predicts and config.predictor == "momentum"
    clock = [time.perf_counter()]

    # Phase 1. Rollout. Under pr2 it routes by rho_hat; the horizon of a prompt depends on the
    # mini-step that will train it, which is known already: they take the prompts in order.
    if momentum:
        velocity = set_momentum_predictor(model, optimizer)
    horizon = None
    if config.method == "pr2":
        horizons = [config.horizon(i) for i in range(1, kappa + 1)]
        horizon = torch.tensor(horizons, device=prompts.device).repeat_interleave(Q // kappa)
    if isinstance(engine, MoETransformer):
        synchronise(engine, model, config.rollout_dtype)
        rollout = generate(
            engine,
            prompts,
            config.max_new_tokens,
            eos=config.eos,
            pad=config.pad,
            attend=attend,
            samples=G,
            temperature=config.temperature,
            horizon=horizon,
            generator=generator,
        )
    else:  # another program, which gets its weights in a way of its own
        rollout = engine.rollout(model, prompts, attend, horizon, generator)
    clock.append(time.perf_counter())

    # Phase 2. Rewards and advantages.
    rewards = reward(rollout).to(prompts.device).view(Q, G)
    advantages = group_advantages(rewards).flatten()

    # Phase 3. Old pass, on the very micro-batches of the updates, so that pi_theta / pi_old is
    # exactly 1 at mini-step 1.
    mini_batches = []
    gaps = defaultdict(float)
    for i, rows in enumerate(torch.arange(Q * G).chunk(kappa), start=1):
        mini_batches.append([])
        for part in rows.split(config.micro_batch or len(rows)):
            batch, gap = old_pass(model, config, rollout, advantages, part, i, generator)
            mini_batches[-1].append(batch)
            for name, value in gap.items():
                gaps[name] += value
    metrics = measure_rollout(rollout, rewards, config, gaps)
    clock.append(time.perf_counter())

    # Phase 4. kappa updates of the policy and, from the second on, of a learned predictor.
    low, high = config.clip
    for i, micro_batches in enumerate(mini_batches, start=1):
        optimizer.zero_grad()
        # Denominators. Gradients are averaged over processes, so these are averages too.
        tokens = mean_over_processes(sum(batch.mask.sum() for batch in micro_batches))
        cached = mean_over_processes(sum(batch.cached.sum() for batch in micro_batches)).clamp(1)
        sums = defaultdict(float)
        log_ratio_max = torch.zeros((), device=prompts.device)
        for batch in micro_batches:
            # The last column of the table: the recorded experts run, weighed by today's rho.
            replay = None if config.method in ("grpo", "gspo") else batch.recorded
            logprobs, trace = response_logprobs(model, batch, config.temperature, replay=replay)
            router_logits = at_response(trace.logits.detach(), batch.mask)

            # The policy's loss is a mean over tokens; GSPO's ratio and mean are over sequences.
            log_ratio = logprobs - batch.old_logprobs
            loss_log_ratio = log_ratio
            share = batch.mask / tokens
            if config.method == "gspo":
                loss_log_ratio = sequence_log_ratio(log_ratio, batch.mask)
                share = batch.mask / batch.mask.sum(1, keepdim=True) / (Q * G // kappa)
            token_losses = ppo_loss(loss_log_ratio, batch.advantages, low, high)
            loss = (token_losses * batch.importance * share).sum()
            sums["loss"] += loss.detach()

            # The predictor's. The momentum predictor is not trained; it looks how much of what it
            # predicted has come true.
            if config.predicts and i > 1:
                drifted = router_logits[:, batch.cached]
                m_W_p = config.horizon(i) * predictor_weights(model)
                prediction_loss = predictor_loss(
                    batch.inputs, batch.old_logits, drifted, m_W_p, config.predictor_loss
                )
                sums["predictor_loss"] += prediction_loss.detach() / cached / len(model.blocks)
                if momentum:
                    # Without the gain, since the gain is what is fitted.
                    predicted = config.horizon(i) * (batch.inputs.float() @ velocity.mT)
                    fit_momentum_predictor(model, predicted, drifted - batch.old_logits)
                else:
                    loss = loss + prediction_loss / cached
            loss.backward()
            measured = measure(batch, log_ratio, loss_log_ratio, router_logits, config)
            for name, value in measured.items():
                sums[name] += value / tokens
            log_ratio_max = torch.maximum(log_ratio_max, log_ratio.detach().abs().max())

        # Policy and predictors are clipped apart, lest a wild prediction slow the policy down; the
        # policy in two calls, since only its routers are whole where train_toy.py shards the rest.
        average_gradients(policy + routers + predictors)
        grad_norm = torch.hypot(gradient_norm(policy), gradient_norm(routers))
        predictor_grad_norm = gradient_norm(predictors)
        nn.utils.clip_grads_with_norm_(policy, config.max_grad_norm, grad_norm)
        nn.utils.clip_grads_with_norm_(routers, config.max_grad_norm, grad_norm)
        nn.utils.clip_grads_with_norm_(predictors, config.max_grad_norm, predictor_grad_norm)

        # An update that is not finite is skipped (ours), by all processes together.
        update = averages(sums)
        loss_sum = update["loss"] + update.get("predictor_loss", 0.0)
        finite = math.isfinite(loss_sum + grad_norm + predictor_grad_norm)
        if finite:
            optimizer.step()
        update["log_ratio_max"] = float(max_over_processes(log_ratio_max))
        update["grad_norm"] = float(grad_norm)
        update["skipped"] = 0.0 if finite else 1.0
        metrics.update({f"{name}/{i}": value for name, value in update.items()})
    optimizer.zero_grad()
    clock.append(time.perf_counter())
    metrics["seconds_rollout"] = clock[1] - clock[0]
    metrics["seconds_old_pass"] = clock[2] - clock[1]
    metrics["seconds_update"] = clock[3] - clock[2]
    return metrics


def predictor_weights(model: MoETransformer) -> Tensor:
    """W_p of all layers, (L, N, D)."""
    return torch.stack([router.predictor.weight for router in model.routers])


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of what all processes that train together hold; in one process, the values."""
    if not dist.is_initialized():
        return values
    total = values.to(torch.float32, copy=True)
    dist.all_reduce(total)
    return total / dist.get_world_size()


def max_over_processes(values: Tensor) -> Tensor:
    """The largest of what all processes that train together hold; in one process, the values."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def average_gradients(parameters: list[Tensor]) -> None:
    """Over processes, but for the gradients of sharded parameters: FSDP has averaged those."""
    for parameter in parameters:
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            parameter.grad = mean_over_processes(parameter.grad).to(parameter.dtype)


def gradient_norm(parameters: list[Tensor]) -> Tensor:
    """The norm of all gradients together, with all their shards."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# ------------------------------------------------------------------------- 6. What is measured
# No update needs what is measured here. measure and measure_engines return sums over the n response
# tokens, which rl_step divides by n: every metric is a mean per token; what is seen in every layer
# is averaged over layers first. rl_step itself adds the losses, log_ratio_max (the largest absolute
# log-ratio), grad_norm before clipping, skipped updates and seconds (the old pass with rewards).
def overlap(route: Tensor, other: Tensor) -> Tensor:
    """(..., k), (..., k) -> (...), how many experts two sets have in common, in any order."""
    return (route.unsqueeze(-1) == other.unsqueeze(-2)).sum((-1, -2))


@torch.no_grad()
def measure(batch: Batch, log_ratio, loss_log_ratio, router_logits, config) -> dict[str, Tensor]:
    """How far the policy has moved, by the log-ratios of tokens and of the loss; and how far the
    routers, now at router_logits (L, n, N), have moved from the recorded and the stale route. For
    grpo and gspo, which replay nothing, the recorded route is the rollout's."""
    k = batch.recorded.shape[-1]
    current = router_logits.topk(k).indices
    replayed = at_response(batch.recorded, batch.mask)
    same = overlap(replayed, current)
    stale_same = overlap(batch.stale, current)
    rho = router_logits.softmax(-1)
    inside = rho.gather(-1, replayed.long()).sum(-1)
    best = rho.gather(-1, current).sum(-1)
    by_layer = {
        "agreement": same / k,  # slots without deviation
        "no_deviation": same == k,  # sets without deviation
        "stale_agreement": stale_same / k,  # as agreement, if the top-k of p_old had been replayed
        "stale_no_deviation": stale_same == k,
        "deviations_1": same == k - 1,  # sets with so many deviations
        "deviations_2": same == k - 2,
        "deviations_3_or_more": same < k - 2,
        "coverage_gap": 1 - inside,  # probability outside of the replayed set
        "regret": best - inside,  # the paper's: at most sqrt(2 KL(rho_theta || rho_hat))
    }
    if batch.old_logits is not None:
        # KL(rho_theta || rho_old), of the cached tokens in place of all n. The metric
        # predictor_loss, of "post", is the same with today's rho_hat in place of rho_old.
        moved = kl_divergence(router_logits[:, batch.cached], batch.old_logits)
        by_layer["stale_kl"] = moved / batch.cached.float().mean().clamp(min=1e-9)
    sums = {name: values.float().mean(0).sum() for name, values in by_layer.items()}
    for layer, values in enumerate(same / k, start=1):
        sums[f"agreement_layer{layer}"] = values.sum()
    low, high = config.clip
    ratio = bounded_exp(loss_log_ratio)
    # Tokens whose gradient the clip removes.
    sums["clipfrac_low"] = ((ratio < 1 - low) & (batch.advantages < 0) & batch.mask).sum()
    sums["clipfrac_high"] = ((ratio > 1 + high) & (batch.advantages > 0) & batch.mask).sum()
    # KL(pi_old || pi_theta), estimated from the sampled tokens by r - 1 - log r.
    sums["approx_kl"] = (bounded_exp(log_ratio) - 1 - log_ratio).sum()
    sums["log_ratio_mean"] = log_ratio.abs().sum()  # of the absolute values
    return sums


def measure_engines(batch: Batch, gap: Tensor, sampled: Tensor, own: Tensor) -> dict[str, Tensor]:
    """How far the engines are apart at equal weights: gap (b, c) = log mu_old - log pi_old, and
    the route that sampled against what the training engine takes by the same rule, (L, n, k). Where
    one of the passes weighs or picks by rho_hat and the other does not, not 0 even in float32."""
    differs = overlap(sampled, own) < own.shape[-1]
    return {
        "mismatch_logprob": gap.abs().sum(),
        "mismatch_route": differs.float().mean(0).sum(),  # sets
        "mismatch_token": differs.any(0).sum(),  # tokens, in at least one layer
        "entropy": -batch.old_logprobs.sum(),  # estimated: of pi_old, as if it had sampled
    }


def measure_rollout(rollout: Rollout, rewards: Tensor, config, gaps) -> dict[str, float]:
    """Means over rewards (Q, G), over responses, and of the sums of `measure_engines`, gaps."""
    real = rollout.attend[:, rollout.prompt_length :]
    ended = rollout.ended(config.eos)
    sums = {
        "reward": rewards.float().mean(),
        "zero_variance": (rewards == rewards[:, :1]).all(1).float().mean(),  # groups, no signal
        "truncated": (~ended).float().mean(),  # responses that never ended
        "response_length": real.sum() / len(real),
    }
    tokens = mean_over_processes(real.sum())
    for name, value in gaps.items():
        sums[name] = value / tokens
    return averages(sums)


def averages(sums: dict[str, Tensor]) -> dict[str, float]:
    """The mean over processes of each value."""
    values = mean_over_processes(torch.stack([value.float() for value in sums.values()]))
    return dict(zip(sums, values.tolist(), strict=True))


# ---------------------------------------------- 7. Ours: a predictor that reads Adam's momentum
# V is Adam's last step, at today's learning rate. If gradients average out from now on, only the
# momentum is left, and the j-th update from now moves W by beta1^j V. So W_p = gain V needs no
# training, and a prompt that is trained in mini-step i has the horizon
# m = beta1 + ... + beta1^(i-1), 0 at i = 1: RLConfig.horizon.
def set_momentum_predictor(model: MoETransformer, optimizer, forget: float = 0.85) -> Tensor:
    """Sets W_p = gain V in every router; returns V (L, N, D).

    The gain of a layer, 0 at first and at most 1, is the least-squares ratio of the drift that came
    to the prediction at gain 1, <drift, prediction> / <prediction, prediction> over past batches,
    forgotten by and by. Where drift does not follow momentum it goes to 0, and the method to plain
    replay."""
    group = optimizer.param_groups[1]
    beta1, beta2 = group["betas"]
    velocities = []
    for router in model.routers:
        velocity = torch.zeros_like(router.weight)
        state = optimizer.state.get(router.weight)
        if state:
            step = state["step"].clamp(min=1)
            mean = state["exp_avg"] / (1 - beta1**step)
            variance = state["exp_avg_sq"] / (1 - beta2**step)
            velocity = -group["lr"] * mean / (variance.sqrt() + group["eps"])
        product, square = router.drift_fit
        gain = (product / square.clamp(min=1e-12)).clamp(0, 1)
        router.predictor.weight.data.copy_(gain * velocity)
        router.drift_fit.mul_(forget)
        velocities.append(velocity.detach())
    return torch.stack(velocities)


@torch.no_grad()
def fit_momentum_predictor(model: MoETransformer, predicted: Tensor, drift: Tensor) -> None:
    """Adds to the sums behind the gain: what was predicted at gain 1, and the drift of the router
    logits that came, both (L, n', N)."""
    # A change that is the same for all experts moves no top-k.
    predicted = predicted - predicted.mean(-1, keepdim=True)
    drift = drift - drift.mean(-1, keepdim=True)
    products = torch.stack([(drift * predicted).sum((1, 2)), predicted.square().sum((1, 2))])
    products = mean_over_processes(products)
    for router, fit in zip(model.routers, products.T, strict=True):
        if fit.isfinite().all():
            router.drift_fit.add_(fit)


# --------------------------------------------------------------------------------- 8. Toy task
class AdditionTask:
    """Chain-of-thought addition: the prompt "7+5+9=" is answered by its running sums, "12,21.".
    A checksum of the text sets an eighth of the prompts aside; they are never trained on."""

    characters = "_.,+=0123456789"  # one character, one token; "_" pads and "." ends
    pad = 0
    eos = 1

    def __init__(self, operands: int = 3, largest: int = 9):
        if operands < 2 or largest < 1 or (largest + 1) ** operands < 100:
            raise InputError(
                f"{operands} numbers up to {largest} make too few sums; expected at least 100"
            )
        self.operands = operands
        self.largest = largest
        self.prompt_length = operands * (len(str(largest)) + 1)
        self.response_length = (operands - 1) * (len(str(operands * (largest + 1))) + 1)

    def encode(self, texts: list[str]) -> Tensor:
        """Texts of equal length -> (len(texts), T) int64 ids."""
        return torch.tensor([[self.characters.index(c) for c in text] for text in texts])

    def decode(self, ids: Tensor) -> list[str]:
        """(B, T) ids -> texts without the padding on the right."""
        return ["".join(self.characters[i] for i in row).rstrip("_") for row in ids.tolist()]

    def prompts(self, problems: list[str]) -> tuple[Tensor, Tensor]:
        """(Q, prompt_length) int64 ids, padded on the left, and bool, which of them are real."""
        tokens = self.encode([problem.rjust(self.prompt_length, "_") for problem in problems])
        return tokens, tokens != self.pad

    def text(self, problem: str) -> str:
        """A problem as a reader sees it."""
        return problem

    def problems(self, count: int, generator: torch.Generator, held_out: bool = False) -> list[str]:
        """`count` problems, all from the training part or all from the held-out part."""
        found: list[str] = []
        while len(found) < count:
            numbers = torch.randint(self.largest + 1, (self.operands,), generator=generator)
            text = "+".join(map(str, numbers.tolist())) + "="
            if (zlib.crc32(text.encode()) % 8 == 0) == held_out:
                found.append(text)
        return found

    def solve(self, problem: str, slip: float, generator: torch.Generator) -> str:
        """The running sums; each is off by one with probability `slip`, and is carried on."""
        first, *others = map(int, problem.rstrip("=").split("+"))
        total = first
        sums = []
        for number in others:
            total += number
            slips, sign = torch.rand(2, generator=generator).tolist()
            if slips < slip:
                total = max(0, total + (1 if sign < 0.5 else -1))
            sums.append(str(total))
        return ",".join(sums) + "."

    def rewards(self, problems: list[str], responses: list[str]) -> Tensor:
        """1.0 for "12,21." to "7+5+9=", a right final answer after well-formed sums; else 0.0."""
        well_formed = re.compile(rf"(?:\d+,){{{self.operands - 2}}}(\d+)\.")
        rewards = []
        for problem, response in zip(problems, responses, strict=True):
            match = well_formed.fullmatch(response)
            answer = sum(map(int, problem.rstrip("=").split("+")))
            rewards.append(1.0 if match and int(match[1]) == answer else 0.0)
        return torch.tensor(rewards)


# --------------------------------------------------------------------------- 9. Real checkpoints
# By way of transformers, whose experts are stacked in the same layout as ours.
FAMILIES = {  # model_type: (qk_norm, class of transformers)
    "qwen3_moe": ("head", "Qwen3MoeForCausalLM"),
    "olmoe": ("full", "OlmoeForCausalLM"),
    "mixtral": ("none", "MixtralForCausalLM"),
}
HF_NAMES = {  # our modules, and theirs; all others have the same name
    "embed": "model.embed_tokens",
    "blocks": "model.layers",
    "norm": "model.norm",
    "attention": "self_attn",
    "attention_norm": "input_layernorm",
    "moe": "mlp",
    "moe_norm": "post_attention_layernorm",
    "router": "gate",
    "gate_up": "experts.gate_up_proj",
    "down": "experts.down_proj",
}
IMPLEMENTED = {  # settings of theirs, and the only values of which they are implemented here
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "clip_qkv": (None,),
    "sliding_window": (None,),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1,),
    "n_shared_experts": (0, None),
    "quantization_config": (None,),
}


def hf_name(name: str) -> str:
    """ "blocks.0.moe.router.weight" -> "model.layers.0.mlp.gate.weight"."""
    return ".".join(HF_NAMES.get(word, word) for word in name.split("."))


def import_transformers():
    try:
        import transformers
    except ImportError:
        raise InputError("real checkpoints need transformers: pip install transformers") from None
    return transformers


def config_from(hf_config) -> ModelConfig:
    """Our configuration of what theirs describes; refuses by name what is not implemented here."""
    kind = hf_config.model_type
    if kind not in FAMILIES:
        raise InputError(f'model_type is "{kind}"; expected one of {", ".join(FAMILIES)}')
    for name, values in IMPLEMENTED.items():
        value = getattr(hf_config, name, values[0])
        if value not in values:
            raise InputError(f"config.json has {name} {value}; only {values[0]} is implemented")
    if not isinstance(hf_config.dtype, torch.dtype | None):
        raise InputError(f"config.json has dtype {hf_config.dtype!r}, which is none of torch's")
    rope = dict(hf_config.rope_parameters)
    rope_theta = rope.pop("rope_theta")
    if rope != {"rope_type": "default"}:
        raise InputError(f"config.json asks for rope scaling, {rope}; it is not implemented")
    settings = {field.name: getattr(hf_config, field.name, None) for field in fields(ModelConfig)}
    settings["rope_theta"] = rope_theta
    settings["qk_norm"] = FAMILIES[kind][0]
    if settings["head_dim"] is None:
        settings["head_dim"] = hf_config.hidden_size // hf_config.num_attention_heads
    if kind != "qwen3_moe":
        settings["moe_intermediate_size"] = hf_config.intermediate_size
    if kind == "mixtral":
        settings["norm_topk_prob"] = True
    return ModelConfig(**settings)


def hf_config_of(config: ModelConfig):
    """Their configuration of a model built here, of the family with its qk_norm."""
    kind = {norm: kind for kind, (norm, _) in FAMILIES.items()}[config.qk_norm]
    settings = dict(vars(config), bos_token_id=None, eos_token_id=None, pad_token_id=None)
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    settings["intermediate_size"] = config.moe_intermediate_size
    settings["num_local_experts"] = config.num_experts
    hf_config = import_transformers().AutoConfig.for_model(kind, **settings)
    for name, value in vars(config_from(hf_config)).items():
        if getattr(config, name) != value:
            raise InputError(f"a {kind} checkpoint cannot have {name} {getattr(config, name)}")
    return hf_config


def read_hf_configs(path: Path) -> tuple:
    """transformers' configuration of a folder, and its generation configuration or None."""
    transformers = import_transformers()
    if not (path / "config.json").is_file():
        raise InputError(f"{path} holds no config.json; expected a Hugging Face folder")
    generation_config = None
    try:
        hf_config = transformers.AutoConfig.from_pretrained(path)
        if (path / "generation_config.json").is_file():
            generation_config = transformers.GenerationConfig.from_pretrained(path)
    except Exception as error:  # a dozen types, of transformers and of what it calls
        raise InputError(f"cannot read the configuration in {path}: {error}") from error
    return hf_config, generation_config


def load_pretrained(path: Path, dtype: torch.dtype, device) -> MoETransformer:
    """The model in a folder of Qwen3-MoE, OLMoE or Mixtral weights. They are taken from
    transformers' model without a copy; routers are float32 whatever the dtype. Raises InputError
    for weights that are missing, unknown, of another shape or not finite."""
    transformers = import_transformers()
    from safetensors.torch import load_file

    hf_config, generation_config = read_hf_configs(path)
    config = config_from(hf_config)

    class HFModel(getattr(transformers, FAMILIES[hf_config.model_type][1])):
        _keep_in_fp32_modules_strict = ("gate.weight",)  # the routers

    try:
        hf_model, faults = HFModel.from_pretrained(
            path,
            config=hf_config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
        weights = hf_model.state_dict()
        if (path / "predictor").exists():
            weights.update(load_file(path / "predictor" / "model.safetensors"))
    except Exception as error:
        raise InputError(f"cannot read the weights in {path}: {error}") from error
    for fault, names in faults.items():
        if names:
            raise InputError(f"the weights in {path} have {fault}, as {sorted(names)[0]}")
    with torch.device("meta"):  # takes no memory
        model = MoETransformer(config)
    ours = model.state_dict()
    for name in ours:
        found = weights.get(hf_name(name))
        if found is None and name.endswith(("predictor.weight", "drift_fit")):
            found = torch.zeros(ours[name].shape)  # of a checkpoint that was not trained here
        if found is None or found.shape != ours[name].shape or not found.isfinite().all():
            raise InputError(f"{hf_name(name)} in {path} is missing, misshapen or not finite")
        ours[name] = found
    model.load_state_dict(ours, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed.weight
    model.hf_configs = (hf_config, generation_config)
    return model.to(device).requires_grad_(True)


@torch.no_grad()
def save_pretrained(model: MoETransformer, path: Path, horizon: float | None) -> None:
    """Writes a new folder, all of it or nothing. Given a horizon m the router on disk is W + m W_p,
    float32: any engine that keeps it so routes and weighs as `forward(horizon=m)` does here."""
    transformers = import_transformers()
    from safetensors.torch import save_file

    if path.exists():
        raise InputError(f"{path} exists; choose another folder")
    weights = {hf_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    predictor = {}
    for layer, router in enumerate(model.routers):
        gate = f"model.layers.{layer}.mlp.gate"
        predictor[f"{gate}.predictor.weight"] = weights.pop(f"{gate}.predictor.weight")
        if horizon is not None:
            weights[f"{gate}.weight"] = router.folded(horizon)
    hf_config, generation_config = model.hf_configs or (hf_config_of(model.config), None)
    with torch.device("meta"):
        hf_model = transformers.AutoModelForCausalLM.from_config(hf_config)
    hf_model.to(model.embed.weight.dtype)
    if generation_config is not None:
        hf_model.generation_config = generation_config
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
        folder = Path(temporary) / path.name
        hf_model.save_pretrained(folder, state_dict=weights)
        if horizon is None:
            (folder / "predictor").mkdir()
            save_file(predictor, folder / "predictor" / "model.safetensors")
        folder.rename(path)
