r"""The Poisson as functions of counts and the rate.

The log mass has the saddle-point form :math:`-D(k; \lambda) - \omega(k)`, in which no two large numbers cancel:
:math:`D(k; \lambda) = k \log(k / \lambda) - k + \lambda` is the deviance of the count from its mean, and omega is that
of :mod:`pyro_nbvae.distributions.special`.
"""

from __future__ import annotations

import sys

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_nbvae.distributions.elementwise import Wanted, elementwise, register_part
from pyro_nbvae.distributions.special import log_quotient, log_quotient_from_difference, omega, rho

arg_constraints = {"rate": constraints.nonnegative}
normalized = smooth = True
kernels = "com_poisson"
key = register_part(sys.modules[__name__], "Poisson")


def kernel_parameters(rate: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rate and nu = 1."""
    return rate, torch.ones_like(rate)


def _deviance(z: Tensor, rate: Tensor) -> Tensor:
    """z log(z / rate) - z + rate >= 0, without the cancellation at z near the rate; elementwise."""
    over = z - rate
    relative = over / rate
    small = relative.abs() < 0.5
    # the first branch is clamped to the range where it is used, so that its gradient is finite elsewhere
    far = torch.where(z > 0, z * log_quotient(torch.where(z > 0, z, 1.0), rate), 0.0)
    return torch.where(small, z * torch.log1p(relative.clamp(-0.5, 0.5)), far) - over


def _score(z: Tensor, rate: Tensor) -> Tensor:
    """The derivative of the log mass in the rate: (z - rate) / rate, and -1 at count and rate 0."""
    none = (rate == 0) & (z == 0)
    return torch.where(none, -1.0, (z - rate) / torch.where(none, 1.0, rate))


def log_prob_value(z: Tensor, rate: Tensor) -> tuple[Tensor]:
    """Return the log mass of tensors of one shape."""
    none = rate == 0
    value = -_deviance(z, torch.where(none, 1.0, rate)) - omega(z)
    value = torch.where(none, torch.zeros_like(z).masked_fill(z != 0, -torch.inf), value)
    return (value.masked_fill(~(rate >= 0), torch.nan),)


def log_prob_gradient(z: Tensor, rate: Tensor, wanted: Wanted) -> tuple[Tensor | None, ...]:
    """Return the derivative of the log mass in each argument, None where it is not wanted."""
    for_z = torch.log(rate / (1 + z)) - rho(1 + z) if wanted[0] else None
    for_rate = _score(z, rate) if wanted[1] else None
    return tuple(None if d is None else d.masked_fill(~(rate >= 0), torch.nan) for d in (for_z, for_rate))


_log_prob = elementwise("poisson_log_prob", log_prob_value, log_prob_gradient)


def log_prob(z: Tensor, rate: Tensor) -> Tensor:
    """log Poisson(z; rate) for any non-negative real ``z``; arguments broadcast. Differentiable in both, twice."""
    return _log_prob(z, rate)


def log_weight(k: Tensor, rate: Tensor) -> Tensor:
    r"""log Poisson(k; rate) without cancellation; in a shared window, at the cost of one product per count.

    With the deviance :math:`D(k; \lambda) = k \log(k / \lambda) - k + \lambda` it is
    :math:`-D(k; \lambda) - \omega(k)`, and for any a

    .. math:: D(k; \lambda) = D(k; a) - (k - a) \log(\lambda / a) + D(a; \lambda).

    Args:
        k: counts of the shape of ``rate``, or windows (width, 1) or (width, n) for a ``rate`` of shape (n,).
    """
    none = rate == 0
    rate = torch.where(rate >= 0, rate.clamp(min=torch.finfo(rate.dtype).tiny), torch.nan)
    if k.dim() <= rate.dim():
        return log_prob(k, rate).masked_fill(none & (k > 0), -torch.inf)
    middle = k[len(k) // 2].clamp(min=1)
    count, a = k.double(), middle.double()
    of_counts = (count * a.log() - a - torch.lgamma(count + 1)).to(k.dtype)  # log Poisson(k; a)
    of_rates = _deviance(middle, rate)
    log_mass = torch.addcmul(of_counts - of_rates, k - middle, log_quotient(rate, middle))
    return log_mass.masked_fill(none & (k > 0), -torch.inf)


def scores(k: Tensor, rate: Tensor) -> tuple[Tensor]:
    """Return the derivative of the log mass in the rate."""
    return (_score(k, rate),)


def largest_count(rate: Tensor, nats: float | Tensor) -> Tensor:
    """Return a count k that a Poisson variable reaches with probability at most exp(-nats).

    By Chernoff's bound the probability is below exp(-(k log(k / rate) - k + rate)). Newton's method starts from
    Bernstein's bound, which lies to the right of the root of this convex function, and approaches the root from there.
    """
    rate = rate.clamp(min=1e-30)
    beyond = nats / 3 + torch.sqrt(nats * nats / 9 + 2 * nats * rate)  # k - rate, which rounding leaves accurate
    for _ in range(2):
        slope = torch.log1p(beyond / rate)
        beyond = beyond - ((rate + beyond) * slope - beyond - nats) / slope
    return rate + beyond


def window(nats: float | Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """First and last count of a Poisson's window; each tail outside it has mass below exp(-nats).

    The ends are where the deviance equals ``nats``.

    See also: docs/mathematics.md, section 4.3 (The windows).
    """
    nats = torch.as_tensor(nats, dtype=rate.dtype, device=rate.device)
    # Bernstein's bound lies to the left of the root; Newton's method on this convex function approaches it from there.
    k = (rate - torch.sqrt(2 * nats * rate)).clamp(min=0)
    inside = k > 0
    for _ in range(2):
        slope = torch.log(k / rate)
        k = torch.where(inside, k - (k * slope - k + rate - nats) / slope, k)
    return k.clamp(min=0) - 2, largest_count(rate, nats) + 2


def _cdf_value(z: Tensor, rate: Tensor) -> tuple[Tensor]:
    k = z.double().floor()
    below = torch.special.gammaincc(k.clamp(min=0) + 1, rate.clamp(min=0).double())
    return (torch.where(k < 0, 0.0, below).masked_fill(~(rate >= 0), torch.nan).to(rate.dtype),)


def _cdf_gradient(z: Tensor, rate: Tensor, wanted: Wanted) -> tuple[None, Tensor]:
    k = z.floor()
    return None, torch.where(k < 0, 0.0, -log_prob(k.clamp(min=0), rate).exp())


_cdf = elementwise("poisson_cdf", _cdf_value, _cdf_gradient)


def cdf(z: Tensor, rate: Tensor) -> Tensor:
    """P(count <= z) of a Poisson; arguments broadcast. Differentiable in the rate, twice."""
    return _cdf(z, rate)


# Terms of the series of (1 + d) log(1 + d) - d = d^2 / 2 - d^3 / 6 + d^4 / 12 - ... for |d| < 0.1, by precision.
_TERMS = {torch.float32: 8, torch.float64: 16}


def kl(rate_q: Tensor, rate_p: Tensor) -> tuple[Tensor, ...]:
    """Return the KL of two Poissons and its derivatives."""
    d = torch.where((rate_q == 0) & (rate_p == 0), -1.0, (rate_q - rate_p) / rate_p)
    near = d.clamp(-0.1, 0.1)
    series = torch.zeros_like(d)
    for k in range(_TERMS[d.dtype] + 1, 1, -1):
        series = series * near + (-1) ** k / (k * (k - 1))
    far = torch.where(rate_q > 0, rate_q * log_quotient(rate_q, rate_p), 0.0) - (rate_q - rate_p)
    value = torch.where(d.abs() < 0.1, rate_p * near.square() * series, far)
    value = value.masked_fill(~((rate_q >= 0) & (rate_p >= 0)), torch.nan)
    return value, *kl_gradient(rate_q, rate_p)


def kl_gradient(rate_q: Tensor, rate_p: Tensor) -> tuple[Tensor, ...]:
    """Return the derivatives of the KL of two Poissons."""
    difference, empty = rate_q - rate_p, (rate_q == 0) & (rate_p == 0)
    # finite at rate_q = 0, so that a factor of 0 before it, as in a chain of counts, gives 0
    some = rate_q.clamp(min=torch.finfo(rate_q.dtype).tiny)
    for_q = torch.where(empty, 0.0, log_quotient_from_difference(some - rate_p, some, rate_p))
    for_p = torch.where(empty, 1.0, -difference / rate_p)
    wrong = ~((rate_q >= 0) & (rate_p >= 0))
    return for_q.masked_fill(wrong, torch.nan), for_p.masked_fill(wrong, torch.nan)
