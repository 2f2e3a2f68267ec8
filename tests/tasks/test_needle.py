"""RULER's needles: prompts to the letter, positions, lengths, errors, a run from end to end."""

import json
import os
import re
import uuid
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from titans.cli import main
from titans.tasks import get_task
from titans.tasks.needle import NEEDLE_DEPTHS, NOISE, RULER, Essay, Needles, read_words
from titans.training.compare import Experiment, compare
from titans.training.config import parse_config
from titans.training.run import train
from titans.training.tables import table
from titans.training.trainer import RunTrainer

TASK = get_task("needle")
WORDS = (["blue", "ad hoc"], ["house", "arm-rest"])
KEY = r"(?:blue|ad hoc)-(?:house|arm-rest)"
STORY = "One fine day began. Then it rained! Nobody minded? So they sang. " * 3 + "The end."


def make(name, length=1200, seed=0, reserve=128, size=len, essays=(STORY,), from_start=True):
    maker = Needles(name, WORDS, size, list(map(Essay, essays)), from_start)
    return maker(np.random.default_rng(seed), length, reserve)


def test_single_1_to_the_letter():
    question = make("niah_single_1", 650)
    key, value = re.search(rf"One of the special magic numbers for ({KEY}) is: (\d{{7}})\.", question.prompt).groups()
    needle = f"One of the special magic numbers for {key} is: {value}."
    assert question.prompt.replace(needle + "\n", "") == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n"
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
        f"What is the special magic number for {key} mentioned in the provided text?"
        f" The special magic number for {key} mentioned in the provided text is"
    )
    assert question.answers == (value,)
    assert question.target == f" {value}."
    assert question.depths == (question.prompt.index(needle) / len(question.prompt),)


def test_single_2_and_3_to_the_letter():
    pytest.importorskip("nltk")
    for name, kind, value in (("niah_single_2", "number", r"\d{7}"), ("niah_single_3", "uuid", "[0-9a-f-]{36}")):
        question = make(name, 760 if kind == "number" else 800)
        found = re.fullmatch(
            rf"A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you "
            rf"about the {kind} afterwards.\n(.*)\nWhat is the special magic {kind} for ({KEY}) mentioned in the "
            rf"provided text\? The special magic {kind} for ({KEY}) mentioned in the provided text is",
            question.prompt,
        )
        context, key, again = found.groups()
        assert key == again
        before, after = context.split(f"One of the special magic {kind}s for {key} is: {question.answers[0]}.")
        assert re.fullmatch(value, question.answers[0])
        assert f"{STORY} {STORY}".startswith((before + after.removeprefix(" ")).strip())
        assert before == "" or before[-2:] in (". ", "! ", "? ")
        if kind == "uuid":
            assert uuid.UUID(question.answers[0]).version == 4


@pytest.mark.parametrize(
    ("name", "needles", "answers", "kind"),
    [
        ("niah_multikey_1", 4, 1, "number"),
        ("niah_multikey_2", None, 1, "number"),
        ("niah_multikey_3", None, 1, "uuid"),
        ("niah_multivalue", 4, 4, "number"),
        ("niah_multiquery", 4, 4, "number"),
    ],
)
def test_several_needles(name, needles, answers, kind):
    if RULER[name].haystack == "essay":
        pytest.importorskip("nltk")
    question = make(name, 2000)
    told = re.findall(r"One of the special magic (\w+)s for ([^:]+) is: ([\w-]+)\.", question.prompt)
    assert {k for k, _, _ in told} == {kind}
    assert len(told) == needles or needles is None
    assert len(question.answers) == len(question.depths) == answers
    asked = re.search(r"magic \w+ for (.*) mentioned in the provided text\?", question.prompt).group(1)
    keys = [re.sub("^and ", "", key) for key in asked.split(", ")]
    values = {key: [v for _, k, v in told if k == key] for key in keys}
    if name == "niah_multivalue":
        assert len(set(keys)) == 1
    assert set(question.answers) <= {v for several in values.values() for v in several}
    if answers == 1:
        assert question.prompt.startswith(f"A special magic {kind} is hidden")
        assert question.prompt.endswith(f" The special magic {kind} for {keys[0]} mentioned in the provided text is")
    else:
        assert question.prompt.startswith(
            "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz "
            "you about the numbers afterwards.\n"
        )
        assert question.prompt.endswith(
            f"\nWhat are all the special magic numbers for {asked} mentioned in the provided text?"
            f" The special magic numbers for {asked} mentioned in the provided text are"
        )
        assert question.target == " {}, {}, {}, and {}.".format(*question.answers)
    if RULER[name].haystack == "needle":
        lines = question.prompt.split("\n")[1:-1]
        assert len(lines) > 5
        assert all(line.startswith("One of the special magic") for line in lines)


