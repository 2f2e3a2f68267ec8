"""Training on a text as it is read, at constant memory: windows of documents end to end, and the place in the text."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from titans.training.text import blocks_of, is_dataset, open_dataset, stream_documents
from titans.training.tokens import Tokenizer, encoder

BUFFER = 2**20  # tokens that are held, and whose windows are shuffled
PLACE = "stream.json"

Place = tuple[Any, int]  # which document (None: the first), and how many of its tokens are used


class StreamedWindows(Dataset):
    """Windows of a text that is read on as they are asked for, over and over; `count` of them.

    The documents, each ended by the end-of-text token, lie end to end. `BUFFER` tokens are held at a time and their
    windows shuffled, by the seed and the buffer's number: what item i is depends on nothing else. Items are to be asked
    for buffer by buffer; one further back is found by reading anew from the beginning.
    Items are `{"input_ids": LongTensor [length], "labels": the same}`.

    Args:
        source, text_field: as in `stream_documents`; a data set is streamed, not downloaded first.
        length: tokens of a window.

    Raises:
        ValueError: no text at all; else as `stream_documents`, when it is met: at the latest, where it is read.
    """

    def __init__(self, source: str, text_field: str, tokenizer: Tokenizer, length: int, count: int, seed: int):
        self.source, self.text_field = source, text_field
        self.rows = open_dataset(source, text_field, streaming=True) if is_dataset(source) else None
        self.encode, self.end = encoder(tokenizer), int(tokenizer.eos_token_id)
        self.length, self.count, self.seed = length, count, seed
        self.each = max(1, BUFFER // length)  # windows of a buffer
        self._go_to(0, (None, 0))
        self[0]  # what cannot be read says so before anything is made of it

    def _go_to(self, buffer: int, place: Place) -> None:
        self.places = {buffer: place}  # where buffers begin, of those a checkpoint may ask for
        self.at, self.buffers = buffer - 1, self._buffers(place)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        buffer, window = divmod(index, self.each)
        if buffer < self.at:
            self._go_to(0, (None, 0))
        while self.at < buffer:
            tokens, end = next(self.buffers)
            self.at += 1
            self.places[self.at + 1] = end
            self.windows = np.random.default_rng([self.seed, self.at]).permutation(tokens.reshape(-1, self.length))
        ids = torch.from_numpy(self.windows[window].astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    def save(self, folder: Path, index: int) -> None:
        """Writes where the buffer of an item begins; the item must be no further back than that of the last `save`."""
        buffer = max(number for number in self.places if number * self.each <= index)
        self.places = {number: place for number, place in self.places.items() if number >= buffer}
        (folder / PLACE).write_text(json.dumps([buffer, self.places[buffer]]), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Goes to the place that was saved: items are as they were, and what lies before is not tokenized."""
        self._go_to(*json.loads((folder / PLACE).read_text(encoding="utf-8")))

    def _buffers(self, place: Place) -> Iterator[tuple[np.ndarray, Place]]:
        """The tokens from a place on, buffer by buffer, each with the place where it ends."""
        size, filled = self.each * self.length, 0
        buffer = np.empty(size, dtype=self.encode("").dtype)
        for document, used, ids in self._pieces(*place):
            while len(ids):
                part, ids = np.split(ids, [size - filled])
                buffer[filled : filled + len(part)] = part
                filled, used = filled + len(part), used + len(part)
                if filled == size:
                    yield buffer, (document, used)
                    filled = 0

    def _pieces(self, document: Any, skipped: int) -> Iterator[tuple[Any, int, np.ndarray]]:
        """The tokens from a place on, piece by piece, each with its document and the number of tokens of it before."""
        end = np.array([self.end], dtype=self.encode("").dtype)
        while True:
            empty = True
            for here, blocks in self._documents(document):
                first = next(filter(None, blocks), None)
                if first is None:
                    continue  # a document without text
                used, empty = 0, False
                for ids in chain(map(self.encode, chain([first], blocks)), [end]):
                    yield here, used + min(skipped, len(ids)), ids[skipped:]
                    used, skipped = used + len(ids), max(0, skipped - len(ids))
            if empty:
                raise ValueError(f"source={self.source!r} holds no text; give a file, folder or data set with text")
            document = None

    def _documents(self, document: Any) -> Iterator[tuple[Any, Iterator[str]]]:
        """The documents from one on: of a data set, its own state before each; else their number."""
        if self.rows is None:
            for number, blocks in enumerate(stream_documents(self.source, self.text_field)):
                if number >= (document or 0):
                    yield number, blocks
            return
        self.rows.load_state_dict(document or {})
        for row in self.rows:
            after = self.rows.state_dict()  # before its text is used: the next document begins here
            yield document, blocks_of(row[self.text_field])
            document = after
