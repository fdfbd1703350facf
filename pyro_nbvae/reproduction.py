"""The runner behind the experiment scripts: a grid of runs, each in a folder of its own, and the tables they make.

A script states its grid as a :class:`Table`; everything else is here. A cell of the grid is a run folder,
``OUT/SCALE/DATA/VARIANT[_FIELD=VALUE...]/seed-N``, named by its configuration: what is finished there is not done
again, what was stopped is resumed, and tables share the cells that they have in common. A table is made from what the
folders hold, whoever put it there.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from pyro_nbvae.config import SCALES, Reproduction, TrainConfig
from pyro_nbvae.data import SOURCES
from pyro_nbvae.errors import InputError, check_member, check_seed
from pyro_nbvae.evaluation import evaluate
from pyro_nbvae.files import write_text
from pyro_nbvae.jobs import Cluster, Job, LocalProcesses, Pool, one_line
from pyro_nbvae.runs import Run, resolve
from pyro_nbvae.tables import Row, latex, markdown, write_csv
from pyro_nbvae.training import differences, train

# Seconds between two looks at what the runs have done.
POLL = 0.5


def _nothing(base: TrainConfig) -> Mapping[str, Mapping[str, Any]]:
    return {"": {}}


@dataclass(frozen=True)
class Table:
    """A grid and the columns of its table.

    Args:
        name: of the script and of the files.
        title: one line.
        variants, data: what the grid goes over.
        metrics: the columns, as ``metrics.json`` or ``measure`` name them.
        varied: what else it goes over: from a variant's configuration on a data set, every default resolved, to labels
            and the fields of :class:`~pyro_nbvae.config.TrainConfig` that each changes.
        measure: figures beyond those of :func:`~pyro_nbvae.evaluation.evaluate`: a function of a module, called when
            all runs are done, ``measure(run, fellows, device)``, the fellows being the grid's runs on the same data.
        paper: the paper's FID of (data, label), shown beside ours where ours is in the same features, Inception's.
        reading: paragraphs for the report: what the table says.
        command: what makes it. Default: ``nbvae reproduce NAME``.
    """

    name: str
    title: str
    variants: Sequence[str]
    data: Sequence[str]
    metrics: Sequence[str]
    varied: Callable[[TrainConfig], Mapping[str, Mapping[str, Any]]] = _nothing
    measure: Callable[[Run, list[Run], str], Mapping[str, float]] | None = None
    paper: Mapping[tuple[str, str], float] = field(default_factory=dict)
    reading: str = ""
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
    def metrics(self) -> dict[str, Any]:
        """What ``evaluate`` measured of the run; empty where that is still to come."""
        return self.run.read_json("metrics.json")


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
        shape = SOURCES[data].image_shape
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
                    where = Path(options.out) / options.scale / data / folder / f"seed-{seed}"
                    yield Cell(f"{name} {label}".strip(), config, where)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _samples(options: Reproduction) -> int:
    return options.samples or SCALES[options.scale].samples


def is_evaluated(cell: Cell, options: Reproduction) -> bool:
    """Whether a cell's folder holds this very run, complete and evaluated as the options say."""
    wanted = {
        "epochs": cell.config.epochs,
        "feature_sets": list(options.features),
        "generated_images": _samples(options),
        "seed": 0,
    }
    return cell.metrics.items() >= wanted.items() and not differences(cell.run.config()[0], cell.config)


def is_measured(cell: Cell, table: Table) -> bool:
    """Whether what a table measures beyond ``evaluate`` is there."""
    return table.measure is None or cell.run.read_json(f"{table.name}.json").get("epochs") == cell.config.epochs


def run_cell(cell: Cell, options: Reproduction, device: str) -> None:
    """Trains a cell, or what is missing of it, and evaluates it."""
    evaluate(
        train(replace(cell.config, device=device), cell.folder, resume=True, progress=False),
        features=options.features,
        inception_weights=options.inception_weights,
        samples=_samples(options),
        importance_samples=0,
        device=device,
        progress=False,
    )


def measure_cell(cell: Cell, fellows: list[Run], name: str, measure: Any, device: str) -> None:
    """Adds to an evaluated cell what a table measures beyond that, as ``TABLE.json``."""
    cell.run.write_json(f"{name}.json", {**measure(cell.run, fellows, device), "epochs": cell.config.epochs})


def _finished(cell: Cell, steps: Sequence[str]) -> int:
    """How many steps of a cell are done: its epochs, and the files that its evaluation leaves."""
    log = cell.folder / "log.csv"
    rows = log.read_text().count("\n") - 1 if log.exists() else 0
    return rows + sum((cell.folder / name).exists() for name in steps)


