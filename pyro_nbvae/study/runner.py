"""Run the missing cells of a grid, each in a separate process, several in parallel."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from pyro_nbvae.errors import InputError
from pyro_nbvae.study import plugins
from pyro_nbvae.study.build import choose_device, load_data
from pyro_nbvae.study.config import from_json, to_json
from pyro_nbvae.study.data import SOURCES, Data, load
from pyro_nbvae.study.errors import check_member, check_number
from pyro_nbvae.study.evaluation import METRICS, Evaluation, measure
from pyro_nbvae.study.features import build_features, check_features
from pyro_nbvae.study.folder import Run, metrics_file
from pyro_nbvae.study.generation import MOST_SAMPLES
from pyro_nbvae.study.jobs import CLUSTERS, Cluster, LocalProcesses, one_line
from pyro_nbvae.study.results import is_final
from pyro_nbvae.study.scales import Reproduction
from pyro_nbvae.study.tables import Cell, Table
from pyro_nbvae.study.training import train

# Seconds between two updates of the progress bar.
POLL = 0.5
# Modules that every run imports, some of them late. Preloading saves seconds per run.
PRELOADED = ["pyro_nbvae.study.runner", "matplotlib.figure", "sklearn.datasets", "torch._dynamo", "torchmetrics.image"]


def missing_metrics(cell: Cell, table: Table, chosen: Reproduction) -> list[str]:
    """Return the metrics (of the table, and the standard ones) that are missing or outdated in the folder of a cell."""
    wanted = [name for name, one in METRICS.items() if one.standard or name in table.metrics]
    measured = cell.run.read_json(metrics_file())
    if not is_final(cell, measured, chosen.number_of_samples):
        return wanted
    lacking = "feature_sets" in measured and not set(chosen.features) <= set(measured["feature_sets"])
    return [name for name in wanted if name not in measured or (lacking and METRICS[name].in_features)]


def run_cell(
    folder: Path, stored: dict[str, Any], metrics: list[str], chosen: Reproduction, imports: list[str], device: str
) -> None:
    """Train a cell, from its checkpoint if there is one, and evaluate it.

    Its configuration comes as plain values (``stored``), since the type of its variant may be in a module to import.
    """
    plugins.import_modules(imports)
    config = replace(from_json(stored), device=device)
    for path in Run(folder).set_aside():
        print(f"{path}: this version cannot read the original, now renamed; the run is trained again", file=sys.stderr)
    this = Evaluation(
        train(config, folder, resume=True, progress=False),
        features=None if chosen.features == ("classifier",) else chosen.features,  # the default, for images only
        inception_weights=chosen.inception_weights,
        samples=chosen.number_of_samples,
        importance_samples=0,
        device=device,
        progress=False,
    )
    measure(this, metrics)


def _progress(cell: Cell) -> tuple[int, int]:
    """Return the finished steps of a cell, and how many there are: epochs, and the evaluation."""
    log, epochs = cell.folder / "log.csv", cell.config.training.epochs or 0
    rows = log.read_bytes().count(b"\n") - 1 if log.exists() else 0
    return min(max(rows, 0), epochs) + (cell.folder / metrics_file()).exists(), epochs + 1


def check_options(table: Table, grid: Sequence[Cell], chosen: Reproduction) -> None:
    """Raise InputError for options with which the grid cannot run, before anything is trained."""
    check_number("--jobs", chosen.jobs, 1, 1_000)
    check_number("--samples", chosen.number_of_samples, 2, MOST_SAMPLES)
    check_member("cluster", chosen.cluster, CLUSTERS)
    if chosen.cluster is None:
        choose_device(chosen.device)
    check_features(chosen.features)
    labelled = any(METRICS[name].of == "latents" for name in table.metrics)
    others = set(chosen.features) - {"classifier"}  # ours are always available, and not used for other data than images
    for name in {cell.config.data for cell in grid} if labelled or others else ():
        data = load(name, chosen.data_root)
        if labelled and data.test_labels is None:
            raise InputError(f"{name} has no labels, which the table {table.name} needs: give a .npz file with labels")
        for features in others:
            if not data.images:
                raise InputError(f"--features {features}: FID and KID need images, {name} holds none")
            build_features(features, name, data_root=chosen.data_root, inception_weights=chosen.inception_weights)
    _check_data(grid)


def _check_data(grid: Sequence[Cell]) -> None:
    """Raise InputError if a file of the user's own has changed since a cell was trained on it: its row would stay."""
    found: dict[str, Data] = {}
    for cell in grid:
        if cell.config.data in SOURCES or not cell.run.checkpoint_path.exists():
            continue
        try:
            state = cell.run.read_checkpoint()
        except InputError:  # it is trained again
            continue
        key = repr((cell.config.data, cell.config.reading, cell.config.condition))
        if key not in found:
            found[key] = load_data(cell.config)
        cell.run.check_data(state, found[key])


def run_grid(table: Table, grid: Sequence[Cell], chosen: Reproduction) -> dict[str, str]:
    """Run the missing cells of a grid, with one progress bar for all epochs and evaluations.

    Returns:
        Error messages of the failed cells, by run folder.
    """
    pool: LocalProcesses | Cluster
    if chosen.cluster is None:
        pool = LocalProcesses(chosen.jobs, chosen.device, preload=PRELOADED)
    else:
        pool = Cluster(chosen.cluster, Path(chosen.out) / "submitit", chosen.cluster_options, chosen.device)
    failed: dict[str, str] = {}
    done, total = (sum(_progress(cell)[part] for cell in grid) for part in (0, 1))
    with pool, tqdm(total=total, initial=done, desc=table.name, unit="epoch", smoothing=0) as bar:
        waiting = {
            cell.folder: pool.submit(
                run_cell, cell.folder, to_json(cell.config), metrics, chosen, list(plugins.imported)
            )
            for cell in grid
            if (metrics := missing_metrics(cell, table, chosen))
        }
        while waiting:
            time.sleep(POLL)
            for folder in [folder for folder, job in waiting.items() if job.done()]:
                if (error := waiting.pop(folder).exception()) is not None:
                    failed[str(folder)] = one_line(error)
            bar.update(max(0, sum(_progress(cell)[0] for cell in grid) - bar.n))
    return failed
