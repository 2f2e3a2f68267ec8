"""Sequences of ids with a target at some of their places: what the tasks on generated ids share. No torch here."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from titans.training.task import SPLITS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOTHING = -100  # the target where nothing is asked

# random numbers and index -> inputs and targets, int64 [length] each
Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


class TaggedSequences:
    """Item by item ``{"input_ids": int64 [window], "labels": the same}``, each made of seed, split and index alone.

    Shorter sequences are filled up with ``filler``. Labels are one place later than the targets, as the models shift
    them back; what would be behind the window is dropped.
    """

    def __init__(self, draw: Draw, count: int, window: int, filler: int, *, split: str, seed: int):
        self.draw, self.count, self.window, self.filler = draw, count, window, filler
        self.seed = [seed, SPLITS[split]]

    def __len__(self) -> int:
        return self.count

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of an item."""
        return self.draw(np.random.default_rng([*self.seed, index]), index)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self.count:
            raise IndexError(f"sequence {index} of {self.count}")
        inputs, targets = self.sequence(index)
        ids, labels = np.full(self.window, self.filler), np.full(self.window, NOTHING)
        ids[: len(inputs)] = inputs
        labels[1 : len(targets) + 1] = targets[: self.window - 1]
        return {"input_ids": ids, "labels": labels}


def right_answers(
    model: "PreTrainedModel", sequences: Iterable[tuple[np.ndarray, np.ndarray]], tokens: int = 4096
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For every sequence (all of one length) where the likeliest id is the target, and where one is asked for.

    ``tokens``: of sequences that are read side by side. Yields two bool arrays [length].
    """
    batch: list[Any] = []
    for sequence in sequences:
        batch.append(sequence)
        if len(batch) * len(sequence[0]) >= tokens:
            yield from _answers(model, batch)
            batch = []
    if batch:
        yield from _answers(model, batch)


def _answers(model: "PreTrainedModel", batch: list[tuple[np.ndarray, np.ndarray]]) -> Any:
    import torch

    from titans.training.models import read_on

    inputs, targets = (np.stack(part) for part in zip(*batch, strict=True))
    with torch.inference_mode():
        likeliest = read_on(model, torch.from_numpy(inputs).to(model.device))[0].argmax(-1).cpu().numpy()
    return zip(likeliest == targets, targets != NOTHING, strict=True)
