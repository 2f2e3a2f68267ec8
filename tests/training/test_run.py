"""One run: its folder, resuming, errors."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from titans.models import TitansForCausalLM
from titans.tasks import get_task
from titans.training.config import parse_config
from titans.training.models import build_model, load_run
from titans.training.run import train
from titans.training.trainer import RunTrainer

TASK = get_task("language")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(600)))
    return path


def config(folder, text, **training):
    return parse_config(
        TASK,
        {
            "output": str(folder),
            "model": {"type": "sliding_llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                      "num_attention_heads": 2},
            "data": {"train": str(text)},
            "evaluation": {"lengths": [32], "sample": 4},
            "training": {"length": 32, "batch_size": 4, "tokens": 32 * 4 * 12, "eval_every": 4, **training},
        },
    )  # fmt: skip


def test_run_folder_holds_all_and_loads_with_the_auto_classes(tmp_path, text):
    folder = tmp_path / "run"
    result = train(config(folder, text), TASK, progress=False)
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "loss.png", "position.png", "model.safetensors", "result.json"} <= names
    assert list((folder / "tensorboard").glob("events*"))
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[0]["loss"] > result["validation_loss"]
    assert AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[72]])).cache is not None
    assert AutoTokenizer.from_pretrained(folder).decode([72, 105]) == "Hi"
    assert json.loads((folder / "result.json").read_text())["metrics"]["windows"].keys() == {"32", "whole"}


def test_all_of_the_validation_data_counts(tmp_path, text):
    run = config(tmp_path / "run", text, batch_size=16)
    windows = TASK.load(run).validation
    assert len(windows) % 16
    result = train(run, TASK, evaluate=False, progress=False)
    ids = torch.stack([torch.as_tensor(windows[i]["input_ids"]) for i in range(len(windows))])
    with torch.no_grad():
        loss = load_run(str(tmp_path / "run"))[0](ids, labels=ids).loss
    assert result["validation_loss"] == pytest.approx(loss.item(), rel=1e-5)


class Interrupted(Exception):
    pass


def test_resumed_equals_uninterrupted(tmp_path, text, monkeypatch):
    whole = train(config(tmp_path / "whole", text), TASK, progress=False)
    step = RunTrainer.training_step

    def interrupt(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise Interrupted
        return step(self, *args, **kwargs)

    cut = config(tmp_path / "cut", text)
    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "training_step", interrupt)
        with pytest.raises(Interrupted):
            train(cut, TASK, progress=False)
    resumed = train(cut, TASK, resume=True, progress=False)
    assert resumed["metrics"] == whole["metrics"]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "cut")]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)
    logged = [[json.loads(line) for line in (tmp_path / n / "metrics.jsonl").open()] for n in ("whole", "cut")]
    assert [e["loss"] for e in logged[0] if "loss" in e] == [e["loss"] for e in logged[1] if "loss" in e]


def test_starts_from_the_weights_of_another_run(tmp_path, text):
    """A learning rate too small to move anything leaves the other run's losses; another size is refused by name."""
    first = train(config(tmp_path / "first", text), TASK, progress=False)
    again = config(tmp_path / "again", text, start_from=str(tmp_path / "first"), learning_rate=1e-12, seed=5)
    assert train(again, TASK, progress=False)["validation_loss"] == pytest.approx(first["validation_loss"], abs=1e-6)
    with pytest.raises(FileNotFoundError, match=r"training.start_from='nowhere' holds no model.safetensors"):
        train(config(tmp_path / "other", text, start_from="nowhere"), TASK, progress=False)
    for field, value in (("hidden_size", 32), ("num_hidden_layers", 2)):
        other = config(tmp_path / field, text, start_from=str(tmp_path / "first"))
        other.model[field] = value
        with pytest.raises(ValueError, match=r"training.start_from=.*first' does not fit this model: "):
            train(other, TASK, progress=False)


def test_a_truncated_model_is_named(tmp_path, text):
    train(config(tmp_path / "run", text, tokens=32 * 4 * 4), TASK, evaluate=False, progress=False)
    weights = tmp_path / "run" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read.*damaged"):
        load_run(str(tmp_path / "run"))


def test_resuming_a_finished_run_trains_no_further(tmp_path, text):
    """The kill came after the last checkpoint: one step more would write another. Its time counts."""
    run = config(tmp_path / "run", text)
    first = train(run, TASK, progress=False)
    again = train(run, TASK, resume=True, progress=False)
    for figure in ("metrics", "tokens_per_second", "training_seconds"):
        assert again[figure] == first[figure]
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["checkpoint-12", "checkpoint-8"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert max(steps) == 12


def test_norms_biases_and_gates_do_not_decay():
    model = build_model({"type": "mamba2"}, vocab_size=258, eos_token_id=256, pad_token_id=257)
    names = RunTrainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    assert any("in_proj.weight" in name for name in names)
    assert not any(part in name for name in names for part in ("norm", "bias", "A_log", ".D"))


def test_the_price_of_writing_comes_after_a_fraction_of_the_run(tmp_path, text, monkeypatch):
    """Every checkpoint and the run itself name the whole price, whichever was asked then."""
    run, asked, forward = config(tmp_path / "run", text, write_price_after=0.5), [], TitansForCausalLM.forward
    run.model = {"variant": "lmm", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                 "num_memory_heads": 2, "memory_gate": "write", "memory_write_price": 0.1}  # fmt: skip

    def spied(self, *args, **kwargs):
        asked.extend([self.config.memory_write_price] if self.training else [])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(TitansForCausalLM, "forward", spied)
    train(run, TASK, evaluate=False, progress=False)
    assert asked == [0.0] * 6 + [0.1] * 6
    saved = [*(tmp_path / "run" / "checkpoints").glob("*/config.json"), tmp_path / "run" / "config.json"]
    assert [json.loads(path.read_text())["memory_write_price"] for path in saved] == [0.1] * 3


def test_bad_values_name_the_mend(tmp_path, text):
    for training, message in (
        ({"length": 0}, r"training\.length=0 is not valid; use a number above 0"),
        ({"warmup": 1.5}, r"training\.warmup=1\.5"),
        ({"write_price_after": 1}, r"training\.write_price_after=1"),
        ({"tokens": "many"}, r"training\.tokens.*many"),
        ({"lenght": 3}, r"'training\.lenght' is no option; did you mean 'training\.length'"),
    ):
        with pytest.raises(ValueError, match=message):
            config(tmp_path, text, **training)
    with pytest.raises(ValueError, match=r"data='text.txt' is not valid; use a mapping, `data:` and its keys below it"):
        parse_config(TASK, {"data": "text.txt"})
    with pytest.raises(ValueError, match=r"training\.batch_size=4000 is more than"):
        train(config(tmp_path / "run", text, batch_size=4000), TASK, progress=False)
    with pytest.raises(FileNotFoundError, match="is no run"):
        train(config(tmp_path / "none", text), TASK, resume=True, progress=False)
