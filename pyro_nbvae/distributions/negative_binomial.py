"""The negative binomial, exact and relaxed (DESIGN 3.1 and 3.5)."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor
from torch.distributions import register_kl
from torch.distributions.utils import broadcast_all, lazy_property, logits_to_probs, probs_to_logits

from pyro_nbvae.distributions.kl import kl_form, negative_binomial_kl
from pyro_nbvae.distributions.relaxed import RelaxedCount, Shape
from pyro_nbvae.distributions.samplers import Indicator, Relaxation, log_standard_gamma
from pyro_nbvae.distributions.special import negative_binomial_log_prob


class NegativeBinomial(TorchDistribution):
    r"""Spike counts with a variance above their mean.

    .. math:: p(z) = \frac{\Gamma(z + r)}{\Gamma(r)\, z!} \, \sigma(l)^z \, \sigma(-l)^r, \qquad z = 0, 1, 2, \ldots

    ``total_count`` is the dispersion r and ``logits`` is l, as in torch: the mean is m = r e^l, the variance
    m (1 + e^l) = m + m^2 / r, the Fano factor 1 + e^l. It is a Poisson whose rate is Gamma distributed with *shape* r
    and *scale* e^l; as r grows with m fixed it becomes a Poisson. The paper's p is sigma(-l); torch's ``probs``,
    sigma(l), is taken instead of ``logits``. The argument order is torch's, so pass ``logits`` by name.

    Args:
        total_count: r > 0, not necessarily an integer.
        probs: sigma(l) in [0, 1).
        logits: l. Give either this or ``probs``.

    Raises:
        ValueError: for both or neither of ``probs`` and ``logits``, and, with validation on, for arguments or counts
            outside their range.

    All arguments broadcast to the batch shape; events are scalars. ``log_prob`` loses no digits at large or small r
    (:mod:`pyro_nbvae.distributions.special`), and the KL between two of these is exact (DESIGN 3.3 and 3.4).
    """

    arg_constraints = {
        "total_count": constraints.positive,
        "probs": constraints.half_open_interval(0.0, 1.0),
        "logits": constraints.real,
    }
    support: Any = constraints.nonnegative_integer

    def __init__(
        self,
        total_count: Tensor | float,
        probs: Tensor | float | None = None,
        logits: Tensor | float | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        if (probs is None) == (logits is None):
            raise ValueError("give exactly one of logits and probs")
        if logits is not None:
            self.total_count, self.logits = broadcast_all(total_count, logits)
        else:
            assert probs is not None
            self.total_count, self.probs = broadcast_all(total_count, probs)
        super().__init__(self.total_count.shape, validate_args=validate_args)

    @lazy_property
    def logits(self) -> Tensor:
        return probs_to_logits(self.probs, is_binary=True)

    @lazy_property
    def probs(self) -> Tensor:
        return logits_to_probs(self.logits, is_binary=True)

    @property
    def mean(self) -> Tensor:
        return self.total_count * self.logits.exp()

    @property
    def variance(self) -> Tensor:
        return self.mean * (1 + self.logits.exp())

    def expand(self, batch_shape: Shape, _instance: Any = None) -> NegativeBinomial:
        new = self._get_checked_instance(NegativeBinomial, _instance)
        batch_shape = torch.Size(batch_shape)
        new.total_count = self.total_count.expand(batch_shape)
        for name in ("logits", "probs"):
            if name in self.__dict__:
                setattr(new, name, getattr(self, name).expand(batch_shape))
        super(NegativeBinomial, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _process(self, shape: Size) -> tuple[Tensor, Tensor]:
        return self.total_count.expand(shape), self.logits.expand(shape)

    def _exact(self, shape: Size) -> Tensor:
        total_count, logits = self._process(shape)
        return torch.poisson((log_standard_gamma(total_count) + logits).exp())

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        with torch.no_grad():
            return self._exact(self._extended_shape(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return negative_binomial_log_prob(value, self.total_count, self.logits)


class RelaxedNegativeBinomial(RelaxedCount, NegativeBinomial):
    r"""A negative binomial whose samples are relaxed counts with pathwise gradients (DESIGN 3.5).

    A Gamma(r, scale e^l) rate, then a Poisson count relaxed at ``temperature``. Arrival times are drawn with the rate
    integrated out, as those of a Polya process; for Gumbel-softmax the rate is drawn and reparametrised implicitly. As
    the temperature falls to 0 the samples become the exact integers. ``mean``, ``variance``, ``log_prob`` and the KL
    are those of the exact distribution; ``log_prob`` is its mass function continued through the gamma function, which
    at relaxed values is an approximation and on integers is exact. The support is the non-negative reals.

    Args:
        total_count, logits, probs: as for :class:`NegativeBinomial` (note that ``logits`` comes first here).
        temperature, relaxation, indicator, max_count, straight_through: see
            :class:`~pyro_nbvae.distributions.relaxed.RelaxedCount`.

    Raises:
        ValueError: as :class:`NegativeBinomial`, and for a temperature or relaxation that does not exist.
    """

    support: Any = constraints.nonnegative

    def __init__(
        self,
        total_count: Tensor | float,
        logits: Tensor | float | None = None,
        probs: Tensor | float | None = None,
        *,
        temperature: float | Tensor,
        relaxation: Relaxation = "arrival",
        indicator: Indicator = "sigmoid",
        max_count: int = 100,
        straight_through: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        self._set_relaxation(temperature, relaxation, indicator, max_count, straight_through)
        if isinstance(temperature, Tensor) and temperature.dim():
            total_count, _ = broadcast_all(total_count, temperature)
        super().__init__(total_count, probs=probs, logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> RelaxedNegativeBinomial:
        new = self._get_checked_instance(RelaxedNegativeBinomial, _instance)
        new._copy_relaxation(self)
        return super().expand(batch_shape, _instance=new)


@register_kl(NegativeBinomial, NegativeBinomial)
def _kl_negative_binomial(q: NegativeBinomial, p: NegativeBinomial) -> Tensor:
    exact = kl_form(q, p) == "exact"
    return negative_binomial_kl(q.total_count, q.logits, p.total_count, p.logits, exact=exact)
