r"""The KL divergences between counts, and every pair of families that they are registered for.

For two negative binomials with dispersions r and logits l, with :math:`m = r e^l` and
:math:`A = \mathrm{softplus}(l_q) - \mathrm{softplus}(l_p)`,

.. math:: KL = m_q \log\frac{r_q \sigma(l_q)}{r_p \sigma(l_p)} - r_q A + (r_p - r_q)\,\mathrm{softplus}(l_p) + J,

where :math:`J` is 0 if the dispersions are equal and a one-dimensional integral otherwise,

.. math:: J = \int_0^\infty \Big[ m_q - \frac{1 - G(e^{-t})}{1 - e^{-t}} \Big] (e^{-r_q t} - e^{-r_p t}) \frac{dt}{t},
    \qquad G(s) = (1 + e^{l_q} (1 - s))^{-r_q}.

See also: docs/mathematics.md, section 3 (Kullback-Leibler divergences).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Geometric, Poisson, kl_divergence, register_kl

from pyro_nbvae.distributions.count_distribution import CountDistribution
from pyro_nbvae.distributions.elementwise import elementwise
from pyro_nbvae.distributions.families import negative_binomial, poisson
from pyro_nbvae.distributions.kernels import chosen, reference
from pyro_nbvae.distributions.negative_binomial import NegativeBinomial
from pyro_nbvae.distributions.poisson import RelaxedPoisson
from pyro_nbvae.distributions.relaxed import computed
from pyro_nbvae.distributions.sums import expectation
from pyro_nbvae.distributions.windows import LogQOverP

# --- negative binomials ---------------------------------------------------------------------------------------------


def _by_kernel(name: str) -> Callable[..., Tensor]:
    """Make a differentiable function of a kernel; its second derivatives are those of the reference."""

    def gradient(*arguments_and_wanted: Any) -> tuple[Tensor, ...]:
        arguments = arguments_and_wanted[:-1]
        _, *found = getattr(reference, name)(*(a.reshape(-1) for a in arguments))
        return tuple(part.reshape(arguments[0].shape) for part in found)

    return elementwise(name, chosen(name), gradient)


_negative_binomial_kl = _by_kernel("negative_binomial_kl")
_negative_binomial_log_q_over_p = _by_kernel("negative_binomial_log_q_over_p")
_shared_kl = _by_kernel("shared_dispersion_kl")
_poisson_kl = _by_kernel("poisson_kl")


def negative_binomial_kl(r_q: Tensor, l_q: Tensor, r_p: Tensor, l_p: Tensor) -> Tensor:
    r"""KL(NB(r_q, l_q) || NB(r_p, l_p)) in nats, elementwise.

    .. math:: KL = \sum_z q(z) \log\frac{q(z)}{p(z)}, \qquad q = \mathrm{NB}(r_q, l_q), \quad p = \mathrm{NB}(r_p, l_p)

    It is computed by quadrature (:mod:`pyro_nbvae.distributions.divergences`). If r_q and r_p are the same quantity,
    use the closed form :func:`shared_dispersion_kl`.

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
    return _negative_binomial_kl(r_q, l_q, r_p, l_p)


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


