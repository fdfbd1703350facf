r"""The negative binomial as functions of counts, the dispersion parameter r and the logits l.

The log mass has the saddle-point form [slowly varying] - D, in which no two large numbers cancel: D is the deviance of
the count from its mean m = r e^l. The textbook difference ``lgamma(z + r) - lgamma(r)`` has an error of 0.45 at r = 1e6
in single precision.

See also: docs/mathematics.md, section 2.4 (How log masses are computed) and section 3 (Kullback-Leibler divergences).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from pyro_nbvae.distributions.elementwise import Wanted, elementwise, register_part
from pyro_nbvae.distributions.special import log_quotient_from_difference, omega, rho, softplus_difference

arg_constraints = {"total_count": constraints.nonnegative, "logits": constraints.real}
normalized = smooth = True
kernels = "negative_binomial"
key = register_part(sys.modules[__name__], "NegativeBinomial")


def _ordinary(r: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return parameters in the range of the formulas, where the count is surely 0, and where there is no distribution.

    The count is surely 0 if r is 0 or the logits are -inf. Where r is negative or infinite, or a parameter is nan,
    there is none. Both, and logits of +inf, which leave no mass at any count, have the parameters 1 and 0.
    """
    zero = (r == 0) | (logits == -torch.inf)
    wrong = ~((r >= 0) & (r < torch.inf)) | logits.isnan()
    other = zero | wrong | (logits == torch.inf)
    return torch.where(other, 1.0, r), torch.where(other, 0.0, logits), zero, wrong


def _largest_mean(dtype: torch.dtype) -> float:
    """Return the number at which means are cut off, so that sums with them are finite."""
    return 0.1 * torch.finfo(dtype).max


def _finite_mean(r: Tensor, logits: Tensor) -> Tensor:
    return (r * logits.exp()).clamp(max=_largest_mean(r.dtype))


def _common_value(z: Tensor, r: Tensor, logits: Tensor) -> tuple[Tensor]:
    mean = _finite_mean(r, logits)
    common = log_quotient_from_difference(z - mean, r + z, r + mean)
    cut_off = mean == _largest_mean(r.dtype)
    return (torch.where(cut_off, (r + z).log() - (r.log() + logits), common),)


def _common_gradient(z: Tensor, r: Tensor, logits: Tensor, wanted: Wanted) -> tuple[Tensor, ...]:
    return 1 / (r + z), -(z / (r + z)) / r, -torch.sigmoid(logits)


# log((r + z) / (r + m)) with m = r e^l; its derivatives, by those of m, would cancel.
_common = elementwise("negative_binomial_log_quotient", _common_value, _common_gradient)


def log_prob_value(z: Tensor, r: Tensor, logits: Tensor) -> tuple[Tensor]:
    """Return the log mass of tensors of one shape."""
    lost = logits == torch.inf
    r, logits, zero, wrong = _ordinary(r, logits)
    mean, common = _finite_mean(r, logits), _common(z, r, logits)
    n = r + z
    relative = (r / n) * ((z - mean) / mean)  # relative difference of z and m (r + z) / (r + m)
    small = relative.abs() < 0.5
    quotient = ((z / mean) * ((r + mean) / n)).clamp(min=torch.finfo(z.dtype).tiny)  # a denormal z underflows
    log_quotient = torch.where(quotient < torch.inf, quotient.log(), z.log() - (r.log() + logits) - common)
    for_z = torch.where(small, z * torch.log1p(relative), torch.where(z > 0, z * log_quotient, 0.0))
    deviance = for_z - r * common
    value = omega(n) - omega(r) - omega(z) - torch.log1p(z / r) - deviance
    value = value.masked_fill(lost | zero, -torch.inf).masked_fill(zero & (z == 0), 0.0)
    return (value.masked_fill(wrong, torch.nan),)


def log_prob_gradient(z: Tensor, r: Tensor, logits: Tensor, wanted: Wanted) -> tuple[Tensor | None, ...]:
    """Return the derivative of the log mass in each argument, None where it is not wanted."""
    given_r, given_logits = r, logits
    r, logits, zero, wrong = _ordinary(r, logits)
    common = _common(z, r, logits)
    for_z = for_r = for_logits = None
    of_sum = rho(r + z) if any(wanted[:2]) else common
    if wanted[0]:  # digamma(z + r) - digamma(z + 1) + log sigma(l)
        for_z = log_quotient_from_difference(r - 1, r + z, 1 + z) + (of_sum - rho(1 + z)) + logsigmoid(logits)
    if wanted[1]:
        for_r = common + (of_sum - rho(r))  # 0 at count 0, where both are about 1 / r
    if wanted[2]:
        # (z - m) / (1 + e^l), which neither overflows nor cancels; a sigmoid that is 1 keeps its derivative
        above, success, failure = given_logits > 0, torch.sigmoid(given_logits), torch.sigmoid(-given_logits)
        success, failure = torch.where(above, 1 - failure, success), torch.where(above, failure, 1 - success)
        for_logits = z * failure - given_r * success
    if for_r is not None:
        for_r = torch.where(zero, -softplus(given_logits), for_r)
    return tuple(None if d is None else d.masked_fill(wrong, torch.nan) for d in (for_z, for_r, for_logits))


_log_prob = elementwise("negative_binomial_log_prob", log_prob_value, log_prob_gradient)


