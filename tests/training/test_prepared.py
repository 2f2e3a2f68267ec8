"""titans prepare: the same tokens as from the text, mapped and not loaded; whole or not there."""

import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from titans.cli import main
from titans.tasks import get_task
from titans.training.carried import DocumentStreams
from titans.training.config import parse_config
from titans.training.prepared import PreparedCorpus, prepare
from titans.training.run import train
from titans.training.text import read_documents
from titans.training.tokens import Corpus, WindowDataset, byte_tokenizer, digest

TASK = get_task("language")
BYTES = byte_tokenizer()
ROWS = [f"{i} and {i * i}, Grüße " * (1 + i % 7) for i in range(30)]


def words(number, filler=0):
    """A tokenizer of words, in which where a text is cut matters; ``filler`` more of them in its vocabulary."""
    vocabulary = {
        word: i for i, word in enumerate(["<unk>", "<end>", *map(str, range(number)), "and", "\n", " ", "\n\n"])
    }
    vocabulary |= {f"filler{i}": len(vocabulary) + i for i in range(filler)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>", pad_token="<end>")


@pytest.fixture
def texts(tmp_path):
    """A folder of all that is read: text, JSON lines, packed, empty, and what is skipped."""
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ["", *ROWS]))
    (folder / "b.txt").write_text("\ufeff1 and 2\n\n3\r\n4 and \u2028 5" * 30, newline="")
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"6 and 7\n" * 40))
    (folder / "sub" / "long.txt").write_text("\n\n".join(f"{i} and {i % 7}" for i in range(20_000)))
    (folder / "binary.bin").write_bytes(b"1 and 2" * 30_000 + b"\0")
    (folder / "empty.txt").write_text("")
    return folder


@pytest.mark.parametrize(("tokenizer", "dtype"), [(BYTES, "<u2"), (words(90), "|u1"), (words(90, 70_000), "<u4")])
def test_the_tokens_are_those_of_the_text(tmp_path, texts, tokenizer, dtype):
    counts = prepare(texts, tmp_path / "tokens", tokenizer, progress=False)
    documents = list(read_documents(texts))
    expected, got = Corpus.build(documents, tokenizer), PreparedCorpus(tmp_path / "tokens", tokenizer)
    assert len(got.ids) == len(expected.ids) == counts.documents == len(ROWS) + 3
    assert counts.bytes == expected.num_bytes
    assert counts.tokens == len(got.packed()) == expected.num_tokens + counts.documents
    assert got.packed().dtype == expected.packed().dtype == np.dtype(dtype)
    assert isinstance(got.packed(), np.memmap)
    assert np.array_equal(got.packed(), expected.packed())
    assert all(np.array_equal(a, b) for a, b in zip(got.ids, expected.ids, strict=True))
    windows = [WindowDataset(corpus.packed(), 100) for corpus in (got, expected)]
    streams = [DocumentStreams(corpus, 100, 4, 400, seed=3) for corpus in (got, expected)]
    for a, b in (windows, streams):
        assert len(a) == len(b)
        assert all(torch.equal(a[i][name], b[i][name]) for i in range(len(a)) for name in a[i])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.txt.xz", "saved"])
def test_every_source(tmp_path, name):
    path = tmp_path / name
    if name == "saved":
        pytest.importorskip("datasets").Dataset.from_list([{"text": row} for row in ROWS]).save_to_disk(path)
    else:
        lines = [json.dumps({"text": row}) if "jsonl" in name else row for row in ROWS]
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        with opener(path, "wt", encoding="utf-8") as file:
            file.write("\n".join(lines))
    prepare(path, tmp_path / "tokens", BYTES)
    expected = Corpus.build(read_documents(path), BYTES)
    assert np.array_equal(PreparedCorpus(tmp_path / "tokens", BYTES).packed(), expected.packed())


def test_takes_little_memory(tmp_path):
    path = tmp_path / "a.txt"
    with path.open("w") as file:
        file.writelines(f"{i} and {i * i}\n" for i in range(700_000))
    tracemalloc.start()
    counts = prepare(path, tmp_path / "tokens", BYTES, progress=False)
    windows = WindowDataset(PreparedCorpus(tmp_path / "tokens", BYTES).packed(), 512)
    assert windows[len(windows) - 1]["input_ids"].shape == (512,)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts.tokens == path.stat().st_size + 1 > 12e6
    assert peak < 3e6


def config(folder, data, carry):
    return parse_config(TASK, {
        "output": str(folder),
        "model": {"variant": "lmm", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                  "num_attention_heads": 2, "chunk_size": 8},
        "data": data | {"carry": carry},
        "training": {"length": 32, "batch_size": 4, "tokens": 32 * 4 * 6},
    })  # fmt: skip


