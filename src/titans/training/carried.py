"""Training with the memory carried: documents read in order, window by window; the memory in a checkpoint."""

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from titans.models import TitansCache
from titans.training.prepared import PreparedCorpus
from titans.training.tokens import Corpus


class DocumentStreams(Dataset):
    """Windows of documents in their order: item i is the next window of stream i % ``streams``.

    A stream reads whole documents one after the other, each ended by the end-of-text token; the streams share out all
    documents, in an order that is drawn anew whenever all have been read. The last window of a document is filled up
    with end-of-text tokens that are not learned, so that no window holds two documents.
    Items are ``{"input_ids": LongTensor [length], "labels": the same, -100 where not learned, "begins": BoolTensor
    []}``; ``begins`` says that a document begins here.

    Args:
        corpus: the documents.
        length: tokens of a window.
        streams: rows of a batch.
        count: number of items, a multiple of ``streams``.
        seed: of the order.
    """

    def __init__(self, corpus: Corpus | PreparedCorpus, length: int, streams: int, count: int, seed: int):
        self.corpus, self.length = corpus, length
        rest: list[Iterator[tuple[int, int]]] = [iter(())] * streams
        order = self._order(seed)
        self.places = np.empty((count, 2), dtype=np.int64)  # document and first token of each item
        for i in range(count):
            place = next(rest[i % streams], None)
            if place is None:
                document = next(order)
                rest[i % streams] = zip(repeat(document), range(0, len(corpus.ids[document]) + 1, length))
                place = next(rest[i % streams])
            self.places[i] = place

    def _order(self, seed: int) -> Iterator[int]:
        rng = np.random.default_rng(seed)
        while True:
            yield from map(int, rng.permutation(len(self.corpus.ids)))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        document, start = self.places[index]
        text = self.corpus.ids[document][start : start + self.length].astype(np.int64)
        ids = np.full(self.length, self.corpus.eos_token_id, dtype=np.int64)
        ids[: len(text)] = text
        labels = ids.copy()
        labels[len(text) + 1 :] = -100
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "begins": torch.tensor(start == 0),
        }


def memory_file(folder: str | Path, process: int) -> Path:
    """Where a process keeps the memory of its rows of the batch."""
    return Path(folder) / f"memory-{process}.safetensors"


def load_rows(folder: str | Path, rows: range, batch: int, model: Any) -> TitansCache | None:
    """The memory of some ``rows`` of a batch, from the files of however many processes; None if they had none.

    Raises:
        ValueError: they hold another number of rows than ``batch``.
    """
    files = [memory_file(folder, process) for process in range(len(list(Path(folder).glob("memory-*.safetensors"))))]
    if not files:
        return None
    parts, each = [], batch // len(files)
    for process, file in enumerate(files):
        if own := [row - process * each for row in rows if row // each == process]:
            parts.append(TitansCache.load(file, model))
            if parts[-1].rows != each:
                found = parts[-1].rows * len(files)
                raise ValueError(
                    f"{folder} holds the memory of {found} rows, not of training.batch_size={batch}; go on with {found}"
                )
            parts[-1].batch_select_indices(torch.tensor(own))
    return TitansCache.cat(parts)
