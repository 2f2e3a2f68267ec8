"""Readers, tokenizers, windows."""

import gzip
import json
import lzma
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans.training.text import hold_out, read_documents, stdlib_documents, stream_documents, truncate
from titans.training.tokens import Corpus, WindowDataset, byte_tokenizer, encode, load_tokenizer, stream

BYTES = byte_tokenizer()
ROWS = [{"text": "first"}, {"text": "second\nline"}]


def _json_lines(rows):
    return "\n".join(json.dumps(row) for row in rows) + "\n"


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_text_and_json_lines_plain_and_packed(tmp_path, suffix):
    opener = {"": open, ".gz": gzip.open, ".xz": lzma.open}[suffix]
    for name, content in (("a.txt", "Grüße\n"), ("b.jsonl", _json_lines(ROWS))):
        with opener(tmp_path / (name + suffix), "wt", encoding="utf-8") as file:
            file.write(content)
    assert list(read_documents(tmp_path / f"a.txt{suffix}")) == ["Grüße\n"]
    assert list(read_documents(tmp_path / f"b.jsonl{suffix}")) == ["first", "second\nline"]


def test_folder_is_sorted_recursive_and_skips_binary_files_with_one_warning(tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    (tmp_path / "z.txt").write_text("last")
    (tmp_path / "a.jsonl").write_text(_json_lines(ROWS))
    (tmp_path / "sub" / "m.py").write_text("middle")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "x.bin").write_bytes(b"\0\1")
    (tmp_path / "y.bin").write_bytes(b"\xff\xfe")
    assert list(read_documents(tmp_path)) == ["first", "second\nline", "middle", "last"]
    assert len(caplog.records) == 1
    assert "2 files" in caplog.text


def test_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "split")
    assert list(read_documents(tmp_path / "one")) == ["first", "second\nline"]
    assert list(read_documents(f"{tmp_path / 'split'}:test")) == ["first", "second\nline"]
    with pytest.raises(ValueError, match=r"no column 'body'.*'text'"):
        list(read_documents(tmp_path / "one", text_field="body"))


def test_bad_inputs_name_the_mend(tmp_path):
    cases = {
        "empty.txt": (b"", "is empty"),
        "nul.txt": (b"abc\0def", "NUL bytes"),
        "latin.txt": ("é".encode("latin-1"), "convert it to utf-8"),
        "packed.gz": (b"no gzip", "pack it again"),
        "field.jsonl": (b'{"text": "a"}\n{"body": "b"}\n', r"line 2: no text in field 'text'.*\['body'\]"),
        "broken.jsonl": (b'{"text": "a"}\n{"te', "line 2: not JSON"),
        "nested.jsonl": (b"[" * 10_000, "nested.jsonl, line 1: not JSON"),
        "digits.jsonl": (b'{"text": ' + b"9" * 5000, "digits.jsonl, line 1: not JSON"),
        "half.jsonl": (b'{"text": "a\\ud800"}', r"half.jsonl, line 1: half a character, \\ud800 to \\udfff alone"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(read_documents(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list(read_documents(tmp_path / "missing.txt"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="holds no text"):
        list(read_documents(tmp_path / "nothing"))


def test_dataset_name_without_the_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"titans\[data\]"):
        list(read_documents("some/name"))


def test_stdlib_splits_are_disjoint_and_repeatable():
    splits = {name: list(stdlib_documents(name)) for name in ("train", "validation", "test")}
    sizes = {name: sum(map(len, documents)) for name, documents in splits.items()}
    assert sizes["train"] > 5 * (sizes["validation"] + sizes["test"]) > 0
    assert not set(splits["train"]) & set(splits["test"])
    assert splits["test"] == list(stdlib_documents("test"))


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_byte_tokenizer_round_trips_and_equals_the_table(text):
    ids = BYTES(text)["input_ids"]
    assert ids == list(text.encode()) == encode(BYTES, [text])[0].tolist()
    assert BYTES.decode(ids) == text


def test_special_tokens_in_a_text_are_text(tmp_path):
    text = "a<|endoftext|>b"
    assert BYTES(text)["input_ids"] == list(text.encode())
    assert (len(BYTES), BYTES.bos_token_id, BYTES.eos_token_id, BYTES.pad_token_id) == (258, 256, 256, 257)
    BYTES.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))(text)["input_ids"] == list(text.encode())


def test_gpt2_form_of_a_tokenizer_folder(tmp_path):
    letters = {letter: i for i, letter in enumerate([*sorted(BYTES.get_vocab()), "th"])}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\n")
    tokenizer = load_tokenizer(str(tmp_path))
    corpus = Corpus.build(["the path"], tokenizer)
    assert corpus.num_tokens == 6
    assert (corpus.num_bytes, corpus.num_words) == (8, 2)
    assert tokenizer.decode(corpus.ids[0]) == "the path"
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path / "none"))


