"""Texts of any size tokenized once, into files that training maps into memory."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.progress import BarColumn, Progress, TimeRemainingColumn

from titans.training.files import MANIFEST, publish, read_manifest
from titans.training.text import TOKENS, files_of, stream_documents
from titans.training.tokens import Tokenizer, digest, encoder

OFFSETS = "documents.bin"  # int64 [documents + 1]: where each begins in the tokens, and their number


@dataclass
class Counts:
    """What a folder holds: documents, their tokens with the end-of-text token of each, bytes of utf-8 text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


def is_prepared(folder: str | os.PathLike) -> bool:
    """Whether a folder was made by `prepare`, or should have been."""
    return (Path(folder) / TOKENS).exists()


def prepare(
    source: str | os.PathLike,
    output: str | os.PathLike,
    tokenizer: Tokenizer,
    *,
    text_field: str = "text",
    progress: bool = True,
) -> Counts:
    """Tokenizes all documents of `source`, at constant memory, into the folder `output`, whole or not at all.

    In the folder: `tokens.bin`, all ids end to end, the end-of-text token after each document; `documents.bin`, where
    each begins; `manifest.json`, with the counts, the tokenizer's sha256 and that of both files.

    Args:
        source, text_field: as in `stream_documents`.
        progress: show a progress bar.

    Raises:
        ValueError: `output` exists, or there is no text; else as `stream_documents`.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"output={str(output)!r} exists already; delete it or use another name")
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a preparation that was killed
    part.mkdir(parents=True)
    try:
        with _Bar(source, progress) as bar:
            counts = _write(source, part, tokenizer, text_field, bar)
        if not counts.documents:
            raise ValueError(f"source={str(source)!r} holds no text; give a file, folder or data set with text in it")
        about = {"tokenizer": digest(tokenizer), "dtype": encoder(tokenizer)("").dtype.str, **asdict(counts)}
        publish(part, output, {"source": str(source), **about})
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return counts


def _write(source: str | os.PathLike, part: Path, tokenizer: Tokenizer, text_field: str, bar: "_Bar") -> Counts:
    encode, counts = encoder(tokenizer), Counts()
    end = np.array([tokenizer.eos_token_id], dtype=encode("").dtype)
    with (part / TOKENS).open("wb") as tokens, (part / OFFSETS).open("wb") as offsets:
        for blocks in stream_documents(source, text_field, bar.opened):
            begin, size = counts.tokens, counts.bytes
            for block in blocks:
                ids = encode(block)
                tokens.write(ids.tobytes())
                counts.tokens += len(ids)
                counts.bytes += len(block.encode())
                bar.show(counts)
            if counts.bytes == size:
                continue  # a document without text
            tokens.write(end.tobytes())
            offsets.write(np.int64(begin).tobytes())
            counts.tokens += 1
            counts.documents += 1
        offsets.write(np.int64(counts.tokens).tobytes())
    return counts


class PreparedCorpus:
    """The documents of a folder of `prepare`, mapped into memory: what is read is loaded, and no more.

    As a `Corpus`: `ids` is one array [tokens] a document; `packed()` is all of them end to end.

    Raises:
        ValueError: the folder is incomplete or a file truncated, or it was made with another tokenizer.
    """

    def __init__(self, folder: str | os.PathLike, tokenizer: Tokenizer):
        folder = Path(folder)
        try:
            manifest = read_manifest(folder, hashes=False)  # reading terabytes takes longer than it is worth
            if missing := {TOKENS, OFFSETS} - manifest["files"].keys():
                raise ValueError(f"{folder / MANIFEST} does not name {missing.pop()}")
        except ValueError as error:
            raise ValueError(f"{error}; make {folder} again with `titans prepare`") from error
        theirs = manifest.get("tokenizer")
        if theirs != digest(tokenizer):
            raise ValueError(
                f"{folder} was made with another tokenizer (sha256 {str(theirs)[:12]}, not "
                f"{digest(tokenizer)[:12]}); set data.tokenizer to that one, or prepare the text again with this one"
            )
        self.eos_token_id = int(tokenizer.eos_token_id)
        self._tokens = np.memmap(folder / TOKENS, dtype=encoder(tokenizer)("").dtype, mode="r")
        self.ids = _Documents(self._tokens, np.memmap(folder / OFFSETS, dtype=np.int64, mode="r"))

    def packed(self) -> np.ndarray:
        """All documents end to end, each ended by the end-of-text token: [tokens + documents]."""
        return self._tokens


class _Documents(Sequence):
    """The ids of each document, without its end-of-text token."""

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray):
        self.tokens, self.offsets = tokens, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1] - 1]


class _Bar(Progress):
    """One line: what is written, and the part of the files that is read (of a data set, no part is known)."""

    def __init__(self, source: str | os.PathLike, shown: bool):
        super().__init__(BarColumn(), TimeRemainingColumn(), "{task.description}", disable=not shown)
        path = Path(source)
        files = files_of(path) if path.is_dir() else [path] if path.exists() else []
        self.total = sum(file.stat().st_size for file in files) or None
        self.row = self.add_task("", total=None)

    def opened(self, path: Path) -> IO[bytes]:
        return self.open(path, "rb", total=self.total, task_id=self.row)

    def show(self, counts: Counts) -> None:
        figures = f"{counts.documents:,} documents, {counts.tokens:,} tokens"
        self.update(self.row, description=figures)
