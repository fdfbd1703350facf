"""Likelihoods against mpmath, with the decoder's output as stored in float32: log masses, gradients and sums."""

import math

import mpmath
import numpy as np
import pyro
import pytest
import torch
from scipy import stats

from pyro_nbvae import likelihoods
from pyro_nbvae.distributions.observations import (
    LogitBernoulli,
    SoftplusConwayMaxwellPoisson,
    SoftplusNegativeBinomial,
    SoftplusPoisson,
)

mpmath.mp.dps = 60
# Decoder outputs of means from 1e-6 to 1e7, and far below.
OUTPUTS = [-800.0, -200.0, -50.0, -37.5, -37.0, -13.8155, -5.0, -0.7, 0.0, 0.54, 3.3, 19.0, 21.0, 39.0, 41.0]
OUTPUTS += [1e3, 1e4, 123456.7, 1e7]
LOG_DISPERSIONS = [-12.0, -3.3, 0.0, 2.7, 6.9, 7.1, 11.0, 17.0]


def mean_of(h):
    return mpmath.log1p(mpmath.exp(mpmath.mpf(h)))


def poisson(x, h):
    return x * mpmath.log(mean_of(h)) - mean_of(h) - mpmath.loggamma(x + 1)


def negative_binomial(x, h, log_r):
    m, r = mean_of(h), mpmath.exp(mpmath.mpf(log_r))
    gammas = mpmath.loggamma(x + r) - mpmath.loggamma(r) - mpmath.loggamma(x + 1)
    return gammas + x * mpmath.log(m / (m + r)) + r * mpmath.log(r / (m + r))


def bernoulli(x, h):
    return -mpmath.log1p(mpmath.exp(-h if x else h))


def gaussian(x, h, beta):
    return -((mpmath.mpf(x) - h) ** 2) / beta - mpmath.log(mpmath.pi * beta) / 2


def counts_near(h):
    """Counts at the mean, some standard deviations from it, and far away, up to 2^24."""
    mean = math.log1p(math.exp(min(h, 30.0))) if h < 30 else h
    width = math.sqrt(mean)
    near = {round(mean), round(mean + width), round(max(0.0, mean - 2 * width)), round(mean * 1.3)}
    return sorted({x for x in near | {0, 1, 2, 5, 100, 10_000, 2**24} if x <= 2**24})


def check(log_mass, h, x, reference, *others):
    """``log_mass(h, x)`` of float32 tensors and its derivative in h, against ``reference(x, h, *others)`` by mpmath."""
    h = torch.tensor(h, dtype=torch.float32, requires_grad=True)
    x = torch.tensor(x, dtype=torch.float32)
    found = log_mass(h, x)
    assert found.dtype == torch.float32
    (gradient,) = torch.autograd.grad(found.sum(), h)
    for of_h, of_x, value, slope in zip(h.tolist(), x.tolist(), found.tolist(), gradient.tolist(), strict=True):
        exact = reference(int(of_x) if of_x == int(of_x) else of_x, of_h, *others)
        assert abs(value - exact) <= 1e-6 * max(1, abs(exact)), (of_h, of_x, others)
        derivative = mpmath.diff(lambda t, x=of_x: reference(x, t, *others), of_h)
        # at a count that is the mean the two terms, each of about 1, leave what float64 rounds
        assert abs(slope - derivative) <= 1e-5 * abs(derivative) + 1e-14, (of_h, of_x, others)


GRID = [(h, x) for h in OUTPUTS for x in counts_near(h)]


def test_poisson():
    check(lambda h, x: likelihoods.Poisson()(h).log_prob(x), *zip(*GRID, strict=True), poisson)


@pytest.mark.parametrize("log_r", LOG_DISPERSIONS)
def test_negative_binomial(log_r):
    log_r = float(np.float32(log_r))

    def log_mass(h, x):
        likelihood = likelihoods.NegativeBinomial()
        likelihood.setup(tuple(h.shape))
        likelihood.dispersion.value.data.fill_(log_r)
        return likelihood(h).log_prob(x)

    check(log_mass, *zip(*GRID, strict=True), negative_binomial, log_r)


