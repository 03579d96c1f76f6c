"""Train the toy: warm up a small MoE on sums with slips, then sharpen it by RL with PR2.

    python train_toy.py                            # warm-up (cached) and RL, minutes on a laptop
    python train_toy.py --method r3 --seed 1       # another method, another seed
    python train_toy.py --resume runs/NAME         # go on with a run that was stopped or killed
    python train_toy.py --compare r3 pr2:alpha=0.3 pr2:predictor=momentum       # side by side
    python train_toy.py --checkpoint OLMoE-1B-7B --data train.jsonl             # a real checkpoint
    python train_toy.py --checkpoint DIR --data FILE --engine vllm              # vLLM samples
    torchrun --nproc-per-node 8 train_toy.py --checkpoint DIR --data FILE --out runs/NAME

A run's folder holds config.json (every setting), metrics.jsonl (a line for each rollout batch) and
the last two of checkpoint/step-N, written by torch's distributed checkpoint: resume only runs of
your own. The method is in pr2_mini.py. Linux and macOS.
"""

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import statistics
import sys
import time
import typing
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch says so when imported
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said of one process

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import pr2_mini
from pr2_mini import AdditionTask, InputError, ModelConfig, MoETransformer, RLConfig

RANK = int(os.environ.get("RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets both


# --------------------------------------------------------------------------------- 1. Settings
@dataclass
class Settings(RLConfig):
    """Every setting of a run: those of an RL step, and these. Each is a flag of the command line,
    but for eos and pad, which are the task's."""

    max_new_tokens: int = 0  # longest response, 0 = what the task needs
    router_multiplier: float = 3.0  # learning rate of the routers W over the policy's (ours)
    seed: int = 0  # of the base model and of everything after it
    steps: int = 60  # rollout batches
    prompts: int = 64  # per rollout batch
    operands: int = 11  # numbers in a sum
    largest: int = 2  # largest number in a sum
    slip: float = 0.08  # share of the sums in the warm-up's text that are off by one
    warm_up: int = 400  # steps of the warm-up
    layers: int = 4  # of the toy's model
    experts: int = 32  # N, experts per layer
    expert_width: int = 32  # of one expert
    experts_per_token: int = 4  # k; top-1 is not renormalised, or its router would not learn
    checkpoint: str = ""  # Hugging Face folder to train in place of the toy, on --data
    data: str = ""  # JSON-lines file, each line with a "question" and an "answer"
    system: str = ""  # system prompt for a checkpoint with a chat template
    prompt_length: int = 1024  # longer prompts of --data are left out
    engine: typing.Literal["built-in", "vllm"] = "built-in"  # samples; vllm needs --checkpoint
    device: str = "auto"  # cpu, cuda or mps; auto is cuda if there is one, else cpu
    track: typing.Literal["none", "wandb", "trackio"] = "none"  # where metrics go besides a file
    base_dir: str = "base"  # where warmed-up base models are kept
    save_every: int = 20  # rollout batches between checkpoints


# Other defaults with --checkpoint: large models learn slowly, and their routers need no help.
CHECKPOINT_DEFAULTS = {
    "learning_rate": 1e-6,
    "router_multiplier": 1.0,
    "alpha": 1000.0,
    "rollout_dtype": "bf16",
    "micro_batch": 8,
}
# Other defaults with --compare: a regime where replay changes what is learned, with one expert a
# token, coarse rollouts, fast routers and short sums.
COMPARE_DEFAULTS = {
    "operands": 3,
    "largest": 9,
    "slip": 0.35,
    "warm_up": 300,
    "experts": 16,
    "expert_width": 64,
    "experts_per_token": 1,
    "rollout_dtype": "fp8",
    "mini_steps": 8,
    "router_multiplier": 30.0,
    "steps": 100,
}
MAY_CHANGE = ("steps", "device", "base_dir", "checkpoint", "data", "track")  # when a run is resumed
AT_LEAST_ONE = (
    "samples",
    "mini_steps",
    "steps",
    "prompts",
    "save_every",
    "prompt_length",
    "warm_up",
)
SETTINGS = [field for field in dataclasses.fields(Settings) if field.name not in ("eos", "pad")]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise InputError(f"{message}; --help lists the flags")


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict]:
    """What to do, and the settings that were given."""
    parser = Parser(
        description="Train a toy MoE by RL with Predictive Routing Replay (PR2).",
        usage="python train_toy.py [FLAG VALUE ...]",
        allow_abbrev=False,
    )
    # The comment of a field is the help of its flag.
    source = inspect.getsource(RLConfig) + inspect.getsource(Settings)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    for field in SETTINGS:
        choices = typing.get_args(field.type)
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=str if choices else field.type,
            choices=choices or None,
            default=argparse.SUPPRESS,
            help=f"{comments.get(field.name, '')} (default: {field.default})",
            metavar="|".join(choices) if choices else field.type.__name__,
        )
    parser.add_argument("--out", default="", help="folder of the run; default: a new one in runs/")
    parser.add_argument("--resume", default="", help="folder of a run to go on with")
    parser.add_argument(
        "--compare", nargs="*", metavar="METHOD[:setting=value,...]", help="train variants"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs per variant of --compare")
    parser.add_argument("--benchmark", action="store_true", help="print where the time goes")
    actions = parser.parse_args(arguments)
    given = {f.name: getattr(actions, f.name) for f in SETTINGS if hasattr(actions, f.name)}
    for name, value in given.items():
        least = 1 if name in AT_LEAST_ONE else 0
        if isinstance(value, int | float) and not least <= value < math.inf:
            raise InputError(f"{name} {value}; expected a number of at least {least}")
    return actions, given


def parse_values(values: dict, source: str) -> dict:
    """Settings from a file or a variant, as if each had been given by its flag."""
    for name in values:
        if name not in [field.name for field in SETTINGS]:
            raise InputError(f'{source} has "{name}", which is not a setting; --help lists them')
    try:
        _, given = parse([f"--{name.replace('_', '-')}={values[name]}" for name in values])
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    return given


def make_settings(values: dict) -> Settings:
    """Settings that fit together, from those that were given."""
    if values.get("checkpoint"):
        values = {**CHECKPOINT_DEFAULTS, **values}
    settings = Settings(**values)
    if settings.cached_share > 1 or settings.slip > 1 or settings.beta1 >= 1:
        raise InputError("expected cached_share and slip up to 1 and beta1 below 1")
    share = settings.mini_steps * PROCESSES
    if settings.prompts % share != 0:
        raise InputError(
            f"{settings.prompts} prompts do not divide into {settings.mini_steps} mini-steps on "
            f"{PROCESSES} processes; expected a multiple of {share}"
        )
    if settings.engine == "vllm":
        if not settings.checkpoint or settings.rollout_dtype == "fp8":
            raise InputError("--engine vllm needs --checkpoint, and rolls out in fp32 or bf16")
        if importlib.util.find_spec("vllm") is None:
            raise InputError("--engine vllm needs vLLM: pip install vllm")
    if settings.track != "none" and importlib.util.find_spec(settings.track) is None:
        raise InputError(f"--track {settings.track}: pip install {settings.track}")
    if settings.device == "auto":
        settings.device = "cuda" if torch.cuda.is_available() else "cpu"
    return settings


def as_dict(settings: Settings) -> dict:
    """What config.json holds."""
    return {field.name: getattr(settings, field.name) for field in SETTINGS}


# -------------------------------------------------------------------------------- 2. Processes
def open_device(name: str, sharded: bool) -> tuple[torch.device, dist.DeviceMesh | None]:
    """The device of this process, and the mesh of all of them if the model is to be sharded."""
    if PROCESSES > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f'device "{name}" is not available; try --device cpu') from error
    if not sharded and PROCESSES == 1:
        return device, None
    if device.type == "mps":
        raise InputError("several processes and --checkpoint need --device cpu or cuda, not mps")
    if importlib.util.find_spec("numpy") is None:
        raise InputError("torch's processes talk by way of numpy: pip install numpy")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if PROCESSES > 1:
            patience = datetime.timedelta(hours=2)  # the first process loads or warms up alone
            dist.init_process_group(backend, timeout=patience)
        else:  # alone, but sharded: FSDP keeps float32 weights and computes in bfloat16
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device, dist.init_device_mesh(device.type, (PROCESSES,))


