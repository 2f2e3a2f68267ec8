"""Several models under one budget: equal data, equal tokens, equal tuning, over seeds; resumable at any point."""

import copy
import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from titans.training.config import TrainConfig, config_parser, load_yaml, nearest, parse_config, require
from titans.training.files import write_atomically
from titans.training.provenance import provenance
from titans.training.run import train
from titans.training.tables import over_variants, plot_variants, short, table, table_of_variants
from titans.training.task import Task

_BUDGET = {"tokens", "length", "batch_size", "gradient_accumulation"}


@dataclass
class Experiment:
    """What is compared.

    Attributes:
        task: name of the task.
        output: folder of the results.
        models: name -> `{"model": spec, "training": settings, "seeds": [..], "panel": title}`, all but the first
            optional: a model whose own settings hold a `learning_rate` tries none; models of one panel share axes in
            the picture of `vary`.
        data, evaluation, training: as in a run's configuration, the same for every model that says nothing else. What
            none says has the option's own default: the task's preset may change, an experiment does not with it.
        seeds: of every model that names none of its own.
        tuning: `{"learning_rate": [..], "tokens": N}`: each model tries each rate with its first seed on a short run of
            its own, and keeps the one with the lowest validation loss. N up to 1 is a fraction of `training.tokens`; at
            1 the try that is kept is the first seed's run. None: `training.learning_rate` for all.
        parameter_tolerance: models whose parameter counts differ by more than this fraction are refused. None: none is.
        vary: one setting of `data`, `evaluation` or `training` and its values, as in `{"data.horizon": [96, 192]}`: the
            whole comparison, tuning included, is made for each value, the mean over them reported and the course over
            them drawn. Further settings, with as many values each, change along with the first.
        after: file of an earlier experiment whose models go on here, each from the weights of its run of the same seed;
            `models` is left out then.
    """

    task: str
    output: str
    models: dict[str, dict[str, Any]]
    data: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    tuning: dict[str, Any] | None = None
    parameter_tolerance: float | None = 0.03
    vary: dict[str, list[Any]] | None = None
    after: str | None = None

    def __post_init__(self):
        require(bool(self.models), "models", self.models, "a mapping from a model's name to its settings")
        for name, entry in self.models.items():
            extra = set(entry) - {"model", "training", "seeds", "panel"}
            keys = "the keys 'model' and, if wanted, 'training', 'seeds' and 'panel'"
            require(not extra and "model" in entry, f"models.{name}", entry, keys)
            require(bool(self.seeds_of(name)), f"seeds of {name}", self.seeds_of(name), "at least one")
            own = self.own(name)
            require(isinstance(own, dict), f"models.{name}.training", own, "a mapping of settings")
            budget = sorted(_BUDGET & set(own))
            require(not budget, f"models.{name}.training", budget, "no part of the budget, which is one for all models")
        if self.tuning is not None:
            valid = set(self.tuning) == {"learning_rate", "tokens"}
            require(valid, "tuning", self.tuning, "the keys 'learning_rate' (a list) and 'tokens'")
        if self.vary is not None:
            known = all(key.partition(".")[0] in ("data", "evaluation", "training") for key in self.vary)
            lists = bool(self.vary) and all(isinstance(values, list) and values for values in self.vary.values())
            even = lists and len({len(values) for values in self.vary.values()}) == 1
            mend = "settings and lists, all of one length, as in {data.horizon: [96, 192]}"
            require(known and even, "vary", self.vary, mend)
            first = next(iter(self.vary.values()))
            once = len({short(value) for value in first}) == len(first)
            require(once, "vary", self.vary, "each value of the first setting once")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Experiment":
        """Raises ValueError for an unknown or missing key."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        require(not unknown, "experiment", sorted(unknown), f"the keys {', '.join(cls.__dataclass_fields__)}")
        if values.get("after") is not None:
            require("models" not in values, "models", "given", "either `models` or `after`, whose models go on")
            earlier = _experiment(values["after"])
            require(earlier.vary is None, "after", values["after"], "an experiment that varies nothing")
            values = values | {"models": {name: {"model": earlier.models[name]["model"]} for name in earlier.models}}
        missing = {"task", "output", "models"} - set(values)
        require(not missing, "experiment", sorted(values), f"these keys as well: {', '.join(sorted(missing))}")
        return cls(**values)

    @property
    def varied(self) -> str:
        """The name that the values of `vary` go by: that of its first setting."""
        return next(iter(self.vary or {})).partition(".")[2]

    def variants(self) -> "dict[str, Experiment]":
        """The experiment for each value of `vary`, in a folder of its own, by a label such as `horizon=96`.

        Where nothing varies, itself.
        """
        if self.vary is None:
            return {"": self}
        variants = {}
        for values in zip(*self.vary.values(), strict=True):
            parts = {part: dict(getattr(self, part)) for part in ("data", "evaluation", "training")}
            for setting, value in zip(self.vary, values, strict=True):
                part, _, key = setting.partition(".")
                parts[part][key] = value
            output = str(Path(self.output) / f"{self.varied}-{short(values[0])}")
            variants[f"{self.varied}={short(values[0])}"] = replace(self, vary=None, output=output, **parts)
        return variants

    def seeds_of(self, name: str) -> list[int]:
        return self.models[name].get("seeds", self.seeds)

    def own(self, name: str) -> dict[str, Any]:
        """A model's own settings of training."""
        return self.models[name].get("training", {})

    def config(self, task: Task, name: str, kind: str, **training: Any) -> TrainConfig:
        """The checked configuration of one run; its folder's name holds a hash of all that the experiment says."""
        values = {
            "model": self.models[name]["model"],
            "data": self.data,
            "evaluation": self.evaluation,
            "training": self.training | self.own(name) | training | self._start(task, name, training.get("seed")),
        }
        defining = json.dumps({"task": self.task, **values}, sort_keys=True)
        config = copy.deepcopy(_parsed(task, defining))
        digest = hashlib.sha256(defining.encode()).hexdigest()[:10]
        config.output = str(Path(self.output) / "runs" / f"{name}-{kind}-{digest}")
        return config

    def _start(self, task: Task, name: str, seed: int | None) -> dict[str, Any]:
        """The setting of training that says where a run's weights come from."""
        if self.after is None or seed is None:
            return {}
        return {"start_from": _experiment(self.after).final(task, name, seed).output}

    def trials(self, task: Task, name: str) -> dict[float, TrainConfig]:
        """The runs that try each learning rate."""
        if self.tuning is None or "learning_rate" in self.own(name):
            return {}
        tokens, rates, seed = self.tuning["tokens"], self.tuning["learning_rate"], self.seeds_of(name)[0]
        if self.tries_whole_runs:
            return {rate: self.config(task, name, f"seed{seed}", seed=seed, learning_rate=rate) for rate in rates}
        if tokens < 1:
            tokens *= self.config(task, name, "whole").training.tokens
        # One validation, at the end: a trial is short.
        short = {"tokens": tokens, "seed": seed, "eval_every": 1}
        return {rate: self.config(task, name, f"tune{rate:g}", learning_rate=rate, **short) for rate in rates}

    @property
    def tries_whole_runs(self) -> bool:
        """Whether a trial is a run of the first seed, test and all."""
        return self.tuning is not None and self.tuning["tokens"] == 1

    def chosen(self, task: Task, name: str) -> dict[str, float]:
        """The learning rate that the model names, or that of the best trial, once all are done."""
        if "learning_rate" in self.own(name):
            return {"learning_rate": self.own(name)["learning_rate"]}
        results = {rate: _result(config) for rate, config in self.trials(task, name).items()}
        losses = {rate: r["validation_loss"] for rate, r in results.items() if r and r["validation_loss"] is not None}
        if results and None not in results.values() and not losses:
            raise FloatingPointError(f"models.{name}: every learning rate of {self.tuning} diverged; add lower ones")
        return {"learning_rate": min(losses, key=losses.__getitem__)} if losses else {}

    def final(self, task: Task, name: str, seed: int) -> TrainConfig:
        """The full run of one seed, at the chosen learning rate."""
        return self.config(task, name, f"seed{seed}", seed=seed, **self.chosen(task, name))


