"""Grids of runs, and the folder of each run.

A script defines its grid as a :class:`Table`. Each cell of the grid has a run folder,
``OUT/SCALE/DATA/VARIANT[_FIELD=VALUE...]/seed-N``, named after its configuration. Finished cells are not repeated,
interrupted cells are resumed, and tables share common cells.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pyro_nbvae.errors import InputError
from pyro_nbvae.study.build import check_choices, event_shape_of, resolve
from pyro_nbvae.study.claims import Claim
from pyro_nbvae.study.config import TrainConfig
from pyro_nbvae.study.data import SOURCES, full_name
from pyro_nbvae.study.errors import check_member, check_seed
from pyro_nbvae.study.evaluation import METRICS, settings
from pyro_nbvae.study.folder import Run, metrics_file
from pyro_nbvae.study.scales import SCALES, Reproduction


def _nothing(base: TrainConfig) -> Mapping[str, Mapping[str, Any]]:
    return {"": {}}


@dataclass(frozen=True)
class Table:
    """A grid of runs and the columns of its table.

    Args:
        name: name of the script and of the files.
        title: title in one line.
        variants, data: names of the variants and of the data sets in the grid.
        metrics: the columns, keys of :data:`~pyro_nbvae.study.evaluation.METRICS`.
        varied: maps the resolved configuration of a variant on a data set to {label: fields of
            :class:`~pyro_nbvae.study.config.TrainConfig` to change}.
        paper: maps (data, metric, label) to the paper's figure, which the report shows beside ours.
        claims: claims about the results; the report states which of them hold.
        command: the command that makes the table. Default: ``nbvae reproduce NAME``.

    Example::

        >>> table = Table("mine", "Squared error", ("CMP", "P-VAE"), ("digits",), ("mse",))
        >>> [cell.folder.as_posix() for cell in cells(table, Reproduction(seeds=(0,)))]
        ['runs/reproduce/smoke/digits/CMP/seed-0', 'runs/reproduce/smoke/digits/P-VAE/seed-0']
    """

    name: str
    title: str
    variants: Sequence[str]
    data: Sequence[str]
    metrics: Sequence[str]
    varied: Callable[[TrainConfig], Mapping[str, Mapping[str, Any]]] = _nothing
    paper: Mapping[tuple[str, str, str], float] = field(default_factory=dict)
    claims: Sequence[Claim] = ()
    command: str = ""


@dataclass(frozen=True)
class Cell:
    """One run of a grid; its configuration has all defaults resolved."""

    label: str
    config: TrainConfig
    folder: Path

    @property
    def run(self) -> Run:
        return Run(self.folder)

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics of the run; empty if it has not been evaluated."""
        return self.run.read_json(metrics_file())

    def are_final(self, metrics: Mapping[str, Any], samples: int) -> bool:
        """Whether metrics are of the last epoch, and were evaluated as a table's are, with this number of samples."""
        return metrics.items() >= settings(self.config.epochs or 0, 0, samples).items()


def cells(table: Table, options: Reproduction) -> list[Cell]:
    """Return the runs of a table for the scale, variants, data and seeds of the options.

    Raises:
        InputError: for an unknown scale, variant, data set or metric, a seed out of range, a run that occurs twice, and
            a claim about a metric of which neither high nor low values are better.
    """
    check_choices(options)
    for name in table.metrics:
        check_member("metric", name, METRICS)
    for claim in table.claims:
        claim.judge({})
    found = list(_cells(table, options))
    for folder, times in Counter(cell.folder for cell in found).items():
        if times > 1:  # it would count as several seeds
            raise InputError(f"the table has {folder} {times} times: name each variant, data set and seed once")
    return found


def data_folder(data: str) -> str:
    """Return the folder name for a data set: its name or, for a path, the file name and a hash of the full path."""
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
                if changes.get("relaxation") == "auto":
                    raise InputError(
                        f"{name} {label}: the runs of a table share a relaxation, auto chooses one each: name it"
                    )
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
