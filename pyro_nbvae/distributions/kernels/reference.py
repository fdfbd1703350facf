r"""Every kernel in operations of PyTorch: what the compiled ones are compared with, and what runs where none exists.

All are computed in double precision, except sums over windows and log masses, which are computed in that of their
arguments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_nbvae.distributions import windows
from pyro_nbvae.distributions.families import com_poisson, negative_binomial, poisson
from pyro_nbvae.distributions.special import digamma_difference, softplus_difference

# Arrivals are drawn up to the first one after 1 + TAIL * temperature. Later arrivals add their conditional mean to a
# sigmoid count (the variance that this neglects is below 2e-4 of the rate at temperature 1) and nothing to a smoothstep
# count.
TAIL = {"sigmoid": 4.0, "smoothstep": 1.0}
# Largest mean count that arrivals and Gumbel races are drawn for, and largest number of counts of an inversion: counts
# above it are not exact in single precision, and each takes as many steps.
LARGEST = float(1 << 24)


# --- noise ----------------------------------------------------------------------------------------------------------


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right as if the numbers had no sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Mixing function of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shifted(x, 31)


def exponentials(seed: int, element: Tensor, k: Tensor) -> Tensor:
    """Return the k-th Exponential(1) draws of elements, in double precision; the arguments broadcast."""
    golden = 0x9E3779B97F4A7C15 - (1 << 64)
    bits = _mix(_mix(seed + element.long() * golden) + k.long() * golden)
    # with one bit more it could round to 1
    return -((_shifted(bits, 12).double() + 0.5) * 2.0**-52).log()


# --- draws ----------------------------------------------------------------------------------------------------------


def _draw(
    draw: Callable[..., list[Tensor]], outputs: int, fine: Tensor, zero: Tensor, width: Tensor, *arguments: Tensor
) -> list[Tensor]:
    """Return the outputs of ``draw(element, *arguments)`` in double precision, chunk by chunk.

    An element has ``width`` numbers. Where it is not fine, the result is 0 if the count is surely 0, and else nan.
    """
    if not len(fine):
        return [torch.empty_like(arguments[0])] * outputs
    own = [torch.where(fine, a, 1.0).double() for a in arguments]
    element = torch.arange(len(fine), device=fine.device)
    widest = int(torch.where(fine, width, 1.0).max()) + 1
    parts = [draw(*(x[chunk] for x in (element, *own))) for chunk in windows.chunks(len(fine), widest, fine.device)]
    fill = torch.where(zero, 0.0, math.nan)
    return [torch.where(fine, torch.cat(part), fill).to(arguments[0].dtype) for part in zip(*parts, strict=True)]


def arrivals(
    seed: Tensor, temperature: Tensor, r: Tensor | None, logits: Tensor, indicator: str, straight_through: bool
) -> list[Tensor]:
    """Draw relaxed counts by arrival times, with their derivatives in r and in the logits.

    S_k is the sum of E_j / (r + j) over j <= k, u_k = e^-l (e^S_k - 1); without r, u_k is e^-l times the sum of E_j,
    a Poisson process of rate e^l. The relaxed count is the sum of h((1 - u_k) / temperature).

    Args:
        seed: of the noise, one number.
        temperature: one number, or (n,).
        r: dispersions, (n,), or None for a Poisson process.
        logits: l, (n,); the log rate for a Poisson process.
        indicator: ``"sigmoid"`` or ``"smoothstep"``.
        straight_through: return the integers #{u_k < 1}, with the derivatives of the relaxed counts.

    Returns:
        The counts, and their derivatives in r (if it is given) and in l. They are 0 where the rate is 0, and nan where
        there is none or it is above ``LARGEST``.
    """

    def draw(element: Tensor, tau: Tensor, *given: Tensor) -> list[Tensor]:
        drawn_at_once, end = 16, 1 + TAIL[indicator] * tau
        with torch.enable_grad():
            own = [p.detach().requires_grad_() for p in given]
            inverse = torch.exp(-own[-1].clamp(-80.0, 80.0))
            waiting, u = own[0].clamp(min=1e-15), inverse[None] * 0
            while bool((u[-1] < end).any()):
                k = torch.arange(drawn_at_once, device=element.device)[:, None]
                gaps = exponentials(number, element, k)
                clock = gaps.cumsum(0) if r is None else (gaps / (waiting + k)).cumsum(0).clamp(max=700).expm1()
                u, drawn_at_once = (clock * inverse).clamp(max=1e30), 2 * drawn_at_once
            drawn = (u < end).sum(0)
            x = (1 - u) / tau
            h = x.sigmoid() if indicator == "sigmoid" else 0.5 + x.clamp(-1, 1) * (0.75 - 0.25 * x.clamp(-1, 1) ** 2)
            z = torch.where(k <= drawn, h, 0.0).sum(0)
            if indicator == "sigmoid":  # the mean contribution of the arrivals after the last one drawn
                last = u.gather(0, drawn[None])[0]
                rate = 1 / inverse if r is None else (waiting + drawn + 1) / (inverse + last)
                z = z + rate * tau * softplus((1 - last) / tau)
            derivatives = torch.autograd.grad(z.sum(), own)
        return [(u < 1).sum(0).double() if straight_through else z.detach(), *derivatives]

    number, temperature = int(seed), temperature.expand(len(logits))
    parameters = [logits] if r is None else [r, logits]
    rate = functools.reduce(torch.mul, parameters[:-1], logits.exp())
    latest = rate * (1 + TAIL[indicator] * temperature)
    return _draw(draw, 1 + len(parameters), (rate > 0) & (rate <= LARGEST), rate == 0, latest, temperature, *parameters)


def races(
    seed: Tensor, temperature: Tensor, log_rate: Tensor, first: Tensor, last: Tensor, straight_through: bool
) -> list[Tensor]:
    """Draw relaxed counts by Gumbel-softmax, with their derivative in the log rate.

    z = sum_k k w_k, w = softmax((log Poisson(k; rate) - log E_k) / temperature), with unit exponentials E_k. For fixed
    E_k, dz / d(log rate) is the variance of k under w, divided by the temperature.

    Args:
        seed: of the noise, one number.
        temperature: one number, or (n,).
        log_rate: (n,).
        first, last: the first and the last count of each element, (n,).
        straight_through: return the arg max, with the derivative of the relaxed count.

    Returns:
        The counts and the derivative. They are 0 where the rate is 0, and nan where there is none or it is above
        ``LARGEST``.
    """

    def draw(element: Tensor, a: Tensor, low: Tensor, high: Tensor, tau: Tensor) -> list[Tensor]:
        steps = torch.arange(int((high - low).max()) + 1 if len(a) else 1, device=a.device)[:, None]
        k = low + steps
        score = (k * a - torch.lgamma(k + 1) - exponentials(number, element, steps).log()) / tau
        weight = score.masked_fill(k > high, -torch.inf).softmax(0)
        mean = (weight * k).sum(0)
        slope = (weight * (k - mean).square()).sum(0) / tau
        return [low + weight.argmax(0) if straight_through else mean, slope]

    number, temperature, rate = int(seed), temperature.expand(len(log_rate)), log_rate.exp()
    fine = (rate > 0) & (rate <= LARGEST)
    return _draw(draw, 2, fine, rate == 0, last - first, log_rate, first, last, temperature)


# The recurrence begins at a count whose mass is about exp(-START), and ends beyond the mean where the masses that are
# left, about q_k (1 + e^l), are below exp(-END).
START = {torch.float32: 16.0, torch.float64: 40.0}
END = {torch.float32: 21.0, torch.float64: 42.0}


def negative_binomial_integers(r: Tensor, logits: Tensor, uniform: Tensor) -> list[Tensor]:
    r"""Draw negative binomial counts by inversion, with their derivatives in r and in the logits.

    Masses and scores in r follow from recurrences,

    .. math:: q_{k+1} = q_k \frac{(r + k)\,\sigma(l)}{k + 1}, \qquad T_{k+1} = T_k + \frac{1}{r + k}, \qquad
        T_0 = \log \sigma(-l), \quad E[T] = 0,

    and :math:`dz / dr = -(\sum_{k<z} q_k T_k + \tfrac12 q_z T_z) / q_z`.

    Args:
        r, logits: (n,).
        uniform: uniform numbers in (0, 1) that determine the counts, (n,).

    Returns:
        The counts and their derivatives; nan where r is negative, a parameter is nan, or more than ``LARGEST`` counts
        would have to be summed.
    """
    start, end = START[r.dtype], math.exp(-END[r.dtype])

    def draw(_: Tensor, r: Tensor, logits: Tensor, u: Tensor) -> list[Tensor]:
        mean, success, r = r * logits.exp(), torch.sigmoid(logits), r.clamp(min=1e-300)
        k = (mean - torch.sqrt(2 * start * mean * (1 + logits.exp()))).clamp(min=0).floor()
        mass = negative_binomial.log_prob(k, r, logits).exp()
        score = torch.where(k > 0, torch.digamma(k + r) - torch.digamma(r), 0.0) - softplus(logits)
        z, d_r, below, moment = (torch.zeros_like(r) for _ in range(4))
        index, a, p, m, width = torch.arange(len(r), device=r.device), r, success, mean, 2
        while len(index):
            # far in the tail, where the sum of the masses no longer grows, an element is done at once
            u = u.masked_fill((mass < end * (1 - p)) & (k > m), 0)
            count = k + torch.arange(width, device=r.device)[:, None]
            masses = torch.cat([mass[None], (count + a) * p / (count + 1)]).cumprod(0)
            scores = torch.cat([score[None], 1 / (count + a)]).cumsum(0)
            sums = masses[:-1].cumsum(0) + below
            steps = (sums < u).sum(0)
            moments = torch.cat([moment[None], moment + (masses * scores)[:-1].cumsum(0)])
            at, step = steps.clamp(max=width - 1)[None], steps[None]
            q, t = (x.gather(0, at)[0] for x in (masses, scores))
            z[index], d_r[index] = k + steps, -(moments.gather(0, step)[0] / q + 0.5 * t)
            left = (steps == width).nonzero()[:, 0]
            index, a, p, m, u, k, mass, score, below, moment = (
                x[left] for x in (index, a, p, m, u, k + width, masses[-1], scores[-1], sums[-1], moments[-1])
            )
            width = min(2 * width, max(2, windows.elements_per_chunk(len(index), r.device)))
        return [z, d_r, 0.5 * (z + (z + r) * success)]

    odds = logits.exp()
    half_width = torch.sqrt(2 * start * r * odds * (1 + odds)) + 1 + odds
    fine = (r >= 0) & (half_width <= LARGEST)
    return _draw(draw, 3, fine, torch.zeros_like(fine), torch.full_like(r, 2.0), r, logits, uniform)


def com_poisson_integers(rate: Tensor, nu: Tensor, uniform: Tensor) -> list[Tensor]:
    """Draw Conway-Maxwell-Poisson counts by inversion, with their derivatives: :func:`windows.invert`.

    Args:
        rate, nu: (n,).
        uniform: uniform numbers in (0, 1) that determine the counts, (n,).
    """
    return windows.invert(com_poisson, [rate, nu], uniform)


# --- moments and divergences -----------------------------------------------------------------------------------------


def _expected(family: Any, integrand: Any, own: list[Tensor], *rest: Tensor) -> list[Tensor]:
    return windows.expectation(family, integrand, own, rest, torch.arange(len(own[0]), device=own[0].device))


def com_poisson_mean(rate: Tensor, nu: Tensor) -> list[Tensor]:
    """Return the mean of a Conway-Maxwell-Poisson and its derivatives, (n,) each."""
    return _expected(com_poisson, windows.Count, [rate, nu])


def com_poisson_variance(rate: Tensor, nu: Tensor) -> list[Tensor]:
    """Return the variance of a Conway-Maxwell-Poisson and its derivatives, (n,) each."""
    return windows.variance(com_poisson, [rate, nu])


def com_poisson_entropy(rate: Tensor, nu: Tensor) -> list[Tensor]:
    """Return the entropy of a Conway-Maxwell-Poisson and its derivatives, (n,) each."""
    return _expected(com_poisson, windows.Surprise, [rate, nu])


def negative_binomial_entropy(r: Tensor, logits: Tensor) -> list[Tensor]:
    """Return the entropy of a negative binomial and its derivatives, (n,) each."""
    return _expected(negative_binomial, windows.Surprise, [r, logits])


def com_poisson_log_normalizer(rate: Tensor, nu: Tensor) -> list[Tensor]:
    """Return the log of the sum of the weights of a Conway-Maxwell-Poisson and its derivatives, (n,) each."""
    return windows.log_normalizer(com_poisson, [rate, nu])


def negative_binomial_log_mass(count: Tensor, r: Tensor, logits: Tensor) -> list[Tensor]:
    """Return the log mass of a count and its derivatives in the three arguments, (n,) each; counts may be reals."""
    own = count, r, logits
    return [*negative_binomial.log_prob_value(*own), *negative_binomial.log_prob_gradient(*own, [True] * 3)]  # type: ignore[list-item]


def poisson_log_mass(count: Tensor, rate: Tensor) -> list[Tensor]:
    """Return the log mass of a count and its derivatives in both arguments, (n,) each; counts may be reals."""
    return [*poisson.log_prob_value(count, rate), *poisson.log_prob_gradient(count, rate, [True] * 2)]  # type: ignore[list-item]


_LOG_Q_OVER_NEGATIVE_BINOMIAL = windows.LogQOverP(negative_binomial)


def com_poisson_kl(rate: Tensor, nu: Tensor, r: Tensor, logits: Tensor) -> list[Tensor]:
    """Return the KL of a Conway-Maxwell-Poisson to a negative binomial and its derivatives, (n,) each.

    Args:
        rate, nu: of q, (n,).
        r, logits: of p, (n,).
    """
    return _expected(com_poisson, _LOG_Q_OVER_NEGATIVE_BINOMIAL, [rate, nu], r, logits)


# Steps of Newton's method in the largest number of elements whose counts are listed at once, and in a mass of
# exp(-NATS) outside of these counts.
_NEWTON_STEPS, _LISTED, _LISTED_NATS = 60, 1 << 12, 45.0


def com_poisson_counts(theta: Tensor, nu: Tensor) -> Tensor:
    """Return counts that have all but e^-45 of the mass of Conway-Maxwell-Poissons, (..., counts) in float64.

    Args:
        theta: log lambda, (n,).
        nu: (n,).
    """
    if not len(theta):
        return theta.new_zeros(1)
    low, high = com_poisson.window(_LISTED_NATS, (theta / nu).detach().exp(), nu.detach())
    return torch.arange(max(0.0, float(low.min())), float(high.max()) + 2, dtype=theta.dtype, device=theta.device)


def com_poisson_moments(theta: Tensor, nu: Tensor) -> list[Tensor]:
    """Return log Z, mean, variance, E[log k!] and Cov(k, log k!) of lambda^k / (k!)^nu, differentiable, (n,) each."""
    k = com_poisson_counts(theta, nu)
    x = torch.lgamma(k + 1)
    log_weight = theta[:, None] * k - nu[:, None] * x
    p = log_weight.softmax(-1)
    mean, of_x = (p * k).sum(-1), (p * x).sum(-1)
    from_mean = k - mean[:, None]
    variance, covariance = (p * from_mean.square()).sum(-1), (p * from_mean * x).sum(-1)
    return [log_weight.logsumexp(-1), mean, variance, of_x, covariance]


def _log_lambda(log_mean: Tensor, nu: Tensor) -> Tensor:
    """Return log lambda for a mean, (n,), by Newton's method between bounds that are known to enclose it."""
    mean = log_mean.exp()
    near = mean + (nu - 1) / (2 * nu)
    low, high = torch.full_like(mean, -torch.inf), nu * (mean + 2).log()  # the mean is above lambda^(1 / nu) - 1
    theta = torch.where(near > 1, nu * near.clamp_min(1).log(), log_mean).minimum(high)
    for _ in range(_NEWTON_STEPS):
        _, found, variance, _, _ = com_poisson_moments(theta, nu)
        error = found.log() - log_mean
        low, high = torch.where(error > 0, low, theta), torch.where(error > 0, theta, high)
        step = error * found / variance
        after = theta - step
        bisected = torch.where((high - low).isfinite(), 0.5 * (low + high), theta - step.clamp(-1, 1))
        after = torch.where((low < after) & (after < high), after, bisected)
        done = step.abs() <= 1e-13 * (1 + theta.abs())
        theta = torch.where(done, theta, after)
        if bool(done.all()):
            break
    return theta


