"""Needles in haystacks: RULER's retrieval tasks (Hsieh et al. 2024, arXiv 2404.06654), at any length.

What differs from RULER: the essays are those of `data.test` (books, say) instead of Paul Graham's; sentences are cut as
`titans.training.text.sentence_spans` says; every prompt is the longest that fits, where RULER steps by many words; the
random draws are this library's own.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from titans.training.config import option
from titans.training.questions import (
    Maker,
    Question,
    QuestionData,
    QuestionEvaluation,
    QuestionTask,
    listing,
    longest,
)


@dataclass(frozen=True)
class Ruler:
    """A row of RULER's table: kinds of haystack, key and value; keys in the text, values a key, keys asked for."""

    haystack: str  # noise, essay or needle
    key: str  # word or uuid
    value: str  # number, word or uuid
    keys: int = 1
    values: int = 1
    asked: int = 1


RULER = {
    "niah_single_1": Ruler("noise", "word", "number"),
    "niah_single_2": Ruler("essay", "word", "number"),
    "niah_single_3": Ruler("essay", "word", "uuid"),
    "niah_multikey_1": Ruler("essay", "word", "number", keys=4),
    "niah_multikey_2": Ruler("needle", "word", "number"),
    "niah_multikey_3": Ruler("needle", "uuid", "uuid"),
    "niah_multivalue": Ruler("essay", "word", "number", values=4),
    "niah_multiquery": Ruler("essay", "word", "number", keys=4, asked=4),
}
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text is"
)
SEVERAL = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind}s afterwards.\n{context}\nWhat are all the special magic {kind}s for {query} mentioned in the provided "
    "text? The special magic {kind}s for {query} mentioned in the provided text are"
)
NEEDLE_DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)  # percent of the sentences


@dataclass
class NeedleData(QuestionData):
    """Which needles are trained, in which haystacks."""

    task: list[str] = option(["niah_single_1"], f"questions to train on, one or more of {', '.join(RULER)}")
    words: str | None = option(
        None, "folder with files that end in nounlist.txt and adjectivelist.txt; by default those of `wonderwords`"
    )
    known = tuple(RULER)


@dataclass
class NeedleEvaluation(QuestionEvaluation):
    """RULER's: 500 questions a length, 128 tokens of answer, for which every prompt leaves room."""

    task: list[str] = option(["niah_single_1"], f"questions to ask, one or more of {', '.join(RULER)}")
    known = tuple(RULER)


class Essay:
    """A text as a haystack: white space made single spaces, repeated from its start where it ends too soon."""

    def __init__(self, text: str):
        self.text = " ".join(text.split())

    @cached_property
    def words(self) -> np.ndarray:
        """Where each word begins, in characters, and one more as if a word followed the text: int64 [words + 1]."""
        letters = np.frombuffer(self.text.encode("utf-32-le"), np.uint32)
        return np.concatenate([[0], np.flatnonzero(letters == ord(" ")) + 1, [len(self.text) + 1]])

    @cached_property
    def sentences(self) -> np.ndarray:
        """The first word of each sentence, counted in words: int64 [sentences]."""
        from titans.training.text import sentence_spans

        return np.searchsorted(self.words, [begin for begin, _ in sentence_spans(self.text)])

    def between(self, first: int, last: int) -> str:
        """Words `first` to `last` - 1, one space between them."""
        parts, length = [], len(self.words) - 1
        while first < last:
            begin = first % length
            end = min(length, begin + last - first)
            parts.append(self.text[self.words[begin] : self.words[end] - 1])
            first += end - begin
        return " ".join(parts)

    def sentences_before(self, word: int) -> int:
        """How many sentences begin before a word."""
        turns, rest = divmod(word, len(self.words) - 1)
        return turns * len(self.sentences) + int(np.searchsorted(self.sentences, rest))

    def sentence(self, number: int) -> int:
        """The first word of a sentence."""
        turns, rest = divmod(number, len(self.sentences))
        return turns * (len(self.words) - 1) + int(self.sentences[rest])


