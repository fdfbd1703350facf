"""Layers of the built-in networks that are initialised from data: standardised inputs, heads and the base classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from pyro_nbvae.batching import Batch, Recording, random_subset

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
    def initialize(self, data: Recording) -> None:
        """Initialise from observations (N, *event_shape), floating point."""

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
def initialize(network: nn.Module, data: Batch, *, again: bool = True) -> None:
    """Initialise the data-dependent parts of a network; other modules are not changed.

    Args:
        network: the network.
        data: observations (N, *event_shape), floating point.
        again: whether to repeat the initialisation of parts that have been initialised.
    """
    for part in network.modules():
        if isinstance(part, DataDependent) and (again or not part.initialized):
            like = next((t for t in chain(part.parameters(), part.buffers()) if t.is_floating_point()), None)
            part.initialize(Recording.of(data) if like is None else Recording.of(data).like(like))
            part.initialized = True


def moments(x: Tensor, dims: tuple[int, ...] = (0,), mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over ``dims``, the first of which is dropped, in float64.

    Args:
        x: observations (N, ...).
        dims: dimensions over which they are taken.
        mask: True where a value was observed; where none was along ``dims``, mean and standard deviation are 0.
    """
    x = x.to("cpu" if x.device.type == "mps" else x.device).double()  # MPS has no float64
    if mask is None:
        mean = x.mean(dims, keepdim=True)
        return mean[0], (x - mean).square().mean(dims, keepdim=True)[0].sqrt()
    mask = mask.to(x.device).expand(x.shape)
    number = mask.sum(dims, keepdim=True).clamp_min(1)
    mean = x.masked_fill(~mask, 0).sum(dims, keepdim=True) / number
    squares = (x - mean).square().masked_fill(~mask, 0)
    return mean[0], (squares.sum(dims, keepdim=True) / number)[0].sqrt()


def _varies(mean: Tensor, deviation: Tensor) -> Tensor:
    """Return where values are not constant, up to rounding."""
    return deviation > 1e-6 * mean.abs()


def divisors(mean: Tensor, deviation: Tensor) -> Tensor:
    """Return standard deviations to divide by: 1 where values are constant."""
    return torch.where(_varies(mean, deviation), deviation, 1.0)


class _Standardize(nn.Module):
    """(x - mean) / deviation, with moments of the training data: per channel of images, else per element.

    It is 0 where nothing was observed. With an exposure e, x is replaced by the value per mean exposure of the training
    data, x * ``mean_exposure`` / e.

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

        self.mean_exposure = 1.0

    def _read(self, x: Tensor, exposure: Tensor | None) -> Tensor:
        if exposure is not None:
            x = x * (self.mean_exposure / exposure)
        return x.log1p() if self.discrete else x

    def forward(self, x: Tensor, mask: Tensor | None = None, exposure: Tensor | None = None) -> Tensor:
        if mask is None:
            return (self._read(x, exposure) - self.mean) / self.deviation
        # also not infinite in between, because the gradient would not be finite
        standardized = (self._read(x.masked_fill(~mask, 1), exposure) - self.mean) / self.deviation
        return standardized.masked_fill(~mask, 0)

    def initialize(self, data: Recording) -> None:
        if data.exposure is not None:
            self.mean_exposure = data.mean_exposure
        mean, deviation = moments(self._read(data.filled(), data.exposure), self.dims, data.mask)
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
        covariates: number of covariates, which the heads read beside the features.
    """

    head: type[_Head | _NormalizedHead] = _Head

    def __init__(
        self,
        event_shape: tuple[int, ...],
        latents: int,
        heads: int,
        initial_output_scale: float = 1.0,
        discrete: bool = False,
        covariates: int = 0,
    ) -> None:
        super().__init__()
        self.inputs = _Standardize(event_shape, discrete)
        self.features = self.build_features(event_shape)
        with torch.no_grad():
            width = self.features(torch.zeros(1, *event_shape)).shape[-1] + covariates
        of_row = self.latents_of_row(event_shape, latents)
        self.heads = nn.ModuleList(self.head(width, of_row, initial_output_scale) for _ in range(heads))

    @abstractmethod
    def build_features(self, event_shape: tuple[int, ...]) -> nn.Module:
        """Return the module from standardised observations (B, *event_shape) to features (B, width) or (B, n, width).

        Of n rows of features, each has its part of the latents.
        """

    def latents_of_row(self, event_shape: tuple[int, ...], latents: int) -> int:
        """Return the number of latents that a row of features determines: all, where there is one row."""
        return latents

    def _featured(self, x: Tensor, mask: Tensor | None, exposure: Tensor | None, covariates: Tensor | None) -> Tensor:
        """Return what the heads read, (B, width) or (B * n, width)."""
        h = self.features(self.inputs(x, mask, exposure))
        if covariates is not None:
            c = covariates.to(h).reshape(h.shape[0], *(1 for _ in range(h.dim() - 2)), -1)
            h = torch.cat([h, c.expand(*h.shape[:-1], -1)], -1)
        return h.flatten(0, -2)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        exposure: Tensor | None = None,
        covariates: Tensor | None = None,
    ) -> Tensor:
        h = self._featured(x, mask, exposure, covariates)
        return torch.stack([head(h).reshape(x.shape[0], -1) for head in self.heads], dim=1)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.initialized, self.inputs.mean_exposure], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        super().set_extra_state(state.flatten()[0])
        if not state.is_meta and state.numel() > 1:
            self.inputs.mean_exposure = float(state[1])

    def initialize(self, data: Recording) -> None:
        self.inputs.initialize(data)
        used = random_subset(data, _HEAD_OBSERVATIONS)
        with evaluation_mode(self):  # without dropout
            features = self._featured(used.x, used.mask, used.exposure, used.covariates)
        for head in self.heads:
            assert isinstance(head, _Head | _NormalizedHead)
            head.initialize(features)


class NormalizedEncoder(Encoder):
    """Base class of encoders whose heads end in a layer norm."""

    head = _NormalizedHead
