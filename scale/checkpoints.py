"""Real checkpoints in and out, by way of transformers, whose experts are stacked in our layout:
Qwen3-MoE, OLMoE and Mixtral.

    model = checkpoints.load("OLMoE-1B-7B")
    checkpoints.save(model, "OLMoE-1B-7B", "trained")  # with W_p, in a folder of its own
    checkpoints.save(model, "OLMoE-1B-7B", "rolls-out", horizon=0.7)  # W + 0.7 W_p as the router

Weights are read from safetensors alone, and no code of a checkpoint is ever run.
"""

import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from pr2_mini import ModelConfig, MoETransformer

FAMILIES = {"qwen3_moe": "Qwen3Moe", "olmoe": "Olmoe", "mixtral": "Mixtral"}
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
    "tie_word_embeddings": (False,),
    "quantization_config": (None,),
}


class CheckpointError(ValueError):
    """A folder that cannot be read, does not fit together or is not implemented here."""


def hf_name(name: str) -> str:
    """ "blocks.0.moe.router.weight" -> "model.layers.0.mlp.gate.weight"."""
    return ".".join(HF_NAMES.get(word, word) for word in name.split("."))


def config_of(path: str | Path) -> transformers.PretrainedConfig:
    """transformers' configuration of the model in a folder. CheckpointError if it has none."""
    try:
        return transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # of any type: transformers', and of what it calls
        raise CheckpointError(f"{path} has no config.json that can be read: {error}") from error


def model_of(hf_config: transformers.PretrainedConfig) -> MoETransformer:
    """A model as their configuration describes it, on the meta device, where it takes no memory.
    CheckpointError names what is not implemented here."""
    kind = hf_config.model_type
    if kind not in FAMILIES:
        raise CheckpointError(f"model_type is {kind}; expected one of {', '.join(FAMILIES)}")
    for name, values in IMPLEMENTED.items():
        value = getattr(hf_config, name, values[0])
        if value not in values:
            raise CheckpointError(f"{name} {value} in config.json; only {values[0]} is implemented")
    rope = dict(hf_config.rope_parameters)
    rope_theta = rope.pop("rope_theta")
    if rope != {"rope_type": "default"}:
        raise CheckpointError(f"config.json asks for rope scaling, {rope}; it is not implemented")
    settings = {field.name: getattr(hf_config, field.name, None) for field in fields(ModelConfig)}
    settings["rope_theta"] = rope_theta
    if kind != "qwen3_moe":
        settings["moe_intermediate_size"] = hf_config.intermediate_size
    if kind == "mixtral":
        settings["norm_topk_prob"] = True
    try:
        if settings["head_dim"] is None:
            settings["head_dim"] = hf_config.hidden_size // hf_config.num_attention_heads
        config = ModelConfig(**settings)
        with torch.device("meta"):
            model = MoETransformer(config)
    except (ValueError, ZeroDivisionError) as error:  # the core refuses such sizes; no heads
        raise CheckpointError(f"config.json cannot be trained: {error}") from error
    # What the families do to queries and keys before attention.
    for block in model.blocks:
        if kind == "mixtral":  # nothing
            block.attention.q_norm = nn.Identity()
            block.attention.k_norm = nn.Identity()
        elif kind == "olmoe":  # it normalises those of all heads together
            q = (config.num_attention_heads, config.head_dim)
            k = (config.num_key_value_heads, config.head_dim)
            block.attention.q_norm = nn.RMSNorm(q, config.rms_norm_eps, device="meta")
            block.attention.k_norm = nn.RMSNorm(k, config.rms_norm_eps, device="meta")
    return model


