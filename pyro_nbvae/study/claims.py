"""Claims about the results in a table, and the statistical tests that decide them.

A comparison holds or fails if the difference between the means over seeds is significant at the 5 % level (two-sided
Welch's t-test). If it is not significant, or a variant has fewer than two seeds, the verdict is *not enough runs*. If
a variant has no value, the comparison is *not measured*. A claim with several comparisons holds if all hold, and *holds
where measured* if all that are measured hold. It fails if a pair of variants differs the wrong way at the 5 % level
divided by the number of pairs that the claim tests (Bonferroni), since among many some do by chance. So a claim with
comparisons that fail can be *not enough runs*.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np

from pyro_nbvae.errors import InputError
from pyro_nbvae.study.evaluation import METRICS

Verdict = Literal["holds", "holds where measured", "fails", "not enough runs", "not measured"]
LEVEL = 0.05
# data set -> label -> one row per seed
Groups = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]


class Finding(NamedTuple):
    """Result of one comparison.

    Args:
        verdict: ``holds``, ``fails``, ``not enough runs`` or ``not measured``.
        figures: the compared values, as text; if it is not measured, what is missing.
        p_values: of each pair that was tested, also if others are missing: small if the opposite of the claim is
            significant. A failure without any is certain.

    Example::

        >>> Finding("holds", "mnist, MSE: CMP 0.0100, P-VAE 0.0200").verdict
        'holds'
    """

    verdict: Verdict
    figures: str
    p_values: Sequence[float] = ()


class Condition(Protocol):
    """A condition on the rows of a table, such as :class:`Ahead`.

    Example::

        >>> class Finite:
        ...     def judge(self, groups):
        ...         return [Finding("holds", "all values are finite")]
        >>> Claim("All values are finite.", [Finite()]).judge({})[0]
        'holds'
    """

    def judge(self, groups: Groups) -> list[Finding]:
        """Return one finding per comparison.

        Args:
            groups: rows by data set and label, one per seed.
        """


def values(groups: Groups, data: str, label: str, metric: str) -> list[float]:
    """Return the values of a metric, one per seed; missing values are left out.

    Args:
        groups: rows by data set and label, one per seed.
        data: name of the data set.
        label: label of the runs.
        metric: name of the metric.

    Example::

        >>> values({"mnist": {"CMP": [{"mse": 0.25}, {"mse": 0.5}]}}, "mnist", "CMP", "mse")
        [0.25, 0.5]
    """
    rows = groups.get(data, {}).get(label, [])
    return [float(row[metric]) for row in rows if row.get(metric) is not None]


def _shown(label: str, figures: Sequence[float], metric: str) -> str:
    if not figures:
        return f"{label} -"
    digits = METRICS[metric].digits
    mean = statistics.fmean(figures)
    if len(figures) == 1:
        return f"{label} {mean:.{digits}f} (one seed)"
    return f"{label} {mean:.{digits}f} ± {statistics.stdev(figures):.{digits}f}"


def _finding(tests: Sequence[_Test], data: str, metric: str, found: Mapping[str, Sequence[float]]) -> Finding:
    """Combine several tests into one finding that shows the values of every label.

    Without a value of every label the comparison is not measured, unless a part of it fails.
    """
    missing = [label for label, each in found.items() if not each]
    unknown = bool(missing) and all(test.verdict != "fails" for test in tests)
    shown = ", ".join(missing if unknown else (_shown(label, each, metric) for label, each in found.items()))
    figures = f"{data}, {METRICS[metric].heading}: {shown}"
    finding = _judged(tests, figures)
    return finding._replace(verdict="not measured") if unknown else finding


def _judged(tests: Sequence[_Test], figures: str) -> Finding:
    """Combine several tests into one finding."""
    p_values = [test.against for test in tests if test is not _OPEN]
    return Finding(combined({test.verdict for test in tests}), figures, p_values)


class _Test(NamedTuple):
    """P-values (two-sided) of a statement: small ``in_favour`` if it is true, small ``against`` if its opposite is."""

    in_favour: float
    against: float

    @property
    def verdict(self) -> Verdict:
        return "holds" if self.in_favour < LEVEL else "fails" if self.against < LEVEL else "not enough runs"


# Without two seeds nothing is tested.
_OPEN = _Test(1.0, 1.0)


class _Estimate(NamedTuple):
    """An estimated mean, its standard error and Student's degrees of freedom."""

    mean: float
    error: float
    freedom: float

    def above(self, bound: float) -> _Test:
        """Test whether the mean is above a bound."""
        from scipy import stats

        difference = self.mean - bound
        if not self.error > 0:
            return _Test(float(difference <= 0), float(difference >= 0))
        t = difference / self.error
        return _Test(2 * float(stats.t.sf(t, self.freedom)), 2 * float(stats.t.cdf(t, self.freedom)))


