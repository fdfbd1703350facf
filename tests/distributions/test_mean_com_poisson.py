"""The Conway-Maxwell-Poisson with a given mean, against direct sums in many digits."""

import math

import mpmath as mp
import pytest
import torch

from pyro_nbvae.distributions import MeanConwayMaxwellPoisson
from pyro_nbvae.distributions.com_poisson import com_poisson_log_lambda, com_poisson_log_mass
from pyro_nbvae.distributions.kernels import cpu, reference

GRID = [(m, n) for m in (1e-4, 0.03, 0.4, 0.98, 2.7, 12.0) for n in (-3.0, -1.0, 0.0, 0.7, 3.0)]


def by_sum(log_mean, log_nu, x):
    """log p(x) in 30 digits, with lambda by bisection of the sum for the mean."""
    with mp.workdps(25):
        m, nu = mp.e ** mp.mpf(log_mean), mp.e ** mp.mpf(log_nu)
        powers = []

        def moments(theta):
            weight, total, first, second, rate, k = mp.mpf(1), mp.mpf(0), mp.mpf(0), mp.mpf(0), mp.e**theta, 0
            while weight > total * mp.mpf(10) ** -27 or k <= m:
                total, first, second = total + weight, first + k * weight, second + k * k * weight
                if k == len(powers):
                    powers.append(mp.mpf(k + 1) ** -nu)
                weight *= rate * powers[k]
                k += 1
            return total, first / total, second / total

        theta = mp.mpf(mean_guess(float(m), float(nu)))
        for _ in range(2):  # Newton's method from 12 digits
            _, mean, square = moments(theta)
            theta -= (mean - m) / (square - mean**2)
        assert abs(moments(theta)[1] / m - 1) < mp.mpf(10) ** -20
        return x * theta - nu * mp.loggamma(x + 1) - mp.log(moments(theta)[0])


def mean_guess(m, nu):
    return float(com_poisson_log_lambda(torch.tensor(math.log(m)).double(), torch.tensor(math.log(nu)).double()))


@pytest.mark.parametrize(("m", "log_nu"), GRID)
def test_log_mass_and_derivatives_are_those_of_direct_sums(m, log_nu):
    """To 1e-8 in float64 and 1e-4 in float32, relative to max(1, value); derivatives by differences of the sums."""
    log_mean = math.log(m)
    for x in (0, math.ceil(2 * m)):
        step = mp.mpf(10) ** -6
        value = by_sum(log_mean, log_nu, x)
        slopes = [
            (by_sum(log_mean + a, log_nu + b, x) - by_sum(log_mean - a, log_nu - b, x)) / (2 * step)
            for a, b in ((step, 0), (0, step))
        ]
        for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-4)):
            parameters = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in (log_mean, log_nu)]
            found = MeanConwayMaxwellPoisson(*parameters).log_prob(torch.tensor(float(x), dtype=dtype))
            found.backward()
            # the parameters as they are rounded
            exact = value if dtype == torch.float64 else by_sum(*(float(p.detach()) for p in parameters), x)
            assert float(abs(float(found.detach()) - exact)) <= tolerance * max(1, abs(float(exact)))
            for parameter, slope in zip(parameters, slopes, strict=True):
                # in float32 at a parameter that is rounded
                assert abs(float(parameter.grad) - float(slope)) <= tolerance * max(1, abs(float(slope)))


def test_compiled_loops_agree_with_operations_of_pytorch():
    log_mean, log_nu = torch.meshgrid(
        torch.linspace(-9, 6, 31).double(), torch.linspace(-3, 3, 13).double(), indexing="ij"
    )
    log_mean, log_nu = log_mean.flatten(), log_nu.flatten()
    for count in (torch.zeros_like(log_mean), (2 * log_mean.exp()).ceil()):
        pairs = zip(
            cpu.com_poisson_log_mass(count, log_mean, log_nu),
            reference.com_poisson_log_mass(count, log_mean, log_nu),
            strict=True,
        )
        for compiled, plain in pairs:
            assert float(((compiled - plain).abs() / plain.abs().clamp_min(1)).max()) < 1e-8


def test_second_derivatives():
    log_mean, log_nu = torch.linspace(-3, 2, 4).double(), torch.linspace(-2, 2, 4).double()
    inputs = log_mean.requires_grad_(), log_nu.requires_grad_()
    count = torch.arange(4.0).double()
    assert torch.autograd.gradgradcheck(lambda a, b: com_poisson_log_mass(count, a, b), inputs)
    assert torch.autograd.gradgradcheck(com_poisson_log_lambda, inputs)


@pytest.mark.parametrize("log_nu", [-2.0, 0.0, 2.0])
def test_samples_have_the_mean_and_the_variance(log_nu):
    """Within 4 standard errors, also where the rate is as small as e^-60."""
    d = MeanConwayMaxwellPoisson(torch.tensor([3e-4, 0.2, 1.5, 40.0]).log(), log_nu)
    x = d.sample((100_000,))
    error = (d.variance / len(x)).sqrt()
    assert ((x.mean(0) - d.mean).abs() < 4 * error).all()
    from_mean = (x - d.mean).square()
    assert ((from_mean.mean(0) - d.variance).abs() < 4 * from_mean.std(0) / math.sqrt(len(x))).all()
    k = torch.arange(400.0)[:, None]
    torch.testing.assert_close(d.log_prob(k).exp().sum(0), torch.ones(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(d.cdf(torch.tensor(2.0)), d.log_prob(k[:3]).exp().sum(0), atol=1e-6, rtol=1e-5)


def test_it_is_a_poisson_at_nu_1_and_a_bernoulli_at_large_nu():
    x, log_mean = torch.arange(6.0).double(), torch.tensor(-0.7).double()
    poisson = torch.distributions.Poisson(log_mean.exp()).log_prob(x)
    torch.testing.assert_close(MeanConwayMaxwellPoisson(log_mean, torch.zeros(()).double()).log_prob(x), poisson)
    small = torch.tensor(-3.0).double()
    bernoulli = torch.distributions.Bernoulli(small.exp()).log_prob(x[:2])
    found = MeanConwayMaxwellPoisson(small, torch.tensor(3.0).double()).log_prob(x[:2])
    torch.testing.assert_close(found, bernoulli, atol=1e-6, rtol=0)


def test_values_and_parameters_are_checked():
    with pytest.raises(ValueError, match="log_nu"):
        MeanConwayMaxwellPoisson(torch.tensor(0.0), torch.tensor(4.0), validate_args=True)
    d = MeanConwayMaxwellPoisson(torch.zeros(3), torch.tensor(1.0), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        d.log_prob(torch.tensor(0.5))
    assert d.expand((2, 3)).log_prob(torch.zeros(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("log_mean", [-math.inf, -701.0, 14.0, math.nan])
def test_means_without_log_masses_are_refused(log_mean):
    with pytest.raises(ValueError, match="log_mean"):
        MeanConwayMaxwellPoisson(torch.tensor(log_mean), 0.0)
    inside = MeanConwayMaxwellPoisson(torch.tensor([-700.0, 13.86]), 0.0)
    assert inside.log_prob(torch.tensor([1.0, 1e6])).isfinite().all() and inside.variance.isfinite().all()


def test_without_an_element():
    log_mean = torch.zeros(0, requires_grad=True)
    total = MeanConwayMaxwellPoisson(log_mean, 0.5).log_prob(torch.zeros(0)).sum()
    (slope,) = torch.autograd.grad(total, log_mean, create_graph=True)
    assert slope.shape == (0,)
