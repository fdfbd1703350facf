"""Dense networks."""

from __future__ import annotations

import math

from torch import Tensor, nn

from pyro_nbvae.networks.initialization import Encoder, Head

# Least and largest width of the residual block; 64-pixel colour images would need 1.2e9 weights per layer.
NARROWEST, WIDEST = 64, 1024


def _width(size: int) -> int:
    return min(max(size, NARROWEST), WIDEST)


class ResidualDense(nn.Module):
    """h + Linear(Dropout(ReLU(Linear(LayerNorm(h))))), with a hidden layer eight times as wide.

    The norm is inside the branch: h passes whole.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 8 * width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8 * width, width)
        )

    def forward(self, h: Tensor) -> Tensor:
        return h + self.inner(h)


class MLPEncoder(Encoder):
    """A residual dense block and a linear layer, from observations (B, *event_shape) to (B, heads, latents)."""

    def __init__(
        self, event_shape: tuple[int, ...], latents: int, heads: int, spread: float = 1.0, discrete: bool = False
    ) -> None:
        size = math.prod(event_shape)
        width = _width(size)
        super().__init__(
            event_shape,
            nn.Sequential(nn.Flatten(), nn.Linear(size, width), ResidualDense(width)),
            lambda width: (Head(width, latents, spread) for _ in range(heads)),
            discrete,
        )


class MLPDecoder(nn.Module):
    """Linear, SiLU, residual dense block, SiLU, linear, from latents (B, latents) to (B, *event_shape)."""

    def __init__(self, event_shape: tuple[int, ...], latents: int, output: nn.Module) -> None:
        super().__init__()
        size = math.prod(event_shape)
        width = _width(size)
        self.layers = nn.Sequential(
            nn.Linear(latents, width),
            nn.SiLU(),
            ResidualDense(width),
            nn.SiLU(),
            nn.Linear(width, size),
            nn.Unflatten(1, event_shape),
        )
        self.output = output

    def forward(self, z: Tensor) -> Tensor:
        return self.output(self.layers(z))
