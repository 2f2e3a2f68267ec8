"""Training with the memory carried from window to window."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from titans.models import TitansCache, TitansConfig, TitansForCausalLM, TitansForPrediction
from titans.tasks import get_task
from titans.training.carried import DocumentStreams, SeriesStreams
from titans.training.config import parse_config
from titans.training.run import train
from titans.training.series import SeriesWindows
from titans.training.tokens import Corpus
from titans.training.trainer import RunTrainer

END, LENGTH = 9, 6
SIZES = (13, 5, 6, 20, 1)  # none, one and several windows; with and without room for the end


def corpus() -> Corpus:
    rng = np.random.default_rng(0)
    return Corpus([rng.integers(0, END, size).astype(np.uint16) for size in SIZES], END, 0, 0)


def streams(count: int = 60, rows: int = 3, seed: int = 0) -> DocumentStreams:
    return DocumentStreams(corpus(), LENGTH, rows, count, seed)


def documents(data: DocumentStreams, row: int, rows: int = 3) -> list[list[int]]:
    """What a stream learns to write, cut where it begins."""
    found: list[list[int]] = []
    for i in range(row, len(data), rows):
        item = data[i]
        if item["begins"]:
            found.append([])
        learned = item["labels"] != -100
        assert torch.equal(item["labels"][learned], item["input_ids"][learned])
        found[-1] += item["labels"][learned].tolist()
    return found


def test_streams_read_whole_documents_in_order():
    data, texts = streams(), [[*ids.tolist(), END] for ids in corpus().ids]
    read = [document for row in range(3) for document in documents(data, row)[:-1]]  # the last may be cut off
    assert len(read) > 2 * len(texts)
    assert all(document in texts for document in read)
    assert all(document in read for document in texts)


def test_all_documents_before_any_again():
    first = [int(document) for document, start in streams().places if start == 0]
    for turn in range(2):
        assert sorted(first[turn * len(SIZES) : (turn + 1) * len(SIZES)]) == list(range(len(SIZES)))


def test_the_order_is_the_seeds():
    assert np.array_equal(streams().places, streams().places)
    assert not np.array_equal(streams().places, streams(seed=1).places)


def windows() -> SeriesWindows:
    """Forty windows of four rows and one to forecast."""
    return SeriesWindows(np.arange(44, dtype=np.float32)[:, None], 4, 1)


def test_a_series_is_read_a_look_back_at_a_time():
    """Each stream in its order; all windows are read, each as often as any, but for where streams begin and stop."""
    data = SeriesStreams.to_train(windows(), 3, 3 * 200, seed=0)
    assert len(data) == 600
    assert all(data.places[row][1] for row in range(3))
    for row in range(3):
        own = data.places[row::3]
        for (before, _), (window, begins) in pairwise(own):
            assert window < 4 and before >= 36 if begins else window == before + 4
    counts = np.bincount([window for window, _ in data.places], minlength=40)
    assert counts.max() - counts.min() <= 6
    assert data.places == SeriesStreams.to_train(windows(), 3, 3 * 200, seed=0).places
    assert data.places != SeriesStreams.to_train(windows(), 3, 3 * 200, seed=1).places
    assert len({window for window, begins in data.places[:3]}) == 3, "streams are spread over the series"
    window, begins = data.places[5]
    item = data[5]
    assert item["past_values"][:, 0].tolist() == list(range(window, window + 4))
    assert item["future_values"][:, 0].tolist() == [window + 4]
    assert (item["begins"].dtype, bool(item["begins"])) == (torch.bool, begins)


@pytest.mark.parametrize(("rows", "first", "length"), [(2, [0, 2], 10), (6, [0, 0, 1, 2, 2, 3], 10)])
def test_a_series_is_validated_once_a_stream(rows, first, length):
    data = SeriesStreams.to_validate(windows(), rows)
    for row in range(rows):
        assert [window for window, _ in data.places[row::rows]] == [first[row] + 4 * i for i in range(length)]
        assert [begins for _, begins in data.places[row::rows]] == [True] + [False] * (length - 1)


def test_a_short_series_is_validated():
    short = SeriesWindows(np.zeros((7, 1), dtype=np.float32), 4, 1)
    assert SeriesStreams.to_validate(short, 2).places == [(0, True), (1, True)]


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
def test_windows_read_as_their_document(variant):
    """Logits of carried windows are those of the whole document: nothing is lost, nothing of another is left."""
    torch.manual_seed(0)
    model = TitansForCausalLM(TitansConfig(
        variant=variant, vocab_size=END + 1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        chunk_size=4, segment_length=3, sliding_window=4, num_persistent_tokens=2,
    )).double().train()  # fmt: skip
    data, cache, logits = streams(), TitansCache(2), []
    for i in range(0, 30, 3):
        batch = {name: torch.stack([data[i + row][name] for row in range(3)]) for name in data[0]}
        logits.append(model(batch["input_ids"], cache=cache, use_cache=True, begins=batch["begins"]).logits.detach())
        cache.detach_()
    for row in range(3):
        places = data.places[row:30:3]
        starts = [i for i, (_, start) in enumerate(places) if start == 0]
        for begin, end in zip(starts, [*starts[1:], len(places)], strict=True):
            ids = torch.cat([data[3 * i + row]["input_ids"] for i in range(begin, end)])
            with torch.no_grad():
                whole = model(ids.unsqueeze(0), use_cache=False).logits[0]
            carried = torch.cat([logits[i][row] for i in range(begin, end)])
            assert (carried - whole).abs().max() < 1e-9


@pytest.mark.parametrize("forget", ["start", "zero"])
@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
def test_every_parameter_has_a_part_where_no_document_begins(variant, forget):
    """Processes that train together wait for the gradient of each."""
    model = TitansForCausalLM(TitansConfig(
        variant=variant, vocab_size=END + 1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, chunk_size=4,
        segment_length=3, sliding_window=4, num_persistent_tokens=2, memory_forget=forget,
    ))  # fmt: skip
    ids, cache = torch.randint(0, END, (2, 12)), TitansCache(2)
    model(ids, cache=cache, use_cache=True)
    model(ids, cache=cache.detach_(), labels=ids, begins=torch.zeros(2, dtype=torch.bool)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def config(folder, text, carry: bool = True, kind: str = "titans", **training):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    titans = {"variant": "lmm", "chunk_size": 8} if kind == "titans" else {}
    return parse_config(get_task("language"), {
        "output": str(folder), "model": {"type": kind, **sizes, **titans},
        "data": {"train": str(text), "carry": carry}, "evaluation": {"lengths": [32], "sample": 0},
        "training": {"length": 32, "batch_size": 4, "tokens": 32 * 4 * 8, "eval_every": 4, **training},
    })  # fmt: skip


def forecasting(folder, series, **training):
    model = {"variant": "lmm", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "patch_length": 4,
             "num_memory_heads": 1, "memory_expansion": 1, "chunk_size": 4, "patch_stride": 2}  # fmt: skip
    return parse_config(get_task("forecasting"), {
        "output": str(folder), "model": model, "data": {"path": str(series), "horizon": 6, "carry": True},
        "training": {"length": 12, "batch_size": 4, "tokens": 12 * 4 * 8, "eval_every": 4, **training},
    })  # fmt: skip


@pytest.fixture
def series(tmp_path):
    path = tmp_path / "series.csv"
    rows = np.random.default_rng(0).standard_normal((400, 2)).cumsum(0)
    path.write_text("date,a,b\n" + "".join(f"{i},{a},{b}\n" for i, (a, b) in enumerate(rows.tolist())))
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "{f"{i} and {i * i}, " * (10 + i % 40)}"}}\n' for i in range(60)))
    return path


def test_only_titans(tmp_path, text):
    with pytest.raises(ValueError, match=r"data.carry=True .*false: a 'llama' cannot be trained with what it carries"):
        train(config(tmp_path / "run", text, kind="llama"), get_task("language"), progress=False)


def test_training_carries(tmp_path, text, monkeypatch):
    """The run's memory goes on at every step, through gradient accumulation, and holds no history."""
    seen, detach = [], TitansCache.detach_

    def watch(self):
        seen.append(detach(self).layers[0].state)
        return self

    monkeypatch.setattr(TitansCache, "detach_", watch)
    train(config(tmp_path / "run", text, gradient_accumulation=2, tokens=32 * 8 * 5), get_task("language"),
          progress=False)  # fmt: skip
    assert len(seen) == 10
    assert max(int(state.position.max()) for state in seen) >= 5 * 32
    assert all(not t.requires_grad for state in seen for t in state.tensors().values())


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(("kind", "source"), [("language", "text"), ("forecasting", "series")])
def test_resumed_equals_uninterrupted(tmp_path, kind, source, request, monkeypatch):
    """The memory is part of a checkpoint."""
    task, step, source = get_task(kind), RunTrainer.training_step, request.getfixturevalue(source)
    make, of = (config, TitansForCausalLM) if kind == "language" else (forecasting, TitansForPrediction)
    train(make(tmp_path / "whole", source), task, progress=False)

    def interrupt(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise Interrupted
        return step(self, *args, **kwargs)

    cut = make(tmp_path / "cut", source)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(RunTrainer, "training_step", interrupt)
        train(cut, task, progress=False)
    train(cut, task, resume=True, progress=False)
    models = [of.from_pretrained(tmp_path / name) for name in ("whole", "cut")]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


def test_a_validation_has_a_memory_of_its_own(tmp_path, series, monkeypatch):
    """It is carried there, too, and training goes on with what it had."""
    seen, evaluate = [], RunTrainer.evaluate

    def watch(self, *args, **kwargs):
        before = self.carried
        result = evaluate(self, *args, **kwargs)
        seen.append(before is not None and self.carried is before)
        return result

    monkeypatch.setattr(RunTrainer, "evaluate", watch)
    task, run = get_task("forecasting"), forecasting(tmp_path / "run", series)
    result = train(run, task, evaluate=False, progress=False)
    assert seen == [True, True]
    model, data = TitansForPrediction.from_pretrained(tmp_path / "run"), task.load(run).validation
    assert len(data) == 4 * 2
    losses = []
    for row in range(4):
        cache = TitansCache(1)
        for i in (row, row + 4):
            past, truth = (torch.from_numpy(data[i][name])[None] for name in ("past_values", "future_values"))
            losses.append(model(past, truth, cache=cache).loss.item())
    assert result["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
