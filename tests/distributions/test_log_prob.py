"""Log mass functions against scipy, mpmath and finite differences."""

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch

from pyro_nbvae.distributions import ArrivalTimes, NegativeBinomial, RelaxedNegativeBinomial, RelaxedPoisson
from pyro_nbvae.distributions.families.negative_binomial import log_prob as negative_binomial_log_prob
from pyro_nbvae.distributions.families.negative_binomial import log_prob_value
from pyro_nbvae.distributions.families.poisson import log_prob as poisson_log_prob
from pyro_nbvae.distributions.special import omega, rho, softplus_difference

mpmath.mp.dps = 60


def exact_log_prob(z, r, logits):
    """The definition, with 60 digits."""
    z, r, logits = mpmath.mpf(float(z)), mpmath.mpf(float(r)), mpmath.mpf(float(logits))
    coefficient = mpmath.loggamma(z + r) - mpmath.loggamma(r) - mpmath.loggamma(z + 1)
    return coefficient - z * mpmath.log1p(mpmath.exp(-logits)) - r * mpmath.log1p(mpmath.exp(logits))


def cases(number, most_r, most_mean, dtype):
    """Dispersions, logits and counts: log-uniform r and mean, counts at 0 to 2, about the mean, and far in the tail."""
    rng = np.random.default_rng(3)
    r = np.exp(rng.uniform(np.log(1e-4), np.log(most_r), number))
    mean = np.exp(rng.uniform(np.log(1e-3), np.log(most_mean), number))
    deviation = np.sqrt(mean * (1 + mean / r))
    near = np.maximum(0, np.round(mean + deviation * rng.normal(size=number)))
    far = np.round(mean + 8 * deviation)
    z = np.select([np.arange(number) % 3 == 0, np.arange(number) % 3 == 1], [rng.integers(0, 3, number), near], far)
    return tuple(torch.tensor(a, dtype=dtype) for a in (z, r, np.log(mean / r)))


@pytest.mark.parametrize(
    "dtype, most_r, most_mean, tolerance", [(torch.float64, 1e6, 1e4, 1e-8), (torch.float32, 1e4, 1e3, 1e-4)]
)
def test_log_prob_has_all_its_digits(dtype, most_r, most_mean, tolerance):
    z, r, logits = cases(1500, most_r, most_mean, dtype)
    ours = NegativeBinomial(r, logits=logits).log_prob(z)
    for value, *arguments in zip(ours.tolist(), z, r, logits, strict=True):
        expected = exact_log_prob(*arguments)
        assert abs(value - expected) <= tolerance * max(1, abs(expected)), arguments


def test_log_prob_equals_scipy_where_scipy_has_its_digits():
    z, r, logits = cases(3000, 1e3, 1e2, torch.float64)
    expected = scipy.stats.nbinom.logpmf(z.numpy(), r.numpy(), torch.sigmoid(-logits).numpy())
    ours = RelaxedNegativeBinomial(r, logits=logits, relaxation=ArrivalTimes(0.5)).log_prob(z).numpy()
    near = np.abs(expected) < 50
    assert near.sum() > 1000
    np.testing.assert_allclose(ours[near], expected[near], rtol=1e-8, atol=1e-8)