def com_poisson_log_lambda(log_mean: Tensor, log_nu: Tensor) -> list[Tensor]:
    """Return log lambda of the Conway-Maxwell-Poissons with these means, and its derivatives in both, (n,) each."""
    pieces = []
    for a, b in zip(log_mean.split(_LISTED), log_nu.split(_LISTED), strict=True):
        nu = b.exp()
        theta = _log_lambda(a, nu)
        _, _, variance, _, covariance = com_poisson_moments(theta, nu)
        pieces.append([theta, a.exp() / variance, nu * covariance / variance])
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)] if pieces else [log_mean.clone() for _ in range(3)]


def com_poisson_log_mass(count: Tensor, log_mean: Tensor, log_nu: Tensor) -> list[Tensor]:
    """Return the log mass of a count, and its derivatives in the three arguments, (n,) each.

    Args:
        count: (n,), float64, as the others.
        log_mean, log_nu: of the Conway-Maxwell-Poisson.
    """
    pieces = []
    for k, a, b in zip(*(t.split(_LISTED) for t in (count, log_mean, log_nu)), strict=True):
        nu, mean = b.exp(), a.exp()
        theta = _log_lambda(a, nu)
        log_z, _, variance, of_x, covariance = com_poisson_moments(theta, nu)
        x = torch.lgamma(k + 1)
        of_nu = (k - mean) * covariance / variance - (x - of_x)
        own = [k * theta - nu * x - log_z, theta - nu * torch.digamma(k + 1)]
        pieces.append([*own, mean * (k - mean) / variance, nu * of_nu])
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)] if pieces else [count.clone() for _ in range(4)]


