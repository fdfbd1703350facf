"""One linear layer each way."""

from __future__ import annotations

import math

from torch import Tensor, nn


class LinearEncoder(nn.Module):
    """Observations (B, *event_shape) to (B, heads, latents)."""

    def __init__(self, event_shape: tuple[int, ...], latents: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(math.prod(event_shape), heads * latents), nn.Unflatten(1, (heads, latents))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class LinearDecoder(nn.Module):
    """Latents (B, latents) to (B, *event_shape); the columns of the weight are the units' features."""

    def __init__(self, event_shape: tuple[int, ...], latents: int, output: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(latents, math.prod(event_shape)), output, nn.Unflatten(1, event_shape))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)
