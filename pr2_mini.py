"""Predictive Routing Replay (PR2) in one file: read it top to bottom.

The problem. A Mixture-of-Experts (MoE) layer sends a token to the top-k of N experts. In
reinforcement learning, rollouts come from a lagged, lower-precision engine and one rollout batch is
trained in kappa mini-steps, so by the time a token is trained its router has moved and may pick
other experts. The PPO ratio then compares two different sub-networks and can explode. Routing
replay (R2, R3) records the experts of the rollout and forces them during training: the ratio is
tame, but the replayed set is stale. PR2 keeps the replay and lets a small linear *predictor* guess
where each router is going, so that the set it records is the one the router will want.

Notation (the paper's; shapes for one layer and one token). Weights are stored as torch.nn.Linear
stores them, (N, D), so that p = h W reads F.linear(h, weight).
  h_old          input of the router under the rollout's weights theta_old                D
  W,   p = h W   router weight; router logits                                             N
  rho            softmax(p), the routing distribution                                     N
  W_p, b = h W_p evolution predictor, starts at zero; predicted change of the logits      N
  rho_hat        softmax(p_old + b), the predictive routing distribution                  N
  I, I_hat       TopK(rho), TopK(rho_hat): expert set; predicted expert set               k
  kappa, i       mini-steps per rollout batch (`mini_steps`); mini-step index 1..kappa
  alpha          learning rate of the predictor over the policy's

Which experts run in which pass (paper, Table 1); sections 3 and 5 are this table as code.
                      grpo, gspo    r2                        r3                  pr2
  rollout   mu_old    own top-k     own top-k                 own top-k           predicted top-k
  old pass  pi_old    own top-k     own top-k, recorded here  replay of rollout   replay of rollout
  update    pi_theta  own top-k     replay of the old pass    replay of rollout   replay of rollout

Two methods are ours and route like pr2. pr2-h scales the prediction by the number of updates that
will have been made when the prompt is trained; pr2-cf does not learn W_p but reads it, in closed
form, from the momentum of the router's optimizer, with a gain that calibrates itself: no alpha.

Paper: Dong et al., arXiv:2606.00395. What is ours and not the paper's is marked "ours".
"""

import json
import math
import re
import shutil
import statistics
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def expect(holds: bool, message: str) -> None:
    """Raises ValueError, which the command line turns into one sentence and exit code 2."""
    if not holds:
        raise ValueError(message)


def alone(values: Tensor) -> Tensor:
    """The values of all processes that train together, stacked, where there is only this one: the
    default of every `gather`. train_toy.py has the other one."""
    return values[None]


