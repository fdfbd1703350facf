"""Saved results, one row per finished run, in ``results/SCALE.csv``. Tables, comparisons and curves need only these.

A row contains the position of the run in a grid (``data``, ``run``, ``seed``), its provenance (commit, machine,
threads, date), its resolved configuration as JSON, and all metrics. Rows are added by a command, never by hand.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pyro_nbvae.errors import InputError
from pyro_nbvae.study.config import to_json
from pyro_nbvae.study.evaluation import settings
from pyro_nbvae.study.files import write_text
from pyro_nbvae.study.folder import SAMPLERS, SCHEMA, metrics_file, with_sampler
from pyro_nbvae.study.tables import Cell
from pyro_nbvae.study.tree import TrainConfig

# Folder of the saved rows, in the repository.
RESULTS = Path("results")
# Options that do not affect the results of a run, and those of its training.
_PLACE = ("device", "data_root")
_MANNER = ("deterministic",)
# What identifies a row: a file has one for each position, and it counts only with the configuration of a cell.
_POSITION = ["data", "run", "seed"]
_KEY = [*_POSITION, "config"]


def stored_config(config: TrainConfig[Any]) -> str:
    """Return a configuration as text, without the options that do not affect the results.

    The version of run folders is part of it, so that rows of models of an older version do not count.
    """
    stored = {k: v for k, v in to_json(config).items() if k not in _PLACE}
    stored["training"] = {k: v for k, v in stored["training"].items() if k not in _MANNER}
    return json.dumps({"schema_version": SCHEMA, **stored}, sort_keys=True)


def is_final(cell: Cell, metrics: dict[str, Any], samples: int) -> bool:
    """Whether metrics are of the run of a cell after its last epoch, evaluated as a table's are."""
    if not metrics.items() >= settings(cell.config.training.epochs or 0, 0, samples).items():
        return False
    try:
        return stored_config(cell.run.config()[0]) == stored_config(cell.config)
    except InputError:  # it cannot be read
        return False


def _places(grid: Sequence[Cell]) -> pd.DataFrame:
    """Return the keys of the rows of a grid, with the cell, its label and the sampler."""
    lines = [
        (cell.data, with_sampler(cell.folder.parent.name, sampler), cell.config.seed, text, cell.label, sampler, cell)
        for cell, text in ((cell, stored_config(cell.config)) for cell in grid)
        for sampler in SAMPLERS
    ]
    return pd.DataFrame(lines, columns=[*_KEY, "label", "sampler", "cell"])


def select(rows: pd.DataFrame, grid: Sequence[Cell]) -> pd.DataFrame:
    """Return the rows of a grid in its order, with columns ``label`` and ``sampler``."""
    return _places(grid).drop(columns="cell").merge(rows, on=_KEY)


def finished(grid: Sequence[Cell], samples: int) -> pd.DataFrame:
    """Return the rows of the finished runs of a grid, from their folders.

    Args:
        grid: the cells.
        samples: number of samples for FID and KID; evaluations with another number do not count.
    """
    rows: list[dict[str, Any]] = []
    for place in _places(grid).to_dict("records"):
        metrics = place["cell"].run.read_json(metrics_file(place["sampler"]))
        if is_final(place["cell"], metrics, samples):
            values = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in metrics.items()}
            scalars = {k: v for k, v in values.items() if v is not None and not k.endswith("_per_unit")}
            rows.append({**scalars, **{name: place[name] for name in _KEY}})
    columns = list(dict.fromkeys([*_KEY, *(name for row in rows for name in row)]))
    return pd.DataFrame(rows, columns=columns).astype({"seed": int})


def read(path: Path) -> pd.DataFrame:
    """Read the rows of a file; without a file there are none.

    Raises:
        InputError: for a file that does not contain such rows.
    """
    if not path.exists():
        return pd.DataFrame(columns=_KEY).astype({"seed": int})
    try:
        rows = pd.read_csv(path, dtype={"seed": int, "commit": str, "version": str})
        return rows[[*_KEY, *(name for name in rows if name not in _KEY)]]
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a table of results ({error}): restore it from version control") from None


def keep(path: Path, grid: Sequence[Cell], samples: int) -> pd.DataFrame:
    """Add the finished runs of a grid to a file of rows, and return all rows of the file; see :func:`finished`.

    Rows are sorted, so that a new run adds one line and changes no other. If a run has been trained again, the rows of
    its other samplers are those of the old model and are deleted.
    """
    rows, new = read(path), finished(grid, samples)
    if new.empty:
        return rows
    old, new = rows.set_index(_POSITION), new.set_index(_POSITION)
    before, after = (each.reindex(columns=["date"])["date"].dropna() for each in (old, new))
    both = before.index.intersection(after.index)
    trained_again = both[before[both] != after[both]]
    gone = [(data, with_sampler(run, sampler), seed) for data, run, seed in trained_again for sampler in SAMPLERS]
    left = old[~old.index.isin(new.index) & ~old.index.isin(gone)]
    rows = pd.concat([left, new]).sort_index().reset_index()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, rows.to_csv(index=False, float_format="%.7g"))  # tables show fewer digits
    return read(path)
