"""Run the missing cells of a grid, each in a separate process, several in parallel."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from tqdm.auto import tqdm

from pyro_nbvae.errors import InputError
from pyro_nbvae.study import plugins
from pyro_nbvae.study.build import choose_device
from pyro_nbvae.study.data import load
from pyro_nbvae.study.errors import check_number
from pyro_nbvae.study.evaluation import METRICS, Evaluation, measure
from pyro_nbvae.study.features import build_features, check_features
from pyro_nbvae.study.folder import metrics_file
from pyro_nbvae.study.generation import MOST_SAMPLES
from pyro_nbvae.study.grid import Cell, Table
from pyro_nbvae.study.jobs import Cluster, Job, LocalProcesses, Pool, one_line
from pyro_nbvae.study.scales import SCALES, Reproduction
from pyro_nbvae.study.training import differences, train

# Seconds between two updates of the progress bar.
POLL = 0.5
# Modules that every run imports, some of them late. Preloading saves seconds per run.
PRELOADED = ["pyro_nbvae.study.runner", "matplotlib.figure", "sklearn.datasets", "torch._dynamo", "torchmetrics.image"]


def number_of_samples(options: Reproduction) -> int:
    """Return the number of generated samples for FID and KID."""
    return SCALES[options.scale].samples if options.samples is None else options.samples


def missing_metrics(cell: Cell, table: Table, options: Reproduction) -> list[str]:
    """Return the metrics (of the table, and the standard ones) that are missing or outdated in the folder of a cell."""
    wanted = [name for name, one in METRICS.items() if one.standard or name in table.metrics]
    measured = cell.metrics
    try:
        final = cell.are_final(measured, number_of_samples(options))
        if not final or differences(cell.run.config()[0], cell.config):
            return wanted
    except InputError:  # files that cannot be read are renamed later
        return wanted
    lacking = not set(options.features) <= set(measured.get("feature_sets", []))
    return [name for name in wanted if name not in measured or (lacking and METRICS[name].of == "samples")]


def run_cell(cell: Cell, metrics: list[str], options: Reproduction, imports: list[str], device: str) -> None:
    """Train a cell, from its checkpoint if there is one, and evaluate it."""
    plugins.import_modules(imports)
    for path in cell.run.set_aside():
        print(f"{path}: this version cannot read the original, now renamed; the run is trained again", file=sys.stderr)
    run = train(replace(cell.config, device=device), cell.folder, resume=True, progress=False)
    this = Evaluation(
        run,
        features=None if options.features == ("classifier",) else options.features,  # the default, for images only
        inception_weights=options.inception_weights,
        samples=number_of_samples(options),
        importance_samples=0,
        device=device,
        progress=False,
    )
    measure(this, metrics)


def _finished(cell: Cell) -> int:
    """Return the progress of a cell: finished epochs, plus 1 if it is evaluated."""
    try:
        rows = (cell.folder / "log.csv").read_bytes().count(b"\n") - 1
    except OSError:
        rows = 0
    return min(max(rows, 0), cell.config.epochs or 0) + (cell.folder / metrics_file()).exists()


def check_options(table: Table, grid: Sequence[Cell], options: Reproduction) -> None:
    """Raise InputError for options with which the grid cannot run, before anything is trained."""
    check_number("--jobs", options.jobs, 1, 1_000)
    check_number("--samples", number_of_samples(options), 2, MOST_SAMPLES)
    if options.cluster is None:
        choose_device(options.device)
    check_features(options.features)
    labelled = any(METRICS[name].of == "latents" for name in table.metrics)
    for data in {cell.config.data for cell in grid}:
        if labelled and load(data, options.data_root).test_labels is None:
            raise InputError(f"{data} has no labels, which the table {table.name} needs: give a .npz file with labels")
        for name in options.features:
            if name != "classifier":  # our classifiers are always available, and not used for data other than images
                if not load(data, options.data_root).images:
                    raise InputError(f"--features {name}: FID and KID need images, {data} holds none")
                build_features(name, data, data_root=options.data_root, inception_weights=options.inception_weights)


def _follow(jobs: Mapping[str, Job], bar: tqdm[NoReturn], finished: Callable[[], int]) -> dict[str, str]:
    """Wait until all jobs are done, updating the bar; return the error messages of failed jobs."""
    waiting = dict(jobs)
    failed: dict[str, str] = {}
    while waiting:
        time.sleep(POLL)
        for name in [name for name, job in waiting.items() if job.done()]:
            error = waiting.pop(name).exception()
            if error is not None:
                failed[name] = one_line(error)
        bar.update(max(0, finished() - bar.n))
    return failed


def run_grid(table: Table, grid: Sequence[Cell], options: Reproduction) -> dict[str, str]:
    """Run the missing cells of a grid, with one progress bar for all epochs and evaluations.

    Returns:
        Error messages of the failed cells, by run folder.
    """
    unique = {str(cell.folder): cell for cell in grid}
    total = sum((cell.config.epochs or 0) + 1 for cell in unique.values())

    def finished() -> int:
        return sum(_finished(cell) for cell in unique.values())

    pool: Pool
    if options.cluster is None:
        pool = LocalProcesses(options.jobs, options.device, preload=PRELOADED)
    else:
        pool = Cluster(options.cluster, Path(options.out) / "submitit", options.cluster_options, options.device)
    with pool, tqdm(total=total, initial=finished(), desc=table.name, unit="epoch", smoothing=0) as bar:
        missing = {name: missing_metrics(cell, table, options) for name, cell in unique.items()}
        jobs = {
            name: pool.submit(run_cell, unique[name], metrics, options, list(plugins.imported))
            for name, metrics in missing.items()
            if metrics
        }
        return _follow(jobs, bar, finished)
