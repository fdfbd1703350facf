"""The tasks of the guide to Poisson gradient estimation: mass functions, estimators, and the choice of temperatures."""

import math

import pandas as pd
import pytest
import torch

from pyro_nbvae.experiments import hitchhiker
from pyro_nbvae.experiments.hitchhiker import WAYS, Counts, log_mass

FAMILIES = ("poisson", "negative_binomial", "com_poisson")


@pytest.mark.parametrize("family", FAMILIES)
def test_log_masses_are_those_of_the_distributions(family):
    rate = torch.tensor([0.05, 0.7, 3.0, 9.9]).double().requires_grad_()
    dispersion = torch.tensor([-0.8, 0.0, 0.9, 1.5]).double().requires_grad_()
    count = torch.tensor([0.0, 1.0, 4.0, 20.0])
    expected = Counts(family, rate, dispersion).distribution().log_prob(count)
    found = log_mass(family, count, rate, dispersion)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.autograd.gradcheck(
        lambda *given: log_mass(family, count, *given), (rate, dispersion), atol=1e-5, eps=1e-5
    )
    weights = Counts(family, rate, dispersion).log_weights()
    masses = torch.stack([log_mass(family, k, rate, dispersion) for k in hitchhiker.COUNTS[: hitchhiker.RACED]], -1)
    assert torch.allclose(weights - weights[..., :1], masses - masses[..., :1], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["integer", "ReinMax-like", "score function"])
def test_gradients_of_a_square_are_unbiased(family, way):
    """Of E[z^2] in the rate: the derivative of variance + mean^2, within 5 standard errors."""
    torch.manual_seed(0)
    number = 100_000
    one, dispersion = torch.tensor([2.5], requires_grad=True), torch.tensor([0.4])
    q = Counts(family, one, dispersion).distribution()
    (expected,) = torch.autograd.grad((q.variance + q.mean.square()).sum(), one)
    rate = torch.full((number,), 2.5, requires_grad=True)
    counts = Counts(family, rate, dispersion)
    z = WAYS[way](counts, torch.ones(()))
    surrogate = z.square()
    if way == "score function":
        surrogate = surrogate.detach() * counts.distribution().log_prob(z)
    (found,) = torch.autograd.grad(surrogate.sum(), rate)
    assert abs(float(found.mean() - expected)) < 5 * float(found.std()) / math.sqrt(number)
    assert bool((z.detach() == z.detach().round()).all())


def test_the_temperature_is_that_of_the_best_validation():
    columns = ["task", "way", "seed", "temperature", "validation_elbo", "elbo", "cll", "hll", "fano_low", "fano_high"]
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
    assert gumbel["integer is ahead by"] == "2.00 ± 1.00" and "integer is ahead by" not in integer


def test_a_run_that_is_stopped_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hitchhiker, "EPOCHS", 1)
    hitchhiker.main(("Poisson",), ("integer",), tmp_path)
    before = (tmp_path / "hitchhiker.csv").read_text()
    hitchhiker.main(("Poisson",), ("integer", "ReinMax-like"), tmp_path)
    after = pd.read_csv(tmp_path / "hitchhiker.csv")
    assert (tmp_path / "hitchhiker.csv").read_text().startswith(before)
    assert len(after) == 5 + 5 and after["elbo"].between(-300, -80).all()
    assert "| Poisson  | ReinMax-like |" in capsys.readouterr().out
