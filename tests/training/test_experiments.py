"""The experiments that come with the library: valid, and fair in size."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from titans.models import TitansConfig, titans_340m, titans_400m, titans_760m
from titans.tasks import get_task
from titans.training.compare import Experiment
from titans.training.config import load_yaml, parse_config
from titans.training.task import TaskData
from titans.training.tokens import byte_tokenizer, nucleotide_tokenizer

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted((ROOT / "benchmarks").glob("*.yaml"))
PAPER = {"340m": titans_340m, "400m": titans_400m, "760m": titans_760m}
RECIPES = sorted(path for path in (ROOT / "checkpoints").glob("*/*.yaml") if path.stem != "config")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_are_valid_and_their_models_of_one_size(path):
    experiment = Experiment.from_dict(load_yaml(path))
    task = get_task(experiment.task)
    known = SimpleNamespace(channels=7, classes=["0", "1"])  # all that a forecaster or classifier must know
    tokenizer = nucleotide_tokenizer() if task.name == "dna" else byte_tokenizer()
    data = TaskData(train=known, validation=None, tokenizer=tokenizer)
    for variant in experiment.variants().values():
        configs = [variant.config(task, name, "count") for name in variant.models]
        counts = [task.build_model(config, data).num_parameters() for config in configs]
        if experiment.parameter_tolerance is not None:
            assert max(counts) <= min(counts) * (1 + experiment.parameter_tolerance)


def test_the_depths_see_equal_tokens_and_are_measured_at_their_length():
    """One step is as many tokens at every length."""
    experiment, task = Experiment.from_dict(load_yaml(ROOT / "benchmarks" / "depth.yaml")), get_task("language")
    configs = [
        variant.config(task, name, "run") for variant in experiment.variants().values() for name in variant.models
    ]
    assert len({(config.training.tokens_per_step, config.training.steps) for config in configs}) == 1
    assert all(config.evaluation.lengths == [config.training.length] for config in configs)
    panels = {}
    for name, entry in experiment.models.items():
        panels.setdefault(entry["panel"], []).append(entry["model"] | {"name": name})
    assert len(panels) == 2
    for models in panels.values():
        assert [model.pop("memory_depth") for model in models] == [1, 2, 3, 4]
        assert [model.pop("name")[-1] for model in models] == ["1", "2", "3", "4"]
        assert [model.pop("memory_max_lr") for model in models] == [0.03, 0.03, 0.008, 0.005]  # what each holds
        assert all(model == models[0] for model in models)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipes_of_checkpoints_are_valid(path):
    values = load_yaml(path)
    config = parse_config(get_task(values.pop("task")), values)
    stated = load_yaml(path.parent / "config.yaml")
    assert config.model | {"memory_write_price": None} == stated["model"] | {"memory_write_price": None}


@pytest.mark.parametrize("size", PAPER)
def test_recipes_of_the_papers_sizes(size):
    """Presets, half a million tokens a step, a batch that eight GPUs divide."""
    path = ROOT / "examples" / "paper" / f"{size}.yaml"
    config = parse_config(get_task("language"), arguments=["--config", str(path)])
    assert TitansConfig(**config.model, vocab_size=32_000).to_dict() == PAPER[size]("mac").to_dict()
    assert config.training.tokens_per_step == 2**19
    assert config.training.batch_size % 8 == 0
