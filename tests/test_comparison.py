"""Comparisons of rows: against scipy's tests and Holm's definition, and by what must hold whatever the values."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pyro_nbvae.study.comparison import comparisons, decided, holm
from pyro_nbvae.study.tables import Table


def table(**options):
    return Table(name="t", title="T", variants=(), data=("mnist",), metrics=("mse", "elbo"), **options)


def rows(**values):
    return pd.DataFrame(
        [
            {"data": "mnist", "label": label, "seed": seed, "mse": v, "elbo": -v}
            for label, each in values.items()
            for seed, v in enumerate(each)
        ],
        columns=["data", "label", "seed", "mse", "elbo"],
    )


PAIR = table(compare={("a", "b"): ("mse",)})


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 2.0, 4.0])
def test_a_comparison_is_welchs_test(shift):
    rng = np.random.default_rng(0)
    number = 0
    for _ in range(50):
        a, b = rng.normal(size=3), rng.normal(shift, 2.0, size=4)
        (found,) = comparisons(PAIR, rows(a=a, b=b)).to_dict("records")
        test = stats.ttest_ind(a, b, equal_var=False)
        assert found["p"] == pytest.approx(test.pvalue)
        assert found["relation"] == ("lower than" if test.statistic < 0 else "higher than")
        assert found["mean"] == pytest.approx(a.mean()) and found["other"] == pytest.approx(b.mean())
        number += len(decided(comparisons(PAIR, rows(a=a, b=b))))
    assert number < 10 if shift == 0 else number or shift < 4


@given(st.lists(st.floats(-10, 10), min_size=0, max_size=5), st.lists(st.floats(-10, 10), min_size=0, max_size=5))
def test_exchanging_the_sides_exchanges_the_relation(a, b):
    one, other = comparisons(PAIR, rows(a=a, b=b)), comparisons(PAIR, rows(a=b, b=a))
    assert len(one) == len(other) == (min(len(a), len(b)) > 1)
    if len(one) and one["p"][0] < 1:
        assert one["p"][0] == pytest.approx(other["p"][0])
        assert {one["relation"][0], other["relation"][0]} == {"lower than", "higher than"}


@given(st.lists(st.floats(0, 1), min_size=0, max_size=12))
def test_holm_is_its_definition(p):
    corrected = holm(pd.Series(p, dtype=float))
    smallest_first = sorted(range(len(p)), key=lambda i: p[i])
    largest = 0.0
    for done, i in enumerate(smallest_first):
        largest = max(largest, min(1.0, (len(p) - done) * p[i]))
        assert corrected[i] == pytest.approx(largest)


def test_comparisons_of_variants_that_do_not_differ_seldom_decide_anything():
    """Ten comparisons at once: in at most 5 % of the tables any is decided (300, 3 standard errors)."""
    rng = np.random.default_rng(0)
    of_five = table(compare={("a", other): ("mse", "elbo") for other in "bcdef"})
    found = [comparisons(of_five, rows(**{name: rng.normal(size=3) for name in "abcdef"})) for _ in range(300)]
    assert all(len(each) == 10 for each in found)
    assert np.mean([len(decided(each)) > 0 for each in found]) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)


def test_what_has_fewer_than_two_seeds_is_not_tested():
    three = table(compare={("a", "b"): ("mse", "kl"), ("a", "c"): ("mse",), ("a", "d"): ("mse",)})
    found = comparisons(three, rows(a=(1.0, 1.1), b=(2.0, 2.1), c=(3.0,)))
    assert list(found["second"]) == ["b"]
    assert comparisons(three, rows()).empty and decided(comparisons(three, rows())).empty


def test_values_without_variance():
    (found,) = comparisons(PAIR, rows(a=(0.5, 0.5), b=(0.7, 0.7))).to_dict("records")
    assert found["p"] == 0 and found["relation"] == "lower than"
    assert list(comparisons(PAIR, rows(a=(0.5, 0.5), b=(0.5, 0.5)))["p"]) == [1.0]


def test_equivalence_is_two_one_sided_tests():
    near = table(compare={("a", "b"): ("mse",)}, within={"mse": 0.1})
    a = (1.0, 1.001, 0.999)

    def relations(b):
        return list(decided(comparisons(near, rows(a=a, b=b)))["relation"])

    assert relations((1.01, 1.011, 1.009)) == ["lower than", "within 0.1 of"]
    assert relations((0.999, 1.001, 1.0)) == ["within 0.1 of"]
    assert relations((1.5, 1.501, 1.499)) == ["lower than"] and relations((0.5, 1.5, 1.01)) == []
    b = (1.02, 1.05, 1.08)
    found = comparisons(near, rows(a=a, b=b))
    uncorrected = max(
        stats.ttest_ind(a, np.array(b) - 0.1, equal_var=False, alternative="greater").pvalue,
        stats.ttest_ind(a, np.array(b) + 0.1, equal_var=False, alternative="less").pvalue,
    )
    welch = stats.ttest_ind(a, b, equal_var=False).pvalue
    assert list(found["p"]) == pytest.approx(list(holm(pd.Series([welch, uncorrected]))))


def points(**curves):
    """Points (KL, squared error) of each label, one for each seed."""
    return pd.DataFrame(
        [
            {"data": "mnist", "label": label.replace("_", " "), "seed": seed, "kl": kl, "mse": mse}
            for label, each in curves.items()
            for seed, (kl, mse) in enumerate(each)
        ]
    )


@pytest.mark.parametrize(("factor", "expected"), [(1.2, "lower than"), (0.8, "higher than")])
def test_a_curve_lies_below_the_points_at_their_rates(factor, expected):
    """Squared errors exp(-KL) are interpolated exactly; the other's points are off by a factor, seeds by 1 %."""
    noise, scale = (0.99, 1.0, 1.01), (1.0, 1.1, 1.2)
    found = points(
        a_low=[(1.0, s * np.exp(-1.0)) for s in scale],
        a_middle=[(2.0, s * np.exp(-2.0)) for s in scale],
        a_high=[(4.0, s * np.exp(-4.0)) for s in scale],
        b_inside=[(3.1, s * factor * np.exp(-3.1) * e) for s, e in zip(scale, noise, strict=True)],
        b_beyond=[(5.0, 1e-9)] * 3,
    )
    curves = table(curves=[("a", "b")])
    (one,) = comparisons(curves, found.sample(frac=1, random_state=0)).to_dict("records")
    assert (one["first"], one["second"], one["relation"]) == ("a", "b inside", expected)
    ours = np.array([s * np.exp(-3.1) for s in scale])
    theirs = ours * factor * np.array(noise)
    assert one["mean"] == pytest.approx(ours.mean()) and one["other"] == pytest.approx(theirs.mean())
    assert one["p"] == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert comparisons(curves, found[~found["label"].isin(["a low", "a middle"])]).empty
    assert comparisons(curves, found[found["label"] != "b inside"]).empty
    assert comparisons(curves, found[found["seed"] == 0]).empty
