"""Run by test_gpu.py with TRITON_INTERPRET=1: a GPU's kernels against their reference, or the textbook on their noise.

python -m tests.distributions.gpu_on_cpu    with TRITON_INTERPRET=1: the largest errors, kernel by kernel
"""

import functools
import inspect
import math
import os

import pytest
import torch
import triton
import triton.language as tl

from pyro_nbvae.distributions.kernels import gpu, reference
from pyro_nbvae.distributions.kernels.reference import TAIL
from pyro_nbvae.distributions.relaxations.gumbel_softmax import _window
from tests.distributions import by_textbook

NAN, INF, SEED = math.nan, math.inf, torch.tensor(271_828_182_845)
generator = torch.Generator().manual_seed(5)


def spread(low, high, number=1500):
    """Numbers whose logs are uniform, the ends among them."""
    log = math.log(low) + math.log(high / low) * torch.rand(number, generator=generator)
    log[0], log[1] = math.log(low), math.log(high)
    return log.exp()


# all of the range by make attack: the interpreter takes as long as the widest window of counts
LARGEST, LEAST, HUGE, WIDE = (100, 0.05, 1e5, 4.0) if os.environ.get("NBVAE_ATTACK") == "all" else (30, 0.15, 1e3, 2.0)
MEAN, NU, U = spread(1e-3, LARGEST), spread(LEAST, 50), torch.rand(1500, generator=generator)
R, R_P, MEAN_P = spread(LEAST, 50), spread(LEAST, 50).flip(0), spread(1e-3, LARGEST).flip(0)
LOGITS, LOGITS_P = (MEAN / R).log(), (MEAN_P / R_P).log()
# the inversion goes through as many counts as the widest of them has
SHORT = LOGITS.clamp(max=WIDE)
COUNTS = torch.rand(3, 1500, generator=generator).mul(60)
NOT_A_RATE, NOT_A_NU, NOT_AN_R, NOT_LOGITS = (-1.0, NAN, INF), (-1.0, 0.0, NAN, INF), (-1.0, NAN, INF), (NAN, INF)
# the arguments of a kernel, values of each that are not allowed, and the tolerance of value and derivatives relative to
# max(1, value)
CASES = {
    "com_poisson_mean": ((MEAN, NU), (NOT_A_RATE, NOT_A_NU), 1e-4),
    "com_poisson_variance": ((MEAN, NU), (NOT_A_RATE, NOT_A_NU), 1e-4),
    "com_poisson_entropy": ((MEAN, NU), (NOT_A_RATE, NOT_A_NU), 1e-4),
    "com_poisson_kl": ((MEAN, NU, R_P, LOGITS_P), (NOT_A_RATE, NOT_A_NU, NOT_AN_R, (NAN,)), 1e-4),
    "com_poisson_integers": ((MEAN, NU, U), (NOT_A_RATE, NOT_A_NU, (NAN,)), 1e-4),
    "negative_binomial_integers": ((R, SHORT, U), (NOT_AN_R, NOT_LOGITS, (NAN,)), 1e-4),
    "negative_binomial_entropy": ((R, SHORT), (NOT_AN_R, NOT_LOGITS), 1e-4),
    "negative_binomial_kl": ((R, LOGITS, R_P, LOGITS_P), (NOT_AN_R, NOT_LOGITS, NOT_AN_R, NOT_LOGITS), 1e-5),
    "shared_dispersion_kl": ((R, LOGITS, LOGITS_P), (NOT_AN_R, NOT_LOGITS, NOT_LOGITS), 1e-5),
    "poisson_kl": ((MEAN, MEAN_P), ((-1.0, NAN), (-1.0, NAN)), 1e-5),
    "negative_binomial_log_q_over_p": (
        (*COUNTS, R, LOGITS, R_P, LOGITS_P),
        ((), (), (), NOT_AN_R, (NAN,), NOT_AN_R, (NAN,)),
        1e-5,
    ),
    "negative_binomial_log_mass": ((COUNTS[0], R, LOGITS), ((NAN,), NOT_AN_R, (NAN,)), 1e-4),
    "poisson_log_mass": ((COUNTS[0], MEAN), ((NAN,), (-1.0, NAN)), 1e-4),
}
EXTREME = {
    "com_poisson_kl": (HUGE, 8.0, 3.0, math.log(0.3 * HUGE)),
    "com_poisson_integers": (HUGE, 8.0, 0.3),
    "negative_binomial_integers": (100 * HUGE, math.log(0.01), 0.3),
    "negative_binomial_kl": (1e4, math.log(10.0), 2e3, math.log(40.0)),
    "shared_dispersion_kl": (1e4, math.log(10.0), math.log(12.0)),
    "poisson_kl": (1e5, 1.001e5),
    "negative_binomial_log_q_over_p": (1e5, 1e4, math.log(10.0), 2e3, math.log(40.0)),
    "negative_binomial_log_mass": (1e5, 1e4, math.log(10.5)),
    "poisson_log_mass": (1e5, 1.001e5),
}
kernels = pytest.mark.parametrize("name", CASES)
# one program for all elements: the interpreter takes as long for many lanes as for one
LANES = 4096


