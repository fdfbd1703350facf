"""Special functions of counts and their parameters, in forms without cancellation.

The slowly varying terms of log mass functions are made of

    omega(x) = log Gamma(1 + x) - x log x + x  ~  log(2 pi x) / 2 + 1 / (12 x)

(C. Loader, "Fast and accurate computation of binomial probabilities", 2000).

See also: docs/mathematics.md, section 2.4 (How log masses are computed).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

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


def log_quotient(x: Tensor, y: Tensor) -> Tensor:
    """log(x / y) for x and y > 0, also where the quotient overflows or underflows."""
    quotient = x / y
    limits = torch.finfo(quotient.dtype)
    ordinary = (quotient >= limits.tiny) & (quotient <= limits.max)
    # the first branch has a finite gradient where it is not used
    a, b = (torch.where(ordinary, v, 1.0) for v in (x, y))
    return torch.where(ordinary, torch.log(a / b), torch.log(x) - torch.log(y))


def log_quotient_from_difference(difference: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """log(x / y) from x - y without rounding: accurate both where x and y are close and where they are far apart."""
    relative = difference / y
    # the first branch is clamped to the range where it is used, so that its gradient is finite elsewhere
    return torch.where(relative.abs() < 0.5, torch.log1p(relative.clamp(-0.5, 0.5)), log_quotient(x, y))


def digamma_difference(z: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """digamma(z + r) - digamma(z + s), without cancellation at large arguments."""
    return log_quotient_from_difference(r - s, z + r, z + s) + (rho(z + r) - rho(z + s))


def softplus_difference(a: Tensor, b: Tensor) -> Tensor:
    """softplus(a) - softplus(b), exactly 0 where a = b and without cancellation where they are close."""
    d = a - b
    close = torch.log1p(torch.sigmoid(b) * torch.expm1(d.clamp(-1, 1)))
    return torch.where(d.abs() < 1, close, softplus(a) - softplus(b))
