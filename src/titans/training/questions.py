"""Questions at the end of long prompts: what the tasks that ask them share. No torch here."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from titans.training.config import TextData, TrainConfig, nearest, option, require
from titans.training.task import SPLITS, TaskData, small_lmm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEPTHS = 10  # rows of the heat map: the first tenth of the prompt, the second, ...


@dataclass(frozen=True)
class Question:
    """One prompt and what is expected after it.

    Attributes:
        prompt: all that the model reads.
        target: what training writes after the prompt, before the end of the text.
        answers: what is looked for in the model's output.
        depths: where the prompt tells each of the answers, from 0 (its beginning) to 1.
    """

    prompt: str
    target: str
    answers: tuple[str, ...]
    depths: tuple[float, ...]

    def found(self, output: str) -> list[bool]:
        """Which of the answers occur in the output, upper and lower case alike (RULER's string_match_all)."""
        return [answer.lower() in output.lower() for answer in self.answers]


# (random numbers, length, tokens kept free for the answer; None: what its target takes) -> question of at most `length`
Maker = Callable[[np.random.Generator, int, int | None], Question]


def listing(words: Iterable[str]) -> str:
    """`a`, `a, and b`, `a, b, and c`: as RULER writes lists."""
    *first, last = words
    return f"{', '.join(first)}, and {last}" if first else last


def longest(size: Callable[[int], int], limit: int, least: int) -> int:
    """The largest n >= `least` with size(n) <= `limit`, for a size that grows with n, about evenly.

    By the Illinois method, so that few sizes are measured: each may be that of a text of millions of tokens.

    Raises:
        ValueError: size(least) is above the limit.
    """
    low, below = least, float(limit - size(least))
    require(below >= 0, "length", limit, f"at least {int(limit - below):,}: the shortest prompt and its answer")
    high, above, slope = low, -1.0, below / 64
    while above < 0:  # a first n that is too much
        high = low + int(1.02 * below / slope) + 1 if slope else low + 64
        above = float(size(high) - limit)
        slope = max((above + below) / (high - low), 1e-3)
        if above <= 0:
            low, below, above = high, -above, -1.0
    last = 0
    while high - low > 1:
        n = low + round(below * (high - low) / (below + above))
        n = min(max(n, low + 1), high - 1)
        excess = float(size(n) - limit)
        if excess > 0:
            below = below / 2 if last > 0 else below  # an end that stays twice pulls half as much
            high, above, last = n, excess, 1
        else:
            above = above / 2 if last < 0 else above
            low, below, last = n, -excess, -1
    return low


@dataclass
class QuestionData(TextData):
    """What is asked, in what text, and how it is trained."""

    task: list[str] = option([], "questions to train on: one or more names")
    lengths: list[int] = option(
        [], "tokens of a question with its answer, drawn for every window, which is filled with as many as fit; by "
        "default training.length"
    )  # fmt: skip
    curriculum: bool = option(False, "begin with the shortest of the lengths and admit one more after each equal part")
    text_loss: float = option(
        0.0, "fraction of the other tokens that are learned, too, drawn anew for every window; 0: the answers alone"
    )
    validation_windows: int = option(32, "windows of the validation loss, which counts the answers alone")
    known: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        check_names("data.task", self.task, self.known)
        require(all(n > 0 for n in self.lengths), "data.lengths", self.lengths, "lengths above 0")
        require(0 <= self.text_loss <= 1, "data.text_loss", self.text_loss, "a fraction, 0 to 1")
        require(self.validation_windows > 0, "data.validation_windows", self.validation_windows, "a number above 0")


@dataclass
class QuestionEvaluation:
    """What is asked of a trained model."""

    task: list[str] = option([], "questions to ask: one or more names")
    lengths: list[int] = option([2048, 4096, 8192, 16384], "lengths of the prompts, in tokens")
    samples: int = option(500, "questions of each task and length")
    seed: int = option(42, "of the questions")
    max_new_tokens: int = option(128, "tokens the model writes at most")
    known: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        check_names("evaluation.task", self.task, self.known)
        require(bool(self.lengths) and min(self.lengths) >= 0, "evaluation.lengths", self.lengths, "some lengths")
        for name in ("samples", "max_new_tokens"):
            require(getattr(self, name) > 0, f"evaluation.{name}", getattr(self, name), "a number above 0")
        require(self.seed >= 0, "evaluation.seed", self.seed, "a number of at least 0")


def check_names(option_name: str, names: list[str], known: tuple[str, ...]) -> None:
    """Raises ValueError for no name at all, or an unknown one."""
    require(bool(names), option_name, names, f"one or more of {', '.join(known)}")
    for name in names:
        require(name in known, option_name, name, nearest(name, known))


class QuestionWindows:
    """Training windows full of questions, each followed by its answer and the end-of-text token.

    Items are `{"input_ids": int64 [window], "labels": int64 [window]}`; what is not learned is labelled -100. An item
    is made when asked for, of the seed, the split and its index alone: a resumed run sees what it would have seen.

    Args:
        makers: each question is made by one of these.
        window: tokens of an item; what the last question leaves of it is padding.
        lengths: of questions; each item draws one and is filled with window // length questions of it.
        count: number of items.
        text_loss: fraction of the prompts' tokens that are labelled, too.
        curriculum: the lengths, shortest first, are admitted one by one over the `count` items.
    """

    def __init__(self, makers: list[Maker], tokenizer: Any, *, split: str, seed: int, window: int, lengths: list[int],
                 count: int, text_loss: float = 0.0, curriculum: bool = False):  # fmt: skip
        from titans.training.tokens import encoder

        require(max(lengths) <= window, "data.lengths", lengths, f"lengths up to training.length={window}")
        self.makers, self.tokenizer, self.encode = makers, tokenizer, encoder(tokenizer)
        self.seed, self.window, self.lengths, self.count = [seed, SPLITS[split]], window, sorted(lengths), count
        self.text_loss, self.curriculum = text_loss, curriculum

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self.count:
            raise IndexError(f"window {index} of {self.count}")
        rng = np.random.default_rng([*self.seed, index])
        admitted = 1 + index * len(self.lengths) // self.count if self.curriculum else len(self.lengths)
        length = int(rng.choice(self.lengths[:admitted]))
        ids = np.full(self.window, self.tokenizer.pad_token_id, dtype=np.int64)
        labels = np.full(self.window, -100, dtype=np.int64)
        begin = 0
        for _ in range(self.window // length):
            question = self.makers[rng.integers(len(self.makers))](rng, length, None)
            prompt = self.encode(question.prompt)
            answer = [*self.encode(question.target), self.tokenizer.eos_token_id]
            middle = begin + len(prompt)
            end = middle + len(answer)
            ids[begin:middle] = prompt
            ids[middle:end] = labels[middle:end] = answer
            learned = begin + np.flatnonzero(rng.random(len(prompt)) < self.text_loss)
            labels[learned] = ids[learned]
            begin = end
        return {"input_ids": ids, "labels": labels}


class QuestionTask:
    """A task of questions in long prompts; see `titans.training.task.Task` for the methods."""

    name: str
    data_class: type
    evaluation_class: type
    picture = "depth.png"
    higher_is_better = True
    bimodal = False

    def preset(self) -> dict[str, Any]:
        """A small byte-level LMM of one online map that writes little, with a convolution across an answer."""
        return {
            "model": small_lmm(
                num_memory_heads=1,
                memory_depth=1,
                memory_norm=False,
                memory_residual=False,
                memory_skip=False,
                memory_online=True,
                memory_max_lr=0.5,
                memory_conv_size=12,
                memory_gate="write",
                memory_write_price=0.03,
                chunk_size=64,
            ),
            "training": {"length": 512, "batch_size": 8, "tokens": 4e6, "learning_rate": 4e-3, "eval_every": 0.1},
        }

    def makers(self, data: Any, split: str, names: list[str], tokenizer: Any) -> dict[str, Maker]:
        """By name, what makes the questions of a split ("train", "validation", "test")."""
        raise NotImplementedError

    def load(self, config: TrainConfig) -> TaskData:
        from titans.training.tokens import tokenizer_of

        data, training, evaluation = config.data, config.training, config.evaluation
        tokenizer = tokenizer_of(data)
        # A length that no question fits is told of now, not when the model is trained and asked.
        for *_, questions in self.questions(tokenizer, data, replace(evaluation, lengths=[min(evaluation.lengths)])):
            next(questions)
        common: dict[str, Any] = {
            "tokenizer": tokenizer,
            "window": training.length,
            "lengths": data.lengths or [training.length],
        }
        train, validation = (
            list(self.makers(data, split, data.task, tokenizer).values()) for split in ("train", "validation")
        )
        learned: dict[str, Any] = {
            "count": training.windows,
            "text_loss": data.text_loss,
            "curriculum": data.curriculum,
            "seed": training.seed,
        }
        return TaskData(
            train=QuestionWindows(train, split="train", **common, **learned),
            validation=QuestionWindows(validation, split="validation", **common, count=data.validation_windows, seed=0),
            tokenizer=tokenizer,
            ordered=True,
        )

    def build_model(self, config: TrainConfig, data: TaskData) -> "PreTrainedModel":
        from titans.training.models import build_model
        from titans.training.tokens import special_ids

        return build_model(config.model, **special_ids(data.tokenizer), seed=config.training.seed)

    def evaluate(self, model: "PreTrainedModel", tokenizer: Any, data: Any, evaluation: Any) -> dict[str, Any]:
        from titans.training.answers import examine

        cells = []
        for name, length, questions in self.questions(tokenizer, data, evaluation):
            cell = examine(model, tokenizer, questions, length, evaluation.max_new_tokens)
            cells.append({"task": name, "length": length, **cell})
        return {"cells": cells}

    def questions(self, tokenizer: Any, data: Any, evaluation: Any) -> Iterator[tuple[str, int, Iterator[Question]]]:
        """For every name and length the test questions, each made when it is asked for, of its own number alone."""
        for name, make in self.makers(data, "test", evaluation.task, tokenizer).items():
            for length in evaluation.lengths:
                seeds = [evaluation.seed, SPLITS["test"], evaluation.known.index(name), length]
                rngs = (np.random.default_rng([*seeds, i]) for i in range(evaluation.samples))
                yield name, length, (make(rng, length, evaluation.max_new_tokens) for rng in rngs)

    def summary(self, metrics: dict[str, Any]) -> dict[str, float]:
        cells = metrics["cells"]
        mean = {"accuracy (%)": float(np.mean([cell["accuracy"] for cell in cells]))}
        return mean | {f"{cell['task']} @ {cell['length']:,}": cell["accuracy"] for cell in cells}

    def report(self, metrics: dict[str, Any]) -> str:
        lines = ["| task | length | accuracy (%) | questions | tokens/s read | peak memory (MB) |"]
        lines.append("|---|---:|---:|---:|---:|---:|")
        for cell in metrics["cells"]:
            peak = "" if cell["peak_bytes"] is None else f"{cell['peak_bytes'] / 1e6:,.0f}"
            lines.append(
                f"| {cell['task']} | {cell['length']:,} | {cell['accuracy']:.1f} | {cell['samples']} "
                f"| {cell['tokens_per_second']:,.0f} | {peak} |"
            )
        last = metrics["cells"][-1]["examples"][0]
        return "\n".join([*lines, "", f"An example: expected {last['answers']}, the model wrote {last['output']!r}"])

    def plot(self, metrics: dict[str, dict[str, Any]], path: Path) -> None:
        """Depth times length, a panel for every run and task."""
        from matplotlib.figure import Figure

        if not metrics:
            return
        tasks = list(dict.fromkeys(cell["task"] for m in metrics.values() for cell in m["cells"]))
        size = (1.5 + 3.5 * len(tasks), 0.5 + 2.8 * len(metrics))
        panels = Figure(figsize=size, layout="constrained").subplots(len(metrics), len(tasks), squeeze=False)
        for row, (name, m) in zip(panels, metrics.items(), strict=True):
            for axes, task in zip(row, tasks, strict=True):
                cells = [cell for cell in m["cells"] if cell["task"] == task]
                image = _heat_map(axes, cells)
                axes.set_title(f"{name}, {task}", fontsize="small")
        panels[0, 0].figure.colorbar(image, ax=panels, label="answers found (%)")
        panels[0, 0].figure.savefig(path, dpi=120)


def _heat_map(axes: Any, cells: list[dict[str, Any]]) -> Any:
    values = np.full((DEPTHS, max(1, len(cells))), np.nan)
    for column, cell in enumerate(cells):
        for depth in cell["depths"]:
            values[round(depth["from"] * DEPTHS), column] = depth["accuracy"]
    axes.set_xticks(range(len(cells)), [f"{cell['length']:,}" for cell in cells], fontsize="x-small", rotation=30)
    axes.set_yticks(np.arange(0, DEPTHS + 1, 2) - 0.5, [f"{10 * tenth} %" for tenth in range(0, DEPTHS + 1, 2)])
    axes.set_xlabel("tokens", fontsize="small")
    axes.set_ylabel("depth of the answer", fontsize="small")
    return axes.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
