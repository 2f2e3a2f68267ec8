"""What stops a run: kills, broken checkpoints, losses that are not finite, a full disk, too little memory."""

import errno
import json
import logging
import multiprocessing
import os
import pickle
import random
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from run_cases import losses, write_text
from safetensors.torch import load_file

from titans.cli import main
from titans.models import TitansCache, TitansForCausalLM
from titans.tasks import get_task
from titans.training import checkpoints as checkpoint_writer
from titans.training.checkpoints import last_checkpoint
from titans.training.config import parse_config
from titans.training.files import publish, read_manifest, write_atomically
from titans.training.run import train
from titans.training.trainer import RunTrainer

TASK = get_task("language")
STEPS = 12


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl", 40)


def config(folder, text, carry=False, **training):
    return parse_config(TASK, {
        "output": str(folder),
        "model": {"variant": "lmm", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                  "num_attention_heads": 2, "chunk_size": 8},
        "data": {"train": str(text), "carry": carry},
        "training": {"length": 32, "batch_size": 4, "tokens": 32 * 4 * STEPS, "eval_every": 4, **training},
    })  # fmt: skip


def run(config, **options):
    return train(config, TASK, evaluate=False, progress=False, **options)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Kills


def train_in_child(config):
    torch.set_num_threads(1)
    logging.disable()
    run(config, resume=(Path(config.output) / "config.yaml").exists())


def writes(part, began):
    """Whether a checkpoint is being written by who began then, and not by one that was killed before."""
    with suppress(FileNotFoundError):  # it may become a checkpoint at any time
        return any(part.glob("*")) and part.stat().st_mtime > began
    return False


def kill_until_done(config, kills, seed):
    """Begins and resumes a run, killed (SIGKILL) after random steps, while it writes or anywhen; then to its end.

    Returns what lay in the folder of the checkpoints after each kill.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "titans.training.run", "titans.training.carried", "matplotlib.figure"])
    rng, checkpoints, found = random.Random(seed), Path(config.output) / "checkpoints", []
    for step in [*sorted(rng.choices(range(config.training.steps), k=kills)), None]:
        began, child = time.time(), context.Process(target=train_in_child, args=(config,))
        child.start()
        while step is not None and child.is_alive():
            steps = [int(path.name.partition("-")[2]) for path in checkpoints.glob("checkpoint-*")]
            if max(steps, default=0) >= step:
                while len(found) % 2 == 0 and child.is_alive() and not writes(checkpoints / ".part", began):
                    time.sleep(0.0001)
                time.sleep(rng.uniform(0, 0.02 if len(found) % 2 == 0 else 0.2))
                child.kill()
                break
            time.sleep(0.001)
        child.join()
        if step is None:
            assert child.exitcode == 0
        else:
            found.append(sorted(path.name for path in checkpoints.glob("*")))
    return found


def check_kills(folder, text, kills, steps, carry):
    """A checkpoint at every step, and more passes over the text than one."""
    settings = {"carry": carry, "eval_every": 1 / steps, "tokens": 32 * 4 * steps, "batch_size": 4}
    whole, cut = config(folder / "whole", text, **settings), config(folder / "cut", text, **settings)
    run(whole)
    for left in kill_until_done(cut, kills, time.time_ns()):
        print("left by a kill:", *left)
    assert losses(cut.output) == losses(whole.output)
    assert same(weights(cut.output), weights(whole.output))


def test_killed_three_times(tmp_path, text):
    check_kills(tmp_path, text, kills=3, steps=20, carry=True)


@pytest.mark.slow
@pytest.mark.parametrize("carry", [False, True])
def test_killed_twenty_times(tmp_path, text, carry):
    check_kills(tmp_path, text, kills=20, steps=99, carry=carry)


# Broken checkpoints


@pytest.fixture
def checkpoints(tmp_path):
    """A run's folder with two checkpoints of two files."""
    write_atomically(tmp_path / "config.yaml", "")
    for step in (8, 16):
        part = tmp_path / "checkpoints" / ".part"
        (part / "shards").mkdir(parents=True)
        (part / "model.safetensors").write_bytes(bytes(range(100)))
        (part / "shards" / "0.pt").write_bytes(b"moments")
        publish(part, part.with_name(f"checkpoint-{step}"))
    return tmp_path / "checkpoints"


