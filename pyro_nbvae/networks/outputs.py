"""Last layers of the built-in decoders, which are initialised at the mean of the training data."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_nbvae.batching import Recording, value_range
from pyro_nbvae.networks.initialization import DataDependent, divisors, moments

# Below this, softplus is the exponential function in float32.
_SMALL = -17.0


class Output(DataDependent):
    """Base class of the last layers of built-in decoders: from a to what the likelihood reads.

    At a = 0 the likelihood's mean is the mean of the training data, element by element.

    Args:
        event_shape: shape of one observation.
        mean: the mean before initialisation.

    Attributes:
        unit_interval: whether the likelihood's mean is in [0, 1], so that observations must be.
    """

    mean: Tensor
    unit_interval = False

    def __init__(self, event_shape: tuple[int, ...], mean: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full(event_shape, mean))

    def fixed(self) -> nn.Module:
        """Return the layer that replaces this one in the released networks, which do not depend on data."""
        return nn.Identity()

    def initialize(self, data: Recording) -> None:
        self.mean.copy_(rates(data))


def rates(data: Recording) -> Tensor:
    """Return the mean of each element over observed values; with exposures, the sum of values over that of exposures.

    Args:
        data: observations (N, *event_shape).
    """
    if data.exposure is None:
        return moments(data.x, (0,), data.mask)[0]
    exposed = data.exposure.expand(data.x.shape)
    # a ratio of means is that of the sums
    total, exposures = (moments(x, (0,), data.mask)[0] for x in (data.x, exposed))
    return total / exposures.clamp_min(torch.finfo(exposures.dtype).tiny)


def per_exposure(data: Recording) -> Tensor:
    """Return values divided by their exposures, of which the last layer gives the mean."""
    return data.x if data.exposure is None else data.x / data.exposure


class Decoder(nn.Module):
    """Base class of built-in decoders: ``layers`` from latents (B, latents) to (B, *event_shape), then the last layer.

    Args:
        output: the last layer, which the likelihood chooses.
    """

    layers: nn.Module

    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        self.output = output

    @property
    def unit_interval(self) -> bool:
        """Whether the output is in [0, 1], because it ends in a sigmoid."""
        return self.output.unit_interval if isinstance(self.output, Output) else isinstance(self.output, nn.Sigmoid)

    def forward(self, z: Tensor) -> Tensor:
        return self.output(self.layers(z))


class RealOutput(Output):
    """mean + deviation * a, with the standard deviation of each element."""

    deviation: Tensor

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape, 0.0)
        self.register_buffer("deviation", torch.ones(event_shape))

    def initialize(self, data: Recording) -> None:
        _, deviation = moments(per_exposure(data), (0,), data.mask)
        mean = rates(data)
        self.mean.copy_(mean)
        self.deviation.copy_(divisors(mean, deviation))

    def forward(self, a: Tensor) -> Tensor:
        return self.mean + self.deviation * a


class ImageOutput(Output):
    """low + (high - low) * sigmoid(a + logit(mean)); low and high are 0 and 1, or the range of data that exceed it."""

    # Initial distance of a pixel that is always black or white from that value: the sigmoid has a slope there.
    _MARGIN = 0.01

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape, 0.5)
        self.low, self.high = 0.0, 1.0

    @property
    def unit_interval(self) -> bool:  # type: ignore[override]
        return (self.low, self.high) == (0, 1)

    def fixed(self) -> nn.Module:
        return nn.Sigmoid()

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.initialized, self.low, self.high], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        super().set_extra_state(state.flatten()[0])
        if not state.is_meta:
            _, self.low, self.high = state.tolist()

    def initialize(self, data: Recording) -> None:
        x = per_exposure(data)
        self.low, self.high = value_range(x if data.mask is None else x[data.mask.expand(x.shape)])
        mean = (rates(data) - self.low) / (self.high - self.low)
        self.mean.copy_(mean.clamp(self._MARGIN, 1 - self._MARGIN))

    def forward(self, a: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * torch.sigmoid(a + self.mean.logit())


class LogitOutput(Output):
    """a + logit(mean), where the mean is that of the data and half an observation of each value."""

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape, 0.5)

    def initialize(self, data: Recording) -> None:
        self.mean.copy_((moments(data.x, (0,), data.mask)[0] * len(data) + 0.5) / (len(data) + 1))

    def forward(self, a: Tensor) -> Tensor:
        return a + self.mean.logit()


class CountOutput(Output):
    """h with softplus(h) = mean * log2(1 + 4^a): like mean * e^a near a = 0, and at most linear in a above.

    Args:
        event_shape: shape of one observation.
        axis: the axis of a along which other parameters of the likelihood may stand behind; they pass unchanged.
    """

    def __init__(self, event_shape: tuple[int, ...], axis: int = -1) -> None:
        super().__init__(event_shape, math.log(2))  # h is 0 at a = 0
        self.axis = axis

    def initialize(self, data: Recording) -> None:
        self.mean.copy_(rates(data).clamp_min(0.5 / ((len(data) + 1) * data.mean_exposure)))

    def forward(self, a: Tensor) -> Tensor:
        size = self.mean.shape[self.axis]
        if a.shape[self.axis] > size:
            first, others = a.split([size, a.shape[self.axis] - size], self.axis)
            return torch.cat([self.of_mean(first), others], self.axis)
        return self.of_mean(a)

    def of_mean(self, a: Tensor) -> Tensor:
        """Return h for a, (B, *event_shape)."""
        u = 2 * math.log(2) * a
        log_multiplier = torch.where(u < _SMALL, u, softplus(u.clamp_min(_SMALL)).log()) - math.log(math.log(2))
        log_rate = self.mean.log() + log_multiplier
        rate = log_rate.clamp_min(_SMALL).exp()
        return torch.where(log_rate < _SMALL, log_rate, rate + torch.log(-torch.expm1(-rate)))
