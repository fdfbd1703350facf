"""Parameters out of range, too extreme, or at the ends of it: without validation they spoil no other element."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from torch.distributions import kl_divergence

from pyro_nbvae.distributions import (
    ArrivalTimes,
    ConwayMaxwellPoisson,
    GumbelSoftmax,
    Integer,
    NegativeBinomial,
    RelaxedNegativeBinomial,
    RelaxedPoisson,
)
from pyro_nbvae.infer import RelaxReparam

OFF = {"validate_args": False}
FAMILIES = {
    "negative binomial": lambda a, b, **o: RelaxedNegativeBinomial(a, logits=b, **OFF, **o),
    "negative binomial of probs": lambda a, b, **o: RelaxedNegativeBinomial(a, probs=b, **OFF, **o),
    "poisson": lambda a, b, **o: RelaxedPoisson(a, **OFF, **o),
    "com-poisson": lambda a, b, **o: ConwayMaxwellPoisson(a, b, **OFF, **o),
}
GOOD = {
    "negative binomial": (2.0, 0.5),
    "negative binomial of probs": (2.0, 0.3),
    "poisson": (2.0, 0.0),
    "com-poisson": (2.0, 0.7),
}
NAN, INF = math.nan, math.inf
# out of range; those after them are only too extreme
BAD = {
    "negative binomial": [(-1.0, 0.5), (NAN, 0.5), (2.0, NAN), (INF, 0.5), (-INF, 0.5)],
    "negative binomial of probs": [(-1.0, 0.3), (2.0, -0.2), (2.0, 1.3), (2.0, NAN)],
    "poisson": [(-1.0, 0.0), (NAN, 0.0), (-INF, 0.0)],
    "com-poisson": [(-1.0, 0.7), (2.0, -0.5), (2.0, 0.0), (NAN, 1.0), (2.0, NAN), (INF, 1.0), (2.0, INF)],
}
EXTREME = {
    "negative binomial": [(1e30, 0.5), (2.0, 80.0), (2.0, INF), (1e-30, 0.5), (2.0, -200.0)],
    "negative binomial of probs": [(2.0, 1.0), (1e30, 0.3)],
    "poisson": [(INF, 0.0), (1e30, 0.0), (1e-40, 0.0)],
    "com-poisson": [(1e30, 1.0), (3.0, 1e-12), (1e-30, 0.5), (3.0, 1e20), (1e14, 1e-3), (1e20, 1e13), (1e38, 1e38)],
}
COUNTS = torch.tensor(3.0)
OTHERS = {
    "negative binomial": NegativeBinomial(1.5, logits=0.2, **OFF),
    "poisson": RelaxedPoisson(1.5, **OFF),
    "com-poisson": ConwayMaxwellPoisson(1.5, 0.8, **OFF),
}
QUANTITIES = {
    "log_prob": lambda d: d.log_prob(COUNTS),
    "mean": lambda d: d.mean,
    "variance": lambda d: d.variance,
    "mode": lambda d: d.mode,
    "entropy": lambda d: d.entropy(),
    "cdf": lambda d: d.cdf(COUNTS),
    **{f"KL to {name}": lambda d, p=p: kl_divergence(d, p) for name, p in OTHERS.items()},
    **{f"KL from {name}": lambda d, p=p: kl_divergence(p, d) for name, p in OTHERS.items()},
}
RELAXATIONS = [Integer(), ArrivalTimes(0.3), GumbelSoftmax(0.5)]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
families = pytest.mark.parametrize("family", FAMILIES)


def beside(family, pair, dtype):
    """Parameters of three elements, of which the middle one is this pair, as leaves."""
    good = GOOD[family]
    return [torch.tensor([g, p, g], dtype=dtype, requires_grad=True) for g, p in zip(good, pair, strict=True)]


@dtypes
@pytest.mark.parametrize("quantity", QUANTITIES)
@families
def test_a_bad_element_is_nan_or_minus_infinity_and_no_other_changes(family, quantity, dtype):
    f = QUANTITIES[quantity]
    expected = f(FAMILIES[family](*(torch.tensor([g] * 3, dtype=dtype) for g in GOOD[family])))
    for pair in BAD[family] + EXTREME[family]:
        leaves = beside(family, pair, dtype)
        value = f(FAMILIES[family](*leaves))
        torch.testing.assert_close(value[::2], expected[::2].to(value.dtype))
        if pair in BAD[family]:
            assert value[1].isnan() or value[1] == -INF, (pair, value)
        if value.requires_grad:
            for g in torch.autograd.grad(value.sum(), leaves, allow_unused=True):
                assert g is None or g[::2].isfinite().all(), (pair, g)


@dtypes
@families
def test_a_bad_element_is_drawn_as_nan_alone(family, dtype):
    for relaxation in RELAXATIONS[: 1 if family == "com-poisson" else 3]:
        for pair in BAD[family] + EXTREME[family]:
            leaves = beside(family, pair, dtype)
            d = FAMILIES[family](*leaves, relaxation=relaxation)
            z = d.rsample()
            assert z[::2].isfinite().all() and (z[::2] >= 0).all()
            if pair in BAD[family]:
                assert z[1].isnan(), (relaxation, pair, z)
            for g in torch.autograd.grad(z.sum(), leaves, allow_unused=True):
                assert g is None or g[::2].isfinite().all()
            exact = FAMILIES[family](*(p.detach() for p in leaves)).sample()
            assert exact[::2].isfinite().all() and (pair in EXTREME[family] or exact[1].isnan()), (pair, exact)


# --- counts that are surely 0 ---------------------------------------------------------------------------------------

ZERO = {
    "negative binomial": [(0.0, 0.5), (2.0, -INF), (0.0, -INF)],
    "negative binomial of probs": [(0.0, 0.3), (2.0, 0.0)],
    "poisson": [(0.0, 0.0)],
    "com-poisson": [(0.0, 0.7), (0.0, 2.0)],
}


@dtypes
@families
def test_a_rate_of_zero_draws_zero_with_a_finite_gradient(family, dtype):
    for pair in ZERO[family]:
        leaves = beside(family, pair, dtype)
        for relaxation in RELAXATIONS[: 1 if family == "com-poisson" else 3]:
            z = FAMILIES[family](*leaves, relaxation=relaxation).rsample(torch.Size([50]))
            assert (z[:, 1] == 0).all() and z[:, ::2].any()
            for g in torch.autograd.grad(z.sum(), leaves, allow_unused=True):
                assert g is None or g.isfinite().all(), (relaxation, pair, g)
        d = FAMILIES[family](*(p.detach() for p in leaves))
        assert (d.sample(torch.Size([50]))[:, 1] == 0).all()
        for moment in (d.mean, d.variance, d.mode, d.entropy()):
            assert float(moment[1]) == pytest.approx(0, abs=1e-30)
        assert float(d.log_prob(torch.tensor(0.0))[1]) == pytest.approx(0, abs=1e-6)
        assert float(d.log_prob(torch.tensor(2.0))[1]) < -10
        assert float(d.cdf(torch.tensor(0.0))[1]) == 1
        for other in OTHERS.values():
            assert float(kl_divergence(d, other)[1]) == pytest.approx(
                -float(other.log_prob(torch.tensor(0.0))), rel=1e-4
            )


@pytest.mark.parametrize("zero", [torch.tensor(0.0), torch.tensor([0.0, 2.0])])
def test_zero_rates_are_valid(zero):
    """With validation on, as in torch."""
    for d in (
        RelaxedPoisson(zero, validate_args=True),
        NegativeBinomial(zero, logits=0.0, validate_args=True),
        ConwayMaxwellPoisson(zero, 1.0, validate_args=True),
    ):
        assert (d.sample(torch.Size([20])).reshape(20, -1)[:, 0] == 0).all()


@pytest.mark.parametrize("family", ["poisson", "com-poisson"])
def test_chains_of_exact_counts_train(family):
    """By the score function: the gradient of log q - log p is finite where a rate is 0."""
    scale = torch.tensor(0.9, requires_grad=True)

    def chain(scale):
        def program():
            z = pyro.sample("z0", dist.Poisson(0.7))
            for k in range(1, 4):
                rate = scale * z
                z = pyro.sample(
                    f"z{k}", RelaxedPoisson(rate) if family == "poisson" else ConwayMaxwellPoisson(rate, 1.3)
                )

        return program

    zeros = 0
    for _ in range(40):
        trace = poutine.trace(chain(scale)).get_trace()
        zeros += trace.nodes["z1"]["value"] == 0
        (slope,) = torch.autograd.grad(trace.log_prob_sum(), scale)
        assert slope.isfinite()
    assert zeros > 5
    for q, p in ((0.0, 1.0), (0.0, 0.0)):
        kl = kl_divergence(RelaxedPoisson(scale * q), RelaxedPoisson(torch.tensor(p)))
        assert torch.autograd.grad(kl, scale)[0].isfinite()


def test_the_programs_validation_and_probabilities_are_kept_by_the_reparametriser():
    relax = RelaxReparam(Integer())

    def program(d):
        return poutine.reparam(lambda: pyro.sample("z", d), config={"z": relax})

    z = program(dist.Poisson(torch.tensor([-1.0, 2.0]), validate_args=False))()
    assert z[0].isnan() and z[1] >= 0
    assert (program(dist.NegativeBinomial(torch.tensor([1e8] * 5), probs=torch.tensor(0.0)))() == 0).all()


@pytest.mark.parametrize("relaxation", [*RELAXATIONS, None], ids=str)
@pytest.mark.parametrize("family", ["poisson", "negative binomial"])
def test_chains_of_counts(family, relaxation):
    """A count of 0 makes the next rate 0: the relaxed program draws what the exact one does, with finite gradients."""
    scale = torch.tensor(0.9, requires_grad=True)

    def program():
        z = pyro.sample("z0", dist.Poisson(1.0))
        for k in range(1, 6):
            rate = scale * z
            d = dist.Poisson(rate) if family == "poisson" else dist.NegativeBinomial(rate, logits=torch.tensor(0.0))
            z = pyro.sample(f"z{k}", d)
        return z

    relaxed = poutine.reparam(program, config={f"z{k}": RelaxReparam(relaxation) for k in range(6)})
    torch.manual_seed(0)
    ends = []
    for _ in range(60):
        z = relaxed()
        ends.append(float(z.detach()))
        if z.requires_grad:
            (slope,) = torch.autograd.grad(z, scale)
            assert slope.isfinite()
    exactly = relaxation is None or isinstance(relaxation, Integer)
    assert min(ends) >= 0 and (not exactly or min(ends) == 0) and max(ends) > 0


# --- torch's values at the ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("probs", [0.0, 1.0, 0.25])
@pytest.mark.parametrize("k", [0.0, 1.0, 7.0])
def test_probabilities_of_zero_and_one_are_torchs(probs, k):
    results = []
    for family in (torch.distributions.NegativeBinomial, NegativeBinomial):
        r, p = torch.tensor(2.0, requires_grad=True), torch.tensor(probs, requires_grad=True)
        value = family(r, probs=p, validate_args=False).log_prob(torch.tensor(k))
        results.append([value.detach(), *torch.autograd.grad(value, (r, p))])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("logits", [-INF, INF])
@pytest.mark.parametrize("k", [0.0, 1.0, 7.0])
def test_infinite_logits_are_torchs_or_their_limit(logits, k):
    """torch's value is nan at -inf and count 0, where the limit is 0."""
    r, x = torch.tensor(2.0, requires_grad=True), torch.tensor(logits, requires_grad=True)
    theirs = torch.distributions.NegativeBinomial(2.0, logits=x.detach(), validate_args=False).log_prob(torch.tensor(k))
    value = NegativeBinomial(r, logits=x, validate_args=True).log_prob(torch.tensor(k))
    assert float(value.detach()) == (0.0 if theirs.isnan() else float(theirs))
    if value == 0:
        assert all(g.isfinite() for g in torch.autograd.grad(value, (r, x)))


