"""BABILong (Kuratov et al. 2024, arXiv 2406.10149): bAbI's facts scattered in the text of books, qa1 to qa5.

What differs from BABILong: the books are those of `data.test` instead of PG-19's; tokens are those of the model's own
tokenizer instead of GPT-2's; facts and sentences are joined by one space; the draws are this library's own.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from titans.tasks._babilong import FRAME, INSTRUCTIONS
from titans.training.config import option, require
from titans.training.questions import Maker, Question, QuestionData, QuestionEvaluation, QuestionTask

_PLACES = frozenset({"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"})
LABELS = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), _PLACES),
    "qa5": frozenset({"bill", "fred", "jeff", "mary", "apple", "football", "milk"}),
}
MIN_SENTENCE = 10  # tokens of a sentence; shorter ones of the books are skipped
PROMPT = 300  # tokens that BABILong sets aside for the instructions


@dataclass
class BabilongData(QuestionData):
    """Which of bAbI's questions, where they lie, and in which books they are hidden."""

    task: list[str] = option(["qa1"], f"questions to train on, one or more of {', '.join(LABELS)}")
    babi: str | None = option(None, "folder with bAbI's files, qa1_..._train.txt and so on (also .xz, .gz)")
    instructions: bool = option(
        False, "BABILong's instructions and examples before the text, as untrained models are asked; "
        "otherwise the text and the question alone"
    )  # fmt: skip
    known = tuple(LABELS)


@dataclass
class BabilongEvaluation(QuestionEvaluation):
    """BABILong's lengths are 0 (0k: the facts alone), 1000 (1k), 2000 (2k), up to 1000000 (1M)."""

    task: list[str] = option(list(LABELS), f"questions to ask, one or more of {', '.join(LABELS)}")
    lengths: list[int] = option([0, 1000, 2000, 4000, 8000, 16000], "lengths in tokens; 0: the facts alone")
    samples: int = option(100, "questions of each task and length")
    max_new_tokens: int = option(20, "tokens the model writes at most")
    known = tuple(LABELS)


@dataclass(frozen=True)
class Story:
    """A question of bAbI's, the facts before it, and which of these support the answer."""

    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]  # indices into facts


@dataclass(frozen=True)
class Hidden(Question):
    """A question that is right if its answer is the only label that the first sentence of the output names.

    Its depth is that of the last fact that supports the answer.
    """

    labels: frozenset[str] = frozenset()  # those that do not occur in the question

    def found(self, output: str) -> list[bool]:
        sentence = output.lower().split(".")[0]
        return [{label for label in self.labels if label in sentence} == set(self.answers)]


def stories(text: str) -> list[Story]:
    """bAbI's format: lines `n fact`, or `n question<TAB>answer<TAB>supporting lines`; n starts anew with each story.

    Raises:
        ValueError: a line of another form.
    """
    found: list[Story] = []
    facts: list[str] = []
    index_of: dict[str, int] = {}
    for position, line in enumerate(text.splitlines(), start=1):
        number, _, rest = line.strip().partition(" ")
        fact, *answer = (part.strip() for part in rest.split("\t"))
        if not number.isdigit() or not fact or len(answer) not in (0, 2):
            raise ValueError(f"line {position} is {line!r}; write `n fact`, or `n question<TAB>answer<TAB>lines`")
        if number == "1":
            facts, index_of = [], {}
        if answer:
            support = tuple(index_of[n] for n in answer[1].split())
            found.append(Story(tuple(facts), fact, answer[0], support))
        else:
            index_of[number] = len(facts)
            facts.append(fact)
    return found


def read_stories(folder: str | None, task: str, split: str) -> list[Story]:
    """The questions of a split; the last tenth of the training file is the validation split.

    Raises:
        ValueError: no folder, or an empty file.
        FileNotFoundError: the folder has no such file.
    """
    from titans.training.text import expand, read_documents

    require(folder is not None, "data.babi", folder, "the folder with bAbI's files")
    part = "test" if split == "test" else "train"
    path = Path(expand(str(folder)))
    files = sorted(path.glob(f"{task}_*_{part}.txt*"))
    if not files:
        there = sorted({file.name.split("_")[0] for file in path.glob(f"qa*_{part}.txt*")} & set(LABELS))
        raise FileNotFoundError(
            f"data.babi={str(path)!r} has no file {task}_*_{part}.txt; it has the {part} files of "
            f"{', '.join(there) or 'no task'}: choose among these, or add the file"
        )
    try:
        found = stories(next(read_documents(files[0])))
    except ValueError as error:
        raise ValueError(f"{files[0]}: {error}") from error
    border = len(found) * 9 // 10
    return {"train": found[:border], "validation": found[border:], "test": found}[split]


class Background:
    """Sentences of books.

    Args:
        books: their texts.
        tokenizer: counts their tokens.
    """

    def __init__(self, books: list[str], tokenizer: Any):
        from titans.training.tokens import encoder

        self.books, self.tokenizer, self.encode = books, tokenizer, encoder(tokenizer)

    def sentences(self, rng: np.random.Generator, tokens: int) -> list[str]:
        """Sentences in their order from random places of random books, `tokens` tokens in all: the last one is cut.

        Raises:
            ValueError: the books have no sentences that are long enough.
        """
        from titans.training.text import sentence_spans

        found: list[str] = []
        fruitless = 0
        while tokens > 0:
            book = self.books[rng.integers(len(self.books))]
            text = book[int(rng.integers(len(book))) :][: 5 * tokens + 500]
            before = len(found)
            for start, end in sentence_spans(text)[1:-1]:
                ids = self.encode(f" {text[start:end]}")
                if len(ids) < MIN_SENTENCE:
                    continue
                whole = len(ids) <= tokens
                cut = text[start:end] if whole else self.tokenizer.decode(ids[:tokens]).strip("\ufffd ")
                found.append(cut)
                tokens -= len(ids)
                if tokens <= 0:
                    break
            fruitless = fruitless + 1 if len(found) == before else 0
            books = f"{len(self.books)} books"
            require(fruitless < 100, "data", books, f"books with sentences of at least {MIN_SENTENCE} tokens")
        return found