def _difference(a: Sequence[float], b: Sequence[float]) -> _Estimate | None:
    """Return mean(a) - mean(b) with Welch's error; None if either has fewer than two values."""
    if min(len(a), len(b)) < 2:
        return None
    parts = [statistics.variance(each) / len(each) for each in (a, b)]
    total = sum(parts)
    freedom = math.inf
    if total > 0:
        freedom = 1 / sum((v / total) ** 2 / (len(each) - 1) for v, each in zip(parts, (a, b), strict=True))
    return _Estimate(statistics.fmean(a) - statistics.fmean(b), math.sqrt(total), freedom)


def _mean(figures: Sequence[float]) -> _Estimate | None:
    """Return the mean of the values; None for fewer than two."""
    if len(figures) < 2:
        return None
    return _Estimate(statistics.fmean(figures), statistics.stdev(figures) / math.sqrt(len(figures)), len(figures) - 1)


def _positive(estimate: _Estimate | None) -> _Test:
    return _OPEN if estimate is None else estimate.above(0.0)


def _sign(metric: str) -> int:
    """Return 1 if high values of a metric are better, -1 if low ones are.

    Raises:
        InputError: if neither is.
    """
    one = METRICS[metric]
    if one.best is None:
        raise InputError(f"{one.heading} ({metric}) has no better direction: compare another metric, or use Alike")
    return 1 if one.best == "high" else -1


@dataclass(frozen=True)
class Ahead:
    """Condition: every label in ``first`` has a better mean than every label in ``others``, on each data set.

    Args:
        metric: a key of :data:`~pyro_nbvae.study.evaluation.METRICS`; its ``best`` defines which value is better.
        first: labels that should be better.
        others: labels to compare with.
        data: names of the data sets.

    Example::

        >>> rows = {"a": [{"mse": 0.1}, {"mse": 0.11}], "b": [{"mse": 0.4}, {"mse": 0.41}]}
        >>> Ahead("mse", ["a"], ["b"], ["mnist"]).judge({"mnist": rows})[0].verdict
        'holds'
    """

    metric: str
    first: Sequence[str]
    others: Sequence[str]
    data: Sequence[str]

    def judge(self, groups: Groups) -> list[Finding]:
        """Return one finding per data set; it holds if every pair of labels holds.

        Raises:
            InputError: if neither high nor low values of the metric are better.
        """
        return [self._on(groups, data) for data in self.data]

    def _on(self, groups: Groups, data: str) -> Finding:
        sign = _sign(self.metric)
        found = {label: values(groups, data, label, self.metric) for label in (*self.first, *self.others)}
        signed = {label: [sign * v for v in each] for label, each in found.items()}
        tests = [_positive(_difference(signed[a], signed[b])) for a in self.first for b in self.others]
        return _finding(tests, data, self.metric, found)


