"""Text in: readers of files, folders and data sets, the embedded default, cutting to size."""

import csv
import gzip
import hashlib
import io
import json
import logging
import lzma
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

from titans.training.nucleotides import nucleotides

if TYPE_CHECKING:
    from titans.training.config import TextData

logger = logging.getLogger(__name__)

Opener = Callable[[Path], IO[bytes]]

TOKENS = "tokens.bin"  # marks a folder of `titans prepare`
_UNPACKERS = {".gz": gzip.open, ".xz": lzma.open}
_FASTA = (".fa", ".fasta", ".fna")
_BLOCK = 2**16  # characters of a block of text, without the rest of its last line
_DATASET_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
# Folders of the standard library that hold tests, generated tables or what was installed later.
_STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3"}


def read_documents(source: str | os.PathLike, text_field: str = "text") -> Iterator[str]:
    """The documents of `stream_documents`, each in one piece; those without text are left out.

    Raises:
        ValueError: no document at all; else as `stream_documents`.
    """
    found = False
    for blocks in stream_documents(source, text_field):
        if document := "".join(blocks):
            found = True
            yield document
    if not found:
        raise ValueError(f"source={str(source)!r} holds no text; give a file, folder or data set with text in it")


def is_dataset(source: str | os.PathLike) -> bool:
    """Whether that is a folder saved by `datasets`, or no file or folder and reads like a name of a data set.

    That is `name`, `owner/name`, either with `:split`, or `saved_folder:split`.
    """
    path, source = Path(source), str(source)
    if path.exists():
        return any((path / name).exists() for name in ("dataset_dict.json", "dataset_info.json"))
    saved, colon, _ = source.rpartition(":")
    if colon and Path(saved).is_dir():
        return True
    files = {".txt", ".md", ".py", ".json", ".jsonl", ".csv", *_FASTA, *_UNPACKERS}
    return bool(_DATASET_NAME.fullmatch(source)) and Path(source).suffix.lower() not in files


def _open(path: Path) -> IO[bytes]:
    return path.open("rb")


@contextmanager
def _open_text(path: Path, opened: Opener, newline: str = "\n") -> Iterator[TextIO]:
    """A file's text, unpacked, its line ends as they are; what cannot be read is a ValueError."""
    unpack: Any = _UNPACKERS.get(path.suffix, nullcontext)
    try:
        with opened(path) as file, unpack(file) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline=newline) as text:
            yield text
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable {path.suffix} file ({error}); pack it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not utf-8 text ({error}); give a text file or convert it to utf-8") from error


def _text(path: Path, piece: str) -> str:
    if "\0" in piece:
        raise ValueError(f"{path} is not utf-8 text (it holds NUL bytes); give a text file")
    return piece


def _suffix(path: str | os.PathLike) -> str:
    """`.jsonl` of `a.jsonl` and of `a.jsonl.gz`."""
    path = Path(path)
    return Path(path.stem).suffix if path.suffix in _UNPACKERS else path.suffix


def is_fasta(path: str | os.PathLike) -> bool:
    """Whether a file's name says that it holds FASTA records: .fa, .fasta or .fna, also packed."""
    return _suffix(path) in _FASTA


def read_fasta(path: str | os.PathLike, opened: Opener = _open) -> Iterator[tuple[str, str]]:
    """The name (the first word after `>`) and the sequence (A, C, G, T, N) of every record, one at a time.

    Raises:
        ValueError: no record at the beginning, one without a sequence, a letter that is no nucleotide.
        ImportError: `biopython` is not installed.
    """
    try:
        from Bio.SeqIO.FastaIO import SimpleFastaParser  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("reading FASTA files needs `biopython`: pip install 'titans[dna]'") from error
    with _open_text(Path(path), opened) as file:
        first = next((line for line in file if line.strip()), "")
        if not first.startswith(">"):  # the parser would pass over all before the first record
            raise ValueError(f"{path} does not begin with a FASTA record; give it a line of `>` and a name")
        for number, (title, text) in enumerate(SimpleFastaParser(chain([first], file)), start=1):
            name = next(iter(title.split()), f"record {number}")
            if not text:
                raise ValueError(f"{path}, record {name!r} has no sequence; give it one or remove it")
            yield name, nucleotides(text, f"{path}, record {name!r}")