class Scattered:
    """Makes the questions of one task: facts at random places among sentences of books.

    Args:
        task: key of `LABELS`.
        source: bAbI's questions; one is drawn for each question.
        instructions: ask as BABILong asks untrained models.
    """

    def __init__(self, task: str, source: list[Story], background: Background, instructions: bool):
        self.task, self.source, self.background, self.instructions = task, source, background, instructions
        self.template = f"{INSTRUCTIONS[task]}\n\n{FRAME}" if instructions else "{context} {question}"

    def __call__(self, rng: np.random.Generator, length: int, reserve: int | None) -> Question:
        """A question of at most `length` tokens, `reserve` of them kept free; length 0: the facts alone.

        With instructions and a `reserve` the text takes `length` - 300 tokens, as BABILong's, whatever the rest takes.
        Stories of more than length / 8 facts are passed over.

        Raises:
            ValueError: no story fits.
        """
        facts, others, numbers = self.sizes
        if length == 0:
            return self._question(rng, self.source[rng.integers(len(self.source))], 0)
        as_published = self.instructions and reserve is not None
        taken = PROMPT if as_published else others + (self.answers if reserve is None else reserve)
        fits = np.flatnonzero((facts + taken <= length) & (numbers <= length / 8))
        shortest = f"at least {int((facts + taken).min()):,}: the shortest story; or 0: the facts alone"
        require(len(fits) > 0, f"{self.task}: length", length, shortest)
        index = int(rng.choice(fits))
        free = int((length - facts - taken)[index])
        while True:
            question = self._question(rng, self.source[index], free)
            spare = self.answers[index] if reserve is None else reserve
            excess = len(self.background.encode(question.prompt)) + spare - length
            if excess <= 0 or as_published or free == 0:
                return question
            free = max(0, free - excess)  # pieces may have more tokens together than each by itself

    @cached_property
    def answers(self) -> np.ndarray:
        """Tokens of each target and the end of the text after it: int64 [stories]."""
        return np.array([len(self.background.encode(f" {story.answer}.")) + 1 for story in self.source])

    @cached_property
    def sizes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of each story's facts, tokens of the rest of its prompt, number of its facts: int64 [stories] each."""
        facts, others = [], []
        for story in self.source:
            facts.append(len(self.background.encode(" ".join(story.facts))))  # as nothing stands before the first one
            others.append(len(self.background.encode(self.template.format(context="", question=story.question))))
        return np.array(facts), np.array(others), np.array([len(story.facts) for story in self.source])

    def _question(self, rng: np.random.Generator, story: Story, free: int) -> Question:
        """The facts among `free` tokens of background, each before a sentence drawn for it, or after the last."""
        parts: list[str] = self.background.sentences(rng, free)
        places = np.sort(rng.integers(len(parts) + 1, size=len(story.facts)))
        for place, fact in zip(places[::-1], story.facts[::-1], strict=True):
            parts.insert(place, fact)
        last = max(story.support)  # as facts keep their order, so many parts before it are facts
        before = len(" ".join(parts[: places[last] + last]))
        context = " ".join(parts)
        prompt = self.template.format(context=context, question=story.question)
        labels = frozenset(label for label in LABELS[self.task] if label not in story.question.lower())
        return Hidden(prompt, f" {story.answer}.", (story.answer.lower(),), (before / len(context),), labels)


class Babilong(QuestionTask):
    """bAbI in books; see `titans.training.task.Task` for the methods."""

    name = "babilong"
    data_class = BabilongData
    evaluation_class = BabilongEvaluation

    def preset(self) -> dict[str, Any]:
        """A small byte-level MAG that learns qa1 at growing lengths; its window sees a fact whole."""
        preset = super().preset()
        attention = {"variant": "mag", "intermediate_size": 24, "num_attention_heads": 2, "sliding_window": 64}
        budget = {"length": 1024, "batch_size": 4, "tokens": 1e7, "write_price_after": 0.3}
        return {
            "model": preset["model"] | attention,
            "data": {"lengths": [256, 512, 1024], "curriculum": True},
            "training": preset["training"] | budget,
            "evaluation": {"task": ["qa1"], "samples": 50},
        }

    def makers(self, data: BabilongData, split: str, names: list[str], tokenizer: Any) -> dict[str, Maker]:
        from titans.training.text import split_documents

        background = Background(split_documents(data, split), tokenizer)
        return {
            name: Scattered(name, read_stories(data.babi, name, split), background, data.instructions) for name in names
        }

    def summary(self, metrics: dict[str, Any]) -> dict[str, float]:
        """By length, the mean over the tasks: BABILong's usual summary."""
        summary = super().summary(metrics)
        by_length: dict[int, list[float]] = {}
        for cell in metrics["cells"]:
            by_length.setdefault(cell["length"], []).append(cell["accuracy"])
        mean = {f"@ {length:,}": float(np.mean(values)) for length, values in by_length.items()}
        return {"accuracy (%)": summary["accuracy (%)"], **mean}


task = Babilong()