@dataclass(frozen=True)
class Alike:
    """Condition: the mean of a metric is the same for all labels, up to a difference that does not matter.

    It holds if the confidence interval of every difference lies within the limit, and fails if one lies outside.

    Args:
        metric: a key of :data:`~pyro_nbvae.study.evaluation.METRICS`.
        labels: the labels; all others are compared with the first.
        data: names of the data sets.
        within: largest difference, in the units of the metric.

    Example::

        >>> rows = {"a": [{"mse": 1.0}, {"mse": 1.001}], "b": [{"mse": 1.002}, {"mse": 1.001}]}
        >>> Alike("mse", ["a", "b"], ["mnist"], within=0.1).judge({"mnist": rows})[0].verdict
        'holds'
    """

    metric: str
    labels: Sequence[str]
    data: Sequence[str]
    within: float

    def judge(self, groups: Groups) -> list[Finding]:
        """Return one finding per data set."""
        return [self._on(groups, data) for data in self.data]

    def _on(self, groups: Groups, data: str) -> Finding:
        found = {label: values(groups, data, label, self.metric) for label in self.labels}
        estimates = [_difference(found[label], found[self.labels[0]]) for label in self.labels[1:]]
        return _finding([self._within(each) for each in estimates], data, self.metric, found)

    def _within(self, difference: _Estimate | None) -> _Test:
        if difference is None:
            return _OPEN
        low, high = difference.above(-self.within), difference.above(self.within)
        return _Test(max(low.in_favour, high.against), min(low.against, high.in_favour))


@dataclass(frozen=True)
class Reaches:
    """Condition: the mean of a metric is better than a given value, such as a published result.

    Args:
        metric: a key of :data:`~pyro_nbvae.study.evaluation.METRICS`.
        label: label of the runs.
        data: name of the data set.
        figure: the value to reach.

    Example::

        >>> rows = {"a": [{"mse": 0.1}, {"mse": 0.11}]}
        >>> Reaches("mse", "a", "mnist", 0.5).judge({"mnist": rows})[0].verdict
        'holds'
    """

    metric: str
    label: str
    data: str
    figure: float

    def judge(self, groups: Groups) -> list[Finding]:
        """Return a single finding.

        Raises:
            InputError: if neither high nor low values of the metric are better.
        """
        found = values(groups, self.data, self.label, self.metric)
        sign = _sign(self.metric)
        test = _positive(_mean([sign * (v - self.figure) for v in found]))
        one = _finding([test], self.data, self.metric, {self.label: found})
        return [one._replace(figures=f"{one.figures}, against {self.figure:g}")]


@dataclass(frozen=True)
class BelowCurve:
    """One rate-distortion curve lies below the points of another: a smaller distortion at the same rate.

    The curve is interpolated linearly, in the logarithm of the distortion, between the points of one seed; a finding
    compares it with the other's points of that seed (Student's t test over the seeds). Points outside the curve's range
    of rates are not compared.

    Args:
        curve: labels of the points of the curve.
        points: labels of the points that it is compared with.
        data: on which data set.
        rate, distortion: metrics.
    """

    curve: Sequence[str]
    points: Sequence[str]
    data: str
    rate: str = "kl"
    distortion: str = "mse"

    def judge(self, groups: Groups) -> list[Finding]:
        """Return one finding for each point within the curve's range of rates; without any, one that is open."""
        findings = [found for label in self.points if (found := self._at(groups, label)) is not None]
        some = all(any(self._by_seed(groups, label) for label in each) for each in (self.curve, self.points))
        why = f"{self._heading}: no point within the curve's range"
        return findings or [Finding("not enough runs" if some else "not measured", why)]

    @property
    def _heading(self) -> str:
        return f"{self.data}, {METRICS[self.distortion].heading} at equal {METRICS[self.rate].heading}"

    def _by_seed(self, groups: Groups, label: str) -> dict[Any, tuple[float, float]]:
        rows = groups.get(self.data, {}).get(label, [])
        complete = [row for row in rows if row.get(self.rate) is not None and row.get(self.distortion) is not None]
        return {row.get("seed"): (float(row[self.rate]), float(row[self.distortion])) for row in complete}

    def _at(self, groups: Groups, label: str) -> Finding | None:
        curves = [self._by_seed(groups, each) for each in self.curve]
        ours, theirs = [], []
        for seed, (rate, distortion) in self._by_seed(groups, label).items():
            known = sorted(points[seed] for points in curves if seed in points)
            if len(known) < 2 or not known[0][0] <= rate <= known[-1][0]:
                continue
            ours.append(math.exp(np.interp(rate, [r for r, _ in known], [math.log(d) for _, d in known])))
            theirs.append(distortion)
        if not ours:
            return None
        below = [distortion - at for at, distortion in zip(ours, theirs, strict=True)]
        shown = f"{_shown('the curve', ours, self.distortion)}, {_shown(label, theirs, self.distortion)}"
        return _judged([_positive(_mean(below))], f"{self._heading}: {shown}")


