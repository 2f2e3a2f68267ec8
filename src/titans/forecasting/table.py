"""Tables as people have them: which column holds the dates, which hold numbers, and what is neither."""

# pandas has no types of its own.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from titans.forecasting.grid import Table, regular
from titans.training.config import nearest, require
from titans.training.series import read_cells

MISSING = ("", "nan", "na", "n/a", "<na>", "nat", "null", "none")  # however they are written
_HEAD = 100  # rows that show what a column holds


def read_table(
    source: str | os.PathLike | pd.DataFrame, targets: Sequence[str] | None = None, time_column: str | None = None
) -> Table:
    """The numbers of a CSV file (also .gz, .xz) or a DataFrame as regular series, with notes of what was mended.

    Args:
        source: the file begins with a line of names; a frame's DatetimeIndex counts as its first column.
        targets: columns to take; by default all that hold numbers.
        time_column: by default the first column of dates. Plain numbers, such as years, are dates only if named here.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no dates or no numbers, a cell that is neither a number nor missing, a cell that is no date, and
            what ``regular`` refuses; the message names the place and the mend.
    """
    name, cells = _cells(source)
    repeated = cells.columns[cells.columns.duplicated()]
    if len(repeated):
        raise ValueError(f"{name} has two columns named {repeated[0]!r}; rename one of them")
    time = _time_column(cells, name) if time_column is None else time_column
    require(time in cells.columns, "time_column", time, nearest(time, cells.columns))
    notes: list[str] = []
    columns = _number_columns(cells.drop(columns=time), name, notes) if targets is None else list(targets)
    for column in columns:
        others = cells.columns.drop(time)
        require(column in others, "target", column, nearest(column, others))
    numbers = pd.DataFrame({column: _numbers(cells[column], name) for column in columns})
    stamps = _stamps(cells[time], name)
    return regular(numbers.set_index(pd.DatetimeIndex(stamps, name=time or "date")), name, notes)


def _cells(source: str | os.PathLike | pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """A name for messages, and the cells; the index says where they stand."""
    if isinstance(source, pd.DataFrame):
        dated = isinstance(source.index, pd.DatetimeIndex)
        cells = source.rename_axis(index=source.index.name or "date").reset_index() if dated else source
        if not len(cells):
            raise ValueError("the table is empty; give it a row for each date")
        return "the table", cells.set_axis(cells.columns.map(str), axis=1).set_axis(
            pd.RangeIndex(len(cells), name="row")
        )
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"data={str(path)!r} does not exist; give a CSV file")
    header, rows, lines = read_cells(path)
    return path.name, pd.DataFrame(rows, columns=pd.Index(header), index=pd.Index(lines, name="line"))


def _time_column(cells: pd.DataFrame, name: str) -> str:
    for column in cells.columns:
        if _looks_dated(cells[column].head(_HEAD)):
            return column
    raise ValueError(
        f"{name} has no column of dates, but {', '.join(map(repr, cells.columns[:8]))}; add one, written as "
        "2016-07-01 00:15:00, or name it in time_column"
    )


def _looks_dated(cells: pd.Series) -> bool:
    """Most cells are dates; plain numbers and words are none."""
    if pd.api.types.is_datetime64_any_dtype(cells):
        return True
    text = cells.astype(str)
    parts = text.str.contains(r"\d\D+\d") & pd.to_numeric(text, errors="coerce").isna()
    return bool(2 * parts.sum() > len(cells) and 2 * _readings(cells)[0].notna().sum() > len(cells))


def _stamps(cells: pd.Series, name: str) -> pd.Series:
    stamps, *others = _readings(cells)
    if stamps.isna().any():
        place = stamps.isna().idxmax()
        raise ValueError(
            f"{name}, {cells.index.name} {place}, column {cells.name!r} holds {str(cells[place])!r}, no date like the "
            "others; write it as 2016-07-01 00:15:00, or remove the row"
        )
    for other in others:
        unlike = other != stamps
        if other.notna().all() and unlike.any():
            raise ValueError(
                f"{name}, column {cells.name!r} holds {str(cells[unlike.idxmax()])!r}, which may be day or month "
                "first, as may all its dates; write them as 2016-07-01"
            )
    if _looks_dated(pd.Series([cells.name])):
        raise ValueError(f"{name} begins with the date {cells.name!r}; give it a first line of names")
    return stamps


def _readings(cells: pd.Series) -> list[pd.Series]:
    """The stamps, NaT for a cell that is none: year first (ISO 8601), or else in the form of the first cell.

    Such a form may have the month or the day first; the reading that knows more of the cells comes first.
    """
    if pd.api.types.is_datetime64_any_dtype(cells):
        return [cells]
    text = cells.astype(str).str.strip()
    iso = _parse(text, format="ISO8601")
    if 2 * iso.notna().sum() > len(text):
        return [iso]
    return sorted((_parse(text), _parse(text, dayfirst=True)), key=lambda stamps: -stamps.notna().sum())


def _parse(text: pd.Series, **form) -> pd.Series:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a form was guessed
        try:
            return pd.to_datetime(text, errors="coerce", **form)
        except ValueError:  # offsets from UTC that change, as with summer time
            return pd.to_datetime(text, errors="coerce", utc=True, **form)


def _number_columns(cells: pd.DataFrame, name: str, notes: list[str]) -> list[str]:
    """The columns with a name whose cells are numbers, at least half of those that are not missing."""
    numbers, others = [], []
    for column in cells.columns:
        values, missing = _parsed(cells[column])
        kept = column and 2 * values.notna().sum() >= (~missing).sum()
        (numbers if kept else others).append(column)
    if others:
        notes.append(f"left out, having no numbers or no name: {', '.join(map(repr, others))}")
    if not numbers:
        raise ValueError(f"{name} has no column of numbers beside its dates; add one")
    return numbers


def _parsed(cells: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Numbers, NaN for what is none, and where a cell is missing."""
    text = cells.astype(str).str.strip()
    missing = cells.isna() | text.str.lower().isin(MISSING)
    return pd.to_numeric(text.mask(missing), errors="coerce").astype(np.float64), missing


def _numbers(cells: pd.Series, name: str) -> np.ndarray:
    values, missing = _parsed(cells)
    wrong = ~missing & ~np.isfinite(values)
    if wrong.any():
        place = wrong.idxmax()
        raise ValueError(
            f"{name}, {cells.index.name} {place}, column {cells.name!r} holds {str(cells[place])!r}, no finite number; "
            "correct it, leave the cell empty, or choose other columns with target"
        )
    return values.to_numpy()
