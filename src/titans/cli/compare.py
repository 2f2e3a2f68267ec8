"""titans compare"""

from titans.cli.common import parse, quiet_libraries
from titans.training.config import ConfigParser, load_yaml

EXAMPLES = """examples:
  TITANS_DATA=/data titans compare benchmarks/language_books.yaml
An interrupted comparison goes on where it stopped when the same command is given again.
"""


def main(arguments: list[str]) -> None:
    parser = ConfigParser(
        prog="titans compare",
        description="Trains several models under one budget (data, tokens, tuning), one after the other, over seeds, "
        "and writes results.json, table.md and a picture to the experiment's output folder.",
        epilog=EXAMPLES,
        exit_on_error=False,
    )
    parser.add_argument("experiment", type=str, help="YAML file; benchmarks/*.yaml are examples")
    parser.add_argument("--output", type=str | None, default=None, help="folder of the results, instead of the file's")
    parser.add_argument(
        "--models", type=list[str] | None, default=None, help="train these alone: share the work, as in --models [a,b]"
    )
    options = parse(parser, arguments)
    values = load_yaml(options.experiment)
    if options.output:
        values["output"] = options.output

    quiet_libraries()
    from titans.tasks import get_task
    from titans.training.compare import Experiment, compare

    experiment = Experiment.from_dict(values)
    compare(experiment, get_task(experiment.task), options.models)
