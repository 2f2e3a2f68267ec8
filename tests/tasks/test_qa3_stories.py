"""The stories that stand in for qa3's training file: their answers follow from the facts, as those of bAbI's do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from titans.tasks.babilong import Story, read_stories

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "qa3_stories.py"
FACT = re.compile(r"(\w+) (went(?: back)? to|\w+ed to|picked up|put down|\w+) the (\w+)(?: there)?\.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    babi, out = tmp_path_factory.mktemp("babi"), tmp_path_factory.mktemp("build") / "babi"
    (babi / "qa1_facts_test.txt").write_text("1 Mary moved to the bathroom.\n")
    subprocess.run([sys.executable, str(SCRIPT), str(babi), str(out)], check=True)
    return out


def solve(story: Story) -> tuple[str, set[int]]:
    """The answer to a question of qa3's, and the facts that it takes."""
    thing, asked = re.fullmatch(r"Where was the (\w+) before the (\w+)\?", story.question).groups()
    place, carrier, way, touched = {}, None, [], -1
    for index, fact in enumerate(story.facts):
        who, verb, what = FACT.fullmatch(fact).groups()
        if verb.endswith(" to"):
            assert place.get(who, (None,))[0] != what
            place[who] = (what, index)
            if who == carrier:
                way.append(place[who])
        elif what == thing:
            touched = index
            if carrier is None:
                carrier = who
                if who in place:
                    assert not way or place[who][0] == way[-1][0]
                    way[-1:] = [place[who]]
            else:
                assert carrier == who
                carrier = None
    at = max(i for i in range(1, len(way)) if way[i][0] == asked)
    return way[at - 1][0], {way[at - 1][1], way[at][1], touched}


def test_the_answers_follow_from_the_facts(folder):
    told = read_stories(str(folder), "qa3", "train") + read_stories(str(folder), "qa3", "validation")
    assert len(told) == 10_000
    for story in told[::7]:
        assert solve(story) == (story.answer, set(story.support))
    assert len({story.facts for story in told}) == 10_000
    assert (folder / "qa1_facts_test.txt").read_text() == "1 Mary moved to the bathroom.\n"


def test_babi_has_the_same_rules():
    if not os.environ.get("TITANS_DATA"):
        pytest.skip("TITANS_DATA names no folder of data")
    for story in read_stories("${TITANS_DATA}/babi_en10k", "qa3", "test"):
        assert solve(story) == (story.answer, set(story.support))
