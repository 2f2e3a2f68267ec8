"""MQAR: the worked example, what is drawn, labels, set-ups, a run from end to end."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titans.cli import main
from titans.tasks import get_task
from titans.tasks import mqar as module
from titans.tasks.mqar import SETUPS, Batches, Sizes, collate, mqar, sequences
from titans.training.config import parse_config
from titans.training.models import build_model, load_run
from titans.training.run import train

TASK = get_task("mqar")
MODEL = {"variant": "lmm", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_memory_heads": 1,
         "memory_expansion": 1, "chunk_size": 16}  # fmt: skip


class Scripted:
    """Draws what it was told to."""

    def __init__(self, *draws):
        self.draws = [np.array(draw) for draw in draws]

    def choice(self, *args, **kwargs):
        return self.draws.pop(0)


def test_the_worked_example():
    # keys 2 and 4, values 8 and 7, queries in places 5 and 2 of 6
    inputs, targets = mqar(Scripted([1, 3], [2, 1], [4, 1]), 16, 2, vocabulary=12)
    assert inputs.tolist() == [2, 8, 4, 7, 0, 0, 4, 0, 0, 0, 0, 0, 2, 0, 0, 0]
    assert targets.tolist() == [-100] * 6 + [7] + [-100] * 5 + [8] + [-100] * 3


@given(st.integers(1, 20), st.integers(0, 30), st.booleans(), st.integers(0, 1000))
def test_every_key_is_asked_for_once_with_its_value(pairs, more, filled, seed):
    length = 4 * pairs + 2 * more
    inputs, targets = mqar(np.random.default_rng(seed), length, pairs, vocabulary=64, random_non_queries=filled)
    keys, values = inputs[: 2 * pairs : 2], inputs[1 : 2 * pairs : 2]
    assert len(set(keys)) == len(set(values)) == pairs
    assert keys.min() >= 1 and keys.max() < 32 <= values.min() and values.max() < 64
    asked = np.flatnonzero(targets != -100)
    assert len(asked) == pairs
    assert (asked >= 2 * pairs).all() and (asked % 2 == 0).all()
    assert {int(inputs[i]): int(targets[i]) for i in asked} == dict(zip(keys.tolist(), values.tolist(), strict=True))
    others = np.delete(inputs[2 * pairs :], asked - 2 * pairs)
    assert filled or (others == 0).all()


def test_queries_favour_early_places_by_a_power_law():
    counts = np.zeros(31)
    for seed in range(4000):
        _, targets = mqar(np.random.default_rng(seed), 64, 1)
        counts[(np.flatnonzero(targets != -100)[0] - 2) // 2] += 1
    expected = np.arange(1, 32) ** -0.99
    np.testing.assert_allclose(counts / 4000, expected / expected.sum(), atol=0.03)


def test_bad_sizes_name_the_mend():
    rng = np.random.default_rng(0)
    for length in (15, 6):
        with pytest.raises(ValueError, match=rf"length={length} is not valid; use an even one of at least 4 x 2 pairs"):
            mqar(rng, length, 2)
    with pytest.raises(ValueError, match="pairs=6 is not valid; use fewer than half the 12 ids"):
        mqar(rng, 100, 6, vocabulary=12)


def test_items_are_made_of_their_index_and_filled_up():
    sizes = [Sizes(8, 2, 3), Sizes(16, 4, 2)]
    options = module.MQARData()
    data = sequences(options, sizes, 16, "train", 5)
    assert len(data) == 5
    assert [int((data[i]["labels"] != -100).sum()) for i in range(5)] == [2, 2, 2, 4, 4]
    inputs, targets = data.sequence(1)
    item = data[1]
    assert item["input_ids"].tolist() == [*inputs, *[0] * 8]
    assert item["labels"].tolist() == [-100, *targets[:-1], *[-100] * 8]
    again = sequences(options, sizes, 16, "train", 5)
    assert (again[4]["input_ids"] == data[4]["input_ids"]).all()
    for other in (sequences(options, sizes, 16, "train", 6), sequences(options, sizes, 16, "test", 5)):
        assert (other[4]["input_ids"] != data[4]["input_ids"]).any()
    with pytest.raises(IndexError):
        data[5]


def test_training_batches_are_of_one_size_and_of_as_many_tokens():
    sizes = [Sizes(8, 2, 21), Sizes(16, 4, 7), Sizes(32, 4, 4)]
    data = Batches(module.MQARData(), sizes, 32, 2, 5)
    assert len(data) == 2 * (2 + 1 + 2)  # five and one sequences fill no batch
    read = []
    for start in range(0, len(data), 2):
        batch = collate([data[start], data[start + 1]])
        ids, labels = batch["input_ids"], batch["labels"]
        assert ids.numel() == labels.numel() == 2 * 32
        size = next(size for size in sizes if size.length == ids.shape[1])
        assert ((labels != -100).sum(1) == size.pairs).all()
        read += [(len(row), tuple(row)) for row in ids.tolist()]
    drawn = [tuple(data.sequences.sequence(i)[0].tolist()) for i in (*range(16), *range(21, 25), *range(28, 32))]
    assert sorted(row for _, row in read) == sorted(drawn)
    lengths = [length for length, _ in read]
    assert lengths != sorted(lengths)
    again = Batches(module.MQARData(), sizes, 32, 2, 5)
    assert again.starts == data.starts
    assert Batches(module.MQARData(), sizes, 32, 2, 6).starts != data.starts


def test_validation_fills_short_sequences_up():
    config = parse_config(TASK, {"data": {"setup": "based", "validation_sequences": 6}, "training": {"length": 256}})
    data = TASK.load(config)
    batch = data.collate([data.validation[i] for i in range(len(data.validation))])
    assert batch["input_ids"].shape == batch["labels"].shape == (10, 256)
    assert (batch["labels"] != -100).sum(1).tolist() == [4, 4, 8, 8, 16, 16, 32, 32, 64, 64]


def test_the_loss_is_at_the_query():
    """A model that is sure of the value at every query, and only there, has no loss."""
    model = build_model({"type": "llama", "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16},
                        vocab_size=module.VOCABULARY, eos_token_id=0, pad_token_id=0)  # fmt: skip
    data = sequences(module.MQARData(), [Sizes(64, 4, 1)], 64, "train", 0)
    item = {name: torch.from_numpy(part)[None] for name, part in data[0].items()}
    targets = torch.from_numpy(data.sequence(0)[1])
    logits = 50.0 * torch.nn.functional.one_hot(targets.clamp(min=0), module.VOCABULARY)
    loss = model.loss_function(logits=logits[None], labels=item["labels"], vocab_size=module.VOCABULARY)
    assert loss < 1e-6


def test_set_ups_are_the_published_ones():
    train_sizes, test_sizes = SETUPS["512x64"]
    assert (train_sizes, test_sizes) == ([Sizes(512, 64, 100_000)], [Sizes(512, 64, 3_000)])
    train_sizes, test_sizes = SETUPS["based"]
    assert sum(size.count for size in train_sizes) == 180_000
    assert test_sizes[-1] == Sizes(1024, 256, 1_000)
    assert len(test_sizes) == 7


def test_accuracy_counts_queries_alone():
    class Oracle:
        """Knows every second value."""

        device = torch.device("cpu")
        config = type("Config", (), {"model_type": "x"})

        def __call__(self, input_ids, **_):
            logits = torch.zeros(*input_ids.shape, 64)
            for row, (inputs, targets) in enumerate(drawn):
                assert input_ids[row].tolist() == inputs.tolist()
                for place in np.flatnonzero(targets != -100)[::2]:
                    logits[row, place, targets[place]] = 1
            return type("Output", (), {"logits": logits, "cache": None})

    drawn = [mqar(np.random.default_rng(seed), 32, 4, vocabulary=64) for seed in range(3)]
    assert module._accuracy(Oracle(), drawn) == 50.0


def test_train_and_eval(tmp_path, capsys):
    values = {
        "output": str(tmp_path / "run"),
        "model": MODEL,
        "training": {"length": 64, "batch_size": 4, "tokens": 512, "eval_every": 1},
        "data": {"validation_sequences": 4, "vocabulary": 600},
        "evaluation": {"sequences": 6},
    }
    result = train(parse_config(TASK, values), TASK, progress=False)
    assert result["metrics"]["cells"][0] | {"accuracy": 0} == {
        "length": 64, "pairs": 4, "sequences": 6, "accuracy": 0}  # fmt: skip
    assert list(TASK.summary(result["metrics"])) == ["accuracy (%)", "64 x 4"]
    assert (tmp_path / "run" / "mqar.png").exists()
    model, tokenizer = load_run(values["output"])
    assert tokenizer is None
    assert model.config.vocab_size == 600
    out = tmp_path / "out.json"
    options = ["--data.setup", "based", "--sequences", "2", "--json", str(out)]
    assert main(["eval", "mqar", values["output"], *options]) == 0
    assert "| 1024 | 256 | 2 |" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["cells"]) == 7
    assert out.with_suffix(".png").exists()
    assert main(["generate", values["output"]]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    assert main(["eval", "language", values["output"]]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_bad_options_name_the_mend():
    with pytest.raises(ValueError, match=r"data\.setup='basde' is not valid; use 'based'"):
        parse_config(TASK, {"data": {"setup": "basde"}})
    with pytest.raises(ValueError, match=r"data\.vocabulary=512 is not valid; use at least 514: .*'based'"):
        parse_config(TASK, {"data": {"setup": "based", "vocabulary": 512}})
    with pytest.raises(ValueError, match=r"evaluation\.sequences=0"):
        parse_config(TASK, {"evaluation": {"sequences": 0}})
    with pytest.raises(
        ValueError, match=r"training\.length=64 is not valid; use 256, the longest of data\.setup='based'"
    ):
        TASK.load(parse_config(TASK, {"data": {"setup": "based"}}))
    small = build_model({**MODEL, "type": "titans"}, vocab_size=258, eos_token_id=256, pad_token_id=257)
    with pytest.raises(ValueError, match=r"model\.vocab_size=258 is not valid; use a model of the 8192 ids"):
        TASK.evaluate(small, None, TASK.data_class(), TASK.evaluation_class())
