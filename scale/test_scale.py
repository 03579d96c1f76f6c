"""What must be true of scale/: one fact a test."""

import copy
import importlib.util
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from torch import nn
from torch.distributed.tensor import DTensor

import test_pr2_mini as core
from test_pr2_mini import close, draws, parametrize, randomise_predictor, same_bits, table

pytest.importorskip("transformers", reason="pip install transformers math-verify")
pytest.importorskip("math_verify", reason="pip install transformers math-verify")
import transformers
from safetensors.torch import load_file, save_file

import pr2_mini
from pr2_mini import RLConfig, RolloutEngine, generate, overlap
from scale import bench, checkpoints, make_small, processes, train
from scale.checkpoints import CheckpointError
from scale.processes import PROCESSES, RANK, PiecewiseEngine

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
FAMILIES = ["qwen3_moe", "olmoe", "mixtral"]


# ------------------------------------------------------------------------------ 1. Checkpoints
TOKENS = torch.tensor([[0, 0, 5, 6, 11], [7, 8, 9, 10, 12]])  # 0 is padding
PADS = torch.tensor([2, 0])
GATE = "model.layers.1.mlp.gate.weight"
REAL = TOKENS != 0


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


def hf_load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def agree(model, theirs, **forward):
    """What the two compute for real tokens, and that they take the same experts."""
    logits, trace = model(TOKENS, PADS, **forward)
    output = theirs(TOKENS, attention_mask=REAL.long(), output_router_logits=True)
    close(logits[REAL], output.logits[REAL], tolerance=1e-4)
    p = torch.stack(output.router_logits).view(trace.logits.shape)[:, REAL]
    same = overlap(trace.experts[:, REAL], p.topk(2).indices) == 2
    best = p.topk(3).values
    clear = best[..., 1] - best[..., 2] > 1e-4 * p.abs().max()  # else rounding may decide
    assert clear.float().mean() > 0.9 and same[clear].all()


VARIANTS = [(kind, {}) for kind in FAMILIES]
VARIANTS += [("qwen3_moe", {"norm_topk_prob": False}), ("olmoe", {"norm_topk_prob": True})]


@pytest.fixture(scope="session", params=VARIANTS, ids=str)
def saved(request, tmp_path_factory):
    """A folder, the model of transformers that it holds, and ours with a W_p."""
    kind, changes = request.param
    folder = tmp_path_factory.mktemp(kind) / "model"
    theirs = hf_model(kind, folder, **changes)
    ours = randomise_predictor(checkpoints.load(folder))
    return SimpleNamespace(folder=folder, theirs=theirs, ours=ours)


@parametrize("replayed", [False, True])
def test_loaded_model_routes_and_computes_as_transformers_does(replayed, saved):
    _, trace = saved.ours(TOKENS, PADS)
    agree(saved.ours, saved.theirs, replay=trace.experts.flip(-1) if replayed else None)


def test_stacked_experts_are_taken_without_a_copy(saved, monkeypatch):
    seen = []
    original = transformers.PreTrainedModel.from_pretrained.__func__

    def keep(cls, *arguments, **options):
        seen.append(original(cls, *arguments, **options))
        return seen[0]

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(keep))
    experts = checkpoints.load(saved.folder).blocks[1].moe.gate_up
    assert experts.data_ptr() == seen[0][0].model.layers[1].mlp.experts.gate_up_proj.data_ptr()


def test_greedy_rollout_equals_the_generation_of_transformers(saved):
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = saved.theirs.generate(TOKENS, attention_mask=REAL.long(), **settings)
    config = RLConfig(samples=1, max_new_tokens=8, temperature=0.0, eos=(-1,))
    assert torch.equal(generate(saved.ours, config, TOKENS, PADS).tokens, expected)


@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_model_is_the_same_and_only_routers_keep_float32(dtype, saved, tmp_path):
    model = randomise_predictor(checkpoints.load(saved.folder, dtype))
    assert model.blocks[1].moe.gate_up.dtype == dtype
    assert torch.equal(model.routers[1].weight, saved.ours.routers[1].weight)
    checkpoints.save(model, saved.folder, tmp_path / "again")
    same_bits(checkpoints.load(tmp_path / "again", dtype).state_dict(), model.state_dict())


