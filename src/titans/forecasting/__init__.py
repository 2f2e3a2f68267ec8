"""Forecasts of tables: a CSV file or a pandas DataFrame in, the rows after its last one out.

``Titans`` is the same forecaster as a model of neuralforecast, imported when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

try:
    import pandas  # noqa: F401
except ImportError as error:
    raise ImportError("forecasts of tables need `pandas`: pip install 'titans[forecast]'") from error

from titans.forecasting.forecast import Forecast, forecast
from titans.forecasting.grid import Table
from titans.forecasting.table import read_table

if TYPE_CHECKING:
    from titans.forecasting.neural import Titans

__all__ = ["Forecast", "Table", "Titans", "forecast", "read_table"]


def __getattr__(name: str) -> Any:
    if name != "Titans":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from titans.forecasting.neural import Titans

    return Titans
