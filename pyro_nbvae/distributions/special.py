"""Accurate log mass functions of counts, extended to the non-negative reals.

Both have the saddle-point form

    log p(z) = [slowly varying] - D,        D >= 0,

in which no two large numbers cancel: :math:`D` is the deviance of the count from its mean, and the slowly varying
terms are made of

    omega(x) = log Gamma(1 + x) - x log x + x  ~  log(2 pi x) / 2 + 1 / (12 x)

(C. Loader, "Fast and accurate computation of binomial probabilities", 2000). The textbook difference
``lgamma(z + r) - lgamma(r)`` has an error of 0.45 at r = 1e6 in single precision.

See also: docs/mathematics.md, section 2.4 (How log masses are computed).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_nbvae.distributions.elementwise import Wanted, elementwise

# Stirling's series of log Gamma(1 + x) for x >= 10: B_2k / (2k (2k - 1)), accurate to 1e-15 there.
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360)
# digamma(x) - log(x) + 1 / (2x) = -sum B_2k / (2k x^2k).
_DIGAMMA = (-1 / 12, 1 / 120, -1 / 252, 1 / 240, -1 / 132, 691 / 32760)
_SERIES_FROM = 10.0


def _horner(coefficients: tuple[float, ...], y: Tensor) -> Tensor:
    total = torch.full_like(y, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * y + c
    return total


def omega(x: Tensor) -> Tensor:
    """log Gamma(1 + x) - x log x + x for x >= 0; elementwise, not differentiable at 0."""
    far = torch.where(x < _SERIES_FROM, _SERIES_FROM, x)
    inverse = far.reciprocal()
    series = 0.5 * (torch.log(far) + math.log(2 * math.pi)) + inverse * _horner(_STIRLING, inverse * inverse)
    near = torch.where(x < _SERIES_FROM, x, _SERIES_FROM)
    direct = torch.lgamma(1 + near) - torch.xlogy(near, near) + near
    return torch.where(x < _SERIES_FROM, direct, series)


def rho(x: Tensor) -> Tensor:
    """digamma(x) - log x for x > 0, without the cancellation at large x; elementwise."""
    far = torch.where(x < _SERIES_FROM, _SERIES_FROM, x)
    inverse = far.reciprocal()
    square = inverse * inverse
    series = -0.5 * inverse + square * _horner(_DIGAMMA, square)
    near = torch.where(x < _SERIES_FROM, x, _SERIES_FROM)
    return torch.where(x < _SERIES_FROM, torch.digamma(near) - torch.log(near), series)


def digamma_difference(z: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """digamma(z + r) - digamma(z + s), without cancellation at large arguments."""
    return log_quotient(r - s, z + r, z + s) + (rho(z + r) - rho(z + s))


def log_ratio(x: Tensor, y: Tensor) -> Tensor:
    """log(x / y) for x and y > 0, also where the quotient is no normal number."""
    quotient = x / y
    limits = torch.finfo(quotient.dtype)
    ordinary = (quotient >= limits.tiny) & (quotient <= limits.max)
    # the first branch has a finite gradient where it is not used
    a, b = (torch.where(ordinary, v, 1.0) for v in (x, y))
    return torch.where(ordinary, torch.log(a / b), torch.log(x) - torch.log(y))


def log_quotient(difference: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """log(x / y) from x - y without rounding: accurate both where x and y are close and where they are far apart."""
    relative = difference / y
    # the first branch is clamped to the range where it is used, so that its gradient is finite elsewhere
    return torch.where(relative.abs() < 0.5, torch.log1p(relative.clamp(-0.5, 0.5)), log_ratio(x, y))


def _ordinary(r: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return parameters in the range of the formulas, where the count is surely 0, and where there is no distribution.

    The count is surely 0 if r is 0 or the logits are -inf. Where r is negative or infinite, or a parameter is nan,
    there is none. Both, and logits of +inf, which leave no mass at any count, have the parameters 1 and 0.
    """
    zero = (r == 0) | (logits == -torch.inf)
    wrong = ~((r >= 0) & (r < torch.inf)) | logits.isnan()
    other = zero | wrong | (logits == torch.inf)
    return torch.where(other, 1.0, r), torch.where(other, 0.0, logits), zero, wrong


def _negative_binomial_value(z: Tensor, r: Tensor, logits: Tensor) -> tuple[Tensor]:
    lost = logits == torch.inf
    r, logits, zero, wrong = _ordinary(r, logits)
    mean = r * logits.exp()
    n = r + z
    relative = (r / n) * ((z - mean) / mean)  # relative difference of z and m (r + z) / (r + m)
    small = relative.abs() < 0.5
    quotient = ((z / mean) * ((r + mean) / n)).clamp(min=torch.finfo(z.dtype).tiny)  # a denormal z underflows
    for_z = torch.where(small, z * torch.log1p(relative), torch.xlogy(z, quotient))
    deviance = for_z - r * log_quotient(z - mean, n, r + mean)
    value = omega(n) - omega(r) - omega(z) - torch.log1p(z / r) - deviance
    value = value.masked_fill(lost | zero, -torch.inf).masked_fill(zero & (z == 0), 0.0)
    return (value.masked_fill(wrong, torch.nan),)


