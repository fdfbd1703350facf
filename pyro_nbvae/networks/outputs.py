"""Last layers of built-in decoders, which start at the mean of the training data."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_nbvae.batching import limits_of
from pyro_nbvae.networks.initialization import DataDependent, divisors, moments

# Below this, softplus is the exponential function in float32.
_SMALL = -17.0


class Output(DataDependent):
    """Base class of the last layers of built-in decoders: from a to what the likelihood reads.

    At a = 0 the likelihood's mean is the mean of the training data, element by element.

    Args:
        event_shape: shape of one observation.
        mean: the mean before it has started.
    """

    mean: Tensor

    def __init__(self, event_shape: tuple[int, ...], mean: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full(event_shape, mean))

    def fixed(self) -> nn.Module:
        """Return the layer in its place that does not depend on data, for the released networks."""
        return nn.Identity()

    def initialize(self, x: Tensor) -> None:
        self.mean.copy_(moments(x)[0])


class RealOutput(Output):
    """mean + deviation * a, with the standard deviation of each element."""

    deviation: Tensor

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape, 0.0)
        self.register_buffer("deviation", torch.ones(event_shape))

    def initialize(self, x: Tensor) -> None:
        mean, deviation = moments(x)
        self.mean.copy_(mean)
        self.deviation.copy_(divisors(mean, deviation))

    def forward(self, a: Tensor) -> Tensor:
        return self.mean + self.deviation * a


class UnitSigmoid(nn.Sigmoid):
    """Sigmoid as the last layer of a released decoder: observations are in [0, 1]."""

    unit_interval = True


class ImageOutput(Output):
    """low + (high - low) * sigmoid(a + logit(mean)), where low and high are 0 and 1, or else the range of the data."""

    # A pixel that is always black, or white, starts near it, where the sigmoid has a slope.
    _NEAREST = 0.01

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape, 0.5)
        self.low, self.high = 0.0, 1.0

    @property
    def unit_interval(self) -> bool:
        return (self.low, self.high) == (0, 1)

    def fixed(self) -> nn.Module:
        return UnitSigmoid()

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.initialized, self.low, self.high], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        super().set_extra_state(state.flatten()[0])
        if not state.is_meta:
            _, self.low, self.high = state.tolist()

    def initialize(self, x: Tensor) -> None:
        self.low, self.high = limits_of(x)
        mean = (moments(x)[0] - self.low) / (self.high - self.low)
        self.mean.copy_(mean.clamp(self._NEAREST, 1 - self._NEAREST))

    def forward(self, a: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * torch.sigmoid(a + self.mean.logit())


class LogitOutput(Output):
    """a + logit(mean), with half an observation of each kind added to the data."""

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape, 0.5)

    def initialize(self, x: Tensor) -> None:
        self.mean.copy_((moments(x)[0] * len(x) + 0.5) / (len(x) + 1))

    def forward(self, a: Tensor) -> Tensor:
        return a + self.mean.logit()


class CountOutput(Output):
    """h of softplus(h) = mean * log2(1 + 4^a): like mean * e^a near 0, and not faster than linear beyond."""

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape, math.log(2))  # h is 0 at a = 0

    def initialize(self, x: Tensor) -> None:
        self.mean.copy_(moments(x)[0].clamp_min(0.5 / (len(x) + 1)))

    def forward(self, a: Tensor) -> Tensor:
        u = 2 * math.log(2) * a
        log_gain = torch.where(u < _SMALL, u, softplus(u.clamp_min(_SMALL)).log()) - math.log(math.log(2))
        log_rate = self.mean.log() + log_gain
        rate = log_rate.clamp_min(_SMALL).exp()
        return torch.where(log_rate < _SMALL, log_rate, rate + torch.log(-torch.expm1(-rate)))
