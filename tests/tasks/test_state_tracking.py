"""State tracking: the answers by other means, the groups' laws, a run from end to end."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titans.cli import main
from titans.tasks import get_task
from titans.tasks.state_tracking import AUTOMATA, CLOSE, OPEN, above_chance, group, modular, modular_brackets
from titans.training.config import parse_config
from titans.training.run import train
from titans.training.tables import table
from titans.training.tagging import right_answers

TASK = get_task("state_tracking")
SIGNS = "01234+-*()"
GROUPS = {"s3": 6, "z60": 60, "a4xz5": 60, "a5": 60, "s5": 120}
seeds, lengths = st.integers(0, 10_000), st.integers(1, 60)


def draw(name, seed, length):
    return AUTOMATA[name].draw(np.random.default_rng(seed), length)


@given(seeds, lengths)
def test_parity_cycle_and_even_pairs(seed, length):
    bits, odd = draw("parity", seed, length)
    assert odd.tolist() == [sum(bits[: t + 1]) % 2 for t in range(length)]
    steps, places = draw("cycle", seed, length)
    assert places.tolist() == [sum({0: -1, 1: 0, 2: 1}[s] for s in steps[: t + 1].tolist()) % 5 for t in range(length)]
    bits, different = draw("even_pairs", seed, length)
    assert different.tolist() == [sum(a != b for a, b in pairwise(bits[: t + 1])) % 2 for t in range(length)]


@given(seeds, lengths)
def test_modular_arithmetic_is_python_s(seed, length):
    ids, targets = draw("modular", seed, length)
    assert len(ids) == length - (length % 2 == 0)
    text = "".join(SIGNS[i] for i in ids)
    for t in range(len(ids)):
        assert targets[t] == (eval(text[: t + 1]) % 5 if t % 2 == 0 else -100)


@pytest.mark.parametrize(("text", "value"), [("1+2*3", 2), ("1-1-1", 4), ("0*1+4*3-2", 0)])
def test_modular_worked_examples(text, value):
    class Scripted:
        def __init__(self):
            signs = [SIGNS.index(c) for c in text]
            self.draws = [np.array(signs), np.array(signs[1::2])]

        def integers(self, *_, **__):
            return self.draws.pop(0)

    assert modular(Scripted(), len(text))[1][-1] == value


@given(seeds, lengths)
def test_brackets_are_python_s(seed, length):
    ids, targets = modular_brackets(np.random.default_rng(seed), length)
    assert len(ids) == length - (length - 1) % 4
    assert (ids == OPEN).sum() == (ids == CLOSE).sum() == (len(ids) - 1) // 4
    assert targets[-1] == eval("".join(SIGNS[i] for i in ids)) % 5
    assert (targets[:-1] == -100).all()


@pytest.mark.parametrize(("name", "order"), GROUPS.items())
def test_groups(name, order):
    table, every = group(name), np.arange(order)
    assert table.shape == (order, order)
    assert (table[0] == every).all() and (table[:, 0] == every).all()  # id 0 changes nothing
    assert all(sorted(row) == every.tolist() for row in table)
    a, b, c = np.random.default_rng(0).integers(order, size=(3, 1000))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    assert (table == table.T).all() == (name == "z60")
    assert AUTOMATA[name].classes == AUTOMATA[name].tokens == order


@pytest.mark.parametrize(("name", "solvable"), [("s3", True), ("a4xz5", True), ("z60", True), ("a5", False)])
def test_which_groups_are_solvable(name, solvable):
    """The series of commutator subgroups ends in the identity, or does not: what the theory of the tasks is about."""
    table = group(name)
    inverse = np.argmin(table, axis=1)  # where a row is 0, the identity
    members = set(range(len(table)))
    while True:
        commutators = {int(table[table[inverse[a], inverse[b]], table[a, b]]) for a in members for b in members}
        closed, grown = {0}, commutators
        while not grown <= closed:
            closed |= grown
            grown = {int(table[a, b]) for a in closed for b in commutators}
        if closed == members:
            break
        members = closed
    assert (len(members) == 1) == solvable


def test_permutations_apply_the_first_first():
    """(a b)(x) = b(a(x)), ids in the order of the images: 0 = identity, 1 = (0 2 1), 2 = (1 0 2), 3 = (1 2 0)."""
    assert group("s3")[1, 2] == 3  # 0 -> 0 -> 1, 1 -> 2 -> 2, 2 -> 1 -> 0
    elements, targets = draw("s3", 0, 20)
    at = 0
    for g, target in zip(elements, targets, strict=True):
        at = group("s3")[at, g]
        assert target == at


def config(output="unused", **values):
    return parse_config(TASK, {"output": str(output), **values})


@pytest.mark.parametrize("which", ["all", "last"])
def test_items(which):
    data = TASK.load(config(data={"task": "modular", "targets": which, "shortest": 5}, training={"length": 10})).train
    seen = set()
    for i in range(200):
        inputs, targets = data.sequence(i)
        item = data[i]
        assert item["input_ids"].tolist() == [*inputs, *[8] * (10 - len(inputs))]
        assert item["labels"].tolist() == [-100, *targets, *[-100] * (9 - len(inputs))]
        assert (targets != -100).sum() == (1 if which == "last" else (len(inputs) + 1) // 2)
        seen.add(len(inputs))
    assert seen == {5, 7, 9}


def test_accuracies_are_those_of_a_model_that_is_right_at_some_places():
    drawn = [draw("parity", seed, 10) for seed in range(50)]

    class HalfRight:
        device, config = torch.device("cpu"), type("Config", (), {"model_type": "x"})

        def __call__(self, input_ids, **_):
            targets = input_ids.cumsum(1) % 2
            targets[:, 4:] = 1 - targets[:, 4:]
            return type("Output", (), {"logits": torch.nn.functional.one_hot(targets, 3).float(), "cache": None})

    answers = list(right_answers(HalfRight(), drawn, tokens=70))
    assert len(answers) == 50
    assert all(right.tolist() == [True] * 4 + [False] * 6 and asked.all() for right, asked in answers)


def test_a_dash_is_as_good_as_an_underscore():
    assert get_task("state-tracking") is TASK
    with pytest.raises(ValueError, match="task='state-trackin' is unknown; use 'state_tracking'"):
        get_task("state-trackin")


def test_the_table_has_median_and_best_of_the_seeds():
    """Of several seeds; sorted by the median, which a single seed that finds the answer does not move."""

    def runs(*accuracies):
        cells = [[{"length": 256, "accuracy": a, "chance": 50, "whole": 0}] for a in accuracies]
        return [{"metrics": {"cells": c}, "tokens_per_second": 1} for c in cells]

    seeds = {"lucky": runs(50, 50, 100), "steady": runs(60, 60, 65), "single": runs(75)}
    models = {name: {"parameters": 1, "chosen": {}, "runs": of} for name, of in seeds.items()}
    lines = table({"models": models}, TASK).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [(row[0], row[4]) for row in cells] == [
        ("single", "50.000"),
        ("steady", "20.000 (best 30.000)"),
        ("lucky", "0.000 (best 100.000)"),
    ]


def test_above_chance():
    assert above_chance({"accuracy": 50, "chance": 50}) == 0
    assert above_chance({"accuracy": 100, "chance": 20}) == 100
    assert math.isclose(above_chance({"accuracy": 60, "chance": 20}), 50)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"data": {"task": "partiy"}}, "data.task='partiy' is not valid; use 'parity'"),
        ({"data": {"targets": "first"}}, "data.targets='first' is not valid; use 'all' or 'last'"),
        ({"data": {"shortest": 41}}, "data.shortest=41 is not valid; use at most training.length - 1 = 40"),
        ({"evaluation": {"lengths": []}}, r"evaluation.lengths=\[\] is not valid"),
    ],
)
def test_bad_values_name_the_mend(part, message):
    with pytest.raises(ValueError, match=message):
        TASK.load(config(**part))


def test_train_and_eval(tmp_path, capsys):
    """A model learns the parity of three bits, which it must, and eval finds the run's own figures again."""
    run = config(
        tmp_path / "run",
        training={"length": 4, "batch_size": 64, "tokens": 4 * 64 * 150, "eval_every": 1, "learning_rate": 1e-2},
        evaluation={"lengths": [3, 6], "sequences": 40},
    )
    cells = train(run, TASK, progress=False)["metrics"]["cells"]
    assert [cell["length"] for cell in cells] == [3, 6]
    assert cells[0]["accuracy"] > 95
    main(["eval", "state-tracking", str(tmp_path / "run"), "--lengths", "3", "6", "--sequences", "40",
          "--json", str(tmp_path / "again.json")])  # fmt: skip
    assert json.loads((tmp_path / "again.json").read_text())["cells"] == cells
    assert "| parity | 6 |" in capsys.readouterr().out
    assert (tmp_path / "again.png").exists()
