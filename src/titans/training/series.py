"""Time series: CSV files, the literature's splits and scaling, windows of look-back and horizon. No torch here."""

import re
from pathlib import Path

import numpy as np

from titans.training.config import require
from titans.training.text import expand, read_csv

MONTH = 30 * 24  # hours, and rows of an hourly series


def read_series(path: str | Path) -> np.ndarray:
    """The numbers of a CSV file (also .gz, .xz), float64 [rows, channels].

    The first line names the columns; the first column is `date` and is not looked into, all others are channels.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty file, another first column, a line of another length, a cell that is no finite number.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"data.path={str(path)!r} does not exist; give a CSV file")
    header, rows, lines = read_cells(path)
    if header[0] != "date" or len(header) < 2:
        raise ValueError(
            f"{path} has the columns {', '.join(header[:3])}...; it must begin with one of dates named 'date', "
            "followed by columns of numbers"
        )
    return np.stack([_numbers(cells, header, f"{path}, line {line}") for cells, line in zip(rows, lines, strict=True)])


def read_cells(path: str | Path) -> tuple[list[str], list[list[str]], list[int]]:
    """The names in a CSV file's first line, the cells of the others, and where in the file each of them ends.

    Raises:
        ValueError: an empty file, a line of another length, no text.
    """
    (_, header), *lines = read_csv(path)
    return header, [cells for _, cells in lines], [number for number, _ in lines]


def _numbers(cells: list[str], header: list[str], where: str) -> np.ndarray:
    try:
        row = np.array(cells[1:], dtype=np.float64)
    except ValueError:
        row = np.array([_number(cell) for cell in cells[1:]])
    if not np.isfinite(row).all():
        column = 1 + int(np.flatnonzero(~np.isfinite(row))[0])
        raise ValueError(
            f"{where}, column {header[column]!r} holds {cells[column]!r}, no finite number; fill the gap, or remove "
            "the row or the column"
        )
    return row


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def borders(path: str | Path, rows: int) -> dict[str, tuple[int, int]]:
    """The rows of each split, from the first to one past the last, as Informer and Autoformer have them.

    Files named ETTh* and ETTm* (an hour or a quarter of it a row): 12, 4 and 4 months of 30 days, the rest is not used.
    Any other: the first 70 % are trained on, the last 20 % are the test.

    Raises:
        ValueError: an ETT file with fewer rows than twenty months.
    """
    ett = re.match(r"ETT([hm])", Path(path).name)
    if ett:
        month = MONTH * {"h": 1, "m": 4}[ett.group(1)]
        train, validation, test = 12 * month, 16 * month, 20 * month
        require(rows >= test, f"rows of {Path(path).name}", rows, f"at least {test}, or a file of another name")
    else:
        train, validation, test = int(rows * 0.7), rows - int(rows * 0.2), rows
    return {"train": (0, train), "validation": (train, validation), "test": (validation, test)}


class SeriesWindows:
    """Windows of stride 1: `{"past_values": float32 [look-back, channels], "future_values": [horizon, channels]}`.

    Args:
        values: [rows, channels], at least one window of them.
    """

    def __init__(self, values: np.ndarray, look_back: int, horizon: int):
        self.values, self.look_back, self.horizon = values, look_back, horizon

    @property
    def channels(self) -> int:
        return self.values.shape[1]

    def __len__(self) -> int:
        return len(self.values) - self.look_back - self.horizon + 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        middle = index + self.look_back
        return {"past_values": self.values[index:middle], "future_values": self.values[middle : middle + self.horizon]}


def load_windows(path: str | None, look_back: int, horizon: int) -> dict[str, SeriesWindows]:
    """The windows of a file's splits, scaled by the mean and standard deviation of each channel's train rows.

    Windows of `validation` and `test` look back into the rows before them: the first row of the split is the first that
    is forecast. A channel that is constant in the train rows is shifted alone.

    Raises:
        FileNotFoundError, ValueError: what `read_series` and `borders` raise; no path; a split of too few rows.
    """
    if path is None:
        raise ValueError("data.path=None is not valid; use a CSV file")
    path = expand(path)
    values = read_series(path)
    splits = borders(path, len(values))
    for split, (begin, end) in splits.items():
        needed = horizon + look_back * (split == "train")
        mend = (
            f"at least {needed} (look-back {look_back}, horizon {horizon}), or shorten training.length or data.horizon"
        )
        require(end - begin >= needed, f"{split} rows of {Path(path).name}", end - begin, mend)
    train = values[slice(*splits["train"])]
    deviation = train.std(0)
    values = ((values - train.mean(0)) / np.where(deviation > 0, deviation, 1)).astype(np.float32)
    return {
        split: SeriesWindows(values[max(0, begin - look_back) : end], look_back, horizon)
        for split, (begin, end) in splits.items()
    }
