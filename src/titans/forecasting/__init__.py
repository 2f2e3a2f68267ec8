"""Forecasts of tables: a CSV file or a pandas DataFrame in, the rows after its last one out."""

try:
    import pandas  # noqa: F401
except ImportError as error:
    raise ImportError("forecasts of tables need `pandas`: pip install 'titans[forecast]'") from error

from titans.forecasting.forecast import Forecast, forecast
from titans.forecasting.grid import Table
from titans.forecasting.table import read_table

__all__ = ["Forecast", "Table", "forecast", "read_table"]
