"""Samplers against the laws they relax and against the textbook on the same noise. Seeds are fixed by conftest."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch.nn.functional import softplus

from pyro_nbvae.distributions import NegativeBinomial, RelaxedNegativeBinomial, RelaxedPoisson, samplers

DRAWS = 200_000
RELAXATIONS = [("arrival", "sigmoid"), ("arrival", "smoothstep"), ("gumbel", "sigmoid")]


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
        RelaxedNegativeBinomial(torch.tensor([0.05, 1.0, 7.5]), torch.tensor([2.0, 0.0, -0.5]), temperature=0.0),
        RelaxedNegativeBinomial(
            torch.tensor([0.05, 1.0, 7.5]), torch.tensor([2.0, 0.0, -0.5]), temperature=0.3, straight_through=True
        ),
        RelaxedNegativeBinomial(
            torch.tensor([0.05, 1.0, 7.5]),
            torch.tensor([2.0, 0.0, -0.5]),
            temperature=0.3,
            relaxation="gumbel",
            straight_through=True,
        ),
        RelaxedPoisson(torch.tensor([0.1, 1.0, 12.0]), temperature=0.0),
        RelaxedPoisson(torch.tensor([0.1, 1.0, 12.0]), temperature=0.3, straight_through=True),
        RelaxedPoisson(torch.tensor([0.1, 1.0, 12.0]), temperature=0.3, relaxation="gumbel", straight_through=True),
    ],
    ids=lambda d: f"{type(d).__name__}-{getattr(d, 'relaxation', 'exact')}-{getattr(d, 'temperature', 0)}",
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


@pytest.mark.parametrize("relaxation, indicator", RELAXATIONS)
def test_relaxed_moments_reach_the_exact_ones(relaxation, indicator):
    """At temperature 0.01 mean and variance are within 4 standard errors, plus 0.5 % and 2 % for what is left."""
    r, logits = torch.tensor([0.1, 1.0, 6.0]), torch.tensor([1.5, 0.0, -0.5])
    options = dict(relaxation=relaxation, indicator=indicator)
    for distribution in (
        RelaxedNegativeBinomial(r, logits, temperature=0.01, **options),
        RelaxedPoisson(torch.tensor([0.2, 1.0, 5.0]), temperature=0.01, **options),
    ):
        z = distribution.rsample(torch.Size([DRAWS])).detach()
        within(z, distribution.mean, bias=0.005 * distribution.mean)
        within((z - distribution.mean) ** 2, distribution.variance, bias=0.02 * distribution.variance)


@pytest.mark.parametrize("relaxation, indicator", RELAXATIONS)
def test_the_error_of_the_variance_falls_with_the_temperature(relaxation, indicator):
    errors = []
    for temperature in (1.0, 0.25, 0.02):
        d = RelaxedPoisson(
            torch.full((DRAWS,), 2.0), temperature=temperature, relaxation=relaxation, indicator=indicator
        )
        errors.append(abs(float(d.sample().var()) - 2.0))
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2]


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_sigmoid_counts_have_their_exact_mean_gradient_and_variance(temperature):
    """Campbell: the mean of sum_k h(S_k) is rate * int h, its variance rate * int h^2; the tail's share is 2e-4."""
    rate = torch.full((DRAWS,), 3.0, requires_grad=True)
    z = RelaxedPoisson(rate, temperature=temperature).rsample()
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
    z = RelaxedPoisson(rate, temperature=temperature, indicator="smoothstep").rsample()
    (gradient,) = torch.autograd.grad(z.sum(), rate)
    within(z.detach(), 3.0)
    within(gradient, 1.0)


