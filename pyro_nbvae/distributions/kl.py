r"""Kullback-Leibler divergences between counts, in closed form or by quadrature.

For two negative binomials with dispersions r and logits l, with :math:`m = r e^l` and
:math:`A = \mathrm{softplus}(l_q) - \mathrm{softplus}(l_p)`,

.. math:: KL = m_q \log\frac{r_q \sigma(l_q)}{r_p \sigma(l_p)} - r_q A + (r_p - r_q)\,\mathrm{softplus}(l_p) + J,

where :math:`J` is 0 if the dispersions are equal and a one-dimensional integral otherwise,

.. math:: J = \int_0^\infty \Big[ m_q - \frac{1 - G(e^{-t})}{1 - e^{-t}} \Big] (e^{-r_q t} - e^{-r_p t}) \frac{dt}{t},
    \qquad G(s) = (1 + e^{l_q} (1 - s))^{-r_q}.

See also: docs/mathematics.md, section 3 (Kullback–Leibler divergences).
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_nbvae.distributions import special
from pyro_nbvae.distributions.elementwise import Wanted, elementwise, unexpanded
from pyro_nbvae.distributions.special import (
    digamma_difference,
    log_quotient,
    log_ratio,
    softplus_difference,
)
from pyro_nbvae.distributions.threads import compiled, in_pieces, is_compiled_for, unsplit

# Quadrature: trapezoidal rule in v with t = exp(c + v - exp(-v)), a map that is double exponential at both ends. The
# nodes go left from v where v - exp(-v) = 1; c depends on the element, so that all elements share exp(v - exp(-v)).
_RIGHT = 1.2784645427610738


class Rule(NamedTuple):
    """A rule, and the elements that it serves.

    Args:
        tail: what is neglected at the right end, relative to the mean.
        step, nodes: distance and number of nodes; a number that a processor's vectors divide.
        reach: largest log of an r, of a mean and of 1 / r.
        ratio: largest log of the ratio of the r, in absolute value (a guide's is at most 5).
    """

    tail: float
    step: float
    nodes: int
    reach: float
    ratio: float

    @functools.cache  # noqa: B019 - of a few rules, which live as long as the module
    def table(self) -> np.ndarray:
        """exp(v - exp(-v)), and the weights of dt / t, (2, nodes)."""
        v = _RIGHT - self.step * (np.arange(self.nodes) + 0.5)
        return np.stack([np.exp(v - np.exp(-v)), self.step * (1 + np.exp(-v))])

    def serves(self, r_q: Tensor, l_q: Tensor, r_p: Tensor, l_p: Tensor) -> Tensor:
        """Where the rule is fine enough: its error grows with the means, with 1 / r and with the ratio of the r."""
        log_q, log_p = r_q.log(), r_p.log()
        largest = torch.maximum(log_q + l_q.clamp(min=0), log_p + l_p.clamp(min=0))
        smallest = torch.minimum(log_q, log_p)
        return (torch.maximum(largest, -smallest) <= self.reach) & ((log_q - log_p).abs() <= self.ratio)


# By precision of the result, coarse to fine: an element takes the first that serves it. All are computed in double.
_FINEST = Rule(1e-16, 0.0168, 440, math.inf, math.inf)
_RULES = {
    torch.float32: (Rule(1e-8, 0.13, 32, 5.7, 2.0), Rule(1e-8, 0.07, 64, 9.3, 5.5), _FINEST),
    torch.float64: (Rule(1e-10, 0.1, 48, 5.7, 2.0), Rule(1e-10, 0.06, 80, 9.3, 5.5), _FINEST),
}


def _abscissas(rule: Rule, r_q: Tensor, r_p: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Abscissas t, (nodes, *shape), and their weights, (nodes, 1, ...)."""
    table = torch.as_tensor(rule.table(), dtype=r_q.dtype, device=r_q.device)
    nodes, weight = table.reshape(2, -1, *(1 for _ in r_q.shape)).unbind()
    # right of the last, exp(c + 1), the integrand is below m e^(-min(r) t)
    last = (torch.log1p(mean) - math.log(rule.tail)) / torch.minimum(r_q, r_p)
    return nodes * (last / math.e).clamp(min=1e-100), weight


def _dispersion_integral(
    rule: Rule, r_q: Tensor, l_q: Tensor, r_p: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """J and its derivatives in r_q, l_q and r_p, from one set of exponentials."""
    t, weight = _abscissas(rule, r_q, r_p, mean)
    # (nodes, *shape) from here on, in place
    odds = l_q.exp()
    gone = torch.expm1(-t).neg_()  # 1 - s
    grown = odds * gone
    exponent = torch.log1p(grown)
    lost = torch.expm1(exponent * -r_q).neg_()  # 1 - G
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


def _integral_gradient(r_q: Tensor, l_q: Tensor, r_p: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives of J in r_q, l_q and r_p by a rule of double precision, in differentiable operations."""
    _, usual, finest = _RULES[torch.float64]
    rule = usual if bool(usual.serves(r_q, l_q, r_p, torch.zeros_like(l_q)).all()) else finest
    t, weight = _abscissas(rule, *(x.detach() for x in (r_q, r_p, mean)))
    gone = -torch.expm1(-t)  # 1 - s
    grown = l_q.exp() * gone
    exponent = torch.log1p(grown)
    lost = -torch.expm1(-r_q * exponent)  # 1 - G
    bracket = mean - lost / gone
    from_q, from_p = weight * torch.exp(-r_q * t), weight * torch.exp(-r_p * t)
    difference = from_q - from_p
    kept = (1 - lost) * difference
    total = difference.sum(0)
    d_rq = l_q.exp() * total - (exponent * kept / gone).sum(0) - (t * bracket * from_q).sum(0)
    d_lq = mean * (total - (kept / (1 + grown)).sum(0))
    return d_rq, d_lq, (t * bracket * from_p).sum(0)


def _closed_gradient(r_q: Tensor, l_q: Tensor, r_p: Tensor, l_p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives of the KL without J, in the four parameters."""
    odds = l_q.exp()
    gain = torch.log(r_q / r_p) + softplus_difference(-l_p, -l_q)
    mean = r_q * odds
    return (
        odds * gain + odds - softplus(l_q),
        mean * gain,
        softplus(l_p) - mean / r_p,
        (r_p * l_p.exp() - mean) * torch.sigmoid(-l_p),
    )


def _at_edges(
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


def _exact_value(r_q: Tensor, l_q: Tensor, r_p: Tensor, l_p: Tensor) -> tuple[Tensor, ...]:
    if not is_compiled_for(r_q):
        return _at_edges(_value_by_operations, r_q, l_q, r_p, l_p)
    outputs = [torch.empty(r_q.shape, dtype=r_q.dtype) for _ in range(5)]
    arrays = [x.contiguous().reshape(-1) for x in (r_q, l_q, r_p, l_p, *outputs)]
    rules = _RULES[r_q.dtype]
    tail, _, _, reach, ratio = map(np.array, zip(*rules, strict=True))
    options = tuple(rule.table() for rule in rules), tuple(np.log(tail).tolist()), reach, ratio
    in_pieces(compiled().negative_binomial_kl, r_q.numel(), *arrays, options=options)
    return tuple(outputs)


def _value_by_operations(*parameters: Tensor) -> tuple[Tensor, ...]:
    """The same as the compiled loop, in operations of PyTorch, for a GPU; without the coarse rule."""
    dtype = parameters[0].dtype
    _, usual, finest = _RULES[dtype]
    parameters = tuple(x.double() for x in parameters)
    extreme = ~usual.serves(*parameters)
    parts = _value_by(usual, *parameters)
    if bool(extreme.any()):
        for part, fine in zip(parts, _value_by(finest, *(x[extreme] for x in parameters)), strict=True):
            part[extreme] = fine
    return tuple(part.to(dtype) for part in parts)


def _value_by(rule: Rule, r_q: Tensor, l_q: Tensor, r_p: Tensor, l_p: Tensor) -> tuple[Tensor, ...]:
    mean = r_q * l_q.exp()
    # log of (r sigma(l)) for q over p; without cancellation at large logits
    gain = torch.log(r_q / r_p) + softplus_difference(-l_p, -l_q)
    value = mean * gain - r_q * softplus_difference(l_q, l_p) + (r_p - r_q) * softplus(l_p)
    d_rq, d_lq, d_rp, d_lp = _closed_gradient(r_q, l_q, r_p, l_p)
    for total, part in zip((value, d_rq, d_lq, d_rp), _dispersion_integral(rule, r_q, l_q, r_p, mean), strict=True):
        total += part
    return value.clamp_(min=0), d_rq, d_lq, d_rp, d_lp  # rounding may leave less than 0


def _exact_gradient(r_q: Tensor, l_q: Tensor, r_p: Tensor, l_p: Tensor, wanted: Wanted) -> tuple[Tensor, ...]:
    return _at_edges(_ordinary_gradient, r_q, l_q, r_p, l_p)[1:]


def _ordinary_gradient(r_q: Tensor, l_q: Tensor, r_p: Tensor, l_p: Tensor) -> tuple[Tensor, ...]:
    dtype, (r_q, l_q, r_p, l_p) = r_q.dtype, (x.double() for x in (r_q, l_q, r_p, l_p))
    d_rq, d_lq, d_rp, d_lp = _closed_gradient(r_q, l_q, r_p, l_p)
    j_rq, j_lq, j_rp = _integral_gradient(r_q, l_q, r_p, r_q * l_q.exp())
    return tuple(d.to(dtype) for d in (torch.zeros_like(d_rq), d_rq + j_rq, d_lq + j_lq, d_rp + j_rp, d_lp))


_exact_kl = elementwise("negative_binomial_kl", _exact_value, _exact_gradient)


def negative_binomial_kl(r_q: Tensor, l_q: Tensor, r_p: Tensor, l_p: Tensor) -> Tensor:
    r"""KL(NB(r_q, l_q) || NB(r_p, l_p)) in nats, elementwise.

    .. math:: KL = \sum_z q(z) \log\frac{q(z)}{p(z)}, \qquad q = \mathrm{NB}(r_q, l_q), \quad p = \mathrm{NB}(r_p, l_p)

    It is computed by quadrature (:mod:`pyro_nbvae.distributions.kl`). If r_q and r_p are the same quantity, use the
    closed form :func:`shared_dispersion_kl`.

    The error is below 1e-8 * max(1, KL) in float64 and 2e-5 * max(1, KL) in float32 for r from 0.05 to 300, ratios of r
    up to e^2 either way and means from 1e-3 to 50. For ratios up to e^5, the largest that a guide can reach, with r
    from 1e-3 to 1e4 and means from 1e-4 to 1e4, it is below 1e-7 (float64) and 1e-4 (float32) times max(1, m_q, m_p).
    Outside these ranges a finer rule is used: for r from 1e-5 to 1e5 and means up to 1e5 the error
    is below 1e-5 (float64) and 1e-3 (float32) times max(1, KL). The error of a derivative g in log r_q or l_q is below
    5e-6 (float64) and 1e-5 (float32) times max(1, abs(g)) for r_p from 0.5 to 50, ratios of r up to e^5 and means from
    0.5 to 1000; in float32 it is below 1e-3 for means up to 1e4. For r from 1e-12 to 1e12 and |l| up to 60 the KL is
    never NaN or negative.

    Args:
        r_q, r_p: dispersions (torch's ``total_count``), not negative. At 0 the distribution is the point 0: the KL is
            then -log p(0), infinite or 0.
        l_q, l_p: logits; all four broadcast.

    Returns:
        The KL of each element, differentiable in all four arguments, twice.

    See also: docs/mathematics.md, section 3.2 (Negative binomials in general).

    Example::

        >>> r, l = torch.tensor(2.0), torch.tensor(0.5)
        >>> float(negative_binomial_kl(r, l, r, l))
        0.0
    """
    return _exact_kl(r_q, l_q, r_p, l_p)


def _shared_value(r: Tensor, l_q: Tensor, l_p: Tensor) -> tuple[Tensor, ...]:
    kl, _, d_lq, d_r, d_lp = _at_edges(_ordinary_shared_value, r, l_q, r, l_p)
    return kl, d_r, d_lq, d_lp


def _ordinary_shared_value(r: Tensor, l_q: Tensor, _: Tensor, l_p: Tensor) -> tuple[Tensor, ...]:
    d_r, d_lq, d_lp = _ordinary_shared_gradient(r, l_q, l_p)
    return r * d_r, d_r, d_lq, d_r, d_lp


def _shared_gradient(r: Tensor, l_q: Tensor, l_p: Tensor, wanted: Wanted) -> tuple[Tensor, ...]:
    _, _, d_lq, d_r, d_lp = _at_edges(_ordinary_shared_value, r, l_q, r, l_p)
    return d_r, d_lq, d_lp


def _ordinary_shared_gradient(r: Tensor, l_q: Tensor, l_p: Tensor) -> tuple[Tensor, ...]:
    odds = l_q.exp()
    gain = softplus_difference(-l_p, -l_q)
    return (
        odds * gain - softplus_difference(l_q, l_p),
        r * odds * gain,
        r * (l_p.exp() - odds) * torch.sigmoid(-l_p),
    )


_shared_kl = elementwise("shared_dispersion_kl", _shared_value, _shared_gradient)


def shared_dispersion_kl(r: Tensor, l_q: Tensor, l_p: Tensor) -> Tensor:
    r"""KL(NB(r, l_q) || NB(r, l_p)) in nats, in closed form, elementwise.

    .. math:: KL = r \Big[ \log\frac{\sigma(-l_q)}{\sigma(-l_p)} + e^{l_q} \log\frac{\sigma(l_q)}{\sigma(l_p)} \Big].

    Args:
        r: the dispersion of both distributions, not negative; the derivative in r is that of the shared r.
        l_q, l_p: logits; all three broadcast.

    Returns:
        The KL of each element, differentiable in all three arguments, twice.

    See also: docs/mathematics.md, section 3.1 (Negative binomials that share their dispersion).

    Example::

        >>> float(shared_dispersion_kl(torch.tensor(2.0), torch.tensor(0.5), torch.tensor(0.5)))
        0.0
    """
    return _shared_kl(r, l_q, l_p)


def _log_ratio_value(*arguments: Tensor) -> tuple[Tensor, ...]:
    """The sum over the samples of log q - log p, and its derivatives; the first arguments are the samples."""
    *samples, r_q, l_q, r_p, l_p = arguments
    if is_compiled_for(r_q):
        with unsplit():
            return _compiled_log_ratio(samples, r_q, l_q, r_p, l_p)
    z = torch.stack(samples)
    of_q, of_p = (special.negative_binomial_log_prob(z, r, logits) for r, logits in ((r_q, l_q), (r_p, l_p)))
    return ((of_q - of_p).sum(0),)


def _compiled_log_ratio(
    samples: Sequence[Tensor], r_q: Tensor, l_q: Tensor, r_p: Tensor, l_p: Tensor
) -> tuple[Tensor, ...]:
    shape = r_q.shape
    (r_p, l_p), column = unexpanded((r_p, l_p), shape)
    z = torch.stack([z.reshape(-1) for z in samples], dim=1)
    value, d_z = torch.empty_like(z[:, 0]), torch.empty_like(z)
    d_q, d_p = (z.new_empty(len(z), 2) for _ in range(2))
    arrays = z, r_q.reshape(-1).contiguous(), l_q.reshape(-1).contiguous(), column, value, d_z, d_q, d_p
    table = torch.stack([r_p.double(), l_p.double()], dim=1).numpy()
    in_pieces(compiled().negative_binomial_log_ratio, len(z), *arrays, options=(table,))
    derivatives = [*d_z.unbind(1), *d_q.unbind(1), *d_p.unbind(1)]
    return tuple(part.reshape(shape) for part in (value, *derivatives))


def _log_ratio_gradient(*arguments: Any) -> tuple[Tensor, ...]:
    *samples, r_q, l_q, r_p, l_p, _ = arguments
    gain = softplus_difference(-l_p, -l_q)
    of_z = [digamma_difference(z, r_q, r_p) + gain for z in samples]
    scores = [special.negative_binomial_scores(z, r, logits) for z in samples for r, logits in ((r_q, l_q), (r_p, l_p))]
    of_q, of_p = scores[::2], scores[1::2]
    sums = [torch.stack([one[i] for one in side]).sum(0) for side in (of_q, of_p) for i in range(2)]
    return *of_z, sums[0], sums[1], -sums[2], -sums[3]


_log_ratio = elementwise("negative_binomial_log_ratio", _log_ratio_value, _log_ratio_gradient)


def negative_binomial_log_ratio(
    samples: Sequence[Tensor], r_q: Tensor, l_q: Tensor, r_p: Tensor, l_p: Tensor
) -> Tensor:
    """Sum over samples of log NB(z; r_q, l_q) - log NB(z; r_p, l_p), elementwise; z! cancels.

    For r up to 1e6 the error is below 1e-8 * max(1, |value|) in float64 and 1e-4 * max(1, |value|) in float32.

    Args:
        samples: tensors of non-negative reals.
        r_q, r_p: dispersions, positive.
        l_q, l_p: logits; all arguments and samples broadcast.

    Returns:
        The sum of each element, differentiable in all arguments, twice.

    Example::

        >>> one, two = torch.tensor(1.0), torch.tensor(2.0)
        >>> float(negative_binomial_log_ratio([two, two], one, one, one, one))
        0.0
    """
    return _log_ratio(*samples, r_q, l_q, r_p, l_p)


# Terms of the series of (1 + d) log(1 + d) - d = d^2 / 2 - d^3 / 6 + d^4 / 12 - ... for |d| < 0.1, by precision.
_TERMS = {torch.float32: 8, torch.float64: 16}


def _poisson_value(rate_q: Tensor, rate_p: Tensor) -> tuple[Tensor, ...]:
    d = torch.where((rate_q == 0) & (rate_p == 0), -1.0, (rate_q - rate_p) / rate_p)
    near = d.clamp(-0.1, 0.1)
    series = torch.zeros_like(d)
    for k in range(_TERMS[d.dtype] + 1, 1, -1):
        series = series * near + (-1) ** k / (k * (k - 1))
    far = torch.where(rate_q > 0, rate_q * log_ratio(rate_q, rate_p), 0.0) - (rate_q - rate_p)
    value = torch.where(d.abs() < 0.1, rate_p * near.square() * series, far)
    value = value.masked_fill(~((rate_q >= 0) & (rate_p >= 0)), torch.nan)
    return value, *_poisson_gradient(rate_q, rate_p, ())


def _poisson_gradient(rate_q: Tensor, rate_p: Tensor, wanted: Wanted) -> tuple[Tensor, ...]:
    difference, empty = rate_q - rate_p, (rate_q == 0) & (rate_p == 0)
    # finite at rate_q = 0, so that a factor of 0 before it, as in a chain of counts, gives 0
    some = rate_q.clamp(min=torch.finfo(rate_q.dtype).tiny)
    for_q = torch.where(empty, 0.0, log_quotient(some - rate_p, some, rate_p))
    for_p = torch.where(empty, 1.0, -difference / rate_p)
    wrong = ~((rate_q >= 0) & (rate_p >= 0))
    return for_q.masked_fill(wrong, torch.nan), for_p.masked_fill(wrong, torch.nan)


_poisson_kl = elementwise("poisson_kl", _poisson_value, _poisson_gradient)


def poisson_kl(rate_q: Tensor, rate_p: Tensor) -> Tensor:
    r"""KL(Poisson(rate_q) || Poisson(rate_p)) in nats, in closed form, elementwise.

    .. math:: KL = \lambda_q \log\frac{\lambda_q}{\lambda_p} - (\lambda_q - \lambda_p)

    The relative error is below 32 times the precision's epsilon, however close the rates are.

    Args:
        rate_q, rate_p: mean counts, not negative; they broadcast. At rate_p = 0 the KL is infinite, or 0 at rate_q = 0.

    Returns:
        The KL of each element, differentiable in both arguments, twice.

    See also: docs/mathematics.md, section 3.3 (Poissons).

    Example::

        >>> float(poisson_kl(torch.tensor(2.0), torch.tensor(2.0)))
        0.0
    """
    return _poisson_kl(rate_q, rate_p)


def same_quantity(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same quantity, so that one cannot change without the other.

    They are if they are one tensor, or if Pyro made both from the same unconstrained parameter (Pyro sets the attribute
    ``unconstrained``, a weak reference to that parameter), their values are equal, and both or neither require a
    gradient. Equal values alone are not enough: if the dispersions of q and p are equal by chance, the KL still has a
    derivative in their difference.
    """
    if a is b:
        return True
    one, other = (getattr(x, "unconstrained", None) for x in (a, b))
    if not (isinstance(one, weakref.ref) and isinstance(other, weakref.ref)) or a.requires_grad != b.requires_grad:
        return False
    return one() is other() is not None and torch.equal(a, b)


def kl_form(q: object, p: object) -> Literal["shared", "exact"]:
    """Return the form that ``kl_divergence(q, p)`` takes for two negative binomials.

    Args:
        q, p: negative binomials of this package, of Pyro or of torch.

    Returns:
        ``"shared"`` (:func:`shared_dispersion_kl`) if both were made with one dispersion: their ``total_count``
        arguments are :func:`same_quantity`. Otherwise ``"exact"`` (:func:`negative_binomial_kl`).

    Example::

        >>> from pyro_nbvae.distributions import NegativeBinomial
        >>> r, logits = torch.tensor(2.0), torch.tensor(0.5)
        >>> kl_form(NegativeBinomial(r, logits=logits), NegativeBinomial(r, logits=-logits))
        'shared'
        >>> kl_form(NegativeBinomial(r, logits=logits), NegativeBinomial(r.clone(), logits=-logits))
        'exact'
    """
    of_q, of_p = (getattr(d, "given_total_count", None) for d in (q, p))
    same = isinstance(of_q, Tensor) and isinstance(of_p, Tensor) and same_quantity(of_q, of_p)
    return "shared" if same else "exact"