def com_poisson_kl_by_table(
    rate: Tensor, nu: Tensor, log_q_over_p: windows.LogQOverP, arguments: list[Tensor], table_row: Tensor
) -> list[Tensor]:
    """Return E[log q - log p] of a Conway-Maxwell-Poisson q and its derivatives in q's and in p's parameters.

    Args:
        rate, nu: of q, (n,).
        log_q_over_p: the integrand, which has log p.
        arguments: of the integrand, (rows,) each.
        table_row: for each element its index in the arguments, (n,).
    """
    return windows.expectation(com_poisson, log_q_over_p, [rate, nu], arguments, table_row)


def negative_binomial_log_q_over_p(*samples_and_parameters: Tensor) -> list[Tensor]:
    """Return the sum over samples of log NB(z; r_q, l_q) - log NB(z; r_p, l_p), and its derivatives.

    Args:
        *samples_and_parameters: the samples z, any number, then r_q, l_q, r_p and l_p, (n,) each.

    Returns:
        The sum, and its derivatives in each of the arguments, (n,) each.
    """
    *samples, r_q, l_q, r_p, l_p = samples_and_parameters
    z = torch.stack(samples, dim=1)
    q, p = [x[:, None] for x in (r_q, l_q)], [x[:, None] for x in (r_p, l_p)]
    value = negative_binomial.log_prob(z, *q) - negative_binomial.log_prob(z, *p)
    d_z = digamma_difference(z, q[0], p[0]) + softplus_difference(-p[1], -q[1])
    of_q, of_p = negative_binomial.scores(z, *q), negative_binomial.scores(z, *p)
    return [value.sum(1), *d_z.unbind(1), *(t.sum(1) for t in of_q), *(-t.sum(1) for t in of_p)]


