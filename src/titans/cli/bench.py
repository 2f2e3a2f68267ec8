"""titans bench"""

import json
from pathlib import Path
from typing import Any

from titans.cli.common import parse, quiet_libraries
from titans.training.config import ConfigParser

EXAMPLES = """examples:
  titans bench memory --subjects "[titans,titans-pytorch,sdpa,matmul]" --lengths "[1024,4096]"
  titans bench memory --against HEAD~1                this code and another commit's
  titans bench train --subjects "[mag,mac,llama]" --lengths "[1024,4096,16384]"
  titans bench decode --subjects "[mac,titans-pytorch]" --lengths "[16]"
  titans bench stream --subjects "[mac]" --lengths "[65536,2000000]"   as fast after 2M tokens as after 65,536?
  titans bench --experiment benchmarks/depth.yaml      training steps of an experiment's models
  titans bench --suite gpu --output gpu.json           all that a GPU is to be asked
"""


def main(arguments: list[str]) -> None:
    from titans.bench.case import DEFAULT_SIZES, SUITES, TASKS, groups, suite, training_steps

    parser = ConfigParser(
        prog="titans bench",
        description="Times subjects side by side, each in its own process, all of them in turn; prints medians, ratios "
        "and peak memory. A subject of ours whose quick check against the reference fails gets no number.",
        epilog=EXAMPLES,
        exit_on_error=False,
    )
    tasks = "; ".join(f"{name}: {text} ({', '.join(subjects)})" for name, (text, subjects) in TASKS.items())
    parser.add_argument("task", type=str | None, nargs="?", default=None, help=tasks)
    parser.add_argument("--suite", type=str | None, default=None, help=f"instead of a task: {', '.join(SUITES)}")
    parser.add_argument(
        "--experiment", type=str | None, default=None, help="instead of a task: a training step of each model of this "
        "file of `titans compare`, at its lengths and batch sizes; --subjects are names of its models"
    )  # fmt: skip
    parser.add_argument("--subjects", type=list[str] | None, default=None, help="first is the base of the ratios")
    parser.add_argument("--lengths", type=list[int], default=[4096], help="tokens")
    parser.add_argument("--threads", type=list[int], default=[1], help="threads of each process")
    parser.add_argument("--dtypes", type=list[str], default=["float32"], help="float32, bfloat16 (autocast)")
    parser.add_argument("--passes", type=list[str] | None, default=None, help="memory: forward, backward (both)")
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument("--sizes", type=dict[str, Any], default={}, help=f"instead of the defaults {DEFAULT_SIZES}")
    parser.add_argument("--rounds", type=int, default=7, help="repetitions of each subject, in turn")
    parser.add_argument("--against", type=str | None, default=None, help="also time this commit's code")
    parser.add_argument("--output", type=str | None, default=None, help="JSON file of the results; a picture beside it")
    options = parse(parser, arguments)

    names = ("task", "subjects", "lengths", "threads", "dtypes", "passes", "device", "sizes", "against")
    given = {name: options[name] for name in ("task", "suite", "experiment")}
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(", ".join(f"{name}={value!r}" for name, value in given.items()) + "; give one of the three")
    if options.suite:
        planned = suite(options.suite)
    elif options.experiment:
        own = ("subjects", "threads", "dtypes", "device")
        planned = training_steps(options.experiment, **{name: options[name] for name in own})
    else:
        planned = groups(**{name: options[name] for name in names})
    quiet_libraries()
    from titans.bench.run import bench, plot, table
    from titans.training.files import write_atomically
    from titans.training.provenance import provenance

    rows = bench(planned, options.rounds)
    if options.output:
        command = " ".join(["titans", "bench", *arguments])
        path = Path(options.output)
        write_atomically(path, json.dumps({"provenance": provenance(), "command": command, "rows": rows}, indent=1))
        write_atomically(path.with_suffix(".md"), table(rows) + "\n")
        plot(rows, path.with_suffix(".png"))
