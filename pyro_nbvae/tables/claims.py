"""Claims as data: a sentence, and what the rows of a table must show for it to hold.

A comparison holds, or fails, where the difference between means over seeds is significant at 5 %, two-sided (Welch's t
test); where the seeds do not decide, or there are fewer than two of a variant, the verdict is *not enough runs*. A
claim of several comparisons holds if all hold and fails if one fails.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from pyro_nbvae.runs.evaluation import METRICS

Verdict = Literal["holds", "fails", "not enough runs"]
LEVEL = 0.05
# data set -> label -> a row a seed
Groups = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]


class Finding(NamedTuple):
    """What one comparison came to, with its figures."""

    verdict: Verdict
    figures: str


class Condition(Protocol):
    """What the rows must show."""

    def judge(self, groups: Groups) -> list[Finding]:
        """A finding a comparison."""


def values(groups: Groups, data: str, label: str, metric: str) -> list[float]:
    """The figures of a label on a data set, one a seed."""
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


def _finding(verdicts: set[Verdict], data: str, metric: str, found: Mapping[str, Sequence[float]]) -> Finding:
    """One finding from several verdicts, with the figures of every label."""
    shown = ", ".join(_shown(label, each, metric) for label, each in found.items())
    return Finding(combined(verdicts), f"{data}, {METRICS[metric].heading}: {shown}")


def _limits(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """The confidence limits of mean(a) - mean(b), by Welch; infinite where there are too few figures."""
    if min(len(a), len(b)) < 2:
        return -math.inf, math.inf
    parts = [statistics.variance(each) / len(each) for each in (a, b)]
    difference = statistics.fmean(a) - statistics.fmean(b)
    total = sum(parts)
    if not total > 0:
        return difference, difference
    freedom = 1 / sum((v / total) ** 2 / (len(each) - 1) for v, each in zip(parts, (a, b), strict=True))
    return _around(difference, math.sqrt(total), freedom)


def _around(mean: float, error: float, freedom: float) -> tuple[float, float]:
    """Student's confidence limits of a mean with that standard error."""
    from scipy import stats

    reach = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error if error > 0 else 0.0
    return mean - reach, mean + reach


def _sign(low: float, high: float) -> Verdict:
    """Whether a quantity between the limits is positive."""
    return "holds" if low > 0 else "fails" if high < 0 else "not enough runs"


@dataclass(frozen=True)
class Ahead:
    """Each of some labels is better than each of others in a metric, on each data set.

    Args:
        metric: of :data:`~pyro_nbvae.runs.evaluation.METRICS`; its ``best`` says which end is better.
        first: who should be better.
        others: than whom.
        data: where.
    """

    metric: str
    first: Sequence[str]
    others: Sequence[str]
    data: Sequence[str]

    def judge(self, groups: Groups) -> list[Finding]:
        """A finding a data set: the least advantage decides."""
        return [self._on(groups, data) for data in self.data]

    def _on(self, groups: Groups, data: str) -> Finding:
        sign = 1 if METRICS[self.metric].best == "high" else -1
        found = {label: values(groups, data, label, self.metric) for label in (*self.first, *self.others)}
        signed = {label: [sign * v for v in each] for label, each in found.items()}
        verdicts = {_sign(*_limits(signed[a], signed[b])) for a in self.first for b in self.others}
        return _finding(verdicts, data, self.metric, found)


@dataclass(frozen=True)
class Alike:
    """A metric's mean is the same for all labels, up to a relative difference.

    Args:
        metric: of :data:`~pyro_nbvae.runs.evaluation.METRICS`.
        labels: which.
        data: where.
        within: largest difference, relative to the first label's mean. It holds where both confidence limits of every
            difference are within, fails where one limit's interval lies beyond.
    """

    metric: str
    labels: Sequence[str]
    data: Sequence[str]
    within: float

    def judge(self, groups: Groups) -> list[Finding]:
        """A finding a data set."""
        return [self._on(groups, data) for data in self.data]

    def _on(self, groups: Groups, data: str) -> Finding:
        found = {label: values(groups, data, label, self.metric) for label in self.labels}
        reference = found[self.labels[0]]
        most = self.within * abs(statistics.fmean(reference)) if reference else math.nan
        verdicts: set[Verdict] = set()
        for label in self.labels[1:]:
            low, high = _limits(found[label], reference)
            verdicts.add(
                "holds" if max(-low, high) <= most else "fails" if low > most or high < -most else "not enough runs"
            )
        return _finding(verdicts, data, self.metric, found)


