"""Series on a regular grid of stamps: order, duplicates, step, gaps and missing values."""

# pandas has no types of its own.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportReturnType=false

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

_RUN = 10  # so many equal steps that are not the usual one are another frequency, fewer are gaps


@dataclass
class Table:
    """Regular series.

    Attributes:
        values: float64 [rows, columns], NaN where nothing is known; the index holds the stamps, a step apart.
        step: from one stamp to the next: a Timedelta, or an offset for months and for business days.
        notes: what was mended.
    """

    values: pd.DataFrame
    step: pd.Timedelta | pd.offsets.BaseOffset
    notes: list[str] = field(default_factory=list)

    @cached_property
    def filled(self) -> pd.DataFrame:
        """The values with what is missing put on a line between its neighbours; at the ends, the nearest value."""
        return self.values.interpolate(limit_direction="both")

    @cached_property
    def _carried(self) -> np.ndarray:
        return self.values.ffill().to_numpy()

    def past(self, end: int, length: int) -> np.ndarray:
        """The `length` rows before row `end`, filled from rows before `end` alone: float64 [length, columns]."""
        rows = slice(end - length, end)
        missing = self.values.to_numpy()[rows]
        open_ended = np.logical_and.accumulate(np.isnan(missing)[::-1])[::-1]  # nothing is known from here to `end`
        return np.where(open_ended, self._carried[rows], self.filled.to_numpy()[rows])

    def stamps_after(self, count: int) -> pd.DatetimeIndex:
        """The next `count` stamps after the last row's."""
        return pd.date_range(self.values.index[-1], periods=count + 1, freq=self.step)[1:]

    @property
    def summary(self) -> str:
        """How much there is, and how far apart."""
        stamps = self.values.index
        size = f"{_count(len(stamps), 'row')} of {_count(self.values.shape[1], 'column')}"
        return f"{size}, {stamps[0]} to {stamps[-1]}, {self.step_name} apart; a season of {_count(self.season, 'row')}"

    @property
    def step_name(self) -> str:
        """The step in words."""
        if isinstance(self.step, pd.Timedelta):
            return words(self.step)
        if isinstance(self.step, pd.offsets.BusinessDay):
            return "1 business day"
        return _count(_months(self.step), "month")

    @property
    def season(self) -> int:
        """Rows of the nearest natural cycle: a day, a week of days, a year of weeks, months or quarters; else 1."""
        if isinstance(self.step, pd.Timedelta):
            day, minute = pd.Timedelta(days=1), pd.Timedelta(minutes=1)
            if minute <= self.step < day and not day % self.step:
                return day // self.step
            return {1: 7, 7: 52}.get(self.step.days, 1) if not self.step % day else 1
        if isinstance(self.step, pd.offsets.BusinessDay):
            return 5
        return {1: 12, 3: 4}.get(_months(self.step), 1)


def regular(numbers: pd.DataFrame, name: str, notes: list[str]) -> Table:
    """Series of numbers by their stamps, in any order, on a regular grid.

    Rows are sorted; rows of one stamp become their mean; stamps that are missing are put in, without values.

    Raises:
        ValueError: fewer than two stamps; most rows share their stamp with another; two frequencies; stamps that are
            not on the grid of the usual step; more rows or values missing than known.
    """
    if not numbers.index.is_monotonic_increasing:
        notes.append("the stamps were not in order; rows sorted")
    values = numbers.groupby(level=0).mean()
    repeated = len(numbers) - len(values)
    if repeated:
        _check_repeated(numbers.index, name)
        notes.append(f"{_count(repeated, 'row')} of a stamp that was there already; each stamp has its rows' mean")
    if len(values) < 2:
        raise ValueError(f"{name} has one row, {values.index[0]}; give it more, the step between rows takes two")
    step = _usual_step(values.index, name)
    grid = pd.date_range(values.index[0], values.index[-1], freq=step)
    outside = ~values.index.isin(grid)
    if outside.any():
        deltas = values.index.to_series().diff()
        raise ValueError(_two_steps(name, deltas.mode()[0], deltas, int(outside.argmax())))
    table = Table(values.reindex(grid.rename(values.index.name)), step, notes)
    _note_gaps(grid, values.index, notes)
    for column in values.columns:
        _note_missing(column, values[column], table, name)
    return table


