"""Tables made from the run folders of a grid, and the report with all tables."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import get_args

from tyro.conf import OmitArgPrefixes

from pyro_nbvae.errors import InputError
from pyro_nbvae.study import claims, plugins, results
from pyro_nbvae.study.build import check_choices
from pyro_nbvae.study.config import SAMPLERS, SamplerName
from pyro_nbvae.study.evaluation import METRICS
from pyro_nbvae.study.features import suffix_of
from pyro_nbvae.study.files import write_text
from pyro_nbvae.study.formats import Summary, best_of, columns_of, emphasised, latex, markdown, summarise, write_csv
from pyro_nbvae.study.grid import Cell, Table, cells
from pyro_nbvae.study.results import Row
from pyro_nbvae.study.runner import check_options, number_of_samples, run_grid
from pyro_nbvae.study.scales import SCALES, TABLES, FeaturesName, Reproduction, ScaleName

# data set -> label -> one row per seed
Groups = dict[str, dict[str, list[Row]]]


def group(grid: Iterable[Cell], rows: dict[results.Key, Row], sampler: SamplerName = "prior") -> Groups:
    """Group the rows of a grid as {data set: {label: one row per seed}}."""
    by_data: Groups = {}
    for cell in grid:
        groups = by_data.setdefault(cell.config.data, {})
        groups.setdefault(cell.label, [])
        row = results.of_cell(rows, cell, sampler)
        if row is not None:
            groups[cell.label].append(row)
    return by_data


def grouped(grid: Sequence[Cell], rows: dict[results.Key, Row]) -> dict[SamplerName, Groups]:
    """Group the rows of a grid by sampler."""
    return {sampler: group(grid, rows, sampler) for sampler in SAMPLERS}


def command(table: Table, options: Reproduction) -> str:
    """Return the command that makes a table, with all flags that differ from their defaults except paths."""
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


def _values(rows: Iterable[Row], name: str) -> str:
    """Return the different values that rows have under a name, sorted, as text."""
    found = sorted({row[name] for row in rows if row.get(name) is not None})
    return ", ".join(f"{int(v):,}" if isinstance(v, int | float) else str(v) for v in found)


def caption(table: Table, options: Reproduction, grid: Sequence[Cell], rows: Sequence[Row], *, mark: str = "") -> str:
    """Return the caption of a table: the conditions of its runs and metrics, and the command that makes it.

    ``mark`` stands on either side of the command: a backtick in Markdown, where a dash of code stays a dash.
    """

    def all_of(name: str) -> str:
        return _values(rows, name)

    # the features and samples of the rows, which are not always those of the options
    used = Counter(name for row in rows for name in str(row.get("feature_sets", "")).split(", "))
    features = tuple(name for name in get_args(FeaturesName) if name in used)
    shown = {one.of for one in columns_of(rows, table.metrics)}
    of = {
        "held-out data": f"Measured on {all_of('test_size')} held-out observations with integer counts.",
        "samples": f"FID and KID of {all_of('generated_samples')} samples of the prior "
        f"against all training images of the data set, features: {', '.join(features)}.",
        "latents": "Accuracies of classifiers on latents, on held-out data.",
    }
    measured = "".join(f" {text}" for kind, text in of.items() if kind in shown)
    made = (
        f"Trained at commit {all_of('commit') or 'unknown'}, on {all_of('machine') or 'unknown'}, torch "
        f"{all_of('torch_version') or 'unknown'}, threads per run {all_of('threads') or 'unknown'}."
    )
    known = table.command or table.name in TABLES
    drawn = max((int(row["generated_samples"]) for row in rows if row.get("generated_samples")), default=None)
    samples = None if drawn == SCALES[options.scale].samples else drawn
    # of several networks with the same metrics, a command names the one of most rows
    commanded = {suffix_of(name): name for name in sorted(features, key=used.__getitem__)}
    named = tuple(name for name in features if name in commanded.values())
    run_with = replace(options, features=named or options.features, samples=samples)
    made_by = f"Made by: {mark}{command(table, run_with)}{mark}" if known else f"A table of its own, {table.name}"
    batches = ", ".join(map(str, sorted({cell.config.batch_size or 0 for cell in grid})))
    return (
        f"{table.title}. Scale {options.scale}: epochs {all_of('epochs')}; training data {all_of('train_size')}; "
        f"batches of {batches}; seeds {all_of('seed')}.{measured} {made} {made_by}"
    )


def _summaries(groups: Groups, metric: str) -> dict[str, dict[str, Summary]]:
    """Return {data set: {label: summary}} of the runs that have this metric."""
    return {
        data: {label: s for label, rows in by_label.items() if (s := summarise(rows, metric))}
        for data, by_label in groups.items()
    }


def beside(paper: Mapping[tuple[str, str, str], float], ours: Mapping[ScaleName, Groups]) -> str:
    """Return a Markdown table of the paper's figures beside ours at each scale.

    A line for each figure, and after those of one data set and metric a line with the best of the variants measured.
    """
    lines = ["| data | metric | variant | paper |" + "".join(f" ours, {scale} |" for scale in ours)]
    lines.append("|---|---|---|" + "---|" * (1 + len(ours)))
    for data, metric in dict.fromkeys((data, metric) for data, metric, _ in paper):
        one = METRICS[metric]
        found = [_summaries(groups, metric).get(data, {}) for groups in ours.values()]
        start = f"| {data} | {one.heading} |"
        for label in (label for at, of, label in paper if (at, of) == (data, metric)):
            shown = [each[label].shown(one.digits) if label in each else "-" for each in found]
            lines.append(f"{start} {label} | {paper[data, metric, label]:g} | {' | '.join(shown)} |")
        names = [best_of(each, one) for each in found]
        best = [f"{f[n].shown(one.digits)} ({n})" if n else "-" for f, n in zip(found, names, strict=True)]
        lines.append(f"{start} best of ours | - | {' | '.join(best)} |")
    return "\n".join(lines) + "\n"


def across(paper: Mapping[tuple[str, str, str], float], ours: Mapping[ScaleName, Groups]) -> str:
    """Return a Markdown table for each metric of the paper that we have: lines are variants, columns data sets.

    Our values are those of the scale with the most values; the paper's values are above them. The best of ours is bold.
    """
    import pandas as pd

    text = ""
    for metric in dict.fromkeys(metric for _, metric, _ in paper):
        one = METRICS[metric]
        found = {scale: _summaries(groups, metric) for scale, groups in ours.items()}
        scale = max(reversed(found), key=lambda scale: sum(map(len, found[scale].values())))
        if not any(found[scale].values()):
            continue
        columns: dict[str, dict[str, str]] = {}
        for data, by_label in found[scale].items():
            figures = {label: v for (at, of, label), v in paper.items() if (at, of) == (data, metric)}
            columns[data] = {f"the paper, {label}": f"{v:g}" for label, v in figures.items()}
            columns[data] |= emphasised(by_label, one)
        labels = [f"the paper, {label}" for label in dict.fromkeys(label for _, _, label in paper)]
        labels += dict.fromkeys(label for by_label in ours[scale].values() for label in by_label)
        table = pd.DataFrame(columns, index=pd.Index(labels)).dropna(how="all").dropna(axis=1, how="all").fillna("-")
        trained = "; ".join(
            f"{data} {_values(chain.from_iterable(ours[scale][data].values()), 'train_size')}" for data in table.columns
        )
        text += f"\n**{one.heading}**, scale {scale}, the best of ours in bold. Training data of ours: {trained}.\n\n"
        text += f"{table.to_markdown(disable_numparse=True)}\n"
    return text


def by_sampler(of: Mapping[SamplerName, Groups], data: str) -> str:
    """Return a Markdown table of distances on a data set by sampler; empty if no run has a sampler but the prior.

    A line compares the same seeds, those that have all of its samplers; without such a seed it is left out.
    """
    import pandas as pd

    groups = {sampler: by_data.get(data, {}) for sampler, by_data in of.items()}
    others = {label for sampler in groups if sampler != "prior" for label, found in groups[sampler].items() if found}
    lines = []
    for label in (label for label in groups["prior"] if label in others):
        line = {"": label}
        for metric in ("fid_c", "fid"):
            measured = {
                sampler: {row["seed"]: row for row in by_label[label] if row.get(metric) is not None}
                for sampler, by_label in groups.items()
            }
            seeds = {row["seed"] for row in groups["prior"][label]}
            seeds = {seed for seed in seeds if all(seed in by_seed for by_seed in measured.values() if by_seed)}
            for sampler, by_seed in measured.items():
                found = summarise([row for seed, row in by_seed.items() if seed in seeds], metric)
                line[f"{METRICS[metric].heading}, {sampler}"] = found.shown(METRICS[metric].digits) if found else ""
        if any(text for name, text in line.items() if name):
            lines.append(line)
    table = pd.DataFrame(lines).replace("", None).dropna(axis=1, how="all").fillna("-")
    return table.to_markdown(index=False, disable_numparse=True) if lines else ""


def render(
    table: Table, options: Reproduction, grid: Sequence[Cell], of: Mapping[SamplerName, Groups]
) -> tuple[str, str, Sequence[Row]]:
    """Render a table and its claims from the groups of its rows, by sampler.

    Returns:
        ``(markdown, latex, rows)``, with the rows that the table is made from.
    """
    by_data = of["prior"]
    runs = [{"label": label, **row} for groups in by_data.values() for label, found in groups.items() for row in found]
    under = caption(table, options, grid, runs)
    text, tex = caption(table, options, grid, runs, mark="`") + "\n", ""
    for data, groups in by_data.items():
        text += f"\n**{data}**\n\n{markdown(groups, table.metrics)}\n"
        samplers = by_sampler(of, data)
        if samplers:
            text += f"\nBy the distribution of the latents, over the seeds that have all of a line:\n\n{samplers}\n"
        tex += latex(groups, table.metrics, caption=f"{data}. {under}") + "\n"
    if table.claims:
        text += f"\nClaims:\n\n{claims.listed(table.claims, by_data)}"
    return text, tex, runs


def reproduce(table: Table, options: Reproduction) -> str:
    """Run the missing cells of a table and write it as ``NAME.md``, ``.csv`` and ``.tex``.

    If a cell fails, the others continue.

    Returns:
        The Markdown text.

    Raises:
        InputError: for invalid options and, after the table is written, if a cell failed.
    """
    grid = cells(table, options)
    check_options(table, grid, options)
    folder = Path(options.out) / options.scale
    folder.mkdir(parents=True, exist_ok=True)
    failed = run_grid(table, grid, options)
    text, tex, runs = render(table, options, grid, grouped(grid, results.rows_of(grid, number_of_samples(options))))
    write_text(folder / f"{table.name}.md", text)
    write_text(folder / f"{table.name}.tex", tex)
    write_csv(folder / f"{table.name}.csv", runs)
    if failed:
        print(text)
        names: dict[str, list[str]] = {}
        for name, reason in failed.items():
            names.setdefault(reason, []).append(name)
        why = "; ".join(f"{', '.join(each)}: {reason}" for reason, each in names.items())
        raise InputError(f"{len(failed)} of {len(grid)} runs failed; the same command tries them again: {why}")
    return text


def command_of(table: Table) -> Callable[[Reproduction], None]:
    """Return the command line of a table's script: run the missing cells, then print and write the table."""

    def main(options: OmitArgPrefixes[Reproduction]) -> None:
        print(reproduce(table, options))

    main.__doc__ = f"{table.title}: run the missing cells, then print and write the table."
    return main


