"""Each compiled kernel against its reference: values, all derivatives, and nan where a parameter is not allowed."""

import functools
import math

import pytest
import torch

from benchmarks.measure import peak_bytes
from pyro_nbvae.distributions import negative_binomial_kl as kl
from pyro_nbvae.distributions.families import negative_binomial, poisson
from pyro_nbvae.distributions.kernels import cpu, find, reference
from pyro_nbvae.distributions.relaxations.gumbel_softmax import _window
from pyro_nbvae.distributions.windows import LogQOverP

NUMBER, SEED = 300, torch.tensor(20_260_101)
NAN, INF = math.nan, math.inf
generator = torch.Generator().manual_seed(2)


def uniform(low, high, *shape):
    return low + (high - low) * torch.rand(NUMBER, *shape, generator=generator, dtype=torch.float64)


R, R_P, RATE, NU = (uniform(-3, 5).exp(), uniform(-3, 5).exp(), uniform(-4, 5).exp(), uniform(-2, 3).exp())
COUNT = uniform(-1, 6).exp().round() + torch.where(uniform(0, 1) < 0.3, uniform(0, 1), 0.0)
LOGITS, LOGITS_P, TAU, U = uniform(-2, 2), uniform(-2, 2), uniform(0.05, 1.0), uniform(0.0, 1.0)
ROWS = torch.arange(NUMBER) % 7
PRIOR_R, PRIOR_LOGITS = torch.linspace(0.3, 9, 7, dtype=torch.float64), torch.linspace(-1, 1, 7, dtype=torch.float64)


def arrivals(indicator, hard):
    return lambda place, r, logits, tau: place.arrivals(SEED, tau, r, logits, indicator, hard)


def races(hard):
    return lambda place, a, tau: place.races(SEED, tau, a, *_window(a.exp(), tau), hard)


def com_poisson_kl_by_table(family, *arguments):
    def kernel(place, rate, nu):
        return place.com_poisson_kl_by_table(rate, nu, LogQOverP(family), list(arguments), ROWS[: len(rate)])

    return kernel


