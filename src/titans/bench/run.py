"""Runs cases side by side: the subjects of a group take turns, so that a busy machine slows all of them alike."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from titans.bench.case import Case

FLOOR = "matmul"  # the subject that does the bare matrix products: seconds over seconds is the fraction of its rate


def bench(groups: Iterable[list[Case]], rounds: int, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """One row a case: its sizes, quartiles of the seconds, tokens/s, peak memory, or why there are none.

    Args:
        groups: the cases of a group are timed in turn, and compared with its first one.
        rounds: repetitions of each.
    """
    rows = []
    for group in groups:
        rows += _group(group, rounds)
        say(table(rows[-len(group) :]))
    return rows


def _group(group: list[Case], rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder, _revisions(group, Path(folder)) as sources:
        rows: list[dict[str, Any]] = [asdict(case) | {"name": case.name, "seconds": []} for case in group]
        workers = [_start(case, sources[case.revision]) for case in group]  # all import at once
        for worker, row in zip(workers, rows, strict=True):  # one after the other: a warm-up disturbs no other
            row |= _answer(worker)
        for _ in range(rounds):
            for worker, row in zip(workers, rows, strict=True):
                if "error" in row:
                    continue
                got = _answer(worker)
                if "error" in got:
                    row |= got
                    continue
                row["seconds"].append(got["seconds"])
                row.setdefault("resident_bytes", []).append(got["resident_bytes"])
        for worker in workers:
            worker.communicate()
    for row in rows:
        _summarise(row, rows)
    return rows


@contextmanager
def _revisions(group: list[Case], folder: Path):
    """Folder of the sources of every revision that is asked for, checked out beside this one."""
    sources, here = {}, Path(__file__).parents[2]
    try:
        for revision in {case.revision for case in group}:
            sources[revision] = here
            if revision is not None:
                place = folder / revision.replace("/", "_")
                command = ["git", "-C", str(here), "worktree", "add", "--detach", str(place), revision]
                made = subprocess.run(command, capture_output=True, text=True)
                if made.returncode:
                    raise ValueError(f"against={revision!r} cannot be checked out: {made.stderr.strip()}")
                sources[revision] = place / "src"
        yield sources
    finally:
        for revision, place in sources.items():
            if revision is not None:
                command = ["git", "-C", str(here), "worktree", "remove", "--force", str(place.parent)]
                subprocess.run(command, capture_output=True)


def _start(case: Case, source: Path) -> subprocess.Popen:
    path = os.pathsep.join([str(source), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": str(case.threads), "PYTHONPATH": path}
    command = [sys.executable, "-m", "titans.bench.worker", json.dumps(asdict(case))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _answer(worker: subprocess.Popen) -> dict[str, Any]:
    """To a line."""
    assert worker.stdin is not None and worker.stdout is not None
    with suppress(BrokenPipeError):  # it has ended
        worker.stdin.write("\n")
        worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith("{"):  # a peer may print
            return json.loads(line)
    return {"error": f"its process ended with {worker.wait()}, see its messages above"}


def _summarise(row: dict[str, Any], group: list[dict[str, Any]]) -> None:
    """Adds median and quartiles, tokens/s, and the ratio to the group's first row."""
    if "error" in row:
        return
    seconds = row["seconds"]
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    row |= {"median": statistics.median(seconds), "quartiles": [low, high], "tokens_per_second": row["tokens"] / middle}
    floor = next((other for other in group if other["subject"] == FLOOR and "error" not in other), None)
    first = group[0]
    if "error" not in first and first is not row:
        # medians of the ratios of neighbours in time: what slows the machine slows both
        row["times_first"] = statistics.median(b / a for a, b in zip(row["seconds"], first["seconds"], strict=True))
    if floor is not None and floor is not row and row["subject"] == "titans":
        pairs = zip(floor["seconds"], seconds, strict=True)
        row["fraction_of_matmul"] = statistics.median(a / b for a, b in pairs)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; `x first` is the speed over the first subject's, medians of ratios inside a round."""
    head = [
        "task",
        "subject",
        "pass",
        "length",
        "threads",
        "dtype",
        "tokens/s",
        "quartiles",
        "x first",
        "of matmul",
        "peak MiB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|" + "---:|" * (len(head) - 3)]
    for row in rows:
        case = [row["task"], row["name"], row["measure"], f"{row['length']:,}", row["threads"], row["dtype"]]
        if "error" in row:
            lines.append("| " + " | ".join(map(str, case)) + f" | {row['error']} |||||")
            continue
        low, high = (row["tokens"] / seconds for seconds in reversed(row["quartiles"]))
        peak = row["peak_bytes"]
        times, share = row.get("times_first"), row.get("fraction_of_matmul")
        values = [
            f"{row['tokens_per_second']:,.0f}",
            f"{low:,.0f} to {high:,.0f}",
            "" if times is None else f"{times:.2f}",
            "" if share is None else f"{share:.0%}",
            "" if peak is None else f"{peak / 2**20:,.0f}",
        ]
        lines.append("| " + " | ".join(map(str, case + values)) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens/s over length, a line a subject and pass (over time for `stream`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(ylabel="tokens/s", yscale="log")
    done, stream = [row for row in rows if "error" not in row], all(row["task"] == "stream" for row in rows)
    axes.set_xlabel("tokens read" if stream else "length (tokens)")
    keys = ("task", "name", "measure", "threads", "dtype")
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in done):
        mine = [row for row in done if tuple(row[k] for k in keys) == key]
        if stream:
            points = [
                (row["length"] + (i + 1) * row["tokens"], row["tokens"] / seconds)
                for row in mine
                for i, seconds in enumerate(row["seconds"])
            ]
        else:
            points = [(row["length"], row["tokens_per_second"]) for row in mine]
            axes.set_xscale("log", base=2)
        axes.plot(*zip(*points, strict=True), marker=".", label="{} {} {}, {} threads, {}".format(*key))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
