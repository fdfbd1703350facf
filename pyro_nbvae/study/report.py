"""Tables made from the rows of a grid, and the page with the results of all tables."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pandas as pd
from tyro.conf import OmitArgPrefixes

from pyro_nbvae.errors import InputError
from pyro_nbvae.study import plugins, results
from pyro_nbvae.study.commandline import script
from pyro_nbvae.study.comparison import LEVEL, comparisons, decided
from pyro_nbvae.study.evaluation import METRICS
from pyro_nbvae.study.files import write_text
from pyro_nbvae.study.folder import SAMPLERS
from pyro_nbvae.study.runner import check_options, run_grid
from pyro_nbvae.study.scales import SCALES, FeaturesName, Reproduction
from pyro_nbvae.study.tables import TABLES, Cell, Table, cells

_PAGE = """# Results

Written by `nbvae reproduce --report` from the rows in `results/`, with the settings of `--preset published` and the
training budgets of the scales; only scale `paper` has the schedules and the 200 epochs of the paper. Mean ± standard
deviation over the seeds; in bold the best mean of a column. Columns *paper*: the values that the paper reports.
Metrics are of held-out observations with integer counts. FID and KID compare images generated from the prior with all
training images; rFID compares up to 5,000 held-out images with their reconstructions.
"""
_DECIDED = f"""
## What the rows decide

Pairs of rows with at least two seeds each, compared by Welch's t-test with Holm's correction over the tests of a table
at a scale. Listed are those significant at {LEVEL:.0%}; *within*: the difference is smaller than the number given (two
one-sided tests); *at equal KL*: the squared error of a variant, interpolated between its runs, and of another at the
same KL.

