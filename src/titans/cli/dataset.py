"""titans eval forecasting --dataset"""

import json
from pathlib import Path

from titans.cli.common import parse, quiet_libraries
from titans.training.config import ConfigParser

EXAMPLES = """examples:
  titans eval forecasting --dataset ETTm1 --data ETTm1.csv --json ettm1.json
  titans eval forecasting --dataset ETTh1 --data ETTh1.csv --models titans dlinear --horizons 96 192 --seeds 1
Interrupted, the same command goes on where it stopped.
"""


def main(arguments: list[str]) -> None:
    from titans.tasks._forecasting import DATASETS, MODELS, WINDOWS, dataset_experiment

    parser = ConfigParser(
        prog="titans eval forecasting",
        description="Trains and tests forecasters on every horizon of a data set, by the protocol of the literature, "
        "and tabulates the mean over the horizons: a front of `titans compare`. Four learning rates are tried for "
        "each model and horizon, each on all of the windows.",
        epilog=EXAMPLES,
        exit_on_error=False,
    )
    parser.add_argument("--dataset", type=str, required=True, help=", ".join(DATASETS))
    parser.add_argument("--data", type=str, required=True, help="its CSV file (also .gz, .xz)")
    parser.add_argument("--models", type=list[str], default=["titans"], help=", ".join(MODELS))
    parser.add_argument("--horizons", type=list[int] | None, default=None, help="by default the data set's usual ones")
    parser.add_argument("--seeds", type=int, default=3, help="so many, from 0 on")
    parser.add_argument("--windows", type=float, default=WINDOWS, help="windows that a training sees, everywhere alike")
    parser.add_argument("--output", type=str | None, default=None, help="folder of the results; by default runs/NAME")
    parser.add_argument("--json", type=str | None, default=None, help="file for the results, beside that folder's")
    options = parse(parser, arguments)
    choices = {name: options[name] for name in ("models", "horizons", "seeds", "windows")}
    output = options.output or f"runs/{options.dataset}"
    experiment = dataset_experiment(options.dataset, options.data, output, **choices)

    quiet_libraries()
    from titans.tasks import get_task
    from titans.training.compare import Experiment, compare
    from titans.training.files import write_atomically

    results = compare(Experiment.from_dict(experiment), get_task("forecasting"))
    if options.json:
        write_atomically(Path(options.json), json.dumps(results, indent=1))
