"""BABILong: bAbI's format, how facts are scattered, scoring, errors, a run from end to end."""

import json
import lzma
import os
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from titans.cli import main
from titans.tasks import get_task
from titans.tasks.babilong import MIN_SENTENCE, Background, Hidden, Scattered, Story, read_stories, stories
from titans.training.config import parse_config
from titans.training.run import train
from titans.training.tokens import byte_tokenizer

pytest.importorskip("nltk")
TASK = get_task("babilong")
BYTES = byte_tokenizer()
BABI = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary went back to the office.
5 Where is Mary? \toffice\t4
1 Sandra went to the garden.
2 Daniel is hungry.
3 Where is Sandra?\tgarden\t1
"""
STORY = Story(("Mary moved to the bathroom.", "John went to the hallway."), "Where is Mary?", "bathroom", (0,))
BOOK = " ".join(f"This is the sentence with the number {i}." for i in range(300))


def test_question_lines_are_dropped_and_stories_start_anew():
    found = stories(BABI)
    assert found[0] == STORY
    assert found[1] == Story((*STORY.facts, "Mary went back to the office."), "Where is Mary?", "office", (2,))
    assert found[2] == Story(("Sandra went to the garden.", "Daniel is hungry."), "Where is Sandra?", "garden", (0,))
    assert len(found) == 3
    for broken in ("Mary moved.", "1 Where?\tthere", "1"):
        with pytest.raises(ValueError, match=r"line 1 is .*write `n fact`"):
            stories(broken)


@pytest.mark.parametrize(
    ("output", "right"),
    [
        ("The bathroom.", True),
        (" BATHROOM", True),
        ("bathroom or kitchen", False),
        ("bathroom. Not the kitchen.", True),
        ("Not said. bathroom", False),
        ("hallway", False),
        ("the hallway, then the bathroom", True),  # the question names the hallway
        ("", False),
    ],
)
def test_right_is_the_only_label_of_the_first_sentence(output, right):
    labels = frozenset({"bathroom", "bedroom", "garden", "kitchen", "office"})
    assert Hidden("", "", ("bathroom",), (0.0,), labels).found(output) == [right]


def scattered(task="qa1", source=(STORY,), instructions=False, books=(BOOK,)):
    return Scattered(task, list(source), Background(list(books), BYTES), instructions)


def test_zero_length_is_the_facts_alone():
    question = scattered()(np.random.default_rng(0), 0, 20)
    assert question.prompt == "Mary moved to the bathroom. John went to the hallway. Where is Mary?"
    assert question.target == " bathroom."
    assert question.depths == (0.0,)
    assert question.labels == {"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}


def test_instructions_to_the_letter():
    prompt = scattered(instructions=True)(np.random.default_rng(0), 0, 20).prompt
    assert prompt.startswith("I will give you context with the facts about positions of different persons hidden in ")
    assert prompt.endswith(
        "Answer: The most recent location of Alan is shop.\n</example>\n\nAlways return your answer in the following "
        "format: The most recent location of ’person’ is ’location’. Do not write anything else after that.\n\n"
        "<context>\nMary moved to the bathroom. John went to the hallway.\n</context>\n\nQuestion: Where is Mary?"
    )
    long = scattered(instructions=True)(np.random.default_rng(0), 2000, 20).prompt
    context = long.split("<context>\n")[1].split("\n</context>")[0]
    assert 1700 - 3 <= len(context) + 1 <= 1700


def test_facts_keep_their_order_at_uniform_places_among_consecutive_sentences():
    make = scattered()
    places = Counter()
    for seed in range(600):
        prompt = make(np.random.default_rng(seed), 1500, None).prompt
        context = prompt.removesuffix(" Where is Mary?")
        mary, john = (context.index(fact) for fact in STORY.facts)
        assert mary < john
        plain = context.replace(STORY.facts[0] + " ", "").replace(STORY.facts[1] + " ", "")
        for fact in STORY.facts:
            plain = plain.removesuffix(" " + fact)
        numbers = [int(word.strip(".")) for word in plain.split() if word.strip(".").isdigit()]
        assert all(b == a + 1 or a == 298 for a, b in pairwise(numbers[:-1]))  # 299, the last one, is dropped
        places[int(10 * mary / len(context))] += 1
    # The smaller of two uniform draws: 19 % in the first tenth, 17 % in the second, ..
    assert all(abs(places[t] / 600 - (19 - 2 * t) / 100) < 0.06 for t in range(8))


def test_lengths_are_used_up_and_kept():
    make = scattered()
    for length in (300, 555, 2000):
        question = make(np.random.default_rng(1), length, None)
        used = len(question.prompt) + len(question.target) + 1
        assert length - 3 <= used <= length
        assert length - 23 <= len(make(np.random.default_rng(1), length, 20).prompt) <= length - 20
    umlauts = scattered(books=("Schön äöü größer süßes Öl überall. " * 40,))
    for length in range(200, 240):
        question = umlauts(np.random.default_rng(length), length, None)
        assert len(f"{question.prompt}{question.target}".encode()) + 1 <= length
        assert "�" not in question.prompt


def test_a_first_word_may_cost_more_than_one_behind_a_space():
    """As in GPT-2's tokens, where "Sandra" is two and " Sandra" one."""
    make = scattered(source=[Story(STORY.facts[:1], "Where is Mary?", "bathroom", (0,))])
    make.background.encode = lambda text: [0] * (len(text.split()) + (text[:1] != " "))
    with pytest.raises(ValueError, match="length=10 is not valid; use at least 11"):
        make(np.random.default_rng(0), 10, None)
    question = make(np.random.default_rng(0), 11, None)
    assert sum(len(make.background.encode(part)) for part in (question.prompt, question.target)) + 1 == 11