"""


def _text(values: pd.Series, digits: int) -> str:
    """Return mean ± standard deviation over seeds; without a value "-"."""
    if not values.count():
        return "-"
    deviation = f" ± {values.std():.{digits}f}" if values.count() > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def summary(
    rows: pd.DataFrame, metrics: Sequence[str], paper: Mapping[tuple[str, str], float], labels: Iterable[str] = ()
) -> pd.DataFrame:
    """Return a table of text: one line per label, its seeds and a column per metric, the best value of each in bold.

    Args:
        rows: the rows of one data set.
        metrics: names of the columns; metrics without a value are left out.
        paper: the values in the paper, by metric and label.
        labels: labels that have a line also without a row.
    """
    labels = dict.fromkeys([*labels, *rows["label"], *(label for _, label in paper)])
    table = pd.DataFrame(index=pd.Index(labels, dtype=object))
    table["seeds"] = rows.groupby("label")["seed"].agg(lambda seeds: ", ".join(map(str, sorted(seeds))))
    machine = rows.groupby("label")[[name for name in ("machine", "threads") if name in rows]].nunique()
    for one in (one for one in METRICS.values() if one.name in metrics):
        values = rows.get(one.name, pd.Series(dtype=float)).astype(float)
        if one.of == "speed":  # has a mean only over runs on one machine
            values = values[~rows["label"].isin(machine.index[machine.gt(1).any(axis=1)])]
        if values.count():
            by_label = values.groupby(rows["label"])
            means = by_label.mean()
            best = {"low": means.min(), "high": means.max(), None: None}[one.best if means.count() > 1 else None]
            texts = {label: _text(each, one.digits) for label, each in by_label}
            bold = {label: f"**{text}**" if means[label] == best else text for label, text in texts.items()}
            table[one.heading] = pd.Series(bold, dtype=object)
        if theirs := {label: f"{value:g}" for (metric, label), value in paper.items() if metric == one.name}:
            table[f"{one.heading}, paper"] = pd.Series(theirs, dtype=object)
    return table.astype(object).where(table.notna(), "-")


def by_sampler(rows: pd.DataFrame) -> pd.DataFrame:
    """Return ELBO and distances by sampler, over the seeds for which every sampler in the line was evaluated."""
    distances = [METRICS[name] for name in ("elbo", "fid_c", "fid") if name in rows]
    columns = [f"{one.heading}, {sampler}" for one in distances for sampler in SAMPLERS]
    table = pd.DataFrame(index=rows["label"].unique(), columns=columns, dtype=object)
    for one in distances:
        wide = rows.dropna(subset=[one.name]).pivot(index=["label", "seed"], columns="sampler", values=one.name)
        for label, each in wide.groupby("label"):
            each = each.dropna(axis=1, how="all").dropna()
            for sampler in each if each.shape[1] > 1 and len(each) else ():
                table.loc[label, f"{one.heading}, {sampler}"] = _text(each[sampler], one.digits)
    known = table.dropna(how="all").dropna(axis=1, how="all").astype(object)
    return known.where(known.notna(), "-")


def command(table: Table, chosen: Reproduction) -> str:
    """Return the command that makes a table, with all flags that differ from their defaults except paths."""
    words = ["nbvae", *(word for name in plugins.imported for word in ("--import", name)), "reproduce", table.name]
    for one in fields(Reproduction):
        value = getattr(chosen, one.name)
        if one.name not in ("out", "data_root") and (one.name == "scale" or value != one.default):
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{one.name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def _values(rows: pd.DataFrame, name: str) -> str:
    """Return the different values of a column, sorted, as text."""
    found = set(rows[name].dropna()) if name in rows else set()
    texts = [each if isinstance(each, str) else f"{int(each):,}" for each in sorted(found)]
    return ", ".join(dict.fromkeys(", ".join(texts).split(", "))) or "unknown"


# What a caption has of the rows.
_ABOUT = {"epochs": "epochs", "train_size": "training data", "seed": "seeds", "test_size": "held-out data"}
_ABOUT |= {"generated_samples": "samples for FID and KID", "feature_sets": "features", "commit": "trained at commit"}
_ABOUT |= {"machine": "on", "torch_version": "torch", "threads": "threads per run", "date": "dates"}


def caption(table: Table, chosen: Reproduction, grid: Sequence[Cell], rows: pd.DataFrame) -> str:
    """Return the caption of a table: the conditions of its runs and metrics, and the command that makes it."""
    about = [f"{heading} {_values(rows, name)}" for name, heading in _ABOUT.items()]
    batches = ", ".join(map(str, sorted({cell.config.training.batch_size for cell in grid})))
    made_by = f"A table of its own, {table.name}"
    if table.name in TABLES:
        # the features and samples of the rows, which are not always those of the options
        used = _values(rows, "feature_sets").split(", ")
        features = tuple(name for name in get_args(FeaturesName) if name in used) or chosen.features
        drawn = int(rows["generated_samples"].max()) if "generated_samples" in rows else chosen.samples
        samples = None if drawn == SCALES[chosen.scale].samples else drawn
        made_by = f"Made by: `{command(table, replace(chosen, features=features, samples=samples))}`"
    return f"{table.title}. Scale {chosen.scale}: batches of {batches}; {'; '.join(about)}. {made_by}"


def _paper(table: Table, data: str) -> dict[tuple[str, str], float]:
    return {(metric, label): value for (where, metric, label), value in table.paper.items() if where == data}


def findings(table: Table, rows: pd.DataFrame) -> dict[str, str]:
    """Return what the rows of a table decide, as text, by data set."""
    found: dict[str, list[str]] = {}
    key = ["data", "metric", "first", "relation"]
    texts = decided(comparisons(table, rows)).groupby(key, sort=False)["second"].agg(", ".join).reset_index()
    for (data, metric), each in texts.groupby(["data", "metric"], sort=False):
        pairs = "; ".join(each["first"] + " " + each["relation"] + " " + each["second"])
        found.setdefault(str(data), []).append(f"**{metric}**: {pairs}")
    return {data: ". ".join(texts) for data, texts in found.items()}


def render(table: Table, chosen: Reproduction, grid: Sequence[Cell], rows: pd.DataFrame) -> str:
    """Return a table as Markdown: the caption, a table for each data set, and what the rows decide."""
    prior = rows[rows["sampler"] == "prior"]
    text = caption(table, chosen, grid, prior) + "\n"
    for data in dict.fromkeys(cell.data for cell in grid):
        labels = [cell.label for cell in grid if cell.data == data]
        shown = summary(prior[prior["data"] == data], table.metrics, _paper(table, data), labels)
        text += f"\n**{data}**\n\n{_markdown(shown)}\n"
        if len(samplers := by_sampler(rows[rows["data"] == data])):
            text += "\nBy sampler, over the seeds for which every sampler in the row was evaluated:\n\n"
            text += f"{_markdown(samplers)}\n"
    if lines := findings(table, prior):
        text += _DECIDED + "".join(f"- {data}: {line}.\n" for data, line in lines.items())
    return text


def _markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(disable_numparse=True)


def reproduce(table: Table, chosen: Reproduction) -> str:
    """Run the missing cells of a table and write it as ``NAME.md``, and its rows as ``NAME.csv``.

    If a cell fails, the others continue.

    Returns:
        The Markdown text.

    Raises:
        InputError: for invalid options and, after the table is written, if a cell failed.
    """
    grid = cells(table, chosen)
    check_options(table, grid, chosen)
    folder = Path(chosen.out, chosen.scale)
    folder.mkdir(parents=True, exist_ok=True)
    failed = run_grid(table, grid, chosen)
    rows = results.select(results.finished(grid, chosen.number_of_samples), grid)
    text = render(table, chosen, grid, rows)
    write_text(folder / f"{table.name}.md", text)
    write_text(folder / f"{table.name}.csv", rows[rows["sampler"] == "prior"].to_csv(index=False))
    if failed:
        print(text)
        reasons = pd.Series(failed).reset_index().groupby(0, sort=False)["index"].agg(", ".join)
        why = "; ".join(f"{names}: {reason}" for reason, names in reasons.items())
        raise InputError(f"{len(failed)} of {len(grid)} runs failed; the same command tries them again: {why}")
    return text


def run_script(table: Table) -> None:
    """Run the command line of a table's script: run the missing cells, then print and write the table."""

    def main(options: OmitArgPrefixes[Reproduction]) -> None:
        print(reproduce(table, options))

    main.__doc__ = f"{table.title}: run the missing cells, then print and write the table."
    script(main)