# --- draws without a limit on their sum -----------------------------------------------------------------------------


@pytest.mark.parametrize("relaxation", [None, Integer()])
def test_the_sum_of_many_large_rates_has_no_limit(relaxation):
    z = RelaxedPoisson(torch.tensor(1e6), relaxation=relaxation).sample(torch.Size([20_000]))
    assert abs(float(z.mean()) - 1e6) < 5 * 1e3 / 20_000**0.5


def test_arrivals_may_be_more_than_fit_at_once():
    z = RelaxedPoisson(torch.tensor(4e6), relaxation=ArrivalTimes(0.01)).sample(torch.Size([60]))
    assert abs(float(z.mean()) - 4e6) < 5 * 2e3 / 60**0.5


# --- inference ------------------------------------------------------------------------------------------------------

X = torch.linspace(-1, 1, 20)
Y = torch.tensor([0.0, 1, 1, 0, 2, 1, 0, 3, 2, 1, 2, 4, 1, 3, 3, 5, 2, 6, 4, 5])
REGRESSIONS = {
    "com-poisson": lambda rate: ConwayMaxwellPoisson(rate, 1.5),
    "negative binomial": lambda rate: NegativeBinomial(4.0, logits=(rate / 4).log()),
    "poisson": lambda rate: RelaxedPoisson(rate),
}