def test_windows_are_packed_with_end_of_text_between_documents():
    corpus = Corpus.build(["abc", "de"], BYTES)
    assert corpus.packed().tolist() == [97, 98, 99, 256, 100, 101, 256]
    assert corpus.ids[0].dtype == np.uint16
    windows = WindowDataset(corpus.packed(), 3)
    assert [window["input_ids"].tolist() for window in windows] == [[97, 98, 99], [256, 100, 101]]
    assert len(windows) == 2
    assert windows[0]["labels"].tolist() == [97, 98, 99]
    with pytest.raises(ValueError, match=r"training\.length=8 .* 7 tokens"):
        WindowDataset(corpus.packed(), 8)


def test_truncate_keeps_every_beginning_and_whole_characters():
    assert truncate(["a" * 10, "b" * 100, "c" * 1000], 200) == ["a" * 10, "b" * 95, "c" * 95]
    assert truncate(["ab", "c"], 100) == ["ab", "c"]
    assert truncate(["éé"], 3) == ["é"]


def test_hold_out_cuts_the_end():
    first, last = hold_out(["abcd", "efghij"], 0.3)
    assert (first, last) == (["abcd", "efg"], ["hij"])


@pytest.mark.parametrize(
    "text", ["ä line\r\nand\u2028another\rone\n" * 9000, "no line ends at all €" * 9000, "\ufeffshort"]
)
def test_blocks_are_whole_lines_and_make_up_the_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text, newline="")
    (document,) = stream_documents(tmp_path / "a.txt")
    blocks = list(document)
    assert "".join(blocks) == text.removeprefix("\ufeff")
    assert (len(blocks) > 1) == (len(text) > 2**16)
    assert all(len(b) <= 2**17 and (b[-1] == "\n" or "\n" not in text) for b in blocks)
    assert list(read_documents(tmp_path / "a.txt")) == ["".join(blocks)]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.xz"])
def test_a_stream_takes_little_memory(tmp_path, name):
    path = tmp_path / name
    with lzma.open(path, "wt", preset=0) if name.endswith("xz") else open(path, "w") as file:
        for i in range(2000):
            file.write(json.dumps({"text": f"{i:04}" * 1000}) + "\n")
    tracemalloc.start()
    tokens = sum(len(ids) - 1 for ids in stream(BYTES, stream_documents(path), 512)) + 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tokens == (2000 * 4001 if "jsonl" in name else 1 + 2000 * 4013)
    assert peak < 2e6


@given(st.lists(st.lists(st.text(min_size=1), min_size=1), min_size=1), st.integers(1, 9))
@settings(max_examples=100)
def test_stream_is_the_documents_with_end_of_text_before_each(documents, size):
    expected = [i for blocks in documents for i in (256, *"".join(blocks).encode())]
    windows = [w.tolist() for w in stream(BYTES, documents, size)]
    assert [i for w in windows for i in w[:size]] == expected
    assert all(len(w) == size + 1 and w[-1] == after[0] for w, after in pairwise(windows))
    assert 1 <= len(windows[-1]) <= size


def test_a_stream_of_any_tokenizer(tmp_path):
    """Every block by itself, so that the tokens do not depend on anything but the text."""
    letters = {letter: i for i, letter in enumerate([*sorted(BYTES.get_vocab()), "th"])}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\n")
    tokenizer = load_tokenizer(str(tmp_path))
    text = "the path\n" * 9000
    (tmp_path / "a.txt").write_text(text)
    got = np.concatenate([w[:100] for w in stream(tokenizer, stream_documents(tmp_path / "a.txt"), 100)])
    assert got.tolist() == [tokenizer.eos_token_id, *encode(tokenizer, [text])[0]]
