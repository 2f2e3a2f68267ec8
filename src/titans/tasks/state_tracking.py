"""State tracking: what a model must carry along a sequence to answer, far beyond the lengths it was trained on.

Parity, cycle navigation, even pairs and modular arithmetic of "Neural Networks and the Chomsky Hierarchy" (Deletang et
al. 2023, arXiv 2207.02098), and the word problems of groups (Merrill, Petty, Sabharwal 2024, arXiv 2404.08819).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from titans.training.config import TrainConfig, nearest, option, require
from titans.training.tagging import NOTHING, TaggedSequences, right_answers
from titans.training.task import TaskData, small_lmm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODULUS = 5
PLUS, MINUS, TIMES, OPEN, CLOSE = range(MODULUS, MODULUS + 5)
PRECEDENCE = {PLUS: 1, MINUS: -1}


@dataclass(frozen=True)
class Automaton:
    """A kind of sequence.

    Attributes:
        tokens, classes: number of input ids and of answers, both counted from 0.
        draw: random numbers and a length -> inputs and targets, int64 [at most length] each; the target at a place is
            the answer for all up to it, -100 where there is none.
    """

    tokens: int
    classes: int
    draw: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def parity(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits, and whether the ones so far are odd in number."""
    bits = rng.integers(2, size=length)
    return bits, bits.cumsum() % 2