# Quadrature: trapezoidal rule in v with t = exp(c + v - exp(-v)), a map that is double exponential at both ends. The
# nodes go left from v where v - exp(-v) = 1; c depends on the element, so that all elements share exp(v - exp(-v)).
RIGHT = 1.2784645427610738


class Rule(NamedTuple):
    """A quadrature rule, and the elements that it is accurate enough for.

    Args:
        tail: what is neglected at the right end, relative to the mean.
        step, nodes: distance and number of nodes; a number that a processor's vectors divide.
        log_range: largest log of an r, of a mean and of 1 / r.
        log_dispersion_ratio: largest log of the ratio of the r, in absolute value (a guide's is at most 5).
    """

    tail: float
    step: float
    nodes: int
    log_range: float
    log_dispersion_ratio: float

    def table(self) -> np.ndarray:
        """exp(v - exp(-v)), and the weights of dt / t, (2, nodes)."""
        v = RIGHT - self.step * (np.arange(self.nodes) + 0.5)
        return np.stack([np.exp(v - np.exp(-v)), self.step * (1 + np.exp(-v))])

    def serves(self, r_q: Tensor, l_q: Tensor, r_p: Tensor, l_p: Tensor) -> Tensor:
        """Where the rule is fine enough: its error grows with the means, with 1 / r and with the ratio of the r."""
        log_q, log_p = r_q.log(), r_p.log()
        largest = torch.maximum(log_q + l_q.clamp(min=0), log_p + l_p.clamp(min=0))
        smallest = torch.minimum(log_q, log_p)
        within = torch.maximum(largest, -smallest) <= self.log_range
        return within & ((log_q - log_p).abs() <= self.log_dispersion_ratio)