def load(path: str | Path, dtype: torch.dtype | None = torch.float32) -> MoETransformer:
    """The model in a folder, taken from transformers' without a copy, in dtype (None: the folder's)
    but for its routers, which are float32. CheckpointError if the weights do not fit."""
    path = Path(path)
    hf_config = config_of(path)
    model = model_of(hf_config)

    class HFModel(getattr(transformers, FAMILIES[hf_config.model_type] + "ForCausalLM")):
        _keep_in_fp32_modules_strict = ("gate.weight",)  # the routers

    try:
        hf_model, faults = HFModel.from_pretrained(
            path,
            config=hf_config,
            dtype=dtype or "auto",
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are among the faults
            output_loading_info=True,
        )
        trained = path / "predictor" / "model.safetensors"
        predictors = load_file(trained) if trained.exists() else {}
    except (OSError, SafetensorError, RuntimeError) as error:  # the last: experts it can't stack
        raise CheckpointError(f"the weights in {path} cannot be read: {error}") from error
    ours = model.state_dict()
    shapes = {hf_name(name): ours[name].shape for name in ours if name.endswith("predictor")}
    faults["predictor"] = [
        name for name, W_p in predictors.items() if W_p.shape != shapes.get(name)
    ]
    if any(faults.values()):
        raise CheckpointError(f"the weights in {path} do not fit its config.json: {faults}")
    weights = hf_model.state_dict() | predictors
    for name, tensor in ours.items():
        if name.endswith("predictor"):  # W_p is 0 in a checkpoint that was not trained here
            weights.setdefault(hf_name(name), torch.zeros(tensor.shape))
        ours[name] = weights[hf_name(name)].view(tensor.shape)  # their norms are flat
    model.load_state_dict(ours, assign=True)
    return model.requires_grad_(True)


@torch.no_grad()
def hf_weights(model, horizon: float | None = None, routers_only: bool = False) -> Iterator:
    """The policy's weights by transformers' names, one at a time, each whole: no process holds a
    second copy of a sharded model. Given a horizon m the routers are W + m W_p: since h W + m h W_p
    = h (W + m W_p), any engine that keeps them in float32 chooses, and weighs, by rho_hat."""
    for name, parameter in model.named_parameters():
        is_router = name.endswith("router.weight")
        if name.endswith("predictor") or (routers_only and not is_router):
            continue
        weight = parameter.detach()
        if isinstance(weight, DTensor):  # of FSDP, a part
            weight = weight.full_tensor()
        if is_router and horizon is not None:
            router = model.get_submodule(name.removesuffix(".weight"))
            weight = router.folded(horizon).detach()
        yield hf_name(name), weight.flatten() if "norm" in name else weight


def save(model, source, path, horizon: float | None = None, rank: int = 0) -> None:
    """Writes a new folder, all of it or nothing, in the dtype of `source` but with float32 routers;
    tokenizer and configurations are copied from there. All processes call it, the first writes.
    With a horizon m the routers are W + m W_p; else W_p is kept too, in predictor/."""
    path = Path(path)
    hf_config = config_of(source)
    weights = {}
    for name, weight in hf_weights(model, horizon):
        dtype = torch.float32 if name.endswith("gate.weight") else hf_config.dtype
        if rank == 0:
            weights[name] = weight.to("cpu", dtype or torch.float32)
    if rank > 0:
        return
    if path.exists():
        raise CheckpointError(f"{path} exists; choose another folder")
    partial = Path(f"{path}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        with torch.device("meta"):
            hf_model = transformers.AutoModelForCausalLM.from_config(hf_config)
        hf_model.save_pretrained(partial, state_dict=weights)
        for file in Path(source).iterdir():
            if file.suffix in (".json", ".jinja", ".model", ".txt") and "index" not in file.name:
                shutil.copy(file, partial)
        if horizon is None:
            # In a folder of its own, since vLLM reads every *.safetensors beside config.json.
            (partial / "predictor").mkdir()
            ours = model.state_dict()
            predictors = {hf_name(name): ours[name] for name in ours if name.endswith("predictor")}
            save_file(predictors, partial / "predictor" / "model.safetensors")
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fold(source: str | Path, path: str | Path, horizon: float) -> None:
    """Writes a trained folder again as an engine for rollouts should serve it: W + m W_p as the
    routers, and nothing of prediction beside. A run's last mini-step has m = 0.7 by default."""
    save(load(source, dtype=None), source, path, horizon)
