r"""Kullback-Leibler divergences between counts, in closed form or by quadrature (DESIGN 3.3 and 3.4).

With :math:`m = r e^l` and :math:`A = \mathrm{softplus}(l_q) - \mathrm{softplus}(l_p)`,

.. math:: KL = m_q \log\frac{r_q \sigma(l_q)}{r_p \sigma(l_p)} - r_q A + (r_p - r_q)\,\mathrm{softplus}(l_p) + J,

where :math:`J` vanishes where the dispersions agree and is a one-dimensional integral otherwise,

.. math:: J = \int_0^\infty \Big[ m_q - \frac{1 - G(e^{-t})}{1 - e^{-t}} \Big] (e^{-r_q t} - e^{-r_p t}) \frac{dt}{t},
    \qquad G(s) = (1 + e^{l_q} (1 - s))^{-r_q}.
"""

from __future__ import annotations

import weakref
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable
from torch.nn.functional import softplus

from pyro_nbvae.distributions.special import softplus_difference

# Quadrature: trapezoids in v, t = exp(c + v - exp(-v)), a double-exponential map at both ends. The right end is the
# point at which c + v - exp(-v) is one above c. (tail that is left out, nodes), by precision.
_RIGHT = 1.2784645427610738
_RULES = {torch.float32: (1e-6, 24), torch.float64: (1e-10, 64)}
# Elements in one block on a CPU: 24 nodes of 4,096 single-precision numbers stay in a core's cache.
_BLOCK = 4096


def _dispersion_integral(r_q: Tensor, l_q: Tensor, r_p: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """J and its derivatives in r_q, l_q and r_p, all (n,), from one set of exponentials."""
    eps, nodes = _RULES[r_q.dtype]
    log_eps = torch.log(torch.tensor(eps, dtype=r_q.dtype, device=r_q.device))
    larger, smaller = torch.maximum(r_q, r_p), torch.minimum(r_q, r_p)
    # Left of `low` the integrand is below m^2 (1 + 1/r) max(r) t^2 / 2, right of `high` below m e^(-min(r) t). The
    # derivatives need max(r) where the value alone would do with |r_q - r_p|.
    log_m = r_q.log() + l_q
    low = 0.5 * (1.3863 + log_eps - 2 * log_m - torch.log1p(1 / r_q) - larger.log())
    high = torch.log(torch.log1p(mean) - log_eps) - smaller.log()
    centre = high - 1
    left = -torch.log((centre - low).clamp(min=1))
    step = (_RIGHT - left) / nodes
    node = torch.arange(nodes, dtype=r_q.dtype, device=r_q.device)[:, None] + 0.5
    # (nodes, n) from here on; in place, so that a block stays in cache
    t = torch.addcmul(left, step, node)  # v
    weight = torch.neg(t).exp_()  # e^-v
    t.sub_(weight).add_(centre).exp_()
    weight.add_(1).mul_(step)

    odds = l_q.exp()
    gone = torch.neg(t).expm1_().neg_()  # 1 - s
    grown = odds * gone
    exponent = torch.log1p(grown)
    lost = (exponent * -r_q).expm1_().neg_()  # 1 - G
    bracket = torch.div(lost, gone).neg_().add_(mean)
    from_q, from_p = (t * -r_q).exp_(), (t * -r_p).exp_()
    flux = t.mul_(weight).mul_(bracket)
    d_rp = (flux * from_p).sum(0)
    d_rq = flux.mul_(from_q).sum(0).neg_()
    difference = from_q.sub_(from_p).mul_(weight)
    value = bracket.mul_(difference).sum(0)
    total = difference.sum(0)
    kept = lost.sub_(1).neg_().mul_(difference)  # G times the difference
    d_rq += odds * total - exponent.mul_(kept).div_(gone).sum(0)
    d_lq = mean * (total - kept.div_(grown.add_(1)).sum(0))
    return value, d_rq, d_lq, d_rp


class _NegativeBinomialKL(Function):
    """KL and its gradient in one pass; ``exact=False`` leaves J out, as is right where r_q is r_p."""

    @staticmethod
    def forward(ctx: FunctionCtx, r_q: Tensor, l_q: Tensor, r_p: Tensor, l_p: Tensor, exact: bool) -> Tensor:
        odds = l_q.exp()
        mean = r_q * odds
        rise = softplus_difference(l_q, l_p)
        # log of (r sigma(l)) for q over p; l_q - l_p - rise, but without cancellation at large logits
        gain = torch.log(r_q / r_p) + softplus_difference(-l_p, -l_q)
        soft_p = softplus(l_p)
        value = mean * gain - r_q * rise + (r_p - r_q) * soft_p
        d_rq = odds * gain + odds - softplus(l_q)
        d_lq = mean * gain
        d_rp = soft_p - mean / r_p
        d_lp = (r_p * l_p.exp() - mean) * torch.sigmoid(-l_p)
        if exact:
            parts = (value, d_rq, d_lq, d_rp)
            size = _BLOCK if value.device.type == "cpu" else max(1, value.numel())
            blocks = zip(*(x.reshape(-1).split(size) for x in (r_q, l_q, r_p, mean)), strict=True)
            added = zip(*(_dispersion_integral(*block) for block in blocks), strict=True)
            for total, pieces in zip(parts, added, strict=True):
                total += torch.cat(pieces).reshape(total.shape)
        ctx.save_for_backward(d_rq, d_lq, d_rp, d_lp)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * d for d in ctx.saved_tensors), None  # type: ignore[attr-defined]