def flip(path):
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "no manifest": (
        lambda c: (c / "manifest.json").unlink(),
        r"checkpoint-16 has no manifest.json: it was not written",
    ),
    "half a manifest": (lambda c: (c / "manifest.json").write_text("{"), r"checkpoint-16/manifest.json is damaged"),
    "other JSON": (lambda c: (c / "manifest.json").write_text("[]"), r"checkpoint-16/manifest.json is damaged"),
    "no size": (
        lambda c: (c / "manifest.json").write_text('{"files": {"model.safetensors": 3}}'),
        r"checkpoint-16/manifest.json is damaged",
    ),
    "nested without end": (
        lambda c: (c / "manifest.json").write_text("[" * 10_000),
        r"checkpoint-16/manifest.json is damaged",
    ),
    "a bit": (lambda c: flip(c / "model.safetensors"), r"checkpoint-16/model.safetensors is damaged: its sha256"),
    "truncated": (lambda c: (c / "shards" / "0.pt").write_bytes(b"mom"), r"shards/0.pt holds 3 bytes instead of 7"),
    "missing": (lambda c: (c / "shards" / "0.pt").unlink(), r"shards/0.pt holds no bytes instead of 7"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_broken_checkpoint_is_named_and_the_one_before_it_taken(checkpoints, caplog, name):
    damage, message = DAMAGE[name]
    shutil.copytree(checkpoints / "checkpoint-8", checkpoints / "checkpoint-mine")  # somebody's copy is none of ours
    assert last_checkpoint(checkpoints.parent) == str(checkpoints / "checkpoint-16")
    damage(checkpoints / "checkpoint-16")
    assert last_checkpoint(checkpoints.parent) == str(checkpoints / "checkpoint-8")
    assert re.search(message + r".*; going on from .*checkpoint-8 instead", caplog.text)


def test_no_checkpoint_at_all_and_none_that_is_whole(checkpoints):
    for path in checkpoints.iterdir():
        flip(path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"no checkpoint of .* is whole \(.*16.*8/model.*delete .*checkpoints to begin"
    ):
        last_checkpoint(checkpoints.parent)
    shutil.rmtree(checkpoints)
    assert last_checkpoint(checkpoints.parent) is None
    with pytest.raises(FileNotFoundError, match=r"holds no config\.yaml"):
        last_checkpoint(checkpoints)


def test_a_manifest_without_hashes_compares_sizes(checkpoints):
    flip(checkpoints / "checkpoint-8" / "model.safetensors")
    assert len(read_manifest(checkpoints / "checkpoint-8", hashes=False)["files"]) == 2


def test_goes_on_from_the_checkpoint_before_a_broken_one(tmp_path, text, caplog):
    whole, cut = config(tmp_path / "whole", text), config(tmp_path / "cut", text)
    run(whole)
    shutil.copytree(whole.output, cut.output)
    newest = tmp_path / "cut" / "checkpoints" / "checkpoint-12"
    flip(newest / "optimizer.pt")
    run(cut, resume=True)
    assert "optimizer.pt is damaged" in caplog.text
    assert losses(cut.output) == losses(whole.output)
    assert same(weights(cut.output), weights(whole.output))
    read_manifest(newest)  # written anew
    flip(newest / "model.safetensors")
    later = newest.with_name("checkpoint-16")  # taken as the newest; the best one is that of step 12
    (newest.parent / "checkpoint-8").rename(later)
    state = json.loads((later / "trainer_state.json").read_text())
    state |= {"global_step": STEPS, "best_global_step": STEPS}
    (later / "trainer_state.json").write_text(json.dumps(state))
    (later / "manifest.json").unlink()
    publish(later, newest.with_name("checkpoint-20"))
    with pytest.raises(ValueError, match=r"model.safetensors is damaged.*restore the best .*, or delete .*-12"):
        run(cut, resume=True)


def test_a_run_that_was_moved_takes_its_own_best_checkpoint(tmp_path, text):
    """Not by the path where it stood when it was saved: nothing there, or another run."""
    stood, moved = config(tmp_path / "stood", text), config(tmp_path / "moved", text)
    run(stood)
    shutil.copytree(stood.output, moved.output)
    best = load_file(tmp_path / "stood" / "checkpoints" / "checkpoint-12" / "model.safetensors")
    flip(tmp_path / "stood" / "checkpoints" / "checkpoint-12" / "model.safetensors")
    run(moved, resume=True)
    shutil.rmtree(stood.output)
    run(moved, resume=True)
    assert same(weights(moved.output), best)


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_no_code_from_a_checkpoint_runs(tmp_path, text, name):
    """Even where whoever put it there gave the checkpoint a manifest that fits."""
    cut = config(tmp_path / "run", text)
    run(cut)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-12")
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-8"
    torch.save(Payload(tmp_path / "executed"), checkpoint / name)
    (checkpoint / "manifest.json").unlink()
    publish(checkpoint, checkpoint.with_name("checkpoint-9"))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        run(cut, resume=True)
    assert not (tmp_path / "executed").exists()


# Steps that are not finite


def spoil(monkeypatch, step, how):
    """Makes one step's loss, or its gradient alone, NaN."""
    compute = RunTrainer.compute_loss

    def spoiled(self, model, *args, **kwargs):
        loss = compute(self, model, *args, **kwargs)
        if self.state.global_step + 1 != step or not model.training:
            return loss
        return loss * torch.nan if how == "loss" else loss + (0 * next(model.parameters())).sum().sqrt()

    monkeypatch.setattr(RunTrainer, "compute_loss", spoiled)


@pytest.mark.parametrize("carry", [False, True])
def test_what_reproduces_a_step_that_is_not_finite_is_kept(tmp_path, text, carry):
    """A learning rate that throws the weights far away: the files that are left give a loss that is not finite."""
    diverging = config(tmp_path / "run", text, carry, learning_rate=1e30, warmup=0, max_grad_norm=0, weight_decay=0)
    with pytest.raises(FloatingPointError, match=r"step (\d+) is not finite: .*nan.*training\.learning_rate") as raised:
        run(diverging)
    step = int(re.search(r"step (\d+)", str(raised.value)).group(1))
    folder = tmp_path / "run" / f"nonfinite-{step}"
    model = TitansForCausalLM.from_pretrained(folder).train()
    assert all(p.isfinite().all() for p in model.parameters())
    batches = load_file(folder / "batches-0.safetensors")
    batch = {name: t[0] for name, t in batches.items()}
    assert batch["input_ids"].shape == (4, 32)
    if carry:
        cache = TitansCache.load(folder / "memory-0.safetensors", model)
        batch |= {"cache": cache, "use_cache": True}
    loss = model(**batch).loss
    loss.backward()
    norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    assert not (loss + norms.sum()).isfinite()


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_the_batches_are_those_of_the_step(tmp_path, text, monkeypatch, how):
    """And the weights those before it; with gradients added up, all its batches."""
    spoil(monkeypatch, 5, how)
    with pytest.raises(FloatingPointError, match=r"step 5 is not finite"):
        run(config(tmp_path / "run", text, gradient_accumulation=2, tokens=32 * 8 * STEPS))
    folder = tmp_path / "run"
    kept, before = weights(folder / "nonfinite-5"), weights(folder / "checkpoints" / "checkpoint-4")
    assert same(kept, before)
    ids = load_file(folder / "nonfinite-5" / "batches-0.safetensors")["input_ids"]
    assert ids.shape == (2, 4, 32)
    assert not torch.equal(ids[0], ids[1])


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("carry", [False, True])
def test_skipped_steps_move_nothing_and_are_counted(tmp_path, text, monkeypatch, how, carry):
    spoil(monkeypatch, 3, how)
    settings = {"tokens": 32 * 4 * 6, "eval_every": 1 / 6, "warmup": 0, "skip_nonfinite": True}
    steps = config(tmp_path / "run", text, carry, **settings)
    moved = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        before = [p.clone() for group in self.param_groups for p in group["params"]]
        result = step(self, *args, **kwargs)
        after = (p for group in self.param_groups for p in group["params"])
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    result = run(steps)
    assert moved == [True, True, False, True, True, True]
    assert result["skipped_steps"] == 1
    assert all(np.isfinite(loss) for _, loss in losses(steps.output))
    assert run(steps, resume=True)["skipped_steps"] == 1  # the count is part of a checkpoint


# A full disk


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("what", ["torch.save", "json"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, text, monkeypatch, what):
    whole, cut = config(tmp_path / "whole", text), config(tmp_path / "cut", text)
    run(whole)
    save, publish_part = torch.save, checkpoint_writer.publish
    full = lambda: (tmp_path / "cut" / "checkpoints" / "checkpoint-4").exists()  # noqa: E731

    def save_somewhere(what, path, *args, **kwargs):
        save(what, "/dev/full" if full() else path, *args, **kwargs)

    def publish_somewhere(part, folder):
        if full():
            (part / "manifest.json").symlink_to("/dev/full")
        publish_part(part, folder)

    with monkeypatch.context() as patch:
        if what == "json":
            patch.setattr(checkpoint_writer, "publish", publish_somewhere)
        else:
            patch.setattr(torch, "save", save_somewhere)
        with pytest.raises(OSError, match=r"checkpoint-8 cannot be written .*bytes left.*titans train --resume .*cut"):
            run(cut)
    left = [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()]
    assert left == ["checkpoint-4"]
    run(cut, resume=True)
    assert losses(cut.output) == losses(whole.output)
    assert same(weights(cut.output), weights(whole.output))


def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "before")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "after")
    assert path.read_text() == "before"


# Too little memory


def too_much():
    torch.empty(2**55)


def too_much_on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("allocate", [too_much, too_much_on_a_gpu, lambda: np.empty(2**55)])
def test_too_little_memory_says_what_to_lower(tmp_path, text, monkeypatch, capsys, allocate):
    monkeypatch.setattr(RunTrainer, "compute_loss", lambda *args, **kwargs: allocate())
    settings = config(tmp_path / "run", text)
    with pytest.raises(MemoryError, match=r"batch_size \(now 4\).*accumulation \(now 1\).*length \(now 32\)"):
        run(settings)
    options = ["--training.length", "32", "--training.tokens", "100", "--data", str(text)]
    assert main(["train", *options, "--output", str(tmp_path / "cli")]) == 2
    assert "titans train: out of memory" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_it(tmp_path, text, monkeypatch):
    def wrong(*args, **kwargs):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(RunTrainer, "compute_loss", wrong)
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"):
        run(config(tmp_path / "run", text))