def place(model: MoETransformer, device, mesh, dtype: torch.dtype | None) -> MoETransformer:
    """Moves the model to the device. On a mesh each process keeps its part of every block (FSDP2)
    and computes in dtype; routers and predictors are small and stay whole, in float32."""
    if mesh is None:
        return model.to(device)
    whole = set()
    for router in model.routers:
        whole.update(router.to(device).parameters())
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for module in [*model.blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=whole)
    return model


# ------------------------------------------------------------------------------ 3. A run's files
@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it against every other process; the system lets go of it when
    this one ends, however it ends."""
    if RANK > 0:
        yield
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # on a file system without locks another one than BlockingIOError
        os.close(handle)
        taken = isinstance(error, BlockingIOError)
        reason = "belongs to a run that is still going; wait for it" if taken else error.strerror
        raise InputError(f"{folder} {reason}") from None
    try:
        yield
    finally:
        os.close(handle)


def write_file(path: Path, text: str) -> None:
    """All of the file or none of it, also when the disk is full."""
    partial = path.with_name(f"{path.name}.partial")
    with writing(path):
        with open(partial, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is missing or damaged: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: expected a JSON object")
    return content


def read_metrics(path: Path, steps: int) -> list[dict]:
    """The rows of a finished run."""
    try:
        history = [json.loads(line) for line in path.read_text().splitlines()]
        complete = [row["step"] for row in history] == list(range(1, steps + 1))
    except (OSError, ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise InputError(f"{path} is damaged: expected the rollout batches 1 to {steps}")
    return history


def checkpoints_of(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; each appeared by a rename."""
    found = (folder / "checkpoint").glob("step-*")
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def prepare_folder(folder: Path) -> None:
    """For a new run: refuses a folder with a run or with foreign files, but not what a run has left
    that was killed before its first checkpoint was complete."""
    if checkpoints_of(folder):
        raise InputError(f"{folder} holds a run; --resume it, or choose another --out")
    left = {"config.json", "config.json.partial", "checkpoint"}
    foreign = {path.name for path in folder.iterdir()} - left
    if foreign:
        raise InputError(f"{folder} holds {min(foreign)}; choose an empty folder for --out")


