"""Predictive Routing Replay (PR2) in one file: read it top to bottom.

The problem. A Mixture-of-Experts (MoE) layer sends each token to the k of its N experts that a
small router scores highest. In reinforcement learning (RL) a rollout engine, a faster program with
a copy of the weights and a rounding of its own, samples a batch of responses. The training engine
cuts the batch into kappa pieces and makes one update on each. When the last piece is trained, the
weights are kappa - 1 updates newer than those that sampled it. Each update moves the routers, and a
token that went through experts 3 and 7 with the old weights may go through 3 and 9 in training.
The PPO ratio pi_theta / pi_old then compares two different sub-networks and can explode: router
drift. Routing replay records the expert set of each token in each layer once, its route, and forces
it from then on: R2, vanilla routing replay, records in the training engine before the first update,
R3 in the rollout engine, so that both engines run the same experts. That tames the ratios, but the
set goes stale: an expert that the router has since come to prefer gets no gradient.

The idea. PR2 keeps the replay but records a *prediction*: the experts that the router will want by
the time the token is trained. A router's logits are p = h W, where h is its input, and they change
mostly because W changes: p_new - p_old is about h (W_new - W_old), linear in h. So a second matrix
W_p beside W, kept across batches, is trained at every piece of a batch but the first, to give the
change of the logits since the rollout as m h W_p. Betting that the next batch drifts alike, PR2
records the top-k of p + m h W_p. The horizon m (ours; the paper has 1) grows with the piece, from 0
for the first (so no prediction) to 1 for the last: W_p is the change over kappa - 1 updates. A
recording takes 0.7 m (ours): W_p is a noisy estimate. Pieces are consecutive prompts, so m is known
before one is sampled. Experts that are about to be chosen get their gradient in time. In the
training engine replay and prediction only *pick* the set; how much each expert counts is the
current router's softmax, and through that the router learns. W_p starts at zero: in the first
batch, and always if kappa is 1, pr2 is exactly r2, and pr3 is r3.

One rollout batch in short (of pr3, the default; rl_step is this in full):
    responses, experts = sample(prompts)       by an engine whose router is W + 0.7 m W_p, with the
                                               m of the piece that the prompt belongs to
    log pi_old, p_old, h_old = model(responses, experts)         the old pass, before any update
    for i, piece in enumerate(pieces, start=1):                  kappa mini-steps
        log pi_theta, p = model(piece, experts)                  weighed by today's softmax(p)
        loss = PPO(pi_theta / pi_old)                            trains everything but W_p
        if i > 1:                                                at i = 1 no router has moved
            loss += KL( softmax(p).detach() || softmax(p_old + m h_old W_p) )  trains W_p alone
        update

Notation (shapes for one layer and one token). Weights are stored as torch.nn.Linear stores them,
(N, D), so p = h W reads F.linear(h, weight).
  mu_old           the rollout engine's policy; its router is W, under pr3 W + 0.7 m W_p
  pi_old, pi_theta the training engine's policy, with theta_old; with today's weights theta
  h                input of the router                                                  D
  W, p = h W       router weight; router logits                                         N
  rho              softmax(p), the routing distribution                                 N
  h_old, p_old     h and p in the training engine with theta_old                        D; N
  W_p, b = h W_p   evolution predictor, shaped like W; the change of logits it predicts N
  m, rho_hat       horizon (a recording: 0.7 m); softmax(p + m b), the predicted rho    N
  kappa, i         mini-steps: updates, each on its own piece of the batch; i = 1..kappa
  alpha            learning rate of W_p divided by that of W
  Q, G, P, C       prompts in a batch; responses to each; longest prompt; longest response
  L, N, k, D       layers; experts in each; those of a token; width of h
  B, T, R, c       rows, positions of a pass; responses of a micro-batch, length of the longest
  n, n'            response tokens of a micro-batch; those of them that W_p learns from

The table of passes: which experts run in which. pr2 is r2, and pr3 is r3, with prediction.
           rollout, mu_old       old pass, pi_old                    update, pi_theta
  grpo     top-k of rho          top-k of rho                        top-k of rho
  r2       top-k of rho          top-k of rho, recorded here         replay of the old pass
  pr2      top-k of rho          top-k of rho_hat, recorded here     replay of the old pass
  r3       top-k of rho          replay of the rollout               replay of the rollout
  pr3      top-k of rho_hat      replay of the rollout               replay of the rollout
In the training engine rho weighs them, always. The rollout engine of pr3 is an ordinary MoE whose
router is W + 0.7 m W_p: there rho_hat picks and weighs; PPO's ratio, pi_theta / pi_old, leaves that
uncorrected (tis_cap can correct for it). The default, pr3, is what the paper's abstract describes,
pr2 what its main tables were run with: take pr2 where the engine's router is not yours to set.

A *deviation* is a replayed expert that today's router would not choose, for one token in one layer.
The *stale counterfactual* asks the same of the top-k of p_old.

Part I is the method. Part II is what it stands on: a transformer and a sampler. Part III is a task.
Paper: Dong et al., arXiv:2606.00395. What is not the paper's is marked "ours".
"""

import copy
import re
import zlib
from collections import defaultdict
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