@pytest.mark.parametrize("carry", [False, True])
def test_trains_as_from_the_text(tmp_path, texts, carry):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("8 and 9\n" * 40)
    assert main(["prepare", str(texts), "-o", str(tmp_path / "tokens")]) == 0
    losses = []
    for source in (texts, tmp_path / "tokens"):
        data = {"train": str(source), "validation": str(held_out), "test": str(held_out)}
        train(config(tmp_path / f"run-{source.name}", data, carry), TASK, evaluate=False, progress=False)
        entries = [json.loads(line) for line in (tmp_path / f"run-{source.name}" / "metrics.jsonl").open()]
        losses.append([e[key] for e in entries for key in ("loss", "eval_loss") if key in e])
    assert losses[0] == losses[1]


@pytest.fixture
def prepared(tmp_path, texts):
    prepare(texts, tmp_path / "tokens", BYTES, progress=False)
    return tmp_path / "tokens"


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


DAMAGE = {
    "tokens": (lambda f: cut(f / "tokens.bin"), r"tokens\.bin holds \d+ bytes instead of \d+"),
    "documents": (lambda f: (f / "documents.bin").unlink(), r"documents\.bin holds no bytes instead of"),
    "unnamed": (lambda f: (f / "manifest.json").write_text('{"files": {}}'), r"manifest\.json does not name \w+\.bin"),
    "unfinished": (lambda f: (f / "manifest.json").unlink(), r"has no manifest\.json: it was not written to its end"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_an_incomplete_folder_does_not_train(prepared, name):
    damage, message = DAMAGE[name]
    damage(prepared)
    data = {"train": str(prepared), "validation": "v.txt", "test": "t.txt"}
    with pytest.raises(ValueError, match=message + r".*; make .*tokens again with `titans prepare`"):
        TASK.load(config(prepared / "run", data, False))


def test_another_tokenizer_is_refused(tmp_path, prepared):
    with pytest.raises(ValueError, match=r"made with another tokenizer \(sha256 .*\); set data\.tokenizer"):
        PreparedCorpus(prepared, words(10))
    BYTES.save_pretrained(tmp_path / "tokenizer")
    data = {"train": str(prepared), "validation": str(tmp_path / "texts" / "b.txt"), "test": "t.txt"}
    again = config(tmp_path / "run", data | {"tokenizer": str(tmp_path / "tokenizer")}, False)
    assert len(TASK.load(again).train)  # the same tokenizer from elsewhere
    assert digest(words(10)) != digest(words(11))


def test_tokens_hold_no_text(tmp_path, prepared, capsys):
    for split in ("validation", "test"):
        data = {"train": str(prepared), "validation": "v.txt", "test": "t.txt"} | {split: None}
        with pytest.raises(ValueError, match=rf"data\.{split}=None is not valid; use a text of its own"):
            TASK.load(config(tmp_path / "run", data, False))
    with pytest.raises(ValueError, match=r"holds tokens of `titans prepare`, no text"):
        list(read_documents(prepared))
    assert main(["prepare", str(prepared), "-o", str(tmp_path / "again")]) == 2
    assert "holds tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; give a text file"),
        (b"", "is empty"),
        (b"a" * 200_000 + b"\0", "is not utf-8 text"),
        (b'{"body": "a"}\n', "no text in field 'text'"),
        (b'{"text": ""}\n', "holds no text"),
    ],
)
def test_what_cannot_be_read_leaves_nothing(tmp_path, content, message, capsys):
    path = tmp_path / ("a.jsonl" if content and content[:1] == b"{" else "a.txt")
    if content is not None:
        path.write_bytes(content)
    assert main(["prepare", str(path), "-o", str(tmp_path / "tokens")]) == 2
    assert message in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} <= {path.name}


def test_what_is_there_stays(prepared, texts, capsys):
    before = (prepared / "manifest.json").read_bytes()
    assert main(["prepare", str(texts), "-o", str(prepared)]) == 2
    assert "exists already; delete it or use another name" in capsys.readouterr().err
    assert (prepared / "manifest.json").read_bytes() == before


def test_a_killed_preparation_leaves_nothing_that_trains(tmp_path):
    text, folder = tmp_path / "a.txt", tmp_path / "tokens"
    os.mkfifo(text)  # a text that never ends
    code = "import sys; from titans.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, "prepare", str(text), "-o", str(folder)])
    part = tmp_path / ".tokens.part" / "tokens.bin"
    with suppress(BrokenPipeError), text.open("w") as pipe:
        while not part.exists() or part.stat().st_size < 100_000:
            assert process.poll() is None
            pipe.write("1 and 2\n" * 1000)
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not folder.exists()
    with pytest.raises(ValueError, match=r"has no manifest\.json: it was not written to its end"):
        PreparedCorpus(part.parent, BYTES)
    with pytest.raises(ValueError, match="holds tokens"):
        list(read_documents(part.parent))
    text.unlink()
    text.write_text("3 and 4")
    assert prepare(Path(text), folder, BYTES, progress=False).tokens == 8
    assert not part.exists()