def test_log_prob_sums_to_one():
    r, logits = (
        torch.tensor([0.05, 1.0, 30.0], dtype=torch.float64),
        torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64),
    )
    counts = torch.arange(3000, dtype=torch.float64)[:, None]
    total = NegativeBinomial(r, logits=logits).log_prob(counts).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_poisson_log_prob_equals_scipy():
    rate = torch.logspace(-6, 5, 60, dtype=torch.float64)
    z = torch.cat([torch.arange(4.0, dtype=torch.float64), torch.logspace(1, 5, 20, dtype=torch.float64).round()])[
        :, None
    ]
    expected = scipy.stats.poisson.logpmf(z.numpy(), rate.numpy())
    ours = RelaxedPoisson(rate).log_prob(z).numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradients_are_finite_everywhere(dtype):
    z = torch.tensor([0.0, 1e-3, 1.0, 17.0, 1e4], dtype=dtype)
    grid = torch.meshgrid(
        z, torch.logspace(-6, 8, 29, dtype=dtype), torch.linspace(-50, 50, 41, dtype=dtype), indexing="ij"
    )
    arguments = [g.clone().requires_grad_() for g in grid]
    value = negative_binomial_log_prob(*arguments)
    assert value.isfinite().all()
    assert (value <= 1e-4).all()
    for gradient in torch.autograd.grad(value.sum(), arguments):
        assert gradient.isfinite().all()