def cycle(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps back, none and forth (ids 0, 1, 2) on a circle of 5 places, and where they have led to from place 0."""
    steps = rng.integers(3, size=length)
    return steps, (steps - 1).cumsum() % 5


def even_pairs(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits, and whether neighbours differed an odd number of times: whether this bit is not the first."""
    bits = rng.integers(2, size=length)
    return bits, (bits != bits[0]).astype(np.int64)


def modular(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers with + - * between them, and at every number the value so far mod 5, * before + and -.

    Of an odd length; an even one is lowered by one.
    """
    length -= 1 - length % 2
    ids = rng.integers(MODULUS, size=length)
    ids[1::2] = rng.integers(PLUS, TIMES + 1, size=length // 2)
    targets = np.full(length, NOTHING)
    total, product_, sign = 0, int(ids[0]), 1
    targets[0] = ids[0]
    for i in range(1, length, 2):
        operator, number = int(ids[i]), int(ids[i + 1])
        if operator == TIMES:
            product_ = product_ * number % MODULUS
        else:
            total, product_, sign = (total + sign * product_) % MODULUS, number, PRECEDENCE[operator]
        targets[i + 1] = (total + sign * product_) % MODULUS
    return ids, targets


def modular_brackets(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """A random tree of bracketed operations on numbers mod 5, and at its end its value.

    Of a length of 4 n + 1, n operations; another one is lowered to the next.
    """
    ids, value = _tree(rng, (length - 1) // 4)
    targets = np.full(len(ids), NOTHING)
    targets[-1] = value
    return np.array(ids), targets


def _tree(rng: np.random.Generator, operations: int) -> tuple[list[int], int]:
    if operations == 0:
        number = int(rng.integers(MODULUS))
        return [number], number
    left = int(rng.integers(operations))
    (a, x), (b, y) = _tree(rng, left), _tree(rng, operations - 1 - left)
    operator = int(rng.integers(PLUS, TIMES + 1))
    value = x * y if operator == TIMES else x + PRECEDENCE[operator] * y
    return [OPEN, *a, operator, *b, CLOSE], value % MODULUS


def _even(image: tuple[int, ...]) -> bool:
    inversions = sum(image[i] > image[j] for j in range(len(image)) for i in range(j))
    return inversions % 2 == 0


def _permutations(points: int, even: bool) -> np.ndarray:
    return np.array([image for image in permutations(range(points)) if _even(image) or not even])


@cache
def group(name: str) -> np.ndarray:
    """Multiplication table [n, n]: id of a b, a applied first; elements are numbered in the order of their images.

    ``s3``, ``s5``: all permutations; ``a5``: the even ones; ``z60``: addition mod 60; ``a4xz5``: pairs of both kinds.
    """
    if name == "z60":
        return np.add.outer(np.arange(60), np.arange(60)) % 60
    if name == "a4xz5":
        a4, z5 = _table(_permutations(4, even=True)), np.add.outer(np.arange(5), np.arange(5)) % 5
        pairs = list(product(range(12), range(5)))
        return np.array([[5 * a4[a, c] + z5[b, d] for c, d in pairs] for a, b in pairs])
    return _table(_permutations(int(name[1]), even=name[0] == "a"))


def _table(images: np.ndarray) -> np.ndarray:
    number = {tuple(image): i for i, image in enumerate(images.tolist())}
    return np.array([[number[tuple(b[a].tolist())] for b in images] for a in images])


def _words(name: str) -> Automaton:
    def draw(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        table = group(name)
        elements, at = rng.integers(len(table), size=length), 0
        return elements, np.array([at := int(table[at, g]) for g in elements])

    size = {"s3": 6, "s5": 120}.get(name, 60)
    return Automaton(size, size, draw)


AUTOMATA = {
    "parity": Automaton(2, 2, parity),
    "cycle": Automaton(3, 5, cycle),
    "even_pairs": Automaton(2, 2, even_pairs),
    "modular": Automaton(TIMES + 1, MODULUS, modular),
    "modular_brackets": Automaton(CLOSE + 1, MODULUS, modular_brackets),
    **{name: _words(name) for name in ("s3", "z60", "a4xz5", "a5", "s5")},
}


@dataclass
class StateData:
    """Which sequences are trained."""

    task: str = option("parity", f"kind of sequence, one of {', '.join(AUTOMATA)}")
    targets: str = option("all", "'all': an answer is learned at every place that has one; 'last': at the last alone")
    shortest: int = option(1, "shortest training sequence; lengths are drawn evenly up to training.length - 1")
    validation_sequences: int = option(256, "sequences of the validation loss")

    def __post_init__(self):
        require(self.task in AUTOMATA, "data.task", self.task, nearest(self.task, AUTOMATA))
        require(self.targets in ("all", "last"), "data.targets", self.targets, "'all' or 'last'")
        require(self.shortest > 0, "data.shortest", self.shortest, "at least 1")
        require(self.validation_sequences > 0, "data.validation_sequences", self.validation_sequences, "at least 1")


@dataclass
class StateEvaluation:
    """What is measured: sequences of each length."""

    lengths: list[int] = option([40, 256, 512], "lengths of the test sequences")
    sequences: int = option(500, "test sequences of each length")
    seed: int = option(42, "of the sequences")

    def __post_init__(self):
        require(bool(self.lengths) and min(self.lengths) > 0, "evaluation.lengths", self.lengths, "lengths above 0")
        require(self.sequences > 0, "evaluation.sequences", self.sequences, "at least 1")
        require(self.seed >= 0, "evaluation.seed", self.seed, "a number of at least 0")


class StateTracking:
    """State tracking; see `titans.training.task.Task` for the methods."""

    name = "state_tracking"
    data_class = StateData
    evaluation_class = StateEvaluation
    picture = "length.png"
    higher_is_better = True
    bimodal = True

    def preset(self) -> dict[str, Any]:
        """A small LMM with chunks of one token, parity of up to 40 bits."""
        return {
            "model": small_lmm(hidden_size=32, intermediate_size=64, num_hidden_layers=1, chunk_size=1),
            "training": {"length": 41, "batch_size": 128, "tokens": 5e6, "learning_rate": 4e-3, "eval_every": 0.1},
        }

    def load(self, config: TrainConfig) -> TaskData:
        data, training = config.data, config.training
        longest = training.length - 1
        mend = f"at most training.length - 1 = {longest}: the last answer is given behind the last token"
        require(data.shortest <= longest, "data.shortest", data.shortest, mend)

        lengths = data.shortest, longest
        return TaskData(
            train=_sequences(data, lengths, training.windows, training.length, "train", training.seed),
            validation=_sequences(data, lengths, data.validation_sequences, training.length, "validation", 0),
            tokenizer=None,
            ordered=True,
        )

    def build_model(self, config: TrainConfig, data: TaskData) -> "PreTrainedModel":
        from titans.training.models import build_model

        filler = _filler(config.data.task)
        ids = {"vocab_size": filler + 1, "eos_token_id": filler, "pad_token_id": filler}
        return build_model(config.model, **ids, seed=config.training.seed)

    def evaluate(
        self, model: "PreTrainedModel", tokenizer: None, data: StateData, evaluation: StateEvaluation
    ) -> dict[str, Any]:
        known, needed = model.config.vocab_size, _filler(data.task) + 1
        require(known >= needed, "model.vocab_size", known, f"a model of {needed} ids, trained on {data.task!r}")
        count, cells = evaluation.sequences, []
        for length in evaluation.lengths:
            test = _sequences(data, (length, length), count, length, "test", evaluation.seed)
            answers = list(right_answers(model, map(test.sequence, range(count))))
            cells.append(
                {
                    "task": data.task,
                    "length": length,
                    "sequences": count,
                    "accuracy": 100 * float(np.concatenate([right[asked] for right, asked in answers]).mean()),
                    "last": 100 * float(np.mean([right[asked][-1] for right, asked in answers])),
                    "whole": 100 * float(np.mean([right[asked].all() for right, asked in answers])),
                    "chance": 100 / AUTOMATA[data.task].classes,
                }
            )
        return {"cells": cells}

    def summary(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Accuracy above chance, the longest sequences' first, and whole sequences right, in percent."""
        cells = metrics["cells"]
        longest = cells[-1]
        first = {f"above chance @ {longest['length']:,} (%)": above_chance(longest)}
        first |= {f"above chance @ {cell['length']:,} (%)": above_chance(cell) for cell in cells}
        return first | {f"whole @ {cell['length']:,} (%)": cell["whole"] for cell in cells}

    def report(self, metrics: dict[str, Any]) -> str:
        head = "| task | length | accuracy (%) | above chance (%) | last answer (%) | whole sequences (%) | sequences |"
        lines = [head, "|---|---:|---:|---:|---:|---:|---:|"]
        for cell in metrics["cells"]:
            figures = (cell["accuracy"], above_chance(cell), cell["last"], cell["whole"])
            values = " | ".join(f"{value:.2f}" for value in figures)
            lines.append(f"| {cell['task']} | {cell['length']:,} | {values} | {cell['sequences']} |")
        return "\n".join(lines)

    def plot(self, metrics: dict[str, dict[str, Any]], path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="length", ylabel="accuracy above chance (%)", ylim=(-10, 103), xscale="log")
        for name, m in metrics.items():
            lengths = [cell["length"] for cell in m["cells"]]
            axes.plot(lengths, [above_chance(cell) for cell in m["cells"]], marker="o", label=name)
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)


task = StateTracking()


def above_chance(cell: dict[str, Any]) -> float:
    """Percent of what guessing leaves: 0 is chance, 100 all right."""
    return 100 * (cell["accuracy"] - cell["chance"]) / (100 - cell["chance"])


def _filler(name: str) -> int:
    return max(AUTOMATA[name].tokens, AUTOMATA[name].classes)


def _sequences(
    data: StateData, lengths: tuple[int, int], count: int, window: int, split: str, seed: int
) -> TaggedSequences:
    """Sequences whose lengths are drawn evenly from the first of ``lengths`` to the last."""
    automaton, (shortest, longest) = AUTOMATA[data.task], lengths

    def draw(rng: np.random.Generator, _: int) -> tuple[np.ndarray, np.ndarray]:
        inputs, targets = automaton.draw(rng, int(rng.integers(shortest, longest + 1)))
        if data.targets == "last":
            targets[: np.flatnonzero(targets != NOTHING)[-1]] = NOTHING
        return inputs, targets

    return TaggedSequences(draw, count, window, _filler(data.task), split=split, seed=seed)
