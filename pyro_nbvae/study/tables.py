"""Tables: grids of runs, and the folder of each run.

A script defines its grid as a :class:`Table`. Each cell of the grid has a run folder,
``OUT/SCALE/DATA/VARIANT[_OPTION=VALUE...]/seed-N``, named after its configuration. Finished cells are not repeated,
interrupted cells are resumed, and tables share common cells.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyro_nbvae.errors import InputError
from pyro_nbvae.study.build import resolve
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.data import SOURCES, full_name, source_of
from pyro_nbvae.study.errors import check_member, check_seed
from pyro_nbvae.study.evaluation import METRICS
from pyro_nbvae.study.folder import Run
from pyro_nbvae.study.scales import SCALES, Reproduction
from pyro_nbvae.study.tree import TrainConfig, options, replace


@dataclass(frozen=True, kw_only=True)
class Table:
    """A grid of runs, the columns of its table, and the pairs of rows to compare.

    Args:
        name: name of the table and of its files.
        title: title in one line.
        variants, data: names of the variants and of the data sets in the grid.
        metrics: the columns, keys of :data:`~pyro_nbvae.study.evaluation.METRICS`.
        varied: maps the resolved configuration of a variant on a data set to {label: options to change}.
        shown: the columns on the page with the results of all tables. Default: ``metrics``.
        paper: maps (data, metric, label) to the value in the paper, which is shown beside ours.
        compare: maps a pair of labels to the metrics in which to compare them, on every data set.
        within: largest difference that does not matter, by metric: pairs are then also tested for equivalence.
        curves: pairs of variants whose rate-distortion curves are compared, squared error at equal KL.

    Example::

        >>> table = Table(name="mine", title="MSE", variants=("CMP", "P-VAE"), data=("digits",), metrics=("mse",))
        >>> [cell.folder.as_posix() for cell in cells(table, Reproduction(seeds=(0,)))]
        ['runs/reproduce/smoke/digits/CMP/seed-0', 'runs/reproduce/smoke/digits/P-VAE/seed-0']
    """

    name: str
    title: str
    variants: Sequence[str]
    data: Sequence[str]
    metrics: Sequence[str]
    varied: Callable[[TrainConfig[Any]], Mapping[str, Mapping[str, Any]]] = lambda config: {"": {}}
    shown: Sequence[str] = ()
    paper: Mapping[tuple[str, str, str], float] = field(default_factory=dict)
    compare: Mapping[tuple[str, str], Sequence[str]] = field(default_factory=dict)
    within: Mapping[str, float] = field(default_factory=dict)
    curves: Sequence[tuple[str, str]] = ()


TABLES: dict[str, Table] = {}


def register_table(table: Table) -> Table:
    """Register a table for ``nbvae reproduce``, and return it. An existing table of the same name is replaced.

    Example::

        >>> table = Table(name="mine", title="MSE", variants=("CMP",), data=("digits",), metrics=("mse",))
        >>> register_table(table) is TABLES.pop("mine")
        True
    """
    TABLES[table.name] = table
    return table


@dataclass(frozen=True)
class Cell:
    """One run of a grid; its configuration has all defaults resolved."""

    label: str
    config: TrainConfig[Any]
    folder: Path

    @property
    def run(self) -> Run:
        """The run folder."""
        return Run(self.folder)

    @property
    def data(self) -> str:
        """Name of the data set in rows: that of its folder."""
        return self.folder.parents[1].name


def cells(table: Table, chosen: Reproduction) -> list[Cell]:
    """Return the runs of a table for the scale, variants, data and seeds of the options.

    Raises:
        InputError: for an unknown scale, variant, data set or metric, a seed out of range, and a run that occurs twice.
    """
    check_member("scale", chosen.scale, SCALES)
    for name in {*table.metrics, *table.within, *(metric for each in table.compare.values() for metric in each)}:
        check_member("metric", name, METRICS)
    found = list(_cells(table, chosen))
    for folder, times in Counter(cell.folder for cell in found).items():
        if times > 1:  # it would count as several seeds
            raise InputError(f"the table has {folder} {times} times: name each variant, data set and seed once")
    return found


def _cells(table: Table, chosen: Reproduction) -> Iterator[Cell]:
    scale = SCALES[chosen.scale]
    for data in chosen.data or table.data:
        shape = tuple(source_of(data).event_shape)
        for name in chosen.variants or table.variants:
            default = resolve(configure(name, **scale.config, data=data), shape)
            runs: dict[Path, tuple[str, TrainConfig[Any]]] = {}
            for label, changes in table.varied(default).items():
                config = resolve(configure(name, **{**scale.config, **changes}, data=data), shape)
                if getattr(config.relaxation, "kind", None) == "auto":
                    raise InputError(f"{name} {label}: runs of a table share a relaxation, auto selects one each")
                before = options(default)
                changed = [f"{k}={_short(v)}" for k, v in options(config).items() if before.get(k) != v]
                place = Path(chosen.out, chosen.scale, data_folder(data), "_".join([name, *changed]))
                # a change to what the variant has anyway is the same run
                runs.setdefault(place, (f"{name} {label}".strip(), config))
            for place, (label, config) in runs.items():
                for seed in chosen.seeds or range(scale.seeds):
                    check_seed(seed)
                    yield Cell(label, replace(config, seed=seed, data_root=chosen.data_root), place / f"seed-{seed}")


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def data_folder(data: str) -> str:
    """Return the folder name for a data set: its name or, for a path, the file name and a hash of the full path."""
    if data in SOURCES:
        return data.replace("/", "-")
    path = full_name(data)
    return f"{Path(path).stem}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
