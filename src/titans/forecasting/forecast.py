"""Trains a small Titans forecaster on a table and forecasts the rows after its last one."""

# pandas has no types of its own.
# pyright: reportArgumentType=false

import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from titans.forecasting.backtest import Predict, backtest, calibrated
from titans.forecasting.grid import Table
from titans.forecasting.result import Forecast, quantile_column
from titans.forecasting.table import read_table
from titans.models.prediction import check_quantiles
from titans.tasks.forecasting import Forecasting, small_model
from titans.training.config import parse_config, require
from titans.training.models import load_run
from titans.training.run import train
from titans.training.series import SeriesWindows
from titans.training.task import TaskData

_LOOK_BACK = (8, 96, 336)  # at least; what is usual; at most
_BATCH = (8, 32)  # windows of a step: at least, and what is usual
_PASSES, _STEPS, _NUMBERS = 10, 300, 3e7  # of training: passes, but at least the steps, at most so many numbers read


@dataclass(frozen=True)
class Plan:
    """Which rows are trained on, which choose the checkpoint, and which are held out: the last.

    Attributes:
        train: rows trained on, the first of the table.
        held_out: the first row that neither training nor the choice of the checkpoint sees.
        look_back: rows the model reads.
    """

    train: int
    held_out: int
    look_back: int

    @classmethod
    def of(cls, rows: int, horizon: int, season: int, look_back: int | None = None) -> "Plan":
        """Held out: a tenth of the rows; for the checkpoint: a twentieth before them; both more if the horizon is.

        The look-back is 96 rows, or two seasons if that is more, 336 at most; less where so many windows as it has
        rows would not fit into the rows trained on.

        Raises:
            ValueError: too few rows, for the horizon or the given `look_back`.
        """
        room = _room(rows, horizon)
        usual = min(max(_LOOK_BACK[1], 2 * season), _LOOK_BACK[2])
        if look_back is None and room < _LOOK_BACK[0]:
            needed = next(n for n in itertools.count(rows) if _room(n, horizon) >= _LOOK_BACK[0])
            longest = max((h for h in range(1, horizon) if _room(rows, h) >= _LOOK_BACK[0]), default=0)
            mend = f", or a horizon of at most {longest}" if longest else ""
            raise ValueError(f"horizon={horizon} needs at least {needed} rows, and there are {rows}; give more{mend}")
        if look_back is not None:
            mend = f"at most {room}" if room >= _LOOK_BACK[0] else "more rows or a shorter horizon"
            require(look_back <= room, "look_back", look_back, f"{mend}: there are {rows} rows")
            require(look_back >= _LOOK_BACK[0], "look_back", look_back, f"at least {_LOOK_BACK[0]}")
        held_out, choice = _parts(rows, horizon)
        return cls(rows - held_out - choice, rows - held_out, look_back or min(usual, room))