def _check_repeated(stamps: pd.Index, name: str) -> None:
    shared = stamps.duplicated(keep=False)
    if 2 * shared.sum() > len(stamps):
        raise ValueError(
            f"{name} has {shared.sum()} of {len(stamps)} rows with a stamp that another has too, such as "
            f"{stamps[shared][0]}; give every series a column of its own, and dates with their time of day"
        )


def _usual_step(stamps: pd.DatetimeIndex, name: str) -> pd.Timedelta | pd.offsets.BaseOffset:
    """The commonest step (the shortest of several), in months where all stamps are on one day of the month."""
    deltas = stamps.to_series().diff()
    usual = pd.Timedelta(deltas.mode()[0])
    runs = deltas.groupby((deltas != deltas.shift()).cumsum()).transform("size")
    other = ((runs >= _RUN) & (deltas != usual)).to_numpy()
    if other.any():
        raise ValueError(_two_steps(name, usual, deltas, int(other.argmax())))
    rows = round((stamps[-1] - stamps[0]) / usual) + 1
    if rows > 2 * len(stamps):
        raise ValueError(
            f"{name} has {_count(len(stamps), 'row')} of the {rows:,} that its usual step, {words(usual)}, makes from "
            f"{stamps[0]} to {stamps[-1]}: most would be made up; give the rows of a stretch with fewer gaps, or of a "
            "longer step"
        )
    if usual >= pd.Timedelta(days=28):
        months = int(pd.Series(np.diff(stamps.year * 12 + stamps.month)).mode()[0])
        if stamps.is_month_end.all():
            return pd.offsets.MonthEnd(months)
        if (stamps.day == stamps.day[0]).all():
            return pd.DateOffset(months=months)
    if usual == pd.Timedelta(days=1) and rows > 7 and (stamps.dayofweek < 5).all():
        return pd.offsets.BusinessDay()
    return usual


def _two_steps(name: str, usual: pd.Timedelta, deltas: pd.Series, place: int) -> str:
    return (
        f"{name} has two frequencies: its usual step is {words(usual)}, but from {deltas.index[place - 1]} to "
        f"{deltas.index[place]} it is {words(deltas.iloc[place])}; bring all rows to one step, or give those of one"
    )


def _note_gaps(grid: pd.DatetimeIndex, stamps: pd.Index, notes: list[str]) -> None:
    gaps = grid.difference(stamps)
    if len(gaps):
        notes.append(f"{_count(len(gaps), 'row')} missing, the first at {gaps[0]}; put in and interpolated")


def _note_missing(column: str, values: pd.Series, table: Table, name: str) -> None:
    """`values`: of the rows that were there; the table has those put in as well."""
    missing, all_missing = int(values.isna().sum()), int(table.values[column].isna().sum())
    rows = len(table.values)
    if 2 * all_missing > rows:
        raise ValueError(
            f"{name}, column {column!r} has values in {rows - all_missing} of {rows} rows, too few to fill the others; "
            "remove it, or choose other columns with target"
        )
    if missing:
        table.notes.append(
            f"column {column!r}: {_count(missing, 'value')} missing, the first at {values.isna().idxmax()}; "
            "interpolated, at the ends the nearest value"
        )


def words(delta: pd.Timedelta) -> str:
    """15 minutes, 1 hour, 7 days: in the largest unit that needs no fraction."""
    for unit in ("day", "hour", "minute", "second"):
        if not delta % pd.Timedelta(1, unit):
            return _count(delta // pd.Timedelta(1, unit), unit)
    return str(delta)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _months(step: pd.offsets.BaseOffset) -> int:
    return getattr(step, "months", step.n)
