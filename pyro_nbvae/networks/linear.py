"""One linear layer each way (DESIGN 3.7)."""

from __future__ import annotations

import math

from torch import Tensor, nn


class LinearEncoder(nn.Module):
    """Images (B, C, H, W) to (B, heads, latents)."""

    def __init__(self, image_shape: tuple[int, int, int], latents: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(math.prod(image_shape), heads * latents), nn.Unflatten(1, (heads, latents))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class LinearDecoder(nn.Module):
    """Latents (B, latents) to images (B, C, H, W) in [0, 1]; the columns of the weight are the units' features."""

    def __init__(self, image_shape: tuple[int, int, int], latents: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(latents, math.prod(image_shape)), nn.Sigmoid(), nn.Unflatten(1, image_shape)
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)