def negative_binomial_log_q_over_p(
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
        >>> float(negative_binomial_log_q_over_p([two, two], one, one, one, one))
        0.0
    """
    return _negative_binomial_log_q_over_p(*samples, r_q, l_q, r_p, l_p)


def kl_form(q: object, p: object) -> Literal["shared", "exact"]:
    """Return the name of the form that ``kl_divergence(q, p)`` uses for two negative binomials.

    Args:
        q, p: negative binomials of this package, of Pyro or of torch.

    Returns:
        ``"shared"`` (:func:`shared_dispersion_kl`) if both were made from one dispersion: from the same tensor
        ``total_count``, or with the same ``dispersion_source``. Otherwise ``"exact"`` (:func:`negative_binomial_kl`).
        Equal values alone are not enough: the KL still has a derivative in the difference of the dispersions.

    Example::

        >>> from pyro_nbvae.distributions import NegativeBinomial
        >>> r, logits = torch.tensor(2.0), torch.tensor(0.5)
        >>> kl_form(NegativeBinomial(r, logits=logits), NegativeBinomial(r, logits=-logits))
        'shared'
        >>> kl_form(NegativeBinomial(r, logits=logits), NegativeBinomial(r.clone(), logits=-logits))
        'exact'
    """
    if isinstance(q, NegativeBinomial) and isinstance(p, NegativeBinomial) and q.shares_dispersion(p):
        return "shared"
    return "exact"


# This package's, or torch's, of which Pyro's is a subclass.
_NegativeBinomials: TypeAlias = NegativeBinomial | torch.distributions.NegativeBinomial


def _kl_negative_binomial(q: _NegativeBinomials, p: _NegativeBinomials) -> Tensor:
    l_q, l_p = (d._finite_logits if isinstance(d, NegativeBinomial) else d.logits for d in (q, p))
    if kl_form(q, p) == "shared":
        kl = shared_dispersion_kl(q.total_count, l_q, l_p)
    else:
        kl = negative_binomial_kl(q.total_count, l_q, p.total_count, l_p)
    return kl.to(torch.promote_types(q.total_count.dtype, p.total_count.dtype))


# --- Poissons -------------------------------------------------------------------------------------------------------


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


def _kl_poisson(q: Poisson, p: Poisson) -> Tensor:
    return poisson_kl(q.rate, p.rate)


# --- any two families: a sum over the window of q --------------------------------------------------------------------

Counted: TypeAlias = CountDistribution | Poisson | _NegativeBinomials
_LOG_Q_OVER_NEGATIVE_BINOMIAL, _LOG_Q_OVER_POISSON = LogQOverP(negative_binomial), LogQOverP(poisson)


def as_q(d: Counted) -> tuple[Any, tuple[Tensor, ...]]:
    """Return the left side of a KL: the family, with weights and windows, and its parameters."""
    if isinstance(d, CountDistribution):
        return type(d), d.parameters
    return (poisson, (d.rate,)) if isinstance(d, Poisson) else (negative_binomial, (d.total_count, d.logits))


def _as_p(d: Counted) -> tuple[LogQOverP, tuple[Tensor, ...]]:
    """Return the right side of a KL: the integrand, and its arguments."""
    if isinstance(d, CountDistribution):
        return d.log_q_over_p, (*d.parameters, d.log_normalizer)
    if isinstance(d, Poisson):
        return _LOG_Q_OVER_POISSON, (d.rate,)
    return _LOG_Q_OVER_NEGATIVE_BINOMIAL, (d.total_count, d.logits)


def _kl_by_sum(q: Counted, p: Counted) -> Tensor:
    """KL(q || p) in nats, a sum over q's window; elementwise, differentiable twice.

    See also: docs/mathematics.md, section 3.4 (Every other pair of count families).
    """
    family, own = as_q(q)
    integrand, arguments = _as_p(p)
    return computed(expectation(family, integrand, *own, *arguments), q, p)


# --- families of Pyro and torch that are negative binomials or inflate another one -----------------------------------


@functools.singledispatch
def _as_counts(d: Distribution) -> Distribution:
    """Return a Geometric or a GammaPoisson as the negative binomial that it is; others unchanged."""
    return d


@_as_counts.register
def _(d: Geometric) -> Distribution:
    return NegativeBinomial(torch.ones_like(d.probs), logits=-d.logits, validate_args=False)


@_as_counts.register
def _(d: dist.GammaPoisson) -> Distribution:
    return NegativeBinomial(d.concentration, logits=-d.rate.log(), validate_args=False)


def _kl_as_counts(q: Distribution, p: Distribution) -> Tensor:
    return kl_divergence(_as_counts(q), _as_counts(p))


def _at_0(d: Distribution) -> Tensor:
    """log p(0), of the batch shape."""
    if isinstance(d, dist.ZeroInflatedDistribution):
        # log b_0 + log(1 + g (1 / b_0 - 1)) has a derivative at g = 0; where 1 / b_0 may overflow, log g stands for it
        base, gate = _at_0(d.base_dist), d.gate
        far = base < -80
        near = base + torch.log1p(gate * torch.expm1(-torch.where(far, 0.0, base)))
        return torch.where(far, torch.logaddexp(torch.where(far, gate, 0.5).log(), torch.log1p(-gate) + base), near)
    d = _as_counts(d)
    given = next(getattr(d, name) for name in d.arg_constraints if name in vars(d))
    return d.log_prob(torch.zeros_like(given.detach()).expand(d.batch_shape))


def _weighted(log_mass: Tensor, log_p: Tensor) -> Tensor:
    """q (log q - log p) from log q; 0 where q is 0."""
    none = log_mass == -torch.inf
    return torch.where(none, 0.0, log_mass.exp() * (torch.where(none, 0.0, log_mass) - log_p))


def _kl_of_zero_inflated(q: dist.ZeroInflatedDistribution, p: Distribution) -> Tensor:
    r"""KL of :math:`q = g \delta_0 + (1 - g) b`.

    .. math:: q_0 \log\frac{q_0}{p_0} + (1 - g) \Big[ (1 - b_0) \log (1 - g) + KL(b \,\|\, p)
        - b_0 \log\frac{b_0}{p_0} \Big]
    """
    rest, of_p, of_base, of_q = 1 - q.gate, _at_0(p), _at_0(q.base_dist), _at_0(q)
    base = of_base.exp()
    others = kl_divergence(q.base_dist, p) - _weighted(of_base, of_p)
    return _weighted(of_q, of_p) + (1 - base) * torch.xlogy(rest, rest) + rest * others


def _kl_to_zero_inflated(q: Distribution, p: dist.ZeroInflatedDistribution) -> Tensor:
    r"""KL to :math:`p = g \delta_0 + (1 - g) b`.

    .. math:: KL(q \,\|\, b) + q_0 \log\frac{b_0}{p_0} - (1 - q_0) \log (1 - g)
    """
    of_q = _at_0(q)
    change = of_q.exp() * (_at_0(p.base_dist) - _at_0(p))
    return kl_divergence(q, p.base_dist) + change - torch.xlogy(-torch.expm1(of_q), 1 - p.gate)


_NEGATIVE_BINOMIALS: tuple[type[Distribution], ...] = (NegativeBinomial, torch.distributions.NegativeBinomial)
_COUNTS: tuple[type[Distribution], ...] = (CountDistribution, Poisson, *_NEGATIVE_BINOMIALS)
_NAMED: tuple[type[Distribution], ...] = (Geometric, dist.GammaPoisson)
for _q, _p in itertools.product(_NEGATIVE_BINOMIALS, _NEGATIVE_BINOMIALS):
    register_kl(_q, _p)(_kl_negative_binomial)
for _q, _p in ((RelaxedPoisson, RelaxedPoisson), (RelaxedPoisson, Poisson), (Poisson, RelaxedPoisson)):
    register_kl(_q, _p)(_kl_poisson)
for _q, _p in itertools.product(_COUNTS, _COUNTS):
    if CountDistribution in (_q, _p) or (_q is Poisson) != (_p is Poisson):
        register_kl(_q, _p)(_kl_by_sum)
for _q, _p in itertools.product(_NAMED, (*_COUNTS, *_NAMED)):
    if (_q, _p) != (Geometric, Geometric):  # which torch has
        register_kl(_q, _p)(_kl_as_counts)
        register_kl(_p, _q)(_kl_as_counts)
for _q in (*_COUNTS, *_NAMED):
    register_kl(dist.ZeroInflatedDistribution, _q)(_kl_of_zero_inflated)
    register_kl(_q, dist.ZeroInflatedDistribution)(_kl_to_zero_inflated)
register_kl(dist.ZeroInflatedDistribution, dist.ZeroInflatedDistribution)(_kl_of_zero_inflated)