def test_transformers_loads_the_saved_folder_and_its_generation_config(saved, tmp_path):
    source = shutil.copytree(saved.folder, tmp_path / "model")
    transformers.GenerationConfig(eos_token_id=[3, 4]).save_pretrained(source)
    checkpoints.save(saved.ours, source, tmp_path / "again")
    again = hf_load(tmp_path / "again")
    same_bits(again.state_dict(), saved.theirs.state_dict())
    assert again.generation_config.eos_token_id == [3, 4]


def test_folded_folder_routes_by_the_prediction_in_any_engine(saved, tmp_path):
    checkpoints.save(saved.ours, saved.folder, tmp_path / "trained")
    checkpoints.fold(tmp_path / "trained", tmp_path / "folded", horizon=0.5)
    engine = RolloutEngine(saved.ours, RLConfig())
    engine.load(saved.ours, horizon=0.5)
    agree(engine.model, hf_load(tmp_path / "folded"))
    routers = checkpoints.load(tmp_path / "folded").routers
    assert not any(router.predictor.any() for router in routers)


@parametrize("error", [OSError, KeyboardInterrupt])
def test_failed_save_leaves_nothing_behind(error, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "save_file", mock.Mock(side_effect=error))
    with pytest.raises(error):
        checkpoints.save(saved.ours, saved.folder, tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_folder_that_exists_is_not_written_over(saved, tmp_path):
    with pytest.raises(CheckpointError, match="exists; choose another folder"):
        checkpoints.save(saved.ours, saved.folder, tmp_path)
    assert not any(tmp_path.iterdir())


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(folder, weight, other):
    path = folder / "model.safetensors"
    assert weight in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(weight, other))


rename_a_gate = partial(rename, weight=b"layers.1.mlp.gate.", other=b"layers.1.mlp.else.")
rename_an_expert = partial(rename, weight=b"1.mlp.experts.3.up_p", other=b"1.mlp.experts.3.op_p")


def reshape_a_predictor(folder):
    path = folder / "predictor" / "model.safetensors"
    predictors = load_file(path)
    name = next(name for name in predictors if "layers.1." in name)
    save_file(predictors | {name: predictors[name].T.contiguous()}, path)


