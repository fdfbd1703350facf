"""From the folders of a grid to its table, and from all tables to the report."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from pyro_nbvae import plugins
from pyro_nbvae.errors import InputError
from pyro_nbvae.files import write_text
from pyro_nbvae.tables.config import SCALES, TABLES, Reproduction
from pyro_nbvae.tables.formats import Row, latex, markdown, write_csv
from pyro_nbvae.tables.grid import Cell, Table, cells
from pyro_nbvae.tables.runner import run_grid


def rows_of(table: Table, grid: Iterable[Cell]) -> dict[str, dict[str, list[Row]]]:
    """The metrics that the folders of a grid hold: data set to label to a row a seed."""
    by_data: dict[str, dict[str, list[Row]]] = {}
    for cell in grid:
        rows = by_data.setdefault(cell.config.data, {}).setdefault(cell.label, [])
        metrics = cell.metrics
        if metrics:
            if metrics.get("fid") is not None:
                metrics["fid_paper"] = table.paper.get((cell.config.data, cell.label))
            rows.append({**metrics, "training_seed": cell.config.seed})
    return by_data


def command(table: Table, options: Reproduction) -> str:
    """The command that makes a table: the flags that are not at their defaults."""
    imports = [word for name in plugins.imported for word in ("--import", name)]
    words = (table.command or " ".join(["nbvae", *imports, "reproduce", table.name])).split()
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

    known = table.command or table.name in TABLES
    made_by = f"Made by: {command(table, options)}" if known else f"A table of its own, {table.name}"
    batches = ", ".join(map(str, sorted({cell.config.batch_size for cell in grid})))
    return (
        f"{table.title}. Scale {options.scale}: epochs {all_of('epochs')}; training data {all_of('train_size')}; "
        f"batches of {batches}; seeds {all_of('training_seed')}. Measured on {all_of('test_size')} held-out "
        f"observations with integer counts; FID and KID of {all_of('generated_samples')} samples of the prior against "
        f"the training images, features: {all_of('feature_sets')}. {made_by}"
    )


def render(table: Table, options: Reproduction, grid: Sequence[Cell]) -> tuple[str, str, Sequence[Row]]:
    """A table as Markdown and LaTeX, and the runs behind it, from what the folders of the grid hold."""
    by_data = rows_of(table, grid)
    runs = [{"label": label, **row} for groups in by_data.values() for label, rows in groups.items() for row in rows]
    under = caption(table, options, grid, runs)
    text, tex = f"{under}\n", ""
    for data, groups in by_data.items():
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


def command_of(table: Table) -> Callable[[Reproduction], None]:
    """A table as the command line of its script: runs what is missing, and prints and writes the table."""

    def main(options: OmitArgPrefixes[Reproduction]) -> None:
        print(reproduce(table, options))

    main.__doc__ = f"{table.title}: run what is missing, and print and write the table."
    return main


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
