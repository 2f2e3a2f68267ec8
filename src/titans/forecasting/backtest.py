"""How far forecasts were off on held-out rows, beside the seasonal-naive forecast."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from titans.forecasting.grid import Table

_BATCH = 256  # windows forecast at once; no number depends on it


def naive_forecast(past: np.ndarray, season: int, horizon: int) -> np.ndarray:
    """The last season again and again: [B, rows, columns], at least `season` rows, -> [B, horizon, columns]."""
    return past[:, -season:][:, np.arange(horizon) % season]


def backtest(
    predict: Callable[[np.ndarray], np.ndarray], table: Table, first: int, look_back: int, horizon: int, season: int
) -> pd.DataFrame:
    """Errors of all forecasts that lie whole in the rows from `first` on, one beginning at each row.

    Each is made from the rows before it alone, and measured on known values alone.

    Args:
        predict: past [B, look_back, columns] -> future [B, horizon, columns].
        table: at least `look_back` and `season` rows before `first`.

    Returns:
        A row a column: `MAE` and `naive MAE` in the column's own units, NaN where no value is known; `MASE` and `naive
        MASE`, which are those over the mean seasonal difference of the rows before `first`, NaN where that is 0.
    """
    begins = range(first, len(table.values) - horizon + 1)
    values, rows = table.values.to_numpy(), max(look_back, season)
    total, count = np.zeros((2, values.shape[1])), np.zeros(values.shape[1])
    for start in range(0, len(begins), _BATCH):
        batch = begins[start : start + _BATCH]
        past = np.stack([table.past(begin, rows) for begin in batch])
        truth = np.stack([values[begin : begin + horizon] for begin in batch])
        count += (~np.isnan(truth)).sum((0, 1))
        for index, made in enumerate((predict(past[:, -look_back:]), naive_forecast(past, season, horizon))):
            total[index] += np.nansum(np.abs(made - truth), (0, 1))
    known = values[:first]
    seasonal = pd.DataFrame(np.abs(known[season:] - known[:-season])).mean().to_numpy()
    mae = total / np.where(count > 0, count, np.nan)
    mase = mae / np.where(seasonal > 0, seasonal, np.nan)
    columns = dict(zip(("MAE", "naive MAE", "MASE", "naive MASE"), (*mae, *mase), strict=True))
    return pd.DataFrame(columns, index=table.values.columns)
