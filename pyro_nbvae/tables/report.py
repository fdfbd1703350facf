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
from pyro_nbvae.runs.build import check_choices
from pyro_nbvae.tables import claims, results
from pyro_nbvae.tables.config import SCALES, TABLES, Reproduction
from pyro_nbvae.tables.formats import columns_of, latex, markdown, write_csv
from pyro_nbvae.tables.grid import Cell, Table, cells
from pyro_nbvae.tables.results import Row
from pyro_nbvae.tables.runner import check_options, run_grid


def group(table: Table, grid: Iterable[Cell], rows: dict[results.Key, Row]) -> dict[str, dict[str, list[Row]]]:
    """The rows of a grid's cells: data set to label to a row a seed."""
    by_data: dict[str, dict[str, list[Row]]] = {}
    for cell in grid:
        groups = by_data.setdefault(cell.config.data, {})
        groups.setdefault(cell.label, [])
        for sampler in results.SAMPLERS:
            row = results.of_cell(rows, cell, sampler)
            if row is not None:
                label = cell.label if sampler == "prior" else f"{cell.label} ({sampler})"
                paper = table.paper.get((cell.config.data, label)) if row.get("fid") is not None else None
                groups.setdefault(label, []).append(row | {"fid_paper": paper})
    return by_data


def command(table: Table, options: Reproduction) -> str:
    """The command that makes a table: the flags that are not at their defaults, but for where files lie."""
    imports = [word for name in plugins.imported for word in ("--import", name)]
    words = (table.command or " ".join(["nbvae", *imports, "reproduce", table.name])).split()
    for one in fields(Reproduction):
        if one.name in ("out", "data_root"):
            continue
        value = getattr(options, one.name)
        if one.name == "scale" or value != one.default:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{one.name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def caption(table: Table, options: Reproduction, grid: Sequence[Cell], rows: Sequence[Row]) -> str:
    """Under what conditions a table was made: of its own columns and rows, and of nothing else."""

    def all_of(name: str) -> str:
        found = sorted({row[name] for row in rows if row.get(name) is not None})
        return ", ".join(f"{int(v):,}" if isinstance(v, int | float) else str(v) for v in found)

    shown = {one.of for one in columns_of(rows, table.metrics)}
    of = {
        "held-out data": f"Measured on {all_of('test_size')} held-out observations with integer counts.",
        "samples": f"FID and KID of {all_of('generated_samples')} samples, of the prior unless a row says otherwise, "
        f"against the training images, features: {all_of('feature_sets')}.",
        "latents": "Accuracies of classifiers on latents, of held-out labels.",
    }
    measured = "".join(f" {text}" for kind, text in of.items() if kind in shown)
    made = f"Trained at commit {all_of('commit') or 'unknown'}, threads a run {all_of('threads') or 'unknown'}."
    known = table.command or table.name in TABLES
    made_by = f"Made by: {command(table, options)}" if known else f"A table of its own, {table.name}"
    batches = ", ".join(map(str, sorted({cell.config.batch_size for cell in grid})))
    return (
        f"{table.title}. Scale {options.scale}: epochs {all_of('epochs')}; training data {all_of('train_size')}; "
        f"batches of {batches}; seeds {all_of('seed')}.{measured} {made} {made_by}"
    )


def render(
    table: Table, options: Reproduction, grid: Sequence[Cell], rows: dict[results.Key, Row]
) -> tuple[str, str, Sequence[Row]]:
    """A table, with its claims, as Markdown and LaTeX, and the rows behind it."""
    by_data = group(table, grid, rows)
    runs = [{"label": label, **row} for groups in by_data.values() for label, rows in groups.items() for row in rows]
    under = caption(table, options, grid, runs)
    text, tex = f"{under}\n", ""
    for data, groups in by_data.items():
        text += f"\n**{data}**\n\n{markdown(groups, table.metrics)}\n"
        tex += latex(groups, table.metrics, caption=f"{data}. {under}") + "\n"
    if table.claims:
        text += f"\nClaims:\n\n{claims.listed(table.claims, by_data)}"
    return text, tex, runs


def reproduce(table: Table, options: Reproduction) -> str:
    """Runs what is missing of a table, writes it as ``NAME.md``, ``.csv`` and ``.tex``, and returns the Markdown.

    A cell that fails is reported and the others go on.

    Raises:
        InputError: for a grid that cannot be, and, once the table is written, where cells failed.
    """
    grid = cells(table, options)
    check_options(grid, options)
    folder = Path(options.out) / options.scale
    folder.mkdir(parents=True, exist_ok=True)
    failed = run_grid(table, grid, options)
    text, tex, runs = render(table, options, grid, results.rows_of(grid))
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


def report(tables: Iterable[Table], options: Reproduction, path: Path, kept: Path = results.RESULTS) -> Path:
    """Keeps the finished runs as rows, and writes every table and claim that there are rows for as one Markdown file.

    Args:
        tables: which.
        options: ``out`` says where run folders are looked for; without any, the rows that were kept are enough.
        path: of the Markdown file.
        kept: the folder of the rows, a file a scale.

    Raises:
        InputError: where there is neither a finished run nor a row; nothing is written then.
    """
    check_choices(options)
    parts, verdicts = "", ""
    for table in tables:
        for scale in SCALES:
            here = replace(options, scale=scale)
            grid = cells(table, here)
            rows = results.keep(kept / f"{scale}.csv", grid)
            there = [cell for cell in grid if results.of_cell(rows, cell)]
            if not there:
                continue
            parts += f"\n## {table.name}, {scale}\n\n{len(there)} of {len(grid)} runs are finished. "
            parts += render(table, here, there, rows)[0]
            by_data = group(table, there, rows)
            verdicts += claims.summary(table.claims, by_data, f"{table.name}, {scale}")
    if not parts:
        raise InputError(
            f"no finished run in {options.out} and no row in {kept}: nbvae reproduce TABLE makes some; {path} stays"
        )
    text = (
        "# Results\n\nMade by `nbvae reproduce --report` from the rows in `results/`. Mean ± standard deviation over "
        "seeds.\n"
    )
    if verdicts:
        text += (
            "\n## Claims\n\nA claim holds or fails where the seeds decide it at 5 %; each stands with its figures "
            "under its table below.\n\n| verdict | comparisons | claimed by | claim | table |\n"
            f"|---|---|---|---|---|\n{verdicts}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text + parts)
    return path
