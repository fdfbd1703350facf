"""Distributions of observations that are parameterised by a decoder's output h.

A parameter that is computed from h and rounded to float32 may change a log mass by far more than rounding the result
would: at a mean of 1e7 it moves by half a count. These distributions keep h, and compute log masses from it in float64
or in a form without cancellation. The relative error, of max(1, |log p|), is below 1e-6. Results have the dtype of h.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.functional import logsigmoid, softplus

from pyro_nbvae.distributions.com_poisson import MeanConwayMaxwellPoisson
from pyro_nbvae.distributions.elementwise import double
from pyro_nbvae.distributions.negative_binomial import NegativeBinomial, negative_binomial_log_mass
from pyro_nbvae.distributions.relaxed import Shape

# Below this output softplus(h) is e^h in float64, of which the logarithm is h.
_EXPONENTIAL = -37.0


def _log_softplus(h: Tensor) -> Tensor:
    """log log(1 + e^h), computed in float64; it approaches h for very negative h.

    Args:
        h: real, of any shape.

    Returns:
        Of the same shape, in float64.

    Example::

        >>> [round(float(v), 4) for v in _log_softplus(torch.tensor([-100.0, 0.0, 100.0]))]
        [-100.0, -0.3665, 4.6052]
    """
    h = double(h)
    # clamped to the range where it is used, so that its gradient is finite elsewhere
    return torch.where(h <= _EXPONENTIAL, h, softplus(h.clamp(min=_EXPONENTIAL), threshold=40).log())


class LogitBernoulli(dist.Bernoulli):
    r"""Bernoulli distribution whose log mass has accurate derivatives at large logits.

    .. math:: \log p(x) = x \log \sigma(l) + (1 - x) \log \sigma(-l)

    torch computes the derivative as sigma(l) - x, which rounds to 0 at x = 1 and l above 17.

    Args:
        logits: l; its shape is the batch shape.
        validate_args: as in torch.

    Raises:
        ValueError: with validation on, for logits that are not real, and for values other than 0 and 1.

    Example::

        >>> round(float(LogitBernoulli(torch.tensor(0.0)).log_prob(torch.tensor(1.0))), 4)
        -0.6931
    """

    def __init__(self, logits: Tensor, *, validate_args: bool | None = None) -> None:
        super().__init__(logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Distribution | None = None) -> LogitBernoulli:
        return super().expand(batch_shape, _instance=self._get_checked_instance(LogitBernoulli, _instance))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log mass of ``value`` in nats; ``value`` broadcasts with the batch shape.

        Raises:
            ValueError: with validation on, for values other than 0 and 1.
        """
        if self._validate_args:
            self._validate_sample(value)
        return value * logsigmoid(self.logits) + (1 - value) * logsigmoid(-self.logits)


def _log_mean(h: Tensor, log_factor: Tensor | None) -> Tensor:
    """Return the log of e^log_factor softplus(h), in float64."""
    return _log_softplus(h) if log_factor is None else _log_softplus(h) + double(log_factor)


def _mean(h: Tensor, log_factor: Tensor | None) -> Tensor:
    """Return e^log_factor softplus(h), in the dtype of h."""
    return softplus(h) if log_factor is None else _log_mean(h, log_factor).exp().to(h)


