"""titans train"""

import datetime
import os
from pathlib import Path

from titans.cli.common import data_option, quiet_libraries, take
from titans.training.config import config_parser, load_yaml, parse_config, require

USAGE = "titans train [CONFIG.yaml] [--data FILE or FOLDER] [--output FOLDER] [--key value ...] | --resume RUN"
DESCRIPTION = """Trains a model. Without arguments: a small byte-level Titans (MAC) on the source code of Python's
standard library, in about three minutes on two cores. Every key may stand in CONFIG.yaml or be given as an option."""
EXAMPLES = """examples:
  titans train
  titans train --data book.txt --output runs/book
  titans train --model.variant mag --training.tokens 2e6
  titans train --task forecasting --data ETTh1.csv --data.horizon 96
  titans train --task dna --data GUE/prom_core_tata
  titans train --data genome.fa.gz              the next nucleotide
  titans train my.yaml --training.learning_rate 1e-3
  titans train --resume runs/book               go on where an interrupted run stopped
"""


def main(arguments: list[str]) -> None:
    resume = take(arguments, "--resume")
    if resume is not None:
        if arguments:
            raise ValueError(f"--resume takes the run's own config.yaml, but {arguments} was given; leave it out")
        arguments = [str(_config_of(resume)), "--output", resume]
    source = take(arguments, "--data")
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--config")
    task_name = _peek_task(arguments)

    from titans.tasks import get_task

    task = get_task(task_name)
    if source is not None:
        arguments += [data_option(task, "train"), source]
    parser = config_parser(
        task, prog="titans train", usage=USAGE, description=DESCRIPTION, epilog=EXAMPLES, exit_on_error=False
    )
    config = parse_config(task, arguments=arguments, parser=parser)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    require(bool(config.output) or not several, "output", config.output, "--output FOLDER: several processes share it")
    config.output = config.output or f"runs/{task.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if resume is None and (Path(config.output) / "config.yaml").exists():
        raise ValueError(f"output={config.output!r} holds a run already; resume it or use another folder")

    quiet_libraries()
    from titans.training.run import train

    result = train(config, task, resume=resume is not None)
    if "metrics" not in result:
        return  # the first of several processes reports
    print(f"\n{result['parameters']:,} parameters, {result['tokens_per_second']:,.0f} tokens/s\n")
    print(task.report(result["metrics"]))
    print(f"\nThe run's folder {config.output}:")
    print("  " + "  ".join(sorted(path.name for path in Path(config.output).iterdir())))


def _config_of(run: str) -> Path:
    path = Path(run) / "config.yaml"
    if not path.exists():
        raise FileNotFoundError(f"--resume {run}: no config.yaml there; give the folder of a run")
    return path


def _peek_task(arguments: list[str]) -> str:
    """The task decides which options there are, so it is looked for before they are parsed."""
    task = take(rest := list(arguments), "--task")
    if task is None and (path := take(rest, "--config")) is not None:
        task = load_yaml(path).get("task")
    return task or "language"
