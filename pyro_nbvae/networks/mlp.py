"""The paper's dense networks (DESIGN 3.7)."""

from __future__ import annotations

import math

from torch import Tensor, nn

# The residual block works on the image itself up to this many pixels times channels; on larger images (64-pixel
# colour would take 1.2e9 weights a layer) on a linear projection to this width.
WIDEST = 1024


class ResidualDense(nn.Module):
    """LayerNorm(h + Linear(Dropout(ReLU(Linear(h))))), eight times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 8 * width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h + self.inner(h))


class MLPEncoder(nn.Module):
    """A residual dense block and a linear layer; images (B, C, H, W) to (B, heads, latents)."""

    def __init__(self, image_shape: tuple[int, int, int], latents: int, heads: int) -> None:
        super().__init__()
        pixels = math.prod(image_shape)
        width = min(pixels, WIDEST)
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Identity() if width == pixels else nn.Linear(pixels, width),
            ResidualDense(width),
            nn.Linear(width, heads * latents),
            nn.Unflatten(1, (heads, latents)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MLPDecoder(nn.Module):
    """Linear, SiLU, residual dense block, SiLU, linear, sigmoid; latents (B, latents) to images in [0, 1]."""

    def __init__(self, image_shape: tuple[int, int, int], latents: int) -> None:
        super().__init__()
        pixels = math.prod(image_shape)
        width = min(pixels, WIDEST)
        self.layers = nn.Sequential(
            nn.Linear(latents, width),
            nn.SiLU(),
            ResidualDense(width),
            nn.SiLU(),
            nn.Linear(width, pixels),
            nn.Sigmoid(),
            nn.Unflatten(1, image_shape),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)