# ---------------------------------------------------------------------------------- 1. Model
@dataclass
class ModelConfig:
    """Shape of the transformer; field names are Hugging Face's config.json keys.
    qk_norm: "head" normalises every query and key head by itself (Qwen3-MoE), "full" all heads
    together (OLMoE), "none" neither (Mixtral). dense_layers: numbers of the layers that have, in
    place of experts, one MLP of intermediate_size. Raises ValueError for what cannot be built."""

    vocab_size: int
    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    moe_intermediate_size: int = 32
    num_experts: int = 32
    num_experts_per_tok: int = 4
    norm_topk_prob: bool = True
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qk_norm: str = "head"
    max_position_embeddings: int = 2048
    intermediate_size: int = 0
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self):
        self.dense_layers = tuple(sorted(set(self.dense_layers)))  # also of a list, as in JSON
        N, k, norm = self.num_experts, self.num_experts_per_tok, self.qk_norm
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        for name, value in vars(self).items():
            low = 0 if name == "intermediate_size" and not self.dense_layers else 1
            enough = type(value) is not int or value >= low
            expect(enough, f"{name} is {value}; expected at least {low}")
        expect(k <= N, f"num_experts_per_tok is {k}, but num_experts is {N}; expected at most {N}")
        even = heads % groups == 0
        expect(even, f"num_attention_heads {heads} not divisible by num_key_value_heads {groups}")
        expect(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; rotary needs an even number")
        known = norm in ("head", "full", "none")
        expect(known, f'qk_norm is "{norm}"; expected "head", "full" or "none"')
        some = set(self.dense_layers) < set(range(self.num_hidden_layers))
        expect(some, f"dense_layers is {self.dense_layers}; expected some, not all, of the layers")


class Trace(NamedTuple):
    """What a forward pass saw at its routers, over L MoE layers."""

    experts: Tensor  # (L, B, T, k) expert ids used, best first, in the smallest type that fits
    logits: Tensor  # (L, B, T, N) float32 router logits p = h W, without the predictor
    inputs: Tensor | None = None  # (L, B, T, D) router inputs h, detached; with keep_inputs=True


class Cache:
    """Keys and values of up to `length` positions, allocated when the first of them come."""

    def __init__(self, length: int):
        self.length, self.used, self.layers = length, 0, {}
        self.attend = None  # (B, used) bool once some position must not be attended to

    def store(self, layer: int, k: Tensor, v: Tensor) -> Tensor:
        """Adds (B, heads, T, head_dim); returns (2, B, heads, used + T, head_dim), all so far."""
        B, heads, T, size = k.shape
        if layer not in self.layers:
            self.layers[layer] = k.new_empty(2, B, heads, self.length, size)
        stored, end = self.layers[layer], self.used + T
        stored[0, :, :, self.used : end], stored[1, :, :, self.used : end] = k, v
        return stored[:, :, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keeps these rows, in this order; a row may be named several times or left out."""
        for layer, old in self.layers.items():
            self.layers[layer] = old.index_select(1, rows)
        if self.attend is not None:
            self.attend = self.attend.index_select(0, rows)


class Router(nn.Module):
    """Softmax top-k router with its evolution predictor, in float32 whatever the model's dtype."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))  # W
        self.predictor = nn.Linear(config.hidden_size, config.num_experts, bias=False)  # W_p
        nn.init.zeros_(self.predictor.weight)
        self.register_buffer("gain", torch.zeros(2))  # pr2-cf: running <drift, b> and <b, b>

    def forward(self, h, replay, horizon):
        """(..., D) -> weights (..., k), expert ids (..., k) int64, router logits p (..., N)."""
        h = h.float()
        p = scores = F.linear(h, self.weight.float())  # p = h W
        if horizon is not None:  # rho_hat = softmax(p + m b), b = h W_p; the paper's m is 1
            # Detached: the policy loss never trains W_p.
            b = F.linear(h, self.predictor.weight.detach().float())
            scores = torch.addcmul(p, b, torch.as_tensor(horizon).to(p))
        rho = scores.softmax(-1)
        experts = rho.topk(self.top_k).indices if replay is None else replay.long()
        # Replay picks the set; the weights are today's, so the router still gets gradient.
        weights = rho.gather(-1, experts)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, experts, p


# torch 2.13 cannot compile it in float32, so the graph breaks around it.
grouped_mm = torch.compiler.disable(F.grouped_mm)


class MoE(nn.Module):
    """A router and N SwiGLU experts, stored stacked and computed by grouped matmuls."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        N, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        dtypes = (torch.uint8, torch.int16, torch.int32)  # ids take the first that holds them
        self.id_dtype = next(t for t in dtypes if torch.iinfo(t).max >= N - 1)
        self.router = Router(config)
        self.gate_up = nn.Parameter(torch.empty(N, 2 * width, D))
        self.down = nn.Parameter(torch.empty(N, D, width))

    def forward(self, h, replay, horizon):
        """(..., D) -> output (..., D), expert ids (..., k), router logits (..., N)."""
        weights, experts, p = self.router(h, replay, horizon)
        # grouped_mm wants the rows of one expert side by side, and where each expert's rows end.
        slots = experts.flatten()
        order = slots.argsort()
        ends = torch.bincount(slots, minlength=len(self.down)).cumsum(0).int()
        rows = h.flatten(0, -2).index_select(0, order // experts.shape[-1])
        gate, up = grouped_mm(rows, self.gate_up.mT, offs=ends).chunk(2, -1)
        rows = grouped_mm(F.silu(gate) * up, self.down.mT, offs=ends)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=h.device))
        outputs = rows.index_select(0, back).view(*experts.shape, -1)
        # sum over j in I of rho_j E_j(h)
        output = (outputs * weights.to(h.dtype).unsqueeze(-1)).sum(-2)
        return output, experts.to(self.id_dtype), p


class MLP(nn.Module):
    """One SwiGLU, in place of a router and experts."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        self.gate_up = nn.Parameter(torch.empty(2 * width, D))
        self.down = nn.Parameter(torch.empty(D, width))

    def forward(self, h, replay, horizon):
        """(..., D) -> output (..., D), and None for the expert ids and router logits of `MoE`."""
        gate, up = F.linear(h, self.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down), None, None


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and query-key norm."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.qk_norm = layer, config.head_dim, config.qk_norm
        query = config.num_attention_heads * self.head_dim
        key = config.num_key_value_heads * self.head_dim
        self.widths = [query, key, key]
        self.qkv = nn.Linear(config.hidden_size, sum(self.widths), bias=False)
        self.out = nn.Linear(query, config.hidden_size, bias=False)
        if self.qk_norm != "none":
            sizes = (query, key) if self.qk_norm == "full" else (self.head_dim, self.head_dim)
            self.q_norm, self.k_norm = (nn.RMSNorm(size, config.rms_norm_eps) for size in sizes)

    def forward(self, x, rotary, mask, cache):
        q, k, v = self.qkv(x).split(self.widths, -1)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        cosine, sine = rotary  # Rotates the pair of dimensions j and j + head_dim / 2.
        q, k = (t * cosine + t.roll(self.head_dim // 2, -1) * sine for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache.store(self.layer, k, v)
        if x.shape[1] > 1:
            causal = mask is None
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
            return self.out(y.transpose(1, 2).flatten(2))
        # One query: two small matmuls are twice as fast on a CPU as the kernel for many.
        q = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # the query heads of each key head
        scores = q @ k.mT * self.head_dim**-0.5
        scores = scores if mask is None else scores + mask
        y = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        return self.out(y.flatten(1).unsqueeze(1))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.moe_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dense = layer in config.dense_layers
        self.moe = MLP(config) if self.dense else MoE(config)

    def forward(self, x, rotary, mask, cache, replay, horizon):
        x = x + self.attention(self.attention_norm(x), rotary, mask, cache)
        h = self.moe_norm(x)
        y, experts, p = self.moe(h, replay, horizon)
        return x + y, experts, p, h.detach()


class MoETransformer(nn.Module):
    """Decoder-only MoE transformer of the Qwen3-MoE family.

    The route is an argument and a result, never a mode (ours; the frameworks keep a process-global
    registry): `forward(replay=trace.experts)` repeats bit for bit the forward at the same horizon
    that returned the trace, under activation checkpointing and torch.compile too."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.source: Path | None = None  # the folder that from_pretrained read
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
        """The routers of the L MoE layers."""
        return [block.moe.router for block in self.blocks if not block.dense]

    def forward(
        self,
        tokens: Tensor,
        *,
        attend: Tensor | None = None,
        cache: Cache | None = None,
        replay: Tensor | None = None,
        horizon: float | Tensor | None = None,
        keep_inputs: bool = False,
        head: bool = True,
        recompute: bool = False,
    ) -> tuple[Tensor, Trace]:
        """Next-token logits (B, T, vocab_size), and what the routers saw.

        tokens   (B, T) int64, left-padded; with a cache, only the positions not yet in it.
        attend   (B, T) bool, True on real tokens, padding left (or right, if no cache); None = all.
        replay   (L, B, T, k) integer ids, distinct in a row: these experts instead of the top-k.
        horizon  None = predictor off; m, a float or (B,) = route, and weight, by
                 softmax(p + m h W_p). The paper's rollout has m = 1.
        head     False returns the final hidden states (B, T, D) instead of logits.
        recompute  True keeps only the blocks' inputs for backward (activation checkpointing).
        Raises ValueError if the positions or the replay do not fit the model."""
        (B, T), L = tokens.shape, len(self.routers)
        length = T + (cache.used if cache is not None else 0)
        fits = length <= self.config.max_position_embeddings
        expect(fits, f"{length} positions exceed max_position_embeddings; shorten the prompts")
        if replay is not None:
            self.check_replay(replay, (L, B, T, self.config.num_experts_per_tok))
        if isinstance(horizon, Tensor):
            horizon = horizon.expand(B)[:, None, None]
        x, seen = self.embed(tokens), []
        rotary, mask = self.positions(x, attend, cache)
        for block in self.blocks:
            route = None if replay is None or block.dense else replay[len(seen)]
            run = partial(checkpoint, block, use_reentrant=False) if recompute else block
            x, *routing = run(x, rotary, mask, cache, route, horizon)
            if not block.dense:
                seen.append(routing if keep_inputs else routing[:2])
        if cache is not None:
            cache.used = length
        trace = Trace(*(torch.stack(layers) for layers in zip(*seen, strict=True)))
        x = self.norm(x)
        return self.lm_head(x) if head else x, trace

    def positions(self, x: Tensor, attend: Tensor | None, cache: Cache | None):
        """Rotary cosine and sine, (1 or B, T, 1, head_dim), and the attention mask or None."""
        (B, T, _), device, dtype, start = x.shape, x.device, x.dtype, 0
        if attend is not None and attend[:, 0].all():
            attend = None  # Causal attention never looks ahead: padding on the right is unseen.
        if cache is not None:
            start = cache.used
            if attend is not None or cache.attend is not None:
                real = torch.empty(B, start + T, dtype=torch.bool, device=device)
                real[:, :start] = True if cache.attend is None else cache.attend
                real[:, start:] = True if attend is None else attend
                attend = cache.attend = real
        columns = torch.arange(start + T, device=device)
        at = columns[None] if attend is None else attend.cumsum(-1).sub(1).clamp(min=0)
        pair = torch.arange(0, self.config.head_dim, 2, device=device) / self.config.head_dim
        angle = (at[:, start:, None] * (1 / self.config.rope_theta**pair)).unsqueeze(2)
        cosine, sine = angle.cos(), angle.sin()  # (x_j, y_j) -> (x cos - y sin, y cos + x sin)
        rotary = cosine.repeat(1, 1, 1, 2).to(dtype), torch.cat([-sine, sine], -1).to(dtype)
        if attend is None and (start == 0 or T == 1):
            return rotary, None  # Plain causal attention needs no mask, a single query neither.
        visible = columns <= columns[start:, None]
        if attend is not None:  # A padding position sees itself, lest its softmax be empty.
            visible = visible & (attend[:, None, None] | (columns == columns[start:, None]))
        return rotary, torch.where(visible, 0.0, -math.inf).to(dtype)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype=torch.float32, device="cpu"):
        """The model in a Hugging Face folder, and W_p if it is there: see `load_checkpoint`."""
        return load_checkpoint(Path(path).resolve(), dtype, device)

    def save_pretrained(self, path: str | Path, fold_predictor: bool | float = False) -> None:
        """Writes a new Hugging Face folder: see `save_checkpoint`."""
        save_checkpoint(self, Path(path).resolve(), fold_predictor)

    def check_replay(self, replay: Tensor, expected: tuple[int, ...]) -> None:
        """Refuses routes that no forward of this model on these tokens could have returned."""
        (L, *_), shape, N = expected, tuple(replay.shape), self.config.num_experts
        integer = not replay.dtype.is_floating_point and replay.dtype != torch.bool
        expect(integer, f"replay has dtype {replay.dtype}; expected integer expert ids")
        message = f"replay has shape {shape}; the model has {L} MoE layers and expects {expected}"
        expect(shape == expected, message)
        low, high = map(int, replay.aminmax())  # compared as int: 256 wraps to a uint8 of 0
        inside = low >= 0 and high < N
        expect(inside, f"replay names an expert outside 0..{N - 1}, the ids of this model")
        distinct = int(shared(replay, replay).sum()) == replay.numel()
        expect(distinct, "replay names one expert twice; the k ids of a row must be distinct")


def best(logits: Tensor, like: Tensor) -> Tensor:
    """(..., N) -> (..., k), the experts with the largest logits, as many and in the type of the
    route `like` (..., k)."""
    return logits.topk(like.shape[-1]).indices.to(like.dtype)


def shared(route: Tensor, other: Tensor) -> Tensor:
    """(..., k), (..., k) -> (...), how many experts two routes have in common."""
    return (route.unsqueeze(-1) == other.unsqueeze(-2)).sum((-1, -2))


# ---------------------------------------------------------------------- 2. Real checkpoints
# qk_norm: model_type; class; where a layer has its MoE; gate, up and down matrix of an expert.
FAMILIES = {
    "head": ("qwen3_moe", "Qwen3MoeForCausalLM", "mlp", ("gate_proj", "up_proj", "down_proj")),
    "full": ("olmoe", "OlmoeForCausalLM", "mlp", ("gate_proj", "up_proj", "down_proj")),
    "none": ("mixtral", "MixtralForCausalLM", "block_sparse_moe", ("w1", "w3", "w2")),
}
# Any other value of these keys of config.json asks for something that is not implemented.
ONLY = {"attention_bias": False, "clip_qkv": None, "hidden_act": "silu", "sliding_window": 0}
ONLY |= {"type": "default", "rope_type": "default", "partial_rotary_factor": 1.0}
ONLY |= {"n_shared_experts": 0, "shared_expert_intermediate_size": 0, "quantization_config": None}
# Our names of modules, and Hugging Face's.
NAMES = {"embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm"}
NAMES |= {"attention_norm": "input_layernorm", "moe_norm": "post_attention_layernorm"}
NAMES |= {"attention": "self_attn", "out": "o_proj", "router": "gate"}
COPIED = "tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|generation_config"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 1000**3  # of weights, then the next file begins


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("checkpoints need safetensors: pip install safetensors numpy") from None
    return safetensors.torch


def read(path: Path) -> dict:
    """JSON, or tensors by name; whatever is wrong with the file becomes one sentence."""
    load = import_safetensors().load_file if path.suffix == ".safetensors" else Path.read_text
    try:
        content = load(path)
        return content if isinstance(content, dict) else dict(json.loads(content))
    except Exception as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from None


def config_from(given: dict) -> ModelConfig:
    """What a config.json describes; refuses by name what is not implemented here."""
    given = given | (given.get("rope_scaling") or given.get("rope_parameters") or {})
    given = {key: value for key, value in given.items() if value is not None}
    numbers = {field.name for field in fields(ModelConfig) if field.type in (int, float)}
    for key in (numbers | {"num_local_experts", "decoder_sparse_step"}) & given.keys():
        number = isinstance(given[key], int | float)
        expect(number, f"config.json has {key} {given[key]!r:.60}; expected a number")
    kind, norms = given.get("model_type"), {family[0]: norm for norm, family in FAMILIES.items()}
    expect(kind in norms, f'model_type is "{kind}"; expected one of {", ".join(norms)}')
    qwen, mixtral, heads = kind == "qwen3_moe", kind == "mixtral", given.get("num_attention_heads")
    size, width = given.get("hidden_size", 0) // (heads or 1), given.get("intermediate_size", 0)
    values = {"rms_norm_eps": 1e-6 if qwen else 1e-5, "rope_theta": 1e6 if mixtral else 1e4}
    values |= {"num_key_value_heads": heads, "head_dim": size, "norm_topk_prob": mixtral}
    values |= {"num_experts": given.get("num_local_experts", 0), "moe_intermediate_size": width}
    values |= {"tie_word_embeddings": False, "mlp_only_layers": (), "decoder_sparse_step": 1}
    values = defaultdict(int, values | given)  # what is missing is 0, which ModelConfig refuses
    values["sliding_window"] *= values.get("use_sliding_window", True)
    for key, value in (ONLY | {"architectures": [FAMILIES[norms[kind]][1]]}).items():
        asked = values.get(key, value)
        expect(asked == value, f"config.json has {key} {asked!r:.60}; only {value} is implemented")
    L, step = values["num_hidden_layers"], values["decoder_sparse_step"]
    dense = [l for l in range(L) if qwen and (l in values["mlp_only_layers"] or (l + 1) % step)]
    values |= {"qk_norm": norms[kind], "dense_layers": dense}
    values["intermediate_size"] = width if dense else 0
    values |= {"olmoe": {"head_dim": size}, "mixtral": {"norm_topk_prob": True}}.get(kind, {})
    return ModelConfig(**{field.name: values[field.name] for field in fields(ModelConfig)})


def config_json(model: MoETransformer) -> dict:
    """The source's config.json, else one of our own; refuses a model that it does not describe."""
    config, (kind, architecture, *_) = model.config, FAMILIES[model.config.qk_norm]
    given = vars(config) | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    given |= {"model_type": kind, "architectures": [architecture]}
    given |= {"mlp_only_layers": config.dense_layers, "num_local_experts": config.num_experts}
    given["intermediate_size"] = config.intermediate_size or config.moe_intermediate_size
    given = read(model.source / "config.json") if model.source else given
    given["torch_dtype"] = given["dtype"] = str(model.embed.weight.dtype).removeprefix("torch.")
    wrong = dict(vars(config).items() - vars(config_from(given)).items())
    expect(not wrong, f"a {kind} checkpoint cannot have {wrong}")
    return given


def disk_tensors(model: MoETransformer, stacked: bool = False) -> dict[str, Tensor]:
    """Hugging Face's names -> our weights and W_p, or the parts of those that are fused here.
    stacked: all experts of a layer in one tensor, which transformers 5 can be told to write."""
    *_, place, (gate, up, down) = FAMILIES[model.config.qk_norm]
    fused = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": (gate, up), "down": (down,)}
    names, tensors = NAMES | {"moe": "mlp" if stacked else place}, {}
    for name, weight in model.named_parameters():  # among which a tied lm_head is not
        *at, last = (names.get(word, word) for word in name.removesuffix(".weight").split("."))
        parts, at, weight = fused.get(last, (last,)), ".".join([*at, ""]), weight.detach()
        if weight.dim() == 3 and stacked:
            tensors[f"{at}experts.{last}_proj"] = weight
            continue
        for i, matrix in enumerate(weight if weight.dim() == 3 else weight[None]):
            inside = f"experts.{i}." if weight.dim() == 3 else ""
            sizes = model.blocks[0].attention.widths if last == "qkv" else len(matrix) // len(parts)
            for part, tensor in zip(parts, matrix.split(sizes), strict=True):
                tensors[f"{at}{inside}{part}.weight"] = tensor
    return tensors


@torch.no_grad()
def empty_model(config: ModelConfig, dtype: torch.dtype, device) -> MoETransformer:
    """A model on uninitialised memory, but for W_p and the gain, zero; its routers are float32."""
    with torch.device("meta"):  # no memory yet, and no random weights
        model = MoETransformer(config).to(dtype)
    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed.weight  # to_empty has torn them apart
    for router in model.routers:
        router.float().predictor.weight.zero_()
        router.gain.zero_()
    return model


@torch.no_grad()
def load_checkpoint(path: Path, dtype: torch.dtype, device) -> MoETransformer:
    """The model in a folder of qwen3_moe, olmoe or mixtral weights, copied file by file; float32
    routers whatever the dtype. Raises ValueError for what is damaged or not implemented here."""
    model = empty_model(config_from(read(path / "config.json")), dtype, device)
    model.source, top = path, SINGLE if (path / SINGLE).exists() else INDEX
    index = read(path / top)
    index = dict.fromkeys(index, SINGLE) if top == SINGLE else index.get("weight_map", {})
    named = isinstance(index, dict) and all(isinstance(file, str) for file in index.values())
    expect(named, f"{path / top} has no weight_map from tensors to files")
    tensors = disk_tensors(model, any(name.endswith(".experts.down_proj") for name in index))
    if (path / "predictor").exists():
        index |= {name: f"predictor/{SINGLE}" for name in tensors if ".predictor." in name}
    missing = {name for name in tensors if ".predictor." not in name} | index.keys()
    twice = model.config.tie_word_embeddings and "lm_head.weight" in index
    if twice:  # to compare with the embedding
        tensors["lm_head.weight"] = torch.empty_like(model.embed.weight)
    for file in sorted(set(index.values())):
        for name, found in read(path / file).items():
            expect(name in tensors, f"{path / file} has an unknown tensor {name}")
            shape, expected = tuple(found.shape), tuple(tensors[name].shape)
            expect(shape == expected, f"{name} has shape {shape}; expected {expected}")
            tensors[name].copy_(found)
            missing.discard(name)
    lost = min(missing, default="")
    expect(not missing, f"{path / index.get(lost, top)} lacks {len(missing)} tensors, as {lost}")
    same = not twice or torch.equal(tensors["lm_head.weight"], model.embed.weight)
    expect(same, f"tie_word_embeddings is true, but lm_head.weight in {path} is not the embedding")
    return model


@torch.no_grad()
def save_checkpoint(model: MoETransformer, path: Path, fold: bool | float) -> None:
    """Fills a new folder, all or nothing. fold = m (True is 1) writes W + m W_p as the router, in
    float32: unmodified engines then route and weight as `horizon=m` does here. False keeps W_p in
    predictor/, where they do not look. Raises ValueError if the folder exists or cannot say what
    the model is."""
    expect(not path.exists(), f"{path} exists; choose another folder")
    expect(math.isfinite(fold), f"fold_predictor is {fold}; expected a horizon")
    save_file, texts = import_safetensors().save_file, {"config.json": config_json(model)}
    tensors, dtype = disk_tensors(model), model.embed.weight.dtype
    files, size = defaultdict(dict), 0
    for name in [name for name in tensors if ".predictor." in name]:
        gate, W_p = name.replace(".predictor", ""), tensors.pop(name)
        W = tensors[gate].float()
        if fold is False:  # a router that has been trained in float32 stays in float32
            tensors[gate] = W.to(dtype) if torch.equal(W.to(dtype).float(), W) else W
            files[f"predictor/{SINGLE}"][name] = W_p
        else:
            tensors[gate] = W + fold * W_p
    total = sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        file = f"model-{size // SHARD_BYTES + 1:05}-of-{-(-total // SHARD_BYTES):05}.safetensors"
        files[file if total > SHARD_BYTES else SINGLE][name] = tensor
        size += tensor.nbytes
    if total > SHARD_BYTES:
        weight_map = {name: file for file in files for name in files[file] if name in tensors}
        texts[INDEX] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
        folder = Path(temporary) / path.name
        for file, shard in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            save_file(shard, folder / file, {"format": "pt"})
        for file in model.source.iterdir() if model.source else ():
            if file.is_file() and re.match(COPIED, file.name):
                shutil.copyfile(file, folder / file.name)
        for file, text in texts.items():
            (folder / file).write_text(json.dumps(text, indent=2) + "\n")
        folder.rename(path)


# -------------------------------------------------------------------------------- 3. Rollout
class Rollout(NamedTuple):
    """B = Q * samples sampled responses, prompt-major, with the routes that produced them."""

    tokens: Tensor  # (B, P + C) int64: left-padded prompt, response, padding
    attend: Tensor  # (B, P + C) bool: True on prompt and response, its end token included
    logprobs: Tensor  # (B, C) float32, log mu_old at the sampling temperature; 0 after the end
    experts: Tensor  # (L, B, P + C - 1, k) routes; the placeholder 0..k-1 after the end
    prompt_length: int  # P


@torch.no_grad()
def generate(
    model: MoETransformer,
    prompts: Tensor,
    max_new_tokens: int,
    *,
    eos: int,
    pad: int,
    samples: int = 1,
    temperature: float = 1.0,
    horizon: float | Tensor | None = None,
    generator: torch.Generator | None = None,
    gather: Callable[[Tensor], Tensor] = alone,
) -> Rollout:
    """Samples responses with a KV cache and records the routes that produced them.
    prompts (Q, P) int64, left-padded with `pad`; horizon None, a float or (Q,), see `forward`.
    temperature 0 is greedy, with log-probabilities at temperature 1; eos -1 never stops.
    A prompt is computed once for all its samples; a finished response leaves the batch. With a
    sharded model all processes decode in lock step until the last response has ended."""
    (Q, P), C, device = prompts.shape, max_new_tokens, prompts.device
    expect(C > 0 and samples > 0, f"max_new_tokens {C} and samples {samples} must be positive")
    expect(temperature >= 0, f"temperature is {temperature}; expected at least 0")
    fits = model.config.max_position_embeddings >= P + C - 1
    expect(fits, f"{P + C - 1} positions exceed max_position_embeddings; shorten the prompts")
    real = (prompts != pad).cumsum(-1) > 0  # Only leading pads are padding.
    cache = Cache(P + C - 1)
    hidden, trace = model(prompts, attend=real, cache=cache, horizon=horizon, head=False)
    group = torch.arange(Q, device=device).repeat_interleave(samples)
    cache.select(group)
    if horizon is not None:
        horizon = torch.as_tensor(horizon, device=device).expand(Q)[group]
    tokens = F.pad(prompts[group], (0, C), value=pad)
    experts = F.pad(trace.experts[:, group], (0, 0, 0, C - 1))
    logprobs = torch.zeros(len(group), C, device=device)
    hidden, rows = hidden[group], torch.arange(len(group), device=device)  # those still sampled
    for column in range(P, P + C):
        log_p = (model.lm_head(hidden[:, -1]).float() / (temperature or 1.0)).log_softmax(-1)
        race = torch.ones_like(log_p)
        if temperature:  # An exponential race is a categorical sample that never waits for the GPU.
            race.exponential_(generator=generator)
        token = (log_p.exp() / race).argmax(-1, keepdim=True)
        tokens[rows, column] = token[:, 0]
        logprobs[rows, column - P] = log_p.gather(-1, token)[:, 0]
        # A look at the tokens makes a GPU wait.
        if device.type == "cpu" or (column - P) % 8 == 0:
            going = (tokens[rows, P : column + 1] != eos).all(1).nonzero()[:, 0]
            if not gather(torch.tensor(len(going), device=device)).any():
                break
            if len(going) == 0:
                going = rows.new_zeros(1)  # a dummy row, to keep step
            if len(going) <= 0.75 * len(rows):  # Copying the cache pays from about a quarter on.
                cache.select(going)
                token, rows = token[going], rows[going]
                horizon = None if horizon is None else horizon[going]
        if column < P + C - 1:
            hidden, trace = model(token, cache=cache, horizon=horizon, head=False)
            experts[:, rows, column] = trace.experts[:, :, 0]
    # Wipes what was sampled between a response's end and its leaving the batch.
    over = (tokens[:, P:] == eos).cumsum(1) > 0  # at the end token and after it
    after, placeholder = F.pad(over, (1, -1)), torch.arange(experts.shape[-1]).to(experts)
    tokens[:, P:].masked_fill_(after, pad)
    experts[:, :, P:] = experts[:, :, P:].where(~over[:, :-1, None], placeholder)
    attend = torch.cat([real[group], ~after], 1)
    return Rollout(tokens, attend, logprobs.masked_fill(after, 0.0), experts, P)


def rollout_engine(model: MoETransformer, rollout_dtype: str) -> MoETransformer:
    """A second model, for rollouts in their own precision; `synchronise` gives it its weights.
    "fp32"; "bf16": weights and arithmetic in bfloat16; "fp8": the same, but weights of experts and
    projections are rounded to float8 first. The router computes in float32 in all of them."""
    dtype = torch.float32 if rollout_dtype == "fp32" else torch.bfloat16
    engine = empty_model(model.config, dtype, model.routers[0].weight.device)
    return engine.eval().requires_grad_(False)


@torch.no_grad()
def synchronise(engine: MoETransformer, model: MoETransformer, rollout_dtype: str) -> None:
    """Copies the model's weights into the rollout engine, rounding them to its precision."""
    for (name, target), source in zip(engine.named_parameters(), model.parameters(), strict=True):
        if rollout_dtype == "fp8" and re.search(r"qkv|\.out\.|gate_up|down", name):
            scale = source.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448  # one per row
            source = (source / scale).to(torch.float8_e4m3fn).to(source.dtype) * scale
        target.copy_(source)


# --------------------------------------------------------------------------------- 4. Losses
def group_advantages(rewards: Tensor) -> Tensor:
    """GRPO: (Q, G) rewards -> (Q, G), (r - mean) / (unbiased std + 1e-6) over each prompt's group.
    A group whose rewards are all equal, or of one response, teaches nothing: 0."""
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.std(1, keepdim=True, correction=min(1, rewards.shape[1] - 1))
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return (centred / (spread + 1e-6)).masked_fill(equal, 0.0)


def ppo_loss(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Clipped surrogate with clip-higher (DAPO), elementwise: -min(r A, clip(r, 1-low, 1+high) A).
    log_ratio = log r = log pi_theta - log pi_old, of tokens or (GSPO) of sequences."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def sequence_log_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """GSPO: (B, C) -> (B, 1), the log of (pi_theta(y) / pi_old(y)) ^ (1 / |y|)."""
    return (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)


def predictor_loss(inputs, old_logits, logits, weight, kind: str = "post") -> Tensor:
    """Loss of the predictor W_p, summed over layers and tokens; the target gets no gradient.

    inputs (L, n, D) h_old; old_logits, logits (L, n, N) p_old and p; weight (L, N, D) W_p.
    "post"   KL( rho_theta || softmax(p_old + h_old W_p) ), post-routing matching
    "delta"  KL( softmax(p - p_old) || softmax(h_old W_p) ), the paper's ablation"""
    b = inputs @ weight.mT
    target, prediction = (logits, old_logits + b) if kind == "post" else (logits - old_logits, b)
    target, prediction = target.detach().log_softmax(-1), prediction.log_softmax(-1)
    return (target.exp() * (target - prediction)).sum()


def load_balancing_loss(experts: Tensor, logits: Tensor) -> Tensor:
    """Switch Transformer's auxiliary loss, mean over layers; 1 when the load is perfectly even.
    experts (L, ..., k) ids, logits (L, ..., N)."""
    N = logits.shape[-1]
    # N sum_j f_j P_j: f_j is the share of slots that went to expert j, P_j its mean probability.
    share = F.one_hot(experts.long(), N).float().flatten(1, -2).mean(1)
    return N * (share * logits.softmax(-1).flatten(1, -2).mean(1)).sum(-1).mean()


# --------------------------------------------------------- 5. One RL step and what it measures
METHODS = ("grpo", "gspo", "r2", "r3", "pr2", "pr2-h", "pr2-cf")  # the last two are ours
PHASES = ("rollout", "old_logprobs", "update")


@dataclass
class RLConfig:
    """Settings of the RL loop. Raises ValueError for a value that makes no sense."""

    method: str = "pr2"
    prompts: int = 64  # per rollout batch
    samples: int = 8  # G, responses per prompt
    max_new_tokens: int = 16
    eos: int = 1  # token that ends a response, -1 = none
    pad: int = 0
    temperature: float = 1.0
    rollout_dtype: str = "fp32"
    mini_steps: int = 2  # kappa
    epochs: int = 1  # passes over the rollout batch; i counts on through them
    micro_tokens: int = 0  # per forward pass at most, padding too; 0 = a whole mini-step at once
    recompute: bool = False  # activation checkpointing: memory for time
    learning_rate: float = 2e-4
    router_multiplier: float = 1.0  # learning rate of W over the policy's; ours, see the README
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    clip: tuple[float, float] = field(init=False)  # (0.2, 0.28), for gspo (3e-4, 4e-4), times
    clip_multiplier: float = 1.0  # inf = no clipping
    alpha: float = 2.0  # learning rate of W_p over the policy's
    predictor_loss: str = "post"
    predictor_beta1: float = 0.0  # ours: with Adam's usual 0.9 the prediction lags behind
    cached_positions: int = 0  # T_c, response positions that train the predictor; 0 = all

    def __post_init__(self):
        choices = {"method": METHODS, "rollout_dtype": ("fp32", "bf16", "fp8")}
        choices |= {"predictor_loss": ("post", "delta")}
        for name, value in vars(self).items():
            known = name not in choices or value in choices[name]
            expect(known, f'{name} is "{value}"; expected one of {choices.get(name)}')
            low = int(name in ("prompts", "samples", "max_new_tokens", "mini_steps", "epochs"))
            enough = not isinstance(value, int | float) or value >= low or name == "eos"
            expect(enough, f"{name} is {value}; expected at least {low}")
        expect(self.temperature > 0, "temperature is 0; RL samples, so expected more than 0")
        kappa, Q = self.mini_steps, self.prompts
        expect(kappa <= Q, f"mini_steps {kappa} is larger than the {Q} prompts of a rollout batch")
        expect(Q % kappa == 0, f"{Q} prompts do not divide into {kappa} equal mini-steps")
        bounds = (3e-4, 4e-4) if self.method == "gspo" else (0.2, 0.28)
        self.clip = tuple(self.clip_multiplier * bound for bound in bounds)
        self.predicts = self.method.startswith("pr2")


def make_optimizer(model: MoETransformer, config: RLConfig) -> torch.optim.AdamW:
    """AdamW with a group each for the routers W, the predictors W_p and everything else."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    ends = ("router.weight", "predictor.weight")
    routers, predictors = ([p for name, p in named if name.endswith(end)] for end in ends)
    rest = [p for name, p in named if not name.endswith(ends)]
    rate, betas = config.learning_rate, (config.predictor_beta1, config.betas[1])
    routers = {"params": routers, "lr": rate * config.router_multiplier}
    predictors = {"params": predictors, "lr": rate * config.alpha, "betas": betas}
    groups = [{"params": rest}, routers, predictors]
    return torch.optim.AdamW(groups, rate, config.betas, weight_decay=0.0, fused=True)


class Slice(NamedTuple):
    """The b responses of one micro-batch, n tokens in all, and what theta_old said of them."""

    tokens: Tensor  # (b, P + c) int64, cut after the longest response
    attend: Tensor  # (b, P + c - 1) bool
    mask: Tensor  # (b, c) bool, True on response tokens
    advantages: Tensor  # (b, 1)
    old_logprobs: Tensor  # (b, c) log pi_old
    replay: Tensor | None  # (L, b, P + c - 1, k), the route that the update must take
    reference: Tensor  # (L, n, k), that route at the response tokens; without replay the rollout's
    stale: Tensor  # (L, n, k), top-k of p_old: what replay without prediction would have taken
    engine: Tensor  # (L, n, k), top-k of the rollout engine's p: what r3 would have taken
    cached: Tensor  # (b, c) bool, a sub-sample of m tokens that train the predictor
    inputs: Tensor | None  # (L, m, D), h_old at those tokens, of a method that predicts
    old_logits: Tensor | None  # (L, m, N), p_old at those tokens


def at_response(values: Tensor, mask: Tensor) -> Tensor:
    """(..., b, T, x) -> (..., n, x), the positions that predict the n tokens of mask (b, c)."""
    return values[..., -mask.shape[1] :, :][..., mask, :]


def response_logprobs(model, tokens, attend, mask, temperature, **forward) -> tuple[Tensor, Trace]:
    """log pi (b, c) of the response tokens, 0 elsewhere, and the Trace of all positions."""

    def head(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = model.lm_head(hidden).float() / temperature
        return -F.cross_entropy(logits, targets, reduction="none")

    hidden, trace = model(tokens[:, :-1], attend=attend, head=False, **forward)
    hidden, targets = at_response(hidden, mask), tokens[:, -mask.shape[1] :][mask]
    # 8192 tokens at a time, not kept for backward: (b, T, vocab_size) logits never exist.
    chunks = zip(hidden.split(8192), targets.split(8192), strict=True)
    logprobs = [checkpoint(head, *c, use_reentrant=False, preserve_rng_state=False) for c in chunks]
    zeros = torch.zeros(mask.shape, device=mask.device)
    return zeros.masked_scatter(mask, torch.cat(logprobs)), trace


@torch.no_grad()
def old_pass(
    model, engine, config, rollout, advantages, horizon, rows, generator
) -> tuple[Slice, dict]:
    """Old log-probs of some rows by the training engine; and sums of metrics over their tokens."""
    P, mask = rollout.prompt_length, rollout.attend[rows, rollout.prompt_length :]
    c = int(mask.sum(1).max())
    mask, T = mask[:, :c], P + c - 1
    tokens, attend = rollout.tokens[rows, : T + 1], rollout.attend[rows, :T]
    recorded = rollout.experts[:, rows, :T]
    replay = recorded if config.predicts or config.method == "r3" else None
    forward = (tokens, attend, mask, config.temperature)
    old, trace = response_logprobs(model, *forward, replay=replay, keep_inputs=config.predicts)
    replay = trace.experts if config.method == "r2" else replay
    # T_c: a uniform sub-sample of each response's tokens trains the predictor.
    draw = torch.rand(mask.shape, device=mask.device, generator=generator).masked_fill(~mask, 2.0)
    last = min(config.cached_positions or c, c) - 1
    cached = mask & (draw <= draw.sort(1).values[:, last, None])
    route, p = at_response(recorded, mask), at_response(trace.logits, mask)
    inputs = p_old = None
    own = stale = best(p, route)
    unpredicted = stale if config.predicts else route
    if config.predicts and config.rollout_dtype != "fp32":
        _, seen = engine(tokens[:, :-1], attend=attend, replay=recorded, head=False)
        unpredicted = best(at_response(seen.logits, mask), route)
    if config.predicts:
        h, W_p = at_response(trace.inputs, mask), [r.predictor.weight for r in model.routers]
        inputs, p_old = h[:, cached[mask]], p[:, cached[mask]]
        b = h.float() @ torch.stack(W_p).mT
        m = horizon[rows].expand(mask.shape)[mask][:, None]
        own = best(p + m * b, route)
    # Where the training engine, by the same rule, would not take the rollout engine's route.
    differs = shared(route, own) < route.shape[-1]
    sums = {
        "entropy": -old.sum(),  # log-probs of sampled tokens estimate it, as far as mu_old = pi_old
        "mismatch_logprob": (rollout.logprobs[rows, :c] - old).abs().sum(),
        "mismatch_route": differs.sum() / len(differs),
        "mismatch_token": differs.any(0).sum(),
    }
    route = route if replay is None else at_response(replay, mask)
    routes = {"replay": replay, "reference": route, "stale": stale, "engine": unpredicted}
    features = {"cached": cached, "inputs": inputs, "old_logits": p_old}
    return Slice(tokens, attend, mask, advantages[rows], old, **routes, **features), sums


@torch.no_grad()
def drift(batch: Slice, logits: Tensor) -> dict[str, Tensor]:
    """How far the routers, now at logits (L, n, N), have moved from the routes of the batch.
    Sums over tokens of means over layers, per slot (agreement) or per set of one token in one
    layer (the others); `stale` and `engine` are counterfactuals on the same tokens."""
    rho, k = logits.softmax(-1), batch.reference.shape[-1]
    current = best(rho, batch.reference)
    values = {"coverage_gap": 1 - rho.gather(-1, batch.reference.long()).sum(-1)}
    for name, route in ("stale_", batch.stale), ("engine_", batch.engine), ("", batch.reference):
        same = shared(route, current)
        values |= {name + "agreement": same / k, name + "no_deviation": same == k}
    values |= {"deviations_1": same == k - 1, "deviations_2": same == k - 2}
    values |= {"deviations_3_or_more": same < k - 2}
    return {name: value.float().mean(0).sum() for name, value in values.items()}


def horizon_after(updates: float | Tensor, config: RLConfig) -> float | Tensor:
    """The horizon m of a prompt that is trained after so many updates of the rollout's weights.
    pr2: 1. Ours: so many updates (pr2-h); so many steps of decaying momentum, the sum of beta1^j
    over j = 1..updates (pr2-cf)."""
    beta1 = config.betas[0]
    if config.method == "pr2-cf":
        return beta1 * (1 - beta1**updates) / (1 - beta1)
    return updates if config.method == "pr2-h" else 0 * updates + 1


@torch.no_grad()
def aim(model: MoETransformer, optimizer: torch.optim.AdamW, decay: float = 0.85) -> Tensor:
    """Ours, pr2-cf: V (L, N, D), the step that Adam's momentum alone would take; sets W_p = gain V.
    If gradients average out, the j-th update from now moves W by beta1^j V, V = -eta m / sqrt(v).
    The gain is <drift, prediction> / <prediction, prediction> of the unscaled V, kept in [0, 1]:
    where drift does not follow momentum it goes to 0, and the method to r3."""
    group, steps = optimizer.param_groups[1], []
    for router in model.routers:
        V, state = torch.zeros_like(router.weight), optimizer.state.get(router.weight)
        if state:
            step = state["step"].clamp(min=1)
            correction1, correction2 = (1 - beta**step for beta in group["betas"])
            root = (state["exp_avg_sq"] / correction2).sqrt() + group["eps"]
            V = -group["lr"] * state["exp_avg"] / correction1 / root
        steps.append(V)
        gain = (router.gain[0] / router.gain[1].clamp(1e-12)).clamp(0, 1)
        router.predictor.weight.copy_(gain * V)
        router.gain.mul_(decay)
    return torch.stack(steps)


@torch.no_grad()
def measure_gain(model: MoETransformer, b: Tensor, moved: Tensor, gather=alone) -> None:
    """Ours, pr2-cf: adds a prediction b and the drift that came, (L, n, N), to the running sums."""
    moved, b = (t - t.mean(-1, keepdim=True) for t in (moved, b))  # a common shift routes nobody
    for router, came, guess in zip(model.routers, moved, b, strict=True):
        new = gather(torch.stack([(came * guess).sum(), guess.square().sum()])).sum(0)
        router.gain.add_(new if new.isfinite().all() else 0)


def averages(sums: dict[str, Tensor], gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """The mean over processes of what each of them has summed up."""
    values = gather(torch.stack([value.float() for value in sums.values()])).mean(0)
    return dict(zip(sums, values.tolist(), strict=True))


def total_norm(parameters: list[Tensor]) -> Tensor:
    """Of the gradients; of sharded ones, over all their shards."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def mini_step(model, optimizer, config, batches, i, V=None, gather=alone) -> dict[str, float]:
    """Mini-step i: one update of the policy and, from i = 2 on, of the predictor. Returns metrics.
    The batches are micro-batches: their gradients add up to that of one large batch. An update
    whose loss or gradient is not finite is skipped (ours), by all processes together."""
    tokens, cached = sum(b.mask.sum() for b in batches), sum(b.cached.sum() for b in batches)
    counts = torch.stack([tokens, cached, tokens.new_tensor(sum(len(b.mask) for b in batches))])
    # Processes average their gradients and sums, so the denominators are averages too.
    tokens, cached, responses = gather(counts.float()).mean(0)
    sums, largest, (low, high) = defaultdict(float), torch.zeros_like(tokens), config.clip
    optimizer.zero_grad()
    for batch in batches:
        route = {"replay": batch.replay, "recompute": config.recompute}
        logprobs, trace = response_logprobs(model, *batch[:3], config.temperature, **route)
        surrogate = log_ratio = logprobs - batch.old_logprobs
        weight = batch.mask / tokens  # the mean over the tokens of the mini-step
        if config.method == "gspo":  # the mean over its sequences
            surrogate = sequence_log_ratio(log_ratio, batch.mask)
            weight = batch.mask / batch.mask.sum(1, keepdim=True) / responses
        loss = (ppo_loss(surrogate, batch.advantages, low, high) * weight).sum()
        sums["loss"] += loss.detach()
        logits = at_response(trace.logits.detach(), batch.mask)
        if config.predicts and i > 1:  # At i = 1 nothing has drifted yet.
            m, inputs, p_old = horizon_after(i - 1, config), batch.inputs.float(), batch.old_logits
            p = logits[:, batch.cached[batch.mask]]
            if config.method == "pr2-cf":
                measure_gain(model, inputs @ (m * V).mT, p - p_old, gather)
            else:
                W_p = m * torch.stack([router.predictor.weight for router in model.routers])
                surprise = predictor_loss(inputs, p_old, p, W_p, config.predictor_loss) / cached
                sums["predictor_loss"] += surprise.detach()
                loss = loss + surprise
        loss.backward()
        log_ratio, ratio = log_ratio.detach(), surrogate.detach().exp()
        up, down = batch.advantages > 0, batch.advantages < 0
        sums["clipfrac_low"] += (((ratio < 1 - low) & down) * weight).sum()
        sums["clipfrac_high"] += (((ratio > 1 + high) & up) * weight).sum()
        sums["approx_kl"] += (log_ratio.exp() - 1 - log_ratio).sum() / tokens
        sums["log_ratio_mean"] += log_ratio.abs().sum() / tokens
        largest = torch.maximum(largest, log_ratio.abs().max())
        for name, value in drift(batch, logits).items():
            sums[name] += value / tokens
    rest, routers, predictors = (group["params"] for group in optimizer.param_groups)
    for parameter in routers + predictors:  # every process has them whole, the rest is sharded
        if parameter.grad is not None:
            parameter.grad = gather(parameter.grad).mean(0)
    norm, norm_p = torch.hypot(total_norm(rest), total_norm(routers)), total_norm(predictors)
    for group, size in ((rest, norm), (routers, norm), (predictors, norm_p)):
        nn.utils.clip_grads_with_norm_(group, config.max_grad_norm, size)
    metrics = averages(sums, gather)
    metrics |= {"log_ratio_max": float(gather(largest).max()), "grad_norm": float(norm)}
    finite = math.isfinite(metrics["loss"] + metrics.get("predictor_loss", 0) + norm + norm_p)
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    return metrics | {"skipped": 0.0 if finite else 1.0}


def collect(
    model: MoETransformer,
    engine: MoETransformer,
    config: RLConfig,
    prompts: Tensor,
    reward: Callable[[Rollout], Tensor],
    generator: torch.Generator | None = None,
    gather: Callable[[Tensor], Tensor] = alone,
) -> tuple[list[list[Slice]], dict[str, float]]:
    """Samples and scores a rollout batch: a list of micro-batches per mini-step, and metrics.
    prompts (Q, P) int64, left-padded; `reward` maps the Rollout to (Q * samples,) floats; `engine`
    comes from `rollout_engine`. Raises ValueError if the mini-steps cannot be of equal size."""
    Q, G, kappa, clock = len(prompts), config.samples, config.mini_steps, [time.perf_counter()]
    expect(Q % kappa == 0, f"{Q} prompts do not divide into {kappa} equal mini-steps")
    synchronise(engine, model, config.rollout_dtype)
    # A prompt's visits find so many updates made; its horizon is the mean over its visits.
    visits = torch.arange(kappa * config.epochs, device=prompts.device)
    m = (config.predicts * horizon_after(visits, config)).float().view(-1, kappa).mean(0)
    m = m.repeat_interleave(Q // kappa)
    sampling = {"samples": G, "temperature": config.temperature, "generator": generator}
    sampling |= {"eos": config.eos, "pad": config.pad, "gather": gather}
    sampling |= {"horizon": m if config.predicts else None}
    rollout = generate(engine, prompts, config.max_new_tokens, **sampling)
    clock.append(time.perf_counter())
    rewards = reward(rollout).to(prompts.device)
    advantages = group_advantages(rewards.view(Q, G)).view(-1, 1)
    m = m.repeat_interleave(G)[:, None]
    # Old log-probs on the very slices of the updates: pi_theta / pi_old starts at exactly 1.
    mask, mini_steps, sums = rollout.attend[:, rollout.prompt_length :], [], defaultdict(float)
    sums |= {"reward": rewards.sum(), "tokens": mask.sum()}
    for mini_batch in torch.arange(Q * G).chunk(kappa):
        longest = rollout.prompt_length + gather(mask[mini_batch].sum(1).max()).max() - 1
        size = max(1, config.micro_tokens // int(longest)) if config.micro_tokens else Q * G
        mini_steps.append([])
        for rows in mini_batch.split(size):
            batch, passed = old_pass(model, engine, config, rollout, advantages, m, rows, generator)
            mini_steps[-1].append(batch)
            for name, value in passed.items():
                sums[name] += value
    metrics = averages(sums, gather)
    clock.append(time.perf_counter())
    reward, tokens = metrics.pop("reward"), metrics.pop("tokens")
    metrics = {name: value / tokens for name, value in metrics.items()}
    metrics |= {"reward": reward / (Q * G), "response_length": tokens / (Q * G)}
    metrics |= {"seconds_rollout": clock[1] - clock[0], "seconds_old_logprobs": clock[2] - clock[1]}
    return mini_steps, metrics


def rl_step(
    model: MoETransformer,
    engine: MoETransformer,
    optimizer: torch.optim.AdamW,
    config: RLConfig,
    prompts: Tensor,
    reward: Callable[[Rollout], Tensor],
    generator: torch.Generator | None = None,
    gather: Callable[[Tensor], Tensor] = alone,
) -> dict[str, float]:
    """One rollout batch: `collect` it, then train on it in kappa mini-steps. Returns metrics.
    Metric "name/i" belongs to mini-step i; plain "name" is the mean over mini-steps, but the
    largest for log_ratio_max and the sum for skipped."""
    V = aim(model, optimizer) if config.method == "pr2-cf" else None
    mini_steps, metrics = collect(model, engine, config, prompts, reward, generator, gather)
    start, order = time.perf_counter(), enumerate(mini_steps * config.epochs, 1)
    updates = {i: mini_step(model, optimizer, config, b, i, V, gather) for i, b in order}
    for name in updates[len(updates)]:
        values = {i: update[name] for i, update in updates.items() if name in update}
        combine = {"log_ratio_max": max, "skipped": sum}.get(name, statistics.fmean)
        metrics[name] = combine(values.values())
        metrics |= {f"{name}/{i}": value for i, value in values.items()}
    return metrics | {"seconds_update": time.perf_counter() - start}


# ------------------------------------------------------------------------------ 6. Toy task
class AdditionTask:
    """Chain-of-thought addition: the prompt "7+5+9=" is answered by its running sums, "12,21.".
    A checksum of the text sets an eighth of the prompts aside; they are never trained on."""

    characters = "_.,+=0123456789"  # one character, one token; "_" pads and "." ends
    pad, eos = 0, 1

    def __init__(self, operands: int = 3, largest: int = 9):
        enough = operands > 1 and largest > 0 and (largest + 1) ** operands >= 100
        expect(enough, f"{operands} numbers up to {largest} make too few sums; expected over 99")
        self.operands, self.largest = operands, largest
        self.prompt_length = operands * (len(str(largest)) + 1)
        self.response_length = (operands - 1) * (len(str(operands * (largest + 1))) + 1)

    def encode(self, texts: list[str], width: int, left: bool = False) -> Tensor:
        """Texts -> (len(texts), width) int64 ids, padded on the right or on the left."""
        texts = [text.rjust(width, "_") if left else text.ljust(width, "_") for text in texts]
        return torch.tensor([[self.characters.index(c) for c in text] for text in texts])

    def prompts(self, problems: list[str]) -> Tensor:
        """Problems -> (len(problems), prompt_length) int64 ids, padded on the left."""
        return self.encode(problems, self.prompt_length, left=True)

    def decode(self, ids: Tensor) -> list[str]:
        """(B, T) ids -> texts without the padding on the right."""
        return ["".join(self.characters[i] for i in row).rstrip("_") for row in ids.tolist()]

    def problems(self, count: int, generator: torch.Generator, held_out: bool = False) -> list[str]:
        """`count` prompts, all from the training part or all from the held-out part."""
        found: list[str] = []
        while len(found) < count:
            numbers = torch.randint(self.largest + 1, (count, self.operands), generator=generator)
            texts = ["+".join(map(str, row)) + "=" for row in numbers.tolist()]
            found += [text for text in texts if (zlib.crc32(text.encode()) % 8 == 0) == held_out]
        return found[:count]

    def solve(self, problem: str, slip: float, generator: torch.Generator) -> str:
        """The running sums; each is off by one with probability `slip`, and is carried on."""
        total, *numbers = map(int, problem[:-1].split("+"))
        sums, draws = [], torch.rand(len(numbers), 2, generator=generator).tolist()
        for number, (slips, sign) in zip(numbers, draws, strict=True):
            total = max(0, total + number + (slips < slip) * (1 if sign < 0.5 else -1))
            sums.append(str(total))
        return ",".join(sums) + "."

    def rewards(self, problems: list[str], responses: list[str]) -> Tensor:
        """1.0 for "12,21." to "7+5+9=", a right final answer after well-formed sums; else 0.0."""
        right, form = [], re.compile(rf"(?:\d+,){{{self.operands - 2}}}(\d+)\.")
        for problem, response in zip(problems, responses, strict=True):
            match = form.fullmatch(response)
            right.append(match and int(match[1]) == sum(map(int, problem[:-1].split("+"))))
        return torch.tensor([float(bool(r)) for r in right])
