"""Mass functions, scores and windows of the Poisson and the negative binomial, and integrands of sums over counts."""

from __future__ import annotations

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_nbvae.distributions import special
from pyro_nbvae.distributions.elementwise import register_part
from pyro_nbvae.distributions.relaxations.gumbel_softmax import largest_count


class Integrand:
    """Base class of integrands (:class:`pyro_nbvae.distributions.windows.Integrand`); each is a part of kernels."""

    key: str

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        cls.key = register_part(cls, cls.__name__)


class Count(Integrand):
    """The count itself."""

    tables = staticmethod(lambda k: (k,))
    value = staticmethod(lambda k, log_mass, count: count)
    gradient = staticmethod(lambda count: ())


class Surprise(Integrand):
    """-log q(k)."""

    tables = staticmethod(lambda k: ())
    value = staticmethod(lambda k, log_mass: -log_mass.masked_fill(log_mass == -torch.inf, 0))
    gradient = staticmethod(lambda: ())


class AtMost(Integrand):
    """Whether the count is at most the argument."""

    tables = staticmethod(lambda k, value: ((k <= value).to(value.dtype),))
    value = staticmethod(lambda k, log_mass, indicator: indicator)
    gradient = staticmethod(lambda indicator: (None,))


class LogRatio(Integrand):
    """log q(k) - log p(k), from tables of log p and of its derivatives in p's parameters."""

    smooth = True  # whether log p is a smooth function of k from 1 on

    @staticmethod
    def value(k: Tensor, log_mass: Tensor, log_p: Tensor, *scores: Tensor) -> Tensor:
        return (log_mass - log_p).masked_fill(log_mass == -torch.inf, 0)

    @staticmethod
    def gradient(log_p: Tensor, *scores: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(-score for score in scores)


class PoissonMass(LogRatio):
    """The Poisson, given by its log mass and its score, as either side of a KL."""

    arg_constraints = {"rate": constraints.nonnegative}

    @staticmethod
    def as_com_poisson(rate: Tensor) -> tuple[Tensor, Tensor]:
        return rate, torch.ones_like(rate)

    @staticmethod
    def window(nats: float, rate: Tensor) -> tuple[Tensor, Tensor]:
        return poisson_window(nats, rate)

    @staticmethod
    def log_weight(k: Tensor, rate: Tensor) -> Tensor:
        return poisson_log_weight(k, rate)

    @staticmethod
    def scores(k: Tensor, rate: Tensor) -> tuple[Tensor]:
        return (special.poisson_score(k, rate),)

    @staticmethod
    def tables(k: Tensor, rate: Tensor) -> tuple[Tensor, ...]:
        return poisson_log_weight(k, rate), special.poisson_score(k, rate)


class NegativeBinomialMass(LogRatio):
    """The negative binomial, given by its log mass and its scores, as either side of a KL."""

    arg_constraints = {"total_count": constraints.nonnegative, "logits": constraints.real}

    @staticmethod
    def window(nats: float, r: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        # Bernstein's bounds for a sub-gamma variable; below its mean a count is sub-Gaussian
        fano = 1 + logits.exp()
        mean = r * logits.exp()
        spread = torch.sqrt(2 * nats * mean * fano)
        return mean - spread, mean + spread + nats * fano

    @staticmethod
    def log_weight(k: Tensor, r: Tensor, logits: Tensor) -> Tensor:
        return special.negative_binomial_log_prob(k, r, logits)

    @staticmethod
    def scores(k: Tensor, r: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return special.negative_binomial_scores(k, r, logits)

    @staticmethod
    def tables(k: Tensor, r: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        return NegativeBinomialMass.log_weight(k, r, logits), *NegativeBinomialMass.scores(k, r, logits)


def poisson_log_weight(k: Tensor, rate: Tensor) -> Tensor:
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
        return special.poisson_log_prob(k, rate).masked_fill(none & (k > 0), -torch.inf)
    middle = k[len(k) // 2].clamp(min=1)
    count, a = k.double(), middle.double()
    of_counts = (count * a.log() - a - torch.lgamma(count + 1)).to(k.dtype)  # log Poisson(k; a)
    of_rates = special.poisson_deviance(middle, rate)
    log_mass = torch.addcmul(of_counts - of_rates, k - middle, special.log_ratio(rate, middle))
    return log_mass.masked_fill(none & (k > 0), -torch.inf)


def poisson_window(nats: float | Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
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
