"""KL divergences against direct summation, finite differences, the chain rule and mpmath."""

import math

import mpmath
import numpy as np
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Gamma, kl_divergence

from pyro_nbvae.distributions import (
    ArrivalTimes,
    NegativeBinomial,
    RelaxedNegativeBinomial,
    RelaxedPoisson,
    kl_form,
    negative_binomial_kl,
    poisson_kl,
    shared_dispersion_kl,
)
from pyro_nbvae.distributions.divergences import negative_binomial_log_q_over_p
from pyro_nbvae.distributions.families.negative_binomial import log_prob as negative_binomial_log_prob
from pyro_nbvae.distributions.kernels import cpu, reference
from pyro_nbvae.models import NegativeBinomialModel


def parameters(number, dtype, shared=False, seed=4):
    """r from 0.05 to 300, dispersion ratio up to e^2 either way, means from 1e-3 to 50: (r_q, l_q, r_p, l_p)."""
    rng = np.random.default_rng(seed)
    r_q = np.exp(rng.uniform(np.log(0.05), np.log(300), number))
    r_p = r_q if shared else np.clip(r_q * np.exp(rng.uniform(-2, 2, number)), 0.05, 300)
    mean_q, mean_p = np.exp(rng.uniform(np.log(1e-3), np.log(50), (2, number)))
    return tuple(torch.tensor(a, dtype=dtype) for a in (r_q, np.log(mean_q / r_q), r_p, np.log(mean_p / r_p)))


def kl_of(arguments, shared):
    r_q, l_q, r_p, l_p = arguments
    return shared_dispersion_kl(r_q, l_q, l_p) if shared else negative_binomial_kl(r_q, l_q, r_p, l_p)


def summed(r_q, l_q, r_p, l_p):
    """sum_z q(z) (log q(z) - log p(z)) in float64, to the point where q has no mass left."""
    arguments = [a.double() for a in (r_q, l_q, r_p, l_p)]
    mean, odds = arguments[0] * arguments[1].exp(), arguments[1].exp()
    # beyond the mean the tail falls about as fast as sigma(l)^z
    top, order = (mean + 12 * torch.sqrt(mean * (1 + odds)) + 40 * (1 + odds)).sort()
    total = torch.empty_like(mean)
    for where, last in zip(order.split(20), top.split(20), strict=True):
        rq, lq, rp, lp = (a[where] for a in arguments)
        z = torch.arange(math.ceil(float(last[-1])), dtype=torch.float64)[:, None]
        log_q = NegativeBinomial(rq, logits=lq).log_prob(z)
        total[where] = (log_q.exp() * (log_q - NegativeBinomial(rp, logits=lp).log_prob(z))).sum(0)
    return total


@pytest.mark.parametrize("shared", [False, True])
def test_kl_equals_direct_summation(shared):
    arguments = parameters(1000, torch.float64, shared)
    expected = summed(*arguments)
    got = kl_of(arguments, shared)
    assert ((got - expected).abs() <= 1e-5 * expected.clamp(min=1)).all()
    # and, as documented, much closer
    assert ((got - expected).abs() <= 1e-8 * expected.clamp(min=1)).all()


