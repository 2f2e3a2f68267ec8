"""What comes out of a forecast: numbers, a report, a picture."""

# pandas has no types of its own.
# pyright: reportArgumentType=false, reportCallIssue=false

import math
import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from titans.forecasting.grid import Table
from titans.training.files import replace_durably

PICTURES = (".png", ".pdf", ".svg")


def quantile_column(name: str, quantile: float) -> str:
    """The name of a column's forecast quantile, such as `OT q0.1`; the median has the column's own name."""
    return name if quantile == 0.5 else f"{name} q{quantile:g}"


@dataclass(frozen=True)
class Forecast:
    """A forecast and how far to trust it.

    Attributes:
        frame: [horizon, columns], the index holds the stamps; where quantiles were asked for, each column is followed
            by them, named as in ``quantile_column``.
        table: the series it goes on from.
        errors: of the back-test, as ``backtest`` gives them; without the columns that never change.
        held_out: the first row that training did not see.
        look_back: rows the model reads.
        season: rows that the naive forecast repeats.
        quantiles: what was forecast; [0.5] where nothing else was asked for.
    """

    frame: pd.DataFrame
    table: Table
    errors: pd.DataFrame
    held_out: int
    look_back: int
    season: int
    quantiles: list[float]

    @property
    def better(self) -> dict[str, list[str]]:
        """The columns where the model's MAE is the lower, and where it is not; without those of no known error."""
        known = self.errors.dropna(subset="MAE") if len(self.errors) else self.errors
        wins = known["MAE"] < known["naive MAE"] if len(known) else pd.Series(dtype=bool)
        return {"model": list(wins.index[wins]), "naive": list(wins.index[~wins])}

    def report(self) -> str:
        """What a person wants to read, as markdown."""
        constant = self.table.values.columns.difference(self.errors.index, sort=False)
        lines = [f"{column!r} never changes: {self.frame[column].iloc[0]:g} forecast" for column in constant]
        if not len(self.errors):
            return "\n".join(lines)
        rows, stamps = len(self.table.values) - self.held_out, self.table.values.index
        lines += [
            f"Back-test: {rows - len(self.frame) + 1:,} forecasts of {len(self.frame)} rows within the last {rows:,} "
            f"rows (from {stamps[self.held_out]}), which training never saw;",
            f"look-back {self.look_back}; the naive forecast repeats the last {self.season} rows.",
            "",
            f"| column | {' | '.join(self.errors)} |",
            "|---|" + "---:|" * len(self.errors.columns),
            *(
                f"| {name} | {' | '.join('-' if math.isnan(x) else f'{x:.4g}' for x in row)} |"
                for name, row in zip(self.errors.index, self.errors.to_numpy(), strict=True)
            ),
            "",
            self.verdict(),
        ]
        return "\n".join(lines)

    def verdict(self) -> str:
        """Which of the two was better, by MAE."""
        model, naive = self.better["model"], self.better["naive"]
        if not model + naive:
            return "No value of the held-out rows is known: neither forecast can be judged."
        if model and naive:
            return (
                f"The model was better on {len(model)} of {len(model + naive)} columns; "
                f"the seasonal-naive forecast was as good or better on {', '.join(naive)}."
            )
        return "The model was better." if model else "The seasonal-naive forecast was as good or better: use that."

    def plot(self, path: str | os.PathLike) -> None:
        """A picture (.png, .pdf, .svg) of each column: its last rows (look-back or three horizons) and its forecast."""
        from matplotlib.figure import Figure

        path, count = Path(path), len(self.table.values.columns)
        across = math.ceil(math.sqrt(count / 4))
        down = math.ceil(count / across)
        figure = Figure(figsize=(8 * across, 2.2 * down + 0.6), layout="constrained")
        axes = list(figure.subplots(down, across, squeeze=False, sharex=True).flat)
        last = self.table.values.tail(max(self.look_back, 3 * len(self.frame)))
        low, high = self.quantiles[0], self.quantiles[-1]
        for axis, column in zip(axes, last, strict=False):
            axis.plot(last.index, last[column], label="known")
            axis.plot(self.frame.index, self.frame[column], label="forecast")
            if low < high:
                band = (self.frame[quantile_column(column, q)] for q in (low, high))
                axis.fill_between(self.frame.index, *band, color="C1", alpha=0.25, lw=0, label=f"{low:g} to {high:g}")
            axis.set_title(column, fontsize="small")
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize="small")
        for axis in axes[count:]:
            axis.set_axis_off()
        figure.autofmt_xdate()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        figure.savefig(temporary, format=path.suffix[1:], dpi=100)
        replace_durably(temporary, path)