# a kernel as a function of tensors, these tensors, and values of each that are not allowed
BAD_R, BAD_RATE = (-1.0, NAN, INF), (-1.0, NAN, INF)
CASES = {
    **{
        f"arrivals, {indicator}, {'hard' if hard else 'soft'}": (
            arrivals(indicator, hard),
            (R, LOGITS, TAU),
            ((-1.0, NAN, 1e30), (NAN, 80.0), ()),
        )
        for indicator in reference.TAIL
        for hard in (False, True)
    },
    "arrivals of a Poisson": (
        lambda place, logits, tau: place.arrivals(SEED, tau, None, logits, "sigmoid", False),
        (RATE.log(), TAU),
        ((NAN, INF, 20.0), ()),
    ),
    "races, soft": (races(False), (RATE.log(), TAU), ((NAN, INF, 20.0), ())),
    "races, hard": (races(True), (RATE.log(), TAU), ((NAN, INF, 20.0), ())),
    "negative binomial integers": (
        lambda place, *own: place.negative_binomial_integers(*own),
        (R, LOGITS, U),
        ((-1.0, NAN, INF), (NAN, INF), ()),
    ),
    "COM-Poisson integers": (
        lambda place, *own: place.com_poisson_integers(*own),
        (RATE, NU, U),
        (BAD_RATE, (-1.0, 0.0, NAN, INF), ()),
    ),
    **{
        f"COM-Poisson, {what}": (
            functools.partial(lambda name, place, *own: getattr(place, name)(*own), f"com_poisson_{what}"),
            (RATE, NU),
            (BAD_RATE, (-1.0, 0.0, NAN, INF)),
        )
        for what in ("mean", "variance", "entropy", "log_normalizer")
    },
    "negative binomial, log mass": (
        lambda place, *own: place.negative_binomial_log_mass(*own),
        (COUNT, R, LOGITS),
        ((NAN,), BAD_R, (NAN,)),
    ),
    "Poisson, log mass": (
        lambda place, *own: place.poisson_log_mass(*own),
        (COUNT, RATE),
        ((NAN,), (-1.0, NAN)),
    ),
    "negative binomial, entropy": (
        lambda place, *own: place.negative_binomial_entropy(*own),
        (R, LOGITS),
        ((-1.0, NAN, INF), (NAN, INF)),
    ),
    "COM-Poisson KL to a negative binomial": (
        lambda place, *own: place.com_poisson_kl(*own),
        (RATE, NU, R_P, LOGITS_P),
        (BAD_RATE, (-1.0, 0.0, NAN, INF), BAD_R, (NAN,)),
    ),
    "COM-Poisson KL by table, to a negative binomial": (
        com_poisson_kl_by_table(negative_binomial, PRIOR_R, PRIOR_LOGITS),
        (RATE, NU),
        (BAD_RATE, (-1.0, 0.0, NAN, INF)),
    ),
    "COM-Poisson KL by table, to a Poisson": (
        com_poisson_kl_by_table(poisson, PRIOR_R),
        (RATE, NU),
        (BAD_RATE, (-1.0, 0.0, NAN, INF)),
    ),
    "negative binomial KL": (
        lambda place, *own: place.negative_binomial_kl(*own),
        (R, LOGITS, R_P, LOGITS_P),
        (BAD_R, (NAN, INF), BAD_R, (NAN, INF)),
    ),
    "log q - log p": (
        lambda place, *own: place.negative_binomial_log_q_over_p(*own),
        (*uniform(0, 40, 3).unbind(1), R, LOGITS, R_P, LOGITS_P),
        ((), (), (), (-1.0, NAN), (NAN,), (-1.0, NAN), (NAN,)),
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@cases
@dtypes
def test_a_compiled_kernel_is_its_reference(case, dtype):
    kernel, arguments, _ = case
    own = [a.to(dtype) for a in arguments]
    tolerance = {torch.float64: 1e-7, torch.float32: 2e-4}[dtype]
    ours, theirs = kernel(cpu, *own), kernel(reference, *(a.double() for a in own))
    assert all(x.dtype == dtype for x in ours)
    torch.testing.assert_close([x.double() for x in ours], theirs, rtol=tolerance, atol=tolerance)


def one_by_one(*arguments):
    """Every combination, as flat tensors."""
    return [t.reshape(-1) for t in torch.meshgrid(*(torch.tensor(a).double() for a in arguments), indexing="ij")]


EXTREME_R, EXTREME_LOGITS = (1e-20, 1e-3, 7.9, 8.1, 1e6), (-30.0, -3.0, 0.5, 30.0)
EXTREMES = {
    **{
        f"com_poisson_{what}": one_by_one((1e-20, 0.5, 3.5, 40.0, 1e3, 1e5), (math.exp(-3), 1.0, math.exp(3)))
        for what in ("mean", "variance", "entropy", "log_normalizer")
    },
    "negative_binomial_log_mass": one_by_one((0.0, 0.3, 7.0, 1e3, 1e5), EXTREME_R, (-1000.0, *EXTREME_LOGITS)),
    "poisson_log_mass": one_by_one((0.0, 0.3, 7.0, 4095.0, 4096.0, 1e7), (1e-20, 0.2, 4096.0, 1e7)),
    "com_poisson_kl": one_by_one(
        (1e-20, 0.5, 3.5, 40.0, 1e3, 1e5), (math.exp(-3), 1.0, math.exp(3)), EXTREME_R, EXTREME_LOGITS
    ),
    "com_poisson_integers": one_by_one((0.5, 3.5, 40.0, 1e5), (math.exp(-3), 1.0, math.exp(3)), (0.01, 0.7)),
    "negative_binomial_kl": one_by_one((1e-3, 1e6), (-13.0, -2.0, 7.0), (1e-3, 8.0, 1e6), (-13.0, 1.0, 7.0)),
    "negative_binomial_entropy": [
        torch.tensor(x).double() for x in zip(*((1e-3, 5.0), (0.05, 7.6), (1e6, -2.3), (1e6, -20.0)), strict=True)
    ],
}


@pytest.mark.parametrize("name", EXTREMES)
def test_a_compiled_kernel_is_its_reference_at_extremes(name):
    """Relative to the larger of the value and 1."""
    ours, theirs = (torch.stack(getattr(place, name)(*EXTREMES[name])) for place in (cpu, reference))
    scale = torch.maximum(theirs[0].abs(), theirs.abs()).clamp(min=1)
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=1e-8)


@cases
@pytest.mark.parametrize("place", [cpu, reference], ids=["cpu", "reference"])
def test_a_parameter_that_is_not_allowed_is_nan_alone(place, case):
    kernel, arguments, bad = case
    good = kernel(place, *(a[:3] for a in arguments))
    for i, values in enumerate(bad):
        for value in values:
            own = [a[:3].clone() for a in arguments]
            own[i][1] = value
            found = kernel(place, *own)
            assert all(x[1].isnan().all() for x in found[:1]), (i, value, found)
            for one, other in zip(found, good, strict=True):
                torch.testing.assert_close(one[::2], other[::2])


@cases
def test_no_elements(case):
    kernel, arguments, _ = case
    for place in (cpu, reference):
        assert all(len(x) == 0 for x in kernel(place, *(a[:0] for a in arguments)))


def test_the_fastest_kernel_is_chosen():
    assert find("races", torch.ones(3)) is cpu.races
    assert find("races", torch.ones(3, dtype=torch.float16)) is reference.races
    assert find("negative_binomial_kl", torch.ones(3, device="meta").double()) is reference.negative_binomial_kl


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory is measured on the CPU")
@pytest.mark.parametrize("order", [0, 2])
def test_the_memory_of_a_kl_in_units_of_its_output(order):
    """What 20,000 more elements take, by the reference's operations and for second derivatives: no nodes are kept."""

    def peak(number):
        own = [torch.linspace(*ends, number).double() for ends in ((0.5, 3), (-1, 1), (2, 4), (0, 1))]

        def run():
            if order == 0:
                return reference.negative_binomial_kl(*own)
            leaves = [x.clone().requires_grad_() for x in own]
            first = torch.autograd.grad(kl(*leaves).sum(), leaves, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

        return peak_bytes(run)

    assert peak(40_000) - peak(20_000) < 50 * 20_000 * 8


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("com_poisson_kl", (1e5, 1.0, 3.0, math.log(3e4))),
        ("com_poisson_kl", (20.0, math.exp(-3), 1e6, math.log(2e-5))),
        ("com_poisson_kl", (20.0, math.exp(3), 1e12, math.log(3e-11))),
        ("com_poisson_kl", (0.01, math.exp(3), 1e-3, math.log(10.0))),
        ("com_poisson_mean", (1e5, 0.5)),
        ("com_poisson_variance", (1e5, 2.0)),
        ("com_poisson_entropy", (1e5, 1.0)),
        ("negative_binomial_entropy", (1e-3, math.log(1e3))),
        ("negative_binomial_entropy", (1e6, math.log(1e-1))),
    ],
)
def test_extreme_parameters(name, arguments):
    own = [torch.full((2,), x, dtype=torch.float64) for x in arguments]
    ours, theirs = (getattr(place, name)(*own) for place in (cpu, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)
