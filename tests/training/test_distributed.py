"""Two processes train as one: the same YAML, the same losses, each other's checkpoints. They talk through gloo."""

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml
from run_cases import losses, write_text
from safetensors.torch import load_file

from titans.cli import main
from titans.models import TitansCache, TitansConfig, TitansForCausalLM
from titans.training import run, streamed
from titans.training.carried import load_rows, memory_file

VARIANTS = ("lmm", "mac", "mag", "mal")
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}  # fmt: skip
HANGS = 600  # seconds after which processes are taken to wait for each other


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl", 60)


def config(folder, text, variant="mal", carry=True, streaming=False, steps=10, **training):
    """A YAML file; with gradient accumulation, and a checkpoint after half of the steps."""
    held_out = {"validation": str(text), "test": str(text)} if streaming else {}
    values = {
        "model": {"variant": variant, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
                  "num_attention_heads": 2, "chunk_size": 8, "segment_length": 8, "sliding_window": 8,
                  "num_persistent_tokens": 2},
        "data": {"train": str(text), "carry": carry, "streaming": streaming, "validation_bytes": 200, **held_out},
        "evaluation": {"lengths": [16], "sample": 4, "max_bytes": 200},
        "training": {"length": 16, "batch_size": 4, "gradient_accumulation": 2, "tokens": 16 * 8 * steps,
                     "eval_every": 0.5, **training},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "config.yaml")


