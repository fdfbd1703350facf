"""A normal distribution with one scale for all elements."""

from __future__ import annotations

import math

import pyro.distributions as dist
from torch import Tensor
from torch.distributions import Distribution

from pyro_nbvae.distributions.relaxed import Shape


class IsotropicNormal(dist.Normal):
    r"""Normal distribution with the same scale for all elements.

    .. math:: \log p(x) = -\frac{(x - \mathrm{loc})^2}{2 \sigma^2} - \log \sigma - \tfrac12 \log 2\pi

    It is Pyro's ``Normal``, but ``log_prob`` takes three operations over the elements instead of eight.

    Args:
        loc: mean; its shape is the batch shape.
        scale: standard deviation, a positive number.
        validate_args: as in torch.

    Raises:
        TypeError: for a scale that is a tensor, which would have no gradient.
        ValueError: with validation on, for arguments or values outside their range.

    Example::

        >>> import torch
        >>> d = IsotropicNormal(torch.zeros(3), 0.5)
        >>> torch.allclose(d.log_prob(torch.ones(3)), dist.Normal(0.0, 0.5).log_prob(torch.tensor(1.0)))
        True
    """

    def __init__(self, loc: Tensor, scale: float, *, validate_args: bool | None = None) -> None:
        if isinstance(scale, Tensor):
            raise TypeError("scale must be a number, it is a constant; use pyro.distributions.Normal for a tensor")
        self.deviation = float(scale)
        # torch would copy the number to the device and wait for it; new_full writes it there
        super().__init__(loc, loc.new_full((), self.deviation), validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Distribution | None = None) -> IsotropicNormal:
        new = self._get_checked_instance(IsotropicNormal, _instance)
        new.deviation = self.deviation
        return super().expand(batch_shape, _instance=new)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of ``value`` in nats; ``value`` broadcasts with the batch shape.

        Raises:
            ValueError: with validation on, for values that are not real.
        """
        if self._validate_args:
            self._validate_sample(value)
        deviation = self.deviation if self.deviation > 0 else math.nan
        constant = -math.log(deviation) - 0.5 * math.log(2 * math.pi)
        return (value - self.loc).square() * (-0.5 / deviation**2) + constant
