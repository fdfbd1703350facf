"""Claims are judged by the rows: against scipy's tests, and by what must hold whatever the figures."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyro_nbvae.study.claims import Ahead, Alike, BelowCurve, Claim, Finding, Reaches, listed
from scipy import stats

from pyro_nbvae.errors import InputError


def groups(**figures):
    return {"mnist": {label: [{"mse": v, "elbo": -v} for v in each] for label, each in figures.items()}}


AHEAD = Ahead("mse", ("a",), ("b",), ("mnist",))


def verdict(condition, **figures):
    return Claim("so it is", [condition]).judge(groups(**figures))[0]


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 2.0, 4.0])
def test_a_comparison_is_welchs_test(shift):
    rng = np.random.default_rng(0)
    decided = 0
    for _ in range(50):
        a, b = rng.normal(size=3), rng.normal(shift, 2.0, size=4)
        test = stats.ttest_ind(a, b, equal_var=False)
        expected = "not enough runs" if test.pvalue > 0.05 else "holds" if test.statistic < 0 else "fails"
        assert verdict(AHEAD, a=a, b=b) == expected
        decided += expected != "not enough runs"
    assert decided < 10 if shift == 0 else decided or shift < 4


@given(st.lists(st.floats(-10, 10), min_size=0, max_size=5), st.lists(st.floats(-10, 10), min_size=0, max_size=5))
def test_exchanging_the_sides_exchanges_the_verdict(a, b):
    opposite = {"holds": "fails", "fails": "holds"}
    assert verdict(AHEAD, a=b, b=a) == opposite.get(same := verdict(AHEAD, a=a, b=b), same)
    assert verdict(Ahead("elbo", ("a",), ("b",), ("mnist",)), a=a, b=b) == verdict(AHEAD, a=a, b=b)
    if min(len(a), len(b)) < 2:
        assert verdict(AHEAD, a=a, b=b) == ("not enough runs" if a and b else "not measured")


def test_one_failure_among_many_comparisons_fails_a_claim_at_a_level_divided_by_their_number():
    """Of n comparisons n - 1 hold; the last fails with scipy's p, so the claim fails if n p < 0.05."""
    a, b = (5.0, 5.2, 5.4), (4.0, 4.1, 4.6)
    p = stats.ttest_ind(a, b, equal_var=False).pvalue
    for n in range(1, 8):
        rows = {f"set {i}": {"a": [{"mse": v - 3.0} for v in b], "b": [{"mse": v} for v in a]} for i in range(n - 1)}
        rows["last"] = {"a": [{"mse": v} for v in a], "b": [{"mse": v} for v in b]}
        found, findings = Claim("a is best.", [Ahead("mse", ("a",), ("b",), tuple(rows))]).judge(rows)
        assert [one.verdict for one in findings] == ["holds"] * (n - 1) + ["fails"]
        assert found == ("fails" if n * p < 0.05 else "not enough runs"), n
    assert 0.05 / 7 < p < 0.05 / 2


def test_claims_about_nothing_fail_seldom():
    """Ten comparisons of variants that do not differ: at most 5 % of the claims fail (300, 3 standard errors)."""
    rng = np.random.default_rng(0)
    sets = ("mnist", "cifar16")
    claim = Claim("a is best.", [Ahead("mse", ("a",), tuple("bcdef"), sets)])
    for names in ("abcdef", "abcde"):  # if a variant is not measured, the others count as before
        failed = 0
        for _ in range(300):
            rows = {data: groups(**{name: rng.normal(size=3) for name in names})["mnist"] for data in sets}
            found, findings = claim.judge(rows)
            failed += found == "fails"
            assert sum(len(one.p_values) for one in findings) == 2 * (len(names) - 1)
        assert failed / 300 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)


def test_a_finding_without_p_values_is_certain():
    class Fails:
        def judge(self, groups):
            return [Finding("fails", "it is not so")]

    assert Claim("so it is", [Fails(), AHEAD]).judge(groups(a=(1.0, 1.1), b=(2.0, 2.1)))[0] == "fails"


@pytest.mark.parametrize("condition", [Ahead("kl", ("a",), ("b",), ("mnist",)), Reaches("kl", "a", "mnist", 1.0)])
def test_a_metric_without_a_better_direction_is_refused(condition):
    with pytest.raises(InputError, match=r"KL \(kl\) has no better direction"):
        condition.judge({"mnist": {name: [{"kl": 1.0}, {"kl": 2.0}] for name in "ab"}})


def test_all_must_hold_and_one_may_fail():
    both = Ahead("mse", ("a",), ("b", "c"), ("mnist",))
    far, near = (1.0, 1.1, 0.9), (5.0, 5.1, 4.9)
    assert verdict(both, a=far, b=near, c=near) == "holds"
    assert verdict(both, a=near, b=near, c=far) == "fails"
    assert verdict(both, a=far, b=near, c=(5.0,)) == "not enough runs"
    assert verdict(both, a=far, b=near) == "not measured"
    assert verdict(both, a=near, b=far) == "fails"


