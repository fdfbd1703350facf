"""A grid of runs: which there are, and the folder of each.

A script states its grid as a :class:`Table`. A cell of the grid is a run folder,
``OUT/SCALE/DATA/VARIANT[_FIELD=VALUE...]/seed-N``, named by its configuration: what is finished there is not done
again, what was stopped is resumed, and tables share the cells that they have in common.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pyro_nbvae.data import SOURCES, full_name
from pyro_nbvae.errors import check_member, check_seed
from pyro_nbvae.runs.build import check_choices, event_shape_of, resolve
from pyro_nbvae.runs.config import TrainConfig
from pyro_nbvae.runs.evaluation import METRICS
from pyro_nbvae.runs.folder import Run
from pyro_nbvae.tables.claims import Claim
from pyro_nbvae.tables.config import SCALES, Reproduction
from pyro_nbvae.tables.formats import PAPER


def _nothing(base: TrainConfig) -> Mapping[str, Mapping[str, Any]]:
    return {"": {}}


@dataclass(frozen=True)
class Table:
    """A grid and the columns of its table.

    Args:
        name: of the script and of the files.
        title: one line.
        variants, data: what the grid goes over.
        metrics: the columns, names in :data:`~pyro_nbvae.runs.evaluation.METRICS`.
        varied: a function. Input: the resolved configuration of a variant on a data set. Output: label to the fields of
            :class:`~pyro_nbvae.runs.config.TrainConfig` to change.
        paper: the paper's FID of (data, label), shown beside ours where ours is in the same features, Inception's.
        claims: about its rows; the report says which hold.
        command: what makes it. Default: ``nbvae reproduce NAME``.
    """

    name: str
    title: str
    variants: Sequence[str]
    data: Sequence[str]
    metrics: Sequence[str]
    varied: Callable[[TrainConfig], Mapping[str, Mapping[str, Any]]] = _nothing
    paper: Mapping[tuple[str, str], float] = field(default_factory=dict)
    claims: Sequence[Claim] = ()
    command: str = ""


@dataclass(frozen=True)
class Cell:
    """One run of a grid; its configuration has every default resolved."""

    label: str
    config: TrainConfig
    folder: Path

    @property
    def run(self) -> Run:
        return Run(self.folder)

    @property
    def metrics(self) -> dict[str, object]:
        """What ``evaluate`` measured of the run; empty where that is still to come."""
        return self.run.read_json("metrics.json")


def cells(table: Table, options: Reproduction) -> list[Cell]:
    """The runs of a table at the scale, and for the variants, data and seeds, that the options say.

    Raises:
        InputError: for a scale, variant, data set or seed that does not exist.
    """
    check_choices(options)
    for name in table.metrics:
        check_member("metric", name, (*METRICS, PAPER.name))
    return list(_cells(table, options))


def data_folder(data: str) -> str:
    """The folder of a data set's runs: its name, or of a path its last part and a digest of all of it."""
    if data in SOURCES:
        return data.replace("/", "-")
    path = full_name(data)
    return f"{Path(path).stem}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def _cells(table: Table, options: Reproduction) -> Iterator[Cell]:
    scale = SCALES[options.scale]
    for data in options.data or table.data:
        shape = event_shape_of(data)
        for name in options.variants or table.variants:
            base = TrainConfig(variant=name, data=data, **scale.config)
            default = resolve(base, shape)
            for label, changes in table.varied(default).items():
                changed = resolve(replace(base, **changes), shape)
                now, before = asdict(changed), asdict(default)
                folder = "_".join([name, *(f"{k}={_short(now[k])}" for k in now if now[k] != before[k])])
                for seed in options.seeds or range(scale.seeds):
                    check_seed(seed)
                    config = replace(changed, seed=seed, data_root=options.data_root)
                    path = Path(options.out) / options.scale / data_folder(data) / folder / f"seed-{seed}"
                    yield Cell(f"{name} {label}".strip(), config, path)


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
