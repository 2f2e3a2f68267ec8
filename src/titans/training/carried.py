"""Training with the memory carried: documents and series read in order by windows; the memory in a checkpoint."""

from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from titans.models import TitansCache
from titans.training.prepared import PreparedCorpus
from titans.training.series import SeriesWindows
from titans.training.tokens import Corpus


def side_by_side(sequences: Iterable[Iterable[Any]], streams: int, count: int) -> Iterator[Any]:
    """``count`` windows: the i-th is the next one of stream i % ``streams``.

    A stream reads sequences of windows, each to its end; whenever one is at its end, it takes the next that is left.
    """
    left = iter(sequences)
    rest: list[Iterator[Any]] = [iter(())] * streams
    for i in range(count):
        window = next(rest[i % streams], None)
        if window is None:
            rest[i % streams] = iter(next(left))
            window = next(rest[i % streams])
        yield window


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
        documents = (
            zip(repeat(document), range(0, len(corpus.ids[document]) + 1, length)) for document in self._order(seed)
        )
        self.places = np.empty((count, 2), dtype=np.int64)  # document and first token of each item
        for i, place in enumerate(side_by_side(documents, streams, count)):
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


class SeriesStreams(Dataset):
    """Windows of a series in their order: item i is the next window of stream i % ``streams``.

    The windows of a stream are a look-back apart, so that each row is read once, and have one target each.
    Items are those of ``SeriesWindows``, and ``"begins"``: BoolTensor [], whether the memory begins here.

    Args:
        windows: all windows of the series.
        runs: the numbers of the windows that a memory is carried through, run after run.
        streams: rows of a batch.
        count: number of items, a multiple of ``streams``.
    """

    def __init__(self, windows: SeriesWindows, runs: Iterable[range], streams: int, count: int):
        self.windows, self.channels = windows, windows.channels
        places = ([(window, window == run[0]) for window in run] for run in runs)
        self.places = list(side_by_side(places, streams, count))  # window, and whether the memory begins with it

    @classmethod
    def to_train(cls, windows: SeriesWindows, streams: int, count: int, seed: int) -> "SeriesStreams":
        """A run begins with one of the first ``look_back`` windows, in an order drawn anew whenever all have been.

        The first run of a stream is cut off at a place that is drawn: the streams are spread over the series.
        """
        return cls(windows, _runs(len(windows), windows.look_back, streams, seed), streams, count)

    @classmethod
    def to_validate(cls, windows: SeriesWindows, streams: int) -> "SeriesStreams":
        """One run a stream, all equally long, from windows spread over the first ``look_back``."""
        step, n = windows.look_back, len(windows)
        length = max(1, n // step)
        begins = np.linspace(0, min(step, n), streams, endpoint=False).astype(int).tolist()
        runs = (range(begin, begin + length * step, step) for begin in begins)
        return cls(windows, runs, streams, streams * length)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, begins = self.places[index]
        return {**self.windows[start], "begins": torch.tensor(begins)}


def _runs(windows: int, step: int, streams: int, seed: int) -> Iterator[range]:
    rng = np.random.default_rng(seed)
    drawn = 0
    while True:
        for begin in rng.permutation(min(step, windows)).tolist():
            run = range(begin, windows, step)
            yield run[rng.integers(len(run)) :] if drawn < streams else run
            drawn += 1


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
    parts, each, wide = [], batch // len(files), model.cache_rows
    for process, file in enumerate(files):
        own = [wide * (row - process * each) + i for row in rows if row // each == process for i in range(wide)]
        if own:
            parts.append(TitansCache.load(file, model))
            if parts[-1].rows != each * wide:
                found = parts[-1].rows // wide * len(files)
                raise ValueError(
                    f"{folder} holds the memory of {found} rows, not of training.batch_size={batch}; go on with {found}"
                )
            parts[-1].batch_select_indices(torch.tensor(own))
    return TitansCache.cat(parts)
