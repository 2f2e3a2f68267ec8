"""How far forecasts were off on held-out rows, beside the seasonal-naive forecast; calibrated quantiles."""

import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from titans.forecasting.grid import Table

_BATCH = 256  # windows forecast at once; no number depends on it
_CALIBRATION = 500  # windows that quantiles are calibrated on at most; neighbours say much the same

# Past [B, look-back, columns] -> quantiles of the future [B, horizon, columns, Q], ascending; Q is 1 for one forecast.
Predict = Callable[[np.ndarray], np.ndarray]


def naive_forecast(past: np.ndarray, season: int, horizon: int) -> np.ndarray:
    """The last season again and again: [B, rows, columns], at least `season` rows, -> [B, horizon, columns]."""
    return past[:, -season:][:, np.arange(horizon) % season]


def backtest(
    predict: Predict, table: Table, first: int, look_back: int, horizon: int, season: int, quantiles: list[float]
) -> pd.DataFrame:
    """Errors of all forecasts that lie whole in the rows from `first` on, one beginning at each row.

    Each is made from the rows before it alone, and measured on known values alone.

    Args:
        table: at least `look_back` and `season` rows before `first`.
        quantiles: what is forecast, 0.5 among them, which errors are taken of.

    Returns:
        A row a column: `MAE` and `naive MAE` in the column's own units, NaN where no value is known; `MASE` and `naive
        MASE`, which are those over the mean seasonal difference of the rows before `first`, NaN where that is 0. Where
        there is more than the median, also the shares of values at or below each quantile, such as `below q0.1`, and
        between the outermost two.
    """
    values, rows, median = table.values.to_numpy(), max(look_back, season), quantiles.index(0.5)
    total, count = np.zeros((2, values.shape[1])), np.zeros(values.shape[1])
    below = np.zeros((values.shape[1], len(quantiles)))
    for past, truth in _windows(table, range(first, len(values) - horizon + 1), rows, horizon):
        count += (~np.isnan(truth)).sum((0, 1))
        made = predict(past[:, -look_back:])
        below += (truth[..., None] <= made).sum((0, 1))  # no value that is missing
        for index, point in enumerate((made[..., median], naive_forecast(past, season, horizon))):
            total[index] += np.nansum(np.abs(point - truth), (0, 1))
    known = values[:first]
    seasonal = pd.DataFrame(np.abs(known[season:] - known[:-season])).mean().to_numpy()
    count = np.where(count > 0, count, np.nan)
    mae = total / count
    mase = mae / np.where(seasonal > 0, seasonal, np.nan)
    columns = dict(zip(("MAE", "naive MAE", "MASE", "naive MASE"), (*mae, *mase), strict=True))
    if len(quantiles) > 1:
        columns |= {f"below q{q:g}": below[:, i] / count for i, q in enumerate(quantiles)}
        columns[f"q{quantiles[0]:g} to q{quantiles[-1]:g}"] = (below[:, -1] - below[:, 0]) / count
    return pd.DataFrame(columns, index=table.values.columns)


def calibrated(
    predict: Predict, table: Table, begins: range, look_back: int, horizon: int, quantiles: list[float]
) -> Predict:
    """The same forecasts, each quantile of a column shifted so that as many known values lie below it as it says.

    Split-conformal: a quantile is shifted by that quantile of the differences between the truth and its forecast, over
    all steps of the forecasts that begin at `begins`. The median, which is the forecast itself, stays where it is, no
    other quantile is moved across it, and where no value of a column is known, none is moved.
    """
    some = begins[:: math.ceil(len(begins) / _CALIBRATION)]
    off = np.concatenate(
        [truth[..., None] - predict(past) for past, truth in _windows(table, some, look_back, horizon)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column of which nothing is known
        # "weibull": of n differences the k-th is the quantile k / (n + 1), as for a value that is to come
        parts = [np.nanquantile(off[..., i], q, (0, 1), method="weibull") for i, q in enumerate(quantiles)]
    shift, median = np.nan_to_num(np.stack(parts, -1)), quantiles.index(0.5)
    lower = np.arange(len(quantiles)) < median

    def shifted(past: np.ndarray) -> np.ndarray:
        made = predict(past)
        middle, moved = made[..., median, None], made + shift
        moved[..., median] = made[..., median]
        return np.sort(np.where(lower, np.minimum(moved, middle), np.maximum(moved, middle)), -1)

    return shifted


def _windows(table: Table, begins: range, rows: int, horizon: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of `rows` rows before each beginning, filled, and of the `horizon` rows from it on, NaN where unknown."""
    values = table.values.to_numpy()
    for start in range(0, len(begins), _BATCH):
        batch = begins[start : start + _BATCH]
        yield (
            np.stack([table.past(begin, rows) for begin in batch]),
            np.stack([values[begin : begin + horizon] for begin in batch]),
        )
