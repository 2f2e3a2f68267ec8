"""titans eval"""

import json
from dataclasses import fields, replace
from pathlib import Path

from titans.cli.common import parse, quiet_libraries
from titans.training.config import ConfigParser

EXAMPLES = """examples:
  titans eval language runs/mine                        on the run's own test text
  titans eval language runs/mine --data other.txt --lengths "[512, 8192]"
  titans eval language runs/mine --data books.jsonl.xz --json result.json
"""


def main(arguments: list[str]) -> None:
    from titans.tasks import TASKS, get_task

    named = bool(arguments) and not arguments[0].startswith("-")
    task = get_task(arguments.pop(0) if named else "language")
    parser = ConfigParser(
        prog=f"titans eval {task.name}",
        description=f"Measures a trained model on a task ({', '.join(TASKS)}).",
        epilog=EXAMPLES,
        exit_on_error=False,
    )
    parser.add_argument("run", type=str, help="folder of a run, as `titans train` leaves it")
    parser.add_argument("--data", type=str | None, default=None, help="test data instead of the run's own")
    parser.add_argument("--json", type=str | None, default=None, help="write the metrics to this file, too")
    defaults = task.evaluation_class()
    for f in fields(task.evaluation_class):
        default = getattr(defaults, f.name)
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=f.type, default=default, help=f.metadata["help"])
    options = parse(parser, arguments)

    quiet_libraries()
    from titans.training.config import load_yaml, parse_config
    from titans.training.models import load_run
    from titans.training.run import write_atomically

    model, tokenizer = load_run(options.run)
    data = parse_config(task, load_yaml(Path(options.run) / "config.yaml")).data
    if options.data is not None:
        data = replace(data, test=options.data)
    evaluation = task.evaluation_class(**{f.name: options[f.name] for f in fields(task.evaluation_class)})
    metrics = task.evaluate(model, tokenizer, data, evaluation)
    print(task.report(metrics))
    if options.json:
        write_atomically(Path(options.json), json.dumps(metrics, indent=1))
