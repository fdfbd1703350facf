"""Comparison of rows over seeds: means, Welch's test, Holm's correction within a table.

Every pair that a table names is tested in its metrics on every data set where both have at least two seeds. A pair is
decided if the difference of its means is significant at :data:`LEVEL` after Holm's correction over all tests of the
table; the sign of the difference decides which is lower. Two more tests ask for other things than a difference: whether
it is smaller than a given one (two one-sided tests), and whether one rate-distortion curve is below another.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy import stats

from pyro_nbvae.study.evaluation import METRICS
from pyro_nbvae.study.tables import Table

LEVEL = 0.05
_COLUMNS = ["data", "metric", "first", "second", "relation", "mean", "other", "p"]


def holm(p_values: pd.Series) -> pd.Series:
    """Return p-values corrected for their number by Holm's method.

    Example::

        >>> holm(pd.Series([0.01, 0.04, 0.03])).round(2).tolist()
        [0.03, 0.06, 0.06]
    """
    ordered = p_values.sort_values()
    corrected = (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1.0)
    return corrected.reindex(p_values.index)


def _p(test: object) -> float:
    """Return the p-value of a test of scipy; without any variance it is that of a difference of exactly 0."""
    p = float(test.pvalue)  # type: ignore[attr-defined]
    return 1.0 if np.isnan(p) else p


def _relation(mean: float, other: float) -> str:
    return "lower than" if mean < other else "higher than"


def _pairs(table: Table, rows: pd.DataFrame) -> Iterator[tuple[object, ...]]:
    """Yield a test of every difference and equivalence that the table asks for."""
    for (data, here), ((first, second), metrics) in itertools.product(
        rows.groupby("data", sort=False), table.compare.items()
    ):
        for metric in (name for name in metrics if name in here):
            a, b = (here.loc[here["label"] == label, metric].dropna() for label in (first, second))
            if min(len(a), len(b)) < 2:
                continue
            of, means = (data, METRICS[metric].heading, first, second), (a.mean(), b.mean())
            yield *of, _relation(*means), *means, _p(stats.ttest_ind(a, b, equal_var=False))
            if metric in table.within:
                most = table.within[metric]
                above = stats.ttest_ind(a, b - most, equal_var=False, alternative="greater")
                below = stats.ttest_ind(a, b + most, equal_var=False, alternative="less")
                yield *of, f"within {most:g} of", *means, max(_p(above), _p(below))


def _curves(table: Table, rows: pd.DataFrame) -> Iterator[tuple[object, ...]]:
    """Yield a test at every point of the second curve within the first's range of KL, paired by seed.

    The first curve is interpolated linearly, in the logarithm of the squared error, between the points of one seed.
    """
    for (data, here), (first, second) in itertools.product(rows.groupby("data", sort=False), table.curves):
        found = []
        for seed, one in here.dropna(subset=["kl", "mse"]).groupby("seed"):
            variant = one["label"].str.partition(" ")[0]
            curve, points = one[variant == first].sort_values("kl"), one[variant == second]
            if len(curve) > 1:
                at = np.interp(points["kl"], curve["kl"], np.log(curve["mse"]), left=np.nan, right=np.nan)
                found.append(points.assign(seed=seed, at=np.exp(at)).dropna(subset=["at"]))
        for label, each in pd.concat(found).groupby("label", sort=False) if found else ():
            if len(each) > 1:
                means = each["at"].mean(), each["mse"].mean()
                p = _p(stats.ttest_rel(each["at"], each["mse"]))
                yield data, "MSE at equal KL", first, label, _relation(*means), *means, p


def comparisons(table: Table, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the tests of a table, with p-values corrected for their number (``p``).

    Args:
        table: the table.
        rows: one row per run, with its ``data``, ``label``, ``seed`` and metrics.
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # values without any variance
        found = pd.DataFrame([*_pairs(table, rows), *_curves(table, rows)], columns=_COLUMNS)
    return found.assign(p=holm(found["p"].astype(float)))


def decided(found: pd.DataFrame) -> pd.DataFrame:
    """Return the tests that the rows decide at :data:`LEVEL`."""
    return found[found["p"] < LEVEL]
