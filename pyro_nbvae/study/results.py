"""Saved results, one row per finished run, in ``results/SCALE.csv``. Tables, claims and curves need only these rows.

A row contains the position of the run in a grid (``data``, ``run``, ``seed``), its provenance (commit, machine,
threads, date), its resolved configuration as JSON, and all metrics. Rows are added by a command, never by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pyro_nbvae.errors import InputError
from pyro_nbvae.study.config import SAMPLERS, SamplerName, TrainConfig
from pyro_nbvae.study.files import write_text
from pyro_nbvae.study.folder import SCHEMA, metrics_file, upgraded, with_sampler
from pyro_nbvae.study.grid import Cell

Row = dict[str, Any]
Key = tuple[str, str, int]

# Folder of the saved rows, in the repository.
RESULTS = Path("results")
# Fields of a configuration that do not affect the results of a run.
_PLACE = ("device", "data_root")
_KEY = ("data", "run", "seed")
# Significant digits of saved values; tables show fewer.
_DIGITS = 7


def _what(config: TrainConfig) -> str:
    """Return a configuration as text, without the fields that do not affect the results.

    The version of run folders is part of it, so that rows of models of an older version do not count.
    """
    fields = {k: v for k, v in asdict(config).items() if k not in _PLACE}
    return json.dumps({"schema_version": SCHEMA, **fields}, sort_keys=True)


def key_of(cell: Cell, sampler: SamplerName = "prior") -> Key:
    """Return the key of a cell's row. Samplers other than the prior have separate rows."""
    run = cell.folder.parent
    return run.parent.name, with_sampler(run.name, sampler), cell.config.seed


def _row(cell: Cell, sampler: SamplerName, samples: int) -> Row | None:
    """Return the row of a cell, or None if its folder has no finished run that was evaluated with these samples."""
    try:
        config = cell.run.config()[0]
    except InputError:
        return None
    metrics = cell.run.read_json(metrics_file(sampler))
    if not cell.are_final(metrics, samples) or _what(config) != _what(cell.config):
        return None
    figures = {k: v for k, v in metrics.items() if k not in ("data", "seed") and v is not None}
    about = {
        k: ", ".join(map(str, v)) if isinstance(v, list) else v
        for k, v in figures.items()
        if not k.endswith("_per_unit")
    }
    return {**dict(zip(_KEY, key_of(cell, sampler), strict=True)), "config": _what(config), **about}


def rows_of(grid: Iterable[Cell], samples: int) -> dict[Key, Row]:
    """Return the rows of the finished runs of a grid, from their folders.

    Args:
        grid: the cells.
        samples: number of samples for FID and KID; evaluations with another number do not count.
    """
    pairs = [(cell, sampler) for cell in grid for sampler in SAMPLERS]
    return {key_of(cell, sampler): row for cell, sampler in pairs if (row := _row(cell, sampler, samples))}


def read(path: Path) -> dict[Key, Row]:
    """Read the rows of a file; without a file there are none.

    Raises:
        InputError: for a file that does not contain such rows.
    """
    import pandas as pd

    if not path.exists():
        return {}
    try:
        table = pd.read_csv(path, dtype={"seed": int, "commit": str, "version": str})
        rows: list[Row] = [{str(k): v for k, v in row.items() if not pd.isna(v)} for row in table.to_dict("records")]
        for row in rows:
            row["config"] = json.dumps(upgraded(json.loads(row["config"])), sort_keys=True)
        return {(str(row["data"]), str(row["run"]), int(row["seed"])): row for row in rows}
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a table of results ({error}): restore it from version control") from None


def write(path: Path, rows: dict[Key, Row]) -> None:
    """Write the rows in sorted order, so that a new run adds one line and changes no other."""
    import pandas as pd

    ordered = [rows[key] for key in sorted(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, pd.DataFrame(ordered).to_csv(index=False, float_format=f"%.{_DIGITS}g"))


def keep(path: Path, grid: Iterable[Cell], samples: int) -> dict[Key, Row]:
    """Add the finished runs of a grid to a file of rows, and return all rows of the file; see :func:`rows_of`.

    If a run has been trained anew, the rows of its other samplers are those of the old model, and go.
    """
    rows = read(path)
    grid = list(grid)
    new = rows_of(grid, samples)
    for cell in grid:
        prior, *others = (key_of(cell, sampler) for sampler in SAMPLERS)
        if prior in new and prior in rows and new[prior].get("date") != rows[prior].get("date"):
            for key in others:
                rows.pop(key, None)
    if new:
        rows |= new
        write(path, rows)
    return rows


def of_cell(rows: dict[Key, Row], cell: Cell, sampler: SamplerName = "prior") -> Row | None:
    """Return the saved row of a cell; None if there is none, or if it has another configuration."""
    row = rows.get(key_of(cell, sampler))
    return row if row is not None and row["config"] == _what(cell.config) else None
