"""titans eval"""

import json
from dataclasses import fields, replace
from pathlib import Path

from titans.cli.common import data_option, parse, quiet_libraries, take
from titans.training.config import ConfigParser

EXAMPLES = """examples:
  titans eval language runs/mine                        on the run's own test text
  titans eval language runs/mine --data other.txt --lengths 512 8192
  titans eval language runs/mine --data books.jsonl.xz --json result.json
  titans eval harness runs/mine --tasks qa1 --babi babi_en10k    by the lm-evaluation-harness
  titans eval needle runs/mine --task niah_single_2 --data books.jsonl.xz --lengths 2048 16384 --samples 100
  titans eval forecasting runs/etth1 --json result.json
  titans eval forecasting --dataset ETTh1 --data ETTh1.csv      trains and tests on each horizon; see its --help
  titans eval dna runs/tata
"""


def main(arguments: list[str]) -> None:
    from titans.tasks import TASKS, get_task

    command = " ".join(["titans", "eval", *arguments])
    if arguments[:1] == ["harness"]:
        from titans.cli.harness import main as harness

        harness(arguments[1:])
        return
    if arguments[:1] == ["forecasting"] and any(word.startswith("--dataset") for word in arguments):
        from titans.cli.dataset import main as dataset

        dataset(arguments[1:])
        return
    named = bool(arguments) and not arguments[0].startswith("-")
    task = get_task(arguments.pop(0) if named else "language")
    test = take(arguments, "--data")
    if test is not None:
        arguments += [data_option(task, "test"), test]
    parser = ConfigParser(
        prog=f"titans eval {task.name}",
        description=f"Measures a trained model on a task ({', '.join(TASKS)}).",
        epilog=EXAMPLES,
        exit_on_error=False,
    )
    parser.add_argument("run", type=str, help="folder of a run, as `titans train` leaves it")
    text = "file for the metrics and what they come from; a picture beside it"
    parser.add_argument("--json", type=str | None, default=None, help=text)
    for f in fields(task.data_class):
        text = f"{f.metadata['help']} (default: the run's own)"
        parser.add_argument(f"--data.{f.name}", type=f.type | None, default=None, help=text)  # type: ignore[operator]
    defaults = task.evaluation_class()
    for f in fields(task.evaluation_class):
        default = getattr(defaults, f.name)
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=f.type, default=default, help=f.metadata["help"])
    options = parse(parser, arguments)

    quiet_libraries()
    from titans.training.config import TextData, load_yaml, parse_config
    from titans.training.files import write_atomically
    from titans.training.models import check_text_run, load_run
    from titans.training.provenance import provenance

    model, tokenizer = load_run(options.run)
    config = load_yaml(Path(options.run) / "config.yaml")
    if config["task"] != task.name or issubclass(task.data_class, TextData):
        check_text_run(options.run, model, tokenizer)
    data = parse_config(task, config).data if config["task"] == task.name else task.data_class()
    data = replace(data, **{name: value for name, value in vars(options.data).items() if value is not None})
    evaluation = task.evaluation_class(**{f.name: options[f.name] for f in fields(task.evaluation_class)})
    metrics = task.evaluate(model, tokenizer, data, evaluation)
    print(task.report(metrics))
    if options.json:
        path = Path(options.json)
        result = {"provenance": provenance(), "command": command, **metrics}
        write_atomically(path, json.dumps(result, indent=1))
        task.plot({Path(options.run).name: metrics}, path.with_suffix(".png"))
