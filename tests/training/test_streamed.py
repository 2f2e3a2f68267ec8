"""Training on a text as it is read: the windows of the whole text, little read ahead, and the same after a resume."""

import gzip
import json
import shutil
from itertools import count

import numpy as np
import pytest
import torch
from run_cases import losses
from safetensors.torch import load_file

from titans.tasks import get_task
from titans.training import streamed
from titans.training.config import parse_config
from titans.training.prepared import prepare
from titans.training.run import train
from titans.training.streamed import StreamedWindows
from titans.training.text import read_documents
from titans.training.tokens import Corpus, byte_tokenizer

TASK = get_task("language")
BYTES = byte_tokenizer()
LENGTH, EACH = 16, 8  # of a window, and windows of a buffer
ROWS = ["", *(f"{i} and {i * i}, Grüße " * (1 + i % 7) for i in range(40)), ""]
SOURCES = ["a.txt", "a.jsonl", "a.jsonl.gz", "folder", "saved", "name"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(streamed, "BUFFER", LENGTH * EACH)


@pytest.fixture
def source(request, tmp_path, monkeypatch):
    """What holds the rows: a file, a folder, a data set saved, or one of a name, in three files."""
    path = tmp_path / request.param
    lines = [json.dumps({"text": row}) for row in ROWS]
    if path.name in ("saved", "name"):
        datasets = pytest.importorskip("datasets")
    if path.name == "saved":
        datasets.Dataset.from_list([{"text": row} for row in ROWS]).save_to_disk(path, num_shards=3)
    elif path.name == "folder":
        path.mkdir()
        for i, row in enumerate(ROWS):
            (path / f"{i:02}.txt").write_text(row)
    elif path.name == "name":
        files = [tmp_path / f"{i}.jsonl" for i in range(3)]
        for i, file in enumerate(files):
            file.write_text("\n".join(lines[i * 14 : (i + 1) * 14]))
        load, options = datasets.load_dataset, {"data_files": list(map(str, files)), "cache_dir": str(tmp_path)}
        monkeypatch.setattr(datasets, "load_dataset", lambda name, **given: load("json", **options, **given))
        return "owner/name"
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
            file.write("\n".join(ROWS if path.suffix == ".txt" else lines))
    return str(path)


def stream(source, windows=1000, seed=3):
    return StreamedWindows(source, "text", BYTES, LENGTH, windows, seed)


def ids(item):
    assert item["input_ids"] is item["labels"]
    return tuple(item["input_ids"].tolist())


@pytest.mark.parametrize("source", SOURCES, indirect=True)
def test_the_windows_are_those_of_the_whole_text(source):
    """Over and over, end to end, a buffer's windows shuffled; the same every time, whatever was asked for before."""
    packed = np.tile(Corpus.build(read_documents(source), BYTES).packed(), 5)
    windows = [tuple(row) for row in packed[: len(packed) // LENGTH * LENGTH].reshape(-1, LENGTH).tolist()]
    number = len(windows) // EACH * EACH
    found, again, other = ([ids(s[i]) for i in range(number)] for s in [stream(source)] * 2 + [stream(source, seed=4)])
    assert found == again
    for begin in range(0, number, EACH):
        buffer = slice(begin, begin + EACH)
        assert sorted(found[buffer]) == sorted(windows[buffer]) == sorted(other[buffer])
    assert found != windows[:number]
    assert found != other
    ahead = stream(source)
    assert [ids(ahead[i]) for i in (number - 1, 5, 3 * EACH)] == [found[i] for i in (number - 1, 5, 3 * EACH)]
    with pytest.raises(IndexError):
        ahead[1000]


@pytest.mark.parametrize("source", SOURCES, indirect=True)
def test_goes_on_from_any_place(source, tmp_path):
    """Saved while the stream is ahead of the item or just before it, as batches are read before they are trained on."""
    whole = stream(source)
    expected = [ids(whole[i]) for i in range(320)]
    for ahead in (0, 3, 2 * EACH):
        whole = stream(source)
        for index in range(5, 300, 35):
            assert ids(whole[index + ahead]) == expected[index + ahead]
            whole.save(tmp_path, index)
            assert len(whole.places) <= 2 + ahead // EACH + 1
            cut = stream(source)
            cut.load(tmp_path)
            assert [ids(cut[i]) for i in range(index, index + 12)] == expected[index : index + 12]


@pytest.mark.parametrize("source", ["name"], indirect=True)
def test_a_file_of_a_data_set_that_was_read_is_not_opened_again(source, tmp_path):
    whole = stream(source)
    expected = [ids(whole[i]) for i in range(160)]
    again = stream(source)
    again[144]
    again.save(tmp_path, 144)
    state = json.loads((tmp_path / "stream.json").read_text())
    assert state[0] == 144 // EACH
    cut = stream(source)
    cut.load(tmp_path)
    (tmp_path / "0.jsonl").unlink()
    assert [ids(cut[i]) for i in range(144, 160)] == expected[144:]


def test_reads_no_more_than_a_buffer_ahead(monkeypatch, tmp_path):
    """Of a text that never ends; and after a resume, tokenizes nothing that lies before."""
    read, encoded = [], []

    def endless(*_):
        for number in count():
            read.append(number)
            yield iter([f"{number:09}"])  # ten tokens

    def encoder(tokenizer):
        return lambda text: encoded.append(text) or np.frombuffer(text.encode(), np.uint8).astype(np.uint16)

    monkeypatch.setattr(streamed, "stream_documents", endless)
    monkeypatch.setattr(streamed, "encoder", encoder)
    windows = stream("endless.txt", windows=10**9)
    for index in range(0, 10_000, EACH):
        assert windows[index]["input_ids"].shape == (LENGTH,)
        assert len(read) * 10 - (index + EACH) * LENGTH < 10
    windows.save(tmp_path, index)
    later = stream("endless.txt", windows=10**9)
    later.load(tmp_path)
    encoded.clear()
    assert ids(later[index]) == ids(windows[index])
    assert len("".join(encoded)) < EACH * LENGTH


# Runs


def config(folder, source, **options):
    held_out = folder.parent / "held_out.txt"
    held_out.write_text("8 and 9\n" * 40)
    data = {"train": source, "validation": str(held_out), "test": str(held_out), "streaming": True}
    return parse_config(TASK, {
        "output": str(folder),
        "model": {"variant": "lmm", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                  "num_attention_heads": 2, "chunk_size": 8},
        "data": data | options,
        "training": {"length": LENGTH, "batch_size": 3, "tokens": LENGTH * 6 * 15, "eval_every": 5,
                     "gradient_accumulation": 2},
    })  # fmt: skip


@pytest.mark.parametrize("source", ["a.jsonl", "name"], indirect=True)
def test_a_resumed_run_ends_as_one_that_was_not(tmp_path, monkeypatch, source):
    whole, cut, begun = tmp_path / "whole", tmp_path / "cut", []
    go_to = StreamedWindows._go_to
    monkeypatch.setattr(StreamedWindows, "_go_to", lambda self, *place: (begun.append(place[0]), go_to(self, *place)))
    train(config(whole, source), TASK, evaluate=False, progress=False)
    shutil.copytree(whole, cut)
    (cut / "metrics.jsonl").unlink()
    shutil.rmtree(cut / "checkpoints" / "checkpoint-15")
    train(config(cut, source), TASK, resume=True, evaluate=False, progress=False)
    assert begun == [0, 0, 10 * 6 // EACH]  # the place was found again without all that lies before it
    assert losses(cut) == losses(whole)
    assert len(losses(whole)) == 15 + 3
    found, expected = (load_file(folder / "model.safetensors") for folder in (cut, whole))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": None}, r"data\.train=None is not valid; use the text"),
        (
            {"validation": None},
            r"data\.validation=None is not valid; use a text of its own: data\.train='a.txt' is str",
        ),
        ({"test": None}, r"data\.test=None is not valid; use a text of its own"),
        ({"carry": True}, r"data\.carry=True is not valid; use false with data\.streaming, or `titans prepare`"),
    ],
)
def test_what_does_not_go_with_it(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path / "run", "a.txt", **options)


def test_what_cannot_be_read_leaves_nothing(tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "field.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "a.txt").write_text("1 and 2")
    prepare(tmp_path / "a.txt", tmp_path / "tokens", BYTES, progress=False)
    messages = {
        "empty.jsonl": "holds no text; give", "field.jsonl": "no text in field 'text'",
        "tokens": r"holds tokens .* without data\.streaming", "missing.txt": "does not exist; give",
    }  # fmt: skip
    for name, message in messages.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(config(tmp_path / "run", str(tmp_path / name)), TASK, progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", ["saved", "name"], indirect=True)
def test_another_column(source):
    with pytest.raises(ValueError, match=r"has no column 'body'; it has \['text'\]"):
        StreamedWindows(source, "body", BYTES, LENGTH, 10, 0)