def negative_binomial_kl(r_q: Tensor, l_q: Tensor, r_p: Tensor, l_p: Tensor, *, exact: bool = True) -> Tensor:
    """KL(NB(r_q, l_q) || NB(r_p, l_p)) in nats, elementwise, differentiable in all four (DESIGN 3.4).

    Args:
        r_q, r_p: dispersions (torch's ``total_count``), positive.
        l_q, l_p: logits; all four broadcast.
        exact: with False the integral J is left out: DESIGN 3.3, right only where r_q and r_p are one quantity,
            gradient included.

    The error is below 1e-8 * max(1, KL) in float64 and 2e-5 * max(1, KL) in float32 for r from 0.05 to 300, ratios
    of r up to e^2 either way and means from 1e-3 to 50. Up to the ratio that a guide can reach, e^5, with r from 1e-3
    to 1e4 and means from 1e-4 to 1e4 it is below 1e-7 and 1e-4 times max(1, m_q, m_p). Beyond, for r from 1e-6 to 1e8
    and |l| up to 50, value and gradient are finite and no more is promised.

    Raises:
        TypeError: for another precision.
    """
    arguments = torch.broadcast_tensors(r_q, l_q, r_p, l_p)
    for argument in arguments:
        if argument.dtype not in _RULES:
            raise TypeError(f"negative_binomial_kl takes float32 or float64, got {argument.dtype}")
    return _NegativeBinomialKL.apply(*arguments, exact)


def poisson_kl(rate_q: Tensor, rate_p: Tensor) -> Tensor:
    """KL(Poisson(rate_q) || Poisson(rate_p)) in nats, elementwise, arguments broadcast."""
    return rate_q * torch.log(rate_q / rate_p) - (rate_q - rate_p)


def same_quantity(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one quantity, so that neither can move without the other.

    They are if both are views of one tensor, laid out alike, or of two tensors that Pyro made from one unconstrained
    parameter (it leaves a weak reference ``unconstrained`` to that on what it returns), or if no gradient is asked
    for and all values agree. Equal values alone are not enough: where the dispersions of q and p agree by chance, the
    KL's derivative in either of them does not vanish with their difference.
    """
    a, b = torch.broadcast_tensors(a, b)
    root_a, root_b = (x if x._base is None else x._base for x in (a, b))
    alike = a.stride() == b.stride() and a.storage_offset() == b.storage_offset()
    if root_a is root_b and alike:
        return True
    leaves = [getattr(root, "unconstrained", None) for root in (root_a, root_b)]
    if alike and all(isinstance(leaf, weakref.ref) for leaf in leaves) and leaves[0]() is leaves[1]() is not None:  # type: ignore[misc]
        return True
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return False
    return torch.equal(a, b)


def kl_form(q: object, p: object) -> Literal["shared", "exact"]:
    """Which form ``kl_divergence(q, p)`` takes for two negative binomials: DESIGN 3.3, or 3.4."""
    return "shared" if same_quantity(q.total_count, p.total_count) else "exact"  # type: ignore[attr-defined]
