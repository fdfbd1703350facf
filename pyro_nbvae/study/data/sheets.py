"""Tables of numbers in text files, ``.csv`` and ``.tsv``: one row for each observation."""

from __future__ import annotations

import re
import warnings
from collections.abc import Hashable
from pathlib import Path

import numpy as np
import pandas as pd

from pyro_nbvae.errors import InputError
from pyro_nbvae.study.data.arrays import as_tensors, hold_out
from pyro_nbvae.study.data.base import Split
from pyro_nbvae.study.errors import first_line
from pyro_nbvae.study.tree import DEFAULT_READING, Reading

# Names of columns, in lower case, that hold labels, and that number the rows.
LABELS = {"label", "labels", "class", "classes", "target"}
NUMBERING = {"", "id", "index"}


def _cells(path: Path) -> pd.DataFrame:
    """Read all cells as text; rows and columns are numbered from 1, and empty rows are left out."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            line = next((line for line in file if line.strip()), "")
        separator = "\t" if "\t" in line else ";" if ";" in line else ","
        cells = pd.read_csv(
            path,
            sep=separator,
            header=None,
            dtype=str,
            keep_default_na=False,
            skip_blank_lines=False,
            encoding="utf-8-sig",
        )
    except Exception as error:  # of several kinds
        raise InputError(f"{path} cannot be read as a table: {first_line(error)}") from None
    cells = cells.fillna("").apply(lambda column: column.str.strip())
    cells.index, cells.columns = cells.index + 1, cells.columns + 1
    return cells[(cells != "").any(axis=1)]


def _numbers(column: pd.Series) -> pd.Series:
    """Return a column as numbers, NaN where a cell is not one."""
    return pd.to_numeric(column.replace({"True": "1", "False": "0"}), errors="coerce")


def _has_header(cells: pd.DataFrame, numbers: pd.DataFrame) -> bool:
    first, rest = cells.iloc[0], numbers.iloc[1:]
    named = set(first.str.lower()) & (LABELS | NUMBERING - {""})
    # a row without a number, or a text above nothing but numbers
    text = bool(numbers.iloc[0].isna().all() or (numbers.iloc[0].isna() & rest.notna().all()).any())
    numbered = len(first) > 2 and list(first) == [str(k) for k in range(len(first))]  # as pandas numbers columns
    return bool(named) or text or numbered


def read_sheet(path: Path, reading: Reading) -> Split:
    """Read a table of numbers; a fold of its rows is held out.

    A first row of names is recognised. The column that ``reading.labels`` names, or one named label, labels, class,
    classes or target, holds the labels; the one that ``reading.group`` names is no part of the data either. A first
    column without a name, or one named id or index, is left out with a warning if it numbers the rows.

    Raises:
        InputError: for a file that is not a table, or a cell that is not a number.
    """
    cells = _cells(path)
    if not len(cells):
        raise InputError(f"{path} is empty: expected one row of numbers for each observation")
    numbers = cells.apply(_numbers)
    names = dict.fromkeys(cells, "")
    header = _has_header(cells, numbers)
    if header:
        names = {column: name.lstrip("# ") for column, name in cells.iloc[0].items()}
        cells = cells.iloc[1:]
        numbers = cells.apply(_numbers)
    numbered = {name: column for column, name in names.items() if name}
    for name in (reading.group, reading.labels if reading.labels != DEFAULT_READING.labels else None):
        if name is not None and name not in numbered and not reading.whole:
            raise InputError(f"{path} has no column {name}: it has {', '.join(numbered) or 'no names of columns'}")
        if name is not None and (number := list(names.values()).count(name)) > 1:
            raise InputError(f"{path} has {number} columns {name}: rename all but one")
    of_group = numbered.get(reading.group or "")
    of_labels = [k for k, name in names.items() if name.lower() in LABELS and k != of_group]
    others: list[Hashable] = []
    if reading.labels != DEFAULT_READING.labels:
        others = [k for k in of_labels if names[k] != reading.labels]
        of_labels = [numbered[reading.labels]] if reading.labels in numbered else []
    left_out = [
        column
        for column, name in names.items()
        if header
        and name.lower() in NUMBERING
        and (name or column == 1)
        and column not in (of_group, *of_labels)
        and _is_numbering(numbers[column])
    ]
    if left_out:
        shown = " and ".join(f"{names[k]!r}" if names[k] else "without a name" for k in left_out)
        warnings.warn(f"{path}: the column {shown} numbers the rows and is not used: rename it to use it", stacklevel=2)
    if others:
        shown = ", ".join(names[column] for column in others)
        warnings.warn(f"{path}: {shown} is not used, because --labels is {reading.labels}", stacklevel=2)
    if len(of_labels) > 1:
        raise InputError(
            f"{path} has several columns of labels, {', '.join(names[k] for k in of_labels)}: rename all but one"
        )
    columns = [column for column in cells if column not in (*left_out, *others, *of_labels, of_group)]
    data = numbers[columns]

    def place(_: str, at: list[int]) -> str:
        column = columns[at[1]]
        return f"row {cells.index[at[0]]}, column {column}" + (f" ({names[column]})" if names[column] else "")

    wrong = np.argwhere(data.isna().to_numpy())
    if len(wrong):
        row, column = wrong[0].tolist()
        text = cells[columns[column]].iloc[row]
        remedy = (
            "fill it, or delete the row"
            if not text
            else "write decimals with a point"
            if re.fullmatch(r"[+-]?\d*,\d+", text)
            else "correct it, or delete its column; a column of classes must be named label in a first row of names"
        )
        raise InputError(
            f"{path}: {place('', [row, column])} is {repr(text) if text else 'empty'}, expected a number: {remedy}"
        )
    array = data.to_numpy(copy=True)  # pandas may not let its own be written
    (x,) = as_tensors(path, {"table": array}, place)
    groups = None if of_group is None else cells[of_group].to_numpy(str)
    if not of_labels:
        return hold_out(x, None, reading, groups)
    labels, coded = cells[of_labels[0]], numbers[of_labels[0]]
    if (labels == "").any():
        row = int(labels.index[labels == ""][0])
        raise InputError(f"{path}: row {row} has no {names[of_labels[0]]}: fill it, or delete the row")
    return hold_out(x, (labels.to_numpy(str) if coded.isna().any() else coded.to_numpy()), reading, groups)


def _is_numbering(column: pd.Series) -> bool:
    return bool(column.notna().all() and (column == column.round()).all() and column.is_unique)
