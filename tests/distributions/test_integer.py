"""Integer samples and their gradient, against exact derivatives by summation."""

import math

import pytest
import torch
from pyro.distributions import constraints

from pyro_nbvae.distributions import (
    ArrivalTimes,
    ConwayMaxwellPoisson,
    CountDistribution,
    GumbelSoftmax,
    Integer,
    NegativeBinomial,
    RelaxedNegativeBinomial,
    RelaxedPoisson,
)
from pyro_nbvae.distributions.kernels import cpu, reference
from pyro_nbvae.distributions.windows import invert

F64 = torch.float64


def every_count(log_mass):
    """The counts whose mass is above 1e-12, that mass, and a uniform that inversion sends to each."""
    mass = log_mass.exp()
    uniform = mass.cumsum(0) - mass / 2
    likely = mass > 1e-12
    return torch.arange(len(mass), dtype=F64)[likely], mass[likely], uniform[likely]


def truth(moment, *parameters):
    leaves = [torch.tensor(p, dtype=F64, requires_grad=True) for p in parameters]
    return torch.autograd.grad(moment(*leaves), leaves)


# E[z] and E[z^2] of a negative binomial
def first(r, logits):
    return r * logits.exp()


def second(r, logits):
    return first(r, logits) * (1 + logits.exp()) + first(r, logits) ** 2