class Needles:
    """Makes the questions of one of RULER's tasks.

    Args:
        name: key of `RULER`.
        words: adjectives and nouns.
        size: tokens of a text.
        essays: one is drawn for each question.
        from_start: haystacks begin with the essay, as RULER's do; otherwise at any of its sentences.
    """

    def __init__(self, name: str, words: tuple[list[str], list[str]], size: Callable[[str], int], essays: list[Essay],
                 from_start: bool):  # fmt: skip
        self.name, self.ruler, self.words, self.size = name, RULER[name], words, size
        self.essays, self.from_start = essays, from_start

    def __call__(self, rng: np.random.Generator, length: int, reserve: int | None) -> Question:
        """The longest question with `reserve` tokens to spare in `length`.

        Raises:
            ValueError: the shortest is longer.
        """
        ruler = self.ruler
        keys = [self._draw(ruler.key, rng) for _ in range(ruler.keys)]
        values = [[self._draw(ruler.value, rng) for _ in range(ruler.values)] for _ in keys]
        needles = [self._needle(k, v) for k, several in zip(keys, values, strict=True) for v in several]
        asked = rng.permutation(ruler.keys)[: ruler.asked]
        told = [(keys[i], value) for i in asked for value in values[i]]
        answers = tuple(value for _, value in told)
        template = ONE if len(told) == 1 else SEVERAL
        order = rng.permutation(len(needles))
        make_context = self._essay if ruler.haystack == "essay" else self._lines
        context = make_context(rng, [needles[i] for i in order])
        query = listing(keys[i] for i in asked)

        def prompt(n: int) -> str:
            return template.format(kind=ruler.value, query=query, context=context(n))

        target = f" {listing(answers)}."
        spare = self.size(target) + 1 if reserve is None else reserve
        try:
            n = longest(lambda n: self.size(prompt(n)) + spare, length, len(needles))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        text = prompt(n)
        depths = tuple(text.index(self._needle(k, v)) / len(text) for k, v in told)
        return Question(text, target, answers, depths)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.ruler.value, key=key, value=value)

    def _draw(self, kind: str, rng: np.random.Generator) -> str:
        if kind == "number":
            return str(rng.integers(1_000_000, 10_000_000))
        if kind == "uuid":
            return str(uuid.UUID(bytes=rng.bytes(16), version=4))
        return "-".join(words[rng.integers(len(words))] for words in self.words)

    # A context is a function of n: its lines or words, the needles not counted.

    def _lines(self, rng: np.random.Generator, needles: list[str]) -> Callable[[int], str]:
        seed = int(rng.integers(2**32))
        others, draws = [], np.random.default_rng(seed)

        def context(n: int) -> str:
            lines = [NOISE] * n
            if self.ruler.haystack == "needle":
                while len(others) < n:
                    others.append(self._needle(self._draw(self.ruler.key, draws), self._draw(self.ruler.value, draws)))
                lines = others[:n]
            places = np.random.default_rng([seed, n]).choice(n, len(needles), replace=False)
            for place, needle in zip(sorted(places, reverse=True), needles, strict=True):
                lines.insert(place, needle)
            return "\n".join(lines)

        return context

    def _essay(self, rng: np.random.Generator, needles: list[str]) -> Callable[[int], str]:
        essay = self.essays[rng.integers(len(self.essays))]
        start = 0 if self.from_start else int(essay.sentences[rng.integers(len(essay.sentences))])
        depths = np.sort(rng.choice(NEEDLE_DEPTHS, len(needles), replace=False))

        def context(n: int) -> str:
            before = essay.sentences_before(start)
            count = essay.sentences_before(start + n) - before
            parts, at = [], start
            for depth, needle in zip(depths, needles, strict=True):
                index = int(count * (depth / 100))
                to = essay.sentence(before + index) if index < count else start + n
                parts += [essay.between(at, to), needle]
                at = to
            return " ".join(part for part in [*parts, essay.between(at, start + n)] if part)

        return context


class Needle(QuestionTask):
    """RULER's needles; see `titans.training.task.Task` for the methods."""

    name = "needle"
    data_class = NeedleData
    evaluation_class = NeedleEvaluation

    def preset(self) -> dict[str, Any]:
        """A small byte-level LMM that looks for a number among repeated lines."""
        return super().preset() | {"evaluation": {"lengths": [1024, 2048, 4096, 8192], "samples": 50}}

    def makers(self, data: NeedleData, split: str, names: list[str], tokenizer: Any) -> dict[str, Maker]:
        from titans.training.text import split_documents
        from titans.training.tokens import encoder

        encode, essays = encoder(tokenizer), []
        if any(RULER[name].haystack == "essay" for name in names):
            documents = split_documents(data, split)
            essays = [Essay(" ".join(documents))] if split == "test" else list(map(Essay, documents))
        words = read_words(data.words)
        return {
            name: Needles(name, words, lambda text: len(encode(text)), essays, from_start=split == "test")
            for name in names
        }


task = Needle()


def read_words(folder: str | None) -> tuple[list[str], list[str]]:
    """Adjectives and nouns, sorted, each once: of a folder, or (None) of the package `wonderwords`.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: an empty file.
        ImportError: `wonderwords` is not installed.
    """
    from titans.training.text import expand

    if folder is None:
        try:
            files = list(resources.files("wonderwords.assets").iterdir())
        except ModuleNotFoundError as error:
            raise ImportError(
                "the keys of needles are words of the package `wonderwords`: pip install 'titans[questions]', or name "
                "a folder of words with data.words"
            ) from error
    else:
        files = list(Path(expand(folder)).glob("*"))
    lists = []
    for ending in ("adjectivelist.txt", "nounlist.txt"):
        found = [file for file in files if file.name.endswith(ending)]
        if not found:
            raise FileNotFoundError(f"data.words={folder!r} has no file that ends in {ending}; give a folder with one")
        words = {word.rstrip() for word in found[0].read_text(encoding="utf-8").splitlines()} - {""}
        if not words:
            raise ValueError(f"{found[0]} holds no words; write one a line")
        lists.append(sorted(words))
    return lists[0], lists[1]