def test_what_is_not_run_decides_nothing():
    """A claim over two data sets of which one is not measured has the other's verdict, and says what is missing."""
    both = Claim("a is best.", [Ahead("mse", ("a",), ("b",), ("mnist", "cifar16")), Reaches("mse", "a", "cifar16", 1)])
    far, near = (1.0, 1.1, 0.9), (5.0, 5.1, 4.9)
    for a, b, expected in ((far, near, "holds where measured"), (near, far, "fails"), (far, far, "not enough runs")):
        assert both.judge(groups(a=a, b=b))[0] == expected
    assert listed([both], groups(a=far, b=near)).splitlines()[-1] == (
        "  - not measured: cifar16, MSE: a, b; cifar16, MSE: a, against 1"
    )


def test_alike_is_two_one_sided_tests():
    alike = Alike("mse", ("a", "b"), ("mnist",), within=0.1)
    a = (1.0, 1.001, 0.999)
    assert verdict(alike, a=a, b=(1.01, 1.011, 1.009)) == "holds"
    for far in (0.5, 1.5):
        assert verdict(alike, a=a, b=(far, far + 0.001, far - 0.001)) == "fails"
    assert verdict(alike, a=a, b=(0.5, 1.5, 1.01)) == "not enough runs"
    # a difference does not depend on where the metric's zero is
    elbo = Alike("elbo", ("a", "b"), ("mnist",), within=0.1)
    assert verdict(elbo, a=a, b=(1.01, 1.011, 1.009)) == "holds"
    assert verdict(elbo, a=[v - 1 for v in a], b=(0.01, 0.011, 0.009)) == "holds"
    assert verdict(alike, a=a, b=(1.0,)) == "not enough runs"


def test_a_figure_is_reached():
    reaches = Reaches("mse", "a", "mnist", 1.0)
    assert verdict(reaches, a=(0.5, 0.51, 0.49)) == "holds"
    assert verdict(reaches, a=(1.5, 1.51, 1.49)) == "fails"
    assert verdict(reaches, a=(0.5, 1.6, 0.9)) == "not enough runs"
    assert verdict(reaches, a=(0.5,)) == "not enough runs"
    assert verdict(reaches, a=(0.5, 0.5)) == "holds"
    # of the ELBO, high values are the better ones
    assert verdict(Reaches("elbo", "a", "mnist", -1.0), a=(0.5, 0.51, 0.49)) == "holds"
    assert verdict(Reaches("elbo", "a", "mnist", -1.0), a=(1.5, 1.51, 1.49)) == "fails"


def curves(**points):
    """Points (rate, distortion) of each label, one for each seed."""
    return {
        "mnist": {
            label: [{"seed": s, "kl": rate, "mse": distortion} for s, (rate, distortion) in enumerate(each)]
            for label, each in points.items()
        }
    }


@pytest.mark.parametrize(("factor", "expected"), [(1.2, "holds"), (0.8, "fails")])
def test_a_curve_lies_below_the_points_at_their_rates(factor, expected):
    """Distortions exp(-rate) are interpolated exactly; the other's points are off by a factor, seeds by 1 %."""
    noise = (0.99, 1.0, 1.01)
    groups = curves(
        low=[(1.0, np.exp(-1.0))] * 3,
        middle=[(2.0, np.exp(-2.0))] * 3,
        high=[(4.0, np.exp(-4.0))] * 3,
        inside=[(3.1, factor * np.exp(-3.1) * e) for e in noise],
        beyond=[(5.0, 1e-9)] * 3,
    )
    claim = BelowCurve(("high", "low", "middle"), ("inside", "beyond"), "mnist")
    (finding,) = claim.judge(groups)
    assert finding.verdict == expected and f"the curve {np.exp(-3.1):.4f}" in finding.figures
    assert BelowCurve(("low", "middle"), ("inside",), "mnist").judge(groups)[0].verdict == "not enough runs"
    assert BelowCurve(("low", "middle"), ("nothing",), "mnist").judge(groups)[0].verdict == "not measured"
    # each seed has its own curve: in another order of the seeds, with the points
    scale = (1.0, 3.0, 9.0)
    for label, each in groups["mnist"].items():
        groups["mnist"][label] = [{**row, "mse": row["mse"] * scale[row["seed"]]} for row in reversed(each)]
    ours = [scale[s] * np.exp(-3.1) for s in range(3)]
    theirs = [scale[s] * factor * np.exp(-3.1) * noise[s] for s in range(3)]
    p = stats.ttest_rel(theirs, ours).pvalue
    (finding,) = claim.judge(groups)
    assert finding.verdict == (expected if p < 0.05 else "not enough runs")
    assert f"the curve {np.mean(ours):.4f} ± {np.std(ours, ddof=1):.4f}" in finding.figures
    against = p if factor < 1 else 2 - p
    assert finding.p_values == pytest.approx([against], rel=1e-9)
    groups["mnist"]["inside"] = groups["mnist"]["inside"][:1]
    assert claim.judge(groups)[0].verdict == "not enough runs"


def test_a_list_shows_the_figures_behind_a_verdict():
    text = listed([Claim("a is best.", [AHEAD], "paper")], groups(a=(1.0, 3.0), b=(2.0,)))
    assert text == (
        "- **not enough runs**: The paper: a is best.\n"
        "  - not enough runs: mnist, MSE: a 2.0000 ± 1.4142, b 2.0000 (one seed)\n"
    )
