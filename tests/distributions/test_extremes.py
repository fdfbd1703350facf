"""At extreme parameters: never NaN, no negative KL, and samples that are counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import kl_divergence

from pyro_nbvae.distributions import NegativeBinomial, RelaxedNegativeBinomial, RelaxedPoisson
from pyro_nbvae.distributions.families.negative_binomial import log_prob as negative_binomial_log_prob

DTYPES = (torch.float32, torch.float64)
exponents = st.lists(st.floats(-12, 12), min_size=20, max_size=20)
logits = st.lists(st.floats(-60, 60), min_size=20, max_size=20)


def tensor(values, dtype):
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def dispersions(values, dtype):
    return (10 ** tensor(values, torch.float64)).clamp(1e-12, 1e12).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(r=exponents, l=logits)
@settings(max_examples=60)
def test_log_prob_and_its_gradient(dtype, r, l):  # noqa: E741
    r, l = dispersions(r, dtype).requires_grad_(), tensor(l, dtype).requires_grad_()  # noqa: E741
    mean = (r * l.exp()).detach()
    limits = torch.finfo(dtype)
    values = [0.0, 1.0, 1e6, limits.tiny, limits.tiny * limits.eps * 2]  # the last is denormal
    for z in (
        *(torch.full_like(mean, v) for v in values),
        mean.round(),
        (10 * mean).clamp(max=limits.max / 10).round(),
    ):
        log_prob = NegativeBinomial(r, logits=l, validate_args=False).log_prob(z)
        assert (log_prob <= 1e-3).all()  # and not NaN
        assert not any(g.isnan().any() for g in torch.autograd.grad(log_prob.sum(), (r, l)))
        rate = mean.clamp(limits.tiny, 1e30).requires_grad_()
        of_poisson = RelaxedPoisson(rate, validate_args=False).log_prob(z)
        assert (of_poisson <= 1e-3).all() and not torch.autograd.grad(of_poisson.sum(), rate)[0].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@given(r=exponents, l=logits, s=exponents, k=logits)
@settings(max_examples=100)
def test_the_kl_and_its_gradient(dtype, r, l, s, k):  # noqa: E741
    parameters = [dispersions(r, dtype), tensor(l, dtype), dispersions(s, dtype), tensor(k, dtype)]
    parameters = [p.requires_grad_() for p in parameters]
    a, b, c, d = parameters
    kl = kl_divergence(NegativeBinomial(a, logits=b), NegativeBinomial(c, logits=d))
    assert (kl >= -1e-6 * (a * b.exp()).clamp(min=1)).all()
    assert not any(g.isnan().any() for g in torch.autograd.grad(kl.sum(), parameters))


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_are_counts(dtype):
    r, l = torch.broadcast_tensors(  # noqa: E741
        torch.logspace(-12, 12, 13, dtype=dtype)[:, None], torch.linspace(-60, 60, 13, dtype=dtype)
    )
    rate = torch.logspace(-30, 30, 61, dtype=dtype)
    for z in (NegativeBinomial(r, logits=l).sample((20,)), RelaxedPoisson(rate).sample((20,))):
        assert ((z >= 0) & (z == z.round()) & z.isfinite()).all()
        assert z.max() < 1.01 * 2**53
    assert (RelaxedPoisson(rate[-5:]).sample() > 0.99 * 2**53).all()


@pytest.mark.parametrize(("r", "l"), [(-1e-13, 0.0), (1e13, 0.0), (1.0, 61.0), (1.0, -61.0), (float("nan"), 0.0)])
def test_beyond_is_refused(r, l):  # noqa: E741
    for family in (NegativeBinomial, RelaxedNegativeBinomial):
        with pytest.raises(ValueError, match="to satisfy the constraint"):
            family(torch.tensor(r), logits=torch.tensor(l), validate_args=True)


def test_the_kl_beyond_a_guides_reach_is_the_sum_over_counts():
    """Dispersions from 1e-5 to 1e5 and means up to 1e5: 1e-5 and 1e-3 of max(1, KL)."""
    generator = torch.Generator().manual_seed(3)
    tried = 0
    while tried < 60:
        a, b, c, d = torch.rand(4, generator=generator, dtype=torch.float64)
        r, l, s, k = 10 ** (10 * a - 5), 20 * b - 9, 10 ** (10 * c - 5), 20 * d - 9  # noqa: E741
        mean, fano = float(r * l.exp()), float(1 + l.exp())
        last = mean + 40 * (mean * fano) ** 0.5 + 60 * fano
        if last > 3e5 or (max(r, s, mean) < 1e4 and abs(float((r / s).log())) < 5.5):
            continue  # too long a sum; or in reach, which is tested in test_kl.py
        z = torch.arange(int(last) + 200, dtype=torch.float64)
        of_q, of_p = negative_binomial_log_prob(z, r, l), negative_binomial_log_prob(z, s, k)
        exact = float((of_q.exp() * (of_q - of_p)).sum())
        for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-3)):
            q, p = (NegativeBinomial(n.to(dtype), logits=o.to(dtype)) for n, o in ((r, l), (s, k)))
            assert abs(float(kl_divergence(q, p)) - exact) <= tolerance * max(1, exact)
        tried += 1