# By precision of the result, coarse to fine: an element takes the first that serves it. All are computed in double.
_FINEST = Rule(1e-16, 0.0168, 440, math.inf, math.inf)
RULES = {
    torch.float32: (Rule(1e-8, 0.13, 32, 5.7, 2.0), Rule(1e-8, 0.07, 64, 9.3, 5.5), _FINEST),
    torch.float64: (Rule(1e-10, 0.1, 48, 5.7, 2.0), Rule(1e-10, 0.06, 80, 9.3, 5.5), _FINEST),
}


def by_rule(rule: Rule, r_q: Tensor, l_q: Tensor, r_p: Tensor, l_p: Tensor) -> tuple[Tensor, ...]:
    """Return the KL and its derivatives by a rule, in differentiable operations.

    With s = e^-t, G(s) = (1 + e^l_q (1 - s))^-r_q and m = r_q e^l_q, the integral J over t has the integrand
    [m - (1 - G(s)) / (1 - s)] (e^(-r_q t) - e^(-r_p t)) / t.
    """
    value, d_rq, d_lq, d_rp, d_lp = negative_binomial.closed_kl(r_q, l_q, r_p, l_p)
    mean, odds = r_q * l_q.exp(), l_q.exp()
    nodes, weight = torch.as_tensor(rule.table(), device=r_q.device).reshape(2, -1, *(1 for _ in r_q.shape))
    # right of the last, exp(c + 1), the integrand is below m e^(-min(r) t)
    last = ((torch.log1p(mean) - math.log(rule.tail)) / torch.minimum(r_q, r_p)).detach()
    t = nodes * (last / math.e).clamp(min=1e-100)
    # (nodes, *shape) from here on
    one_minus_s = -torch.expm1(-t)  # 1 - s
    increase = odds * one_minus_s
    exponent = torch.log1p(increase)
    one_minus_g = -torch.expm1(-r_q * exponent)  # 1 - G
    bracket = mean - one_minus_g / one_minus_s
    from_q, from_p = weight * torch.exp(-r_q * t), weight * torch.exp(-r_p * t)
    difference = from_q - from_p
    g_difference, total = (1 - one_minus_g) * difference, difference.sum(0)
    return (
        (value + (bracket * difference).sum(0)).clamp(min=0),  # rounding may leave less than 0
        d_rq + odds * total - (exponent * g_difference / one_minus_s).sum(0) - (t * bracket * from_q).sum(0),
        d_lq + mean * (total - (g_difference / (1 + increase)).sum(0)),
        d_rp + (t * bracket * from_p).sum(0),
        d_lp,
    )