@pytest.mark.parametrize("log_r", [-3.3, 0.0, 2.7, 6.8, 7.1, 11.0])
def test_the_dispersions_gradient(log_r):
    h, x = (torch.tensor(v) for v in zip(*[pair for pair in GRID if -20 < pair[0] < 2e4], strict=True))
    likelihood = likelihoods.NegativeBinomial()
    likelihood.setup(tuple(h.shape))
    likelihood.dispersion.value.data.fill_(log_r)
    log_r = float(np.float32(log_r))
    likelihood(h).log_prob(x.float()).sum().backward()
    for of_h, of_x, slope in zip(h.tolist(), x.tolist(), likelihood.dispersion.value.grad.tolist(), strict=True):
        derivative = mpmath.diff(lambda t, a=of_h, b=of_x: negative_binomial(b, a, t), log_r)
        assert abs(slope - derivative) <= 1e-5 * abs(derivative) + 1e-11, (of_h, of_x)


def test_bernoulli():
    pairs = [
        (sign * h, x) for h in (0.0, 0.3, 3.0, 9.0, 14.0, 20.0, 40.0, 85.0, 1e4) for sign in (1, -1) for x in (0, 1)
    ]
    check(lambda h, x: likelihoods.Bernoulli()(h).log_prob(x), *zip(*pairs, strict=True), bernoulli)


@pytest.mark.parametrize("beta", [1e-6, 0.1875, 1.0, 1e4])
def test_gaussian(beta):
    steps = [math.sqrt(beta) * k for k in (0.01, 1.0, math.sqrt(max(0.1, -0.5 * math.log(math.pi * beta))), 5.0)]
    pairs = [(h, float(np.float32(h + s))) for h in (0.0, 0.3, 1e-6, 1e7) for s in steps if h < 1 or s > 1]
    check(lambda h, x: likelihoods.Gaussian(beta)(h).log_prob(x), *zip(*pairs, strict=True), gaussian, mpmath.mpf(beta))


def test_sums_over_an_observation():
    """2,000 counts of mean 10,000, some 1e4 nats; and of a mean of 1e4 where all counts are 0, 2e7 nats."""
    random = np.random.default_rng(0)
    h = torch.full((20, 2000), 1e4)
    for x in (random.poisson(1e4, (20, 2000)), np.zeros((20, 2000))):
        found = likelihoods.Poisson()(h).to_event(1).log_prob(torch.as_tensor(x).float())
        np.testing.assert_allclose(found, stats.poisson.logpmf(x, 1e4).sum(1), rtol=1e-6)


@pytest.mark.parametrize("name", likelihoods.LIKELIHOODS)
def test_transforms_keep_the_derivatives(name):
    """vmap, forward mode, torch.compile and a second derivative, against plain reverse mode.

    Without validation, which looks at values: none of these has any.
    """
    pyro.enable_validation(False)  # the next test has it again
    likelihood = likelihoods.LIKELIHOODS[name]()
    likelihood.setup((3,))
    h = torch.tensor([[-3.0, 0.4, 30.0], [1.0, -40.0, 2.0]])
    x = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])

    def total(h, x):
        return likelihood(h).to_event(1).log_prob(x).sum()

    own = h.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(own, x), own)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(h, x), expected)
    direction = torch.ones_like(h)
    torch.testing.assert_close(torch.func.jvp(lambda h: total(h, x), (h,), (direction,))[1], expected.sum())
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(own, x), own)[0], expected)
    step = 1e-2
    second = torch.func.jvp(torch.func.grad(lambda h: total(h, x)), (h,), (direction,))[1]  # the Hessian is diagonal
    above, below = (torch.func.grad(total)(h + sign * step, x) for sign in (1, -1))
    torch.testing.assert_close(second, (above - below) / (2 * step), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "d",
    [
        LogitBernoulli(torch.zeros(3)),
        SoftplusPoisson(torch.zeros(3), torch.tensor(0.5)),
        SoftplusNegativeBinomial(torch.zeros(3), torch.tensor(0.0)),
        SoftplusNegativeBinomial(torch.tensor(0.0), torch.zeros(3), torch.tensor(0.5)),
        SoftplusConwayMaxwellPoisson(torch.zeros(3), torch.tensor(0.3)),
    ],
    ids=lambda d: type(d).__name__,
)
def test_a_value_that_is_smaller_than_the_batch_counts_once_for_each_element(d):
    one = torch.tensor(1.0)
    own = d.log_prob(torch.ones(3))
    for shape in ((3,), (5, 3), (2, 5, 3)):
        torch.testing.assert_close(d.expand(shape).log_prob(one), own.expand(shape))
    with pyro.plate("rows", 5, dim=-2), pyro.plate("columns", 3, dim=-1):
        site = pyro.poutine.trace(lambda: pyro.sample("x", d, obs=torch.ones(3))).get_trace().nodes["x"]
    torch.testing.assert_close(site["fn"].log_prob(site["value"]).sum(), 5 * own.sum())