def test_gradients_equal_finite_differences_twice():
    z = torch.tensor([0.3, 1.0, 4.0, 30.0], dtype=torch.float64, requires_grad=True)
    r = torch.tensor([0.2, 1.0, 15.0, 40.0], dtype=torch.float64, requires_grad=True)
    logits = torch.tensor([1.0, -0.5, 0.3, -1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(negative_binomial_log_prob, (z, r, logits))
    assert torch.autograd.gradgradcheck(negative_binomial_log_prob, (z, r, logits))
    assert torch.autograd.gradcheck(poisson_log_prob, (z, r))
    assert torch.autograd.gradgradcheck(poisson_log_prob, (z, r))


def test_gradient_in_r_keeps_its_digits_at_large_r():
    r = torch.tensor([1e2, 1e4], dtype=torch.float32, requires_grad=True)
    z, mean = 3.0, 2.0
    logits = (mean / r.detach()).log()
    negative_binomial_log_prob(torch.tensor(z), r, logits).sum().backward()
    for got, rr, ll in zip(r.grad.tolist(), r.tolist(), logits.tolist(), strict=True):
        expected = mpmath.digamma(z + rr) - mpmath.digamma(rr) - mpmath.log1p(mpmath.exp(ll))
        assert abs(got - expected) < 1e-6 / rr


def test_infinite_dispersion_is_poisson():
    mean, z = torch.tensor([0.1, 2.0, 30.0], dtype=torch.float64), torch.tensor([0.0, 3.0, 41.0], dtype=torch.float64)
    poisson = RelaxedPoisson(mean).log_prob(z)
    for r in (1e4, 1e6, 1e8):
        # log p differs from the Poisson's by ((z - m)^2 - z) / (2 r) + O(1 / r^2)
        nb = NegativeBinomial(r, logits=(mean / r).log()).log_prob(z)
        expected = ((z - mean) ** 2 - z) / (2 * r)
        torch.testing.assert_close(nb - poisson, expected, rtol=0.02, atol=1e-12)


def test_special_functions_equal_mpmath():
    x = torch.tensor([1e-6, 0.3, 2.0, 9.99, 10.0, 10.01, 35.0, 1e5], dtype=torch.float64)
    for value, o, p in zip(x.tolist(), omega(x).tolist(), rho(x).tolist(), strict=True):
        assert abs(o - (mpmath.loggamma(1 + mpmath.mpf(value)) - value * mpmath.log(value) + value)) < 1e-13 * max(
            1, abs(o)
        )
        assert abs(p - (mpmath.digamma(value) - mpmath.log(value))) < 1e-12 * max(1, abs(p))


def test_softplus_difference_does_not_cancel():
    a = torch.tensor([1.0 + 1e-6, 5.0, -40.0, 88.0, 3.0])
    b = torch.tensor([1.0, 4.9999, -41.0, -88.0, 3.0])
    for got, x, y in zip(softplus_difference(a, b).tolist(), a.tolist(), b.tolist(), strict=True):
        expected = mpmath.log1p(mpmath.exp(x)) - mpmath.log1p(mpmath.exp(y))
        assert abs(got - expected) <= 3e-7 * abs(expected)
    assert softplus_difference(a, b)[-1] == 0


def test_the_derivative_in_a_tiny_dispersion():
    """At count 0 it is -log(1 + e^l), in which 1 / r does not enter."""
    r = torch.tensor([1e-20, 1e-10, 1e-3], dtype=torch.float64, requires_grad=True)
    logits = torch.tensor(0.5, dtype=torch.float64)
    for z, exact in ((0.0, -torch.nn.functional.softplus(logits)), (1.0, 1 / r - torch.nn.functional.softplus(logits))):
        log_prob = NegativeBinomial(r, logits=logits).log_prob(torch.tensor(z).double())
        (slope,) = torch.autograd.grad(log_prob.sum(), r)
        torch.testing.assert_close(slope, exact.detach().expand(3), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_second_derivatives_have_their_digits_at_any_dispersion_and_logits(dtype, tolerance):
    """In r, and in r and the count: differences of trigammas; in the logits: -(z + r) sigma(l) sigma(-l)."""
    grid = [
        (z, r, x) for z in (0.0, 0.3, 5.0, 1e5) for r in (1e-12, 1e-4, 1.0, 1e4, 1e12) for x in (-60.0, 0.0, 20, 60)
    ]
    z, r, logits = (torch.tensor(part, dtype=dtype, requires_grad=True) for part in zip(*grid, strict=True))
    value = negative_binomial_log_prob(z, r, logits).sum()
    in_z, in_r, in_logits = torch.autograd.grad(value, (z, r, logits), create_graph=True)
    (mixed,) = torch.autograd.grad(in_z.sum(), r, retain_graph=True)
    (bent,) = torch.autograd.grad(in_logits.sum(), logits, retain_graph=True)
    (twice,) = torch.autograd.grad(in_r.sum(), r)
    for i, (count, dispersion, x) in enumerate(grid):
        count, dispersion = mpmath.mpf(count), mpmath.mpf(float(torch.tensor(dispersion, dtype=dtype)))
        of_sum = mpmath.psi(1, count + dispersion)
        for found, exact in ((mixed[i], of_sum), (twice[i], of_sum - mpmath.psi(1, dispersion))):
            assert abs(float(found) - exact) <= tolerance * max(abs(exact), 1e-3 * min(1, 1 / dispersion)), grid[i]
        exact = -(count + dispersion) / (2 + 2 * mpmath.cosh(x))
        assert abs(float(bent[i]) - exact) <= tolerance * abs(exact), grid[i]


@pytest.mark.parametrize("logits", [-90.0, 90.0, 700.0])
def test_log_masses_where_the_mean_underflows_or_overflows(logits):
    for z, r in ((0.0, 1e6), (5.0, 1.0), (5.0, 1e-12)):
        arguments = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (z, r, logits)]
        (value,), expected = log_prob_value(*arguments), exact_log_prob(z, r, logits)
        assert abs(float(value.detach()) - expected) <= 1e-12 * abs(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", [1e-12, 1e-9, 1e-5])
def test_the_entropy_of_few_counts_above_0(r, dtype):
    """Its derivative in r, which the counts above 0 decide, by direct sums."""
    given = torch.tensor(r, dtype=dtype, requires_grad=True)
    (found,) = torch.autograd.grad(NegativeBinomial(given, logits=torch.tensor(3.0, dtype=dtype)).entropy(), given)
    exact = float(given.detach())
    masses = scipy.stats.nbinom.logpmf(np.arange(1, 2000), exact, 1 / (1 + np.exp(3.0)))
    slope = scipy.special.digamma(np.arange(1, 2000) + exact) - scipy.special.digamma(exact) - np.log1p(np.exp(3.0))
    at_0 = -np.log1p(np.exp(3.0))
    expected = -(np.exp(masses) * slope * masses).sum() - np.exp(exact * at_0) * at_0 * exact * at_0
    assert float(found) == pytest.approx(expected, rel=1e-4)