def _kl_by_rules(*parameters: Tensor) -> tuple[Tensor, ...]:
    """Return the KL of two negative binomials and its derivatives, in differentiable operations."""

    def ordinary(*parameters: Tensor) -> tuple[Tensor, ...]:
        dtype = parameters[0].dtype
        parameters = tuple(x.double() for x in parameters)
        _, usual, finest = RULES[torch.float64]
        extreme = ~usual.serves(*parameters)
        found = by_rule(usual, *parameters)
        if bool(extreme.any()):
            fine = by_rule(finest, *(x[extreme] for x in parameters))
            found = tuple(part.masked_scatter(extreme, one) for part, one in zip(found, fine, strict=True))
        return tuple(part.to(dtype) for part in found)

    return negative_binomial.at_edges(ordinary, *parameters)


class _KLOfChunk(torch.autograd.Function):
    """:func:`_kl_by_rules`, of which autograd keeps the parameters only, and not the nodes: it computes them twice."""

    @staticmethod
    def forward(*parameters: Tensor) -> tuple[Tensor, ...]:
        return _kl_by_rules(*parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            own = [p.detach().requires_grad_() for p in ctx.saved_tensors]
            found = _kl_by_rules(*own)
        return torch.autograd.grad(found, own, gradients)


def negative_binomial_kl(r_q: Tensor, l_q: Tensor, r_p: Tensor, l_p: Tensor) -> list[Tensor]:
    """Return the KL of two negative binomials and its derivatives in the four parameters, (n,) each.

    It is computed in chunks, and differentiable once.
    """
    nodes = RULES[torch.float64][1].nodes
    parts = [
        _KLOfChunk.apply(*(x[chunk] for x in (r_q, l_q, r_p, l_p)))
        for chunk in windows.chunks(len(r_q), nodes, r_q.device)
    ]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def shared_dispersion_kl(r: Tensor, l_q: Tensor, l_p: Tensor) -> list[Tensor]:
    """Return the KL of two negative binomials with one r, and its derivatives in the three parameters, (n,) each."""
    return list(negative_binomial.shared_kl(r, l_q, l_p))


def poisson_kl(rate_q: Tensor, rate_p: Tensor) -> list[Tensor]:
    """Return the KL of two Poissons and its derivatives in both rates, (n,) each."""
    return list(poisson.kl(rate_q, rate_p))
