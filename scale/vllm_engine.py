"""vLLM as the rollout engine, in this process; of several processes each has an engine of its own.
The weights go into the running engine before each rollout batch, under pr3 with W + m W_p as the
routers, so that what vLLM takes for its own top-k is the predicted set. vLLM would round routers to
its own dtype, and has no setting against that: in the 8 bits of bfloat16 W + m W_p may be W again.
So they are replaced by float32 ones, and it is checked that they are. Run with vLLM 0.30."""

import importlib
import os

import torch
from torch import Tensor

from pr2_mini import ModelConfig, Rollout
from scale.checkpoints import CheckpointError, hf_weights
from scale.processes import PROCESSES

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # no process of its own
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
import vllm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.platforms import current_platform

MIXTRAL_NAMES = {"mlp": "block_sparse_moe", "gate_up_proj": "w13", "down_proj": "w2"}


def float32_router(*arguments, **settings) -> ReplicatedLinear:
    """Stands in for the layer that vLLM's models have as routers."""
    settings["params_dtype"] = torch.float32
    router = ReplicatedLinear(*arguments, **settings)
    router.register_forward_pre_hook(lambda router, inputs: inputs[0].float())
    return router


def router_dtypes(model) -> list[torch.dtype | None]:
    """Of the weights of all routers of a vLLM model, or where it has packed those away, as on CPUs,
    what they were to be."""
    gates = [module for name, module in model.named_modules() if name.endswith(".gate")]
    return [
        gate.weight.dtype if gate.weight.numel() else getattr(gate, "params_dtype", None)
        for gate in gates
    ]


def drop_packed_experts(model) -> None:
    """On CPUs vLLM 0.30 packs the experts when they are loaded; unless it is told so, it goes on
    with the old ones after an update."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


class VLLMEngine:
    """Stands in for pr2_mini.RolloutEngine. kind: transformers' model_type; longest: most tokens of
    a prompt and its response. CheckpointError if vLLM would compute something else."""

    def __init__(self, kind: str, config: ModelConfig, settings, longest: int):
        if kind == "olmoe" and (config.rms_norm_eps != 1e-5 or config.norm_topk_prob):
            raise CheckpointError(
                "vLLM runs OLMoE with rms_norm_eps 1e-5 and norm_topk_prob false only"
            )
        self.names = MIXTRAL_NAMES if kind == "mixtral" else {}
        self.config = config
        self.rl = settings
        self.sampling = {
            "n": settings.samples,
            "temperature": settings.temperature,
            "max_tokens": settings.max_new_tokens,
            "logprobs": 0,  # of the sampled token alone
            "ignore_eos": True,  # all of them are here:
            "stop_token_ids": list(settings.eos),
        }
        models = importlib.import_module(f"vllm.model_executor.models.{kind}")
        models.ReplicatedLinear = float32_router
        dtype = torch.bfloat16 if settings.rollout_dtype == "bf16" else torch.float32
        # Keys and values of all responses, in blocks of up to 128 tokens, but 4 GB at most.
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        responses = settings.prompts // PROCESSES * settings.samples + 1
        memory = responses * (longest + 128) * token * dtype.itemsize
        self.llm = vllm.LLM(
            settings.checkpoint,
            load_format="dummy",  # the weights come from the policy
            dtype=dtype,
            skip_tokenizer_init=True,
            generation_config="vllm",  # no sampling defaults of the checkpoint
            logprobs_mode="processed_logprobs",  # at the sampling temperature
            enable_return_routed_experts=True,
            enforce_eager=True,
            enable_chunked_prefill=False,  # on CPUs a prompt in parts ends seeded sampling
            max_model_len=longest,
            kv_cache_memory_bytes=min(memory, 2**32),
            distributed_executor_backend="external_launcher" if PROCESSES > 1 else None,
        )
        found = self.llm.apply_model(router_dtypes)[0]
        if found != [torch.float32] * config.num_hidden_layers:
            raise CheckpointError(
                f"vLLM {vllm.__version__} keeps its routers in {found} and would round predictions"
                " away; take vLLM 0.30, --rollout-dtype fp32 or --engine built-in"
            )

    @torch.no_grad()
    def load(self, model, horizon: float | None, routers_only: bool = False) -> None:
        """Takes the weights of the policy, and W + m W_p as its routers; routers_only: it has taken
        the others for an earlier wave."""
        if not routers_only and current_platform.is_cpu():
            self.llm.apply_model(drop_packed_experts)
        weights = (
            (".".join(self.names.get(word, word) for word in name.split(".")), weight)
            for name, weight in hf_weights(model, horizon, routers_only)
        )
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()  # keys, values and routes of older weights

    @torch.no_grad()
    def sample(self, prompts: Tensor, pads: Tensor, generator=None) -> Rollout:
        """G responses to each prompt with their routes: as pr2_mini.generate."""
        rl = self.rl
        Q, P = prompts.shape
        B = Q * rl.samples
        C = rl.max_new_tokens
        device = prompts.device
        requests = [{"prompt_token_ids": prompts[row, pads[row] :].tolist()} for row in range(Q)]
        seeds = torch.randint(2**31, (Q,), generator=generator, device=device).tolist()
        sampling = [vllm.SamplingParams(seed=seed, **self.sampling) for seed in seeds]
        results = self.llm.generate(requests, sampling, use_tqdm=False)
        outputs = [output for result in results for output in result.outputs]
        pads = pads.repeat_interleave(rl.samples)
        tokens = torch.full((B, P + C), rl.pad, device=device)
        tokens[:, :P] = prompts.repeat_interleave(rl.samples, dim=0)
        mask = torch.zeros(B, C, dtype=torch.bool, device=device)
        logprobs = torch.zeros(B, C, device=device)
        any_set = torch.arange(self.config.num_experts_per_tok, dtype=torch.int16, device=device)
        experts = any_set.repeat(self.config.num_hidden_layers, B, P + C - 1, 1)
        for row, output in enumerate(outputs):
            length = len(output.token_ids)
            tokens[row, P : P + length] = torch.tensor(output.token_ids)
            mask[row, :length] = True
            steps = zip(output.logprobs, output.token_ids, strict=True)
            logprobs[row, :length] = torch.tensor([step[token].logprob for step, token in steps])
            route = torch.from_numpy(output.routed_experts.astype("int16"))  # (tokens - 1, L, k)
            experts[:, row, pads[row] : P + length - 1] = route.transpose(0, 1)
        if (experts.sort(-1).values.diff(dim=-1) == 0).any():  # its buffer has zeros at first
            raise CheckpointError(f"vLLM {vllm.__version__} has not recorded its routes here")
        is_end = torch.isin(tokens[:, P:], torch.tensor(rl.eos, device=device))
        return Rollout(tokens, pads, mask, logprobs, experts, (is_end & mask).any(1))