def test_noise_needles_stand_before_every_line_equally_often_and_never_last():
    counts = Counter()
    for seed in range(2000):
        lines = make("niah_single_1", 1000, seed).prompt.split("\n")[1:-1]
        counts[next(i for i, line in enumerate(lines) if line != NOISE), len(lines)] += 1
    lengths = {length for _, length in counts}
    for length in lengths:
        places = [counts[place, length] for place in range(length)]
        total = sum(places)
        assert places[-1] == 0
        if total > 500:
            assert max(abs(p - total / (length - 1)) for p in places[:-1]) < 5 * (total / (length - 1)) ** 0.5


def test_essay_needles_stand_at_forty_depths_equally_often():
    pytest.importorskip("nltk")
    story = " ".join(f"Number {i} is here." for i in range(400))
    essay = Essay(story)
    assert len(essay.sentences) == 400
    maker = Needles("niah_single_2", WORDS, len, [essay], True)
    counts = Counter()
    for seed in range(800):
        context = maker(np.random.default_rng(seed), 7000, 128).prompt.split("\n")[1]
        before, after = re.split(rf"One of the special magic numbers for {KEY} is: \d+\. ?", context)
        sentences = len(essay.sentences[essay.sentences < len((before + after).split())])
        counts[round(100 * before.count("Number") / sentences)] += 1
    assert set(NEEDLE_DEPTHS[[0, 1, 20, 39]]) == {0, 3, 51, 100}
    assert len(NEEDLE_DEPTHS) == 40
    nearest = [min(NEEDLE_DEPTHS, key=lambda d: abs(d - depth)) for depth in counts.elements()]
    assert set(nearest) == set(NEEDLE_DEPTHS)
    assert max(Counter(nearest).values()) < 20 + 5 * 20**0.5


@pytest.mark.parametrize("name", RULER)
def test_prompts_are_the_longest_that_fit(name):
    if RULER[name].haystack == "essay":
        pytest.importorskip("nltk")
    spare = {"noise": len(NOISE) + 1, "essay": len("minded? "), "needle": 130}[RULER[name].haystack]
    for length in (1500, 1777, 4000):
        used = len(make(name, length).prompt) + 128
        assert length - spare < used <= length


def test_a_haystack_repeats_its_text_and_may_begin_anywhere():
    pytest.importorskip("nltk")
    essay = Essay("All  the cats.\n\nDogs ran. Fish swim too.")
    assert essay.text == "All the cats. Dogs ran. Fish swim too."
    assert essay.sentences.tolist() == [0, 3, 5]
    assert essay.between(3, 19) == ("Dogs ran. Fish swim too. " + essay.text + " All the cats.")
    assert [essay.sentence(i) for i in range(5)] == [0, 3, 5, 8, 11]
    assert [essay.sentences_before(w) for w in (0, 1, 3, 4, 8, 9)] == [0, 1, 1, 2, 3, 4]
    starts = {make("niah_single_2", 900, s, essays=(STORY,), from_start=False).prompt.split("\n")[1][:9]
              for s in range(30)}  # fmt: skip
    assert {"One fine ", "Then it r", "Nobody mi", "So they s"} <= starts
    long = make("niah_single_2", 3000)
    assert long.prompt.count("The end.") > 5