def test_large_dispersion_samples_as_poisson():
    mean = 4.0
    nb = RelaxedNegativeBinomial(torch.tensor(1e7), torch.tensor(mean / 1e7).log(), temperature=0.0)
    z = nb.sample(torch.Size([DRAWS])).numpy()
    cells = np.arange(14)
    observed = np.append(np.bincount(z.astype(int), minlength=14)[:14], (z >= 14).sum())
    expected = np.append(scipy.stats.poisson.pmf(cells, mean), scipy.stats.poisson.sf(13, mean)) * DRAWS
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("shape", [0.01, 0.3, 2.5])
def test_log_gamma_draws(shape):
    """Law against scipy; gradient against d E[log g] / d shape = trigamma(shape)."""
    a = torch.full((DRAWS // 4,), shape, requires_grad=True)
    draws = samplers.log_standard_gamma(a)
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


@pytest.mark.parametrize("relaxation, indicator", RELAXATIONS)
def test_pathwise_gradients_equal_the_analytic_ones(relaxation, indicator):
    """d E[z] and d E[exp(-z/2)] by r and l at temperature 0.05, within 4 standard errors and a stated bias.

    For arrival times the bias is known: the relaxed law's own Laplace transform is (1 + e^l c)^(-r), and its distance
    from the exact one is all that is allowed. For Gumbel-softmax 3 % is.
    """
    r0, l0, temperature = 1.7, 0.4, 0.05
    r = torch.full((DRAWS * 2,), r0, dtype=torch.float64, requires_grad=True)
    logits = torch.full((DRAWS * 2,), l0, dtype=torch.float64, requires_grad=True)
    z = RelaxedNegativeBinomial(
        r, logits, temperature=temperature, relaxation=relaxation, indicator=indicator, max_count=150
    ).rsample()
    odds = math.exp(l0)

    def transform(c):
        """Derivatives of (1 + e^l c)^(-r) in r and l."""
        value = (1 + odds * c) ** -r0
        return -math.log1p(odds * c) * value, -r0 * odds * c / (1 + odds * c) * value

    exact = transform(1 - math.exp(-0.5))
    if relaxation == "arrival":
        relaxed = transform(laplace_weight(temperature, indicator))
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


@pytest.mark.parametrize("indicator", ["sigmoid", "smoothstep"])
@pytest.mark.parametrize("per_latent", [False, True])
def test_arrival_backward_equals_autograd(indicator, per_latent):
    """S_k = E_k / rate with E_k held fixed, every intermediate kept by autograd, the tail integrated from E_T on."""
    torch.set_default_dtype(torch.float64)
    log_rate = torch.linspace(-2, 3, 40).requires_grad_()
    temperature = torch.linspace(0.05, 1.0, 40) if per_latent else 0.3
    rate = log_rate.detach().exp()
    until = samplers.horizon(temperature, indicator)
    events = list(samplers.arrivals(rate, until))
    z, dz = samplers.count_arrivals(events, rate, temperature, indicator)

    ((index, time),) = events
    unit_rate_arrival = time * rate[index]
    x = (1 - unit_rate_arrival / log_rate.exp()[index]) / (temperature[index] if per_latent else temperature)
    if indicator == "sigmoid":
        h = torch.sigmoid(x)
        tail = log_rate.exp() * temperature * softplus((1 - rate * until / log_rate.exp()) / temperature)
    else:
        inside = x.clamp(-1, 1)
        h = 0.5 + 0.75 * inside - 0.25 * inside**3
        tail = 0.0
    textbook = torch.zeros(40).index_add(0, index, h) + tail
    torch.testing.assert_close(z, textbook.detach())
    torch.testing.assert_close(dz, torch.autograd.grad(textbook.sum(), log_rate)[0])


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_gumbel_backward_equals_autograd(temperature):
    """softmax((log Poisson(k) + g_k) / temperature) over the counts that take part, by autograd."""
    torch.set_default_dtype(torch.float64)
    log_rate = torch.linspace(3, -2, 30).requires_grad_()  # in descending order, as the races want it
    reach = samplers.bernstein(log_rate.detach().exp(), samplers.GUMBEL_CUT).ceil()
    noise = list(samplers.races(reach, 60))
    z, dz = samplers.run_races(noise, log_rate.detach(), temperature, 60)

    gumbel = torch.full((61, 30), -math.inf)
    for k, active, exponentials in noise:
        gumbel[k : k + len(exponentials), :active] = -exponentials.log()
    k = torch.arange(61.0)[:, None]
    log_mass = k * log_rate - log_rate.exp() - torch.lgamma(k + 1)
    textbook = (torch.softmax((log_mass + gumbel) / temperature, 0) * k).sum(0)
    torch.testing.assert_close(z, textbook.detach())
    torch.testing.assert_close(dz, torch.autograd.grad(textbook.sum(), log_rate)[0])
    hard, _ = samplers.run_races(noise, log_rate.detach(), temperature, 60, straight_through=True)
    torch.testing.assert_close(hard, (log_mass + gumbel).argmax(0).to(hard.dtype).detach())


def test_the_whole_chain_equals_autograd_through_the_gamma():
    """rsample's gradient in r and l is dz / d(log rate), which the sampler keeps, times the Gamma step's own."""
    torch.set_default_dtype(torch.float64)
    r = torch.linspace(0.2, 4, 50).requires_grad_()
    logits = torch.linspace(-1, 1, 50).requires_grad_()
    torch.manual_seed(5)
    z = RelaxedNegativeBinomial(r, logits, temperature=0.2).rsample()
    got = torch.autograd.grad(z.sum(), (r, logits))
    torch.manual_seed(5)
    log_rate = samplers.log_standard_gamma(r) + logits
    rate = log_rate.detach().exp()
    again, dz = samplers.count_arrivals(samplers.arrivals(rate, samplers.horizon(0.2, "sigmoid")), rate, 0.2, "sigmoid")
    torch.testing.assert_close(z.detach(), again)
    expected = torch.autograd.grad((log_rate * dz).sum(), (r, logits))
    torch.testing.assert_close(got, expected)


# --- working memory and limits --------------------------------------------------------------------------------------


def test_arrivals_in_small_pieces_are_the_same_process(monkeypatch):
    rate = torch.tensor([0.0, 3.0, 500.0, 0.0, 7.0, 0.4, 90.0])
    torch.manual_seed(1)
    expected = torch.poisson(rate * 1.5)
    monkeypatch.setattr(samplers, "PIECE", 64)
    torch.manual_seed(1)
    seen = torch.zeros_like(rate)
    for index, time in samplers.arrivals(rate, 1.5):
        assert len(index) == len(time) <= 64
        assert ((time >= 0) & (time <= 1.5)).all()
        seen.index_add_(0, index, torch.ones_like(time))
    torch.testing.assert_close(seen, expected)


def test_no_arrivals_at_all():
    z = RelaxedPoisson(torch.full((3,), 1e-30), temperature=0.1, indicator="smoothstep").rsample()
    torch.testing.assert_close(z, torch.zeros(3))
    assert RelaxedPoisson(torch.ones(0), temperature=0.1).rsample().shape == (0,)


def test_straight_through_has_the_relaxed_gradient():
    """Same seed, same noise: the integer forward, the relaxed backward."""
    rate = torch.full((500,), 2.5, requires_grad=True)
    for relaxation in ("arrival", "gumbel"):
        results = []
        for straight_through in (False, True):
            torch.manual_seed(2)
            z = RelaxedPoisson(
                rate, temperature=0.3, relaxation=relaxation, straight_through=straight_through
            ).rsample()
            results.append((z.detach(), torch.autograd.grad(z.sum(), rate)[0]))
        (soft, soft_gradient), (hard, hard_gradient) = results
        torch.testing.assert_close(soft_gradient, hard_gradient)
        assert (hard == hard.round()).all() and not (soft == soft.round()).all()


def test_gumbel_warns_where_the_rate_nears_max_count():
    with pytest.warns(RuntimeWarning, match="max_count=10"):
        RelaxedPoisson(torch.tensor([8.0]), temperature=0.5, relaxation="gumbel", max_count=10).sample()
    RelaxedPoisson(torch.tensor([8.0]), temperature=0.5, relaxation="gumbel").sample()  # warnings are errors here


def test_rates_that_have_diverged_are_refused():
    with pytest.raises(ValueError, match="more than 1e\\+10 arrivals"):
        RelaxedPoisson(torch.tensor([1e12]), temperature=0.5).rsample()
    with pytest.raises(ValueError, match="not finite"):
        RelaxedPoisson(torch.tensor([math.nan]), temperature=0.5, validate_args=False).rsample()