def report(tables: Iterable[Table], chosen: Reproduction, path: Path, kept: Path = results.RESULTS) -> Path:
    """Save the finished runs as rows, and write a page: tables with values of the paper, and what all rows decide.

    Each data set of which a table has values of the paper is shown at the scale with the most values of these metrics.

    Args:
        tables: the tables.
        chosen: ``out`` is the folder of the run folders; if it has none, the saved rows are used.
        path: path of the Markdown file.
        kept: folder of the saved rows, one file per scale.

    Returns:
        Path of the Markdown file.

    Raises:
        InputError: if there is neither a finished run nor a saved row; nothing is written then.
    """
    shown, found, number = "", "", 0
    for table in tables:
        best: dict[str, tuple[int, str]] = {}
        for scale in SCALES:
            here = replace(chosen, scale=scale)
            grid = cells(table, here)
            rows = results.select(results.keep(kept / f"{scale}.csv", grid, here.number_of_samples), grid)
            rows = rows[rows["sampler"] == "prior"]
            rows = rows.dropna(how="all", subset=[name for name in table.metrics if name in rows])
            number += len(rows)
            for data, line in findings(table, rows).items():
                found += f"- `{table.name}`, scale `{scale}`, {data}. {line}.\n"
            for data, each in rows.groupby("data", sort=False):
                paper = _paper(table, data)
                values = int(each.reindex(columns=list({metric for metric, _ in paper})).count().sum())
                if values >= best.get(data, (1, ""))[0]:
                    text = f"\n**{data}**, table `{table.name}`, scale `{scale}`\n\n"
                    text += f"{_markdown(summary(each, table.shown or table.metrics, paper))}\n\n"
                    best[data] = values, text + f"{caption(table, replace(here, data=(data,)), grid, each)}\n"
        shown += "".join(best[data][1] for data in table.data if data in best)
    if not number:
        raise InputError(
            f"no finished run in {chosen.out} and no row in {kept}: make some with nbvae reproduce TABLE; {path} is "
            "not changed"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, _PAGE + shown + (_DECIDED + found) * bool(found))
    return path