def tensors_of(model: MoETransformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of a run by name: of the model and, made here and not in the first step, of
    AdamW. A checkpoint is written from them and read into them."""
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
        for key, tensor in state.items():
            tensors[f"{name}.{key}"] = tensor
    return tensors


def save_checkpoint(folder: Path, tensors: dict, progress: dict) -> None:
    """Writes checkpoint/step-N, which appears when it is complete; then all but the last two go.
    The one with the highest N is the newest: a run goes on from there, so that none is above."""
    new = folder / "checkpoint" / f"step-{len(progress['history'])}"
    partial = new.with_name("step.partial")
    if RANK == 0:  # what a run has left that was killed while it wrote
        shutil.rmtree(partial, ignore_errors=True)
    with writing(new, size=sum(tensor.nbytes for tensor in tensors.values())):
        dcp.save(tensors, checkpoint_id=partial, no_dist=not dist.is_initialized())
        if RANK == 0:
            write_file(partial / "progress.json", json.dumps(progress))
            partial.rename(new)
            for old in checkpoints_of(folder)[:-2]:
                shutil.rmtree(old)


@contextlib.contextmanager
def writing(path: Path, size: int = 0) -> Iterator[None]:
    """What fails in here becomes a sentence. It says whether it is the disk: torch does not."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:  # the latter two are torch's
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        free = shutil.disk_usage(folder).free
        full = free < size or "No space" in str(error)
        words = "the disk is full" if full else last_line(error)
        message = f"cannot write {path}: {words}; {free / 1e6:.0f} MB are free"
        raise InputError(message) from error


def last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def load_checkpoint(folder: Path, model: MoETransformer, tensors: dict) -> dict:
    """Fills the tensors from the newest checkpoint, of any number of processes; its progress."""
    checkpoints = checkpoints_of(folder)
    if not checkpoints:
        raise InputError(f"{folder} has no checkpoint; start the run again with --out {folder}")
    path = checkpoints[-1]
    progress = read_json(path / "progress.json")
    complete = progress.keys() == {"before", "history"} and len(progress["before"]) == 2
    if not complete or path.name != f"step-{len(progress['history'])}":
        raise InputError(f"{path / 'progress.json'} is damaged or of another version")
    try:
        dcp.load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (Exception, CheckpointException) as error:
        raise InputError(f"{path} is damaged or of another model: {last_line(error)}") from error
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise InputError(f"{path} has {name} with values that are not finite")
    return progress


# --------------------------------------------------------------------------------- 4. Base model
BASE_VERSION = 3  # counted up whenever a base model made anew would differ


def load_balancing_loss(experts: Tensor, logits: Tensor, real: Tensor) -> Tensor:
    """Switch Transformer's auxiliary loss over real tokens, mean over layers; 1 when the load is
    even. experts (L, B, T, k) ids; logits (L, B, T, N); real (B, T) bool."""
    N = logits.shape[-1]
    # N sum_j f_j P_j: f_j is the share of slots that went to expert j, P_j its mean probability.
    f = F.one_hot(experts[:, real].long(), N).float().flatten(1, -2).mean(1)
    P = logits[:, real].softmax(-1).mean(1)
    return N * (f * P).sum(-1).mean()


def warm_up(model: MoETransformer, task: AdditionTask, settings: Settings) -> None:
    """Supervised training on worked sums with slips, so that RL has something to sharpen.

    RL cannot teach a skill that is never sampled, and has nothing to do where every sample is
    right. A model trained on sums of which some slip by one can add but often does not."""
    steps = settings.warm_up
    device = model.embed.weight.device
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0, fused=True
    )
    width = task.prompt_length + task.response_length
    bar = tqdm(range(steps), "warm-up", leave=False)
    for step in bar:
        # A linear ramp, then a cosine down to a twentieth.
        rate = min((step + 1) / 20, 0.525 + 0.475 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 3e-3 * rate
        problems = task.problems(max(1, 1536 // width), generator)  # 1536 tokens a step
        texts = [problem + task.solve(problem, settings.slip, generator) for problem in problems]
        tokens = task.encode([text.ljust(width, "_") for text in texts]).to(device)
        lengths = torch.tensor([len(problem) for problem in problems], device=device)
        column = torch.arange(1, width, device=device)
        real = tokens[:, 1:] != task.pad
        answer = real & (column >= lengths[:, None])
        logits, trace = model(tokens[:, :-1])
        loss = F.cross_entropy(logits[answer], tokens[:, 1:][answer])
        balance = load_balancing_loss(trace.experts, trace.logits, real)
        optimizer.zero_grad()
        (loss + 0.01 * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def base_model(config: ModelConfig, task: AdditionTask, settings: Settings, device):
    """The warmed-up model, from the base folder if one of the same settings was made before."""
    name = (
        f"v{BASE_VERSION}-{task.operands}x{task.largest}-{config.num_hidden_layers}layers"
        f"-top{config.num_experts_per_tok}of{config.num_experts}x{config.moe_intermediate_size}"
        f"-warm{settings.warm_up}-slip{settings.slip}-seed{settings.seed}-{device.type}.pt"
    )
    path = Path(settings.base_dir) / name
    torch.manual_seed(settings.seed)
    model = MoETransformer(config).to(device)
    if path.is_file():
        try:
            model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        except Exception as error:  # torch raises half a dozen types for a file that is not its own
            raise InputError(f"{path} is damaged or of another version; delete it") from error
        print(f"base model       {path}")
        return model
    with writing(path):  # noticed before the warm-up
        path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    warm_up(model, task, settings)
    partial = path.with_name(f"{name}.{os.getpid()}.partial")  # others may make the same one
    with writing(path):
        torch.save(model.state_dict(), partial)
        os.replace(partial, path)
    print(f"base model       {path} (warmed up in {time.perf_counter() - start:.0f} s)")
    return model


# ------------------------------------------------------------------ 5. Questions for a checkpoint
class Question(typing.NamedTuple):
    text: str
    answer: str
    ids: tuple[int, ...]  # of its prompt


class Questions:
    """Questions of a JSON-lines file for a checkpoint, with the checkpoint's own tokenizer. An
    eighth, by checksum, is never trained on."""

    response_length = 512

    def __init__(self, settings: Settings):
        transformers = pr2_mini.import_transformers()
        folder = settings.checkpoint
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # of transformers, and of what it calls
            raise InputError(f"cannot read the tokenizer in {folder}: {error}") from error
        self.tokenizer.model_max_length = sys.maxsize  # --prompt-length is what counts
        self.system = settings.system
        written = read_questions(Path(settings.data))
        self.eos = end_tokens(Path(folder), self.tokenizer)
        pad = self.tokenizer.pad_token_id
        self.pad = self.eos[0] if pad is None else pad
        questions = [Question(text, answer, self.encode(text)) for text, answer in written]
        kept = [one for one in questions if len(one.ids) <= settings.prompt_length]
        self.training = [one for one in kept if zlib.crc32(one.text.encode()) % 8 != 0]
        self.held_out = [one for one in kept if zlib.crc32(one.text.encode()) % 8 == 0]
        left_out = len(questions) - len(kept)
        if left_out:
            longest = settings.prompt_length
            print(f"left out         {left_out} prompts of more than {longest} tokens")
        if not self.training or not self.held_out:
            raise InputError(
                f"{settings.data} has {len(self.training)} questions to train on and "
                f"{len(self.held_out)} held out; expected some of each"
            )
        self.prompt_length = max(len(one.ids) for one in kept)

    def encode(self, question: str) -> tuple[int, ...]:
        """The ids of a prompt: by the chat template if there is one, else a plain question."""
        text = f"{question}\nAnswer:"
        templated = self.tokenizer.chat_template is not None
        if templated:
            messages = [{"role": "user", "content": question}]
            if self.system:
                messages.insert(0, {"role": "system", "content": self.system})
            try:
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            except Exception as error:  # a template may refuse, for one a system prompt
                raise InputError(f"the chat template of the checkpoint refuses: {error}") from error
        elif self.system:
            raise InputError("--system needs a checkpoint with a chat template")
        # The template writes the special tokens itself: no second bos.
        special = not templated
        ids = self.tokenizer(text, add_special_tokens=special, padding=False, truncation=False)
        return tuple(ids["input_ids"])

    def problems(self, count: int, generator, held_out: bool = False) -> list[Question]:
        part = self.held_out if held_out else self.training
        draws = torch.randint(len(part), (count,), generator=generator)
        return [part[draw] for draw in draws.tolist()]

    def prompts(self, problems: list[Question]) -> tuple[Tensor, Tensor]:
        """(Q, P) int64 ids, padded on the left, and (Q, P) bool, which of them are real."""
        rows = [torch.tensor(problem.ids) for problem in problems]
        tokens = pad_sequence(rows, batch_first=True, padding_value=self.pad, padding_side="left")
        lengths = torch.tensor([len(row) for row in rows])
        attend = torch.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]
        return tokens, attend

    def decode(self, ids: Tensor) -> list[str]:
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def text(self, problem: Question) -> str:
        return problem.text

    def rewards(self, problems: list[Question], responses: list[str]) -> Tensor:
        """1.0 where math-verify finds the answer in the response, else 0.0. A fork begins here."""
        from math_verify import parse, verify

        rewards = []
        for problem, response in zip(problems, responses, strict=True):
            right = verify(parse(problem.answer), parse(response))
            rewards.append(1.0 if right else 0.0)
        return torch.tensor(rewards)


def read_questions(path: Path) -> list[tuple[str, str]]:
    """Questions and answers, as GSM8K writes them (the answer follows ####) or bare."""
    if importlib.util.find_spec("math_verify") is None:
        raise InputError("checking answers needs math-verify: pip install math-verify")
    if not path.is_file():
        raise InputError(f'--checkpoint needs --data, a JSON-lines file; "{path}" is none')
    written = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                answer = str(row["answer"]).split("####")[-1].strip()
                # math-verify reads LaTeX only where it is marked as such.
                marked = f"${answer}$" if "\\" in answer else answer
                written.append((str(row["question"]), marked))
            except (ValueError, KeyError, TypeError) as error:
                wanted = '{"question": ..., "answer": ...}'
                raise InputError(f"line {number} of {path} is not {wanted}: {error!r}") from error
    return written


def end_tokens(folder: Path, tokenizer) -> list[int]:
    """Every id that ends a response: of the tokenizer, config.json and generation_config.json."""
    found: list = []
    for source in (tokenizer, *pr2_mini.read_hf_configs(folder)):
        ids = getattr(source, "eos_token_id", None)
        found += ids if isinstance(ids, list) else [ids]
    ends = [token for token in found if token is not None]
    if not ends or not all(type(token) is int for token in ends):
        raise InputError(f"{folder} names no eos_token_id that could end a response: {ends}")
    return sorted(set(ends))


# ---------------------------------------------------------------- 6. vLLM as the rollout engine
class VLLMEngine:
    """Rollouts by vLLM, in this process; of several processes each has an engine of its own. The
    weights go into the running engine before each rollout batch, under pr2 with W + m W_p as the
    routers, so that what vLLM takes for its own top-k is the predicted set. Run with vLLM 0.30."""

    def __init__(self, settings: Settings, config: ModelConfig):
        # vLLM's OLMoE has these two built in, whatever config.json says.
        if config.qk_norm == "full" and (config.norm_topk_prob or config.rms_norm_eps != 1e-5):
            raise InputError(
                "vLLM runs OLMoE with rms_norm_eps 1e-5 and norm_topk_prob false only; "
                "leave out --engine vllm"
            )
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # no process of its own
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm

        self.vllm = vllm
        self.settings = settings
        self.config = config
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.rollout_dtype]
        longest = settings.prompt_length + settings.max_new_tokens
        length = min(longest, config.max_position_embeddings)
        # Keys and values of all responses, in blocks of up to 128 tokens, but 4 GB at most.
        row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        rows = settings.prompts // PROCESSES * settings.samples + 1
        memory = rows * row * (length + 128) * dtype.itemsize
        try:
            self.llm = vllm.LLM(
                settings.checkpoint,
                load_format="dummy",  # the weights come from the policy
                dtype=dtype,
                skip_tokenizer_init=True,
                generation_config="vllm",  # no sampling defaults of the checkpoint
                logprobs_mode="processed_logprobs",  # at the sampling temperature
                enable_return_routed_experts=True,
                enforce_eager=True,
                max_model_len=length,
                kv_cache_memory_bytes=min(memory, 2**32),
                distributed_executor_backend="external_launcher" if PROCESSES > 1 else None,
                disable_log_stats=True,
            )
        except Exception as error:  # of any type, of vLLM and of what it calls
            reason = last_line(error)
            raise InputError(f"vLLM cannot run {settings.checkpoint}: {reason}") from error

    def weights(self, model: MoETransformer, horizon: float | None, all_of_them: bool) -> Iterator:
        """The policy's weights by the names of published checkpoints, or only the routers. One at a
        time: no process holds a second whole copy of a sharded model."""
        for name, parameter in model.named_parameters():
            if name.endswith("predictor.weight") or not (all_of_them or ".router." in name):
                continue
            weight = parameter.detach()
            if isinstance(weight, DTensor):
                weight = weight.full_tensor()
            if ".router." in name and horizon is not None:
                router = model.get_submodule(name.removesuffix(".weight"))
                weight = router.folded(horizon).detach()
            name = pr2_mini.hf_name(name)
            if self.config.qk_norm == "none":  # Mixtral
                name = name.replace(".mlp.", ".block_sparse_moe.")
            if ".experts." not in name:
                yield name, weight
                continue
            experts, _, kind = name.rpartition(".")
            for expert, stacked in enumerate(weight):
                if kind == "gate_up_proj":
                    gate, up = stacked.chunk(2)
                    yield f"{experts}.{expert}.gate_proj.weight", gate
                    yield f"{experts}.{expert}.up_proj.weight", up
                else:
                    yield f"{experts}.{expert}.down_proj.weight", stacked

    @torch.no_grad()
    def update(self, model: MoETransformer, horizon: float | None, all_of_them: bool) -> None:
        """Puts the weights into the engine, and drops the keys, values and routes of older ones."""
        if isinstance(model, FSDPModule):
            model.reshard()  # a forward pass has left it partly whole
        if all_of_them:
            self.llm.apply_model(drop_packed_experts)
        weights = self.weights(model, horizon, all_of_them)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()

    @torch.no_grad()
    def rollout(self, model, prompts, attend, horizon, generator) -> pr2_mini.Rollout:
        """What `generate` returns: one run of the engine for each distinct horizon (Q,)."""
        Q, P = prompts.shape
        G = self.settings.samples
        C = self.settings.max_new_tokens
        L = self.config.num_hidden_layers
        k = self.config.num_experts_per_tok
        rollout = pr2_mini.blank_rollout(self.config, prompts, attend, G, C, self.settings.pad)
        tokens, real, logprobs, experts, _ = rollout
        device = prompts.device
        seeds = torch.randint(2**31, (Q,), generator=generator, device=device).tolist()
        horizons = [None] * Q if horizon is None else horizon.tolist()
        for run, m in enumerate(dict.fromkeys(horizons)):
            self.update(model, m, all_of_them=run == 0)
            rows = [row for row in range(Q) if horizons[row] == m]
            requests = []
            for row in rows:
                requests.append({"prompt_token_ids": prompts[row][attend[row]].tolist()})
            results = self.llm.generate(
                requests, [self.sampling(seeds[row]) for row in rows], use_tqdm=False
            )
            for row, result in zip(rows, results, strict=True):
                for sample, output in enumerate(result.outputs):
                    place = row * G + sample
                    start = P - len(result.prompt_token_ids)
                    end = P + len(output.token_ids)
                    shape = (end - start - 1, L, k)
                    route = output.routed_experts  # numpy, of every token but the last
                    if route is None or route.shape != shape:
                        found = None if route is None else route.shape
                        raise InputError(f"vLLM returned routes {found}; expected {shape}")
                    route = torch.from_numpy(route.astype("int16")).transpose(0, 1)
                    experts[:, place, start : end - 1] = route
                    tokens[place, P:end] = torch.tensor(output.token_ids)
                    real[place, P:end] = True
                    for column, token in enumerate(output.token_ids):
                        logprobs[place, column] = output.logprobs[column][token].logprob
        pr2_mini.check_routes(experts, (L, Q * G, P + C - 1), self.config)
        return rollout

    def sampling(self, seed: int):
        """Of the responses to one prompt."""
        settings = self.settings
        return self.vllm.SamplingParams(
            n=settings.samples,
            temperature=settings.temperature,
            max_tokens=settings.max_new_tokens,
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            ignore_eos=True,  # all of them are here:
            stop_token_ids=settings.eos,
            seed=seed,
        )


def drop_packed_experts(model) -> None:
    """On CPUs vLLM 0.30 packs the experts when they are loaded; unless it is told so, it goes on
    with the old ones after an update."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


# ----------------------------------------------------------------------------------- 7. Training
EVALUATE_EVERY = 10  # rollout batches
EVALUATED = 256  # held-out problems
SHOWN = 8  # responses to each of the eight problems that a run prints
SHOWN_WIDTH = 27  # characters of each text there: the longest response of the default run


def generator_for(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Random numbers that depend on nothing but the key, so that no state has to be saved."""
    seed = hashlib.sha256(repr(key).encode()).digest()[:8]
    return torch.Generator(device).manual_seed(int.from_bytes(seed, "big") >> 1)


def build_task(settings: Settings) -> tuple[AdditionTask | Questions, ModelConfig, RLConfig]:
    """The task, the shape of the model, and the settings of an RL step on it."""
    if settings.checkpoint:
        hf_config, _ = pr2_mini.read_hf_configs(Path(settings.checkpoint))
        config = pr2_mini.config_from(hf_config)
        task = Questions(settings)
    else:
        task = AdditionTask(settings.operands, settings.largest)
        config = ModelConfig(
            vocab_size=len(task.characters),
            num_hidden_layers=settings.layers,
            moe_intermediate_size=settings.expert_width,
            num_experts=settings.experts,
            num_experts_per_tok=settings.experts_per_token,
            norm_topk_prob=settings.experts_per_token > 1,
        )
    length = settings.max_new_tokens or task.response_length
    if task.prompt_length + length > config.max_position_embeddings:
        raise InputError(
            f"prompts of {task.prompt_length} and responses of {length} tokens exceed the model's "
            f"{config.max_position_embeddings} positions; lower --max-new-tokens"
        )
    rl = dataclasses.replace(settings, max_new_tokens=length, eos=task.eos, pad=task.pad)
    return task, config, rl


def build_model(settings: Settings, config: ModelConfig, task, resume: bool, device, mesh):
    """The policy and the engine that rolls out. Of several processes the first loads or makes the
    weights, and the others get theirs from it; a resumed run gets its own from a checkpoint."""
    if mesh is None and not resume:
        model = base_model(config, task, settings, device)
        return model, pr2_mini.rollout_engine(model, settings.rollout_dtype)
    weights = {}
    if RANK == 0 and not resume:
        if settings.checkpoint:
            weights = MoETransformer.from_pretrained(settings.checkpoint).state_dict()
        else:
            weights = base_model(config, task, settings, torch.device("cpu")).state_dict()
    model = pr2_mini.empty_model(config, "cpu")
    if settings.engine == "vllm":
        engine = VLLMEngine(settings, config)
    else:
        engine = pr2_mini.rollout_engine(model, settings.rollout_dtype)
        engine = place(engine, device, mesh, None)
    if settings.checkpoint:  # keep only the inputs of each block for the backward pass
        for block in model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    model = place(model, device, mesh, torch.bfloat16 if settings.checkpoint else None)
    if mesh is not None and not resume:
        options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        dcp_state.set_model_state_dict(model, weights, options=options)
    return model, engine


def respond(model, task, rl: RLConfig, problems: list, temperature: float, *key, **arguments):
    """A Rollout of the problems, with the random numbers of the key and arguments of `generate`."""
    device = model.routers[0].weight.device
    tokens, attend = task.prompts(problems)
    return pr2_mini.generate(
        model,
        tokens.to(device),
        rl.max_new_tokens,
        eos=rl.eos,
        pad=rl.pad,
        attend=attend.to(device),
        temperature=temperature,
        generator=generator_for(*key, device=device),
        **arguments,
    )


def judge(task, rl: RLConfig, problems: list, rollout: pr2_mini.Rollout) -> tuple[list, Tensor]:
    """The responses as texts, and their rewards; without an end it is 0. Each of the problems has
    as many responses as the rollout has for each of its prompts."""
    samples = len(rollout.tokens) // len(problems)
    asked = [problem for problem in problems for _ in range(samples)]
    responses = task.decode(rollout.tokens[:, rollout.prompt_length :])
    rewards = task.rewards(asked, responses)
    return responses, rewards * rollout.ended(rl.eos).to(rewards.device)


def evaluate(model, task, rl: RLConfig) -> dict[str, float]:
    """Accuracy of the training model on problems that are never trained on, shared out over the
    processes: sampled at temperature 1, and greedy. The same model samples the same."""
    problems = task.problems(EVALUATED, generator_for("held out"), held_out=True)
    mine = problems[RANK::PROCESSES]
    metrics = {}
    for name, temperature in (("held_out_accuracy", 1.0), ("greedy_accuracy", 0.0)):
        rollout = respond(model, task, rl, mine, temperature, "answers", RANK)
        right = judge(task, rl, mine, rollout)[1].sum()
        metrics[name] = float(pr2_mini.mean_over_processes(right)) * PROCESSES / EVALUATED
    return metrics


def show(model, task, rl: RLConfig, problems: list) -> list[list]:
    """Of SHOWN responses of the training model to each problem one, and how many are right."""
    rollout = respond(model, task, rl, problems, 1.0, "answers", RANK, samples=SHOWN)
    responses, rewards = judge(task, rl, problems, rollout)
    return [responses[::SHOWN], rewards.view(-1, SHOWN).sum(1).int().tolist()]


def train(settings, built: tuple, folder: Path, resume: bool, bar: tqdm, alone: bool) -> list[dict]:
    """A whole run of what `build_task` has built, in a folder that is claimed; returns the rows of
    metrics.jsonl. A run that stands alone, not in a comparison, ends with a report."""
    # Build.
    task, config, rl = built
    device, mesh = open_device(settings.device, sharded=bool(settings.checkpoint))
    if RANK == 0 and not resume:
        prepare_folder(folder)
    model, engine = build_model(rl, config, task, resume, device, mesh)
    optimizer = pr2_mini.make_optimizer(model, rl)
    rates = [group["lr"] for group in optimizer.param_groups]
    tensors = tensors_of(model, optimizer)
    # Eight different held-out problems, the same before and after RL.
    drawn = task.problems(64, generator_for("showcase"), held_out=True)
    examples = list(dict.fromkeys(drawn))[:8]
    log = folder / "metrics.jsonl"

    # Maybe resume.
    if resume:
        progress = load_checkpoint(folder, model, tensors)
        if len(progress["before"][0]) != len(examples):
            raise InputError(f"the newest checkpoint in {folder} is of other examples")
    else:
        progress = {"before": show(model, task, rl, examples), "history": []}
    history = progress["history"]
    if RANK == 0:  # with the new --steps of a resumed run
        write_file(folder / "config.json", json.dumps(as_dict(settings), indent=2) + "\n")
    if not resume:
        save_checkpoint(folder, tensors, progress)
    if RANK == 0:  # without the lines after the checkpoint
        write_file(log, "".join(json.dumps(row) + "\n" for row in history))

    tracker = None
    if settings.track != "none" and RANK == 0:
        tracker = importlib.import_module(settings.track)
        tracker.init(project="pr2-mini", name=folder.name, config=as_dict(settings))

    # Loop.
    bar.update(len(history))
    figures = alone and importlib.util.find_spec("matplotlib")
    pictured = figures and settings.engine == "built-in"
    picture = None
    while len(history) < settings.steps:
        step = len(history) + 1
        # Ours: Adam's first steps are as large as its rate allows and would scramble the routers.
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, step / 10)
        # This process's share of the prompts of every mini-step.
        problems = task.problems(rl.prompts, generator_for("prompts", settings.seed, step))
        rows = torch.arange(rl.prompts).view(rl.mini_steps, PROCESSES, -1)[:, RANK].flatten()
        mine = [problems[row] for row in rows.tolist()]
        tokens, attend = task.prompts(mine)

        def reward(rollout: pr2_mini.Rollout) -> Tensor:
            return judge(task, rl, mine, rollout)[1]  # noqa: B023, called before the next batch

        if pictured and step == settings.steps:
            picture = record_routes(model, engine, optimizer, rl, task, examples)
        metrics = pr2_mini.rl_step(
            model,
            engine,
            optimizer,
            rl,
            tokens.to(device),
            reward,
            generator=generator_for("samples", settings.seed, step, RANK, device=device),
            attend=attend.to(device),
        )
        if step % EVALUATE_EVERY == 0 or step in (1, settings.steps):
            metrics.update(evaluate(model, task, rl))
        row = {"step": step}
        for name, value in metrics.items():
            row[name] = value if math.isfinite(value) else None
        history.append(row)
        if RANK == 0:
            with writing(log), open(log, "a") as file:
                file.write(json.dumps(row) + "\n")
        if tracker is not None:
            tracker.log(metrics, step=step)
        # A checkpoint is worth keeping only while updates succeed.
        if not skipped(row) and (step % settings.save_every == 0 or step == settings.steps):
            save_checkpoint(folder, tensors, progress)
        bar.set_postfix(bar_text(history), refresh=False)
        bar.update()
    if tracker is not None:
        tracker.finish()
    if alone:
        bar.close()
        report(settings, folder, model, task, rl, history, examples, progress["before"], picture)
    return history


def skipped(row: dict) -> int:
    """How many updates of a rollout batch were not finite and were skipped."""
    return int(sum(value for name, value in row.items() if name.startswith("skipped/")))


def mini_steps(row: dict, name: str) -> list[float | None]:
    """The values of a metric at mini-steps 1, 2, ... of a rollout batch; None where it is none."""
    kappa = sum(key.startswith("agreement/") for key in row)
    return [row.get(f"{name}/{i}") for i in range(1, kappa + 1)]


def largest_ratio(row: dict) -> float:
    """The largest pi_theta / pi_old, or its inverse, of a rollout batch."""
    values = [value for value in mini_steps(row, "log_ratio_max") if value is not None]
    return math.exp(min(max(values, default=math.inf), 700.0))


def bar_text(history: list[dict]) -> dict[str, str]:
    row = history[-1]
    kappa = len(mini_steps(row, "agreement"))
    text = {
        "reward": f"{mean_of([row], 'reward'):.2f}",
        "agreement": f"{100 * mean_of([row], f'agreement/{kappa}'):.1f}%",
        "largest_ratio": f"{largest_ratio(row):.2g}",
    }
    total = sum(skipped(row) for row in history)
    if total:
        text["skipped"] = str(total)
    return text


# ------------------------------------------------------------------- 8. What a run tells its reader
PHASES = ("rollout", "old_pass", "update")  # of an RL step, each with its seconds


def mean_of(rows: list[dict], name: str) -> float:
    """The mean over those rows that have a number there."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.fmean(values) if values else math.nan


def ending(text: str) -> str:
    return " ".join(text.split())[-SHOWN_WIDTH:].ljust(SHOWN_WIDTH)


def report(settings, folder, model, task, rl, history, examples, before, picture) -> None:
    """The eight problems before and after, the numbers that README.md explains, and the files."""
    texts_before, right_before = before
    texts_after, right_after = show(model, task, rl, examples)
    exported = export(settings, folder, model, len(history)) if settings.checkpoint else None
    states = None if picture is None else route_states(model, rl, task, picture)
    if RANK > 0:
        return
    print(f"\n{'held-out problem':<{SHOWN_WIDTH}} {'before RL':<{SHOWN_WIDTH + 8}} after RL")
    for i, problem in enumerate(examples):
        line = f"{ending(task.text(problem))} "
        for texts, right in ((texts_before, right_before), (texts_after, right_after)):
            line += f"{ending(texts[i])} {right[i]} of {SHOWN}  "
        print(line.rstrip())
    print(f"right before     {sum(right_before)} of {SHOWN * len(examples)}")
    print(f"right after      {sum(right_after)} of {SHOWN * len(examples)}")
    first = history[:10]
    last = history[-10:]
    for name in ("reward", "held_out_accuracy", "greedy_accuracy", "entropy", "truncated"):
        print(f"{name:<17} {mean_of(first, name):.3f} -> {mean_of(last, name):.3f}")
    mean = {name: mean_of(history, name) for name in history[0]}
    for i in range(1, rl.mini_steps + 1):
        print(
            f"agreement/{i:<7} {100 * mean[f'agreement/{i}']:.2f} % of slots "
            f"(stale replay {100 * mean[f'stale_agreement/{i}']:.2f} %), "
            f"{100 * mean[f'no_deviation/{i}']:.2f} % of sets "
            f"(stale replay {100 * mean[f'stale_no_deviation/{i}']:.2f} %)"
        )
    print(f"largest ratio     {max(map(largest_ratio, history)):.3g}")
    print(
        f"engine mismatch   {100 * mean['mismatch_route']:.2f} % of sets, "
        f"{100 * mean['mismatch_token']:.2f} % of tokens in some layer, "
        f"mean |log mu_old - log pi_old| {mean['mismatch_logprob']:.4f}"
    )
    spent = [f"{phase} {mean['seconds_' + phase]:.3f}" for phase in PHASES]
    print(f"seconds per step  {', '.join(spent)}")
    print(f"wrote             {folder / 'metrics.jsonl'}")
    if exported is not None:
        print(f"wrote             {exported}")
    plot = pyplot()
    if plot is not None:
        draw_run(plot, history, states, folder / "run.png")
        print(f"wrote             {folder / 'run.png'}")


def export(settings: Settings, folder: Path, model: MoETransformer, step: int) -> Path:
    """The trained checkpoint as a Hugging Face folder, in bfloat16, with its tokenizer."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp_state.get_model_state_dict(model, options=options)
    path = folder / f"model-{step}"
    if RANK == 0 and not path.exists():
        partial = folder / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        whole = pr2_mini.rollout_engine(pr2_mini.empty_model(model.config, "cpu"), "bf16")
        whole.load_state_dict(weights)
        whole.hf_configs = pr2_mini.read_hf_configs(Path(settings.checkpoint))
        transformers = pr2_mini.import_transformers()
        tokenizer = transformers.AutoTokenizer.from_pretrained(settings.checkpoint)
        with writing(path):
            whole.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            partial.rename(path)
    return path


def record_routes(model, engine, optimizer, rl: RLConfig, task, problems: list) -> pr2_mini.Batch:
    """Before the last rollout batch: responses to some problems with the route that is recorded
    for use after its kappa updates, and the stale one. Leaves the run as it was."""
    i = rl.mini_steps + 1
    fits = [router.drift_fit.clone() for router in model.routers]
    if rl.predicts and rl.predictor == "momentum":
        pr2_mini.set_momentum_predictor(model, optimizer)
    pr2_mini.synchronise(engine, model, rl.rollout_dtype)
    horizon = rl.horizon(i) if rl.method == "pr2" else None
    rollout = respond(engine, task, rl, problems, rl.temperature, "picture", horizon=horizon)
    rows = torch.arange(len(problems))
    advantages = torch.zeros(len(problems), device=rollout.tokens.device)
    generator = generator_for("picture", device=rollout.tokens.device)
    batch, _ = pr2_mini.old_pass(model, rl, rollout, advantages, rows, i, generator)
    for router, fit in zip(model.routers, fits, strict=True):
        router.drift_fit.copy_(fit)
    return batch


STATES = {  # of a set after the last update, and its colour in the picture
    "recorded set is still the current one": "#E5E5E5",
    "prediction caught what stale replay would have missed": "#0072B2",
    "stale replay was right, the recorded set is not": "#E69F00",
    "both miss": "#000000",
}


@torch.no_grad()
def route_states(model, rl: RLConfig, task, batch: pr2_mini.Batch) -> tuple[list[str], Tensor]:
    """The tokens of the longest response, 48 at most, and (L, tokens) numbers of STATES."""
    replay = None if rl.method in ("grpo", "gspo") else batch.recorded
    _, trace = pr2_mini.response_logprobs(model, batch, rl.temperature, replay=replay)
    logits = pr2_mini.at_response(trace.logits, batch.mask)
    k = batch.stale.shape[-1]
    current = logits.topk(k).indices
    recorded = pr2_mini.overlap(pr2_mini.at_response(batch.recorded, batch.mask), current) == k
    stale = pr2_mini.overlap(batch.stale, current) == k
    states = torch.where(recorded, (~stale).int(), 3 - stale.int())
    tokens = batch.tokens[:, -batch.mask.shape[1] :][batch.mask]
    response = batch.mask.nonzero()[:, 0]  # which response each of the n tokens belongs to
    shown = (response == batch.mask.sum(1).argmax()).nonzero().flatten()[:48]
    return task.decode(tokens[shown, None]), states[:, shown].cpu()


# ------------------------------------------------------------------------------- 9. Comparison
def parse_variant(text: str) -> dict:
    """ "pr2:alpha=0.3,predictor=momentum" -> the settings that it changes."""
    method, _, changes = text.partition(":")
    values = {"method": method}
    for change in filter(None, changes.split(",")):
        name, _, value = change.partition("=")
        if name in ("method", "seed", "steps"):
            raise InputError(f'variant "{text}" changes {name}, which is no setting of a variant')
        values[name.replace("-", "_")] = value
    return parse_values(values, f'variant "{text}"')


def digest(value: object) -> str:
    """A name for a folder that is another one for any other value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def compare(given: dict, variants: list[str], seeds: int, out: str) -> int:
    """Trains every variant on every seed from the same base models and prompts; writes the table,
    compare.json and the figure. Finished runs are kept, others are gone on with."""
    if PROCESSES > 1:
        raise InputError("--compare runs in one process; start it without torchrun")
    if "method" in given or seeds < 1:
        raise InputError(
            "--compare takes methods as variants, not as --method, and --seeds above 0"
        )
    variants = variants or list(typing.get_args(RLConfig.__annotations__["method"]))
    changes = {variant: parse_variant(variant) for variant in variants}
    first = given.get("seed", 0)
    runs = {}
    for seed in range(first, first + seeds):
        for variant in variants:
            values = {**given, **changes[variant], "seed": seed}
            defaults = COMPARE_DEFAULTS
            if values.get("checkpoint"):  # the others shape the toy
                defaults = {"steps": COMPARE_DEFAULTS["steps"]}
            settings = make_settings({**defaults, **values})
            if seed == first:
                build_task(settings)  # refuses what does not fit before anything is written
            name = f"{settings.method}-seed{seed}-{digest(as_dict(settings))}"
            if name in runs:
                raise InputError(f"--compare names {variant} twice")
            runs[name] = (variant, settings)
    folder = Path(out or f"runs/compare-{digest([given, variants, seeds])}")
    with claim(folder):
        histories = {variant: [] for variant in variants}
        with tqdm(total=sum(settings.steps for _, settings in runs.values())) as bar:
            for name, (variant, settings) in runs.items():
                bar.set_description(name)
                histories[variant].append(run_of_comparison(settings, folder / name, bar))
        columns = {variant: [summary(run) for run in runs] for variant, runs in histories.items()}
        table = table_of(columns)
        result = {"given": given, "seeds": seeds, "table": table, "runs": columns}
        write_file(folder / "compare.json", json.dumps(result, indent=1) + "\n")
        print_table(table, seeds)
        print(f"wrote             {folder / 'compare.json'}")
        plot = pyplot()
        if plot is not None:
            draw_comparison(plot, table, histories, folder / "compare.png")
            print(f"wrote             {folder / 'compare.png'}")
    return 0


def run_of_comparison(settings: Settings, folder: Path, bar: tqdm) -> list[dict]:
    """A run's rows. A finished one has metrics and, to save space, no checkpoint."""
    log = folder / "metrics.jsonl"
    unfinished = bool(checkpoints_of(folder))
    if not unfinished and log.exists():
        bar.update(settings.steps)
        return read_metrics(log, settings.steps)
    with claim(folder):
        built = build_task(settings)
        history = train(settings, built, folder, unfinished, bar, alone=False)
        done = folder / "checkpoint.partial"
        (folder / "checkpoint").rename(done)  # finished, from here on
        shutil.rmtree(done)
    return history


def summary(history: list[dict]) -> dict[str, float | None]:
    """A number a column for one run; "name/i" in % at mini-step i, over batches 11 and later, when
    the learning rate has risen. Of the deviating slots that stale replay would have had on the same
    tokens, "removed" is the share that is not there."""
    settled = history[10:] or history
    columns = {
        "reward": mean_of(history[-10:], "reward"),
        "reward, second half": mean_of(history[len(history) // 2 :], "reward"),
        "held-out accuracy": mean_of(history[-1:], "held_out_accuracy"),
        "greedy accuracy": mean_of(history[-1:], "greedy_accuracy"),
    }
    kappa = len(mini_steps(history[0], "agreement"))
    shares = ("no_deviation", "stale_no_deviation", "agreement", "stale_agreement")
    for name in (*shares, "deviations_1", "deviations_2", "deviations_3_or_more"):
        for i in range(1, kappa + 1):
            columns[f"{name}/{i}"] = 100 * mean_of(settled, f"{name}/{i}")
    for i in range(2, kappa + 1):
        deviating = 100 - columns[f"stale_agreement/{i}"]
        gained = columns[f"agreement/{i}"] - columns[f"stale_agreement/{i}"]
        columns[f"removed/{i}"] = 100 * gained / deviating if deviating > 0 else math.nan
    columns["KL"] = mean_of(settled, f"approx_kl/{kappa}")
    cut = mean_of(settled, f"clipfrac_low/{kappa}") + mean_of(settled, f"clipfrac_high/{kappa}")
    columns["clipfrac"] = cut
    columns["log10 largest ratio"] = math.log10(max(map(largest_ratio, settled)))
    columns["mismatch_logprob"] = mean_of(settled, "mismatch_logprob")
    columns["mismatch_route"] = 100 * mean_of(settled, "mismatch_route")
    columns["mismatch_token"] = 100 * mean_of(settled, "mismatch_token")
    columns["seconds a step"] = sum(mean_of(settled, f"seconds_{phase}") for phase in PHASES)
    columns["skipped updates"] = sum(skipped(row) for row in history)
    return {name: value if math.isfinite(value) else None for name, value in columns.items()}


def interval(values: list[float]) -> float | None:
    """Half the 95 % interval of the mean, by Student's t."""
    if len(values) < 2:
        return None
    t95 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # 1 to 9 degrees of freedom
    freedom = len(values) - 1
    t = t95[freedom - 1] if freedom <= 9 else 1.96 + 2.5 / freedom
    return t * statistics.stdev(values) / math.sqrt(len(values))


def table_of(columns: dict[str, list[dict]]) -> dict[str, dict[str, list]]:
    """variant -> column -> [mean over seeds, half a 95 % interval]: of the paired difference to the
    first variant, and of the mean itself for that one and for "removed", a difference already."""
    base = next(iter(columns.values()))
    table = {}
    for variant, runs in columns.items():
        table[variant] = {}
        for name in runs[0]:
            values = [run[name] for run in runs]
            others = [run.get(name) for run in base]
            if None in values:
                table[variant][name] = [None, None]
            elif runs is base or name.startswith("removed") or None in others:
                table[variant][name] = [statistics.fmean(values), interval(values)]
            else:
                paired = [value - other for value, other in zip(values, others, strict=True)]
                table[variant][name] = [statistics.fmean(values), interval(paired)]
    return table


def print_table(table: dict, seeds: int) -> None:
    """A Markdown table; a column with mini-steps has a value for each of them."""
    print(f"\n{seeds} seeds; ± is half a 95 % interval: of the paired difference to the first row,")
    print("and in that row, and for removed, of the mean. Shares in %, at mini-steps 1, 2, ...")
    hidden = ("agreement", "stale_agreement", "deviations_")
    names = [name.partition("/")[0] for columns in table.values() for name in columns]
    shown = [name for name in dict.fromkeys(names) if not name.startswith(hidden)]
    print("| variant | " + " | ".join(shown) + " |")
    print("|" + " --- |" * (len(shown) + 1))
    for variant, columns in table.items():
        cells = {name: [] for name in shown}
        for name, (mean, width) in columns.items():
            text = "n/a" if mean is None else f"{mean:.3g}"
            text += "" if width is None else f" ± {width:.2g}"
            if name.partition("/")[0] in cells:
                cells[name.partition("/")[0]].append(text)
        print(f"| {variant} | " + " | ".join(", ".join(cell) for cell in cells.values()) + " |")


# ---------------------------------------------------------------------------------- 10. Figures
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999"]


def pyplot():
    """matplotlib's pyplot, or None and a word on how to get it."""
    try:
        import matplotlib.pyplot as plot
    except ImportError:
        print("no figure         pip install matplotlib draws one")
        return None
    plot.switch_backend("Agg")
    warnings.filterwarnings("ignore", "Glyph .* missing")  # tokens may be any bytes
    plot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plot


def curve(runs: list[list[dict]], name: str, smooth: int = 1) -> tuple[list[int], list[float]]:
    """Where runs have a number of that name, and its mean over them and the last `smooth` rows."""
    x = [row["step"] for row in runs[0] if row.get(name) is not None]
    means = [mean_of([run[step - 1] for run in runs], name) for step in x]
    y = [statistics.fmean(means[max(0, j - smooth) : j]) for j in range(1, len(means) + 1)]
    return x, y


def draw_run(plot, history: list[dict], states, path: Path) -> None:
    """run.png: reward, agreement and, of a run that was not resumed at its end, the routes."""
    figure = plot.figure(figsize=(9, 5.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3, 2])
    reward, agreement = top.subplots(1, 2)
    last = len(mini_steps(history[0], "agreement"))
    curves = [
        (reward, "reward", 1, "#0072B2", "-", "sampled, training"),
        (reward, "held_out_accuracy", 1, "#D55E00", ".-", "sampled, held out"),
        (reward, "greedy_accuracy", 1, "#999999", ".--", "greedy, held out"),
        (agreement, f"agreement/{last}", 100, "#D55E00", "-", f"recorded, mini-step {last}"),
        (agreement, f"stale_agreement/{last}", 100, "#000000", ":", "stale replay there"),
    ]
    for axes, name, scale, colour, line, label in curves:
        x, y = curve([history], name)
        axes.plot(x, [scale * value for value in y], line, color=colour, label=label, linewidth=1)
        axes.legend(frameon=False)
    reward.set(title="Share of right answers", xlabel="rollout batch")
    agreement.set(title="Recorded experts that are still current, %", xlabel="rollout batch")
    if states is not None:
        draw_routes(plot, bottom, *states)
    figure.savefig(path)
    plot.close(figure)


def draw_routes(plot, figure, tokens: list[str], states: Tensor) -> None:
    """Layers down, the tokens of a response across, a colour for each of STATES."""
    grid = figure.subplots()
    colours = plot.matplotlib.colors.ListedColormap(list(STATES.values()))
    grid.pcolormesh(states.tolist(), cmap=colours, vmin=0, vmax=3, edgecolors="white", linewidth=2)
    grid.set(title="Routes of a response, after the last updates", ylabel="layer")
    ticks = [place + 0.5 for place in range(len(tokens))]
    grid.set_xticks(ticks, tokens, fontfamily="monospace", parse_math=False)
    grid.set_yticks([layer + 0.5 for layer in range(len(states))], range(1, 1 + len(states)))
    grid.invert_yaxis()
    grid.tick_params(length=0)
    Patch = plot.matplotlib.patches.Patch
    patches = [Patch(color=colour, label=name) for name, colour in STATES.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, frameon=False)


def draw_comparison(plot, table: dict, histories: dict[str, list[list[dict]]], path: Path) -> None:
    """compare.png: reward, held-out accuracy, the one against the other, agreement by mini-step,
    the largest ratio, and the legend."""
    figure, grid = plot.subplots(3, 2, figsize=(9, 9.6), layout="constrained")
    reward, held_out, agreement, largest, engines, legend = grid.flat
    for number, (variant, runs) in enumerate(histories.items()):
        look = {"color": COLOURS[number % 8], "marker": "osv^DPX*"[number % 8], "linewidth": 1}
        mini = range(1, len(mini_steps(runs[0][0], "agreement")) + 1)
        shares = [table[variant][f"agreement/{i}"][0] for i in mini]
        stale = [table[variant][f"stale_agreement/{i}"][0] for i in mini]
        peaks = [max(map(largest_ratio, rows)) for rows in zip(*runs, strict=True)]
        steps, rewards = curve(runs, "reward", smooth=10)
        evaluated, accuracies = curve(runs, "held_out_accuracy", smooth=3)
        curves = [
            (reward, steps, rewards),
            (held_out, evaluated, accuracies),
            (agreement, mini, shares),
            (largest, steps, peaks),
            (engines, [rewards[step - 1] for step in evaluated], accuracies),
        ]
        for axes, x, y in curves:
            axes.plot(x, y, label=variant, markevery=max(1, len(x) // 8), markersize=4, **look)
        agreement.plot(mini, stale, ":", color=look["color"], linewidth=1)
    reward.set(title="Sampled reward (mean of 10 batches)", xlabel="rollout batch")
    held_out.set(title="Held-out accuracy (mean of 3)", xlabel="rollout batch")
    agreement.set(title="Recorded experts that are still current, %")
    agreement.set_xlabel("mini-step; dotted: stale counterfactual")
    agreement.xaxis.get_major_locator().set_params(integer=True)
    largest.set(title="Largest PPO ratio of any seed", xlabel="rollout batch", yscale="log")
    engines.set(title="Do the engines train apart?", xlabel="sampled reward, rollout engine")
    engines.set_ylabel("held-out accuracy, training engine")
    legend.axis("off")
    legend.legend(*reward.get_legend_handles_labels(), loc="center", frameon=False)
    figure.savefig(path, dpi=100)
    plot.close(figure)


# ------------------------------------------------------------------------------- 11. Benchmark
def milliseconds(calls: list[Callable], rounds: int) -> list[list[float]]:
    """Of every call, in turn, so that a slow spell of the machine hits all alike; the first round
    only warms up."""
    taken = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, times in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - start))
    return [times[1:] for times in taken]


def benchmark(settings: Settings, rounds: int = 20) -> int:
    """Prints the phases of an RL step for GRPO and PR2, and training and generation beside
    transformers, if that is installed: medians."""
    task, config, rl = build_task(settings)
    device, _ = open_device(settings.device, sharded=False)
    print(f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads, medians")
    problems = task.problems(rl.prompts, generator_for("benchmark"))
    tokens, _ = task.prompts(problems)
    steps = []
    rows = {}
    for method, predictor in (("grpo", "learned"), ("pr2", "learned"), ("pr2", "momentum")):
        settings = dataclasses.replace(rl, method=method, predictor=predictor, eos=-1)
        model = MoETransformer(config).to(device)
        step = functools.partial(
            pr2_mini.rl_step,
            model,
            pr2_mini.rollout_engine(model, rl.rollout_dtype),
            pr2_mini.make_optimizer(model, settings),
            settings,
            tokens.to(device),
            lambda rollout: rollout.tokens.sum(1).float(),
        )
        name = f"{method}, {predictor}" if method == "pr2" else method
        rows[name] = []
        steps.append(lambda step=step, kept=rows[name]: kept.append(step()))
    taken = milliseconds(steps, rounds)
    print("\n| RL step, ms | rollout | old pass | update | whole | over grpo |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (name, kept), times in zip(rows.items(), taken, strict=True):
        phases = []
        for phase in PHASES:
            seconds = statistics.median(row[f"seconds_{phase}"] for row in kept[1:])
            phases.append(f"{1000 * seconds:.0f}")
        over = statistics.median(a / b for a, b in zip(times, taken[0], strict=True))
        whole = statistics.median(times)
        print(f"| {name} | {' | '.join(phases)} | {whole:.0f} | {100 * (over - 1):+.1f} % |")
    if importlib.util.find_spec("transformers"):
        beside_transformers(device, rounds)
    return 0


def beside_transformers(device: torch.device, rounds: int) -> None:
    """A training step of 512 x 28 tokens and 512 x 16 sampled ones, top-2 of 16 experts."""
    transformers = pr2_mini.import_transformers()
    config = ModelConfig(32, moe_intermediate_size=64, num_experts=16, num_experts_per_tok=2)
    model = MoETransformer(config).to(device)
    hf_config = pr2_mini.hf_config_of(config)
    peer = transformers.Qwen3MoeForCausalLM._from_config(
        hf_config, experts_implementation="grouped_mm"
    ).to(device)
    ids = torch.randint(2, 32, (512, 28), device=device)
    prompts = ids[:64, :12]

    def train_on(logits: Tensor) -> None:
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()

    def sample_theirs() -> None:
        peer.generate(prompts, do_sample=True, num_return_sequences=8, max_new_tokens=16)

    calls = [
        lambda: train_on(model(ids)[0]),
        lambda: train_on(peer(input_ids=ids, use_cache=False).logits),
        lambda: pr2_mini.generate(model, prompts, 16, eos=-1, pad=0, samples=8),
        sample_theirs,
    ]
    taken = milliseconds(calls, rounds)
    print(f"\n| transformers {transformers.__version__} | pr2_mini, ms | theirs, ms | ratio |")
    print("| --- | --- | --- | --- |")
    for name, own, other in (("training step", 0, 1), ("generation", 2, 3)):
        ratio = statistics.median(b / a for a, b in zip(taken[own], taken[other], strict=True))
        ours = statistics.median(taken[own])
        theirs = statistics.median(taken[other])
        print(f"| {name} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} |")


# ------------------------------------------------------------------------------------ 12. Main
def run(given: dict, out: str, resume: str) -> int:
    """A single run, new or resumed; returns the exit code."""
    if resume:
        folder = Path(resume)
        path = folder / "config.json"
        saved = parse_values(read_json(path), str(path))
        for name, value in given.items():
            if name not in MAY_CHANGE and saved.get(name) != value:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} {value} contradicts {folder}, {saved.get(name)}")
        missing = {field.name for field in SETTINGS} - saved.keys()
        if missing:
            raise InputError(f"{path} lacks {min(missing)}")
        settings = make_settings({**saved, **given})
    else:
        settings = make_settings(given)
        if PROCESSES > 1 and not out:
            raise InputError("torchrun needs --out, one folder for all processes")
        unique = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        folder = Path(out or f"runs/{settings.method}-seed{settings.seed}-{unique}")
    built = build_task(settings)  # refuses what does not fit before anything is written
    title = f"RL with {settings.method}"
    try:
        with claim(folder), tqdm(total=settings.steps, desc=title, disable=RANK > 0) as bar:
            history = train(settings, built, folder, bool(resume), bar, alone=True)
    except KeyboardInterrupt:
        begun = checkpoints_of(folder)
        words = f"to go on: --resume {folder}" if begun else "it had no checkpoint yet"
        print(f"\nstopped; {words}", file=sys.stderr)
        return 130
    total = sum(skipped(row) for row in history)
    if total:
        print(f"{total} updates were not finite and were skipped", file=sys.stderr)
    if skipped(history[-1]):
        kept = checkpoints_of(folder)[-1].name
        print(f"the last update was skipped too; the checkpoint kept is {kept}", file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str]) -> int:
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open to the end
    try:
        actions, given = parse(arguments)
        if actions.benchmark:
            if given.get("checkpoint"):
                raise InputError("--benchmark times the toy; leave out --checkpoint")
            return benchmark(make_settings(given))
        if actions.compare is not None:
            if actions.resume:
                raise InputError("--compare goes on by itself; repeat it without --resume")
            return compare(given, actions.compare, actions.seeds, actions.out)
        code = run(given, actions.out, actions.resume)
        if dist.is_initialized():  # not after an error: it would wait for processes that go on
            dist.destroy_process_group()
        return code
    except InputError as error:  # nothing else is: a bug keeps its traceback
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; a comparison goes on when its command is repeated", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
