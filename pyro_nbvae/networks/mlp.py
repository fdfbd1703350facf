"""The paper's dense networks."""

from __future__ import annotations

import math

from torch import Tensor, nn

from pyro_nbvae.networks.linear import scale_outputs

# Up to this many elements the residual block works on the observation itself, beyond on a linear projection to this
# width (64-pixel colour images would need 1.2e9 weights per layer).
WIDEST = 1024


class ResidualDense(nn.Module):
    """LayerNorm(h + Linear(Dropout(ReLU(Linear(h))))), with a hidden layer eight times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 8 * width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h + self.inner(h))


class MLPEncoder(nn.Module):
    """A residual dense block and a linear layer, from observations (B, *event_shape) to (B, heads, latents)."""

    def __init__(self, event_shape: tuple[int, ...], latents: int, heads: int, spread: float = 1.0) -> None:
        super().__init__()
        size = math.prod(event_shape)
        width = min(size, WIDEST)
        last = nn.Linear(width, heads * latents)
        scale_outputs(last, spread)
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Identity() if width == size else nn.Linear(size, width),
            ResidualDense(width),
            last,
            nn.Unflatten(1, (heads, latents)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MLPDecoder(nn.Module):
    """Linear, SiLU, residual dense block, SiLU, linear, from latents (B, latents) to (B, *event_shape)."""

    def __init__(self, event_shape: tuple[int, ...], latents: int, output: nn.Module) -> None:
        super().__init__()
        size = math.prod(event_shape)
        width = min(size, WIDEST)
        self.layers = nn.Sequential(
            nn.Linear(latents, width),
            nn.SiLU(),
            ResidualDense(width),
            nn.SiLU(),
            nn.Linear(width, size),
            output,
            nn.Unflatten(1, event_shape),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)
