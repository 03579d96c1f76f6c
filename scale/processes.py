"""Many processes: FSDP2 shards policy and engine under torchrun, and torch's distributed checkpoint
lets a run resume on another number of them. Losses and metrics are averaged in pr2_mini.py.

torch's distributed checkpoint reads pickled metadata: resume only runs of your own."""

import datetime
import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from pr2_mini import MoETransformer, Rollout, RolloutEngine, join

RANK = int(os.environ.get("RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets both


def start(device: str) -> dist.DeviceMesh:
    """The mesh of all processes, or of this one alone."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    store = dist.HashStore() if PROCESSES == 1 else None  # None: torchrun's
    patience = datetime.timedelta(hours=2)  # the first process loads and saves weights alone
    dist.init_process_group(store=store, rank=RANK, world_size=PROCESSES, timeout=patience)
    return dist.init_device_mesh(device, (PROCESSES,))


def average_gradient(parameter: Tensor) -> None:
    """After every backward pass; what was averaged after an earlier one stays as it is."""
    dist.all_reduce(parameter.grad)
    parameter.grad /= PROCESSES


def shard(model: MoETransformer, mesh, dtype: torch.dtype | None, trains: bool) -> None:
    """Gives memory to a model that is on the meta device: each process keeps its part of every
    block and computes in dtype. Routers and predictors are small and stay whole, in float32."""
    whole = set()
    for router in model.routers:
        whole.update(router.to_empty(device=mesh.device_type).parameters())
    if trains:
        for parameter in whole:
            parameter.register_post_accumulate_grad_hook(average_gradient)
        for block in model.blocks:  # keep only the inputs of each block for the backward pass
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for module in [*model.blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=whole)
    model.set_reshard_after_forward(True)  # the root too: engines copy its weights
    model.to_empty(device=mesh.device_type)


def fill(model: MoETransformer, load: Callable[[], MoETransformer]) -> None:
    """Gives every process its part of what `load` returns in the first one, in any dtype. One
    tensor at a time is whole."""
    weights = load().state_dict() if RANK == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)


class PiecewiseEngine(RolloutEngine):
    """The built-in engine, which samples at most `most` responses at once, but always all of one
    prompt: their keys and values must fit into memory."""

    def __init__(self, model: MoETransformer, settings, most: int):
        super().__init__(model, settings)
        self.prompts_at_once = max(1, most // settings.samples)

    def sample(self, prompts: Tensor, pads: Tensor, generator=None) -> Rollout:
        """As RolloutEngine.sample."""
        size = self.prompts_at_once
        parts = []
        for some_prompts, some_pads in zip(prompts.split(size), pads.split(size), strict=True):
            parts.append(super().sample(some_prompts, some_pads, generator))
        return join(parts)


def tensors_of(model: MoETransformer, optimizer) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name: the model's, and AdamW's, made before any step."""
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
        for key, tensor in state.items():
            tensors[f"{name}.{key}"] = tensor
    return tensors


def checkpoints_of(folder: Path) -> list[Path]:
    """The complete checkpoints step-N of a run, oldest first; what has another name is ignored."""
    found = []
    for path in folder.iterdir() if folder.exists() else []:
        if re.fullmatch("step-[0-9]+", path.name) and (path / "history.json").is_file():
            found.append(path)
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def save_run(folder: Path, tensors: dict[str, Tensor], history: list[dict]) -> None:
    """Writes step-N, which appears when it is complete; then all but the last two go."""
    partial = folder / "partial"
    if RANK == 0:  # what a run has left that was killed while it wrote
        shutil.rmtree(partial, ignore_errors=True)
    dcp.save(tensors, checkpoint_id=partial)
    if RANK == 0:
        (partial / "history.json").write_text(json.dumps(history))
        complete = folder / f"step-{len(history)}"
        shutil.rmtree(complete, ignore_errors=True)  # what is there has no history.json
        partial.rename(complete)
        for old in checkpoints_of(folder)[:-2]:
            shutil.rmtree(old)


def load_run(folder: Path, tensors: dict[str, Tensor]) -> list[dict]:
    """Fills the tensors from the newest step-N, of any number of processes, and returns its
    history; without a checkpoint it fills nothing and returns []."""
    found = checkpoints_of(folder)
    if not found:
        return []
    dcp.load(tensors, checkpoint_id=found[-1])
    return json.loads((found[-1] / "history.json").read_text())
