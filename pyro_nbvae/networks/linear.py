"""Linear networks, one layer each."""

from __future__ import annotations

import math

from torch import nn

from pyro_nbvae.networks.initialization import Encoder, Head
from pyro_nbvae.networks.outputs import Decoder


class LinearEncoder(Encoder):
    """A linear layer from observations (B, *event_shape) to (B, heads, latents)."""

    def __init__(
        self,
        event_shape: tuple[int, ...],
        latents: int,
        heads: int,
        initial_output_scale: float = 1.0,
        discrete: bool = False,
    ) -> None:
        super().__init__(
            event_shape,
            nn.Flatten(),
            lambda width: (Head(width, latents, initial_output_scale) for _ in range(heads)),
            discrete,
        )


class LinearDecoder(Decoder):
    """A linear layer from latents (B, latents) to (B, *event_shape); its weight columns are the units' features."""

    def __init__(self, event_shape: tuple[int, ...], latents: int, output: nn.Module) -> None:
        super().__init__(output)
        self.layers = nn.Sequential(nn.Linear(latents, math.prod(event_shape)), nn.Unflatten(1, event_shape))
