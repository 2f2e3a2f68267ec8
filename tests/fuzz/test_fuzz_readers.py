"""All that reads files, at any bytes and at whole files after accidents: a result, or an error that names the file."""

import gzip
import json
import lzma
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from fuzzing import fuzz, refused
from hypothesis import strategies as st

from titans.forecasting.table import read_table
from titans.memory import MemoryMLP, MemoryState
from titans.memory.state import load_tensors, save_tensors
from titans.models import TitansCache, TitansConfig, TitansForCausalLM
from titans.models.configuration import VARIANTS
from titans.tasks import get_task
from titans.training.checkpoints import last_checkpoint
from titans.training.config import load_yaml, parse_config
from titans.training.files import publish
from titans.training.prepared import PreparedCorpus, prepare
from titans.training.sequences import read_records
from titans.training.series import load_windows
from titans.training.text import read_documents
from titans.training.tokens import byte_tokenizer, encode

LANGUAGE, BYTES = get_task("language"), byte_tokenizer()
HOURS = [f"2016-07-{1 + i // 24:02} {i % 24:02}:00:00" for i in range(30)]
TABLE = "date,a,b\n" + "".join(f"{hour},{i},{-1.5 * i}\n" for i, hour in enumerate(HOURS))
ROWS = "".join(json.dumps({"text": f"line {i}, Grüße", "n": i}) + "\n" for i in range(5))
CONFIG = {"model": {"type": "titans", "variant": "mag"}, "data": {"train": "a.txt"}, "training": {"tokens": 2e6}}
# what a parser may trip over
PIECES = [
    b"", b"\0", b"\r", b"\n\n", b"\"", b"'", b",", b";", b":", b"{", b"[" * 3000, b"}", b">", b"\xff", b"\xfe\xff",
    b"\xef\xbb\xbf", b"nan", b"-inf", b"1e999", b"9" * 5000, b"\\ud800", b"\xed\xa0\x80", b"null", b"-1", b"0.5",
    b"2016-13-45", b"0001-01-01 00:00:00", b"9999-12-31", b"&a *a", b"!!python/name:os.system", b"../", b"<<: 1", b"\t",
]  # fmt: skip
VALUES = [None, True, -1, 0, 1, 2.5, 10**30, "", "x", "O", "<u4", "../config.yaml", [], [1], {}, {"x": 1}]


def damage(data: st.DataObject, whole: bytes) -> bytes:
    """Any bytes, or those of a whole file after up to three accidents."""
    if data.draw(st.integers(0, 9), "whole file") == 9:
        return data.draw(st.binary(max_size=200), "bytes")
    found = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 3), "accidents")):
        start = data.draw(st.integers(0, len(found)), "place")
        stop = min(len(found), start + data.draw(st.sampled_from([0, 1, 2, 8, 10**9]), "length"))
        how = data.draw(st.sampled_from(["flip", "piece", "repeat"]), "how")
        if how == "flip" and start < len(found):
            found[start] ^= 1 << data.draw(st.integers(0, 7), "bit")
        elif how == "piece":
            found[start:stop] = data.draw(st.sampled_from(PIECES), "piece")
        elif how == "repeat":
            found[start:start] = found[start:stop]
    return bytes(found)


def spoil(data: st.DataObject, value: Any) -> Any:
    """A JSON value with one of its parts, or all of it, replaced or left out."""
    value, at = json.loads(json.dumps(value)), None
    place: Any = {"all": value}
    keys = ["all"]
    while True:
        at = data.draw(st.sampled_from(keys), "key")
        inner = place[at]
        if not isinstance(inner, dict) or not inner or data.draw(st.integers(0, 3)) == 0:
            break
        place, keys = inner, sorted(inner)
    if data.draw(st.booleans(), "left out"):
        del place[at]
        return value if at != "all" else None
    place[at] = data.draw(st.sampled_from(VALUES), "value")
    return place["all"] if at == "all" and place.keys() == {"all"} else value


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def read_config(path: Path) -> None:
    values = load_yaml(path)
    refused(lambda: parse_config(LANGUAGE, values), "")


READERS: dict[str, tuple[bytes, Callable[[Path], Any]]] = {
    "config.yaml": (yaml.safe_dump(CONFIG).encode(), read_config),
    "series.csv": (TABLE.encode(), lambda path: load_windows(str(path), 4, 2)),
    "table.csv": (TABLE.encode(), read_table),
    "table.csv.gz": (gzip.compress(TABLE.encode(), mtime=0), read_table),
    "records.csv": (b"id,sequence,label\na,ACGT,1\nb,NNU,0\n", lambda path: list(read_records(path))),
    "records.fa": (b">a first\nACGT\nAC\n>b\nnnu\n", lambda path: list(read_records(path))),
    "text.txt": ("Grüße\r\nand more\n".encode(), lambda path: encode(BYTES, list(read_documents(path)))),
    "text.jsonl": (ROWS.encode(), lambda path: encode(BYTES, list(read_documents(path)))),
    "text.txt.gz": (gzip.compress(b"one\ntwo\n", mtime=0), lambda path: list(read_documents(path))),
    "text.jsonl.xz": (lzma.compress(ROWS.encode()), lambda path: list(read_documents(path))),
    "folder/text.txt": (b"one\ntwo\n", lambda path: list(read_documents(path.parent))),
}


