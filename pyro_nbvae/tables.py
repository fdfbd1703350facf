"""Tables of metrics: which columns there are, how many digits they show, and which end is best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pyro_nbvae.files import write_text
from pyro_nbvae.metrics.latents import LABELLED, SHOTS


class Column(NamedTuple):
    """A metric as ``metrics.json`` names it, its heading, decimals, and which end is best, if either is."""

    metric: str
    heading: str
    digits: int
    best: Literal["low", "high"] | None = None


# FID-c and KID-c are in our classifiers' features, FID and KID in Inception's.
COLUMNS = (
    Column("mse", "MSE", 4, "low"),
    Column("ssim", "SSIM", 3, "high"),
    Column("fid_c", "FID-c", 2, "low"),
    Column("kid_c", "KID-c", 4, "low"),
    Column("fid", "FID", 1, "low"),
    Column("fid_paper", "FID (paper)", 1),
    Column("kid", "KID", 4, "low"),
    Column("elbo", "ELBO", 1, "high"),
    Column("bits_per_dim", "bits/dim", 3, "low"),
    Column("importance_weighted_bound", "IW bound", 1, "high"),
    Column("squared_error", "SSE", 2, "low"),
    Column("kl", "KL", 2),
    Column("objective", "SSE+βKL", 2, "low"),
    Column("dead_units", "dead", 0),
    Column("fano", "Fano", 2),
    Column("overdispersion", "var/mean", 2),
    Column("gradient_noise", "gradient noise", 2, "low"),
    Column("seconds_per_step", "s/step", 3),
    *(
        Column(f"{key}_{number}", f"{name} {number}", 3, "high")
        for key, name in (("knn", "kNN"), ("logistic", "logistic"), ("svm", "SVM"))
        for number in LABELLED
    ),
    Column("shattering", "shattering", 3, "high"),
    *(Column(f"few_shot_{number}", f"{number}-shot", 3, "high") for number in SHOTS),
)

Row = Mapping[str, Any]


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """The columns for which any row has a figure."""
    return [column for column in COLUMNS if any(row.get(column.metric) is not None for row in rows)]


def plain(rows: Sequence[Row]) -> str:
    """Metrics of several runs for a terminal, one run a line."""
    import pandas as pd

    shown = []
    columns = columns_of(rows)
    for row in rows:
        line = {"variant": row["variant"], "data": row["data"], "epochs": str(row["epochs"])}
        for metric, heading, digits, _ in columns:
            line[heading] = "-" if row.get(metric) is None else f"{row[metric]:.{digits}f}"
        shown.append(line)
    return pd.DataFrame(shown).to_string(index=False)


class Summary(NamedTuple):
    """A figure over several seeds: mean and standard deviation (None of one seed)."""

    mean: float
    deviation: float | None

    def shown(self, digits: int, plus_minus: str = " ± ") -> str:
        spread = "" if self.deviation is None else f"{plus_minus}{self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


def summarise(rows: Sequence[Row], metric: str) -> Summary | None:
    """Mean and deviation of a metric over runs that differ in the seed; None where none has it."""
    values = [float(row[metric]) for row in rows if row.get(metric) is not None]
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Summary(mean, None)
    return Summary(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)))


def _cells(groups: Mapping[str, Sequence[Row]], metrics: Sequence[str] | None, bold: str, plus_minus: str) -> Any:
    """Texts, a row a group and a column a metric; the best of a column goes into the pattern ``bold``."""
    import pandas as pd

    columns = [
        c for c in columns_of([r for rows in groups.values() for r in rows]) if not metrics or c.metric in metrics
    ]
    texts: dict[str, list[str]] = {}
    for column in columns:
        found = [summarise(rows, column.metric) for rows in groups.values()]
        means = [summary.mean for summary in found if summary is not None]
        best = {"low": min, "high": max}[column.best](means) if column.best and len(means) > 1 else None
        texts[column.heading] = [
            "-" if s is None else bold.format(text) if s.mean == best else text
            for s, text in ((s, s.shown(column.digits, plus_minus) if s else "") for s in found)
        ]
    return pd.DataFrame(texts, index=pd.Index(list(groups)))


def markdown(groups: Mapping[str, Sequence[Row]], metrics: Sequence[str] | None = None) -> str:
    """A Markdown table: a row a group of runs that differ in the seed, mean ± deviation, the best of a column in bold.

    Args:
        groups: label to the metrics of its runs; a group without runs shows dashes.
        metrics: which columns; None for all that there are.
    """
    return _cells(groups, metrics, "**{}**", " ± ").to_markdown(disable_numparse=True)


def latex(groups: Mapping[str, Sequence[Row]], metrics: Sequence[str] | None = None, *, caption: str = "") -> str:
    """The same as :func:`markdown` in LaTeX, for the package booktabs."""
    cells = _cells(groups, metrics, r"\textbf{{{}}}", r" $\pm$ ")
    return cells.to_latex(escape=False, caption=caption or None).replace("β", r"$\beta$").replace("_", r"\_")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """The scalar metrics of runs, one run a line."""
    import pandas as pd

    scalars = [{k: v for k, v in row.items() if not isinstance(v, list)} for row in rows]
    write_text(path, pd.DataFrame(scalars).to_csv(index=False))