@pytest.mark.parametrize("mean", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("r", [0.05, 0.5, 4.0, 300.0])
def test_negative_binomial_is_unbiased_for_quadratics(r, mean):
    """The sum over all counts of q(z) f'(z) dz/dtheta against d E[f]/dtheta, f = z and f = z^2."""
    logits = math.log(mean / r)
    exact = NegativeBinomial(torch.tensor(r, dtype=F64), logits=torch.tensor(logits, dtype=F64))
    k, mass, uniform = every_count(exact.log_prob(torch.arange(40_000.0, dtype=F64)))
    z, d_r, d_logits = cpu.negative_binomial_integers(torch.full_like(k, r), torch.full_like(k, logits), uniform)
    assert torch.equal(z, k)
    for moment, slope in ((first, torch.ones_like(k)), (second, 2 * k)):
        for ours, theirs in zip((d_r, d_logits), truth(moment, r, logits), strict=True):
            torch.testing.assert_close((mass * slope * ours).sum(), theirs, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(d_logits, (k + (k + r) * torch.sigmoid(torch.tensor(logits, dtype=F64))) / 2)


@pytest.mark.parametrize("rate", [0.01, 1.0, 30.0])
def test_poisson_is_unbiased_for_quadratics(rate):
    k, mass, _ = every_count(torch.distributions.Poisson(torch.tensor(rate, dtype=F64)).log_prob(torch.arange(200.0)))
    torch.manual_seed(0)
    log_rate = torch.full((50,), math.log(rate), dtype=F64, requires_grad=True)
    z = RelaxedPoisson(log_rate.exp(), relaxation=Integer()).rsample()
    (slope,) = torch.autograd.grad(z.sum(), log_rate)
    torch.testing.assert_close(slope, (rate + z.detach()) / 2)
    n = 100_000
    many = torch.full((n,), math.log(rate), dtype=F64, requires_grad=True)
    z = RelaxedPoisson(many.exp(), relaxation=Integer()).rsample()
    (slope,) = torch.autograd.grad(z.sum(), many)
    for found, expected in ((slope, rate), (2 * z.detach() * slope, rate + 2 * rate**2)):  # of E[z] and of E[z^2]
        assert abs(float(found.mean()) - expected) < 5 * float(found.std()) / n**0.5
    torch.testing.assert_close((mass * 2 * k * (rate + k) / 2).sum(), torch.tensor(rate + 2 * rate**2, dtype=F64))


@pytest.mark.parametrize("nu", [0.3, 1.0, 6.0])
@pytest.mark.parametrize("rate", [0.3, 4.0, 90.0])
def test_com_poisson_is_unbiased_for_quadratics(rate, nu):
    def d(rate, nu):
        return ConwayMaxwellPoisson(rate, nu)

    point = torch.tensor(rate, dtype=F64), torch.tensor(nu, dtype=F64)
    k, mass, uniform = every_count(d(*point).log_prob(torch.arange(600.0, dtype=F64)))
    z, *slopes = cpu.com_poisson_integers(torch.full_like(k, rate), torch.full_like(k, nu), uniform)
    assert torch.equal(z, k)
    moments = (
        (lambda a, b: d(a, b).mean, torch.ones_like(k)),
        (
            lambda a, b: d(a, b).variance + d(a, b).mean ** 2,
            2 * k,
        ),
    )
    for moment, slope in moments:
        for ours, theirs in zip(slopes, truth(moment, rate, nu), strict=True):
            torch.testing.assert_close((mass * slope * ours).sum(), theirs, rtol=1e-5, atol=1e-8)


def test_large_dispersion_is_the_poisson():
    """At r = 1e7 and mean 3, dz/d(log mean) at fixed r is the Poisson's (mean + z) / 2."""
    r, mean = 1e7, 3.0
    uniform = torch.rand(2_000, dtype=F64)
    logits = torch.full_like(uniform, math.log(mean / r))
    z, d_r, d_logits = cpu.negative_binomial_integers(torch.full_like(uniform, r), logits, uniform)
    expected = (mean + z) / 2
    torch.testing.assert_close(d_logits, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(d_r * r, expected, rtol=1e-5, atol=1e-6)


CASES = {
    "nb": lambda a, b, **o: RelaxedNegativeBinomial(a.exp(), logits=b, **o),
    "com-poisson": lambda a, b, **o: ConwayMaxwellPoisson(a.exp(), b.exp(), **o),
    "poisson": lambda a, b, **o: RelaxedPoisson((a + b).exp(), **o),
}


@pytest.mark.parametrize("name", CASES)
def test_sampled_gradients_of_a_smooth_function(name):
    """Of E[e^(-z/3)], within 4 standard errors of the exact derivative, plus the 3 % of the trapezoid on that slope."""
    make = CASES[name]
    points = [torch.tensor(x, requires_grad=True) for x in (0.5, 0.4)]
    k = torch.arange(3_000.0, dtype=F64)
    leaves = [p.detach().double().requires_grad_() for p in points]
    expected = torch.autograd.grad((make(*leaves).log_prob(k).exp() * (-k / 3).exp()).sum(), leaves)
    wide = [p.detach().expand(200_000).clone().requires_grad_() for p in points]
    z = make(*wide, relaxation=Integer()).rsample()
    for one, theirs in zip(torch.autograd.grad((-z / 3).exp().sum(), wide), expected, strict=True):
        error = float(one.std()) / math.sqrt(len(one))
        assert abs(float(one.double().mean() - theirs)) < 4 * error + 0.03 * abs(float(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_finite_over_the_whole_range(dtype):
    log_r, logits = torch.meshgrid(torch.linspace(-14, 18, 40), torch.linspace(-15, 6, 30), indexing="ij")
    keep = log_r + logits < 12
    a, b = (x[keep].to(dtype).repeat(20).requires_grad_() for x in (log_r, logits))
    z = RelaxedNegativeBinomial(a.exp(), logits=b, relaxation=Integer()).rsample()
    assert all(g.isfinite().all() for g in torch.autograd.grad(z.sum(), (a, b)))
    log_rate, log_nu = torch.meshgrid(torch.linspace(-9, 7, 40), torch.linspace(-3, 5, 30), indexing="ij")
    a, b = (x.reshape(-1).to(dtype).repeat(20).requires_grad_() for x in (log_rate, log_nu))
    z = ConwayMaxwellPoisson(a.exp(), b.exp(), relaxation=Integer()).rsample()
    assert all(g.isfinite().all() for g in torch.autograd.grad(z.sum(), (a, b)))


@pytest.mark.parametrize("relaxation", [Integer(), ArrivalTimes(0.2), GumbelSoftmax(0.3)], ids=str)
def test_draws_do_not_depend_on_the_number_of_threads(relaxation):
    r, logits = torch.rand(3, 20_000)[:2] * 3
    threads = torch.get_num_threads()
    drawn = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            torch.manual_seed(0)
            drawn.append(RelaxedNegativeBinomial(r, logits=logits, relaxation=relaxation).rsample())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("logits", [math.nan, math.inf])
def test_rates_that_are_not_finite(logits):
    """The element is nan, and no other."""
    given = torch.tensor([0.0, logits, 1.0])
    z = RelaxedNegativeBinomial(torch.ones(3), logits=given, relaxation=Integer(), validate_args=False).rsample()
    assert z.isnan().tolist() == [False, True, False]


def test_empty():
    for make in CASES.values():
        assert make(torch.zeros(0, 3), torch.zeros(0, 3), relaxation=Integer()).rsample().shape == (0, 3)


def test_the_two_sides_of_the_median_agree():
    """Drawn at a uniform number of exactly one half, from which side the sum is taken makes no difference."""

    class Geometric(CountDistribution):
        arg_constraints = {"logits": constraints.real}
        log_weight = staticmethod(lambda k, logits: k * torch.nn.functional.logsigmoid(logits))
        scores = staticmethod(lambda k, logits: (k * torch.sigmoid(-logits),))
        window = staticmethod(lambda nats, logits: (0 * logits, nats / torch.nn.functional.softplus(-logits)))

    u = torch.tensor([0.5 - 1e-9, 0.5, 0.5 + 1e-9], dtype=F64)
    compiled = cpu.com_poisson_integers(*(torch.full((3,), v, dtype=F64) for v in (3.7, 1.6)), u)
    for z, *derivatives in (compiled, invert(Geometric, [torch.full((3,), 1.3, dtype=F64)], u)):
        assert torch.equal(z, z[:1].expand(3))
        for derivative in derivatives:
            assert derivative[0] != 0
            torch.testing.assert_close(derivative, derivative[:1].expand(3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernels", [cpu, reference])
@pytest.mark.parametrize("r, logits", [(1e-3, 11.0), (1e-3, 13.0), (1e-2, 9.0)])
def test_rare_bursts_are_not_truncated(r, logits, kernels):
    """Of uniforms at equal distances the mean is that of the counts, in single precision, within 1 %."""
    number = 500
    # closer together near 1, where the bursts are: v has the density 2 v of 1 - u
    v = (torch.arange(number, dtype=F64) + 0.5) / number
    upper = 20 * r
    z, *_ = kernels.negative_binomial_integers(
        torch.full((number,), r), torch.full((number,), logits), (1 - upper * v**2).float()
    )
    mean = float((z.double() * 2 * v * upper).mean())
    assert mean == pytest.approx(r * math.exp(logits), rel=0.01)