def log_prob(z: Tensor, total_count: Tensor, logits: Tensor) -> Tensor:
    """log NB(z; r, l) = log Gamma(z + r) - log Gamma(r) - log Gamma(z + 1) + z log sigma(l) + r log sigma(-l).

    All arguments broadcast; ``z`` may be any non-negative real. The error is below 1e-8 * max(1, |log p|) in float64
    for r from 1e-4 to 1e6 and means from 1e-3 to 1e4, and below 1e-4 * max(1, |log p|) in float32 for r up to 1e4 and
    means up to 1e3. Differentiable in all three arguments, twice.
    """
    return _log_prob(z, total_count, logits)


def log_weight(k: Tensor, r: Tensor, logits: Tensor) -> Tensor:
    """Return the log mass."""
    return log_prob(k, r, logits)


def scores(k: Tensor, r: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of log NB(k; r, l) in r and in l; arguments broadcast, differentiable in both parameters."""
    k, r, logits = torch.broadcast_tensors(k, r, logits)
    return log_prob_gradient(k, r, logits, (False, True, True))[1:]  # type: ignore[return-value]


def kernel_parameters(r: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return r and l."""
    return r, logits


def window(nats: float, r: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the last count of the window.

    The ends are Bernstein's bounds for a sub-gamma variable; below its mean a count is sub-Gaussian.
    """
    fano = 1 + logits.exp()
    mean = r * logits.exp()
    half_width = torch.sqrt(2 * nats * mean * fano)
    return mean - half_width, mean + half_width + nats * fano


def _allowed(r: Tensor) -> Tensor:
    return torch.where((r >= 0) & (r < torch.inf), r, torch.nan)


def mean(r: Tensor, logits: Tensor) -> Tensor:
    """r e^l; nan where r is not allowed."""
    return _allowed(r) * logits.exp()


def variance(r: Tensor, logits: Tensor) -> Tensor:
    """r e^l (1 + e^l); nan where r is not allowed."""
    return mean(r, logits) * (1 + logits.exp())


def mode(r: Tensor, logits: Tensor) -> Tensor:
    """floor((r - 1) e^l), or 0 for r below 1; nan where r is not allowed."""
    return ((_allowed(r) - 1).clamp(min=0) * logits.exp()).floor()


def closed_kl(r_q: Tensor, l_q: Tensor, r_p: Tensor, l_p: Tensor) -> tuple[Tensor, ...]:
    """Return the KL without its integral J, and the derivatives of that in r_q, l_q, r_p and l_p."""
    odds = l_q.exp()
    # log of (r sigma(l)) for q over p; without cancellation at large logits
    mean_coefficient = torch.log(r_q / r_p) + softplus_difference(-l_p, -l_q)
    mean = r_q * odds
    return (
        mean * mean_coefficient - r_q * softplus_difference(l_q, l_p) + (r_p - r_q) * softplus(l_p),
        odds * mean_coefficient + odds - softplus(l_q),
        mean * mean_coefficient,
        softplus(l_p) - mean / r_p,
        (r_p * l_p.exp() - mean) * torch.sigmoid(-l_p),
    )


def at_edges(
    formula: Callable[..., tuple[Tensor, ...]], r_q: Tensor, l_q: Tensor, r_p: Tensor, l_p: Tensor
) -> tuple[Tensor, ...]:
    """Return the KL and its derivatives in r_q, l_q, r_p and l_p, by a formula where all parameters are ordinary.

    Where q or p is the point 0, the KL is -log p(0), infinite or 0. It is nan where there is no distribution.
    """
    sides = (r_q, l_q), (r_p, l_p)
    q_is_0, p_is_0 = ((r == 0) | (logits == -torch.inf) for r, logits in sides)
    q_wrong, p_wrong = (~((r >= 0) & (r < torch.inf) & (logits < torch.inf)) for r, logits in sides)
    wrong = q_wrong | p_wrong
    edge = wrong | q_is_0 | p_is_0
    inside = [torch.where(edge, 1.0, x) for side in sides for x in side]
    from_0 = q_is_0 & ~p_is_0  # -log p(0) = r_p softplus(l_p)
    kl = torch.where(from_0, r_p * softplus(l_p), torch.where(q_is_0, 0.0, torch.inf))
    d_rp, d_lp = torch.where(from_0, softplus(l_p), 0.0), torch.where(from_0, r_p * torch.sigmoid(l_p), 0.0)
    zero = torch.zeros_like(kl)
    at_edge = [x.masked_fill(wrong, torch.nan).to(r_q.dtype) for x in (kl, zero, zero, d_rp, d_lp)]
    return tuple(torch.where(edge, there, here) for there, here in zip(at_edge, formula(*inside), strict=True))


def shared_kl(r: Tensor, l_q: Tensor, l_p: Tensor) -> tuple[Tensor, ...]:
    """Return the KL of two negative binomials with one r, and its derivatives in r, l_q and l_p."""
    kl, _, d_lq, d_r, d_lp = at_edges(_ordinary_shared_value, r, l_q, r, l_p)
    return kl, d_r, d_lq, d_lp


def _ordinary_shared_value(r: Tensor, l_q: Tensor, _: Tensor, l_p: Tensor) -> tuple[Tensor, ...]:
    d_r, d_lq, d_lp = _ordinary_shared_gradient(r, l_q, l_p)
    return r * d_r, d_r, d_lq, d_r, d_lp


def _ordinary_shared_gradient(r: Tensor, l_q: Tensor, l_p: Tensor) -> tuple[Tensor, ...]:
    odds = l_q.exp()
    mean_coefficient = softplus_difference(-l_p, -l_q)
    return (
        odds * mean_coefficient - softplus_difference(l_q, l_p),
        r * odds * mean_coefficient,
        r * (l_p.exp() - odds) * torch.sigmoid(-l_p),
    )