@pytest.mark.parametrize("shared", [False, True])
def test_kl_in_single_precision(shared):
    """1e-3 of max(KL, 0.05); 2e-5 of max(KL, 1), as documented."""
    arguments = parameters(1000, torch.float32, shared)
    expected = summed(*arguments)
    got = kl_of(arguments, shared).double()
    assert ((got - expected).abs() <= 1e-3 * expected.clamp(min=0.05)).all()
    assert ((got - expected).abs() <= 2e-5 * expected.clamp(min=1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exact", [True, False])
def test_kl_is_zero_where_q_is_p_and_not_negative_elsewhere(dtype, exact):
    r, logits, *_ = parameters(3000, dtype)
    assert (kl_of((r, logits, r.clone(), logits.clone()), shared=not exact) == 0).all()
    r_q, l_q, r_p, _ = parameters(3000, dtype, shared=not exact)
    close = l_q + 1e-3 * torch.randn_like(l_q)
    r_p = r_q * (1 + 1e-3 * torch.randn_like(r_q)) if exact else r_p
    kl = kl_of((r_q, l_q, r_p, close), shared=not exact)
    # rounding, and in the exact form the quadrature
    assert kl.min() > (-2e-5 if dtype is torch.float32 else -1e-9)


def test_gradients_equal_finite_differences():
    arguments = [a.requires_grad_() for a in parameters(60, torch.float64, seed=8)]
    assert torch.autograd.gradcheck(negative_binomial_kl, arguments, eps=1e-6, atol=1e-6, rtol=1e-5)
    r, l_q, _, l_p = arguments
    assert torch.autograd.gradcheck(
        shared_dispersion_kl,
        (r, l_q, l_p),
        eps=1e-6,
        atol=1e-6,
        rtol=1e-5,
    )


def test_second_derivatives_equal_finite_differences_of_the_first():
    arguments = [a.requires_grad_() for a in parameters(40, torch.float64, seed=9)]
    assert torch.autograd.gradgradcheck(negative_binomial_kl, arguments, atol=1e-5, rtol=1e-4)
    r, l_q, _, l_p = arguments
    assert torch.autograd.gradgradcheck(shared_dispersion_kl, (r, l_q, l_p), atol=1e-6, rtol=1e-5)
    m_q, m_p = r.detach().requires_grad_(), (r.detach() + 1).requires_grad_()
    assert torch.autograd.gradgradcheck(poisson_kl, (m_q, m_p))


@pytest.mark.parametrize("q_class", [NegativeBinomial, dist.NegativeBinomial, torch.distributions.NegativeBinomial])
@pytest.mark.parametrize("p_class", [NegativeBinomial, dist.NegativeBinomial, torch.distributions.NegativeBinomial])
def test_kl_between_our_classes_and_pyros_and_torchs(q_class, p_class):
    r_q, l_q, r_p, l_p = parameters(50, torch.float64)
    q, p = q_class(r_q, logits=l_q), p_class(r_p, logits=l_p)
    torch.testing.assert_close(kl_divergence(q, p), summed(r_q, l_q, r_p, l_p), rtol=1e-7, atol=1e-7)
    poisson = kl_divergence(RelaxedPoisson(r_q), torch.distributions.Poisson(r_p))
    torch.testing.assert_close(poisson, kl_divergence(dist.Poisson(r_q), RelaxedPoisson(r_p)))


def test_gradient_vanishes_where_q_is_p():
    """The KL is least there, and in r_q only the integral's derivative makes it so: it is not 0 by itself."""
    r, logits, *_ = parameters(500, torch.float64)
    q = [r.clone().requires_grad_(), logits.clone().requires_grad_()]
    for_r, for_logits = torch.autograd.grad(negative_binomial_kl(*q, r, logits).sum(), q)
    assert (for_r * r).abs().max() < 1e-7 and for_logits.abs().max() < 1e-7


def test_the_form_is_shared_only_where_the_dispersion_is_one_quantity():
    r, logits = torch.ones(3, requires_grad=True), torch.zeros(3)
    assert kl_form(NegativeBinomial(r, logits=logits), NegativeBinomial(r, logits=logits + 1)) == "shared"
    wide = NegativeBinomial(r, logits=logits.expand(5, 3))
    assert kl_form(wide, NegativeBinomial(r, logits=logits).expand(torch.Size([5, 3]))) == "shared"
    # equal by value alone, while one of them can move
    assert kl_form(NegativeBinomial(r, logits=logits), NegativeBinomial(torch.ones(3), logits=logits)) == "exact"
    assert kl_form(NegativeBinomial(r * 1.0, logits=logits), NegativeBinomial(r, logits=logits)) == "exact"
    # made twice from one parameter, which both name
    prior = NegativeBinomialModel((1, 8, 8), 3, decoder="linear").prior
    one, two = (
        NegativeBinomial(prior.total_count, logits=logits, dispersion_source=prior.log_total_count) for _ in range(2)
    )
    assert kl_form(one, two) == "shared" and kl_form(one, NegativeBinomial(prior.total_count, logits=0.0)) == "exact"


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_dispersion_that_is_copied_and_changes_in_place_is_two(dtype):
    """Whole numbers are copied, and so are floats if the logits are of another precision: not one quantity any more."""
    r, logits = torch.tensor([2, 2], dtype=dtype), torch.zeros(2, dtype=torch.float64)
    q = NegativeBinomial(r, logits=logits)
    kept = q.total_count.clone()
    r.fill_(9)
    p = NegativeBinomial(r, logits=logits)
    if not torch.equal(kept, q.total_count):  # not copied: both have the new value
        kept = r
    expected = negative_binomial_kl(kept.double(), logits, r.double(), logits)
    torch.testing.assert_close(kl_divergence(q, p).double(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", ["before and after", "frozen", "detached view", "two views"])
def test_one_parameter_at_two_times_or_with_two_gradients_is_not_one_quantity(case):
    """Value and gradients against negative_binomial_kl on copies."""
    prior, source = NegativeBinomialModel((1, 8, 8), 3, decoder="linear").prior, {}
    leaf = torch.full((3,), 2.0, requires_grad=True)
    logits = torch.tensor([0.3, -0.4, 0.0])
    if case in ("before and after", "frozen"):
        source = {"dispersion_source": prior.log_total_count}
        r_q = prior.total_count
        q = NegativeBinomial(r_q, logits=logits, **source)
        with torch.no_grad():
            if case == "before and after":
                prior.log_total_count.add_(1.0)
            r_p = prior.total_count
        r_p = prior.total_count if case == "before and after" else r_p
    elif case == "detached view":
        r_q = leaf
        with torch.no_grad():
            r_p = leaf[:]
    else:
        r_q, r_p = leaf.view_as(leaf), leaf.view_as(leaf)
    if not source:
        q = NegativeBinomial(r_q, logits=logits)
    got = kl_divergence(q, NegativeBinomial(r_p, logits=0.2, **source)).sum()
    copies = [r.detach().clone().requires_grad_() for r in (r_q, r_p)]
    expected = negative_binomial_kl(copies[0], logits, copies[1], torch.tensor(0.2)).sum()
    torch.testing.assert_close(got, expected)
    asked = [(r_q, copies[0])] + [(r_p, copies[1])] * (case in ("before and after", "two views"))
    torch.testing.assert_close(
        torch.autograd.grad(got, [r for r, _ in asked]), torch.autograd.grad(expected, [c for _, c in asked])
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_poisson_kl_keeps_its_digits_where_the_rates_are_close(dtype):
    rates = torch.tensor([[1000, 1008], [50, 49], [1e4, 1e4 + 8], [3, 3], [2, 2.25], [0.001, 7]], dtype=torch.float64)
    q, p = (column.to(dtype) for column in rates.T)
    pairs = [(mpmath.mpf(float(a)), mpmath.mpf(float(b))) for a, b in zip(q, p, strict=True)]
    expected = [a * mpmath.log(a / b) - (a - b) for a, b in pairs]
    torch.testing.assert_close(
        poisson_kl(q, p).double(),
        torch.tensor([float(e) for e in expected], dtype=torch.float64),
        rtol=32 * torch.finfo(dtype).eps,
        atol=1e-12,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_poisson_kl_where_the_quotient_of_the_rates_is_no_number(dtype):
    """Over- and underflow, a rate of 0, and Poissons of both packages."""
    tiny = torch.finfo(dtype).tiny
    for a, b in ((tiny, 1e8), (tiny / 8, 1e5), (1e20, 1e-25), (0.0, 3.0)):
        a, b = (torch.tensor(v, dtype=dtype) for v in (a, b))
        x, y = (mpmath.mpf(float(v)) for v in (a, b))
        expected = float((x * mpmath.log(x / y) if x else 0) - x + y)
        for q in (dist.Poisson(a), RelaxedPoisson(a, validate_args=False)):
            assert float(kl_divergence(q, RelaxedPoisson(b))) == pytest.approx(expected, rel=1e-6)


def test_where_values_agree_by_chance_the_gradient_is_still_exact():
    """The trap in choosing the form by value: at r_q = r_p the shared form's derivative in r_q is another one."""
    r_q = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    r_p, l_q, l_p = (torch.tensor(v, dtype=torch.float64) for v in (1.3, 0.8, 0.0))
    kl = kl_divergence(NegativeBinomial(r_q, logits=l_q), NegativeBinomial(r_p, logits=l_p))
    (gradient,) = torch.autograd.grad(kl, r_q)
    step = 1e-4
    up, down = (summed(*(t[None] for t in (r_p + s, l_q, r_p, l_p))) for s in (step, -step))
    assert float(gradient) == pytest.approx(float((up - down) / (2 * step)), abs=1e-6)


def test_registered_kl_is_elementwise_and_serves_relaxed_and_exact():
    r_q, l_q, r_p, l_p = parameters(12, torch.float64)
    expected = negative_binomial_kl(r_q, l_q, r_p, l_p)
    relaxed = (
        RelaxedNegativeBinomial(r_q, logits=l_q, relaxation=ArrivalTimes(0.3)),
        RelaxedNegativeBinomial(r_p, logits=l_p),
    )
    exact = NegativeBinomial(r_q, logits=l_q), NegativeBinomial(r_p, torch.sigmoid(l_p))
    for q in (relaxed[0], exact[0]):
        for p in (relaxed[1], exact[1]):
            torch.testing.assert_close(kl_divergence(q, p), expected)
    torch.testing.assert_close(kl_divergence(relaxed[0].to_event(1), relaxed[1].to_event(1)), expected.sum())


def test_chain_rule():
    """KL(NB) = KL(Gamma) - E_q KL(posterior Gamma of q given z || that of p given z), from integer samples."""
    r_q, l_q, r_p, l_p = (torch.tensor(v, dtype=torch.float64) for v in (0.7, 0.9, 2.2, -0.4))
    z = NegativeBinomial(r_q, logits=l_q).sample(torch.Size([100_000]))
    joint = kl_divergence(Gamma(r_q, torch.exp(-l_q)), Gamma(r_p, torch.exp(-l_p)))
    given = kl_divergence(Gamma(z + r_q, torch.exp(-l_q) + 1), Gamma(z + r_p, torch.exp(-l_p) + 1))
    estimate = joint - given
    error = float(estimate.std()) / math.sqrt(len(z))
    assert abs(float(estimate.mean() - negative_binomial_kl(r_q, l_q, r_p, l_p))) < 4 * error


def summed_derivatives(r_q, l_q, r_p, l_p):
    """Derivatives in log r_q and l_q by summation: E_q[(T - E[T]) (log q - log p)], T the score."""
    mean, odds = r_q * math.exp(l_q), math.exp(l_q)
    k = np.arange(math.ceil(mean + 60 * max(math.sqrt(mean * (1 + odds)), odds)) + 200.0)
    log_q, log_p = (scipy.stats.nbinom.logpmf(k, r, 1 / (1 + math.exp(x))) for r, x in ((r_q, l_q), (r_p, l_p)))
    q, ratio = np.exp(log_q), log_q - log_p
    of_r = r_q * (scipy.special.digamma(k + r_q) - scipy.special.digamma(r_q) - math.log1p(odds))
    of_l = k - (k + r_q) * odds / (1 + odds)
    return [float((q * (score - (q * score).sum()) * ratio).sum()) for score in (of_r, of_l)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("means", [(0.5, 50), (50, 1000), (1000, 1e4)])
def test_gradients_at_every_mean_equal_direct_summation(means, dtype):
    """For priors of r from 0.5 to 50 and all ratios a guide reaches; with create_graph the gradient is the same."""
    rng = np.random.default_rng(3)
    tolerance = {torch.float32: 1e-5 if means[1] <= 1000 else 1e-3, torch.float64: 5e-6}[dtype]
    for _ in range(25):
        r_p, m_q, m_p = np.exp(rng.uniform(np.log((0.5, *means[:1] * 2)), np.log((50, *means[1:] * 2))))
        r_q = max(r_p * math.exp(rng.uniform(-5, 5)), m_q / 2000)  # a smaller one has millions of counts to sum
        at = (r_q, math.log(m_q / r_q), r_p, math.log(m_p / r_p))
        arguments = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in at]
        kl = negative_binomial_kl(*arguments)
        expected = summed_derivatives(*at)
        for graph in (False, True):
            d_r, d_l, *_ = torch.autograd.grad(kl, arguments, create_graph=graph, retain_graph=True)
            for got, true in zip((r_q * float(d_r.detach()), float(d_l.detach())), expected, strict=True):
                assert abs(got - true) <= tolerance * max(1, abs(true)), (at, graph, got, true)


@pytest.mark.parametrize(
    "dtype, level, value, derivative",
    [
        (torch.float32, 0, 2e-6, 1e-5),
        (torch.float32, 1, 2e-5, 5e-4),
        (torch.float64, 0, 2e-8, 1e-7),
        (torch.float64, 1, 2e-6, 3e-5),
    ],
    ids=str,
)
def test_a_rule_agrees_with_the_finest_on_all_that_it_serves(dtype, level, value, derivative):
    """KL and derivatives in log r and l; half of the parameters are near the rule's limits."""
    rule, finest = reference.RULES[dtype][level], reference.RULES[dtype][-1]
    rng = np.random.default_rng(12)

    def within(limit, number=8000):
        ends = rng.choice([-limit, limit], number) * rng.uniform(0.95, 1, number)
        return np.where(rng.random(number) < 0.5, ends, rng.uniform(-limit, limit, number))

    log_r, log_m_q, log_m_p = (within(rule.log_range) for _ in range(3))
    log_ratio = within(rule.log_dispersion_ratio)
    r_q, r_p, m_q, m_p = (torch.tensor(np.exp(x)) for x in (log_r + log_ratio, log_r, log_m_q, log_m_p))
    at = r_q, (m_q / r_q).log(), r_p, (m_p / r_p).log()
    served = rule.serves(*at)
    assert served.sum() > 3000
    at = tuple(x[served] for x in at)
    tolerances = value, *[derivative] * 4
    scales = 1, at[0], 1, at[2], 1
    found = (reference.by_rule(each, *at) for each in (rule, finest))
    for got, best, scale, most in zip(*found, scales, tolerances, strict=True):
        assert ((got - best) * scale).abs().le(most * (best * scale).abs().clamp(min=1)).all()


EXTREMES = [
    (1e-5, 10.0, 1.0, 1.0),
    (1e4, 2.0, 2.0, 1.0),
    (0.148, 14.6, 0.0014, 12.3),
    (64220.0, 0.443, 1e-5, 23.0),
    (1000.0, 2.3, 0.01, 13.8),
    (20.0, 8.5, 0.2, 13.1),
]


@pytest.mark.parametrize("at", EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_that_can_be_differentiated_is_the_same_at_extremes(at, dtype):
    """Also under torch.func, where vmap hides the values that choose a rule; in log r and l."""
    arguments = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in at]
    kl = negative_binomial_kl(*arguments)
    plain, again = (torch.autograd.grad(kl, arguments, create_graph=g, retain_graph=True) for g in (False, True))
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(other.detach(), one, rtol=1e-3, atol=1e-3)
    plain = [g * scale for g, scale in zip(plain, (at[0], 1, at[2], 1), strict=True)]
    batch = [torch.tensor([v], dtype=dtype) for v in at]
    mapped = torch.func.vmap(torch.func.grad(negative_binomial_kl, argnums=(0, 1, 2, 3)))(*batch)
    for one, other, scale in zip(plain, mapped, (at[0], 1, at[2], 1), strict=True):
        torch.testing.assert_close(other[0] * scale, one, rtol=1e-3, atol=1e-3)


def test_infinite_dispersion_is_poisson():
    m_q, m_p = torch.tensor([0.1, 2.0, 30.0], dtype=torch.float64), torch.tensor([0.3, 1.0, 40.0], dtype=torch.float64)
    expected = kl_divergence(RelaxedPoisson(m_q), RelaxedPoisson(m_p))
    torch.testing.assert_close(expected, m_q * (m_q / m_p).log() - m_q + m_p)
    for r in (1e4, 1e6, 1e8):
        for ratio in (1.0, 3.0):
            r_q, r_p = torch.tensor(r, dtype=torch.float64), torch.tensor(r * ratio, dtype=torch.float64)
            got = negative_binomial_kl(r_q, (m_q / r_q).log(), r_p, (m_p / r_p).log())
            assert ((got - expected).abs() <= 1e3 * (1 + m_p) / r + 1e-9).all()
    assert (poisson_kl(m_q, m_q) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_far_outside_the_measured_range(dtype):
    r, logits = torch.logspace(-6, 8, 15, dtype=dtype), torch.linspace(-50, 50, 11, dtype=dtype)
    arguments = [a.reshape(-1).requires_grad_() for a in torch.meshgrid(r, logits, r, logits, indexing="ij")]
    kl = negative_binomial_kl(*arguments)
    assert kl.isfinite().all()
    for gradient in torch.autograd.grad(kl.sum(), arguments):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operations_equal_the_compiled_loop(dtype):
    """KL and derivatives; one element in eight is extreme, with r up to 1e5 or down to 1e-5."""
    arguments = parameters(400, dtype, seed=8)
    arguments[0][::16], arguments[2][::16] = 1e5, 7e4
    arguments[0][8::16] = 1e-5
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-8}[dtype]
    ours, theirs = cpu.negative_binomial_kl(*arguments), reference.negative_binomial_kl(*arguments)
    for one, other in zip(ours, theirs, strict=True):
        assert ((one - other).abs() <= tolerance * one.abs().clamp(min=1)).all()


@pytest.mark.parametrize("place", range(4))
def test_parameters_that_are_not_numbers(place):
    """Nothing that is not finite gives a finite KL, except a q that is all at 0."""
    p_at_zero = torch.tensor(-math.inf)
    assert negative_binomial_kl(*(torch.tensor(v) for v in (2.0, 0.5, 3.0)), p_at_zero) == math.inf
    for bad in (math.nan, math.inf, -math.inf):
        arguments = [torch.tensor(v, dtype=torch.float64) for v in (2.0, 0.5, 3.0, 0.1)]
        arguments[place].fill_(bad)
        kl = negative_binomial_kl(*arguments)
        at_zero = place == 1 and bad == -math.inf
        assert kl == (pytest.approx(3 * math.log1p(math.exp(0.1))) if at_zero else math.inf) or kl.isnan()


@pytest.mark.parametrize("l_p", [-1000.0, -100.0, -40.0, 40.0, 100.0])
def test_logits_far_apart(l_p):
    """With equal dispersions, against the closed form."""
    r, l_q, l_p = (torch.tensor(v, dtype=torch.float64) for v in (2.0, 0.5, l_p))
    torch.testing.assert_close(negative_binomial_kl(r, l_q, r.clone(), l_p), shared_dispersion_kl(r, l_q, l_p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_extreme_neighbour_changes_nothing(dtype):
    """An element that needs the finer rule gets it alone."""
    ordinary = [a.requires_grad_() for a in parameters(64, dtype)]
    extreme = [torch.tensor([v], dtype=dtype) for v in (20.0, 8.0, 20.0, 7.0)]

    def kl_and_gradients(*arguments):
        kl = negative_binomial_kl(*arguments)[:64]
        return kl.detach(), *torch.autograd.grad(kl.sum(), ordinary)

    alone = kl_and_gradients(*ordinary)
    beside = kl_and_gradients(*(torch.cat([a, b]) for a, b in zip(ordinary, extreme, strict=True)))
    for one, other in zip(alone, beside, strict=True):
        torch.testing.assert_close(other, one, rtol=16 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)


def test_error_bound_outside_the_measured_range():
    """1e-7 and 1e-4 of max(1, m_q, m_p), against mpmath's own integration (docs/mathematics.md, section 9)."""
    mpmath.mp.dps = 30
    rng = np.random.default_rng(11)
    r_q = np.exp(rng.uniform(np.log(1e-3), np.log(1e4), 16))
    r_p = np.clip(r_q * np.exp(rng.uniform(-5, 5, 16)), 1e-3, 1e4)
    m_q, m_p = np.exp(rng.uniform(np.log(1e-4), np.log(1e4), (2, 16)))
    double = tuple(torch.tensor(a) for a in (r_q, np.log(m_q / r_q), r_p, np.log(m_p / r_p)))
    scale = torch.tensor(np.maximum(1, np.maximum(m_q, m_p)))
    single = negative_binomial_kl(*(a.float() for a in double)).double()
    assert ((single - negative_binomial_kl(*double)).abs() <= 1e-4 * scale).all()
    for rq, rp, mq, mp in zip(*(a.tolist() for a in (r_q, r_p, m_q, m_p)), strict=True):
        got = float(
            negative_binomial_kl(
                *(torch.tensor(v, dtype=torch.float64) for v in (rq, math.log(mq / rq), rp, math.log(mp / rp)))
            )
        )
        odds = mpmath.mpf(mq) / rq

        def integrand(u, rq=rq, rp=rp, odds=odds, mq=mq):
            t = mpmath.exp(u)
            gone = -mpmath.expm1(-t)
            bracket = mq + mpmath.expm1(-rq * mpmath.log1p(odds * gone)) / gone
            return bracket * (mpmath.exp(-rq * t) - mpmath.exp(-rp * t))

        end = mpmath.log(60 / min(rq, rp))
        integral = mpmath.quad(integrand, mpmath.linspace(-45, end, 24))
        soft_q, soft_p = mpmath.log1p(odds), mpmath.log1p(mpmath.mpf(mp) / rp)
        expected = rp * soft_p - rq * soft_q + mq * (mpmath.log(mpmath.mpf(mq) / mp) - soft_q + soft_p) + integral
        assert abs(got - expected) <= 1e-7 * max(1, mq, mp), (rq, rp, mq, mp, got, expected)


@settings(max_examples=200, derandomize=True)
@given(
    st.floats(math.log(0.05), math.log(300)),
    st.floats(-5, 5),
    st.floats(math.log(1e-3), math.log(50)),
    st.floats(math.log(1e-3), math.log(50)),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_kl_lies_between_zero_and_the_kl_of_the_gammas(log_r, log_ratio, log_mean_q, log_mean_p, dtype):
    """Counting the spikes of a rate loses information (data processing): 0 <= KL(NB) <= KL of the Gamma rates."""
    r_q, r_p = math.exp(log_r), math.exp(min(max(log_r + log_ratio, math.log(0.05)), math.log(300)))
    odds_q, odds_p = math.exp(log_mean_q) / r_q, math.exp(log_mean_p) / r_p
    values = (r_q, math.log(odds_q), r_p, math.log(odds_p))
    kl = float(negative_binomial_kl(*(torch.tensor(v, dtype=dtype) for v in values)))
    rates = kl_divergence(
        *(Gamma(torch.tensor(r).double(), torch.tensor(1 / o).double()) for r, o in ((r_q, odds_q), (r_p, odds_p)))
    )
    slack = (1e-4 if dtype is torch.float32 else 1e-7) * max(1.0, math.exp(log_mean_q), math.exp(log_mean_p))
    assert -slack <= kl <= float(rates) * (1 + 1e-5) + slack


# --- log q - log p --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_log_q_over_p_is_the_difference_of_log_masses(dtype):
    """In double precision by the mass functions, over r from 1e-3 to 1e6 and relaxed counts up to 1e3."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low, high):
        return low + (high - low) * torch.rand(400, generator=generator, dtype=torch.float64)

    z = [uniform(-4, 7).exp() - math.exp(-4) for _ in range(3)]
    r_q, r_p, mean_q, mean_p = uniform(-7, 14).exp(), uniform(-7, 14).exp(), uniform(-3, 5).exp(), uniform(-3, 5).exp()
    arguments = [x.to(dtype) for x in (*z, r_q, (mean_q / r_q).log(), r_p, (mean_p / r_p).log())]
    *z, r_q, l_q, r_p, l_p = (x.double() for x in arguments)
    expected = sum(negative_binomial_log_prob(x, r_q, l_q) - negative_binomial_log_prob(x, r_p, l_p) for x in z)
    value = negative_binomial_log_q_over_p(arguments[:3], *arguments[3:])
    size = sum(negative_binomial_log_prob(x, r_q, l_q).abs() + negative_binomial_log_prob(x, r_p, l_p).abs() for x in z)
    error = (value.double() - expected).abs() / size.clamp(min=1)
    assert error.max() < (1e-8 if dtype == torch.float64 else 1e-6)


def test_log_q_over_p_derivatives():
    """Of a batch over one prior, once and twice, against finite differences."""
    z = [torch.tensor([[0.0, 2.3], [5.1, 1.0]]).double(), torch.tensor([[1.0, 0.2], [3.0, 7.5]]).double()]
    q = [torch.tensor([[0.5, 2.0], [1.0, 9.0]]).double(), torch.tensor([[0.3, -1.0], [0.7, -0.5]]).double()]
    p = [torch.tensor([1.5, 0.7]).double(), torch.tensor([-0.2, 0.4]).double()]
    points = [x.requires_grad_() for x in (*z, *q, *p)]

    def ratio(a, b, *parameters):
        return negative_binomial_log_q_over_p([a, b], *parameters)

    assert torch.autograd.gradcheck(ratio, points, atol=1e-5)
    assert torch.autograd.gradgradcheck(ratio, [points[0] + 0.5, *points[1:]], atol=1e-5)


def test_a_source_that_changed_in_between_is_noticed():
    """Where PyTorch does not count changes in place, the KL is the exact one."""

    def kl(source):
        source = source.clone()
        q = NegativeBinomial(source.exp(), logits=torch.tensor(0.5), dispersion_source=source, validate_args=False)
        source.add_(1)
        p = NegativeBinomial(source.exp(), logits=torch.tensor(0.0), dispersion_source=source, validate_args=False)
        return kl_divergence(q, p)

    source = torch.zeros(3)
    expected = negative_binomial_kl(torch.ones(3), torch.tensor(0.5), torch.ones(3).exp(), torch.tensor(0.0))
    torch.testing.assert_close(kl(source), expected)
    torch.testing.assert_close(torch.compile(kl, backend="aot_eager")(source), expected)
    with torch.inference_mode():
        torch.testing.assert_close(kl(source), expected)