def _measured(table: Table, row: Row | None) -> bool:
    return row is not None and any(row.get(name) is not None for name in table.metrics)


def report(tables: Iterable[Table], options: Reproduction, path: Path, kept: Path = results.RESULTS) -> Path:
    """Save the finished runs as rows, and write all tables and claims with results to one Markdown file.

    Args:
        tables: the tables.
        options: ``out`` is the folder of the run folders; if it has none, the saved rows are used.
        path: path of the Markdown file.
        kept: folder of the saved rows, one file per scale.

    Returns:
        Path of the Markdown file.

    Raises:
        InputError: if there is neither a finished run nor a saved row; nothing is written then.
    """
    check_choices(options)
    parts, verdicts, others, figures = "", "", [], ""
    for table in tables:
        ours: dict[ScaleName, Groups] = {}
        for scale in SCALES:
            here = replace(options, scale=scale)
            grid = cells(table, here)
            rows = results.keep(kept / f"{scale}.csv", grid, number_of_samples(here))
            there = [cell for cell in grid if _measured(table, results.of_cell(rows, cell))]
            if not there:
                continue
            parts += f"\n## {table.name}, {scale}\n\n{len(there)} of {len(grid)} runs are finished. "
            of = grouped(there, rows)
            ours[scale] = of["prior"]
            parts += render(table, here, there, of)[0]
            name = f"{table.name}, {scale}"
            decided, number = claims.summary(table.claims, ours[scale], name)
            verdicts += decided
            others += [f"{name} ({number})"] * bool(number)
        if table.paper and ours:
            figures += (
                "\n## Comparison with the paper\n\nOurs have the settings of `--preset published` and lengths of our "
                "own; only scale paper has the paper's schedules and its 200 epochs.\n\n"
                f"{beside(table.paper, ours)}{across(table.paper, ours)}"
            )
    if not parts:
        raise InputError(
            f"no finished run in {options.out} and no row in {kept}: make some with nbvae reproduce "
            f"TABLE; {path} is not changed"
        )
    text = (
        "# Results\n\nMade by `nbvae reproduce --report` from the rows in `results/`. Mean ± standard deviation over "
        "seeds.\n"
    )
    text += figures
    if verdicts or others:
        text += "\n## Claims\n"
    if verdicts:
        text += (
            "\nA comparison holds or fails if its difference is significant at the 5 % level; if it is not, or there "
            "are fewer than two seeds, there are not enough runs. A claim holds if all its comparisons hold, and holds "
            "where measured if some have no values. It fails if a pair of variants differs the wrong way at the level "
            "of 5 % / n, where n is the number of pairs that the claim tests. So not enough runs may stand beside "
            "comparisons that fail, each at 5 %. The values are below each table. Claims of the paper are tested with "
            "the settings of `--preset published`, except at scale paper.\n\n"
            f"| verdict | comparisons | claimed by | claim | table |\n|---|---|---|---|---|\n{verdicts}"
        )
    if others:
        text += f"\nClaims without a decided comparison, by table, and how many: {'; '.join(others)}.\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text + parts)
    return path
