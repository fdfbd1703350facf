"""Layers of the built-in networks that are initialised from data: standardised inputs, heads and the base classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from pyro_nbvae.batching import evenly_spaced

# Minimum number of outputs that a layer norm normalises: over one output it returns a constant, over K it loses a rank.
_MIN_NORMALIZED = 32
# Minimum standard deviation of log(1 + x): a spike of a neuron that is almost always silent is not 30 deviations.
_MIN_COUNT_DEVIATION = 0.1
# Initial standard deviation over the data of a head without a norm, relative to its initial output scale. If posteriors
# differ more than this at first, they cost more nats than the decoder saves before it can read them, and the units
# collapse.
_INITIAL_DEVIATION = 0.15
# Number of observations that initialise the heads.
_HEAD_OBSERVATIONS = 512


class DataDependent(nn.Module, ABC):
    """Base class of modules that are initialised from data; ``state_dict`` includes whether they have been.

    Attributes:
        initialized: whether the module has been initialised.
    """

    initialized = False

    @abstractmethod
    def initialize(self, x: Tensor) -> None:
        """Initialise from observations ``x`` (N, *event_shape), floating point."""

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.initialized)

    def set_extra_state(self, state: Tensor) -> None:
        self.initialized = state.is_meta or bool(state)


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Context in which modules are in evaluation mode, without dropout; the mode of each submodule is restored."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@torch.no_grad()
def initialize(network: nn.Module, x: Tensor, *, again: bool = True) -> None:
    """Initialise the data-dependent parts of a network; other modules are not changed.

    Args:
        network: the network.
        x: observations (N, *event_shape), floating point.
        again: whether to repeat the initialisation of parts that have been initialised.
    """
    for part in network.modules():
        if isinstance(part, DataDependent) and (again or not part.initialized):
            part.initialize(x.to(next(chain(part.parameters(), part.buffers()))))  # its device and precision
            part.initialized = True


def moments(x: Tensor, dims: tuple[int, ...] = (0,)) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over ``dims``, the first of which is dropped, in float64."""
    x = x.to("cpu" if x.device.type == "mps" else x.device).double()  # MPS has no float64
    mean = x.mean(dims, keepdim=True)
    return mean[0], (x - mean).square().mean(dims, keepdim=True)[0].sqrt()


def _varies(mean: Tensor, deviation: Tensor) -> Tensor:
    """Return where values are not constant, up to rounding."""
    return deviation > 1e-6 * mean.abs()


def divisors(mean: Tensor, deviation: Tensor) -> Tensor:
    """Return standard deviations to divide by: 1 where values are constant."""
    return torch.where(_varies(mean, deviation), deviation, 1.0)


class _Standardize(nn.Module):
    """(x - mean) / deviation, with moments of the training data: per channel of images, else per element.

    Args:
        event_shape: shape of one observation.
        discrete: whether observations are counts, which are read as log(1 + x).
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
        self.deviation.copy_(deviation.clamp_min(_MIN_COUNT_DEVIATION) if self.discrete else divisors(mean, deviation))


class _Head(nn.Linear):
    """A linear layer from features (B, width) to (B, latents).

    Args:
        width: number of features.
        latents: number of latents.
        initial_output_scale: after initialisation the outputs have mean 0 and 0.15 times this standard deviation over
            the data; before it, they are those of a linear layer, multiplied by this factor.
    """

    def __init__(self, width: int, latents: int, initial_output_scale: float) -> None:
        super().__init__(width, latents)
        self.initial_output_scale = float(initial_output_scale)
        with torch.no_grad():
            self._multiply(torch.full((latents,), self.initial_output_scale))

    def _multiply(self, factor: Tensor) -> None:
        self.weight.mul_(factor.to(self.weight)[:, None])
        self.bias.mul_(factor.to(self.bias))

    def initialize(self, features: Tensor) -> None:
        mean, deviation = moments(self(features))
        self.bias.sub_(mean.to(self.bias))
        wanted = _INITIAL_DEVIATION * self.initial_output_scale
        self._multiply(torch.where(_varies(mean, deviation), wanted / deviation, 1.0))


class _NormalizedHead(nn.Module):
    """A linear layer and a layer norm, from features (B, width) to (B, latents).

    The norm is over at least 32 outputs; those beyond the latents are dropped.

    Args:
        width: number of features.
        latents: number of latents.
        initial_output_scale: initial standard deviation over the outputs; before the norm they have mean 0 over the
            data after initialisation.
    """

    def __init__(self, width: int, latents: int, initial_output_scale: float) -> None:
        super().__init__()
        outputs = max(latents, _MIN_NORMALIZED)
        self.linear = nn.Linear(width, outputs)
        self.norm = nn.LayerNorm(outputs, elementwise_affine=False)
        self.scale = nn.Parameter(torch.full((latents,), float(initial_output_scale)))
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
        latents: number of latents K.
        heads: number of outputs per latent.
        initial_output_scale: scale of the outputs at initialisation.
        discrete: whether observations are counts, which are read as log(1 + x).
    """

    head: type[_Head | _NormalizedHead] = _Head

    def __init__(
        self,
        event_shape: tuple[int, ...],
        latents: int,
        heads: int,
        initial_output_scale: float = 1.0,
        discrete: bool = False,
    ) -> None:
        super().__init__()
        self.inputs = _Standardize(event_shape, discrete)
        self.features = self.build_features(event_shape)
        with torch.no_grad():
            width = self.features(torch.zeros(1, *event_shape)).shape[1]
        self.heads = nn.ModuleList(self.head(width, latents, initial_output_scale) for _ in range(heads))

    @abstractmethod
    def build_features(self, event_shape: tuple[int, ...]) -> nn.Module:
        """Return the module from standardised observations (B, *event_shape) to features (B, width)."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(self.inputs(x))
        return torch.stack([head(h) for head in self.heads], dim=1)

    def initialize(self, x: Tensor) -> None:
        self.inputs.initialize(x)
        with evaluation_mode(self):  # without dropout
            features = self.features(self.inputs(evenly_spaced(x, _HEAD_OBSERVATIONS)))
        for head in self.heads:
            assert isinstance(head, _Head | _NormalizedHead)
            head.initialize(features)


class NormalizedEncoder(Encoder):
    """Base class of encoders whose heads end in a layer norm."""

    head = _NormalizedHead