@pytest.fixture(autouse=True)
def lanes(monkeypatch):
    monkeypatch.setattr(gpu, "SIZE", LANES)


def errors(name, arguments):
    """The largest errors of value and derivatives relative to max(1, value), and the values."""
    found = getattr(gpu, name)(*arguments)
    exact = getattr(reference, name)(*(a.double().reshape(-1) for a in arguments))
    assert len(found) == len(exact)
    exact = [e.reshape(f.shape) for e, f in zip(exact, found, strict=True)]
    kept = torch.ones_like(found[0], dtype=torch.bool)
    if name.endswith("integers"):  # noise at the edge of two counts may give either
        kept = found[0] == exact[0]
        assert kept.float().mean() > 0.99
        assert ((found[0] - exact[0]).abs() <= 1).all()
    both = zip(found, exact, strict=True)
    return [float(((f.double() - e)[kept] / e[kept].abs().clamp(min=1)).abs().max()) for f, e in both]


@kernels
def test_a_kernel_is_its_reference(name):
    arguments, _, tolerance = CASES[name]
    assert max(errors(name, arguments)) < tolerance


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_parameters(name):
    arguments = [torch.full((2,), float(x)) for x in EXTREME[name]]
    assert max(errors(name, arguments)) < 2e-3


def test_log_masses_where_the_mean_underflows_or_overflows():
    arguments = [torch.tensor(x) for x in ((5, 2.0**24, 5, 0), (1e-12, 1e-6, 1, 1), (-60.0, -60, -90, 90))]
    assert max(errors("negative_binomial_log_mass", arguments)) < 1e-5


@kernels
def test_a_parameter_that_is_not_allowed_is_nan_alone(name):
    arguments, bad, _ = CASES[name]
    few = [a[2:11].clamp(max=1.0) for a in arguments]  # narrow windows
    good = getattr(gpu, name)(*few)
    for i, values in enumerate(bad):
        own = [a.clone() for a in few]
        own[i][1 : 2 * len(values) : 2] = torch.tensor(values)
        found = getattr(gpu, name)(*own)
        spoilt = own[i] != few[i]
        assert torch.equal(found[0].isnan(), spoilt), (i, found)
        for one, other in zip(found, good, strict=True):
            torch.testing.assert_close(one[~spoilt], other[~spoilt])


def test_points_at_0():
    """Where every count is 0, for q, for p and for both."""
    zero, one = torch.zeros(1), torch.ones(1)
    for found in (
        gpu.com_poisson_integers(zero, one, one / 2),
        gpu.com_poisson_mean(zero, one),
        gpu.com_poisson_variance(zero, one),
        gpu.com_poisson_entropy(zero, one),
    ):
        assert all((x == 0).all() for x in found)
    for first, second, value in ((zero, one, 0), (one, zero - INF, 0)):
        assert gpu.negative_binomial_integers(first, second, one / 2)[0] == value
        assert gpu.negative_binomial_entropy(first, second)[0] == 0
    log_2 = math.log(2)
    kl, d_rate, d_nu, d_r, d_l = gpu.com_poisson_kl(zero, one, 3 * one, zero)
    assert [float(x) for x in (kl, d_rate, d_nu, d_r, d_l)] == pytest.approx([3 * log_2, 0, 0, log_2, 1.5])
    assert gpu.com_poisson_kl(one, one, zero, zero)[0] == INF
    assert gpu.com_poisson_kl(zero, one, zero, zero)[0] == 0
    points = torch.tensor([[0.0, 1.0, 2.0, 1.0, 0.0], [0.0, -INF, 0.0, 0.5, 0.3], [2.0, 3.0, 0.0, 2.0, 0.0], [0.1] * 5])
    for name, arguments in (
        ("negative_binomial_kl", points),
        ("shared_dispersion_kl", points[[0, 1, 3]]),
        ("poisson_kl", points[[0, 2]]),
    ):
        found, exact = getattr(gpu, name)(*arguments), getattr(reference, name)(*arguments)
        torch.testing.assert_close(found, [e.float() for e in exact], rtol=1e-5, atol=1e-6)