def pickle_weights(folder):  # which could run code when they are read
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@table(
    ("damage", "message"),
    (rename_a_gate, f"do not fit .*missing_keys.*{GATE}.*unexpected_keys.*mlp.else.weight"),
    (pickle_weights, "cannot be read"),
    (lambda folder: os.truncate(folder / "model.safetensors", 50), "cannot be read"),
    (lambda folder: os.truncate(folder / "predictor/model.safetensors", 50), "cannot be read"),
    (lambda folder: os.truncate(folder / "config.json", 50), "no config.json that can be read"),
    (partial(edit_config, num_experts="8"), "no config.json that can be read"),
    (partial(edit_config, vocab_size=48), "do not fit .*mismatched_keys.*embed_tokens"),
    (partial(edit_config, num_experts=4), "do not fit .*mismatched_keys.*experts.down_proj"),
    (rename_an_expert, "the weights in .* cannot be read"),
    (reshape_a_predictor, "do not fit .*mlp.gate.predictor"),
    (partial(edit_config, model_type="qwen2_moe"), "model_type is qwen2_moe"),
    (partial(edit_config, rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope scaling"),
    (partial(edit_config, sliding_window=16), "sliding_window 16"),
    (partial(edit_config, attention_bias=True), "attention_bias True"),
    (partial(edit_config, clip_qkv=8.0), "clip_qkv 8.0"),
    (partial(edit_config, hidden_act="gelu"), "hidden_act gelu"),
    (partial(edit_config, mlp_only_layers=[0]), "mlp_only_layers .0."),
    (partial(edit_config, decoder_sparse_step=2), "decoder_sparse_step 2"),
    (partial(edit_config, quantization_config={"quant_method": "fp8"}), "quantization_config"),
    (partial(edit_config, tie_word_embeddings=True), "tie_word_embeddings True"),
    (partial(edit_config, num_attention_heads=0), "cannot be trained: .*zero"),
    (partial(edit_config, intermediate_size=20), "intermediate_size"),  # not a multiple of 8
)
def test_folder_that_is_damaged_or_not_implemented_is_refused(damage, message, tmp_path):
    hf_model("olmoe", tmp_path / "model")
    checkpoints.save(checkpoints.load(tmp_path / "model"), tmp_path / "model", tmp_path / "again")
    damage(tmp_path / "again")
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(tmp_path / "again")


# ---------------------------------------------------------------------------- 2. Many processes
TOGETHER = {method: {"method": method} for method in ("grpo", "r2", "pr2", "r3", "pr3")}
TOGETHER["momentum"] = {"prediction": "momentum"}
TOGETHER["sequence ratio"] = {"ratio": "sequence"}
TOGETHER["micro-batches"] = {"micro_batch": 3}
TOGETHER["not finite"] = {"schedule": "constant"}


def without_chance(model, config, prompts, pads, generator=None):
    """`generate`, but greedy: the samples differ in the last token of their prompts."""
    prompts = prompts.repeat_interleave(config.samples, dim=0)
    prompts[:, -1] += torch.arange(len(prompts)) % config.samples
    pads = pads.repeat_interleave(config.samples)
    return generate(model, replace(config, samples=1, temperature=0.0), prompts, pads)


def train_together(case, mesh=None):
    """RL steps by this process and the others, if there are any: what it found."""
    ends = tuple(range(1, 22, 2))  # half of all tokens, so that responses differ in length
    changes = {"method": "pr3", "learning_rate": 1e-2, "alpha": 1.0, "beta1": 0.9} | TOGETHER[case]
    config = RLConfig(samples=2, max_new_tokens=6, max_grad_norm=0.1, eos=ends, **changes)
    model = randomise_predictor(core.tiny_model(vocab_size=23, num_experts_per_tok=4)).cpu()
    if mesh is None:
        engine = RolloutEngine(model, config)
    else:
        whole = model
        model = copy.deepcopy(whole).to("meta")
        engine = PiecewiseEngine(model, config, most=3)
        processes.shard(engine.model, mesh, None, trains=False)
        processes.shard(model, mesh, None, trains=True)
        processes.fill(model, lambda: whole)
    optimizer = pr2_mini.make_optimizer(model, config)
    for group in optimizer.param_groups:
        group["eps"] = 1e-2  # or Adam would turn the rounding of a zero gradient into a full step
    prompts, pads = [tensor.cpu() for tensor in core.padded(4, 2, 4, 3, 1, 4, 3, 4)]
    mine = torch.arange(8).view(2, PROCESSES if mesh else 1, -1)[:, RANK if mesh else 0].flatten()
    rewards = torch.rand(8, 2, generator=draws())
    seen = SimpleNamespace(metrics=[], lengths=[], weights={}, parts={})

    def reward(rollout):
        seen.lengths += rollout.mask.sum(1).tolist()
        return rewards[mine].flatten()

    def advantages(rewards):
        values = original(rewards)
        return values.masked_fill((mine[:, None] == 7) & (case == "not finite"), math.nan)

    original = pr2_mini.group_advantages
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pr2_mini, "generate", without_chance)
        patch.setattr(pr2_mini, "group_advantages", advantages)
        for _ in range(2):  # at first there is no momentum
            step = (model, engine, optimizer, config, prompts[mine], pads[mine], reward)
            seen.metrics.append(pr2_mini.rl_step(*step))
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            seen.parts[name] = parameter.to_local().numel() / parameter.numel()
            parameter = parameter.full_tensor()
        seen.weights[name] = parameter.detach().clone()
    return seen


def run(flags):
    """What `python -m scale.train FLAGS` prints, in this process, and its exit code."""
    try:
        return core.toy(flags, figures=True, main=train.main)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def use_one_group():
    """For all runs of this process: its mesh, which they share."""
    if not dist.is_initialized():
        mesh = processes.start("cpu")
        processes.start = lambda device: mesh
        dist.destroy_process_group = lambda: None
    return processes.start("cpu")


def whole_and_killed(folder, flags, call):
    """What each of two processes does: a whole run, and another in which the second of them dies
    at a call of rl_step, and the first with it."""
    use_one_group()
    train.main(f"{flags} --out {folder}/whole".split())
    if RANK == 1:
        core.killed(f"{flags} --out {folder}/killed", "after", train, "rl_step", call, run)
    else:
        train.main(f"{flags} --out {folder}/killed".split())
    os.kill(os.getpid(), signal.SIGKILL)


def work(folder, flags):
    """What each of the two processes of the fixture `together` does. In the end they die."""
    mesh = use_one_group()
    found = {case: train_together(case, mesh) for case in TOGETHER}
    torch.save(found, f"{folder}/{RANK}")
    for name, changes in METHODS.items():
        train.main(f"{flags} --steps 2 {changes} --out {folder}/{name}".split())
    whole_and_killed(folder, f"{flags} --steps 4 --save-every 2", call=4)


METHODS = {method: f"--method {method}" for method in ("grpo", "r2", "pr2", "r3", "pr3")}
METHODS["momentum"] = "--prediction momentum"
METHODS["bf16"] = "--dtype bf16 --rollout-dtype bf16"
HERE = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
RESUME = [*TORCHRUN, "-m", "scale.train", "--resume"]


def launch(*command, dies=False):
    """Runs a command that succeeds, unless it dies. It has one thread, as here: another number
    would sum in another order."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE, env=environment, text=True, capture_output=True)
    assert (done.returncode != 0) == dies, done.stderr
    print(done.stderr)


def call_of(function, *arguments):
    """The command that calls a function of this file."""
    code = f"from scale import test_scale; test_scale.{function.__name__}{arguments!r}"
    return [sys.executable, "-c", code]


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with a small checkpoint and its questions: model and sums.jsonl."""
    folder = tmp_path_factory.mktemp("small")
    make_small.make(folder, numbers=3, largest=4, slip=0.3, steps=100)
    return folder


@pytest.fixture(scope="session")
def small(files):
    """The flags of a small job."""
    sizes = "--prompts 8 --samples 4 --max-new-tokens 8 --prompt-length 20 --evaluated 4"
    rates = "--learning-rate 1e-3 --micro-batch 16 --dtype fp32 --rollout-dtype fp32 --device cpu"
    return f"--checkpoint {files}/model --data {files}/sums.jsonl {sizes} {rates}"


@pytest.fixture(scope="session")
def together(small, tmp_path_factory):
    """The folder in which two processes have worked until one of them was killed, what the two
    found in every case, and what one process finds."""
    folder = tmp_path_factory.mktemp("together")
    launch(*TORCHRUN, "--no-python", *call_of(work, str(folder), small), dies=True)
    assert (folder / "killed").exists()
    ranks = [torch.load(folder / str(rank), weights_only=False) for rank in range(2)]
    single = {case: train_together(case) for case in TOGETHER}
    return SimpleNamespace(folder=folder, ranks=ranks, single=single)


@parametrize("case", list(TOGETHER))
def test_two_processes_train_as_one_does(case, together):
    single = together.single[case]
    first, second = (found[case] for found in together.ranks)
    same_bits(first.weights, second.weights)
    close(first.weights, single.weights)
    assert sorted(first.lengths + second.lengths) == sorted(single.lengths)
    for found in (first, second):
        for row, expected in zip(found.metrics, single.metrics, strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-5, nan_ok=True)
            assert [row["skipped/1"], row["skipped/2"]] == [0, case == "not finite"]


def test_each_process_holds_its_half_of_all_but_the_routers(together):
    for rows, found in zip((12, 11), together.ranks, strict=True):  # of 23 tokens
        single = together.single["pr3"].weights
        parts = dict.fromkeys((name for name in single if ".router." not in name), 0.5)
        parts.update({"embed.weight": rows / 23, "lm_head.weight": rows / 23})
        assert found["pr3"].parts == parts


# ------------------------------------------------------------------------------------- 3. Jobs
def job(flags, code=0):
    """What a job prints until it ends with the code."""
    done = run(flags)
    assert done.code == code, done.errors
    return done.output + done.errors


def refusal(flags):
    """The sentence with which the command refuses."""
    return job(flags, code=2).rpartition("error: ")[2]


def rows(folder):
    """metrics.jsonl, without what only the clock says."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    history = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # there is no NaN
    return [{**row, "seconds": 0.0} for row in history]


def same_run(folder, other, steps):
    """The same metrics and weights, W_p too, bit for bit."""
    assert rows(folder) == rows(other)
    models = [checkpoints.load(run / f"model-{steps}") for run in (folder, other)]
    same_bits(models[0].state_dict(), models[1].state_dict())


@pytest.fixture(scope="session")
def alone(small, tmp_path_factory):
    """A run of one process, with a checkpoint after each of two rollout batches."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    job(f"{small} --steps 2 --save-every 1 --out {folder}")
    return folder


def test_killed_job_resumes_to_the_same_bits_on_as_many_processes(together):
    folder = together.folder / "killed"
    found = processes.checkpoints_of(folder)
    assert [path.name for path in found] == ["step-2"]  # it was killed in the fourth
    launch(*RESUME, str(folder))
    same_run(folder, together.folder / "whole", steps=4)


def test_job_of_one_process_goes_on_in_two(alone, tmp_path):
    folder = shutil.copytree(alone, tmp_path / "run")
    launch(*RESUME, str(folder), "--steps", "3")
    assert rows(folder)[:2] == rows(alone)
    assert [row["step"] for row in rows(folder)] == [1, 2, 3]


def test_job_of_two_processes_goes_on_in_one_with_moved_files(together, files, tmp_path):
    folder = shutil.copytree(together.folder / "pr3", tmp_path / "run")
    (folder / "step-3" / "file").mkdir(parents=True)  # no checkpoint, and neither is this
    (folder / "step-2 (copy)").mkdir()
    moved = shutil.copytree(files, tmp_path / "moved")
    flags = f"--checkpoint {moved}/model --data {moved}/sums.jsonl"
    assert f"wrote             {folder / 'model-3'}" in job(f"--resume {folder} --steps 3 {flags}")
    assert rows(folder)[:2] == rows(together.folder / "pr3")


@parametrize("name", METHODS)
def test_checkpoint_trained_by_each_method_generates_in_transformers(name, together):
    folder = together.folder / name / "model-2"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.encode("<bos><user>What is two plus one plus four?<end><bot>")
    tokens = torch.tensor([prompt])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = hf_load(folder).generate(tokens, **settings)
    config = RLConfig(samples=1, max_new_tokens=6, temperature=0.0, eos=(-1,))
    pads = torch.zeros(1, dtype=torch.int64)
    assert torch.equal(generate(checkpoints.load(folder), config, tokens, pads).tokens, expected)


@parametrize("name", ["pr3", "bf16"])
def test_job_trains_all_kinds_of_weights_in_float32(name, files, together):
    before = checkpoints.load(files / "model").state_dict()
    after = checkpoints.load(together.folder / name / "model-2").state_dict()
    moved = {weight for weight in before if not torch.equal(before[weight], after[weight])}
    assert {"embed.weight", "blocks.0.moe.router.weight", "blocks.1.moe.down"} <= moved
    assert "blocks.1.moe.router.predictor" in moved
    largest = (after["embed.weight"] - before["embed.weight"]).abs().max()
    assert largest < 1e-3  # four updates at a fifth of 1e-3; bfloat16 would round to multiples


def test_small_checkpoint_answers_some_questions_and_not_all(together):
    assert all(0.1 < row["reward"] < 0.9 for row in rows(together.folder / "grpo"))


def test_killed_before_its_first_checkpoint_a_run_begins_anew(alone, small, tmp_path):
    flags = f"{small} --steps 2 --out {tmp_path / 'run'}"
    core.killed(flags, "after", train, "rl_step", 1, run)
    again = shutil.copytree(tmp_path / "run", tmp_path / "again")
    job(f"--resume {tmp_path / 'run'}")
    job(flags.replace("/run", "/again"))
    same_run(tmp_path / "run", alone, steps=2)
    same_run(again, alone, steps=2)


def test_second_job_in_a_folder_is_refused(small, tmp_path):
    with FileLock(tmp_path / "run" / "run.lock"):
        assert "another job is at work in" in refusal(f"{small} --out {tmp_path / 'run'}")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]