# ========================================================================== Part I. The method
# -------------------------------------------------------------------- 1. Router and predictor
class Router(nn.Module):
    """Top-k router with its evolution predictor; both stay float32 in every engine."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, norm_topk_prob: bool):
        super().__init__()
        if top_k == 1 and norm_topk_prob:
            raise ValueError("a top-1 router with norm_topk_prob never learns: w / w is always 1")
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob  # the weights of the k experts sum to 1
        self.weight = nn.Parameter(torch.randn(num_experts, hidden_size) * hidden_size**-0.5)  # W
        self.predictor = nn.Parameter(torch.zeros(num_experts, hidden_size))  # W_p

    def forward(self, h, replay=None, horizon=None):
        """Which experts run, and how much each of them counts.

        h        (..., D) router inputs
        replay   (..., k) these experts run, whatever the horizon, or None
        horizon  m: choose by rho_hat; None: by rho
        Returns weights (..., k) float32, experts (..., k) int64, router logits p (..., N) float32.
        """
        h = h.float()
        p = F.linear(h, self.weight)
        if replay is not None:
            experts = replay.long()
        elif horizon is not None:
            experts = (p + horizon * self.change(h)).topk(self.top_k).indices
        else:
            experts = p.topk(self.top_k).indices
        # rho weighs the set, whoever picked it, so that the policy's loss reaches W but not W_p.
        if self.norm_topk_prob:
            weights = p.gather(-1, experts).softmax(-1)  # rho on the set, divided by its sum
        else:
            weights = p.softmax(-1).gather(-1, experts)
        return weights, experts, p

    def change(self, h: Tensor) -> Tensor:
        """b = h W_p, the predicted change of the router logits: (..., D) -> (..., N) float32."""
        return F.linear(h.float(), self.predictor)

    def folded(self, horizon: float) -> Tensor:
        """W + m W_p (N, D). Since p + m b = h (W + m W_p), an engine with this matrix as its router
        both chooses and weighs by rho_hat, and knows nothing of prediction."""
        return self.weight + horizon * self.predictor


def kl_divergence(target_logits: Tensor, logits: Tensor) -> Tensor:
    """KL( softmax(target_logits) || softmax(logits) ): (..., N) -> (...)."""
    target = target_logits.log_softmax(-1)
    return (target.exp() * (target - logits.log_softmax(-1))).sum(-1)


def predictor_loss(p_old: Tensor, m_b: Tensor, p: Tensor, matching: str) -> Tensor:
    """What W_p learns from: the routing distribution of today's router, p from today's h and W,
    against the one that today's W_p predicts from h_old. p_old, m_b and p are (L, n', N), of the n'
    tokens kept; returns the sum over layers and tokens. Gradients reach m_b = m h_old W_p alone.
    "post"   KL( rho_theta || softmax(p_old + m b) ), the paper's post-routing matching
    "delta"  KL( softmax(p - p_old) || softmax(m b) ), its ablation, delta matching
    """
    p = p.detach()
    if matching == "post":
        return kl_divergence(p, p_old + m_b).sum()
    return kl_divergence(p - p_old, m_b).sum()


# ---------------------------------------------------------------- 2. What the passes hand on
class Trace(NamedTuple):
    """What a forward pass saw at its routers; logits and inputs at the n positions asked for."""

    experts: Tensor  # (L, B, T, k) int16, the experts that ran, at all positions
    logits: Tensor  # (L, n, N) float32, router logits p
    inputs: Tensor  # (L, n, D) router inputs h; detached


class Rollout(NamedTuple):
    """B = Q * G sampled responses, prompt by prompt, with the routes that produced them."""

    tokens: Tensor  # (B, P + C) int64: left-padded prompt, response, padding
    pads: Tensor  # (B,) how many positions on the left are padding
    mask: Tensor  # (B, C) bool: True on the response, its end token included
    logprobs: Tensor  # (B, C) float32, log mu_old at the sampling temperature; 0 after the end
    experts: Tensor  # (L, B, P + C - 1, k) int16: no pass runs the last token; any set at padding
    ended: Tensor  # (B,) bool, False where the response was cut off


@dataclass
class MicroBatch:
    """R responses that are trained in one pass, cut after the longest, and what theta_old says of
    them. Logits at position j - 1 predict token j, those at P - 1 .. P + c - 2 the responses."""

    tokens: Tensor  # (R, P + c) int64
    pads: Tensor  # (R,)
    mask: Tensor  # (R, c) bool, True on the n response tokens
    at: Tensor  # (R, P + c - 1) bool, True on the n positions that predict them
    advantages: Tensor  # (R, 1)
    sampled_logprobs: Tensor  # (R, c) log mu_old
    sampled_experts: Tensor  # (L, n, k) those that ran in the rollout
    route: Tensor  # (L, R, P + c - 1, k) what the updates replay; grpo: only measured
    old_logprobs: Tensor | None = None  # (R, c) log pi_old
    stale: Tensor | None = None  # (L, n, k) top-k of p_old
    kept: Tensor | None = None  # (n,) bool, the n' tokens that train W_p
    p_old: Tensor | None = None  # (L, n', N)
    h_old: Tensor | None = None  # (L, n', D)


# --------------------------------------------------------------------------- 3. Settings
RECORDS = {  # method: who records the route that is replayed, and whether it is predicted
    "grpo": (None, False),
    "r2": ("training", False),  # the training engine, in its old pass
    "pr2": ("training", True),
    "r3": ("rollout", False),
    "pr3": ("rollout", True),
}


@dataclass
class RLConfig:
    """Settings of one RL step."""

    method: Literal[tuple(RECORDS)] = "pr3"  # the table of passes
    ratio: Literal["token", "sequence"] = "token"  # what PPO clips: GRPO's ratio, or GSPO's
    prediction: Literal["learned", "momentum"] = "learned"  # momentum is ours: section 7
    schedule: Literal["linear", "constant"] = "linear"  # of m; constant is the paper's m = 1
    shrink: float = 0.7  # share of m that a recording takes, if learned and linear (ours)
    matching: Literal["post", "delta"] = "post"  # what a learned predictor matches
    alpha: float = 0.1  # learning rate of the predictors W_p divided by the routers'
    feature_share: float = 1.0  # share of the tokens whose h_old is kept to train W_p
    tis_cap: float = 0.0  # tokens weigh min(pi_old / mu_old, this), truncated importance; 0: do not
    samples: int = 8  # G, responses to each prompt
    max_new_tokens: int = 16  # C, longest response
    temperature: float = 1.0  # of sampling; above 0 in training, 0 is greedy
    rollout_dtype: Literal["fp32", "bf16", "fp8"] = "fp32"  # precision of the rollout engine
    mini_steps: int = 2  # kappa, updates per rollout batch
    micro_batch: int = 0  # most responses in one training pass, 0 = a whole mini-step
    learning_rate: float = 2e-4  # of the policy
    router_multiplier: float = 1.0  # learning rate of the routers W divided by the policy's (ours)
    beta1: float = 0.98  # Adam's, not W_p's (ours): the closer to 1, the steadier is the drift
    max_grad_norm: float = 1.0  # of the policy, and of the predictors
    eos: tuple = (1,)  # ids that end a response
    pad: int = 0  # id of padding

    def __post_init__(self):
        for field in fields(self):
            choices = get_args(field.type)
            if choices and getattr(self, field.name) not in choices:
                raise ValueError(f"{field.name} must be one of {', '.join(choices)}")

    @property
    def recorder(self) -> str | None:
        return RECORDS[self.method][0]

    @property
    def predicts(self) -> bool:
        return RECORDS[self.method][1]

    @property
    def clip(self) -> tuple[float, float]:
        """How far a ratio may fall and rise before PPO cuts its gradient."""
        return (3e-4, 4e-4) if self.ratio == "sequence" else (0.2, 0.28)

    def horizon(self, i: int) -> float:
        """m for what is trained in mini-step i: by "linear" (ours) from 0 at i = 1, where no router
        has moved, to 1 for the last; by "constant" (the paper's) 1, at i = 1 too. Momentum
        (section 7) has a horizon of its own, whatever the schedule."""
        if self.prediction == "momentum":
            return float(sum(self.beta1**j for j in range(1, i)))
        if self.schedule == "constant":
            return 1.0
        return (i - 1) / max(1, self.mini_steps - 1)

    def recorded_horizon(self, engine: str, i: int) -> float | None:
        """m by which an engine, "rollout" or "training", records for mini-step i; times `shrink`,
        if learned and linear. None: it picks by rho."""
        if not self.predicts or self.recorder != engine:
            return None
        shrinks = self.prediction == "learned" and self.schedule == "linear"
        return self.horizon(i) * (self.shrink if shrinks else 1.0)


def make_optimizer(model: "MoETransformer", config: RLConfig) -> torch.optim.AdamW:
    """AdamW with a group each for the policy, its routers W and the predictors W_p. A parameter
    that is added to Router joins W's, or W_p's if its name starts with "predictor". The predictors
    have beta1 0.2 (ours): with none their steps are noisy, with much of it W_p lags behind."""
    policy = {"params": [], "lr": config.learning_rate}
    routers = {"params": [], "lr": config.learning_rate * config.router_multiplier}
    predictors = {"params": [], "lr": routers["lr"] * config.alpha, "betas": (0.2, 0.999)}
    for name, parameter in model.named_parameters():
        if ".router.predictor" in name:
            predictors["params"].append(parameter)
        elif ".router." in name:
            routers["params"].append(parameter)
        else:
            policy["params"].append(parameter)
    groups = [policy, routers, predictors]
    return torch.optim.AdamW(groups, betas=(config.beta1, 0.999), weight_decay=0, fused=True)


# ----------------------------------------------------------------------------- 4. One RL step
def rl_step(model, engine, optimizer, config, prompts, pads, reward, generator=None) -> dict:
    """One rollout batch: samples it, then trains on it in kappa mini-steps. Returns metrics.

    engine     a RolloutEngine, or any object with its `load` and `sample`
    prompts    (Q, P) int64, left-padded; pads (Q,) how many positions of each are padding
    reward     a function from the Rollout to (Q * G,) floats
    Under torch.distributed (folder scale/) each process has Q prompts; the metrics are of all.
    A metric "name/i" belongs to mini-step i; section 6 says what they mean.
    """
    Q = len(prompts)
    G = config.samples
    kappa = config.mini_steps
    if Q % kappa != 0:
        raise ValueError(f"{Q} prompts do not divide into {kappa} mini-steps of equal size")
    check_prompts(prompts, pads, config.pad)

    # Phase 1. Rollout: G responses to each prompt, and the experts of each token.
    if config.predicts and config.prediction == "momentum":
        predict_by_momentum(model, optimizer)
    rollout = roll_out(model, engine, config, prompts, pads, generator)

    # Phase 2. Rewards and advantages.
    rewards = checked_rewards(reward(rollout), Q, G).to(prompts.device)
    advantages = group_advantages(rewards).flatten()

    # Phase 3. Old pass, on the very micro-batches of the updates: with the same weights, experts
    # and arithmetic, pi_theta / pi_old is exactly 1 at mini-step 1.
    mini_batches = []
    for i, rows in enumerate(torch.arange(Q * G).chunk(kappa), start=1):
        mini_batches.append([])
        for part in rows.split(config.micro_batch or len(rows)):
            batch = old_pass(model, config, rollout, advantages, part, i, generator)
            mini_batches[-1].append(batch)
    all_batches = [batch for micro_batches in mini_batches for batch in micro_batches]
    metrics = measure_rollout(rollout, rewards, all_batches)

    # Phase 4. kappa updates.
    for i, micro_batches in enumerate(mini_batches, start=1):
        optimizer.zero_grad()
        # Counts of the whole mini-step, averaged over processes (scale/) as gradients are: so a
        # loss is the mean over all tokens.
        n_tokens = over_processes(sum(batch.mask.sum() for batch in micro_batches))
        n_kept = over_processes(sum(batch.kept.sum() for batch in micro_batches)).clamp(min=1)
        sums = defaultdict(float)
        largest = []
        for batch in micro_batches:
            # The recorded experts run, if any are, weighed by today's rho. W_p has no part in this.
            replay = replay_of(batch, config, updates=True)
            logprobs, trace = response_logprobs(model, batch, config, replay=replay)
            log_ratio = logprobs - batch.old_logprobs
            loss = policy_loss(log_ratio, batch, config, n_tokens, n_sequences=Q * G // kappa)
            sums["loss"] += loss.detach()

            # old_pass keeps h_old for pr2 and pr3, if W_p is learned, and for i > 1 only: at i = 1,
            # where p still is p_old, m = 0 gives no gradient, and m = 1 would say "no change".
            if batch.h_old is not None:
                layers = zip(model.routers, batch.h_old, strict=True)
                b = torch.stack([router.change(h_old) for router, h_old in layers])
                p = trace.logits[:, batch.kept]
                missed = predictor_loss(batch.p_old, config.horizon(i) * b, p, config.matching)
                sums["predictor_loss"] += missed.detach() / n_kept
                loss = loss + missed / n_kept  # reaches W_p alone, and alpha sets how fast
            loss.backward()
            for name, value in measure(model, log_ratio, batch, trace, config).items():
                sums[name] += value / (n_kept if name == "ideal_agreement" else n_tokens)
            largest.append(log_ratio.detach().abs().max())
        sums["log_ratio_max"] = over_processes(torch.stack(largest).max(), largest=True)
        sums.update(update(optimizer, config))
        for name, value in sums.items():
            metrics[f"{name}/{i}"] = value
    values = torch.stack([value.to(prompts.device, torch.float32) for value in metrics.values()])
    return dict(zip(metrics, over_processes(values).tolist(), strict=True))


def roll_out(model, engine, config: RLConfig, prompts, pads, generator) -> Rollout:
    """Samples from the engine, with today's weights. Under pr3 its router is W + 0.7 m W_p, with m
    of the mini-step that will train the prompt. Where it differs between mini-steps each one's
    prompts are sampled in a call of their own, a wave; otherwise one call samples all."""
    horizons = [config.recorded_horizon("rollout", i) for i in range(1, config.mini_steps + 1)]
    if len(set(horizons)) == 1 or not any(router.predictor.any() for router in model.routers):
        horizons = horizons[:1]
    waves = []
    shares = zip(horizons, prompts.chunk(len(horizons)), pads.chunk(len(horizons)), strict=True)
    for horizon, some_prompts, some_pads in shares:
        engine.load(model, horizon, routers_only=len(waves) > 0)  # waves differ in routers only
        waves.append(engine.sample(some_prompts, some_pads, generator))
    return join(waves)


def join(rollouts: list[Rollout]) -> Rollout:
    """One rollout of several whose prompts are equally long, in their order."""
    joined = {}
    for name in Rollout._fields:
        parts = [getattr(rollout, name) for rollout in rollouts]
        joined[name] = torch.cat(parts, dim=1 if name == "experts" else 0)
    return Rollout(**joined)


@torch.no_grad()
def old_pass(model, config: RLConfig, rollout: Rollout, advantages, rows, i: int, generator):
    """The training engine's view, before any update, of R rows of the rollout, a micro-batch that
    mini-step i will train: the middle column of the table of passes."""
    P = rollout.tokens.shape[1] - rollout.mask.shape[1]
    c = int(rollout.mask[rows].sum(1).max())
    mask = rollout.mask[rows, :c]
    at = F.pad(mask, (P - 1, 0))
    route = rollout.experts[:, rows, : P + c - 1]
    batch = MicroBatch(
        tokens=rollout.tokens[rows, : P + c],
        pads=rollout.pads[rows],
        mask=mask,
        at=at,
        advantages=advantages[rows, None],
        sampled_logprobs=rollout.logprobs[rows, :c],
        sampled_experts=route[:, at],
        route=route,  # the rollout's; of r2 and pr2 replaced below by what the old pass ran
    )
    replay = replay_of(batch, config, updates=False)
    m = config.recorded_horizon("training", i)
    batch.old_logprobs, trace = response_logprobs(model, batch, config, replay=replay, horizon=m)
    if config.recorder == "training":
        batch.route = trace.experts
    batch.stale = trace.logits.topk(route.shape[-1]).indices.short()  # by rho, in any method
    # The features that W_p will learn from. For each token h_old has L x D numbers, by far the most
    # that PR2 keeps: 200 kB in bfloat16 at L = 48, D = 2048. All methods draw, so pr2 can equal r2.
    draws = torch.rand(int(mask.sum()), generator=generator, device=mask.device)
    batch.kept = draws < config.feature_share
    if config.predicts and config.prediction == "learned" and i > 1:
        batch.p_old = trace.logits[:, batch.kept]
        batch.h_old = trace.inputs[:, batch.kept]
    return batch


def replay_of(batch: MicroBatch, config: RLConfig, updates: bool) -> Tensor | None:
    """The route that the old pass or an update replays, or None where its routers choose: see the
    table of passes. To replay a part, change this and Router.forward. Old pass and updates must run
    one route, else "log_ratio_max/1" > 0 (with fp8 rollouts; in fp32 the choice is the same). Not
    in pr2, whose old pass would choose the free part by rho_hat, which m = 0 hides at i = 1."""
    records = config.recorder == "training" and not updates  # what the updates will replay
    return None if records or config.recorder is None else batch.route


def response_logprobs(model, batch: MicroBatch, config, **forward) -> tuple[Tensor, Trace]:
    """log pi (R, c) of the response tokens at the sampling temperature, 0 elsewhere, and the Trace
    at them. `forward`: further arguments of MoETransformer.forward."""
    logits, trace = model(batch.tokens[:, :-1], batch.pads, at=batch.at, **forward)
    targets = batch.tokens[:, 1:][batch.at]
    found = -F.cross_entropy(logits.float() / config.temperature, targets, reduction="none")
    return torch.zeros_like(batch.mask, dtype=found.dtype).masked_scatter(batch.mask, found), trace


def update(optimizer, config: RLConfig) -> dict[str, Tensor]:
    """Clips and updates, or skips all of it if any gradient is not finite (ours). Policy and
    predictors are clipped apart (ours), lest a wild prediction slow the policy down."""
    policy, routers, predictors = [group["params"] for group in optimizer.param_groups]
    norm = torch.hypot(gradient_norm(policy), gradient_norm(routers))  # of both together
    predictor_norm = gradient_norm(predictors)
    for parameters, total in ((policy, norm), (routers, norm), (predictors, predictor_norm)):
        nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, total)
    finite = (norm + predictor_norm).isfinite()
    if finite:
        optimizer.step()
    return {"grad_norm": norm, "skipped": ~finite}


def gradient_norm(parameters: list[Tensor]) -> Tensor:
    """The norm of all gradients together, as a plain tensor, even of a sharded model (scale/)."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return torch.tensor(float(norm))


def over_processes(values: Tensor, largest: bool = False) -> Tensor:
    """The mean, or the largest, of what all processes that train together (scale/) hold."""
    if not dist.is_initialized():
        return values
    values = values.to(torch.float32, copy=True)
    dist.all_reduce(values, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return values if largest else values / dist.get_world_size()


# --------------------------------------------------------------------- 5. The policy's loss
def group_advantages(rewards: Tensor) -> Tensor:
    """GRPO: (Q, G) rewards -> (Q, G), (r - mean) / (unbiased std + 1e-6) over each prompt's group.
    A group whose rewards are all equal, or of one response, teaches nothing: 0."""
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
    """GSPO: (R, c) -> (R, 1), the log of (pi_theta(y) / pi_old(y)) ^ (1 / |y|)."""
    return (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)


def policy_loss(log_ratio, batch: MicroBatch, config, n_tokens, n_sequences: int) -> Tensor:
    """This micro-batch's part of the mini-step's loss, a mean over all tokens of the mini-step or,
    by GSPO, over all sequences of each one's mean over tokens. No KL penalty, no load balancing."""
    weights = batch.mask / n_tokens
    if config.ratio == "sequence":
        log_ratio = sequence_log_ratio(log_ratio, batch.mask)
        weights = batch.mask / batch.mask.sum(1, keepdim=True) / n_sequences
    if config.tis_cap:  # mu_old sampled these tokens, and not pi_old
        importance = bounded_exp(batch.old_logprobs - batch.sampled_logprobs)
        weights = weights * importance.clamp(max=config.tis_cap)
    return (ppo_loss(log_ratio, batch.advantages, *config.clip) * weights).sum()


# --------------------------------------------------------------------------- 6. What is measured
# Nothing here affects training. `measure` returns means over layers, summed over tokens; rl_step
# divides by how many they are and adds losses, log_ratio_max (absolute), grad_norm and skipped.
def overlap(route: Tensor, other: Tensor) -> Tensor:
    """(..., k), (..., k) -> (...), how many experts two sets have in common, in any order."""
    return (route.unsqueeze(-1) == other.unsqueeze(-2)).sum((-1, -2))


@torch.no_grad()
def measure(model, log_ratio, batch: MicroBatch, trace: Trace, config) -> dict[str, Tensor]:
    """How far the routers have moved from the recorded and from the stale route, and how far the
    policy has moved. For grpo, which replays nothing, the recorded route is the rollout's."""
    k = batch.stale.shape[-1]
    current = trace.logits.topk(k).indices
    recorded = batch.route[:, batch.at].long()
    same = overlap(recorded, current)
    stale_same = overlap(batch.stale, current)
    by_layer = {
        "agreement": same / k,  # slots without deviation; a token has k slots in a layer
        "no_deviation": same == k,  # sets without deviation
        "one_deviation": same == k - 1,
        "stale_agreement": stale_same / k,  # the same of the top-k of p_old
        "stale_no_deviation": stale_same == k,
        # The probability that the current router gives to experts outside of the recorded set.
        "coverage_gap": 1 - trace.logits.softmax(-1).gather(-1, recorded).sum(-1),
    }
    sums = {name: values.float().mean(0).sum() for name, values in by_layer.items()}
    if batch.h_old is not None:
        # What a W_p that knew the drift of W would predict: the top-k of h_old W with today's W,
        # for the kept tokens. It misses where inputs have moved, which W_p itself can learn.
        layers = zip(model.routers, batch.h_old, strict=True)
        ideal = torch.stack([router(h_old)[1] for router, h_old in layers])
        sums["ideal_agreement"] = (overlap(ideal, current[:, batch.kept]) / k).mean(0).sum()
    # KL(pi_old || pi_theta), estimated from the sampled tokens by r - 1 - log r.
    sums["approx_kl"] = (bounded_exp(log_ratio) - 1 - log_ratio).sum()
    if config.ratio == "sequence":
        log_ratio = sequence_log_ratio(log_ratio, batch.mask)
    low, high = config.clip
    ratio = bounded_exp(log_ratio)
    fell = (ratio < 1 - low) & (batch.advantages < 0)
    rose = (ratio > 1 + high) & (batch.advantages > 0)
    sums["clipfrac"] = ((fell | rose) & batch.mask).sum()  # tokens whose gradient the clip removes
    return sums


@torch.no_grad()
def measure_rollout(rollout: Rollout, rewards: Tensor, micro_batches) -> dict[str, Tensor]:
    """Means over rewards (Q, G) and responses. And per token, before any update: the gap between
    the engines' log-probabilities, and whether the set that ran in the rollout differs from the
    top-k of p_old. The engines differ by rounding; under pr3 also because the rollout's router
    holds W_p, and under pr2 because predicted experts ran in the old pass, which moves h."""
    sums = defaultdict(float)
    for batch in micro_batches:
        gap = batch.sampled_logprobs - batch.old_logprobs
        differs = overlap(batch.sampled_experts, batch.stale) < batch.stale.shape[-1]
        sums["mismatch_logprob"] += gap.abs().sum()
        sums["mismatch_route"] += differs.float().mean(0).sum()
        sums["entropy"] -= batch.old_logprobs.sum()  # estimated, in nats
    tokens = over_processes(rollout.mask.sum())
    metrics = {name: value / tokens for name, value in sums.items()}
    metrics["reward"] = rewards.mean()
    equal = (rewards == rewards[:, :1]).all(1)
    metrics["zero_variance"] = equal.float().mean()  # groups that teach nothing
    metrics["truncated"] = (~rollout.ended).float().mean()  # responses that never ended
    metrics["response_length"] = rollout.mask.sum(1).float().mean()
    return metrics


# ------------------------------------------------ 7. Ours: a predictor that reads Adam's momentum
@torch.no_grad()
def predict_by_momentum(model: "MoETransformer", optimizer: torch.optim.AdamW) -> None:
    """Sets W_p of every router to Adam's last step of its W. If later gradients were zero on
    average, the j-th next update would move W by about beta1^j times that. So nothing has to be
    learned: the horizon of mini-step i is beta1 + ... + beta1^(i-1)."""
    group = optimizer.param_groups[1]  # the routers'
    beta1, beta2 = group["betas"]
    for router in model.routers:
        state = optimizer.state.get(router.weight)
        if state:  # there is none before the first step, or (scale/) one of step 0
            step = state["step"].clamp(min=1)
            mean = state["exp_avg"] / (1 - beta1**step)
            variance = state["exp_avg_sq"] / (1 - beta2**step)
            router.predictor.copy_(-group["lr"] * mean / (variance.sqrt() + group["eps"]))


# ================================================================== Part II. What it stands on
# --------------------------------------------------------------- 8. A small MoE transformer
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

    def __post_init__(self):
        if self.hidden_size % 8 != 0 or self.moe_intermediate_size % 8 != 0:
            raise ValueError("hidden_size, moe_intermediate_size: grouped_mm needs multiples of 8")


class MoE(nn.Module):
    """A router and N SwiGLU experts, stored stacked and computed by grouped matrix products."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        N = config.num_experts
        D = config.hidden_size
        width = config.moe_intermediate_size
        self.router = Router(D, N, config.num_experts_per_tok, config.norm_topk_prob)
        self.gate_up = nn.Parameter(torch.randn(N, 2 * width, D) * D**-0.5)
        self.down = nn.Parameter(torch.randn(N, D, width) * width**-0.5)

    def forward(self, h, replay, horizon):
        """(B, T, D) -> output (B, T, D), experts (B, T, k) int16, router logits (B, T, N)."""
        weights, experts, p = self.router(h, replay, horizon)
        # A row for each slot (token, expert), sorted by expert; expert e's rows end at ends[e].
        sorted_experts, order = experts.flatten().sort()
        each_expert = torch.arange(len(self.down), device=h.device)
        ends = torch.searchsorted(sorted_experts, each_expert, right=True, out_int32=True)
        rows = h.flatten(0, 1).index_select(0, order // experts.shape[-1])
        gate, up = F.grouped_mm(rows, self.gate_up.mT, offs=ends).chunk(2, dim=-1)
        rows = F.grouped_mm(F.silu(gate) * up, self.down.mT, offs=ends)
        # Back to the order of the tokens, and the weighted sum over the k experts of each.
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=h.device)  # where each slot's row is
        outputs = rows.index_select(0, place).view(*experts.shape, -1)
        output = (outputs * weights.to(h.dtype).unsqueeze(-1)).sum(-2)
        return output, experts.to(torch.int16), p


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions: turns each pair (j, j + head_dim / 2) of x (B, T, heads, head_dim) by one
    angle, so cosine and sine (1 or B, T, 1, head_dim) hold it twice."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and query-key norm."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        D = config.hidden_size
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(D, query_size, bias=False)
        self.k_proj = nn.Linear(D, key_size, bias=False)
        self.v_proj = nn.Linear(D, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, D, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, cosine, sine, mask, cache, start):
        """(B, T, D) -> (B, T, D). mask (B, 1, T, positions) bool, or None = plain causal."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, heads, head_dim)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q = rotate(self.q_norm(q), cosine, sine).transpose(1, 2)  # (B, heads, T, head_dim)
        k = rotate(self.k_norm(k), cosine, sine).transpose(1, 2)
        if cache is not None and start == 0:
            cache[self.layer] = torch.stack([k, v])
        elif cache is not None:
            # In place: FSDP2 (scale/) passes a copy of the dict, but the caller's tensors.
            cache[self.layer].narrow(-2, start, x.shape[1]).copy_(torch.stack([k, v]))
            k, v = cache[self.layer][..., : start + x.shape[1], :]
        causal = mask is None and x.shape[1] > 1  # a single new query sees all there is
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.moe_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.moe = MoE(config)

    def forward(self, x, cosine, sine, mask, cache, start, replay, horizon):
        x = x + self.attention(self.attention_norm(x), cosine, sine, mask, cache, start)
        h = self.moe_norm(x)
        output, experts, p = self.moe(h, replay, horizon)
        return x + output, experts, p, h.detach()


class MoETransformer(nn.Module):
    """Decoder-only MoE transformer, Qwen3-MoE's. The route is an argument and a result, never a
    mode (ours; production code keeps global switches): given replay=trace.experts and else the same
    arguments, forward repeats bit for bit the pass that returned the trace."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in layers)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def routers(self) -> list[Router]:
        return [block.moe.router for block in self.blocks]

    def forward(self, tokens, pads=None, cache=None, start=0, replay=None, horizon=None, at=...):
        """Next-token logits (n, vocab_size), and the Trace of what the routers saw.

        tokens   (B, T) int64, padded on the left or the right
        pads     (B,) how many positions on the left of each row are padding, or None
        cache    keys and values by layer, (2, B, key-value heads, positions, head_dim): a prompt
                 fills {}; the caller makes room behind it for new tokens, one at a time
        start    how many positions, all in the cache, precede `tokens`; 0 for a prompt
        replay   (L, B, T, k) expert ids, distinct in a set: these experts run
        horizon  m: experts are chosen by rho_hat, and weighed by rho; None: chosen by rho too
        at       an index into (B, T) of the n positions whose logits are wanted; by default `...`,
                 all of them, and then n reads (B, T)
        """
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        mask = None
        if pads is not None and pads.any():
            # No position attends to left padding, except that such a position attends to itself: a
            # softmax over nothing is NaN. The first real token of every row is at position 0.
            column = torch.arange(start + tokens.shape[1], device=tokens.device)
            row = positions[:, :, None]
            past = (column <= row) & (column >= pads[:, None, None])
            mask = (past | (column == row))[:, None]
            positions = (positions - pads[:, None]).clamp(min=0)
        pair = torch.arange(0, self.config.head_dim, 2, device=tokens.device)
        frequency = 1 / self.config.rope_theta ** (pair / self.config.head_dim)
        angle = positions[:, :, None, None] * frequency.repeat(2)  # (1 or B, T, 1, head_dim)

        x = self.embed(tokens)
        cosine = angle.cos().to(x.dtype)
        sine = angle.sin().to(x.dtype)
        layers = []
        for layer, block in enumerate(self.blocks):
            route = None if replay is None else replay[layer]
            x, chosen, p, h = block(x, cosine, sine, mask, cache, start, route, horizon)
            layers.append((chosen, p[at], h[at]))
        experts, logits, inputs = zip(*layers, strict=True)
        trace = Trace(torch.stack(experts), torch.stack(logits), torch.stack(inputs))
        return self.lm_head(self.norm(x)[at]), trace


# ----------------------------------------------------- 9. Sampling, and what rl_step refuses
@torch.no_grad()
def generate(model, config: RLConfig, prompts, pads, generator=None) -> Rollout:
    """Samples G responses to each prompt (Q, P) with a KV cache, and records the routes of all but
    the last token. At temperature 0 it is greedy, with log-probabilities at temperature 1."""
    G = config.samples
    C = config.max_new_tokens
    last = (slice(None), -1)  # the last position of every row
    # A prompt is computed once for all its samples.
    cache = {}
    logits, trace = model(prompts, pads, cache, at=last)
    logits = logits.repeat_interleave(G, dim=0)
    pads = pads.repeat_interleave(G)
    for layer, kept in cache.items():
        cache[layer] = F.pad(kept, (0, 0, 0, C)).repeat_interleave(G, dim=1)  # room for responses
    tokens = F.pad(prompts.repeat_interleave(G, dim=0), (0, C), value=config.pad)
    B, length = tokens.shape
    P = length - C
    mask = torch.zeros(B, C, dtype=torch.bool, device=tokens.device)
    logprobs = torch.zeros(B, C, device=tokens.device)
    experts = trace.experts[:, :1, :1].repeat(1, B, length - 1, 1)  # a valid set, to be filled
    experts[:, :, :P] = trace.experts.repeat_interleave(G, dim=1)
    ended = torch.zeros(B, dtype=torch.bool, device=tokens.device)
    end_tokens = torch.tensor(config.eos, device=tokens.device)
    for column in range(C):
        log_p = (logits.float() / (config.temperature or 1.0)).log_softmax(-1)
        if config.temperature == 0:
            token = log_p.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(log_p.exp(), 1, generator=generator)
        # A response that has ended goes on with padding, until the last of all has ended, in all
        # processes: those that share a sharded engine (scale/) must keep step.
        token = token.masked_fill(ended[:, None], config.pad)
        tokens[:, P + column] = token[:, 0]
        mask[:, column] = ~ended
        logprobs[:, column] = log_p.gather(-1, token)[:, 0].masked_fill(ended, 0.0)
        ended = ended | torch.isin(token[:, 0], end_tokens)
        if column == C - 1 or over_processes((~ended).sum()) == 0:
            break
        logits, trace = model(token, pads, cache, start=P + column, at=last)
        experts[:, :, P + column] = trace.experts[:, :, 0]
    return Rollout(tokens, pads, mask, logprobs, experts, ended)


class RolloutEngine:
    """A second model for rollouts, in a precision of its own: "fp32"; "bf16"; or "fp8", which is
    bf16 with the weights of experts and projections rounded to float8 first. Routers are always
    float32. Anything with these two methods may stand in for it."""

    def __init__(self, model: MoETransformer, config: RLConfig):
        self.config = config
        self.model = copy.deepcopy(model).requires_grad_(False)
        if config.rollout_dtype != "fp32":
            self.model.to(torch.bfloat16)
        for router in self.model.routers:
            router.float()

    @torch.no_grad()
    def load(self, model, horizon: float | None, routers_only: bool = False) -> None:
        """Takes the policy's weights, rounded to this engine's precision; as routers W + m W_p or,
        without a horizon, W. routers_only: it has taken all else for an earlier wave."""
        targets = self.model.parameters()
        for (name, source), target in zip(model.named_parameters(), targets, strict=True):
            if routers_only and ".router." not in name:
                continue
            if self.config.rollout_dtype == "fp8" and re.search(r"_proj|gate_up|down", name):
                # A scale for each row; 448 is the largest float8_e4m3.
                scale = source.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
                source = (source / scale).to(torch.float8_e4m3fn).to(source.dtype) * scale
            target.copy_(source)
        if horizon is not None:
            for router, target in zip(model.routers, self.model.routers, strict=True):
                target.weight.copy_(router.folded(horizon))

    def sample(self, prompts: Tensor, pads: Tensor, generator=None) -> Rollout:
        return generate(self.model, self.config, prompts, pads, generator)


def check_prompts(prompts: Tensor, pads: Tensor, pad: int) -> None:
    """ValueError for wrong pads. So that it can tell, no prompt itself starts or ends with pad."""
    leading = (prompts == pad).int().cumprod(1).sum(1)  # ids of padding before the first other one
    if pads.dtype != torch.int64 or not torch.equal(pads, leading) or (prompts[:, -1] == pad).any():
        expected = f"{leading.tolist()}, how often each prompt starts with pad id {pad}"
        given = f"{pads.tolist()}, {pads.dtype}"
        raise ValueError(f"pads are {given}; expected int64 {expected}, and none to end with it")


def checked_rewards(rewards, Q: int, G: int) -> Tensor:
    """What a reward function returned, as (Q, G) float32; ValueError if it cannot be that."""
    shape = tuple(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
    if shape not in ((Q * G,), (Q, G)) or not rewards.isfinite().all():
        expected = f"a tensor of {Q} x {G} finite floats, prompt by prompt"
        raise ValueError(f"the reward returned {shape}, {rewards}; expected {expected}")
    return rewards.detach().float().view(Q, G)


# ========================================================================= Part III. A toy task
class AdditionTask:
    """Chain-of-thought addition: the prompt "7+5+9=" is answered by its running sums, "12,21.".
    A checksum of the text sets an eighth of the prompts aside; they are never trained on.

    rl_step needs no task, only prompts, pads and a reward. train_toy.py, a loop around it, takes
    any task that has what it uses of this one: vocab_size, pad, eos, the two lengths, and
        problems(count, generator, held_out=False)  hashable objects; str() of one is shown
        prompts(problems)                           (Q, P) ids, padded on the left, and pads (Q,)
        solutions(problems, slip, generator)        (Q, response_length) ids, for the warm-up
        rewards(problems, rollout), decode(ids)     (Q * G,) floats, prompt by prompt; texts"""

    characters = "_.,+=0123456789"  # one character, one token; "_" pads and "." ends
    vocab_size = len(characters)
    pad = 0
    eos = (1,)

    def __init__(self, operands: int = 3, largest: int = 9):
        self.operands = operands
        self.largest = largest
        self.prompt_length = operands * (len(str(largest)) + 1)
        self.response_length = (operands - 1) * (len(str(operands * (largest + 1))) + 1)

    def encode(self, texts: list[str]) -> Tensor:
        return torch.tensor([[self.characters.index(c) for c in text] for text in texts])

    def decode(self, ids: Tensor) -> list[str]:
        """(B, T) ids -> texts without the padding on the right."""
        return ["".join(self.characters[i] for i in row).rstrip("_") for row in ids.tolist()]

    def problems(self, count: int, generator: torch.Generator, held_out: bool = False) -> list[str]:
        """`count` problems of the training or the held-out part; ValueError if they are rare."""
        found: list[str] = []
        for _ in range(1000 + 100 * count):
            numbers = torch.randint(self.largest + 1, (self.operands,), generator=generator)
            text = "+".join(map(str, numbers.tolist())) + "="
            if (zlib.crc32(text.encode()) % 8 == 0) == held_out:
                found.append(text)
            if len(found) == count:
                return found
        raise ValueError(f"hardly any problem of the task has held_out={held_out}")

    def prompts(self, problems: list[str]) -> tuple[Tensor, Tensor]:
        """(Q, prompt_length) int64 ids, padded on the left, and (Q,) by how much."""
        tokens = self.encode([problem.rjust(self.prompt_length, "_") for problem in problems])
        return tokens, (tokens == self.pad).sum(1)

    def solutions(self, problems: list[str], slip: float, generator: torch.Generator) -> Tensor:
        """Worked solutions (Q, response_length); each sum is off by one with probability `slip`."""
        texts = []
        for problem in problems:
            total, *others = map(int, problem.rstrip("=").split("+"))
            sums = []
            draws = torch.rand(len(others), 2, generator=generator).tolist()
            for number, (slips, sign) in zip(others, draws, strict=True):
                total += number
                if slips < slip:
                    total = max(0, total + (1 if sign < 0.5 else -1))
                sums.append(str(total))
            texts.append((",".join(sums) + ".").ljust(self.response_length, "_"))
        return self.encode(texts)

    def rewards(self, problems: list[str], rollout: Rollout) -> Tensor:
        """(Q * G,) 1.0 for "12,21." to "7+5+9=", a right answer after well-formed sums; else 0."""
        well_formed = re.compile(rf"(?:\d+,){{{self.operands - 2}}}(\d+)\.")
        responses = self.decode(rollout.tokens[:, self.prompt_length :])
        samples = len(responses) // len(problems)
        rewards = []
        for row, response in enumerate(responses):
            match = well_formed.fullmatch(response)
            answer = sum(map(int, problems[row // samples].rstrip("=").split("+")))
            rewards.append(1.0 if match and int(match[1]) == answer else 0.0)
        return torch.tensor(rewards)
