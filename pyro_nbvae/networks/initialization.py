"""Parts of the built-in networks that start from data: standardised inputs, heads and last layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from pyro_nbvae.batching import thinned

# Outputs over which the layer norm of a head is taken at least: over one it returns a constant, over K it loses a rank.
NORMALIZED = 32
# Least standard deviation of log(1 + x): a spike of a neuron that is nearly always silent is not 30 deviations.
LEAST_DEVIATION = 0.1
# Standard deviation over the data of the outputs of a head without a norm, in units of its spread. Posteriors that
# start far apart cost more nats than a decoder saves before it can read them, and the units collapse.
APART = 0.15
# Number of observations by which the heads start.
SHOWN = 512


class DataDependent(nn.Module):
    """A module whose start depends on data. Whether it has started is saved with its parameters.

    Attributes:
        initialized: whether :meth:`initialize` has been called.
    """

    initialized = False

    def initialize(self, x: Tensor) -> None:
        """Start from observations ``x`` (N, *event_shape), floating point."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.initialized)

    def set_extra_state(self, state: Tensor) -> None:
        self.initialized = state.is_meta or bool(state)


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Context in which modules are in evaluation mode, without dropout; the mode of each submodule is restored."""
    modes = [(each, each.training) for module in modules for each in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode


@torch.no_grad()
def initialize(network: nn.Module, x: Tensor, *, again: bool = True) -> None:
    """Start the parts of a network that depend on data; a user's own modules have none.

    Args:
        network: the network.
        x: observations (N, *event_shape), floating point.
        again: whether parts that have started start again.
    """
    for part in network.modules():
        if isinstance(part, DataDependent) and (again or not part.initialized):
            part.initialize(x.to(next(chain(part.parameters(), part.buffers()))))  # its device and precision
            part.initialized = True


def moments(x: Tensor, dims: tuple[int, ...] = (0,)) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over dimensions, the first of which is dropped, in double precision."""
    x = x.to("cpu" if x.device.type == "mps" else x.device).double()  # MPS has no double precision
    mean = x.mean(dims, keepdim=True)
    return mean[0], (x - mean).square().mean(dims, keepdim=True)[0].sqrt()


def varies(mean: Tensor, deviation: Tensor) -> Tensor:
    """Return what is not constant, up to rounding."""
    return deviation > 1e-6 * mean.abs()


def divisors(mean: Tensor, deviation: Tensor) -> Tensor:
    """Return standard deviations to divide by: 1 for what is constant."""
    return torch.where(varies(mean, deviation), deviation, 1.0)


class Standardize(nn.Module):
    """(x - mean) / deviation, with the moments of the training data: by channel of images, else by element.

    Args:
        event_shape: shape of one observation.
        discrete: whether observations are whole numbers from 0, which are read as log(1 + x).
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, event_shape: tuple[int, ...], discrete: bool) -> None:
        super().__init__()
        self.discrete = discrete
        on_images = len(event_shape) == 3
        self.dims = (0, 2, 3) if on_images else (0,)
        shape = (event_shape[0], 1, 1) if on_images else tuple(event_shape)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("deviation", torch.ones(shape))

    def _read(self, x: Tensor) -> Tensor:
        return x.log1p() if self.discrete else x

    def forward(self, x: Tensor) -> Tensor:
        return (self._read(x) - self.mean) / self.deviation

    def initialize(self, x: Tensor) -> None:
        mean, deviation = moments(self._read(x), self.dims)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp_min(LEAST_DEVIATION) if self.discrete else divisors(mean, deviation))


class Head(nn.Linear):
    """A linear layer from features (B, width) to (B, latents).

    Over the data its outputs start with mean 0 and standard deviation 0.15 ``spread``; without data they are multiplied
    by ``spread``.
    """

    def __init__(self, width: int, latents: int, spread: float) -> None:
        super().__init__(width, latents)
        self.spread = float(spread)
        with torch.no_grad():
            self._multiply(torch.full((latents,), self.spread))

    def _multiply(self, factor: Tensor) -> None:
        self.weight.mul_(factor.to(self.weight)[:, None])
        self.bias.mul_(factor.to(self.bias))

    def initialize(self, features: Tensor) -> None:
        mean, deviation = moments(self(features))
        self.bias.sub_(mean.to(self.bias))
        self._multiply(torch.where(varies(mean, deviation), APART * self.spread / deviation, 1.0))


class NormalizedHead(nn.Module):
    """A linear layer and a layer norm, from features (B, width) to (B, latents).

    Its outputs start with the standard deviation ``spread`` over the outputs, and with mean 0 over the data before the
    norm. The norm is over 32 outputs at least; those beyond the latents are dropped.
    """

    def __init__(self, width: int, latents: int, spread: float) -> None:
        super().__init__()
        outputs = max(latents, NORMALIZED)
        self.linear = nn.Linear(width, outputs)
        self.norm = nn.LayerNorm(outputs, elementwise_affine=False)
        self.scale = nn.Parameter(torch.full((latents,), float(spread)))
        self.shift = nn.Parameter(torch.zeros(latents))

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.linear(features))[..., : len(self.scale)] * self.scale + self.shift

    def initialize(self, features: Tensor) -> None:
        mean, _ = moments(self.linear(features))
        self.linear.bias.sub_(mean.to(self.linear.bias))


class Encoder(DataDependent):
    """Base class of encoders: standardised observations (B, *event_shape), features, heads: (B, heads, latents).

    Args:
        event_shape: shape of one observation.
        features: from observations to features (B, width).
        heads: the heads, modules from features (B, width) to (B, latents), made from the width.
        discrete: as :class:`Standardize`.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        features: nn.Module,
        heads: Callable[[int], Iterable[Head | NormalizedHead]],
        discrete: bool,
    ) -> None:
        super().__init__()
        self.inputs = Standardize(event_shape, discrete)
        self.features = features
        with torch.no_grad():
            width = features(torch.zeros(1, *event_shape)).shape[1]
        self.heads = nn.ModuleList(heads(width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(self.inputs(x))
        return torch.stack([head(h) for head in self.heads], dim=1)

    def initialize(self, x: Tensor) -> None:
        self.inputs.initialize(x)
        with evaluation_mode(self):  # without dropout
            features = self.features(self.inputs(thinned(x, SHOWN)))
        for head in self.heads:
            assert isinstance(head, Head | NormalizedHead)
            head.initialize(features)