@table(
    ("flags", "message"),
    ("--method ppo", "argument --method: invalid choice: 'ppo'"),
    ("--prompts 3", "prompts must be a multiple of 2"),
    ("--checkpoint nowhere", "there is no file nowhere/config.json"),
    ("--checkpoint COPY", "the end of a response has the ids [999]"),  # which no token has
    ("--data /dev/null", "/dev/null"),
    ("--max-new-tokens 999", "exceed the model's 256 positions; lower --max-new-tokens"),
    ("--engine vllm --rollout-dtype fp8", "vLLM rolls out in fp32 or bf16"),
    ("--engine vllm --temperature 0.001", "vLLM samples at temperatures of 0.01 or more"),
    ("--out COPY/config.json", "--out is a file; expected a folder"),
    ("--resume=", "--resume goes with"),
    ("--alpha -1", "alpha is -1.0; expected 0 or more"),
    ("--resume nowhere --steps 3", "--resume goes with"),
)
def test_mistake_is_one_sentence_before_any_weights_and_writes_nothing(
    flags, message, files, small, tmp_path, monkeypatch
):
    copy = shutil.copytree(files / "model", tmp_path / "model")
    edit_config(copy, eos_token_id=999)
    monkeypatch.setattr(checkpoints, "load", None)  # a call would be a TypeError
    monkeypatch.setattr(processes, "shard", None)
    said = refusal(f"{small} --out {tmp_path / 'run'} {flags.replace('COPY', str(copy))}")
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@parametrize("changed", ["data", "checkpoint"])
def test_run_does_not_go_on_with_other_questions_or_another_model(changed, alone, files, tmp_path):
    (tmp_path / "data").write_text((files / "sums.jsonl").read_text().replace("#### 5", "#### 6"))
    shutil.copytree(files / "model", tmp_path / "checkpoint")
    edit_config(tmp_path / "checkpoint", rms_norm_eps=1e-3)
    said = refusal(f"--resume {alone} --steps 3 --{changed} {tmp_path / changed}")
    assert "begun with other questions, another tokenizer or another model" in said


