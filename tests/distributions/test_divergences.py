"""The KL of every pair that is registered, against sums over counts, and cdf, entropy and mode against scipy."""

import itertools
import math

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from torch.distributions import kl_divergence

from pyro_nbvae.distributions import ConwayMaxwellPoisson, NegativeBinomial, RelaxedNegativeBinomial, RelaxedPoisson
from pyro_nbvae.infer.elbo import NoKLError, registered_kl

A = torch.tensor([0.4, 1.5, 6.0], dtype=torch.float64)
P = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
K = torch.arange(1500, dtype=torch.float64)[:, None]
# of a positive tensor and one of probabilities
FAMILIES = {
    "NegativeBinomial": lambda a, p: NegativeBinomial(a, probs=p),
    "RelaxedNegativeBinomial": lambda a, p: RelaxedNegativeBinomial(a, probs=p),
    "Pyro's NegativeBinomial": lambda a, p: dist.NegativeBinomial(a, probs=p),
    "RelaxedPoisson": lambda a, p: RelaxedPoisson(a),
    "Pyro's Poisson": lambda a, p: dist.Poisson(a),
    "ConwayMaxwellPoisson": lambda a, p: ConwayMaxwellPoisson(a, 2 * p),
    "Geometric": lambda a, p: dist.Geometric(1 - p),
    "GammaPoisson": lambda a, p: dist.GammaPoisson(a, 1 / p - 1),
    "ZeroInflatedPoisson": lambda a, p: dist.ZeroInflatedPoisson(a, gate=1 - p),
    "ZeroInflatedNegativeBinomial": lambda a, p: dist.ZeroInflatedNegativeBinomial(
        a, probs=p, gate_logits=torch.logit(p)
    ),
    "ZeroInflated COM-Poisson": lambda a, p: dist.ZeroInflatedDistribution(ConwayMaxwellPoisson(a, 2 * p), gate=p),
}


def log_mass(d):
    """By torch's own formulas where it has the family."""
    return d.log_prob(K)


@pytest.mark.parametrize(("q", "p"), list(itertools.product(FAMILIES, FAMILIES)))
def test_every_pair_is_the_sum_over_counts(q, p):
    leaves = [x.clone().requires_grad_() for x in (A, P, A.flip(0) + 0.3, 0.9 * P.flip(0))]
    of_q, of_p = FAMILIES[q](*leaves[:2]), FAMILIES[p](*leaves[2:])
    kl = kl_divergence(of_q, of_p)
    of_counts = log_mass(of_q).exp() * (log_mass(of_q) - log_mass(of_p))
    expected = of_counts.where(log_mass(of_q) > -700, 0).sum(0)
    torch.testing.assert_close(kl, expected, rtol=1e-7, atol=1e-9)
    # torch's families keep what they compute, with its graph
    options = {"allow_unused": True, "retain_graph": True}
    got, wanted = (torch.autograd.grad(x.sum(), leaves, **options) for x in (kl, expected))
    for one, other in zip(got, wanted, strict=True):
        zero = torch.zeros(3, dtype=torch.float64)
        torch.testing.assert_close(*(zero if g is None else g for g in (one, other)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_gates_at_their_ends(gate):
    """At 0 it is the family itself, at 1 the point 0."""
    p = NegativeBinomial(2.0, logits=torch.tensor(0.5))
    q = dist.ZeroInflatedPoisson(torch.tensor(3.0), gate=torch.tensor(gate))
    expected = -p.log_prob(torch.tensor(0.0)) if gate else kl_divergence(RelaxedPoisson(3.0), p)
    assert float(kl_divergence(q, p)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("mean", [0.5, 6.0])
@pytest.mark.parametrize("inflated", ["q", "p"])
def test_derivative_at_gate_0(mean, inflated):
    """It is the limit from above."""

    def kl(gate):
        d = dist.ZeroInflatedPoisson(torch.tensor(mean, dtype=torch.float64), gate=gate)
        other = NegativeBinomial(2.0, logits=torch.tensor(0.5, dtype=torch.float64))
        return kl_divergence(d, other) if inflated == "q" else kl_divergence(other, d)

    gate, step = torch.tensor(0.0, dtype=torch.float64, requires_grad=True), 1e-6 * math.exp(-mean)
    (got,) = torch.autograd.grad(kl(gate), gate)
    values = [float(kl(torch.tensor(k * step, dtype=torch.float64))) for k in range(3)]
    assert float(got) == pytest.approx((4 * values[1] - 3 * values[0] - values[2]) / (2 * step), rel=1e-2)


@pytest.mark.parametrize("other", [dist.Binomial(5, torch.tensor(0.3)), dist.BetaBinomial(torch.tensor(1.0), 2.0, 5)])
def test_finite_counts_have_none(other):
    with pytest.raises(NoKLError):
        registered_kl(other, NegativeBinomial(2.0, logits=0.0))


SCIPYS = {
    "NegativeBinomial": lambda a, p: scipy.stats.nbinom(a, 1 - p),
    "RelaxedNegativeBinomial": lambda a, p: scipy.stats.nbinom(a, 1 - p),
    "RelaxedPoisson": lambda a, p: scipy.stats.poisson(a),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", SCIPYS)
def test_cdf_entropy_and_mode_are_scipys(family, dtype):
    a = np.array([0.01, 0.4, 1.0, 3.7, 50.0, 400.0])
    p = np.array([0.3, 0.01, 0.5, 0.9, 0.99, 0.2])
    ours = FAMILIES[family](torch.tensor(a).to(dtype), torch.tensor(p).to(dtype))
    theirs = SCIPYS[family](*(np.asarray(x.double()) for x in (torch.tensor(a).to(dtype), torch.tensor(p).to(dtype))))
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    for k in (0, 1, 3, 40, 300, 5000):
        got = ours.cdf(torch.tensor(float(k), dtype=dtype))
        assert got.dtype == dtype and got.numpy() == pytest.approx(theirs.cdf(k), abs=tolerance)
    counts = np.arange(20_000)[:, None]
    masses = theirs.pmf(counts)
    entropy = scipy.special.entr(masses).sum(0)
    assert ours.entropy().numpy() == pytest.approx(entropy, rel=10 * tolerance, abs=10 * tolerance)
    assert theirs.pmf(ours.mode.double().numpy()) == pytest.approx(masses.max(0), rel=1e-9)


@pytest.mark.parametrize("family", SCIPYS)
def test_derivatives_of_the_cdf(family):
    a, p = A.clone().requires_grad_(), P.clone().requires_grad_()
    k = torch.tensor([0.0, 3.0, 9.0], dtype=torch.float64)
    got = torch.autograd.grad(FAMILIES[family](a, p).cdf(k).sum(), (a, p), allow_unused=True)
    expected = torch.autograd.grad((log_mass(FAMILIES[family](a, p)).exp() * (k >= K)).sum(), (a, p), allow_unused=True)
    for one, other in zip(got, expected, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("rate", "nu"), [(0.3, 0.5), (3.999, 2.0), (4.0001, 0.4), (60.5, 1.0)])
def test_the_mode_of_a_com_poisson(rate, nu):
    assert float(ConwayMaxwellPoisson(rate, nu).mode) == math.floor(rate)
