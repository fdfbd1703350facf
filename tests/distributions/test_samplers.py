"""Samplers against the laws they relax and against the textbook on the same noise. Seeds are fixed by conftest."""

import functools
import math

import mpmath
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch.distributions import kl_divergence

from pyro_nbvae.distributions import (
    ArrivalTimes,
    GumbelSoftmax,
    NegativeBinomial,
    RelaxedNegativeBinomial,
    RelaxedPoisson,
    kernels,
)
from pyro_nbvae.distributions.families.poisson import largest_count
from pyro_nbvae.distributions.kernels import cpu, reference
from pyro_nbvae.distributions.relaxations import gumbel_softmax
from pyro_nbvae.distributions.relaxations.gamma import _counts_of_a_gpu, exact_counts, log_standard_gamma
from tests.distributions import by_textbook

DRAWS = 200_000
RELAXATIONS = [ArrivalTimes(), ArrivalTimes(indicator="smoothstep"), GumbelSoftmax(max_count=150)]
IDS = ["sigmoid", "smoothstep", "gumbel"]


def within(sample, expected, errors=4.0, bias=0.0):
    """Asserts that the mean of a sample (over its first axis) is as expected, within standard errors and a bias."""
    sample = sample.double()
    error = sample.std(0) / math.sqrt(len(sample))
    difference = (sample.mean(0) - torch.as_tensor(expected, dtype=torch.float64)).abs()
    assert (difference <= errors * error + bias).all(), (difference / error, bias)


# --- the laws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "distribution",
    [
        NegativeBinomial(torch.tensor([0.05, 1.0, 7.5]), logits=torch.tensor([2.0, 0.0, -0.5])),
        RelaxedNegativeBinomial(torch.tensor([0.05, 1.0, 7.5]), logits=torch.tensor([2.0, 0.0, -0.5])),
        RelaxedNegativeBinomial(
            torch.tensor([0.05, 1.0, 7.5]),
            logits=torch.tensor([2.0, 0.0, -0.5]),
            relaxation=ArrivalTimes(0.3, straight_through=True),
        ),
        RelaxedNegativeBinomial(
            torch.tensor([0.05, 1.0, 7.5]),
            logits=torch.tensor([2.0, 0.0, -0.5]),
            relaxation=GumbelSoftmax(0.3, straight_through=True),
        ),
        RelaxedPoisson(torch.tensor([0.1, 1.0, 12.0])),
        RelaxedPoisson(torch.tensor([0.1, 1.0, 12.0]), relaxation=ArrivalTimes(0.3, straight_through=True)),
        RelaxedPoisson(torch.tensor([0.1, 1.0, 12.0]), relaxation=GumbelSoftmax(0.3, straight_through=True)),
    ],
    ids=lambda d: f"{type(d).__name__}-{getattr(d, 'relaxation', 'exact')}",
)
def test_integer_samples_fit_their_mass_function(distribution):
    z = distribution.sample(torch.Size([DRAWS]))
    assert (z == z.round()).all() and (z >= 0).all()
    top = int(z.max()) + 1
    mass = distribution.log_prob(torch.arange(float(top))[:, None]).double().exp()
    for unit in range(3):
        p = mass[:, unit].numpy()
        # cells of at least 20 expected counts; the rest is one cell
        last = int(np.argmax(p[::-1] * DRAWS >= 20))
        cells = len(p) - last
        expected = np.append(p[:cells], max(1e-300, 1 - p[:cells].sum())) * DRAWS
        observed = np.bincount(z[:, unit].long().numpy(), minlength=cells)
        observed = np.append(observed[:cells], observed[cells:].sum())
        keep = expected >= 5
        assert (
            scipy.stats.chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum()).pvalue
            > 1e-3
        )