def test_units_that_share_their_parameters(monkeypatch):
    """Parameters of a shape that is expanded, more observations than a program has lanes, and several dimensions."""
    monkeypatch.setattr(gpu, "SIZE", 8)
    rate, nu = MEAN[:60].clamp(max=4).reshape(2, 10, 3), NU[:60].clamp(min=1).reshape(2, 10, 3)
    r, logits = R_P[:3].expand(2, 10, 3), LOGITS_P[:3].expand(2, 10, 3)
    assert gpu.layout(rate.shape) == (20, 3)
    assert max(errors("com_poisson_kl", [rate, nu, r, logits])) < 2e-4
    assert max(errors("com_poisson_kl", [x.transpose(0, 1) for x in (rate, nu, r, logits)])) < 2e-4
    assert all(x.shape == (0, 3) for x in gpu.poisson_kl(rate[0, :0], rate[0, :0]))


# --- relaxed counts: on the kernel's own noise ----------------------------------------------------------------------


@triton.jit
def _draw(seed, out, n, ROWS: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    for k in range(ROWS):
        tl.store(out + k * n + i, gpu._exponential(tl.load(seed), i.to(tl.int64), (i * 0 + k).to(tl.int64)), mask=i < n)


@functools.cache
def noise(rows, n):
    """The unit exponentials that the kernels draw with this seed, (rows, n)."""
    out = torch.empty(rows, n)
    _draw[(1,)](SEED, out, n, ROWS=rows, SIZE=triton.next_power_of_2(n))
    return out.double()


arrivals = functools.partial(gpu.arrivals, SEED)
races = functools.partial(gpu.races, SEED)


@pytest.mark.parametrize("poisson", [False, True])
@pytest.mark.parametrize("indicator", TAIL)
@pytest.mark.parametrize("hard", [False, True])
def test_arrivals(poisson, indicator, hard):
    by_textbook.arrivals(arrivals, noise, poisson, indicator, varied=hard, hard=hard, largest=LARGEST)


@pytest.mark.parametrize("hard", [False, True])
def test_races(hard):
    by_textbook.races(races, noise, varied=hard, hard=hard)


def test_relaxed_counts_that_are_not_allowed_are_nan_alone():
    tau = torch.full((), 0.5)
    for hard in (False, True):
        a = torch.tensor([0.0, NAN, INF, 17.0, -INF, -200.0])
        z, slope = races(tau, a, *_window(a.exp(), tau), hard)
        assert z[0].isfinite() and z[1:4].isnan().all() and slope[1:4].isnan().all()
        assert (z[4:] == 0).all() and (slope[4:] == 0).all()
        for r in (None, torch.tensor([2.0, -1.0, NAN, 1.0, 0.0, 1.0])):
            found = arrivals(tau, r, torch.tensor([0.0, NAN, INF, 17.0, -INF, -INF]), "sigmoid", hard)
            assert all(x[0].isfinite() and x[1:4].isnan().all() and (x[4:] == 0).all() for x in found)
    for bad in (0.0, -1.0, NAN):
        assert arrivals(torch.full((), bad), None, torch.zeros(1), "sigmoid", False)[0].isnan()


def test_the_noise_is_that_of_unit_exponentials_and_of_each_seed_its_own():
    drawn = noise(100, 100).flatten()
    error = drawn.numel() ** -0.5
    assert abs(drawn.mean() - 1) < 5 * error
    assert abs(drawn.square().mean() - 2) < 5 * error * 20**0.5
    other = torch.empty(100, 100)
    _draw[(1,)](SEED + 1, other, 100, ROWS=100, SIZE=128)
    assert torch.isclose(other.double().flatten(), drawn).float().mean() < 1e-3


def test_every_kernel_is_tested():
    public = {n for n, f in inspect.getmembers(gpu, inspect.isfunction) if f.__module__ == gpu.__name__ and n[0] != "_"}
    assert public - {"layout", "launch"} == set(CASES) | {"arrivals", "races"}


if __name__ == "__main__":
    gpu.SIZE = LANES
    for name, (arguments, _, _) in CASES.items():
        print(f"{name:32}", *(f"{e:.0e}" for e in errors(name, arguments)))