def read_csv(path: str | os.PathLike) -> Iterator[tuple[int, list[str]]]:
    """The lines of a CSV file, that of the names first, one at a time: where in the file it ends, and its cells.

    Raises:
        ValueError: no names, nothing below them, a line of another length, no text.
    """
    csv.field_size_limit(2**31 - 1)  # a cell may hold a chromosome
    header, count = None, 0
    with _open_text(Path(path), _open, newline="") as file:
        reader = csv.reader(_text(Path(path), line) for line in file)
        for cells in filter(None, reader):
            header, count = header or cells, count + 1
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num} has {len(cells)} cells, its first line {len(header)}; "
                    "give every line as many"
                )
            yield reader.line_num, cells
    if header is None:
        raise ValueError(f"{path} is empty; give a CSV file with a line of names and lines below it")
    if count == 1:
        raise ValueError(f"{path} has a line of names and nothing below it; give it lines")


def stream_documents(
    source: str | os.PathLike, text_field: str = "text", opened: Opener = _open
) -> Iterator[Iterator[str]]:
    """The documents of a file, a folder or a Hugging Face data set, in a fixed order, each as `blocks` of its text.

    At constant memory: a file may be of any size. A document is to be used up before the next.

    Args:
        source: a text file (any utf-8), a `.jsonl` or a FASTA file (a record is a document), each also as `.gz` or
            `.xz`; a folder (all files below it, sorted, binary ones skipped with a warning; or a data set saved by
            `datasets`); or a data set's name, `name` or `name:split` (split "train" by default).
        text_field: the field of a JSON line or data set row that holds the text.
        opened: opens a file to be read, in place of `open`.

    Raises:
        FileNotFoundError: nothing of that name.
        ValueError: an empty or binary file, a line without the field, a folder of tokens; when it is met.
        ImportError: a data set was asked for and `datasets` is not installed.
    """
    path = Path(source)
    if (path / TOKENS).exists():
        raise ValueError(
            f"source={str(source)!r} holds tokens of `titans prepare`, no text; data.train of the task language takes "
            "it, without data.streaming; everything else needs the text"
        )
    if is_dataset(source):
        return (blocks_of(row[text_field]) for row in open_dataset(str(source), text_field))
    if path.is_dir():
        return _read_folder(path, text_field, opened)
    if path.exists():
        return _read_file(path, text_field, opened)
    raise FileNotFoundError(
        f"source={str(source)!r} does not exist; give a text file, a folder, a .jsonl file or a data set's name"
    )


def blocks(text: TextIO) -> Iterator[str]:
    """A text as whole lines of about 64 Ki characters (a line longer than that is cut): the same every time."""
    while block := text.read(_BLOCK) + text.readline(_BLOCK):
        yield block


def blocks_of(document: str) -> Iterator[str]:
    """`blocks` of a text in memory."""
    return blocks(io.StringIO(document, newline="\n"))


def read_text(path: Path) -> str:
    """A utf-8 file, also .gz or .xz, without a byte order mark; ValueError if it is damaged, empty or not text."""
    return "".join(_blocks(path, _open))


def _blocks(path: Path, opened: Opener) -> Iterator[str]:
    empty = True
    with _open_text(path, opened) as file:
        for block in blocks(file):
            empty = False
            yield _text(path, block)
    if empty:
        raise ValueError(f"{path} is empty; give a file with text in it")


def _read_file(path: Path, text_field: str, opened: Opener) -> Iterator[Iterator[str]]:
    if is_fasta(path):
        yield from (blocks_of(sequence) for _, sequence in read_fasta(path, opened))
    elif _suffix(path) == ".jsonl":
        with _open_text(path, opened) as file:
            yield from map(blocks_of, _read_json_lines(path, file, text_field))
    else:
        yield _blocks(path, opened)


def _read_json_lines(path: Path, lines: Iterable[str], text_field: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not _text(path, line).strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); write one JSON object a line") from error
        if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
            fields = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(
                f"{path}, line {number}: no text in field {text_field!r}; the line has {fields}, "
                "name one of its fields with text_field"
            )
        if "\\u" in line and any("\ud800" <= letter <= "\udfff" for letter in row[text_field]):
            raise ValueError(f"{path}, line {number}: half a character, \\ud800 to \\udfff alone; write it as utf-8")
        yield row[text_field]


