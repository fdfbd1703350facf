"""Networks for recordings (bins, neurons): convolutions over the bins of a trial.

``temporal`` has latents of a trial, ``temporal_bins`` latents of each bin: of K latents, k = K / bins belong to each
bin, in the order of the bins, so that ``z.reshape(-1, bins, k)`` are trajectories.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_nbvae.errors import InputError
from pyro_nbvae.networks.initialization import Encoder
from pyro_nbvae.networks.outputs import Decoder

# Channels of the hidden layers, and number of bins that a convolution reads.
_CHANNELS, _KERNEL = 128, 5
_DROPOUT = 0.1


def check_recording_shape(event_shape: tuple[int, ...]) -> tuple[int, int]:
    """Return bins and neurons of a shape.

    Raises:
        InputError: unless it is (bins, neurons).
    """
    if len(event_shape) != 2:
        raise InputError(
            f"temporal networks need observations of shape (bins, neurons), got {tuple(event_shape)}: use mlp, linear "
            "or a module of your own"
        )
    return event_shape[0], event_shape[1]


def latents_per_bin(event_shape: tuple[int, ...], latents: int) -> int:
    """Return the number of latents of each bin.

    Raises:
        InputError: if it is not a whole number.
    """
    bins, _ = check_recording_shape(event_shape)
    if latents % bins:
        raise InputError(f"temporal_bins needs a multiple of {bins} latents, as many as bins, got {latents}")
    return latents // bins


class _OverBins(nn.Module):
    """(B, bins, in) to (B, bins, out): a layer for each bin, a residual block of convolutions, a layer for each bin."""

    def __init__(self, inputs: int, outputs: int | None) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, _CHANNELS)
        self.block = nn.Sequential(
            nn.SiLU(),
            nn.Conv1d(_CHANNELS, _CHANNELS, _KERNEL, padding="same"),
            nn.SiLU(),
            nn.Dropout(_DROPOUT),
            nn.Conv1d(_CHANNELS, _CHANNELS, _KERNEL, padding="same"),
        )
        self.last = nn.Identity() if outputs is None else nn.Linear(_CHANNELS, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h + self.block(h.mT).mT)


class TemporalEncoder(Encoder):
    """Convolutions over bins, and linear heads that read all bins: (B, bins, neurons) to (B, heads, latents)."""

    def build_features(self, event_shape: tuple[int, ...]) -> nn.Module:
        _, neurons = check_recording_shape(event_shape)
        return nn.Sequential(_OverBins(neurons, None), nn.Flatten())


class TemporalDecoder(Decoder):
    """A linear layer to all bins, then convolutions over them: (B, latents) to (B, bins, neurons)."""

    def __init__(self, event_shape: tuple[int, ...], latents: int, output: nn.Module) -> None:
        super().__init__(output)
        bins, neurons = check_recording_shape(event_shape)
        expand = nn.Linear(latents, bins * _CHANNELS)
        self.layers = nn.Sequential(expand, nn.Unflatten(1, (bins, _CHANNELS)), _OverBins(_CHANNELS, neurons))


class TemporalBinsEncoder(Encoder):
    """Convolutions over bins, and linear heads at each bin: (B, bins, neurons) to (B, heads, bins * k)."""

    def build_features(self, event_shape: tuple[int, ...]) -> nn.Module:
        _, neurons = check_recording_shape(event_shape)
        return _OverBins(neurons, None)

    def latents_of_row(self, event_shape: tuple[int, ...], latents: int) -> int:
        return latents_per_bin(event_shape, latents)


class TemporalBinsDecoder(Decoder):
    """Convolutions over the latents of all bins: (B, bins * k) to (B, bins, neurons).

    Covariates are read at each bin.
    """

    def __init__(self, event_shape: tuple[int, ...], latents: int, output: nn.Module, covariates: int = 0) -> None:
        super().__init__(output)
        self.per_bin = latents_per_bin(event_shape, latents)
        self.bins, neurons = check_recording_shape(event_shape)
        self.layers = _OverBins(self.per_bin + covariates, neurons)

    def forward(self, z: Tensor) -> Tensor:
        each, given = z.split([self.bins * self.per_bin, z.shape[1] - self.bins * self.per_bin], 1)
        each = each.unflatten(1, (self.bins, self.per_bin))
        return self.output(self.layers(torch.cat([each, given[:, None].expand(-1, self.bins, -1)], -1)))