def compare(
    experiment: Experiment, task: Task, only: Sequence[str] | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Runs what is not yet done, one run after the other; rewrites the results after each.

    In `experiment.output`: `results.json`, `table.md`, a picture, and the runs' folders below `runs/`. Where a setting
    is varied, each value has such a folder below it; the three files then come last, when all values are done, and the
    picture bears the setting's name.

    Args:
        only: train these models alone (another process may train the others); the results hold all that is done.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: parameter counts that differ too much, or a bad key.
    """
    for name in only or ():
        if name not in experiment.models:
            raise ValueError(f"models={name!r} is not in the experiment; use {nearest(name, experiment.models)}")
    if experiment.vary is not None:
        return _compare_variants(experiment, task, only, say)
    parameters = _equal_parameters(experiment, task)
    rounds = max(len(experiment.seeds_of(name)) for name in experiment.models)
    results = None
    for index in range(rounds):
        for name in only or experiment.models:
            if index >= len(experiment.seeds_of(name)):
                continue
            if experiment.after is not None:
                _check_start(experiment.final(task, name, experiment.seeds_of(name)[index]), experiment.after, name)
            ran = [
                _run(config, task, say, evaluate=experiment.tries_whole_runs, trial=True)
                for config in experiment.trials(task, name).values()
            ]
            ran += [_run(experiment.final(task, name, experiment.seeds_of(name)[index]), task, say, evaluate=True)]
            if any(ran):
                results = _report(experiment, task, parameters, say)
    return results or _report(experiment, task, parameters, say)


def _compare_variants(
    experiment: Experiment, task: Task, only: Sequence[str] | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """The comparison for each value, and for each model and column the mean over the values."""
    variants = {}
    for label, variant in experiment.variants().items():
        say(f"## {label}")
        variants[label] = compare(variant, task, only, say)
    means = {name: over_variants(name, variants, task) for name in experiment.models}
    results = {**_head(experiment), "means": {name: m for name, m in means.items() if m}, "variants": variants}
    text = table_of_variants(results, task)
    _write(experiment, results, text)
    plot_variants(results, task, Path(experiment.output) / f"{experiment.varied}.png")
    say(f"## {', '.join(variants)}\n{text}")
    return results


def _report(
    experiment: Experiment, task: Task, parameters: dict[str, int], say: Callable[[str], None]
) -> dict[str, Any]:
    """Writes, draws and says what is done so far."""
    results = _collect(experiment, task, parameters)
    text = table(results, task)
    _write(experiment, results, text)
    first = {name: entry["runs"][0]["metrics"] for name, entry in results["models"].items() if entry["runs"]}
    task.plot(first, Path(experiment.output) / task.picture)
    say(text)
    return results


def _collect(experiment: Experiment, task: Task, parameters: dict[str, int]) -> dict[str, Any]:
    """All that is done, from the runs' folders."""
    models = {}
    for name in experiment.models:
        trials = [(rate, _result(config)) for rate, config in experiment.trials(task, name).items()]
        entry: dict[str, Any] = {"parameters": parameters[name], "tuning": [], "chosen": {}, "runs": []}
        models[name] = entry
        entry["tuning"] = [
            {"learning_rate": r, "validation_loss": done["validation_loss"]} for r, done in trials if done
        ]
        if len(entry["tuning"]) < len(trials):
            continue
        entry["chosen"] = experiment.chosen(task, name)
        for seed in experiment.seeds_of(name):
            config = experiment.final(task, name, seed)
            if (result := _result(config)) is not None:
                entry["runs"].append({"seed": seed, "folder": config.output, **result})
    return {**_head(experiment), "models": models}


def _head(experiment: Experiment) -> dict[str, Any]:
    return {
        "provenance": provenance(),
        "command": " ".join(["titans", *_whole_command(sys.argv[1:])]),
        "experiment": experiment.__dict__,
    }


def _whole_command(words: Sequence[str]) -> Iterator[str]:
    """`titans compare` without `--models`: it shares the work among processes, and the results hold what all did."""
    if words[:1] != ["compare"]:
        yield from words
        return
    rest = iter(words)
    for word in rest:
        if word == "--models":
            next(rest, None)
        elif not word.startswith("--models="):
            yield word


def _equal_parameters(experiment: Experiment, task: Task) -> dict[str, int]:
    counts, data = {}, None
    for name in experiment.models:
        config = experiment.config(task, name, "count")
        data = data or task.load(config)
        counts[name] = task.build_model(config, data).num_parameters()
    smallest, largest = min(counts.values()), max(counts.values())
    if experiment.parameter_tolerance is not None and largest > smallest * (1 + experiment.parameter_tolerance):
        listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise ValueError(
            f"parameter_tolerance={experiment.parameter_tolerance}: the models differ by "
            f"{largest / smallest - 1:.1%} ({listed}); change their sizes or the tolerance"
        )
    return counts


@functools.cache
def _experiment(path: str) -> Experiment:
    return Experiment.from_dict(load_yaml(path))


@functools.cache
def _parsed(task: Task, defining: str) -> TrainConfig:
    """A run's configuration, checked; a comparison asks for each many times."""
    values = json.loads(defining)
    parser = config_parser(task, preset={})
    return parse_config(task, {part: values[part] for part in values if part != "task"}, parser=parser)


def _result(config: TrainConfig) -> dict[str, Any] | None:
    """What a run has left; None if it is not done."""
    assert config.output is not None
    done = Path(config.output) / "result.json"
    return json.loads(done.read_text(encoding="utf-8")) if done.exists() else None


def _run(config: TrainConfig, task: Task, say: Callable[[str], None], evaluate: bool, trial: bool = False) -> bool:
    """False, doing nothing, if the run is done; resumes it if it was interrupted, else trains. A trial may diverge."""
    if _result(config) is not None:
        return False
    assert config.output is not None
    folder = Path(config.output)
    started = (folder / "config.yaml").exists()
    say(f"{folder.name}: {'resuming' if started else 'training'}")
    try:
        train(config, task, resume=started, evaluate=evaluate)
    except FloatingPointError as error:
        if not trial:
            raise
        diverged = {"validation_loss": None, "diverged": str(error)}  # another rate is kept
        write_atomically(folder / "result.json", json.dumps(diverged, indent=1))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a finished run needs them no more
    return True


def _check_start(config: TrainConfig, after: str, name: str) -> None:
    """Raises FileNotFoundError if a run that is not done lacks the weights of the experiment `after`."""
    folder = config.training.start_from
    assert folder is not None
    if _result(config) is None and not (Path(folder) / "model.safetensors").exists():
        raise FileNotFoundError(
            f"after={after!r}: {folder} holds no weights; delete that folder, if it is there, and train seed "
            f"{config.training.seed} of {name}: titans compare {after} --models [{name}]"
        )


def _write(experiment: Experiment, results: dict[str, Any], text: str) -> None:
    folder = Path(experiment.output)
    write_atomically(folder / "results.json", json.dumps(results, indent=1))
    write_atomically(folder / "table.md", text + "\n")
