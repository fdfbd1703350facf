"""Tables of metrics as Markdown, LaTeX, CSV and plain text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pyro_nbvae.study.evaluation import METRICS, Metric
from pyro_nbvae.study.files import write_text
from pyro_nbvae.study.provenance import provenance

if TYPE_CHECKING:
    import pandas as pd

Row = Mapping[str, Any]


def columns_of(rows: Sequence[Row], metrics: Sequence[str] | None = None) -> list[Metric]:
    """Return the metrics (of those named, or of all) that have a value in at least one row."""
    return [
        one
        for one in METRICS.values()
        if (metrics is None or one.name in metrics) and any(row.get(one.name) is not None for row in rows)
    ]


def _measured(row: Row, metric: Metric) -> str:
    """Return a value with its standard error, both to two significant digits of the error; "-" without a value."""
    value, error = row.get(metric.name), row.get(f"{metric.name}_error")
    if value is None:
        return "-"
    if error is None or not (0 < error < math.inf and math.isfinite(value)):
        return f"{value:.{metric.digits}f}"
    digits = 1 - math.floor(math.log10(float(f"{error:.1e}")))
    return f"{round(value, digits):.{max(0, digits)}f} ± {round(error, digits):.{max(0, digits)}f}"


def plain(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Format the metrics of several runs for a terminal: one column per run, one line per metric.

    Args:
        rows: the content of the runs' ``metrics.json``.
        names: headings of the columns, such as the run folders.
    """
    lines = [["run", *names]]
    lines += [[about, *(str(row[about]) for row in rows)] for about in ("variant", "data", "epochs")]
    columns = columns_of(rows)
    errors = {f"{one.name}_error" for one in columns}
    lines += [[one.heading, *(_measured(row, one) for row in rows)] for one in columns if one.name not in errors]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


class Summary(NamedTuple):
    """Mean and standard deviation of a metric over seeds; the deviation of a single seed is None."""

    mean: float
    deviation: float | None

    def shown(self, digits: int, plus_minus: str = " ± ") -> str:
        spread = "" if self.deviation is None else f"{plus_minus}{self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


def summarise(rows: Sequence[Row], metric: str) -> Summary | None:
    """Summarise a metric over runs that differ in the seed; None without any, or for speeds of several machines."""
    if METRICS[metric].of == "speed" and len({(row.get("machine"), row.get("threads")) for row in rows}) > 1:
        return None
    values = [float(row[metric]) for row in rows if row.get(metric) is not None]
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Summary(mean, None)
    return Summary(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)))


def best_of(found: Mapping[str, Summary], metric: Metric) -> str | None:
    """Return the label with the best mean, the lowest unless high values are better; None if there is none."""
    sign = -1 if metric.best == "high" else 1
    return min(found, key=lambda label: sign * found[label].mean, default=None)


def emphasised(
    found: Mapping[str, Summary], metric: Metric, bold: str = "**{}**", plus_minus: str = " ± "
) -> dict[str, str]:
    """Return the summaries as text, those with the best mean formatted with ``bold``."""
    leader = best_of(found, metric)
    best = found[leader].mean if leader is not None else None
    texts = {label: summary.shown(metric.digits, plus_minus) for label, summary in found.items()}
    return {label: bold.format(text) if found[label].mean == best else text for label, text in texts.items()}


def _cells(
    groups: Mapping[str, Sequence[Row]], metrics: Sequence[str] | None, bold: str, plus_minus: str
) -> pd.DataFrame:
    """Return the table as text: one row per group, one column per metric, the best value formatted with ``bold``."""
    import pandas as pd

    columns = columns_of([r for rows in groups.values() for r in rows], metrics)
    texts: dict[str, list[str]] = {}
    for column in columns:
        found = {label: s for label, rows in groups.items() if (s := summarise(rows, column.name))}
        compared = column.best is not None and len(found) > 1
        shown = emphasised(found, column, bold if compared else "{}", plus_minus)
        texts[column.heading] = [shown.get(label, "-") for label in groups]
    return pd.DataFrame(texts, index=pd.Index(list(groups)))


def markdown(groups: Mapping[str, Sequence[Row]], metrics: Sequence[str] | None = None) -> str:
    """Return a Markdown table of means ± standard deviations over seeds, the best value of each column in bold.

    Args:
        groups: maps a label to the metrics of its runs, one row of the table each; without runs it shows dashes.
        metrics: names of the columns. Default: all metrics that have a value.
    """
    return _cells(groups, metrics, "**{}**", " ± ").to_markdown(disable_numparse=True)


def latex(groups: Mapping[str, Sequence[Row]], metrics: Sequence[str] | None = None, *, caption: str = "") -> str:
    """Return the table of :func:`markdown` in LaTeX, for the package booktabs."""
    text = _cells(groups, metrics, r"\textbf{{{}}}", r" $\pm$ ").to_latex(escape=False, caption=caption or None)
    for letter, command in {"β": r"$\beta$", "τ": r"$\tau$", "_": r"\_"}.items():
        text = text.replace(letter, command)
    return text


def write_page(path: Path, rows: Sequence[Row], caption: str, command: str, device: str = "cpu") -> str:
    """Write a table for the documentation, in Markdown, with a caption that includes its provenance.

    Args:
        path: path of the file, which pages of the documentation include.
        rows: one dictionary per row; missing values are left empty.
        caption: what the table shows.
        command: the command that writes the table.
        device: the device of the measurements.

    Returns:
        The text of the file.
    """
    import pandas as pd
    import torch

    table = pd.DataFrame(rows, dtype=object).fillna("").astype(str).to_markdown(index=False, disable_numparse=True)
    by = provenance(torch.device(device))
    made = f"{by['date']}, commit {by['commit']}, {by['machine']}, {by['threads']} threads, torch {by['torch_version']}"
    text = f"{table}\n\n{caption} (`{command}`; {made})\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return text


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write the scalar metrics of runs as CSV, one line per run."""
    import pandas as pd

    scalars = [{k: v for k, v in row.items() if not isinstance(v, list)} for row in rows]
    write_text(path, pd.DataFrame(scalars).to_csv(index=False))
