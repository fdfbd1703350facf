"""Linear networks, one layer each."""

from __future__ import annotations

import math

from torch import nn

from pyro_nbvae.networks.initialization import Encoder
from pyro_nbvae.networks.outputs import Decoder


class LinearEncoder(Encoder):
    """A linear layer from observations (B, *event_shape) to (B, heads, latents)."""

    def build_features(self, event_shape: tuple[int, ...]) -> nn.Module:
        return nn.Flatten()


class LinearDecoder(Decoder):
    """A linear layer from latents (B, latents) to (B, *event_shape); its weight columns are the units' features."""

    def __init__(self, event_shape: tuple[int, ...], latents: int, output: nn.Module) -> None:
        super().__init__(output)
        self.layers = nn.Sequential(nn.Linear(latents, math.prod(event_shape)), nn.Unflatten(1, event_shape))