def shard():
    """Lets accelerate use FSDP2: it does so where every process has a GPU of its own, and is told that this is so.

    Devices and the process group stay what they are, the CPU and gloo.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    arguments = run._arguments

    def told(*args):
        made = arguments(*args)
        if not torch.distributed.is_initialized():  # one process: torchrun on a GPU makes a group of one
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        assert made.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return made

    run._arguments = told


def process(rank, processes, port, environment, commands, log):
    """One of several: runs commands of ours and writes what it prints to a file."""
    torch.set_num_threads(1)
    streamed.BUFFER = 16 * 8  # several in a run
    if processes > 1:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in (own | there).items()})
    os.environ.update(environment)
    if environment:
        shard()
    with open(f"{log}-{rank}", "w") as out, redirect_stdout(out), redirect_stderr(out):
        codes = [main(list(command)) for command in commands]
    sys.exit(max(codes))


def start(log, *commands, processes=2, fsdp2=False, code=0):
    """Runs commands one after the other in several processes, to an exit code; returns what each process printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "titans.training.run", "titans.tasks.language", "matplotlib.figure"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = (processes, port, FSDP2 if fsdp2 else {}, commands, log)
    children = [context.Process(target=process, args=(rank, *shared)) for rank in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join(HANGS)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    printed = [Path(f"{log}-{rank}").read_text() for rank in range(processes)]
    assert codes == [code] * processes, "\n".join(printed)
    return printed


def check_same(one, other):
    one, other = dict(losses(one)), dict(losses(other))
    assert one.keys() == other.keys()
    apart = max(abs(one[key] - other[key]) for key in one)
    print(f"{len(one)} losses, at most {apart:.1e} apart")
    assert apart < 1e-5


def cut(folder, copy):
    """A run as it was at the checkpoint before its last."""
    shutil.copytree(folder, copy)
    (copy / "metrics.jsonl").unlink()
    _, last = sorted((copy / "checkpoints").iterdir(), key=lambda path: int(path.name.partition("-")[2]))
    shutil.rmtree(last)
    return copy


def check_two_are_one(folder, text, fsdp2=False, back=True, **settings):
    """Their losses, also after one goes on from the checkpoint of two, and two from that of one (``back``)."""
    path, one, two = config(folder, text, **settings), folder / "one", folder / "two"
    start(folder / "log", ["train", path, "--output", str(one)], processes=1, fsdp2=fsdp2)
    printed = start(folder / "log", ["train", path, "--output", str(two)], fsdp2=fsdp2)
    check_same(one, two)
    assert printed[0].count("The run's folder") == 1
    assert printed[1] == ""
    ends = [two, cut(two, folder / "two-one")]
    start(folder / "log", ["train", "--resume", str(ends[-1])], processes=1, fsdp2=fsdp2)
    if back:
        ends.append(cut(one, folder / "one-two"))
        start(folder / "log", ["train", "--resume", str(ends[-1])], fsdp2=fsdp2)
    whole = TitansForCausalLM.from_pretrained(one).state_dict()
    for end in ends:
        check_same(one, end)
        found = TitansForCausalLM.from_pretrained(end).state_dict()
        assert found.keys() == whole.keys()
        assert max((found[name] - whole[name]).abs().max() for name in whole) < 1e-3


def test_two_processes_train_as_one(tmp_path, text):
    """The variant whose persistent tokens are read at the beginning of a document alone, with `data.carry`."""
    check_two_are_one(tmp_path, text, back=False, steps=6)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp2", [False, True], ids=["ddp", "fsdp2"])
def test_each_reads_all_of_a_stream_and_takes_its_rows(tmp_path, text, fsdp2):
    check_two_are_one(tmp_path, text, fsdp2, carry=False, streaming=True)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp2", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fifty_steps(tmp_path, text, variant, fsdp2):
    """At a rate at which training does not blow roundings up: at 2e-3 those of MAC grew to 1.6e-5."""
    settings = {"carry": variant in ("lmm", "mal"), "steps": 50, "learning_rate": 5e-4}
    check_two_are_one(tmp_path, text, fsdp2, variant=variant, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp2", [False, True], ids=["ddp", "fsdp2"])
def test_with_activations_checkpointed(tmp_path, text, fsdp2):
    path = config(tmp_path, text, checkpoint_activations=True)
    start(tmp_path / "log", ["train", config(tmp_path / "c", text), "--output", str(tmp_path / "one")], processes=1)
    start(tmp_path / "log", ["train", path, "--output", str(tmp_path / "two")], fsdp2=fsdp2)
    check_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("fsdp2", [False, True], ids=["ddp", "fsdp2"])
def test_bfloat16_leaves_the_memory_in_float32(tmp_path, text, fsdp2):
    start(tmp_path / "log", ["train", config(tmp_path / "c", text), "--output", str(tmp_path / "one")], processes=1)
    path = config(tmp_path, text, bf16=True)
    start(tmp_path / "log", ["train", path, "--output", str(tmp_path / "two")], fsdp2=fsdp2)
    memory = load_file(memory_file(tmp_path / "two" / "checkpoints" / "checkpoint-10", 0))
    assert {t.dtype for name, t in memory.items() if "maps" in name} == {torch.float32}
    precise, rounded = dict(losses(tmp_path / "one")), dict(losses(tmp_path / "two"))
    assert 1e-5 < max(abs(precise[key] - rounded[key]) for key in precise) < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("fsdp2", [False, True], ids=["ddp", "fsdp2"])
def test_what_reproduces_a_step_that_is_not_finite_is_kept(tmp_path, text, fsdp2):
    """All weights, and every process's batches and memory."""
    path = config(tmp_path, text, learning_rate=1e30, warmup=0, max_grad_norm=0, weight_decay=0)
    printed = start(tmp_path / "log", ["train", path, "--output", str(tmp_path / "run")], fsdp2=fsdp2, code=2)
    assert all("is not finite" in text for text in printed)
    (folder,) = (tmp_path / "run").glob("nonfinite-*")
    model, losses = TitansForCausalLM.from_pretrained(folder).train(), []
    for rank in range(2):
        batch = {name: t[0] for name, t in load_file(folder / f"batches-{rank}.safetensors").items()}
        assert batch["input_ids"].shape == (2, 16)
        cache = TitansCache.load(memory_file(folder, rank), model)
        losses.append(model(**batch, cache=cache, use_cache=True).loss)
    sum(losses).backward()
    norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    assert not (sum(losses) + norms.sum()).isfinite()


@pytest.mark.slow
def test_torchrun_starts_the_command(tmp_path, text):
    path = config(tmp_path, text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "titans", "train", path, "--output", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The run's folder") == 1
    assert main(["train", path, "--output", str(tmp_path / "one")]) == 0
    check_same(tmp_path / "one", tmp_path / "two")


# Mistakes


def test_a_batch_that_cannot_be_divided(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["train", config(tmp_path, text), "--output", str(tmp_path / "run")]) == 2
    assert "training.batch_size=4 is no multiple of the 3 processes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["train", config(tmp_path, text)]) == 2
    assert "--output FOLDER: several processes share it" in capsys.readouterr().err


# The memory of some rows


@pytest.fixture
def remembered(tmp_path):
    """A model, the memory of four rows, and its files: two, as two processes write them."""
    model = TitansForCausalLM(TitansConfig(variant="mac", hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    ids = torch.randint(0, 250, (4, 21))
    cache = model.memorize(ids)
    for rank in range(2):
        model.memorize(ids[2 * rank : 2 * rank + 2]).save_pretrained(memory_file(tmp_path, rank), model)
    return model, cache


@pytest.mark.parametrize("rows", [range(4), range(2), range(2, 4), range(1, 3), range(3, 4)])
def test_rows_come_from_the_files_that_hold_them(tmp_path, remembered, rows):
    model, cache = remembered
    loaded = load_rows(tmp_path, rows, 4, model)
    assert (loaded.rows, loaded.get_seq_length()) == (len(rows), cache.get_seq_length())
    for mine, whole in zip(loaded.layers, cache.layers, strict=True):
        expected = whole.state.select(list(rows)).tensors()
        assert all(torch.allclose(t, expected[name], atol=1e-6) for name, t in mine.state.tensors().items())


def test_rows_of_another_batch(tmp_path, remembered):
    with pytest.raises(ValueError, match=r"holds the memory of 4 rows, not of training.batch_size=8"):
        load_rows(tmp_path, range(8), 8, remembered[0])
    assert load_rows(tmp_path / "nothing", range(4), 4, remembered[0]) is None