def test_run_has_no_fewer_steps_than_it_has_made(alone):
    assert "has 2 rollout batches; give more --steps" in refusal(f"--resume {alone} --steps 1")
    assert json.loads((alone / "config.json").read_text())["settings"]["steps"] == 2


def test_bug_of_a_fork_keeps_its_traceback(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Questions, "rewards", lambda *_: {}["typo"])
    with pytest.raises(KeyError, match="typo"):
        job(f"{small} --out {tmp_path / 'run'}")


def test_responses_that_never_end_are_spoken_of(small, tmp_path):
    said = job(f"{small} --steps 1 --max-new-tokens 2 --out {tmp_path / 'run'}")
    assert "of the first responses never end; they would by ['<eos>', '<end>']" in said


def test_passes_are_bounded_in_rollout_training_and_evaluation(small, tmp_path, monkeypatch):
    sample = mock.Mock(wraps=generate)
    old_pass = mock.Mock(wraps=pr2_mini.old_pass)
    monkeypatch.setattr(pr2_mini, "generate", sample)
    monkeypatch.setattr(train, "generate", sample)
    monkeypatch.setattr(pr2_mini, "old_pass", old_pass)
    bounds = "--rollout-batch 8 --micro-batch 4 --evaluated 10"
    job(f"{small} {bounds} --steps 1 --method r3 --out {tmp_path / 'run'}")
    sizes = [len(call.args[2]) * call.args[1].samples for call in sample.call_args_list]
    assert sizes == [8] * 4 + 2 * [4, 4, 2]  # 8 prompts x 4; twice 10 questions
    assert [len(call.args[4]) for call in old_pass.call_args_list] == [4] * 8  # its rows


