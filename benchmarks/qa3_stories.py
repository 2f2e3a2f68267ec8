"""Stories in the world of bAbI's qa3 ("Where was the apple before the kitchen?"), whose training file is not at hand.

    python benchmarks/qa3_stories.py TITANS_DATA/babi_en10k build/babi    # 10,000 questions, and links to bAbI's files

They follow the rules that the file of qa2 shows, which has the same people, places and things: at every turn one of
four people goes elsewhere, takes a thing that lies there, or drops one, whichever is possible, each as likely. A
question is about what one person did within the last 15 lines, as nine in ten of bAbI's test questions are.
benchmarks/babilong_qa3.yaml trains on them and asks those test questions.
"""

import random
import sys
from pathlib import Path

from titans.training.files import write_atomically

STORIES, QUESTIONS = 2000, 5  # as in the files of bAbI
PEOPLE = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
GOES = ("went to", "went back to", "moved to", "travelled to", "journeyed to")
TAKES = ("took", "got", "grabbed", "picked up")
DROPS = ("dropped", "left", "discarded", "put down")


class World:
    """Who and what is where, and which line told of it."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.place = {name: rng.choice(PLACES) for name in PEOPLE + THINGS}
        self.holder: dict[str, str] = {}
        self.arrived: dict[str, int] = {}  # the line that told where a person is
        # Of each thing the places to which the person who touched it last brought it, after the one where it was taken,
        # and their lines; and the line in which it was taken or dropped.
        self.way: dict[str, list[tuple[str, int]]] = {thing: [] for thing in THINGS}
        self.touched: dict[str, int] = {}

    def turn(self, line: int) -> str:
        """What somebody does."""
        who = self.rng.choice(PEOPLE)
        here = self.place[who]
        held = [thing for thing, holder in self.holder.items() if holder == who]
        lying = [thing for thing in THINGS if thing not in self.holder and self.place[thing] == here]
        verbs = self.rng.choice([GOES] + [DROPS] * bool(held) + [TAKES] * bool(lying))
        verb = self.rng.choice(verbs)
        if verbs is GOES:
            there = self.place[who] = self.rng.choice([place for place in PLACES if place != here])
            self.arrived[who] = line
            for thing in held:
                self.place[thing] = there
                self.way[thing].append((there, line))
            return f"{who} {verb} the {there}."
        thing = self.rng.choice(held if verbs is DROPS else lying)
        self.touched[thing] = line
        if verbs is DROPS:
            del self.holder[thing]
        else:
            self.holder[thing] = who
            self.way[thing] = [(here, self.arrived[who])] if who in self.arrived else []
        return f"{who} {verb} the {thing}{' there' if self.rng.random() < 0.2 else ''}."

    def questions(self, line: int) -> list[str]:
        """Where a thing was before a place that it was brought to, if one of the last facts tells of that.

        With answer and supporting lines. What is still held has been to both places since it was taken.
        """
        found = []
        for thing, way in self.way.items():
            since = self.touched[thing] if thing in self.holder else 0
            latest = {way[at][0]: at for at in range(1, len(way))}
            for place, at in latest.items():
                support = (self.touched[thing], way[at][1], way[at - 1][1])
                if way[at - 1][1] > since and max(support) > line - 5 and min(support) > line - 15:
                    lines = " ".join(map(str, support))
                    found.append(f"Where was the {thing} before the {place}? \t{way[at - 1][0]}\t{lines}")
        return found


def story(rng: random.Random) -> list[str]:
    """Numbered lines; after every other fact there may be a question."""
    world, lines, asked = World(rng), [], 0
    while asked < QUESTIONS:
        lines.append(world.turn(len(lines) + 1))
        lines.append(world.turn(len(lines) + 1))
        questions = world.questions(len(lines))
        if questions and rng.random() < 0.7:
            lines.append(rng.choice(questions))
            asked += 1
    return [f"{number} {line}" for number, line in enumerate(lines, start=1)]


def main(babi: str, folder: str) -> None:
    """Writes the training file, beside links to all files of `babi` that the folder does not hold."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for file in Path(babi).resolve(strict=True).glob("qa*"):
        if not (out / file.name).exists():
            (out / file.name).symlink_to(file)
    rng = random.Random(0)
    text = "".join(f"{line}\n" for _ in range(STORIES) for line in story(rng))
    write_atomically(out / "qa3_simulated_train.txt", text)


if __name__ == "__main__":
    main(*sys.argv[1:])
