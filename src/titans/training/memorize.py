"""Files of any size read into a memory, at constant memory of the machine; an interrupted reading goes on."""

import hashlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TimeRemainingColumn

from titans.models import TitansCache, TitansForCausalLM
from titans.models.causal_lm import PIECE
from titans.models.memory_file import Identity
from titans.training.config import require
from titans.training.files import replace_durably
from titans.training.text import is_fasta, stream_documents
from titans.training.tokens import Tokenizer, is_bytes, stream

_ROWS = 256  # tokens whose logits are held at once


@dataclass
class Reading:
    """What a memory has read: the notes in its file.

    Attributes:
        tokens: so many, the end-of-text token before each document included.
        predicted: tokens of them that had one before.
        nats: sum of their negative log-likelihoods, each given all before it.
        digest: sha256 of the token ids.
    """

    tokens: int = 0
    predicted: int = 0
    nats: float = 0.0
    digest: str = hashlib.sha256().hexdigest()

    @property
    def surprise(self) -> float:
        """Mean bits a token."""
        return self.nats / math.log(2) / max(1, self.predicted)


def memorize(
    model: TitansForCausalLM,
    tokenizer: Tokenizer,
    files: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    text_field: str = "text",
    save_every: int = 100_000,
    progress: bool = True,
) -> Reading:
    """Reads documents one after the other into one memory and writes its file.

    Where a text is cut decides the last bits, so pieces begin at multiples of ``PIECE`` tokens.

    The state so far is kept in `output` + ".unfinished", which becomes `output` at the end. Where it is there already,
    the reading goes on from it, to the same file bit for bit as without interruption.

    Args:
        files: text files (utf-8), `.jsonl` or FASTA files, each also as `.gz` or `.xz`.
        text_field: the field of a JSON line that holds the text.
        save_every: tokens between two savings.
        progress: show a progress bar.

    Returns:
        What was read.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: `output` exists; an unfinished memory of another model or other text; a file that is no text.
    """
    require(save_every > 0, "save_every", save_every, "a number of tokens above 0")
    paths, output = [_existing(file) for file in files], Path(output)
    if output.exists():
        raise ValueError(f"output={str(output)!r} exists already; delete it or use another name")
    unfinished, identity = output.with_name(output.name + ".unfinished"), Identity.of(model)
    (cache, reading), text = _so_far(unfinished, model), hashlib.sha256()
    pieces = stream(tokenizer, chain.from_iterable(stream_documents(path, text_field) for path in paths), PIECE)
    with _Bar(_count(tokenizer, paths), reading.tokens, progress) as bar:
        _skip(pieces, reading, text, unfinished)
        output.parent.mkdir(parents=True, exist_ok=True)
        saved = reading.tokens
        for ids in pieces:
            _read(model, ids, cache, reading)
            text.update(ids[:PIECE].tobytes())
            if reading.tokens - saved >= save_every:
                saved = reading.tokens
                _save(cache, reading, text.hexdigest(), unfinished, identity)
            bar.show(reading, cache.nbytes)
    _save(cache, reading, text.hexdigest(), unfinished, identity)
    replace_durably(unfinished, output)
    return reading


def _so_far(unfinished: Path, model: TitansForCausalLM) -> tuple[TitansCache, Reading]:
    if not unfinished.exists():
        return TitansCache(len(model.model.layers)), Reading()
    cache = TitansCache.load(unfinished, model)
    if cache.notes.keys() != {field.name for field in fields(Reading)}:
        raise ValueError(f"{unfinished} is a memory that `memorize` did not write; rename it, or use another output")
    return cache, Reading(**cache.notes)


def _existing(file: str | os.PathLike) -> Path:
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give text files, .jsonl or FASTA files, also as .gz or .xz")
    return path


def _skip(pieces: Iterator[np.ndarray], reading: Reading, text: "hashlib._Hash", unfinished: Path) -> None:
    """Passes over what was read before an interruption, which has to be the same tokens."""
    seen = 0
    while seen < reading.tokens and (ids := next(pieces, None)) is not None:
        seen += len(ids[:PIECE])
        text.update(ids[:PIECE].tobytes())
    if seen != reading.tokens or text.hexdigest() != reading.digest:
        raise ValueError(
            f"{unfinished} has read {reading.tokens:,} tokens of other text than these files begin with; "
            "give the same files in the same order, or delete it to begin anew"
        )


@torch.inference_mode()
def _read(model: TitansForCausalLM, ids: np.ndarray, cache: TitansCache, reading: Reading) -> None:
    """Reads up to a piece's tokens; `ids` may hold one more, which is only predicted."""
    tokens = torch.from_numpy(ids.astype(np.int64)).to(model.device)
    inputs, targets = tokens[:PIECE], tokens[1:]
    hidden = model.model(inputs.unsqueeze(0), cache=cache, use_cache=True).last_hidden_state[0, : len(targets)]
    for h, t in zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True):
        reading.nats += float(F.cross_entropy(model.lm_head(h).float(), t, reduction="sum"))
    reading.tokens += len(inputs)
    reading.predicted += len(targets)


def _save(cache: TitansCache, reading: Reading, digest: str, path: Path, identity: Identity) -> None:
    reading.digest = digest
    cache.notes = asdict(reading)
    cache.rebase().save_pretrained(path, identity)


def _count(tokenizer: Tokenizer, paths: Sequence[Path]) -> int | None:
    """Tokens of all files, where their sizes tell."""
    plain = not any({".gz", ".xz", ".jsonl"} & set(path.suffixes) or is_fasta(path) for path in paths)
    return sum(path.stat().st_size + 1 for path in paths) if plain and is_bytes(tokenizer) else None


class _Bar(Progress):
    """One line: tokens read, speed, size of the memory, surprise, and the time left where the end is known."""

    def __init__(self, total: int | None, done: int, shown: bool):
        super().__init__(BarColumn(), TimeRemainingColumn(), "{task.description}", disable=not shown)
        self.done, self.of, self.began = done, "" if total is None else f" of {total:,}", time.perf_counter()
        self.row = self.add_task("", total=total, completed=done)

    def show(self, reading: Reading, nbytes: int) -> None:
        speed = (reading.tokens - self.done) / (time.perf_counter() - self.began)
        tokens = f"{reading.tokens:,}{self.of} tokens, {speed:,.0f}/s"
        figures = f"{tokens}, memory {nbytes / 1024:,.0f} KiB, {reading.surprise:.3f} bits/token"
        self.update(self.row, completed=reading.tokens, description=figures)
