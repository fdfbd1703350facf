"""The tasks of the guide to Poisson gradient estimation: mass functions, estimators, and the choice of temperatures."""

import math

import pandas as pd
import pytest
import torch

from pyro_nbvae.errors import InputError
from pyro_nbvae.experiments import hitchhiker
from pyro_nbvae.experiments.hitchhiker import ESTIMATORS, Counts, main

FAMILIES = ("poisson", "negative_binomial", "com_poisson")


@pytest.mark.parametrize("family", FAMILIES)
def test_log_weights_are_log_masses_up_to_a_constant(family):
    rate = torch.tensor([0.05, 0.7, 3.0, 9.9]).double()
    counts = Counts(family, rate, torch.tensor([-0.8, 0.0, 0.9, 1.5]).double())
    masses = torch.stack([counts.distribution().log_prob(k) for k in hitchhiker.COUNTS], -1)
    weights = counts.log_weights()
    assert torch.allclose(weights - weights[..., :1], masses - masses[..., :1], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("estimator", ["integer", "ReinMax-like", "score function"])
def test_gradients_of_a_square_are_unbiased(family, estimator):
    """Of E[z^2] in the rate: the derivative of variance + mean^2, within 5 standard errors."""
    torch.manual_seed(0)
    number = 30_000
    one, dispersion = torch.tensor([2.5], requires_grad=True), torch.tensor([0.4])
    q = Counts(family, one, dispersion).distribution()
    (expected,) = torch.autograd.grad((q.variance + q.mean.square()).sum(), one)
    rate = torch.full((number,), 2.5, requires_grad=True)
    counts = Counts(family, rate, dispersion)
    z = ESTIMATORS[estimator](counts, torch.ones(()))
    surrogate = z.square()
    if estimator == "score function":
        surrogate = surrogate.detach() * counts.distribution().log_prob(z)
    (found,) = torch.autograd.grad(surrogate.sum(), rate)
    assert abs(float(found.mean() - expected)) < 5 * float(found.std()) / math.sqrt(number)
    assert bool((z.detach() == z.detach().round()).all())


@pytest.mark.parametrize("family", FAMILIES[:2])
@pytest.mark.parametrize("estimator", hitchhiker.RELAXED)
def test_relaxed_counts_at_several_temperatures_at_once(family, estimator):
    """Each run has its own: when cold, the mean and its derivative are those of the counts."""
    torch.manual_seed(0)
    number = 40_000
    rate, dispersion = torch.full((2, number, 1), 2.5, requires_grad=True), torch.full((2, 1, 1), 1.2)
    z = ESTIMATORS[estimator](Counts(family, rate, dispersion), torch.tensor([0.02, 0.5])[:, None, None])
    (slope,) = torch.autograd.grad(z.sum(), rate)
    z = z.detach()
    assert abs(float(z[0].mean()) - 2.5) < 5 * float(z[0].std()) / math.sqrt(number) + 0.02
    assert abs(float(slope[0].mean()) - 1) < 5 * float(slope[0].std()) / math.sqrt(number) + 0.02
    near = [float((each - each.round()).abs().mean()) for each in z]
    assert near[0] < 0.1 < near[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_straight_through_has_the_derivative_of_the_mean(family):
    rate = torch.full((9,), 2.5, requires_grad=True)
    counts = Counts(family, rate, torch.tensor([0.4]))
    z = ESTIMATORS["straight-through"](counts, torch.ones(()))
    (found,) = torch.autograd.grad(z.sum(), rate, retain_graph=True)
    (expected,) = torch.autograd.grad(counts.distribution().mean.sum(), rate)
    assert torch.allclose(found, expected) and bool((z == z.round()).all())


def test_the_temperature_is_that_of_the_best_validation():
    columns = [
        "task",
        "estimator",
        "seed",
        "temperature",
        "validation_elbo",
        "elbo",
        "cll",
        "hll",
        "fano_low",
        "fano_high",
    ]
    rows = pd.DataFrame(
        [
            ("Poisson", "integer", 0, math.nan, -9.0, -8.0, 0.0, 0.0, 1.0, 1.0),
            ("Poisson", "integer", 1, math.nan, -9.0, -6.0, 0.0, 0.0, 1.0, 1.0),
            ("Poisson", "Gumbel-softmax", 0, 0.1, -9.0, -9.0, 0.0, 0.0, 1.0, 1.0),
            ("Poisson", "Gumbel-softmax", 1, 0.1, -9.5, -9.0, 0.0, 0.0, 1.0, 1.0),
            ("Poisson", "Gumbel-softmax", 0, 0.5, -9.6, -1.0, 0.0, 0.0, 1.0, 1.0),
            ("Poisson", "Gumbel-softmax", 1, 0.5, -9.0, -1.0, 0.0, 0.0, 1.0, 1.0),
        ],
        columns=columns,
    )
    integer, gumbel = hitchhiker.table(rows)
    assert gumbel["temperature"] == "0.1" and gumbel["ELBO"] == "-9.00 ± 0.00" and integer["ELBO"] == "-7.00 ± 1.41"
    rows.loc[3, "validation_elbo"] = math.nan  # a fit that diverged
    assert hitchhiker.table(rows)[1]["temperature"] == "0.5"
    assert gumbel["ELBO of integer minus this"] == "2.00 ± 1.00" and "ELBO of integer minus this" not in integer


def test_a_run_that_is_stopped_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hitchhiker, "EPOCHS", 1)
    hitchhiker.main(("Poisson",), ("integer",), tmp_path)
    before = (tmp_path / "hitchhiker.csv").read_text()
    hitchhiker.main(("Poisson",), ("integer", "ReinMax-like"), tmp_path)
    after = pd.read_csv(tmp_path / "hitchhiker.csv")
    assert (tmp_path / "hitchhiker.csv").read_text().startswith(before)
    assert len(after) == 5 + 5 and after["elbo"].between(-300, -80).all()
    assert "| Poisson  | ReinMax-like |" in capsys.readouterr().out


@pytest.mark.parametrize("names", [{"tasks": ("COM-Poisson",)}, {"estimators": ("arrival",)}])
def test_unknown_names_are_one_line(names, tmp_path):
    with pytest.raises(InputError, match=r"unknown \w+ '.*': choose from .*'(COM-Poisson, wide|arrival, sigmoid)'"):
        main(**names, out=tmp_path)
    assert not list(tmp_path.iterdir())