def test_run_whose_last_update_is_skipped_says_so_and_saves_nothing(small, tmp_path, monkeypatch):
    monkeypatch.setattr(pr2_mini, "group_advantages", lambda rewards: rewards * math.nan)
    said = "an update of the last batch was skipped, so that batch was not saved"
    job(f"{small} --steps 1 --out {tmp_path / 'run'}", code=said)
    assert rows(tmp_path / "run")[0]["loss/1"] is None
    assert not list((tmp_path / "run").glob("step-*"))


# --------------------------------------------------------------- 4. vLLM as the rollout engine
def beside_forward(model, rollout):
    """The share of tokens for which a full forward pass takes the same experts, and the largest
    difference between the log-probabilities."""
    P = rollout.tokens.shape[1] - rollout.mask.shape[1]
    logits, trace = model(rollout.tokens[:, :-1], rollout.pads)
    found = logits[:, P - 1 :].log_softmax(-1).gather(-1, rollout.tokens[:, P:, None])[..., 0]
    place = torch.arange(trace.experts.shape[2])
    live = place >= rollout.pads[:, None]
    live[:, P:] &= rollout.mask[:, 1:]  # the last token has run through none
    same = overlap(rollout.experts, trace.experts)[:, live] == trace.experts.shape[-1]
    gaps = (rollout.logprobs - found)[rollout.mask]
    return same.float().mean().item(), gaps.abs().max().item()