def test_words_of_a_folder_each_once(tmp_path):
    (tmp_path / "x_nounlist.txt").write_text("house\narm-rest\nhouse\n")
    (tmp_path / "adjectivelist.txt").write_text("blue\nad hoc \n\n")
    assert read_words(str(tmp_path)) == (["ad hoc", "blue"], ["arm-rest", "house"])
    (tmp_path / "adjectivelist.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"adjectivelist\.txt holds no words; write one a line"):
        read_words(str(tmp_path))
    (tmp_path / "x_nounlist.txt").unlink()
    (tmp_path / "adjectivelist.txt").write_text("blue\n")
    with pytest.raises(FileNotFoundError, match=r"data\.words=.* has no file that ends in nounlist\.txt"):
        read_words(str(tmp_path))


def test_missing_packages_name_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wonderwords", None)
    monkeypatch.setitem(__import__("sys").modules, "wonderwords.assets", None)
    with pytest.raises(ImportError, match=r"titans\[questions\].*data\.words"):
        read_words(None)
    monkeypatch.setitem(__import__("sys").modules, "nltk.tokenize.punkt", None)
    with pytest.raises(ImportError, match=r"titans\[questions\]"):
        make("niah_single_2")


def test_bad_values_name_the_mend():
    with pytest.raises(ValueError, match=r"niah_single_1: length=300 is not valid; use at least \d+"):
        make("niah_single_1", 300)
    for part in ("data", "evaluation"):
        with pytest.raises(ValueError, match=rf"{part}\.task='niah_singel_1' is not valid; use 'niah_single_1'"):
            parse_config(TASK, {part: {"task": ["niah_singel_1"]}})
        with pytest.raises(ValueError, match=rf"{part}\.task=\[\]"):
            parse_config(TASK, {part: {"task": []}})
    for key, value in (("text_loss", 2), ("lengths", [0]), ("validation_windows", 0)):
        with pytest.raises(ValueError, match=rf"data\.{key}"):
            parse_config(TASK, {"data": {key: value}})
    for key, value in (("lengths", []), ("samples", 0), ("max_new_tokens", 0), ("seed", -1)):
        with pytest.raises(ValueError, match=rf"evaluation\.{key}"):
            parse_config(TASK, {"evaluation": {key: value}})
    with pytest.raises(FileNotFoundError, match="does not exist"):
        essay = {"task": ["niah_single_2"], "words": None, "train": "missing.txt"}
        TASK.load(parse_config(TASK, {"data": essay}))


@pytest.fixture
def values(tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "nounlist.txt").write_text("house\ngarden\n")
    (tmp_path / "words" / "adjectivelist.txt").write_text("blue\nold\n")
    return {
        "output": str(tmp_path / "run"),
        "model": {"variant": "lmm", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                  "num_memory_heads": 1, "memory_expansion": 1, "chunk_size": 32},
        "data": {"words": str(tmp_path / "words"), "lengths": [520, 600], "curriculum": True, "validation_windows": 2},
        "training": {"length": 600, "batch_size": 2, "tokens": 4800, "eval_every": 2},
        "evaluation": {"lengths": [700, 800], "samples": 2, "max_new_tokens": 8},
    }  # fmt: skip


def test_train_measure_and_resume(values, tmp_path, monkeypatch):
    result = train(parse_config(TASK, values), TASK, progress=False)
    assert [(cell["task"], cell["length"]) for cell in result["metrics"]["cells"]] == [
        ("niah_single_1", 700), ("niah_single_1", 800)]  # fmt: skip
    assert (tmp_path / "run" / "depth.png").exists()
    step = RunTrainer.training_step

    def interrupt(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    cut = parse_config(TASK, values | {"output": str(tmp_path / "cut")})
    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "training_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(cut, TASK, progress=False)
    train(cut, TASK, resume=True, progress=False)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("run", "cut")]
    assert all((a == b).all() for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_a_length_that_nothing_fits_is_told_of_before_training(values, tmp_path):
    values["evaluation"]["lengths"] = [700, 300]
    with pytest.raises(ValueError, match=r"niah_single_1: length=300 is not valid; use at least \d+"):
        train(parse_config(TASK, values), TASK, progress=False)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_training_reads_the_items_in_their_order(values, tmp_path, monkeypatch):
    seen = []
    step = RunTrainer.training_step

    def watched(self, model, inputs, *args, **kwargs):
        seen.extend(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "training_step", watched)
    config = parse_config(TASK, values)
    train(config, TASK, evaluate=False, progress=False)
    items = TASK.load(config).train
    assert seen == [items[i]["input_ids"].tolist() for i in range(8)]


def test_eval_of_the_command_line(values, tmp_path, capsys):
    train(parse_config(TASK, values), TASK, evaluate=False, progress=False)
    out = tmp_path / "out.json"
    options = ["--task", "niah_single_1", "niah_multikey_2", "--lengths", "900", "1000", "--samples", "2"]
    command = ["eval", "needle", str(tmp_path / "run"), *options, "--max-new-tokens", "4", "--json", str(out)]
    assert main([*command, "--seed", "7"]) == 0
    assert "| niah_multikey_2 | 1,000 |" in capsys.readouterr().out
    written = json.loads(out.read_text())
    cells = written["cells"]
    assert [cell["length"] for cell in cells] == [900, 1000, 900, 1000]
    assert written["command"] == " ".join(["titans", *command, "--seed", "7"]) and written["provenance"]["date"]
    assert out.with_suffix(".png").exists()
    examples = [cell["examples"] for cell in cells]
    assert main([*command, "--seed", "7"]) == 0
    assert [cell["examples"] for cell in json.loads(out.read_text())["cells"]] == examples
    assert main([*command, "--seed", "8"]) == 0
    assert [cell["examples"] for cell in json.loads(out.read_text())["cells"]] != examples
    assert main([*command, "--data.words", "nowhere"]) == 2
    assert "data.words='nowhere'" in capsys.readouterr().err
    assert main(["eval", "needle", str(tmp_path / "run"), "--lengths", "200", "--samples", "1"]) == 2
    assert "length=200 is not valid; use at least" in capsys.readouterr().err


def test_a_run_of_another_task_can_be_asked(values, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words, and some more words\n" * 200)
    language = get_task("language")
    config = {k: values[k] for k in ("output", "model")} | {
        "data": {"train": str(text)}, "training": {"length": 32, "batch_size": 2, "tokens": 64}}  # fmt: skip
    train(parse_config(language, config), language, evaluate=False, progress=False)
    options = ["--lengths", "700", "--samples", "1", "--max-new-tokens", "2", "--data.words", values["data"]["words"]]
    assert main(["eval", "needle", str(tmp_path / "run"), *options]) == 0


def test_summary_and_report():
    cell = {"accuracy": 50.0, "samples": 4, "tokens_per_second": 1e3, "peak_bytes": None, "depths": [],
            "examples": [{"answers": ["1"], "output": "2"}]}  # fmt: skip
    metrics = {"cells": [cell | {"task": "a", "length": 2048}, cell | {"task": "b", "length": 2048, "accuracy": 100.0}]}
    assert TASK.summary(metrics) == {"accuracy (%)": 75.0, "a @ 2,048": 50.0, "b @ 2,048": 100.0}
    assert next(iter(TASK.summary(metrics))) == "accuracy (%)"
    assert "| b | 2,048 | 100.0 | 4 | 1,000 |  |" in TASK.report(metrics)


def test_books_and_word_lists_as_shipped():
    folder = os.environ.get("TITANS_DATA")
    if not folder:
        pytest.skip("TITANS_DATA names no folder of data")
    pytest.importorskip("nltk")
    adjectives, nouns = read_words(str(Path(folder) / "needle"))
    assert (len(adjectives), len(nouns)) == (910, 6782)
    data = TASK.data_class(test="${TITANS_DATA}/gutenberg_books/validation.jsonl.xz", words="${TITANS_DATA}/needle")
    from titans.training.tokens import load_tokenizer

    tokenizer = load_tokenizer(str(Path(folder) / "gpt2_tokenizer"))
    for name, maker in TASK.makers(data, "test", list(RULER), tokenizer).items():
        question = maker(np.random.default_rng(0), 2048, 128)
        assert maker.size(question.prompt) <= 1920, name
        assert maker.size(question.prompt) > 1850 or RULER[name].haystack == "needle"
        assert question.found(question.target) == [True] * len(question.answers)


def test_all_models_compare_and_the_best_stands_first(values, tmp_path):
    titans = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
              "num_memory_heads": 1, "memory_expansion": 1, "chunk_size": 16, "segment_length": 32}  # fmt: skip
    plain = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    gdn = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
           "linear_key_head_dim": 16, "linear_value_head_dim": 16}  # fmt: skip
    specs = {name: {"type": "titans", "variant": name, **titans} for name in ("lmm", "mac", "mag", "mal")}
    specs |= {"llama": {"type": "llama", **plain}, "sliding": {"type": "sliding_llama", "sliding_window": 16, **plain}}
    specs |= {"mamba2": {"type": "mamba2", "hidden_size": 16, "num_hidden_layers": 1, "head_dim": 16, "state_size": 8}}
    specs |= {"gated_delta_net": {"type": "gated_delta_net", **gdn}}
    experiment = Experiment.from_dict(
        {
            "task": "needle",
            "output": str(tmp_path / "out"),
            "models": {name: {"model": spec} for name, spec in specs.items()},
            "data": values["data"] | {"lengths": [600]},
            "training": values["training"] | {"tokens": 1200},
            "evaluation": {"lengths": [600], "samples": 1, "max_new_tokens": 1},
            "parameter_tolerance": 10,
        }
    )
    results = compare(experiment, TASK, say=lambda text: None)
    assert all(len(entry["runs"]) == 1 for entry in results["models"].values())
    assert (tmp_path / "out" / "depth.png").exists()
    for name, accuracy in (("mag", 100.0), ("llama", 50.0)):
        results["models"][name]["runs"][0]["metrics"]["cells"][0]["accuracy"] = accuracy
    rows = [row.split("|")[1].strip() for row in table(results, TASK).splitlines()]
    assert rows[2:4] == ["mag", "llama"]


def test_the_shipped_checkpoint_finds_the_number(tmp_path):
    """Trained on half a kilobyte, read to eight: what the README shows."""
    checkpoint, out = Path(__file__).parents[2] / "checkpoints" / "needle", tmp_path / "out.json"
    main(["eval", "needle", str(checkpoint), "--task", "niah_single_1", "--lengths", "2048", "8192", "--samples", "4",
          "--json", str(out)])  # fmt: skip
    assert [cell["accuracy"] for cell in json.loads(out.read_text())["cells"]] == [100, 100]
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 8e6