@fuzz(few=250, many=6500)
def test_files(data):
    name = data.draw(st.sampled_from([*READERS]), "file")
    whole, read = READERS[name]
    with folder() as home:
        path = home / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(damage(data, whole))
        refused(lambda: read(path), path.name, str(path.parent))
        assert [p for p in home.rglob("*") if p.is_file()] == [path], "something was left beside the file"


@fuzz(few=20, many=700)
def test_prepare_is_whole_or_not_there(data):
    name = data.draw(st.sampled_from(["text.txt", "text.jsonl", "text.txt.gz", "records.fa"]), "file")
    with folder() as home:
        path, output = home / name, home / "tokens"
        path.write_bytes(damage(data, READERS[name][0]))
        if refused(lambda: prepare(path, output, BYTES, progress=False), name):
            assert [*home.iterdir()] == [path], "something was left beside the file"
        else:
            assert list(PreparedCorpus(output, BYTES).ids)


@cache
def made(name: str) -> Path:
    """A prepared text, or a run with two checkpoints."""
    home = Path(tempfile.mkdtemp())
    if name == "tokens":
        (home / "text.jsonl").write_text(ROWS)
        prepare(home / "text.jsonl", home / name, BYTES, progress=False)
        return home / name
    run = home / name
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("task: language\n")
    for step in (10, 20):
        (home / "part").mkdir()
        (home / "part" / "model.safetensors").write_bytes(b"weights" * step)
        publish(home / "part", run / "checkpoints" / f"checkpoint-{step}")
    return run


def damage_one(data: st.DataObject, home: Path) -> Path:
    """One file of a folder damaged, or left out; of a manifest often a single value."""
    path = data.draw(st.sampled_from(sorted(p for p in home.rglob("*") if p.is_file())), "file")
    if data.draw(st.integers(0, 9), "left out") == 9:
        path.unlink()
    elif path.name == "manifest.json" and data.draw(st.booleans(), "a value"):
        path.write_text(json.dumps(spoil(data, json.loads(path.read_text()))))
    else:
        path.write_bytes(damage(data, path.read_bytes()))
    return path


@fuzz(few=80, many=1000)
def test_prepared_folders(data):
    with folder() as home:
        tokens = Path(shutil.copytree(made("tokens"), home / "tokens"))
        damage_one(data, tokens)
        refused(lambda: list(PreparedCorpus(tokens, BYTES).ids), "tokens")


@fuzz(few=60, many=600)
def test_checkpoints(data):
    with folder() as home:
        run = Path(shutil.copytree(made("run"), home / "run"))
        for step in data.draw(st.sampled_from([(20,), (10,), (20, 10)]), "checkpoints"):
            damage_one(data, run / "checkpoints" / f"checkpoint-{step}")
        refused(lambda: last_checkpoint(run), "run")


@cache
def reader(variant: str) -> tuple[TitansForCausalLM, bytes]:
    """A model and the file of a memory that it made."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 7,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    model = TitansForCausalLM(TitansConfig(variant=variant, **sizes, memory_expansion=1, chunk_size=2, segment_length=3,
                                           sliding_window=3)).eval()  # fmt: skip
    with folder() as home:
        model.memorize(torch.ones(1, 5, dtype=torch.long)).save_pretrained(home / "m", model)
        return model, (home / "m").read_bytes()


@fuzz(few=80, many=1000)
def test_memories_of_models(data):
    model, whole = reader(data.draw(st.sampled_from(VARIANTS), "variant"))
    with folder() as home:
        path = home / "book.memory"
        path.write_bytes(whole)
        if data.draw(st.booleans(), "a value"):
            tensors, metadata = load_tensors(path)
            about = spoil(data, json.loads(metadata["titans_memory"]))
            save_tensors(tensors, path, {"titans_memory": json.dumps(about)})
        else:
            path.write_bytes(damage(data, whole))
        loaded: list[TitansCache] = []
        if not refused(lambda: loaded.append(TitansCache.load(path, model)), path.name):
            with torch.no_grad():
                for length in (1, 1, 4):
                    x = torch.ones(1, length, dtype=torch.long)
                    refused(lambda x=x: model(x, cache=loaded[0]), "NaN or infinity")
        assert [*home.iterdir()] == [path], "something was left beside the file"


@fuzz(few=40, many=200)
def test_states_of_memories(data):
    network = MemoryMLP(depth=data.draw(st.integers(1, 4), "depth"), expansion=1)
    with folder() as home:
        path = home / "a.state"
        MemoryState.initial(network.init(1, 2)[: network.depth], 1, 2).save(path)
        path.write_bytes(damage(data, path.read_bytes()))
        refused(lambda: MemoryState.load(path), path.name)