def files_of(folder: Path) -> list[Path]:
    """The files below a folder that are not empty, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def _read_folder(folder: Path, text_field: str, opened: Opener) -> Iterator[Iterator[str]]:
    binary = 0
    for path in files_of(folder):
        if is_fasta(path) or _is_text(path):  # a FASTA file that is none is an error
            yield from _read_file(path, text_field, opened)
        else:
            binary += 1
    if binary:
        logger.warning("%s: skipped %d files that are not utf-8 text", folder, binary)


def _is_text(path: Path) -> bool:
    """Reads all of a file: what is not text may come late, when the document has begun to be used."""
    try:
        for _ in _blocks(path, _open):
            pass
    except ValueError:
        return False
    return True


def open_dataset(source: str, text_field: str, streaming: bool = False) -> Any:
    """The rows of a data set: a `Dataset`, or an `IterableDataset` that reads them when asked (`streaming`).

    Raises:
        FileNotFoundError, ValueError, ImportError: as `stream_documents`.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"source={source!r} is no file or folder here, and reading a Hugging Face data set needs the "
            "package `datasets`: pip install 'titans[data]'"
        ) from error
    name, colon, split = source.rpartition(":")
    name = name if colon else source
    try:
        if Path(name).is_dir():
            rows: Any = datasets.load_from_disk(name)
            rows = rows[split if colon else "train"] if isinstance(rows, datasets.DatasetDict) else rows
            rows = rows.to_iterable_dataset() if streaming else rows
        else:
            rows = datasets.load_dataset(name, split=split if colon else "train", streaming=streaming)
    except Exception as error:  # the library raises a dozen types for "no such data set"
        raise FileNotFoundError(
            f"source={source!r} is neither a file, a folder nor a data set that can be loaded "
            f"({type(error).__name__}: {error}); check the name and the split"
        ) from error
    columns = rows.column_names or sorted(next(iter(rows), {}))  # streamed, they may be known from rows alone
    if text_field not in columns:
        raise ValueError(
            f"source={source!r} has no column {text_field!r}; it has {columns}, name one of them with text_field"
        )
    return rows


def stdlib_documents(split: str) -> Iterator[str]:
    """Source files of Python's standard library, read where it lies: a text that every machine already has.

    Args:
        split: "train", "validation" or "test": about 90, 5 and 5 % of the files, by a hash of the file's name.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _STDLIB_SKIPPED & set(name.parts):
            continue
        bucket = int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16) % 20
        if {0: "test", 1: "validation"}.get(bucket, "train") == split:
            text = path.read_text(encoding="utf-8", errors="replace")
            if text:
                yield text


def split_documents(data: "TextData", split: str) -> list[str]:
    """The documents of a split ("train", "validation" or "test"): its own source, or its share of the training text.

    Raises:
        ValueError, FileNotFoundError: as `read_documents`; also a path with an environment variable that is not set.
    """
    if split != "train" and (source := getattr(data, split)) is not None:
        return read_source(source, data.text_field)
    if data.train is None:
        return list(stdlib_documents(split))
    parts = {"train": read_source(data.train, data.text_field)}
    for held_out in ("validation", "test"):
        if getattr(data, held_out) is None:
            parts["train"], parts[held_out] = hold_out(parts["train"], 0.05)
    return parts[split]


def read_source(source: str, text_field: str = "text") -> list[str]:
    """`read_documents`, all at once, with environment variables in the path expanded."""
    return list(read_documents(expand(source), text_field))


def expand(path: str) -> str:
    """A path with its environment variables replaced; ValueError if one is not set."""
    expanded = os.path.expandvars(path)
    if "$" in expanded:
        raise ValueError(f"path={path!r} names an environment variable that is not set; set it or write the path")
    return expanded


def hold_out(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Cuts the last `fraction` of the characters off; a document across the border is cut in two."""
    left = round(sum(map(len, documents)) * (1 - fraction))
    first: list[str] = []
    last: list[str] = []
    for document in documents:
        first.append(document[:left])
        last.append(document[left:])
        left = max(0, left - len(document))
    return [d for d in first if d], [d for d in last if d]


def truncate(documents: Iterable[str], max_bytes: int) -> list[str]:
    """At most `max_bytes` utf-8 bytes in all, every document's beginning kept: the long ones are cut to one length."""
    encoded = [document.encode() for document in documents]
    left, limit = max_bytes, 0
    for rank, size in enumerate(sorted(map(len, encoded))):
        limit = max(limit, left // (len(encoded) - rank))
        left -= min(size, limit)
    kept = [data[:limit].decode(errors="ignore") for data in encoded]
    return [document for document in kept if document]


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text begin and end, by NLTK's Punkt algorithm (Kiss & Strunk 2006) without a model.

    That is what BABILong does. RULER loads NLTK's English model, a download, which knows abbreviations; here "Mr." ends
    a sentence where a capital follows.

    Raises:
        ImportError: `nltk` is not installed.
    """
    try:
        from nltk.tokenize.punkt import PunktSentenceTokenizer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("cutting text into sentences needs `nltk`: pip install 'titans[questions]'") from error
    return list(_made(PunktSentenceTokenizer).span_tokenize(text))


@cache
def _made(tokenizer: Callable[[], Any]) -> Any:
    """Made once: that takes as long as to cut a page."""
    return tokenizer()