@torch.no_grad()
def nearly_tied(model):
    """Experts 0 to 3 of 8 have almost the same router, 4 to 7 the opposite; by W_p alone 3 and 2 or
    7 and 6 are the top two, and bfloat16 cannot tell that."""
    for router in model.routers:
        row = router.weight[:1].clone()
        router.weight.copy_(torch.cat([row.repeat(4, 1), -row.repeat(4, 1)]))
        step = torch.arange(4).repeat(2)[:, None] * 2.0**-12
        router.predictor.copy_(step * router.weight)


def use_vllm(folder):
    """What a process of its own, since vLLM changes a process, finds in its rollouts."""
    from scale import vllm_engine

    folder = Path(folder)
    found = {}
    prompts, pads = [tensor.cpu() for tensor in core.padded(5, 3, 5, 1)]
    prompts *= 10  # all over the vocabulary
    long = prompts.repeat(1, 30)  # vLLM keeps prefixes in blocks of 128 tokens
    settings = train.Settings(rollout_dtype="fp32", prompts=4, samples=2, max_new_tokens=6)
    settings = replace(settings, eos=tuple(range(1, 200, 3)), learning_rate=1e-2, feature_share=1.0)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32, "vocab_size": 200}
    sizes["max_position_embeddings"] = 256
    for kind in reversed(FAMILIES):  # the last one goes on below
        path = folder / kind
        hf_model(kind, path, norm_topk_prob=kind != "olmoe", rms_norm_eps=1e-5, **sizes)
        model = checkpoints.load(path)
        settings.checkpoint = str(path)
        engine = vllm_engine.VLLMEngine(kind, model.config, settings, longest=156)
        seen = {"sets": [], "gaps": [], "lengths": [], "steps": {}}
        for method in pr2_mini.RECORDS:
            for router in model.routers:
                nn.init.zeros_(router.predictor)  # then all engines compute alike
            config = replace(settings, method=method)
            optimizer = pr2_mini.make_optimizer(model, config)
            reward = lambda rollout: torch.arange(8.0)  # noqa: E731
            arguments = (model, engine, optimizer, config, prompts, pads, reward, draws())
            seen["steps"][method] = pr2_mini.rl_step(*arguments)
        randomise_predictor(model)
        for _ in range(2):
            for m, routers_only in ((None, False), (1.0, False), (0.0, True), (0.5, True)):
                plain = RolloutEngine(model, settings)
                plain.load(model, m)
                engine.load(model, m, routers_only)
                for given in (prompts, long):
                    rollout = engine.sample(given, pads, draws())
                    share, gap = beside_forward(plain.model, rollout)
                    seen["sets"].append(share)
                    seen["gaps"].append(gap)
                    seen["lengths"] += rollout.mask.sum(1).tolist()
            for parameter in model.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
        found[kind] = seen
        many = engine.sample(prompts.repeat(300, 1), pads.repeat(300), draws())
        seen["many"] = int(many.mask.any(1).sum())
    settings.rollout_dtype = "bf16"
    nearly_tied(model)
    engine = vllm_engine.VLLMEngine(kind, model.config, settings, longest=11)
    engine.load(model, 1.0)
    experts = engine.sample(prompts, pads, draws()).experts
    best = (experts.sort(-1).values % 4 == torch.tensor([2, 3])).all(-1)  # padding has 0 and 1
    found["bf16"] = best[:, pads.repeat_interleave(2) == 0, :5].float().mean().item()
    vllm_engine.float32_router = vllm_engine.ReplicatedLinear  # as if nothing were replaced
    try:
        vllm_engine.VLLMEngine(kind, model.config, settings, longest=11)
    except CheckpointError as error:
        found["refused"] = str(error)
    (folder / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="session")
def vllm_found(tmp_path_factory):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("pip install vllm; on CPUs see .ci/run")
    folder = tmp_path_factory.mktemp("vllm")
    launch(*call_of(use_vllm, str(folder)))
    return json.loads((folder / "found.json").read_text())


