"""Several models under one budget: equal data, equal tokens, equal tuning, over seeds; resumable at any point."""

import copy
import hashlib
import json
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titans.training.callbacks import write_atomically
from titans.training.config import TrainConfig, parse_config, require
from titans.training.provenance import provenance
from titans.training.run import train
from titans.training.task import Task


@dataclass
class Experiment:
    """What is compared.

    Attributes:
        task: name of the task.
        output: folder of the results.
        models: name -> `{"model": spec, "seeds": [..] (optional)}`.
        data, evaluation, training: as in a run's configuration, the same for every model.
        seeds: of every model that names none of its own.
        tuning: `{"learning_rate": [..], "tokens": N}`: each model tries each rate with its first seed on a short run of
            its own, and keeps the one with the lowest validation loss. None: `training.learning_rate` for all.
        parameter_tolerance: models whose parameter counts differ by more than this fraction are refused.
    """

    task: str
    output: str
    models: dict[str, dict[str, Any]]
    data: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    tuning: dict[str, Any] | None = None
    parameter_tolerance: float = 0.03

    def __post_init__(self):
        require(bool(self.models), "models", self.models, "a mapping from a model's name to its settings")
        for name, entry in self.models.items():
            extra = set(entry) - {"model", "seeds"}
            require(not extra and "model" in entry, f"models.{name}", entry, "the keys 'model' and, if wanted, 'seeds'")
        if self.tuning is not None:
            valid = set(self.tuning) == {"learning_rate", "tokens"}
            require(valid, "tuning", self.tuning, "the keys 'learning_rate' (a list) and 'tokens'")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Experiment":
        """Raises ValueError for an unknown or missing key."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        require(not unknown, "experiment", sorted(unknown), f"the keys {', '.join(cls.__dataclass_fields__)}")
        missing = {"task", "output", "models"} - set(values)
        require(not missing, "experiment", sorted(values), f"these keys as well: {', '.join(sorted(missing))}")
        return cls(**values)

    def seeds_of(self, name: str) -> list[int]:
        return self.models[name].get("seeds", self.seeds)

    def config(self, task: Task, name: str, kind: str, **training: Any) -> TrainConfig:
        """The checked configuration of one run; its folder's name holds a hash of everything that defines it."""
        values = {
            "model": self.models[name]["model"],
            "data": self.data,
            "evaluation": self.evaluation,
            "training": self.training | training,
        }
        config = parse_config(task, copy.deepcopy(values))
        defining = json.dumps(config.to_dict(), sort_keys=True)
        digest = hashlib.sha256(defining.encode()).hexdigest()[:10]
        config.output = str(Path(self.output) / "runs" / f"{name}-{kind}-{digest}")
        return config


