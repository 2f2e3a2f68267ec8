"""titans forecast"""

from pathlib import Path

from titans.cli.common import parse, quiet_libraries
from titans.training.config import ConfigParser, require

EXAMPLES = """examples:
  titans forecast data.csv --horizon 96 -o forecast.csv
  titans forecast data.csv --target OT --horizon 96 -o forecast.csv --plot forecast.png
  titans forecast data.csv --target OT --horizon 96 --quantiles 0.1 0.5 0.9 -o forecast.csv --plot forecast.png
  titans forecast sales.csv.gz --target shoes hats --horizon 12 -o next_year.csv --run runs/sales
"""


def main(arguments: list[str]) -> None:
    parser = ConfigParser(
        prog="titans forecast",
        description="Trains a small forecaster on a CSV file and writes the rows after its last one. Rows out of "
        "order, repeated stamps, gaps and missing values are mended and noted. At the end: its error on the file's "
        "last rows, which training never saw, beside that of repeating the last season.",
        epilog=EXAMPLES,
        exit_on_error=False,
    )
    parser.add_argument("data", type=str, help="CSV file (also .gz, .xz): a line of names, a column of dates, numbers")
    parser.add_argument("--target", type=str, nargs="+", default=None, help="columns; by default all that hold numbers")
    parser.add_argument("--horizon", type=int, required=True, help="rows to forecast")
    parser.add_argument("-o", "--output", type=str, required=True, help="CSV file for the forecast")
    parser.add_argument("--plot", type=str | None, default=None, help="picture of it: .png, .pdf or .svg")
    parser.add_argument("--time-column", type=str | None, default=None, help="by default the first column of dates")
    parser.add_argument("--season", type=int | None, default=None, help="rows of a cycle; by default by the step")
    parser.add_argument(
        "--look-back", type=int | None, default=None, help="rows the model reads; by default 96, or two seasons if more"
    )
    parser.add_argument(
        "--tokens",
        type=float | None,
        default=None,
        help="look-back rows of all windows seen in training; by default as many as take minutes at most",
    )
    parser.add_argument(
        "--quantiles",
        type=list[float] | None,
        default=None,
        help="forecast these as well, in columns named as in 'OT q0.1'; ascending, 0.5 (the forecast) among them",
    )
    parser.add_argument("--run", type=str | None, default=None, help="folder to keep the trained model in")
    options = parse(parser, arguments)
    for name in ("output", "plot"):
        if options[name] and Path(options[name]).exists():
            raise ValueError(f"{name}={options[name]!r} exists already; delete it or use another name")

    quiet_libraries()
    from titans.forecasting import forecast
    from titans.forecasting.result import PICTURES
    from titans.training.files import write_atomically

    if options.plot:
        require(Path(options.plot).suffix in PICTURES, "plot", options.plot, f"a name in {', '.join(PICTURES)}")
    choices = {name: options[name] for name in ("time_column", "season", "look_back", "tokens", "quantiles", "run")}
    result = forecast(options.data, options.horizon, targets=options.target, **choices)
    write_atomically(Path(options.output), result.frame.to_csv())
    print(f"\n{result.report()}\n\n{options.output}: {len(result.frame)} rows from {result.frame.index[0]}")
    if options.plot:
        result.plot(options.plot)
