"""What a comparison shows: its tables, and the picture of a setting that was varied."""

import statistics
from pathlib import Path
from typing import Any

from titans.training.task import Task


def short(value: Any) -> str:
    """A value of a varied setting as names have it: of a path its last part."""
    return str(value).rpartition("/")[2]


def table(results: dict[str, Any], task: Task) -> str:
    """Markdown: a line a model, best first; over several seeds mean and standard deviation, or median and best."""
    columns, about = {}, {}
    for name, entry in results["models"].items():
        if not entry["runs"]:
            continue
        columns[name] = _columns([task.summary(run["metrics"]) for run in entry["runs"]])
        about[name] = {
            "parameters": f"{entry['parameters']:,}",
            "learning rate": str(entry["chosen"].get("learning_rate", "")),
            "tokens/s": f"{_mean_speed(entry['runs']):,.0f}",
        }
    return _markdown(columns, about, task)


def over_variants(name: str, variants: dict[str, dict[str, Any]], task: Task) -> dict[str, list[float]]:
    """A model's columns, over the seeds that are done for all values: means over the values, then each value's."""
    rows: list[dict[str, float]] = []
    runs = _shared_runs(name, variants)
    for same_seed in zip(*runs.values(), strict=True):
        summaries = {label: task.summary(run["metrics"]) for label, run in zip(runs, same_seed, strict=True)}
        shared = [column for column in next(iter(summaries.values())) if all(column in s for s in summaries.values())]
        means = {f"{column}, mean": statistics.mean(s[column] for s in summaries.values()) for column in shared}
        rows.append(means | {f"{column}, {label}": s[column] for label, s in summaries.items() for column in s})
    return _columns(rows)


def table_of_variants(results: dict[str, Any], task: Task) -> str:
    """Markdown: a line a model, with its size and training speed at each value before its columns over the seeds."""
    variants, about = results["variants"], {}
    for name in results["means"]:
        sizes = [variant["models"][name]["parameters"] for variant in variants.values()]
        low, high = min(sizes), max(sizes)
        runs = _shared_runs(name, variants).items()
        speeds = {f"tokens/s, {label}": f"{_mean_speed(of_value):,.0f}" for label, of_value in runs}
        about[name] = {"parameters": f"{low:,}" if low == high else f"{low:,} to {high:,}", **speeds}
    return _markdown(results["means"], about, task)


def plot_variants(results: dict[str, Any], task: Task, path: Path) -> None:
    """The headline and the training speed over the varied setting: a line a model, a column of axes a panel."""
    from matplotlib.figure import Figure

    experiment = results["experiment"]
    setting, values = next(iter(experiment["vary"].items()))
    numbers = all(isinstance(value, int | float) and value > 0 for value in values)
    places = values if numbers else range(len(values))
    panels = {name: str(experiment["models"][name].get("panel", "")) for name in results["means"]}
    titles = list(dict.fromkeys(panels.values()))
    figure = Figure(figsize=(1.5 + 5 * len(titles), 7), layout="constrained")
    grid = figure.subplots(2, len(titles), sharex=True, squeeze=False)
    for name, panel in panels.items():
        upper, lower = grid[:, titles.index(panel)]
        runs = _shared_runs(name, results["variants"])
        headline, scores = _headline(runs, task)
        upper.plot(places, scores, marker="o", label=name)
        upper.set(title=panel, ylabel=headline)
        lower.plot(places, [_mean_speed(of_value) for of_value in runs.values()], marker="o", label=name)
        lower.set(xlabel=setting, ylabel="tokens/s in training")
    for upper, lower in grid.T:
        lower.set_ylim(bottom=0)
        if numbers:
            lower.set_xscale("log", base=2)
        lower.set_xticks(places, [short(value) for value in values])
        upper.legend(fontsize="small")
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _headline(runs: dict[str, list[dict[str, Any]]], task: Task) -> tuple[str, list[float]]:
    """Its name, and at each value the middle of the seeds.

    What is measured at the value itself, as "bits per byte @ 256" at length 256, loses what its names differ in.
    """
    firsts = [[next(iter(task.summary(run["metrics"]).items())) for run in of_value] for of_value in runs.values()]
    names = list(dict.fromkeys(name for of_value in firsts for name, _ in of_value))
    name = names[0] if len(names) == 1 else names[0].partition(" @ ")[0]
    return name, [_middle([value for _, value in of_value], task) for of_value in firsts]


def _shared_runs(name: str, variants: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """A model's runs at each value, of the seeds that are done for all values."""
    by_label = {
        label: {run["seed"]: run for run in results["models"][name]["runs"]} for label, results in variants.items()
    }
    seeds = [seed for seed in next(iter(by_label.values())) if all(seed in runs for runs in by_label.values())]
    return {label: [runs[seed] for seed in seeds] for label, runs in by_label.items()}


def _mean_speed(runs: list[dict[str, Any]]) -> float:
    return statistics.mean(run["tokens_per_second"] for run in runs)


def _columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row[name] for row in rows if name in row] for name in names}


def _markdown(models: dict[str, dict[str, list[float]]], about: dict[str, dict[str, str]], task: Task) -> str:
    """A line a model, ordered by its first column: what there is to say about it, then its columns over the seeds."""
    headline = {name: _middle(next(iter(columns.values())), task) for name, columns in models.items()}
    order = sorted(models, key=headline.__getitem__, reverse=task.higher_is_better)
    names = dict.fromkeys(column for name in order for column in models[name])
    rows = []
    for name in order:
        cells = {column: _cell(models[name].get(column, []), task) for column in names}
        seeds = max(map(len, models[name].values()))
        rows.append({"model": name, **about.get(name, {}), **cells, "seeds": str(seeds)})
    head = list(rows[0]) if rows else ["model"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)])


def _middle(values: list[float], task: Task) -> float:
    """Of a column over the seeds."""
    return statistics.median(values) if task.bimodal else statistics.mean(values)


def _cell(values: list[float], task: Task) -> str:
    """A column over the seeds, the middle and how far they go."""
    if not values:
        return ""
    if len(values) == 1:
        reach = ""
    elif task.bimodal:
        reach = f" (best {(max if task.higher_is_better else min)(values):,.3f})"
    else:
        reach = f" ± {statistics.stdev(values):.3f}"
    return f"{_middle(values, task):,.3f}{reach}"