def compare(experiment: Experiment, task: Task, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs what is not yet done, one run after the other; rewrites results after each.

    In `experiment.output`: `results.json`, `table.md`, a picture, and the runs' folders below `runs/`.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: parameter counts that differ too much, or a bad key.
    """
    parameters = _equal_parameters(experiment, task)
    results: dict[str, Any] = {
        "provenance": provenance(),
        "command": " ".join(["titans", *sys.argv[1:]]),
        "experiment": experiment.__dict__,
        "models": {name: {"parameters": parameters[name], "tuning": [], "runs": []} for name in experiment.models},
    }
    rounds = max(len(experiment.seeds_of(name)) for name in experiment.models)
    for index in range(rounds):
        for name in experiment.models:
            seeds = experiment.seeds_of(name)
            if index >= len(seeds):
                continue
            entry = results["models"][name]
            if index == 0:
                _tune(experiment, task, name, entry, say)
            config = experiment.config(task, name, f"seed{seeds[index]}", seed=seeds[index], **entry["chosen"])
            run = _run(config, task, say, evaluate=True)
            entry["runs"].append({"seed": seeds[index], "folder": config.output, **run})
            _write(experiment, task, results)
            say(table(results, task))
    return results


def _equal_parameters(experiment: Experiment, task: Task) -> dict[str, int]:
    counts, data = {}, None
    for name in experiment.models:
        config = experiment.config(task, name, "count")
        data = data or task.load(config)
        counts[name] = task.build_model(config, data).num_parameters()
    smallest, largest = min(counts.values()), max(counts.values())
    if largest > smallest * (1 + experiment.parameter_tolerance):
        listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise ValueError(
            f"parameter_tolerance={experiment.parameter_tolerance}: the models differ by "
            f"{largest / smallest - 1:.1%} ({listed}); change their sizes or the tolerance"
        )
    return counts


def _tune(experiment: Experiment, task: Task, name: str, entry: dict[str, Any], say: Callable[[str], None]) -> None:
    """Fills `entry["tuning"]` (each rate's validation loss) and `entry["chosen"]`."""
    entry["chosen"] = {}
    if experiment.tuning is None:
        return
    # One validation, at the end: a trial is short.
    short = {"tokens": experiment.tuning["tokens"], "seed": experiment.seeds_of(name)[0], "eval_every": 1}
    for rate in experiment.tuning["learning_rate"]:
        config = experiment.config(task, name, f"tune{rate:g}", learning_rate=rate, **short)
        run = _run(config, task, say, evaluate=False)
        entry["tuning"].append({"learning_rate": rate, "validation_loss": run["validation_loss"]})
    finite = [trial for trial in entry["tuning"] if trial["validation_loss"] is not None]
    if not finite:
        raise FloatingPointError(f"models.{name}: every learning rate of {experiment.tuning} diverged; add lower ones")
    entry["chosen"] = {"learning_rate": min(finite, key=lambda t: t["validation_loss"])["learning_rate"]}


def _run(config: TrainConfig, task: Task, say: Callable[[str], None], evaluate: bool) -> dict[str, Any]:
    """The result of a run: read if it is done, resumed if it was interrupted, else trained."""
    assert config.output is not None
    folder = Path(config.output)
    done = folder / "result.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    say(f"{folder.name}: {'resuming' if (folder / 'config.yaml').exists() else 'training'}")
    try:
        result = train(config, task, resume=(folder / "config.yaml").exists(), evaluate=evaluate)
    except FloatingPointError as error:
        if evaluate:
            raise
        result = {"validation_loss": None, "diverged": str(error)}  # a tuning run may: another rate is kept
        write_atomically(done, json.dumps(result, indent=1))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a finished run needs them no more
    return result


def _write(experiment: Experiment, task: Task, results: dict[str, Any]) -> None:
    folder = Path(experiment.output)
    write_atomically(folder / "results.json", json.dumps(results, indent=1))
    write_atomically(folder / "table.md", table(results, task) + "\n")
    metrics = {name: entry["runs"][0]["metrics"] for name, entry in results["models"].items() if entry["runs"]}
    task.plot(metrics, folder / task.picture)


def table(results: dict[str, Any], task: Task) -> str:
    """Markdown: a line a model, best first; mean over seeds, and the standard deviation where there are several."""
    lines, columns = [], []
    for name, entry in results["models"].items():
        if not entry["runs"]:
            continue
        summaries = [task.summary(run["metrics"]) for run in entry["runs"]]
        columns += [column for column in summaries[0] if column not in columns]
        speed = statistics.mean(run["tokens_per_second"] for run in entry["runs"])
        lines.append((name, entry, summaries, speed))
    lines.sort(key=lambda line: statistics.mean(next(iter(summary.values())) for summary in line[2]))
    head = ["model", "parameters", "learning rate", *columns, "tokens/s", "seeds"]
    rows = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name, entry, summaries, speed in lines:
        values = [_mean([summary[column] for summary in summaries if column in summary]) for column in columns]
        rate = entry["chosen"].get("learning_rate", "")
        cells = [name, f"{entry['parameters']:,}", str(rate), *values, f"{speed:,.0f}", str(len(summaries))]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.3f}{spread}"