@dataclass(frozen=True)
class Claim:
    """A claim about the results in a table.

    Args:
        sentence: the claim, in one sentence.
        conditions: the conditions, which must all hold.
        source: origin of the claim, ``paper`` or ``ours``.

    Example::

        >>> claim = Claim("A is better than B.", [Ahead("mse", ["a"], ["b"], ["mnist"])])
        >>> claim.judge({})[0]
        'not measured'
    """

    sentence: str
    conditions: Sequence[Condition]
    source: Literal["paper", "ours"] = "ours"

    def judge(self, groups: Groups) -> tuple[Verdict, list[Finding]]:
        """Return the verdict on the claim and its findings.

        Args:
            groups: rows by data set and label, one per seed.
        """
        findings = [finding for condition in self.conditions for finding in condition.judge(groups)]
        number = sum(len(finding.p_values) for finding in findings)  # of pairs
        verdicts = {
            "not enough runs"
            if one.verdict == "fails" and number * min(one.p_values, default=0.0) >= LEVEL
            else one.verdict
            for one in findings
        }
        return combined(verdicts), findings


def combined(verdicts: set[Verdict]) -> Verdict:
    """Combine verdicts: ``fails`` if one fails, ``holds`` if all hold, ``holds where measured`` if those measured hold.

    Args:
        verdicts: the verdicts.

    Example::

        >>> combined({"holds", "not enough runs"})
        'not enough runs'
        >>> combined({"holds", "not measured"})
        'holds where measured'
    """
    if verdicts == {"holds", "not measured"}:
        return "holds where measured"
    order: tuple[Verdict, ...] = ("fails", "not enough runs", "holds where measured", "holds")
    return next((one for one in order if one in verdicts), "not measured")


def listed(claims: Sequence[Claim], groups: Groups) -> str:
    """Return claims with their verdicts and values as a Markdown list.

    Args:
        claims: the claims.
        groups: rows by data set and label, one per seed.

    Example::

        >>> print(listed([Claim("A is better than B.", [Ahead("mse", ["a"], ["b"], ["mnist"])])], {}).strip())
        - **not measured**: A is better than B.
          - not measured: mnist, MSE: a, b
    """
    lines = []
    for claim in claims:
        verdict, findings = claim.judge(groups)
        by = "The paper: " if claim.source == "paper" else ""
        lines.append(f"- **{verdict}**: {by}{claim.sentence}\n")
        lines += [f"  - {one.verdict}: {one.figures}\n" for one in findings if one.verdict != "not measured"]
        missing = "; ".join(one.figures for one in findings if one.verdict == "not measured")
        lines += [f"  - not measured: {missing}\n"] * bool(missing)
    return "".join(lines)


def summary(claims: Sequence[Claim], groups: Groups, table: str) -> tuple[str, int]:
    """Summarise the claims with at least one decided comparison.

    Args:
        claims: the claims.
        groups: rows by data set and label, one per seed.
        table: name of the table, for the last column.

    Returns:
        The rows of a Markdown table, one per claim: verdict, numbers of comparisons, source, sentence, table. And the
        number of the other claims.

    Example::

        >>> claim = Claim("A is better than B.", [Ahead("mse", ["a"], ["b"], ["mnist", "cifar16"])])
        >>> groups = {"mnist": {"a": [{"mse": 1.0}, {"mse": 1.1}], "b": [{"mse": 2.0}, {"mse": 2.1}]}}
        >>> print(summary([claim], groups, "main")[0].strip())
        | holds where measured | 1 holds, 1 not measured | ours | A is better than B. | main |
        >>> summary([claim], {}, "main")
        ('', 1)
    """
    rows, others = [], 0
    for claim in claims:
        verdict, findings = claim.judge(groups)
        number = Counter(one.verdict for one in findings)
        if not number["holds"] + number["fails"]:
            others += 1
            continue
        counts = ", ".join(f"{number[each]} {each}" for each in get_args(Verdict) if number[each])
        source = "the paper" if claim.source == "paper" else "ours"
        rows.append(f"| {verdict} | {counts} | {source} | {claim.sentence} | {table} |\n")
    return "".join(rows), others