@pytest.mark.parametrize("relaxation", RELAXATIONS, ids=IDS)
def test_relaxed_moments_reach_the_exact_ones(relaxation):
    """At temperature 0.01 mean and variance are within 4 standard errors, plus 0.5 % and 2 % for what is left."""
    r, logits = torch.tensor([0.1, 1.0, 6.0]), torch.tensor([1.5, 0.0, -0.5])
    cold = relaxation.at(0.01)
    for distribution in (
        RelaxedNegativeBinomial(r, logits=logits, relaxation=cold),
        RelaxedPoisson(torch.tensor([0.2, 1.0, 5.0]), relaxation=cold),
    ):
        z = distribution.rsample(torch.Size([DRAWS])).detach()
        within(z, distribution.mean, bias=0.005 * distribution.mean)
        within((z - distribution.mean) ** 2, distribution.variance, bias=0.02 * distribution.variance)


@pytest.mark.parametrize("relaxation", RELAXATIONS, ids=IDS)
def test_the_error_of_the_variance_falls_with_the_temperature(relaxation):
    errors = []
    for temperature in (1.0, 0.25, 0.02):
        d = RelaxedPoisson(torch.full((DRAWS,), 2.0), relaxation=relaxation.at(temperature))
        errors.append(abs(float(d.sample().var()) - 2.0))
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2]


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_sigmoid_counts_have_their_exact_mean_gradient_and_variance(temperature):
    """Campbell: the mean of sum_k h(S_k) is rate * int h, its variance rate * int h^2; the tail's share is 2e-4."""
    rate = torch.full((DRAWS,), 3.0, requires_grad=True)
    z = RelaxedPoisson(rate, relaxation=ArrivalTimes(temperature)).rsample()
    (gradient,) = torch.autograd.grad(z.sum(), rate)
    mean = temperature * math.log1p(math.exp(1 / temperature))
    square = scipy.integrate.quad(lambda s: 1 / (1 + math.exp((s - 1) / temperature)) ** 2, 0, 1 + 30 * temperature)[0]
    z = z.detach()
    within(z, 3 * mean)
    within(gradient, mean)
    within((z - 3 * mean) ** 2, 3 * square, bias=3 * 3e-4)


@pytest.mark.parametrize("temperature", [0.24, 1.0])
def test_smoothstep_counts_have_the_exact_mean_and_gradient(temperature):
    rate = torch.full((DRAWS,), 3.0, requires_grad=True)
    z = RelaxedPoisson(rate, relaxation=ArrivalTimes(temperature, indicator="smoothstep")).rsample()
    (gradient,) = torch.autograd.grad(z.sum(), rate)
    within(z.detach(), 3.0)
    within(gradient, 1.0)