@dataclass(frozen=True)
class Reaches:
    """A metric's mean is at least as good as a figure, that of a paper, say.

    Args:
        metric: of :data:`~pyro_nbvae.runs.evaluation.METRICS`.
        label: whose.
        data: where.
        figure: to be reached.
    """

    metric: str
    label: str
    data: str
    figure: float

    def judge(self, groups: Groups) -> list[Finding]:
        """One finding."""
        found = values(groups, self.data, self.label, self.metric)
        sign = 1 if METRICS[self.metric].best == "high" else -1
        over = [sign * (v - self.figure) for v in found]
        low, high = -math.inf, math.inf
        if len(over) > 1:
            error = statistics.stdev(over) / math.sqrt(len(over))
            low, high = _around(statistics.fmean(over), error, len(over) - 1)
        text = f"{self.data}, {METRICS[self.metric].heading}: {_shown(self.label, found, self.metric)}"
        return [Finding("holds" if low >= 0 else _sign(low, high), f"{text}, against {self.figure:g}")]


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
        heading = f"{METRICS[self.distortion].heading} at equal {METRICS[self.rate].heading}"
        return findings or [Finding("not enough runs", f"{self.data}, {heading}: no point within the curve's range")]

    def _by_seed(self, groups: Groups, label: str) -> dict[Any, tuple[float, float]]:
        rows = groups.get(self.data, {}).get(label, [])
        complete = [row for row in rows if row.get(self.rate) is not None and row.get(self.distortion) is not None]
        return {row.get("seed"): (float(row[self.rate]), float(row[self.distortion])) for row in complete}

    def _at(self, groups: Groups, label: str) -> Finding | None:
        curves = [self._by_seed(groups, each) for each in self.curve]
        below, ours, theirs = [], [], []
        for seed, (rate, distortion) in self._by_seed(groups, label).items():
            known = sorted(points[seed] for points in curves if seed in points)
            if len(known) < 2 or not known[0][0] <= rate <= known[-1][0]:
                continue
            rates, logs = [r for r, _ in known], [math.log(d) for _, d in known]
            k = next(k for k in range(1, len(rates)) if rate <= rates[k])
            share = (rate - rates[k - 1]) / max(rates[k] - rates[k - 1], 1e-12)
            at = math.exp((1 - share) * logs[k - 1] + share * logs[k])
            below.append(distortion - at)
            ours.append(at)
            theirs.append(distortion)
        if not below:
            return None
        low, high = -math.inf, math.inf
        if len(below) > 1:
            error = statistics.stdev(below) / math.sqrt(len(below))
            low, high = _around(statistics.fmean(below), error, len(below) - 1)
        heading = f"{METRICS[self.distortion].heading} at equal {METRICS[self.rate].heading}"
        shown = f"{_shown('the curve', ours, self.distortion)}, {_shown(label, theirs, self.distortion)}"
        return Finding(_sign(low, high), f"{self.data}, {heading}: {shown}")


@dataclass(frozen=True)
class Claim:
    """A sentence about a table's rows, and what they must show.

    Args:
        sentence: what is claimed, in one plain sentence.
        conditions: all of which must hold.
        source: who claims it.
    """

    sentence: str
    conditions: Sequence[Condition]
    source: Literal["paper", "ours"] = "ours"

    def judge(self, groups: Groups) -> tuple[Verdict, list[Finding]]:
        """The verdict on the rows, and the findings behind it."""
        findings = [finding for condition in self.conditions for finding in condition.judge(groups)]
        return combined({finding.verdict for finding in findings}), findings


def combined(verdicts: set[Verdict]) -> Verdict:
    """One verdict from several: fails if one fails, holds if all hold."""
    if "fails" in verdicts:
        return "fails"
    return "holds" if verdicts == {"holds"} else "not enough runs"


def listed(claims: Sequence[Claim], groups: Groups) -> str:
    """Claims with their verdicts and figures, as a Markdown list."""
    lines = []
    for claim in claims:
        verdict, findings = claim.judge(groups)
        by = "The paper: " if claim.source == "paper" else ""
        lines.append(f"- **{verdict}**: {by}{claim.sentence}\n")
        lines += [f"  - {finding.verdict}: {finding.figures}\n" for finding in findings]
    return "".join(lines)


def summary(claims: Sequence[Claim], groups: Groups, table: str) -> str:
    """A row a claim of a Markdown table: verdict, how many comparisons hold, fail and are open, source, sentence."""
    rows = []
    for claim in claims:
        verdict, findings = claim.judge(groups)
        number = {v: sum(one.verdict == v for one in findings) for v in ("holds", "fails", "not enough runs")}
        counts = f"{number['holds']} hold, {number['fails']} fail, {number['not enough runs']} open"
        source = "the paper" if claim.source == "paper" else "ours"
        rows.append(f"| {verdict} | {counts} | {source} | {claim.sentence} | {table} |\n")
    return "".join(rows)
