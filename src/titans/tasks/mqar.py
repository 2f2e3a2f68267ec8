"""MQAR, the recall of many pairs, of "Zoology" (Arora et al. 2024, arXiv 2312.04927): token ids, no tokenizer.

A sequence lists pairs of a key and a value; later the keys come again, and at each the model must name its value, which
is not shown. All else is the filler 0.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from titans.training.config import TrainConfig, nearest, option, require
from titans.training.tagging import NOTHING, TaggedSequences, right_answers
from titans.training.task import TaskData, small_lmm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 8192
FILLER = 0
POWER = 0.01  # of the law by which queries favour early places; 1 would be uniform


@dataclass(frozen=True)
class Sizes:
    """Sequences of `length` tokens with `pairs` pairs, `count` of them."""

    length: int
    pairs: int
    count: int


# Figure 2 of the paper trains one model a size; the "Based" set-up (arXiv 2402.18668) one model on several sizes.
FIGURE_2 = {"64x4": (64, 4), "128x8": (128, 8), "256x16": (256, 16), "512x64": (512, 64)}
SETUPS: dict[str, tuple[list[Sizes], list[Sizes]]] = {
    **{name: ([Sizes(n, d, 100_000)], [Sizes(n, d, 3_000)]) for name, (n, d) in FIGURE_2.items()},
    "based": (
        [Sizes(64, 4, 100_000), *(Sizes(n, d, 20_000) for n, d in ((128, 8), (256, 16), (256, 32), (256, 64)))],
        [
            Sizes(n, d, 1_000)
            for n, d in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
        ],
    ),
}  # fmt: skip


@dataclass
class MQARData:
    """Which sequences are trained and tested."""

    setup: str = option(
        "64x4", f"tokens x pairs of Zoology's figure 2, or its successor's mixture: {', '.join(SETUPS)}"
    )
    vocabulary: int = option(VOCABULARY, "token ids: 0 fills, one half names keys, the other values")
    random_non_queries: bool = option(False, "fill with random ids instead of 0")
    validation_sequences: int = option(256, "sequences of the validation loss")

    def __post_init__(self):
        require(self.setup in SETUPS, "data.setup", self.setup, nearest(self.setup, SETUPS))
        least = 2 * max(size.pairs for part in SETUPS[self.setup] for size in part) + 2
        mend = f"at least {least}: twice the most pairs of data.setup={self.setup!r}, and two"
        require(self.vocabulary >= least, "data.vocabulary", self.vocabulary, mend)
        require(self.validation_sequences > 0, "data.validation_sequences", self.validation_sequences, "at least 1")


@dataclass
class MQAREvaluation:
    """What is measured: the set-up's test sequences."""

    sequences: int | None = option(None, "test sequences of each size; by default the set-up's own 3,000 or 1,000")
    seed: int = option(42, "of the sequences")

    def __post_init__(self):
        require(self.sequences is None or self.sequences > 0, "evaluation.sequences", self.sequences, "at least 1")
        require(self.seed >= 0, "evaluation.seed", self.seed, "a number of at least 0")


