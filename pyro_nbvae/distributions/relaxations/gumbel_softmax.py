r"""Relaxation by Gumbel-softmax over the counts 0, 1, 2, ... (Jang et al., 2017; Maddison et al., 2017).

With :math:`E_k` unit exponentials (:math:`-\log E_k` is a Gumbel variable),

.. math:: w = \mathrm{softmax}\big((\log \mathrm{Poisson}(k; \lambda) - \log E_k) / \tau\big), \qquad z = \sum_k k\,w_k.

For fixed noise :math:`dz / d\log\lambda` is the variance of k under w, divided by :math:`\tau`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor

from pyro_nbvae.arriving import Arriving
from pyro_nbvae.distributions.elementwise import KERNELS, Kernel, pathwise, sampler
from pyro_nbvae.distributions.families.poisson import largest_count
from pyro_nbvae.distributions.kernels import choose
from pyro_nbvae.distributions.relaxations.base import Relaxation, check_temperature
from pyro_nbvae.distributions.relaxations.gamma import log_standard_gamma

if TYPE_CHECKING:
    from pyro_nbvae.distributions.relaxed import RelaxedCount

# Counts whose Poisson tail is below exp(-_TAIL_NATS) are left out.
_TAIL_NATS = 20.0
# Warn that a rate is close to max_count if P(count > max_count) may exceed exp(-_WARN_NATS).
_WARN_NATS = 7.0


@dataclass(frozen=True)
class GumbelSoftmax(Relaxation):
    r"""Gumbel-softmax relaxation over the counts 0, 1, 2, ....

    .. math:: z = \sum_k k\,w_k, \qquad w = \mathrm{softmax}\big((\log \mathrm{Poisson}(k; \lambda) + g_k) / \tau\big)

    with Gumbel noise :math:`g_k`. Counts of a negative binomial are drawn in two steps: a Gamma-distributed rate with
    implicit reparametrisation gradients (Figurnov et al., 2018), then the count.

    Args:
        temperature: :math:`\tau`, positive; a number, or a tensor that broadcasts to the distribution's batch shape.
        max_count: the largest count; None for no limit. The mass above it is truncated, with a warning if that matters:
            a KL that is then estimated from samples is too small, without a bound. Time grows with the square root
            of the rate either way, because counts far from it are omitted.
        straight_through: return integer samples (the arg max), with the gradient of the relaxed ones.

    Raises:
        ValueError: for a temperature or a max_count out of range.

    Reference: Jang et al., 2017; Maddison et al., 2017.

    See also: docs/mathematics.md, section 5.2 (Gumbel-softmax).

    Example::

        >>> from pyro_nbvae.distributions import RelaxedPoisson
        >>> RelaxedPoisson(torch.ones(3), relaxation=GumbelSoftmax(0.5, max_count=50)).rsample().shape
        torch.Size([3])
    """

    temperature: float | Tensor = 1.0
    max_count: int | None = field(default=None, kw_only=True)
    straight_through: bool = field(default=False, kw_only=True)

    coldest = 0.25  # the gradients are noisy at lower temperatures

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if self.max_count is not None and self.max_count < 1:
            raise ValueError(f"max_count must be at least 1, got {self.max_count}")

    def at(self, temperature: float | Tensor) -> GumbelSoftmax:
        return replace(self, temperature=temperature)

    def rsample(self, distribution: RelaxedCount, shape: Size) -> Tensor:
        """Draw relaxed counts of this shape.

        Counts are nan where a rate is not finite or above 2^24.

        Raises:
            TypeError: for a family that is not a Gamma-Poisson mixture.
        """
        r, logits = distribution.gamma_poisson(shape)
        log_rate = logits if r is None else log_standard_gamma(r) + logits
        name = f"races/{self.max_count or 0}/{int(self.straight_through)}"
        return pathwise(name, log_rate, temperature=self.temperature)

    def one_hot(self, logits: Tensor) -> Tensor:
        """Draw a point of the simplex for each vector of logits: softmax((logits + Gumbel noise) / temperature).

        Args:
            logits: (..., categories).

        Returns:
            Of the shape of ``logits``; one-hot vectors with ``straight_through``.
        """
        temperature: Any = self.temperature
        if isinstance(temperature, Tensor) and temperature.dim():
            temperature = temperature.unsqueeze(-1)  # one for each vector
        uniform = torch.rand_like(logits).clamp(min=torch.finfo(logits.dtype).tiny)
        soft = ((logits - uniform.log().neg().log()) / temperature).softmax(-1)
        if not self.straight_through:
            return soft
        hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        return hard - soft.detach() + soft


def _races(name: str, max_count: str, straight_through: str) -> Kernel:
    limit = int(max_count) or None

    def draw(seed: Tensor, temperature: Tensor, log_rate: Tensor) -> list[Tensor]:
        rate = log_rate.exp()
        if limit and rate.numel():
            _largest_rates.send(rate.max(), limit)
            for largest, its_limit in _largest_rates.arrived():
                _warn_if_truncated(largest, its_limit)
        first, last = _window(rate, temperature, limit)
        return choose("races", rate)(seed, temperature, log_rate, first, last, straight_through == "1")

    return sampler(name, draw)


KERNELS.makers["races"] = _races


def _window(rate: Tensor, temperature: Tensor, max_count: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the first and the last count that are kept for each element.

    Each tail left out is below exp(-_TAIL_NATS), or exp(-_TAIL_NATS * temperature) for temperatures above 1, which
    flatten the weights. The lower bound is that of a normal variable, which holds for a Poisson: P(k <= rate - t) is
    at most exp(-t^2 / (2 rate)).
    """
    nats = _TAIL_NATS * temperature.clamp(min=1)
    last = largest_count(rate, nats).floor()
    if max_count is not None:  # most of the mass that is left of a larger rate is close to max_count
        last, rate = last.clamp(max=max_count), rate.clamp(max=max_count)
    return (rate - torch.sqrt(2 * nats * rate)).clamp(min=0).floor(), last


def _warn_if_truncated(largest: Tensor, max_count: int) -> None:
    if bool(largest_count(largest, _WARN_NATS) > max_count):
        warnings.warn(
            f"a Poisson rate is close to max_count={max_count}: counts are truncated at it, which lowers the mean; "
            "raise max_count or omit it",
            RuntimeWarning,
            stacklevel=2,
        )


# The largest rates of draws, each with its max_count: on a GPU they are checked once they have reached the host.
_largest_rates: Arriving[int] = Arriving()
