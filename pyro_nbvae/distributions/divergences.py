"""KL divergences of Pyro's and PyTorch's other count families, by those of the negative binomial.

See also: docs/mathematics.md, section 3.4 (Every other pair of count families).
"""

from __future__ import annotations

import functools
import itertools

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Geometric, Poisson, kl_divergence, register_kl

from pyro_nbvae.distributions.counts import CountDistribution
from pyro_nbvae.distributions.negative_binomial import NegativeBinomial

_COUNTS: tuple[type[Distribution], ...] = (
    CountDistribution,
    NegativeBinomial,
    torch.distributions.NegativeBinomial,
    Poisson,
)


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
    if isinstance(d, dist.ZeroInflatedDistribution):  # Pyro's adds the probabilities, which may be 0
        return torch.logaddexp(d.gate.log(), torch.log1p(-d.gate) + _at_0(d.base_dist))
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


_named: tuple[type[Distribution], ...] = (Geometric, dist.GammaPoisson)
for _one, _other in itertools.product(_named, (*_COUNTS, *_named)):
    if (_one, _other) != (Geometric, Geometric):  # which torch has
        register_kl(_one, _other)(_kl_as_counts)
        register_kl(_other, _one)(_kl_as_counts)
for _one in (*_COUNTS, *_named):
    register_kl(dist.ZeroInflatedDistribution, _one)(_kl_of_zero_inflated)
    register_kl(_one, dist.ZeroInflatedDistribution)(_kl_to_zero_inflated)
register_kl(dist.ZeroInflatedDistribution, dist.ZeroInflatedDistribution)(_kl_of_zero_inflated)