def mqar(
    rng: np.random.Generator, length: int, pairs: int, *, vocabulary: int = VOCABULARY, random_non_queries: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """One sequence: inputs and targets, int64 [length] each; the target is -100 but where a key is asked for.

    Keys are drawn from 1 .. vocabulary / 2 - 1 and values from vocabulary / 2 .. vocabulary - 1 without replacement.
    Behind the pairs lie (length - 2 pairs) / 2 places of two tokens; the keys stand in places drawn without replacement
    with probability proportional to place ** (a - 1), a = 0.01.

    Raises:
        ValueError: a length that is odd or below 4 * pairs, or too few ids for the pairs.
    """
    require(length % 2 == 0 and length >= 4 * pairs > 0, "length", length, f"an even one of at least 4 x {pairs} pairs")
    half = vocabulary // 2
    require(pairs < half, "pairs", pairs, f"fewer than half the {vocabulary} ids")
    keys = 1 + rng.choice(half - 1, pairs, replace=False)
    values = half + rng.choice(vocabulary - half, pairs, replace=False)
    places = (length - 2 * pairs) // 2
    weights = np.arange(1, places + 1) ** (POWER - 1.0)
    queries = 2 * pairs + 2 * rng.choice(places, pairs, replace=False, p=weights / weights.sum())
    inputs = rng.integers(vocabulary, size=length) if random_non_queries else np.full(length, FILLER)
    inputs[: 2 * pairs : 2], inputs[1 : 2 * pairs : 2] = keys, values
    inputs[queries] = keys
    targets = np.full(length, NOTHING)
    targets[queries] = values
    return inputs, targets


def sequences(data: MQARData, sizes: Sequence[Sizes], window: int, split: str, seed: int) -> TaggedSequences:
    """Sequences of several sizes, one size after the other, filled up with the filler.

    The last token's label is dropped: it is never a query, being second in its place.
    """
    ends = np.cumsum([size.count for size in sizes])

    def draw(rng: np.random.Generator, index: int) -> tuple[np.ndarray, np.ndarray]:
        size = sizes[int(np.searchsorted(ends, index, "right"))]
        filled = data.random_non_queries
        return mqar(rng, size.length, size.pairs, vocabulary=data.vocabulary, random_non_queries=filled)

    return TaggedSequences(draw, int(ends[-1]), window, FILLER, split=split, seed=seed)


class Batches:
    """Sequences for training in batches that are each of one size, as Zoology's are, and all of as many tokens.

    An item is as many sequences side by side as make a window, int64 [window / length, length]; every ``batch`` items
    from the start are of one size, and these batches come in random order.
    """

    def __init__(self, data: MQARData, sizes: Sequence[Sizes], window: int, batch: int, seed: int):
        self.sequences, self.batch, self.window = sequences(data, sizes, window, "train", seed), batch, window
        ends, self.starts = np.cumsum([size.count for size in sizes]), []
        for size, end in zip(sizes, ends, strict=True):
            each = batch * window // size.length
            firsts = range(end - size.count, end - each + 1, each)
            self.starts += [(first, size.length) for first in firsts]
        np.random.default_rng(seed).shuffle(self.starts)

    def __len__(self) -> int:
        return len(self.starts) * self.batch

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch, item = divmod(index, self.batch)
        first, length = self.starts[batch]
        count = self.window // length
        rows = [self.sequences[first + item * count + row] for row in range(count)]
        return {name: np.stack([row[name][:length] for row in rows]) for name in rows[0]}


def collate(items: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """All sequences of all items below one another, [B, length] each."""
    import torch

    return {name: torch.from_numpy(np.vstack([item[name] for item in items])) for name in items[0]}


class MQAR:
    """MQAR; see `titans.training.task.Task` for the methods."""

    name = "mqar"
    data_class = MQARData
    evaluation_class = MQAREvaluation
    picture = "mqar.png"
    higher_is_better = True
    bimodal = False

    def preset(self) -> dict[str, Any]:
        """A small LMM on figure 2's smallest size."""
        return {
            "model": small_lmm(num_memory_heads=1),
            "training": {"length": 64, "batch_size": 64, "tokens": 6.4e6, "learning_rate": 4e-3, "eval_every": 0.1},
        }

    def load(self, config: TrainConfig) -> TaskData:
        sizes, window, data = SETUPS[config.data.setup][0], config.training.length, config.data
        longest = max(size.length for size in sizes)
        require(window == longest, "training.length", window, f"{longest}, the longest of data.setup={data.setup!r}")
        few = [Sizes(size.length, size.pairs, -(-data.validation_sequences // len(sizes))) for size in sizes]
        return TaskData(
            train=Batches(data, sizes, window, config.training.batch_size, config.training.seed),
            validation=sequences(data, few, window, "validation", 0),
            tokenizer=None,
            ordered=True,
            collate=collate,
        )

    def build_model(self, config: TrainConfig, data: TaskData) -> "PreTrainedModel":
        from titans.training.models import build_model

        ids = {"vocab_size": config.data.vocabulary, "eos_token_id": FILLER, "pad_token_id": FILLER}
        return build_model(config.model, **ids, seed=config.training.seed)

    def evaluate(
        self, model: "PreTrainedModel", tokenizer: None, data: MQARData, evaluation: MQAREvaluation
    ) -> dict[str, Any]:
        known = model.config.vocab_size
        mend = f"a model of the {data.vocabulary} ids of data.vocabulary, trained on this task"
        require(known == data.vocabulary, "model.vocab_size", known, mend)
        cells = []
        for size in SETUPS[data.setup][1]:
            count = evaluation.sequences or size.count
            test = sequences(data, [Sizes(size.length, size.pairs, count)], size.length, "test", evaluation.seed)
            accuracy = _accuracy(model, map(test.sequence, range(count)))
            cells.append({"length": size.length, "pairs": size.pairs, "sequences": count, "accuracy": accuracy})
        return {"cells": cells}

    def summary(self, metrics: dict[str, Any]) -> dict[str, float]:
        cells = metrics["cells"]
        mean = {"accuracy (%)": float(np.mean([cell["accuracy"] for cell in cells]))}
        return mean | {f"{cell['length']} x {cell['pairs']}": cell["accuracy"] for cell in cells}

    def report(self, metrics: dict[str, Any]) -> str:
        lines = ["| tokens | pairs | sequences | accuracy (%) |", "|---:|---:|---:|---:|"]
        for cell in metrics["cells"]:
            lines.append(f"| {cell['length']} | {cell['pairs']} | {cell['sequences']} | {cell['accuracy']:.2f} |")
        return "\n".join(lines)

    def plot(self, metrics: dict[str, dict[str, Any]], path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="tokens x pairs", ylabel="accuracy (%)", ylim=(-3, 103))
        for name, m in metrics.items():
            sizes = [f"{cell['length']} x {cell['pairs']}" for cell in m["cells"]]
            axes.plot(sizes, [cell["accuracy"] for cell in m["cells"]], marker="o", label=name)
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)


task = MQAR()


def _accuracy(model: "PreTrainedModel", drawn: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Percent of the queries of sequences of one length whose value is the likeliest id."""
    answers = [right[asked] for right, asked in right_answers(model, drawn)]
    return 100 * float(np.concatenate(answers).mean())