@pytest.mark.parametrize("family", REGRESSIONS)
def test_posteriors_of_regressions_agree_with_quadrature(family):
    """Mean and variance of intercept and slope, from NUTS that starts far off, within 5 Monte Carlo standard errors."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(X)):
            pyro.sample("y", REGRESSIONS[family]((a + b * X).exp()), obs=Y)

    grid = torch.linspace(-1.5, 2.5, 121, dtype=torch.float64)
    a, b = torch.meshgrid(grid, grid, indexing="ij")
    with pyro.validation_enabled(False):
        like = REGRESSIONS[family]((a[..., None] + b[..., None] * X.double()).exp()).log_prob(Y.double()).sum(-1)
    weight = torch.softmax((like - (a.square() + b.square()) / 18).flatten(), 0).reshape(a.shape)
    pyro.set_rng_seed(1)
    chain = MCMC(
        NUTS(model),
        num_samples=150,
        warmup_steps=100,
        disable_progbar=True,
        initial_params={"a": torch.tensor(4.0), "b": torch.tensor(5.0)},
    )
    chain.run()
    draws = chain.get_samples()
    for name, of_grid in (("a", a), ("b", b)):
        mean = float((weight * of_grid).sum())
        variance = float((weight * (of_grid - mean) ** 2).sum())
        effective = float(chain.diagnostics()[name]["n_eff"])
        z = draws[name].double()
        assert abs(float(z.mean()) - mean) < 5 * (variance / effective) ** 0.5
        assert abs(float(z.var()) - variance) < 5 * variance * (2 / effective) ** 0.5