@parametrize("kind", FAMILIES)
def test_vllm_rolls_out_as_forward_does_before_and_after_updates_of_its_weights(kind, vllm_found):
    found = vllm_found[kind]
    assert found["sets"] == [1.0] * 16
    assert max(found["gaps"]) < 1e-4
    assert min(found["lengths"]) < max(found["lengths"]) == 6


@parametrize("kind", FAMILIES)
@parametrize("method", pr2_mini.RECORDS)
def test_rl_step_on_the_routes_of_vllm(kind, method, vllm_found):
    metrics = vllm_found[kind]["steps"][method]
    assert metrics["mismatch_route"] == 0.0
    assert metrics["mismatch_logprob"] < 1e-4
    assert metrics["skipped/2"] == 0.0 and metrics["grad_norm/2"] > 0.0


def test_vllm_samples_more_prompts_than_it_takes_into_one_pass(vllm_found):
    assert vllm_found["qwen3_moe"]["many"] == 2400  # of 300 x 18 tokens of prompts


def test_vllm_in_bfloat16_keeps_what_bfloat16_would_round_away(vllm_found):
    assert vllm_found["bf16"] == 1.0


def test_vllm_whose_routers_are_not_float32_is_refused(vllm_found):
    assert "would round predictions away" in vllm_found["refused"]


@pytest.mark.usefixtures("vllm_found")
def test_job_with_vllm_resumes_to_the_same_bits(small, tmp_path):
    flags = f"{small} --engine vllm --steps 2 --save-every 1"
    call = call_of(whole_and_killed, str(tmp_path), flags, 2)
    launch(*TORCHRUN, "--no-python", *call, dies=True)
    assert [path.name for path in processes.checkpoints_of(tmp_path / "killed")] == ["step-1"]
    launch(*RESUME, str(tmp_path / "killed"))
    same_run(tmp_path / "killed", tmp_path / "whole", steps=2)


# --------------------------------------------------------------------- 5. Tracking, benchmark
@parametrize("package", ["wandb", "trackio"])
def test_metrics_are_tracked_once_and_in_one_run(package, small, tmp_path, monkeypatch):
    for name in ("HOME", "WANDB_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = pytest.importorskip(package, reason=f"pip install {package}")
    # wandb has another `log` after its `init`.
    log = mock.Mock(side_effect=lambda row, step: tracker.log(row, step=step))
    proxy = SimpleNamespace(init=tracker.init, log=log, finish=tracker.finish)
    monkeypatch.setattr(train.importlib, "import_module", lambda name: proxy)
    flags = f"{small} --track {package} --steps 4 --save-every 3 --out {tmp_path / 'run'}"
    core.killed(flags, "after", train, "rl_step", 3, run)
    tracker.finish()
    job(f"--resume {tmp_path / 'run'}")  # begins anew, since no checkpoint was written
    assert [call.kwargs["step"] for call in log.call_args_list] == [1, 2, 3, 4]
    if package == "wandb":
        names = {path.name.rpartition("-")[2] for path in tmp_path.glob("wandb/offline-run-*")}
    else:
        (path,) = tmp_path.glob("*.db")
        with sqlite3.connect(path) as base:
            found = base.execute("SELECT run_name, step FROM metrics ORDER BY step").fetchall()
        names = {name for name, _ in found}
        assert [step for _, step in found] == [1, 2, 3, 4]
    assert len(names) == 1
    shutil.rmtree(tmp_path / "run")  # which holds the metrics anyway
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"stale_agreement/2" in content for content in written)


def test_benchmark_prints_its_rows(capsys, monkeypatch):
    def in_turn(calls, rounds):
        for call in [*calls.values(), *calls.values()]:  # a warm-up and a round
            call()
        return dict(zip(calls, [[2.0], [4.0], [2.0], [5.0], [3.0], [2.0]], strict=False))

    quick = {name: changes | {"prompts": 4} for name, changes in bench.VARIANTS.items()}
    monkeypatch.setattr(bench, "VARIANTS", quick)
    monkeypatch.setattr(bench, "in_turn", in_turn)
    monkeypatch.setattr(bench, "timed", lambda call, taken: call)
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[4] == "| grpo | 0 | 0 | 2 | 2 | +0.0% |"
    assert lines[8] == "| pr3 | 0 | 0 | 3 | 3 | +50.0% |"
    assert lines[-2:] == ["| training step | 2 | 4 | 2.00 |", "| generation | 2 | 5 | 2.50 |"]