def _parts(rows: int, horizon: int) -> tuple[int, int]:
    """Rows held out and rows that choose the checkpoint; of the latter enough for a batch of windows."""
    return max(horizon, rows // 10), max(horizon + _BATCH[0] - 1, rows // 20)


def _room(rows: int, horizon: int) -> int:
    """The longest look-back of which as many windows fit into the rows trained on."""
    return (rows - sum(_parts(rows, horizon)) - horizon) // 2


def forecast(
    source: str | os.PathLike | pd.DataFrame,
    horizon: int,
    *,
    targets: Sequence[str] | None = None,
    time_column: str | None = None,
    season: int | None = None,
    look_back: int | None = None,
    tokens: float | None = None,
    quantiles: Sequence[float] | None = None,
    run: str | os.PathLike | None = None,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> Forecast:
    """Trains a forecaster on a table and forecasts the `horizon` rows after its last one.

    The last rows are held out: the model never sees them in training, is measured on them beside the seasonal-naive
    forecast, and reads them for its forecast. Columns that never change are forecast as they are.

    Args:
        source, targets, time_column: as in ``read_table``.
        horizon: rows to forecast.
        season: rows of a cycle, which the naive forecast repeats; by default ``Table.season`` of the step.
        look_back: rows the model reads; by default ``Plan.of``.
        tokens: look-back rows of all windows seen in training; by default ten passes over the training windows, at
            least 300 steps, and at most 3e7 numbers, counting columns.
        quantiles: forecast these as well, such as [0.1, 0.5, 0.9], ascending and 0.5 among them; a column's forecast is
            then the median. They are calibrated on the rows that choose the checkpoint.
        run: a folder that keeps the trained model; by default it is thrown away. Its quantiles are not calibrated.
        say: is told what was read and mended, before training.
        progress: show a progress bar.

    Raises:
        FileNotFoundError, ValueError: what ``read_table`` and ``Plan.of`` raise; a value that is out of range; a
            folder that holds a run already.
    """
    require(horizon > 0, "horizon", horizon, "a number of rows above 0")
    require(season is None or season > 0, "season", season, "a number of rows above 0")
    if run is not None and (Path(run) / "config.yaml").exists():
        raise ValueError(f"run={str(run)!r} holds a run already; use another folder")
    if quantiles is not None:
        quantiles = [float(q) for q in quantiles]
        check_quantiles(quantiles)
    levels = quantiles or [0.5]
    table = read_table(source, targets, time_column)
    _check_names(table, levels)
    plan = Plan.of(len(table.values), horizon, season or table.season, look_back)
    season = _season(table, plan.held_out, season)
    say("\n".join([table.summary, *(f"note: {note}" for note in table.notes)]))
    moving = table.values.columns[table.values.nunique() > 1]
    errors, last = pd.DataFrame(), table.filled.iloc[-1].to_numpy()
    made = np.tile(last[:, None], (horizon, 1, len(levels)))
    if len(moving):
        part = Table(table.values[moving], table.step)
        with tempfile.TemporaryDirectory() as temporary:
            predict = _trained(part, plan, horizon, tokens, quantiles, str(run or temporary), progress)
        if quantiles is not None:
            begins = range(plan.train, plan.held_out - horizon + 1)
            predict = calibrated(predict, part, begins, plan.look_back, horizon, levels)
        errors = backtest(predict, part, plan.held_out, plan.look_back, horizon, season, levels)
        made[:, table.values.columns.isin(moving)] = predict(part.past(len(part.values), plan.look_back)[None])[0]
    frame = _frame(made, table, levels)
    return Forecast(frame, table, errors, plan.held_out, plan.look_back, season, levels)


def _check_names(table: Table, quantiles: list[float]) -> None:
    names = [quantile_column(name, q) for name in table.values for q in quantiles]
    for name in names:
        require(names.count(name) == 1, "column", name, "another name: it is that of a quantile to be forecast")


def _frame(made: np.ndarray, table: Table, quantiles: list[float]) -> pd.DataFrame:
    """Of the quantiles [horizon, columns, Q] of each column: the median, by the column's own name, then the others."""
    columns = {
        quantile_column(name, q): made[:, i, k]
        for i, name in enumerate(table.values.columns)
        for k, q in sorted(enumerate(quantiles), key=lambda pair: pair[1] != 0.5)
    }
    return pd.DataFrame(columns, index=table.stamps_after(len(made)).rename(table.values.index.name))


def _season(table: Table, held_out: int, season: int | None) -> int:
    """The season that is given, or the natural one; two of them have to fit before the held-out rows."""
    if season is not None:
        require(2 * season <= held_out, "season", season, f"at most {held_out // 2}: half of the rows not held out")
        return season
    if 2 * table.season <= held_out:
        return table.season
    table.notes.append(f"too few rows for a season of {table.season}; the naive forecast repeats the last row")
    return 1


def _trained(
    table: Table,
    plan: Plan,
    horizon: int,
    tokens: float | None,
    quantiles: list[float] | None,
    folder: str,
    progress: bool,
) -> Predict:
    """Trains on the rows before the held-out ones; the forecasts are in the columns' own units."""
    rows = table.past(plan.held_out, plan.held_out)
    mean, deviation = rows[: plan.train].mean(0), rows[: plan.train].std(0)
    deviation = np.where(deviation > 0, deviation, 1)
    scaled = ((rows - mean) / deviation).astype(np.float32)
    windows = [
        SeriesWindows(part, plan.look_back, horizon)
        for part in (scaled[: plan.train], scaled[plan.train - plan.look_back :])
    ]
    task = _Windows(TaskData(*windows, tokenizer=None, labels="future_values"))
    settings = _settings(windows, tokens, quantiles, folder)
    train(parse_config(task, settings), task, evaluate=False, progress=progress)
    model, _ = load_run(folder)

    def predict(past: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(((past - mean) / deviation).astype(np.float32)).to(model.device)
        with torch.inference_mode():
            output = model(x)
        made = output.prediction_outputs.unsqueeze(-1) if quantiles is None else output.quantile_outputs
        return made.double().cpu().numpy() * deviation[:, None] + mean[:, None]

    return predict


class _Windows(Forecasting):
    """The task of forecasting, on windows that are in memory."""

    def __init__(self, data: TaskData):
        self.data = data

    def load(self, config: Any) -> TaskData:
        return self.data


def _settings(
    windows: list[SeriesWindows], tokens: float | None, quantiles: list[float] | None, folder: str
) -> dict[str, Any]:
    """What differs from the task's preset."""
    train = windows[0]
    batch = min(_BATCH[1], *map(len, windows))
    step = train.look_back * batch
    if tokens is None:
        wanted = max(_PASSES * train.look_back * len(train), _STEPS * step)
        tokens = min(wanted, _NUMBERS / train.channels)
    return {
        "output": folder,
        "data": {"horizon": train.horizon},
        "model": {**small_model(train.look_back), "quantiles": quantiles},
        "training": {"length": train.look_back, "batch_size": batch, "tokens": tokens, "eval_every": 0.2},
    }