def test_depth_is_where_the_last_supporting_fact_stands():
    story = Story(("Mary ate.", "John sat.", "Mary left."), "Where is Mary?", "garden", (2, 0))
    question = scattered(source=[story])(np.random.default_rng(3), 900, 20)
    context = question.prompt.removesuffix(" Where is Mary?")
    assert question.depths[0] == pytest.approx(context.index("Mary left.") / len(context), abs=2 / len(context))


def test_short_sentences_are_skipped_and_stories_with_too_many_facts():
    background = Background(["Oh! " + "So it is here again. " * 50 + "No. " * 50], BYTES)
    sentences = background.sentences(np.random.default_rng(0), 500)
    assert all(len(s) + 1 >= MIN_SENTENCE for s in sentences[:-1])
    many = Story(("It is.",) * 40, "Where?", "garden", (0,))
    questions = [scattered(source=[many, STORY])(np.random.default_rng(s), 310, 0) for s in range(10)]
    assert all("Mary moved" in question.prompt for question in questions)
    with pytest.raises(ValueError, match=r"qa1: length=310 is not valid; use at least"):
        scattered(source=[many])(np.random.default_rng(0), 310, 0)
    with pytest.raises(ValueError, match="books with sentences of at least 10 tokens"):
        Background(["No. " * 50], BYTES).sentences(np.random.default_rng(0), 50)


@pytest.fixture
def values(tmp_path):
    (tmp_path / "babi").mkdir()
    for part in ("train", "test"):
        with lzma.open(tmp_path / "babi" / f"qa1_single-supporting-fact_{part}.txt.xz", "wt") as file:
            file.write(BABI * 10)
    (tmp_path / "babi" / "qa3_three-supporting-facts_test.txt").write_text(BABI)
    (tmp_path / "book.txt").write_text(BOOK)
    book = str(tmp_path / "book.txt")
    return {
        "output": str(tmp_path / "run"),
        "model": {"variant": "lmm", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                  "num_memory_heads": 1, "memory_expansion": 1, "chunk_size": 32},
        "data": {"babi": str(tmp_path / "babi"), "train": book, "validation": book, "test": book,
                 "lengths": [256], "validation_windows": 2},
        "training": {"length": 256, "batch_size": 2, "tokens": 1024, "eval_every": 1},
        "evaluation": {"task": ["qa1"], "lengths": [0, 300], "samples": 3, "max_new_tokens": 4},
    }  # fmt: skip


def test_splits_of_a_task_and_files_that_are_not_there(values):
    folder = values["data"]["babi"]
    assert [len(read_stories(folder, "qa1", split)) for split in ("train", "validation", "test")] == [27, 3, 30]
    with pytest.raises(FileNotFoundError, match=r"no file qa3_\*_train\.txt; it has the train files of qa1: choose"):
        read_stories(folder, "qa3", "train")
    assert len(read_stories(folder, "qa3", "test")) == 3
    with pytest.raises(ValueError, match=r"data\.babi=None is not valid; use the folder with bAbI's files"):
        read_stories(None, "qa1", "test")
    with pytest.raises(FileNotFoundError, match="of no task"):
        read_stories(folder + "/none", "qa1", "test")
    open(f"{folder}/qa2_x_test.txt", "w").close()
    with pytest.raises(ValueError, match="is empty"):
        read_stories(folder, "qa2", "test")
    with pytest.raises(ValueError, match=r"data\.task='qa6' is not valid"):
        parse_config(TASK, {"data": {"task": ["qa6"]}})


def test_train_and_eval(values, tmp_path, capsys):
    result = train(parse_config(TASK, values), TASK, progress=False)
    assert [cell["length"] for cell in result["metrics"]["cells"]] == [0, 300]
    assert list(TASK.summary(result["metrics"])) == ["accuracy (%)", "@ 0", "@ 300"]
    assert (tmp_path / "run" / "depth.png").exists()
    out = tmp_path / "out.json"
    options = ["--task", "qa1", "qa3", "--lengths", "0", "400", "--samples", "2", "--json", str(out)]
    assert main(["eval", "babilong", str(tmp_path / "run"), *options]) == 0
    assert "| qa3 | 400 |" in capsys.readouterr().out
    assert {cell["task"] for cell in json.loads(out.read_text())["cells"]} == {"qa1", "qa3"}
    assert out.with_suffix(".png").exists()


def test_babi_as_shipped():
    if not os.environ.get("TITANS_DATA"):
        pytest.skip("TITANS_DATA names no folder of data")
    folder = "${TITANS_DATA}/babi_en10k"
    for name in ("qa1", "qa2", "qa3", "qa4", "qa5"):
        assert len(read_stories(folder, name, "test")) == 1000
    assert len(read_stories(folder, "qa5", "train")) == 9000
    with pytest.raises(FileNotFoundError, match="qa1, qa2, qa4, qa5"):
        read_stories(folder, "qa3", "train")
    data = TASK.data_class(test="${TITANS_DATA}/gutenberg_books/validation.jsonl.xz", babi=folder)
    for name, make in TASK.makers(data, "test", ["qa1", "qa2", "qa3", "qa4", "qa5"], BYTES).items():
        question = make(np.random.default_rng(0), 4000, 20)
        assert question.found(question.target) == [True], name
        assert 3970 <= len(question.prompt.encode()) <= 3980
