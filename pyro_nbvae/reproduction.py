"""The runner behind the experiment scripts: a grid of runs, each in a folder of its own, and the tables they make.

A script states its grid as a :class:`Table`; everything else is here. A cell of the grid is a run folder,
``OUT/SCALE/DATA/VARIANT[ LABEL]/seed-N``: what is finished there is not done again, what was stopped is resumed, and
tables share the cells that they have in common.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from pyro_nbvae.config import SCALES, Reproduction, TrainConfig
from pyro_nbvae.data import SOURCES
from pyro_nbvae.errors import InputError, check_member, check_seed
from pyro_nbvae.evaluation import evaluate
from pyro_nbvae.files import write_text
from pyro_nbvae.tables import Row, latex, markdown, write_csv
from pyro_nbvae.training import train
from pyro_nbvae.variants import variant


@dataclass(frozen=True)
class Table:
    """A grid and the columns of its table.

    Args:
        name: of the script and of the files.
        title: one line.
        variants, data: what the grid goes over.
        metrics: the columns, as ``metrics.json`` names them.
        varied: what else it goes over: label to the fields of :class:`~pyro_nbvae.config.TrainConfig` that it changes.
    """

    name: str
    title: str
    variants: Sequence[str]
    data: Sequence[str]
    metrics: Sequence[str]
    varied: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    label: str
    config: TrainConfig
    folder: Path


def cells(table: Table, options: Reproduction) -> list[Cell]:
    """The runs of a table at the scale, and for the variants, data and seeds, that the options say.

    Raises:
        InputError: for a scale, variant, data set or seed that does not exist.
    """
    check_member("scale", options.scale, SCALES)
    return list(_cells(table, options))


def _cells(table: Table, options: Reproduction) -> Iterator[Cell]:
    scale = SCALES[options.scale]
    for data in options.data or table.data:
        check_member("data", data, SOURCES)
        for name in options.variants or table.variants:
            variant(name)
            for label, changes in table.varied.items():
                title = f"{name} {label}".strip()
                for seed in options.seeds or range(scale.seeds):
                    check_seed(seed)
                    fields = {**scale.config, **changes, "device": options.device, "data_root": options.data_root}
                    config = TrainConfig(variant=name, data=data, seed=seed, **fields)
                    yield Cell(title, config, Path(options.out) / options.scale / data / title / f"seed-{seed}")


def run_cell(cell: Cell, options: Reproduction) -> dict[str, Any]:
    """Trains and measures a cell, as far as that is not done yet; returns its metrics."""
    run = train(cell.config, cell.folder, resume=True)
    wanted = {
        "epochs": run.config()[0].epochs,
        "feature_sets": list(options.features),
        "generated_images": options.samples,
        "seed": 0,
    }
    try:
        metrics = json.loads((run.folder / "metrics.json").read_text())
        if all(metrics.get(key) == value for key, value in wanted.items()):
            return metrics
    except (FileNotFoundError, json.JSONDecodeError):
        pass
    return evaluate(
        run,
        features=options.features,
        inception_weights=options.inception_weights,
        samples=options.samples,
        device=options.device,
    )


def reproduce(table: Table, options: Reproduction) -> str:
    """Runs what is missing of a table, writes it as ``NAME.md``, ``.csv`` and ``.tex``, and returns the Markdown.

    A cell that fails is reported and the others go on.

    Raises:
        InputError: for a grid that cannot be, and, once the table is written, where cells failed.
    """
    grid = cells(table, options)
    failed: dict[str, str] = {}
    found: dict[str, dict[str, list[Row]]] = {cell.config.data: {} for cell in grid}
    bar = tqdm(grid, desc=table.name, unit="run")
    for cell in bar:
        bar.set_postfix_str(f"{cell.label} on {cell.config.data}, seed {cell.config.seed}")
        rows = found[cell.config.data].setdefault(cell.label, [])
        try:
            rows.append(run_cell(cell, options))
        except Exception as error:
            failed[str(cell.folder)] = " ".join(str(error).split()) or type(error).__name__
    epochs = sorted({row["epochs"] for groups in found.values() for rows in groups.values() for row in rows})
    seeds = sorted({cell.config.seed for cell in grid})
    caption = (
        f"{table.title}. Scale {options.scale}; epochs: {', '.join(map(str, epochs))}; seeds: "
        f"{', '.join(map(str, seeds))}; FID and KID of {options.samples} samples of the prior (integer counts) against "
        f"the training images, features: {', '.join(options.features)}. Made by: nbvae reproduce {table.name} --scale "
        f"{options.scale}"
    )
    folder = Path(options.out) / options.scale
    folder.mkdir(parents=True, exist_ok=True)
    text = f"{caption}\n"
    tex = ""
    for data, groups in found.items():
        text += f"\n**{data}**\n\n{markdown(groups, table.metrics)}\n"
        tex += latex(groups, table.metrics, caption=f"{data}. {caption}") + "\n"
    write_text(folder / f"{table.name}.md", text)
    write_text(folder / f"{table.name}.tex", tex)
    runs = [{"label": label, **row} for groups in found.values() for label, rows in groups.items() for row in rows]
    write_csv(folder / f"{table.name}.csv", runs)
    if failed:
        print(text)
        why = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise InputError(f"{len(failed)} of {len(grid)} runs failed, the same command tries them again: {why}")
    return text