class SoftplusPoisson(dist.Poisson):
    r"""Poisson distribution of mean m = softplus(h), or of a multiple of it.

    .. math:: \log p(x) = x \log m - m - \log x!

    The log mass is computed in float64, where the terms cancel without loss for counts up to 2^24.

    Args:
        h: real; its shape is the batch shape.
        log_factor: log of a known factor of the mean, such as an exposure; broadcasts with h. Default: 0.
        validate_args: as in torch.

    Raises:
        ValueError: with validation on, for an h that is not a number, and for values that are not counts.

    Example::

        >>> d = SoftplusPoisson(torch.tensor(1e4))
        >>> round(float(d.log_prob(torch.tensor(1e4))), 5)
        -5.52412
    """

    def __init__(self, h: Tensor, log_factor: Tensor | None = None, *, validate_args: bool | None = None) -> None:
        self.h, self.log_factor = h, log_factor
        super().__init__(_mean(h, log_factor), validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Distribution | None = None) -> SoftplusPoisson:
        new = self._get_checked_instance(SoftplusPoisson, _instance)
        new.h, new.log_factor = self.h.expand(batch_shape), self.log_factor
        return super().expand(batch_shape, _instance=new)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log mass of ``value`` in nats; ``value`` broadcasts with the batch shape.

        Raises:
            ValueError: with validation on, for values that are not counts.
        """
        if self._validate_args:
            self._validate_sample(value)
        log_rate, count = _log_mean(self.h, self.log_factor), double(value)
        log_mass = count * log_rate - log_rate.exp() - torch.lgamma(count + 1)
        return log_mass.to(value.device, torch.promote_types(value.dtype, self.h.dtype))


class SoftplusNegativeBinomial(NegativeBinomial):
    r"""Negative binomial distribution of mean m = softplus(h) and dispersion r, with the variance :math:`m + m^2 / r`.

    Args:
        h: real; it broadcasts with ``log_total_count`` to the batch shape.
        log_total_count: log r.
        log_factor: as :class:`SoftplusPoisson`.
        validate_args: as in torch.

    Raises:
        ValueError: with validation on, for parameters and counts out of the range of
            :class:`~pyro_nbvae.distributions.NegativeBinomial`.

    Example::

        >>> d = SoftplusNegativeBinomial(torch.tensor(100.0), torch.tensor(0.0))
        >>> round(float(d.mean), 3), round(float(d.log_prob(torch.tensor(0.0))), 5)
        (100.0, -4.61512)
    """

    def __init__(
        self,
        h: Tensor,
        log_total_count: Tensor,
        log_factor: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.h, self.log_total_count, self.log_factor = h, log_total_count, log_factor
        logits = (_log_mean(h, log_factor) - double(log_total_count)).clamp(-60, 60)  # the range of the distribution
        super().__init__(log_total_count.exp(), logits=logits.to(h), validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Distribution | None = None) -> SoftplusNegativeBinomial:
        new = self._get_checked_instance(SoftplusNegativeBinomial, _instance)
        new.h, new.log_total_count, new.log_factor = self.h.expand(batch_shape), self.log_total_count, self.log_factor
        return super().expand(batch_shape, _instance=new)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log mass of ``value`` in nats; ``value`` broadcasts with the batch shape.

        Raises:
            ValueError: with validation on, for values that are not counts.
        """
        if self._validate_args:
            self._validate_sample(value)
        count, log_mean, log_r = double(value), _log_mean(self.h, self.log_factor), double(self.log_total_count)
        log_mass = negative_binomial_log_mass(count, log_r.exp(), log_mean - log_r)
        return log_mass.to(value.device, torch.promote_types(value.dtype, self.h.dtype))


class SoftplusConwayMaxwellPoisson(MeanConwayMaxwellPoisson):
    r"""Conway-Maxwell-Poisson distribution of mean m = softplus(h), or of a multiple of it.

    Args:
        h: real; it broadcasts with ``log_nu`` to the batch shape.
        log_nu: log of the dispersion parameter :math:`\nu`, from -3 to 3.
        log_factor: as :class:`SoftplusPoisson`.
        validate_args: as in torch.

    Raises:
        ValueError: with validation on, as :class:`~pyro_nbvae.distributions.MeanConwayMaxwellPoisson`.

    Example::

        >>> d = SoftplusConwayMaxwellPoisson(torch.tensor(0.0), torch.tensor(1.0))
        >>> round(float(d.mean), 3), round(float(d.variance / d.mean), 3)
        (0.693, 0.619)
    """

    def __init__(
        self, h: Tensor, log_nu: Tensor, log_factor: Tensor | None = None, *, validate_args: bool | None = None
    ) -> None:
        super().__init__(_log_mean(h, log_factor), log_nu, dtype=h.dtype, validate_args=validate_args)