def _negative_binomial_gradient(z: Tensor, r: Tensor, logits: Tensor, wanted: Wanted) -> tuple[Tensor | None, ...]:
    given_r, given_logits = r, logits
    r, logits, zero, wrong = _ordinary(r, logits)
    mean = r * logits.exp()
    common = log_quotient(z - mean, r + z, r + mean)
    for_z = for_r = for_logits = None
    if any(wanted[:2]):
        common = common + rho(r + z)
    if wanted[0]:
        for_z = common - rho(1 + z) + (r.log() + logits - torch.log1p(z))
    if wanted[1]:
        for_r = common - rho(r)
    if wanted[2]:
        # (z - m) / (1 + e^l), in a form that neither overflows nor cancels.
        for_logits = z * torch.sigmoid(-given_logits) - given_r * torch.sigmoid(given_logits)
    if for_r is not None:
        for_r = torch.where(zero, -softplus(given_logits), for_r)
    return tuple(None if d is None else d.masked_fill(wrong, torch.nan) for d in (for_z, for_r, for_logits))


_negative_binomial_log_prob = elementwise(
    "negative_binomial_log_prob", _negative_binomial_value, _negative_binomial_gradient
)


def negative_binomial_log_prob(z: Tensor, total_count: Tensor, logits: Tensor) -> Tensor:
    """log NB(z; r, l) = log Gamma(z + r) - log Gamma(r) - log Gamma(z + 1) + z log sigma(l) + r log sigma(-l).

    All arguments broadcast; ``z`` may be any non-negative real. The error is below 1e-8 * max(1, |log p|) in float64
    for r from 1e-4 to 1e6 and means from 1e-3 to 1e4, and below 1e-4 * max(1, |log p|) in float32 for r up to 1e4 and
    means up to 1e3. Differentiable in all three arguments, twice.
    """
    return _negative_binomial_log_prob(z, total_count, logits)


def negative_binomial_scores(z: Tensor, total_count: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of log NB(z; r, l) in r and in l; arguments broadcast, differentiable in both parameters."""
    z, total_count, logits = torch.broadcast_tensors(z, total_count, logits)
    return _negative_binomial_gradient(z, total_count, logits, (False, True, True))[1:]  # type: ignore[return-value]


def poisson_deviance(z: Tensor, rate: Tensor) -> Tensor:
    """z log(z / rate) - z + rate >= 0, without the cancellation at z near the rate; elementwise."""
    over = z - rate
    relative = over / rate
    small = relative.abs() < 0.5
    # the first branch is clamped to the range where it is used, so that its gradient is finite elsewhere
    far = torch.where(z > 0, z * log_ratio(torch.where(z > 0, z, 1.0), rate), 0.0)
    return torch.where(small, z * torch.log1p(relative.clamp(-0.5, 0.5)), far) - over


def _poisson_value(z: Tensor, rate: Tensor) -> tuple[Tensor]:
    none = rate == 0
    value = -poisson_deviance(z, torch.where(none, 1.0, rate)) - omega(z)
    value = torch.where(none, torch.zeros_like(z).masked_fill(z != 0, -torch.inf), value)
    return (value.masked_fill(~(rate >= 0), torch.nan),)


def _poisson_gradient(z: Tensor, rate: Tensor, wanted: Wanted) -> tuple[Tensor | None, ...]:
    for_z = torch.log(rate / (1 + z)) - rho(1 + z) if wanted[0] else None
    for_rate = poisson_score(z, rate) if wanted[1] else None
    return tuple(None if d is None else d.masked_fill(~(rate >= 0), torch.nan) for d in (for_z, for_rate))


def poisson_score(z: Tensor, rate: Tensor) -> Tensor:
    """The derivative of log Poisson(z; rate) in the rate: (z - rate) / rate, and -1 at count and rate 0."""
    none = (rate == 0) & (z == 0)
    return torch.where(none, -1.0, (z - rate) / torch.where(none, 1.0, rate))


_poisson_log_prob = elementwise("poisson_log_prob", _poisson_value, _poisson_gradient)


def poisson_log_prob(z: Tensor, rate: Tensor) -> Tensor:
    """log Poisson(z; rate) for any non-negative real ``z``; arguments broadcast. Differentiable in both, twice."""
    return _poisson_log_prob(z, rate)


def _poisson_cdf_value(z: Tensor, rate: Tensor) -> tuple[Tensor]:
    k = z.double().floor()
    below = torch.special.gammaincc(k.clamp(min=0) + 1, rate.clamp(min=0).double())
    return (torch.where(k < 0, 0.0, below).masked_fill(~(rate >= 0), torch.nan).to(rate.dtype),)


def _poisson_cdf_gradient(z: Tensor, rate: Tensor, wanted: Wanted) -> tuple[None, Tensor]:
    k = z.floor()
    return None, torch.where(k < 0, 0.0, -poisson_log_prob(k.clamp(min=0), rate).exp())


_poisson_cdf = elementwise("poisson_cdf", _poisson_cdf_value, _poisson_cdf_gradient)


def poisson_cdf(z: Tensor, rate: Tensor) -> Tensor:
    """P(count <= z) of a Poisson; arguments broadcast. Differentiable in the rate, twice."""
    return _poisson_cdf(z, rate)


def softplus_difference(a: Tensor, b: Tensor) -> Tensor:
    """softplus(a) - softplus(b), exactly 0 where a = b and without cancellation where they are close."""
    d = a - b
    close = torch.log1p(torch.sigmoid(b) * torch.expm1(d.clamp(-1, 1)))
    return torch.where(d.abs() < 1, close, softplus(a) - softplus(b))
