"""Comparisons: equal sizes, tuning, resuming."""

import copy
import json
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from titans.tasks import get_task
from titans.training import compare as module
from titans.training.compare import Experiment, compare
from titans.training.config import load_yaml

TASK = get_task("language")
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def values(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(600)))
    return {
        "task": "language",
        "output": str(tmp_path / "out"),
        "data": {"train": str(text)},
        "evaluation": {"lengths": [32], "sample": 0, "max_bytes": 500},
        "training": {"length": 32, "batch_size": 4, "tokens": 1024, "eval_every": 4},
        "tuning": {"learning_rate": [1e-3, 1e-2], "tokens": 512},
        "models": {
            "llama": {"model": {"type": "llama", **SMALL}},
            "sliding": {"model": {"type": "sliding_llama", **SMALL}, "seeds": [0, 1]},
        },
    }


def test_tunes_trains_tabulates_and_resumes(values, tmp_path, monkeypatch):
    trained = []

    def counted(config, *args, **kwargs):
        trained.append((config.output.rpartition("/")[2].rpartition("-")[0], config.training.seed))
        if len(trained) == 5:
            raise KeyboardInterrupt
        return original(config, *args, progress=False, **kwargs)

    original = module.train
    monkeypatch.setattr(module, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        compare(Experiment.from_dict(copy.deepcopy(values)), TASK, say=lambda text: None)
    results = compare(Experiment.from_dict(copy.deepcopy(values)), TASK, say=lambda text: None)

    kinds = [name for name, _ in trained]
    assert kinds[:3] == ["llama-tune0.001", "llama-tune0.01", "llama-seed0"]
    assert kinds[3:] == ["sliding-tune0.001", "sliding-tune0.01", "sliding-tune0.01", "sliding-seed0", "sliding-seed1"]
    for entry in results["models"].values():
        best = min(entry["tuning"], key=lambda trial: trial["validation_loss"])
        assert entry["chosen"] == {"learning_rate": best["learning_rate"]}
    assert [run["seed"] for run in results["models"]["sliding"]["runs"]] == [0, 1]
    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert "bits per byte @ 32" in (out / "table.md").read_text()
    assert "±" in (out / "table.md").read_text()
    assert (out / "position.png").exists()


def test_a_trial_may_be_a_fraction_of_the_run(values):
    """Of what each value of `vary` sees."""
    values |= {"tuning": {"learning_rate": [1e-3], "tokens": 0.25}, "vary": {"training.tokens": [1024, 2048]}}
    trials = [v.trials(TASK, "llama")[1e-3].training.tokens for v in Experiment.from_dict(values).variants().values()]
    assert trials == [256, 512]


def test_the_try_of_a_whole_run_that_is_kept_is_the_first_seeds_run(values, monkeypatch):
    """And one that diverges is passed over, whatever it would have measured."""
    trained = []

    def counted(config, *args, **kwargs):
        trained.append((config.training.learning_rate, config.training.seed))
        if config.training.learning_rate == 1e-2:
            raise FloatingPointError("diverged")
        return original(config, *args, progress=False, **kwargs)

    original = module.train
    monkeypatch.setattr(module, "train", counted)
    values["models"] = {"sliding": values["models"]["sliding"]}
    values["tuning"] = {"learning_rate": [1e-2, 1e-3, 1e-4], "tokens": 1}
    entry = compare(Experiment.from_dict(values), TASK, say=lambda text: None)["models"]["sliding"]
    rate = entry["chosen"]["learning_rate"]
    assert trained == [(1e-2, 0), (1e-3, 0), (1e-4, 0), (rate, 1)]
    assert [trial["validation_loss"] is None for trial in entry["tuning"]] == [True, False, False]
    best = min(trial["validation_loss"] for trial in entry["tuning"][1:])
    assert [run["seed"] for run in entry["runs"]] == [0, 1]
    assert entry["runs"][0]["validation_loss"] == best
    assert all("metrics" in run for run in entry["runs"])


def test_a_model_with_a_learning_rate_of_its_own_tries_none(values):
    """Its run is the one that the rate would have had as the best of several."""
    tuned = Experiment.from_dict(copy.deepcopy(values)).config(TASK, "llama", "seed0", seed=0, learning_rate=1e-2)
    values["models"]["llama"]["training"] = {"learning_rate": 1e-2}
    experiment = Experiment.from_dict(values)
    assert experiment.trials(TASK, "llama") == {} and len(experiment.trials(TASK, "sliding")) == 2
    assert experiment.final(TASK, "llama", 0).output == tuned.output
    entry = compare(experiment, TASK, only=["llama"], say=lambda text: None)["models"]["llama"]
    assert entry["chosen"] == {"learning_rate": 1e-2} and entry["tuning"] == []
    assert len(entry["runs"]) == 1


def test_unequal_sizes_are_refused_with_the_counts(values):
    values["models"]["llama"]["model"]["hidden_size"] = 32
    with pytest.raises(ValueError, match=r"llama [\d,]+, sliding [\d,]+"):
        compare(Experiment.from_dict(values), TASK)


def test_models_shared_by_two_processes(values, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/titans", "compare", "file.yaml", "--models", "[llama]", "--output=x"])
    values["tuning"] = None
    values["models"]["sliding"].pop("seeds")
    experiment = Experiment.from_dict(values)
    first = compare(experiment, TASK, only=["sliding"], say=lambda text: None)
    assert [len(entry["runs"]) for entry in first["models"].values()] == [0, 1]
    second = compare(experiment, TASK, only=["llama"], say=lambda text: None)
    assert [len(entry["runs"]) for entry in second["models"].values()] == [1, 1]
    assert second["command"] == "titans compare file.yaml --output=x"  # which gives all of it
    with pytest.raises(ValueError, match="'llama'"):
        compare(experiment, TASK, only=["lama"])


def test_the_command_of_other_commands_keeps_its_models():
    words = ["eval", "forecasting", "--models", "titans", "dlinear", "--seeds", "3"]
    assert list(module._whole_command(words)) == words


def test_a_varied_setting(values, tmp_path, monkeypatch):
    """Each value is a comparison of its own; the mean is over the values, for the seeds that all of them have."""
    train, trained = module.train, []

    def spy(config, *args, **kwargs):
        trained.append((Path(config.output).parent.parent.name, config.training.length, config.training.seed))
        return train(config, *args, progress=False, **kwargs)

    monkeypatch.setattr(module, "train", spy)
    del values["models"]["llama"]
    values["training"]["tokens"] = 256
    values |= {"tuning": None, "vary": {"training.length": [16, 32]}}
    results = compare(Experiment.from_dict(values), TASK, say=lambda text: None)
    assert trained == [(f"length-{n}", n, seed) for n in (16, 32) for seed in (0, 1)]
    bits = [
        [TASK.summary(run["metrics"])["bits per byte @ 32"] for run in variant["models"]["sliding"]["runs"]]
        for variant in results["variants"].values()
    ]
    means = results["means"]["sliding"]
    assert means["bits per byte @ 32, mean"] == [pytest.approx((a + b) / 2) for a, b in zip(*bits, strict=True)]
    assert [means[f"bits per byte @ 32, length={n}"] for n in (16, 32)] == bits
    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    head = "| model | parameters | tokens/s, length=16 | tokens/s, length=32 | bits per byte @ 32, mean |"
    assert (out / "table.md").read_text().startswith(head)
    assert (out / "length.png").exists()
    assert (out / "length-16" / "results.json").exists()
    compare(Experiment.from_dict(values), TASK, say=lambda text: None)
    assert len(trained) == 4


def test_depths_at_lengths_of_their_own(values, tmp_path, monkeypatch):
    """Settings that change together; the headline and the speed are drawn over the first, a line a model."""
    models = {f"depth_{depth}": {"variant": "lmm", "memory_depth": depth, **SMALL} for depth in (1, 2)}
    models = {name: {"model": model, "panel": "titans"} for name, model in models.items()}
    models["llama"] = values["models"]["llama"] | {"panel": "without"}
    vary = {"training.length": [16, 32], "training.batch_size": [8, 4], "evaluation.lengths": [[16], [32]]}
    values["training"]["tokens"] = 256
    values |= {"tuning": None, "parameter_tolerance": None, "models": models, "vary": vary}
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: figures.append(self) or save(self, *args, **kw))
    results = compare(Experiment.from_dict(values), TASK, say=lambda text: None)

    variants = [variant["models"] for variant in results["variants"].values()]
    assert list(results["variants"]) == ["length=16", "length=32"]
    scores, others, speeds, _ = figures[-1].axes
    assert (scores.get_title(), others.get_title(), scores.get_ylabel()) == ("titans", "without", "bits per byte")
    assert [line.get_label() for line in scores.lines] == ["depth_1", "depth_2"]
    for name, score, speed in zip(("depth_1", "depth_2"), scores.lines, speeds.lines, strict=True):
        runs = [models[name]["runs"][0] for models in variants]
        assert [run["tokens"] for run in runs] == [256, 256]
        assert list(score.get_xdata()) == [16, 32]
        windows = [run["metrics"]["windows"] for run in runs]
        assert list(score.get_ydata()) == [windows[0]["16"]["bits_per_byte"], windows[1]["32"]["bits_per_byte"]]
        assert list(speed.get_ydata()) == [run["tokens_per_second"] for run in runs]
    text = (tmp_path / "out" / "table.md").read_text()
    assert f"| depth_1 | {variants[0]['depth_1']['parameters']:,} |" in text
    assert "bits per byte @ 16, length=16 |" in text


def test_what_is_not_done_for_all_values_has_no_line(values, tmp_path):
    """Words may be varied, too."""
    values["training"]["tokens"] = 128
    values |= {"tuning": None, "vary": {"data.text_field": ["text", "body"]}}
    results = compare(Experiment.from_dict(values), TASK, only=["llama"], say=lambda text: None)
    assert list(results["means"]) == ["llama"]
    assert (tmp_path / "out" / "text_field.png").exists()


def test_a_varied_setting_is_like_that_setting(values):
    """The runs have the same names, so that nothing is trained twice."""
    variant = Experiment.from_dict(values | {"vary": {"training.tokens": [2048]}}).variants()["tokens=2048"]
    values["training"]["tokens"] = 2048
    plain = Experiment.from_dict(values)
    configs = [experiment.config(TASK, "llama", "seed0", seed=0) for experiment in (plain, variant)]
    assert Path(configs[0].output).name == Path(configs[1].output).name
    assert configs[0].training == configs[1].training


def test_varied_paths_go_by_their_last_part(values):
    experiment = Experiment.from_dict(values | {"vary": {"data.train": ["$DATA/a.txt", "$DATA/b.txt"]}})
    assert list(experiment.variants()) == ["train=a.txt", "train=b.txt"]
    assert Path(experiment.variants()["train=b.txt"].output) == Path(experiment.output) / "train-b.txt"
    with pytest.raises(ValueError, match="each value of the first setting once"):
        Experiment.from_dict(values | {"vary": {"data.train": ["x/a.txt", "y/a.txt"]}})


def test_models_go_on_after_another_experiment(values, tmp_path):
    """From their own weights of the same seed and the better rate; next to no learning leaves them as they were."""
    del values["models"]["sliding"]
    values["tuning"]["tokens"] = 1  # each rate is a whole run
    first = tmp_path / "first.yaml"
    first.write_text(json.dumps(values))
    after = {key: value for key, value in values.items() if key not in ("models", "tuning")}
    after |= {"after": str(first), "output": str(tmp_path / "second")}
    after["training"] = values["training"] | {"tokens": 1, "learning_rate": 1e-12}
    with pytest.raises(FileNotFoundError, match=r"holds no weights; .* seed 0 of llama: titans compare .*first\.yaml "):
        compare(Experiment.from_dict(after), TASK, say=lambda text: None)

    (start,) = compare(Experiment.from_dict(values), TASK, say=lambda text: None)["models"]["llama"]["runs"]
    later = compare(Experiment.from_dict(after), TASK, say=lambda text: None)
    (run,) = later["models"]["llama"]["runs"]
    assert run["validation_loss"] == pytest.approx(start["validation_loss"], rel=1e-6)
    assert load_yaml(Path(run["folder"]) / "config.yaml")["training"]["start_from"] == start["folder"]

    (Path(start["folder"]) / "model.safetensors").unlink()  # what is done needs them no more
    assert compare(Experiment.from_dict(after), TASK, say=lambda text: None)["models"] == later["models"]
    with pytest.raises(ValueError, match="models='given' is not valid; use either"):
        Experiment.from_dict(after | {"models": values["models"]})
    varied = tmp_path / "varied.yaml"
    varied.write_text(json.dumps(values | {"vary": {"training.length": [16, 32]}}))
    with pytest.raises(ValueError, match=r"after=.*varied\.yaml' is not valid; use an experiment that varies nothing"):
        Experiment.from_dict(after | {"after": str(varied)})


def test_any_sizes_may_be_allowed(values):
    values["models"]["llama"]["model"]["hidden_size"] = 32
    values["parameter_tolerance"] = None
    module._equal_parameters(Experiment.from_dict(values), TASK)


def test_every_rate_diverging_is_an_error_and_one_is_not(values, monkeypatch):
    def diverging(config, task, **kwargs):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(module, "train", diverging)
    with pytest.raises(FloatingPointError, match="every learning rate"):
        compare(Experiment.from_dict(values), TASK, say=lambda text: None)


def test_bad_keys(values):
    for change, message in (
        ({"modles": {}}, "modles"),
        ({"models": {}}, "models"),
        ({"models": {"a": {"seeds": [0]}}}, r"models\.a"),
        ({"models": {"a": {"model": {}, "training": 4e-3}}}, r"models\.a\.training=0\.004 .*a mapping of settings"),
        (
            {"models": {"a": {"model": {}, "training": {"tokens": 9}}}},
            r"models\.a\.training=\['tokens'\] .*one for all",
        ),
        ({"models": {"a": {"model": {}, "seeds": []}}}, r"seeds of a=\[\] is not valid; use at least one"),
        ({"tuning": {"learning_rate": [1e-3]}}, "tuning"),
        ({"models": {"a": {"model": {}, "pannel": "x"}}}, r"models\.a=.*'seeds' and 'panel'"),
        ({"vary": {}}, "use settings and lists"),
        (
            {"vary": {"training.length": []}},
            r"vary=.* all of one length, as in \{data\.horizon",
        ),
        ({"vary": {"training.length": [16, 32], "training.batch_size": [1]}}, "all of one length"),
        ({"vary": {"training.length": [16, 16], "training.seed": [0, 1]}}, "each value of the first setting once"),
        ({"vary": {"length": [16]}}, "use settings and lists"),
    ):
        with pytest.raises(ValueError, match=message):
            Experiment.from_dict(values | change)
    with pytest.raises(ValueError, match="task"):
        Experiment.from_dict({"output": "x", "models": values["models"]})


def test_a_run_is_known_by_what_the_experiment_says(values):
    """A finished run stays finished when the library gains an option; another budget is another run."""
    values["data"] = {"train": "text.txt"}
    folder = Experiment.from_dict(values).config(TASK, "llama", "seed0", seed=0).output
    assert folder == f"{values['output']}/runs/llama-seed0-ed76c0d6aa"
    assert Experiment.from_dict(values).config(TASK, "llama", "seed0", seed=0, tokens=2048).output != folder


def test_what_is_unsaid_is_no_matter_of_the_preset(values):
    experiment = Experiment.from_dict(values)
    assert TASK.preset()["data"]["validation_bytes"] != TASK.data_class().validation_bytes
    assert experiment.config(TASK, "llama", "seed0").data.validation_bytes == TASK.data_class().validation_bytes