def _follow(jobs: Mapping[str, Job], bar: Any, finished: Callable[[], int]) -> dict[str, str]:
    """Waits until all jobs are done, moving the bar; returns why those failed that did."""
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
    """Does what is missing of a grid, with one progress bar over its epochs and evaluations.

    Returns:
        run folder to what went wrong there, for those that failed; the others went on.
    """
    unique = {str(cell.folder): cell for cell in grid}
    steps = ["metrics.json"] + [f"{table.name}.json"] * (table.measure is not None)
    total = sum((cell.config.epochs or 0) + len(steps) for cell in unique.values())

    def finished() -> int:
        return sum(_finished(cell, steps) for cell in unique.values())

    pool: Pool
    if options.cluster is None:
        pool = LocalProcesses(options.jobs, options.device)
    else:
        pool = Cluster(options.cluster, Path(options.out) / "submitit", options.cluster_options, options.device)
    with pool, tqdm(total=total, initial=finished(), desc=table.name, unit="epoch", smoothing=0) as bar:
        runs = {
            name: pool.submit(run_cell, cell, options)
            for name, cell in unique.items()
            if not is_evaluated(cell, options)
        }
        failed = _follow(runs, bar, finished)
        fellows: dict[str, list[Run]] = {}
        for cell in unique.values():
            fellows.setdefault(cell.config.data, []).append(cell.run)
        measures = {
            name: pool.submit(measure_cell, cell, fellows[cell.config.data], table.name, table.measure)
            for name, cell in unique.items()
            if name not in failed and not is_measured(cell, table)
        }
        return failed | _follow(measures, bar, finished)


def rows_of(table: Table, grid: Iterable[Cell]) -> dict[str, dict[str, list[Row]]]:
    """The metrics that the folders of a grid hold: data set to label to a row a seed."""
    found: dict[str, dict[str, list[Row]]] = {}
    for cell in grid:
        rows = found.setdefault(cell.config.data, {}).setdefault(cell.label, [])
        metrics = cell.metrics
        if metrics:
            metrics |= cell.run.read_json(f"{table.name}.json")
            if "fid" in metrics:
                metrics["fid_paper"] = table.paper.get((cell.config.data, cell.label))
            rows.append({**metrics, "training_seed": cell.config.seed})
    return found


def command(table: Table, options: Reproduction) -> str:
    """The command that makes a table: the flags that are not at their defaults."""
    words = (table.command or f"nbvae reproduce {table.name}").split()
    for one in fields(Reproduction):
        value = getattr(options, one.name)
        if one.name == "scale" or value != one.default:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{one.name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def caption(table: Table, options: Reproduction, grid: Sequence[Cell], rows: Sequence[Row]) -> str:
    """Under what conditions a table was made."""

    def all_of(name: str) -> str:
        values = {tuple(v) if isinstance(v, list) else (v,) for v in (row.get(name) for row in rows)}
        return ", ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in sorted({x for y in values for x in y}))

    batches = ", ".join(map(str, sorted({cell.config.batch_size for cell in grid})))
    return (
        f"{table.title}. Scale {options.scale}: epochs {all_of('epochs')}; training images {all_of('train_images')}; "
        f"batches of {batches}; seeds {all_of('training_seed')}. Measured on {all_of('test_images')} held-out images "
        f"with integer counts; FID and KID of {all_of('generated_images')} samples of the prior against the training "
        f"images, features: {all_of('feature_sets')}. Made by: {command(table, options)}"
    )


def render(table: Table, options: Reproduction, grid: Sequence[Cell]) -> tuple[str, str, Sequence[Row]]:
    """A table as Markdown and LaTeX, and the runs behind it, from what the folders of the grid hold."""
    found = rows_of(table, grid)
    runs = [{"label": label, **row} for groups in found.values() for label, rows in groups.items() for row in rows]
    under = caption(table, options, grid, runs)
    text, tex = f"{under}\n", ""
    for data, groups in found.items():
        text += f"\n**{data}**\n\n{markdown(groups, table.metrics)}\n"
        tex += latex(groups, table.metrics, caption=f"{data}. {under}") + "\n"
    return text, tex, runs


def reproduce(table: Table, options: Reproduction) -> str:
    """Runs what is missing of a table, writes it as ``NAME.md``, ``.csv`` and ``.tex``, and returns the Markdown.

    A cell that fails is reported and the others go on.

    Raises:
        InputError: for a grid that cannot be, and, once the table is written, where cells failed.
    """
    grid = cells(table, options)
    folder = Path(options.out) / options.scale
    folder.mkdir(parents=True, exist_ok=True)
    failed = run_grid(table, grid, options)
    text, tex, runs = render(table, options, grid)
    write_text(folder / f"{table.name}.md", text)
    write_text(folder / f"{table.name}.tex", tex)
    write_csv(folder / f"{table.name}.csv", runs)
    if failed:
        print(text)
        why = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise InputError(f"{len(failed)} of {len(grid)} runs failed, the same command tries them again: {why}")
    return text


def report(tables: Iterable[Table], options: Reproduction, path: Path) -> Path:
    """Writes every table of which there are finished runs, at every scale, as one Markdown file."""
    text = (
        "# Results\n\nMade by `nbvae reproduce --report` from the run folders. Mean ± standard deviation over seeds.\n"
    )
    for table in tables:
        for scale in SCALES:
            here = replace(options, scale=scale)
            wanted = cells(table, here)
            grid = [cell for cell in wanted if cell.metrics]
            if grid:
                text += f"\n## {table.name}, {scale}\n\n{len(grid)} of {len(wanted)} runs are finished. "
                text += render(table, here, grid)[0]
                text += f"\n{table.reading.strip()}\n" if table.reading else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path