@pytest.mark.parametrize("draw", [exact_counts, _counts_of_a_gpu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rate", [1e3, 1e7, 1e8, 1e9, 1e10, 1e12])
def test_counts_of_large_rates(rate, dtype, draw):
    """On both sides of 2^24, where a GPU changes to normals; torch.poisson has 32 bits there."""
    given = torch.full((DRAWS,), rate, dtype=dtype)
    z = draw(given)
    assert z.dtype == dtype and (z == z.round()).all()
    centred = z.double() - given.double()
    within(centred, 0.0)
    within(centred.square() / rate, 1.0)


@pytest.mark.parametrize("rate", [2.0**24 + 1, 1e8])
def test_the_law_of_a_gpus_large_counts(rate):
    """Its distribution function, also where it is steep, is the Poisson's but for an error of O(1 / rate)."""
    g = torch.linspace(-4, 4, 401, dtype=torch.float64)
    law = scipy.stats.poisson(rate)
    counts = torch.tensor([rate], dtype=torch.float64) + math.sqrt(rate) * g + (g * g - 1) / 6
    # the rounded counts are at most k if the unrounded ones are below k + 1 / 2
    k = counts.floor()
    root = (-math.sqrt(rate) + (rate + (2 / 3) * (k + 0.5 - rate) + 1 / 9).sqrt()) * 3
    found, expected = scipy.stats.norm.cdf(root.numpy()), law.cdf(k.numpy())
    assert np.abs(found - expected).max() < 1 / rate + 1e-11


def test_small_counts_of_a_gpu_are_torchs():
    rate = torch.tensor([0.0, 0.3, 20.0, 2.0**24, math.inf, math.nan], dtype=torch.float64)
    torch.manual_seed(0)
    expected = torch.poisson(rate[:4])
    torch.manual_seed(0)
    assert _counts_of_a_gpu(rate[:4]).equal(expected)
    assert float(exact_counts(rate)[4]) == pytest.approx(2.0**53, rel=1e-6)
    assert exact_counts(rate)[5].isnan()


def test_large_dispersion_samples_as_poisson():
    mean = 4.0
    nb = RelaxedNegativeBinomial(torch.tensor(1e7), logits=torch.tensor(mean / 1e7).log())
    z = nb.sample(torch.Size([DRAWS])).numpy()
    cells = np.arange(14)
    observed = np.append(np.bincount(z.astype(int), minlength=14)[:14], (z >= 14).sum())
    expected = np.append(scipy.stats.poisson.pmf(cells, mean), scipy.stats.poisson.sf(13, mean)) * DRAWS
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("shape", [0.01, 0.3, 2.5])
def test_log_gamma_draws(shape):
    """Law against scipy; gradient against d E[log g] / d shape = trigamma(shape)."""
    a = torch.full((DRAWS // 4,), shape, requires_grad=True)
    draws = log_standard_gamma(a)
    (gradient,) = torch.autograd.grad(draws.sum(), a)
    draws = draws.detach()
    assert draws.isfinite().all() and gradient.isfinite().all()
    assert scipy.stats.kstest(draws.double().numpy(), scipy.stats.loggamma(shape).cdf).pvalue > 1e-3
    within(gradient, float(torch.polygamma(1, torch.tensor(shape, dtype=torch.float64))))


# --- pathwise gradients ---------------------------------------------------------------------------------------------


def laplace_weight(temperature, indicator):
    """c with E[exp(-z / 2)] = exp(-rate * c) for relaxed Poisson counts; 1 - exp(-1/2) for exact ones."""

    def h(s):
        x = (1 - s) / temperature
        if indicator == "sigmoid":
            return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
        x = min(1.0, max(-1.0, x))
        return 0.5 + 0.75 * x - 0.25 * x**3

    end = 1 + 40 * temperature
    return scipy.integrate.quad(lambda s: 1 - math.exp(-h(s) / 2), 0, end, points=[1.0], limit=400)[0]


@pytest.mark.parametrize("relaxation", RELAXATIONS, ids=IDS)
def test_pathwise_gradients_equal_the_analytic_ones(relaxation):
    """d E[z] and d E[exp(-z/2)] by r and l at temperature 0.05, within 4 standard errors and a stated bias.

    For arrival times the bias is known: the relaxed law's own Laplace transform is (1 + e^l c)^(-r), and its distance
    from the exact one is all that is allowed. For Gumbel-softmax 3 % is.
    """
    r0, l0, temperature = 1.7, 0.4, 0.05
    r = torch.full((DRAWS * 2,), r0, dtype=torch.float64, requires_grad=True)
    logits = torch.full((DRAWS * 2,), l0, dtype=torch.float64, requires_grad=True)
    z = RelaxedNegativeBinomial(r, logits=logits, relaxation=relaxation.at(temperature)).rsample()
    odds = math.exp(l0)

    def transform(c):
        """Derivatives of (1 + e^l c)^(-r) in r and l."""
        value = (1 + odds * c) ** -r0
        return -math.log1p(odds * c) * value, -r0 * odds * c / (1 + odds * c) * value

    exact = transform(1 - math.exp(-0.5))
    if isinstance(relaxation, ArrivalTimes):
        relaxed = transform(laplace_weight(temperature, relaxation.indicator))
        bias = [abs(a - b) for a, b in zip(exact, relaxed, strict=True)]
        assert max(bias) < 0.01
        mean_bias = 1e-6
    else:
        bias = [0.03 * abs(a) for a in exact]
        mean_bias = 0.03
    for_mean = torch.autograd.grad(z.sum(), (r, logits), retain_graph=True)
    for_transform = torch.autograd.grad(torch.exp(-z / 2).sum(), (r, logits))
    for got, expected in zip(for_mean, (odds, r0 * odds), strict=True):
        within(got, expected, bias=mean_bias * expected)
    for got, expected, allowed in zip(for_transform, exact, bias, strict=True):
        within(got, expected, bias=allowed)


# --- the textbook on the same noise ---------------------------------------------------------------------------------


SEED = 3_141_592_653_589_793
places = pytest.mark.parametrize("place", [cpu, reference], ids=["cpu", "reference"])


def noise(rows, n):
    """The unit exponentials that the kernels draw with this seed, (rows, n)."""
    drawn = [[cpu._exponential(SEED, i, k) for i in range(n)] for k in range(rows)]
    return torch.tensor(drawn, dtype=torch.float64)


def test_the_noise_of_the_reference_is_that_of_the_compiled_loops():
    k, element = torch.arange(50)[:, None], torch.arange(40)
    torch.testing.assert_close(reference.exponentials(SEED, element, k), noise(50, 40), rtol=1e-14, atol=0)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("indicator", reference.TAIL)
@pytest.mark.parametrize("poisson", [False, True])
@places
def test_arrivals_equal_the_textbook_on_their_noise(place, poisson, indicator, hard):
    """u_k = e^-l (e^S_k - 1), S_k a running sum of E_j / (r + j), every intermediate kept by autograd, and the mean of
    what comes after the last arrival; of a Poisson process u_k = e^-l times a running sum of E_j."""
    by_textbook.arrivals(functools.partial(place.arrivals, SEED), noise, poisson, indicator, poisson != hard, hard)


@pytest.mark.parametrize("hard", [False, True])
@places
def test_races_equal_the_textbook_on_their_noise(place, hard):
    """softmax((log Poisson(k) + g_k) / temperature) over the counts that take part, by autograd."""
    by_textbook.races(functools.partial(place.races, SEED), noise, varied=hard, hard=hard)


def test_the_arrivals_of_a_gamma_mixture_are_a_polya_process():
    """The relaxed negative binomial has the law of a relaxed Poisson at a Gamma rate: moments and Laplace transform."""
    r, logits = torch.full((DRAWS,), 0.7), torch.full((DRAWS,), 0.5)
    for indicator in reference.TAIL:
        options = dict(relaxation=ArrivalTimes(0.5, indicator=indicator))
        direct = RelaxedNegativeBinomial(r, logits=logits, **options).sample().double()
        mixture = RelaxedPoisson((log_standard_gamma(r) + logits).exp(), **options).sample().double()
        for of in (lambda z: z, lambda z: z.square(), lambda z: torch.exp(-z / 2), lambda z: (z < 0.5).double()):
            a, b = of(direct), of(mixture)
            error = math.hypot(float(a.std()), float(b.std())) / math.sqrt(DRAWS)
            assert abs(float(a.mean() - b.mean())) < 4 * error


def test_counts_out_of_reach_are_as_rare_as_promised():
    rate = torch.tensor([1e-6, 0.01, 0.5, 3.0, 40.0, 2000.0], dtype=torch.float64)
    for nats in (7.0, 20.0):
        k = largest_count(rate, nats).ceil().numpy()
        assert (scipy.stats.poisson.logsf(k - 1, rate.numpy()) <= -nats).all()
        assert (k <= 1.5 * scipy.stats.poisson.isf(math.exp(-nats), rate.numpy()) + 4).all()
    single = torch.tensor([3.0, 2e3, 1e6, reference.LARGEST - 1])
    k = largest_count(single, 20.0).ceil().numpy()
    assert (scipy.stats.poisson.logsf(k - 1, single.double().numpy()) <= -19.9).all()
    first, last = (bound.numpy() for bound in gumbel_softmax._window(rate, torch.full_like(rate, 0.5)))
    assert (scipy.stats.poisson.logcdf(first - 1, rate.numpy()) <= -gumbel_softmax._TAIL_NATS).all()
    assert (last - first <= 14 * rate.sqrt().numpy() + 2 * gumbel_softmax._TAIL_NATS).all()


def test_rsample_gives_the_samplers_own_derivatives():
    torch.set_default_dtype(torch.float64)
    r = torch.linspace(0.2, 4, 50).requires_grad_()
    logits = torch.linspace(-1, 1, 50).requires_grad_()
    torch.manual_seed(5)
    z = RelaxedNegativeBinomial(r, logits=logits, relaxation=ArrivalTimes(0.2)).rsample()
    weight = torch.linspace(-1, 2, 50)
    got = torch.autograd.grad((weight * z).sum(), (r, logits))
    torch.manual_seed(5)
    seed = torch.randint(1 << 62, ())
    tau = torch.full_like(r, 0.2)
    again, d_r, d_logits = cpu.arrivals(seed, tau, r.detach(), logits.detach(), "sigmoid", False)
    torch.testing.assert_close(z.detach(), again)
    torch.testing.assert_close(got, (weight * d_r, weight * d_logits))


@pytest.mark.parametrize("temperature", [0.25, 20.0, 100.0])
def test_wide_windows_are_drawn(temperature):
    """The arg max does not depend on the temperature; at high ones the window holds masses beyond a double's range."""
    z = RelaxedPoisson(
        torch.full((2000,), 790.0), relaxation=GumbelSoftmax(temperature, straight_through=True)
    ).sample()
    within(z, 790.0)
    within((z - 790).square(), 790.0)


@pytest.mark.filterwarnings("ignore:a Poisson rate is close")
@pytest.mark.parametrize("rate", [8.0, 60.0, 121.0, 300.0])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_largest_count_truncates_the_poisson(rate, compiled, monkeypatch):
    monkeypatch.setattr(kernels, "_module", lambda name: cpu if compiled else None)
    k = np.arange(101)
    mass = scipy.stats.poisson.pmf(k, rate) / scipy.stats.poisson.cdf(100, rate)
    relaxation = GumbelSoftmax(0.25, max_count=100, straight_through=True)
    z = RelaxedPoisson(torch.full((4000,), rate), relaxation=relaxation).sample()
    within(z, mass @ k)


def test_functions_of_the_compiled_loops():
    """The loops' own log, exp and expm1 against mpmath, to 4 units in the last place."""
    rng = np.random.default_rng(0)
    small = 10.0 ** -rng.uniform(0, 15, 500)
    wide = [*rng.uniform(-700, 700, 500), *small, *-small]
    cases = (
        (cpu._log_of, mpmath.log, [*small, *(1 - small[small < 0.5]), *rng.uniform(0.5, 2, 500), *1 / small]),
        (cpu._exp, mpmath.exp, wide),
        (cpu._expm1, mpmath.expm1, wide),
    )
    for ours, theirs, points in cases:
        for x in points:
            exact = float(theirs(mpmath.mpf(float(x))))
            assert abs(ours(float(x)) - exact) <= 4 * np.spacing(abs(exact)), (theirs.__name__, x)


@pytest.mark.parametrize("temperature", [1e-6, 1e-5, 1e-4])
def test_cold_arrivals_are_counts(temperature):
    """All but the few latents with an arrival within some temperatures of time 1."""
    for d in (RelaxedPoisson, lambda rate, **options: RelaxedNegativeBinomial(rate, logits=0.0, **options)):
        z = d(torch.full((20_000,), 2.0).double(), relaxation=ArrivalTimes(temperature)).rsample()
        near = (z - z.round()).abs() > 1e-6
        expected = len(z) * 4 * 28 * temperature  # the rate at time 1 times the width of the indicator's step
        assert expected < len(z) / 50
        assert near.sum() <= expected + 5 * math.sqrt(expected) + 5


def test_compiled_noise_is_exponential():
    """Moments of 200,000 within 4 standard errors, and no correlation of neighbours in either direction."""
    drawn = noise(400, 500).numpy()
    for power, moment in ((1, 1), (2, 2), (3, 6)):
        error = math.sqrt((math.factorial(2 * power) - moment**2) / drawn.size)
        assert abs((drawn**power).mean() - moment) < 4 * error
    for a, b in ((drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / math.sqrt(a.size)


# --- limits ---------------------------------------------------------------------------------------------------------


def test_no_arrivals_at_all():
    z = RelaxedPoisson(torch.full((3,), 1e-30), relaxation=ArrivalTimes(0.1, indicator="smoothstep")).rsample()
    torch.testing.assert_close(z, torch.zeros(3))
    assert RelaxedPoisson(torch.ones(0), relaxation=ArrivalTimes(0.1)).rsample().shape == (0,)


def test_straight_through_has_the_relaxed_gradient():
    """Same seed, same noise: the integer forward, the relaxed backward."""
    rate = torch.full((500,), 2.5, requires_grad=True)
    for relaxation in (ArrivalTimes, GumbelSoftmax):
        results = []
        for straight_through in (False, True):
            torch.manual_seed(2)
            z = RelaxedPoisson(rate, relaxation=relaxation(0.3, straight_through=straight_through)).rsample()
            results.append((z.detach(), torch.autograd.grad(z.sum(), rate)[0]))
        (soft, soft_gradient), (hard, hard_gradient) = results
        torch.testing.assert_close(soft_gradient, hard_gradient)
        assert (hard == hard.round()).all() and not (soft == soft.round()).all()


def test_gumbel_warns_where_the_rate_nears_max_count():
    with pytest.warns(RuntimeWarning, match="max_count=10"):
        RelaxedPoisson(torch.tensor([8.0]), relaxation=GumbelSoftmax(0.5, max_count=10)).sample()
    RelaxedPoisson(torch.tensor([8.0]), relaxation=GumbelSoftmax(0.5)).sample()  # warnings are errors here


@pytest.mark.parametrize("relaxation", [ArrivalTimes(0.5), GumbelSoftmax(0.5)])
def test_rates_that_have_diverged_are_refused(relaxation):
    """With validation; without it they are nan, alone."""
    with pytest.raises(ValueError, match="too extreme for a sum over counts or a sample"):
        RelaxedPoisson(torch.tensor([1e12]), relaxation=relaxation, validate_args=True).rsample()
    rates = torch.tensor([2.0, math.nan, 1e12, math.inf, 0.0])
    z = RelaxedPoisson(rates, relaxation=relaxation, validate_args=False).rsample()
    assert z.isnan().tolist() == [False, True, True, True, False] and z[4] == 0


@pytest.mark.parametrize("mean", [2.0, 30.0, 220.0, 5000.0])
@pytest.mark.parametrize("relaxation", [ArrivalTimes, GumbelSoftmax])
def test_the_counts_of_trained_models_are_within_reach(mean, relaxation):
    """Of the default's integer counts at means up to hundreds: the mean, and a sampled KL, which is the exact one."""
    q = RelaxedNegativeBinomial(400.0, logits=math.log(mean / 400), relaxation=relaxation(straight_through=True))
    p = NegativeBinomial(1.0, logits=math.log(mean))
    z = q.rsample(torch.Size([4000]))
    within(z, mean)
    within(q.log_prob(z) - p.log_prob(z), kl_divergence(q, p))
