"""Dense networks."""

from __future__ import annotations

import math

from torch import Tensor, nn

from pyro_nbvae.networks.initialization import Encoder
from pyro_nbvae.networks.outputs import Decoder

# Minimum and maximum width of the residual block; 64-pixel colour images would need 1.2e9 weights per layer.
MIN_WIDTH, MAX_WIDTH = 64, 1024


class _ResidualDense(nn.Module):
    """h + Linear(Dropout(ReLU(Linear(LayerNorm(h))))), with a hidden layer eight times as wide.

    The norm is inside the branch, so that h passes unchanged.
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

    def build_features(self, event_shape: tuple[int, ...]) -> nn.Module:
        size = math.prod(event_shape)
        width = min(max(size, MIN_WIDTH), MAX_WIDTH)
        return nn.Sequential(nn.Flatten(), nn.Linear(size, width), _ResidualDense(width))


class MLPDecoder(Decoder):
    """Linear, SiLU, residual dense block, SiLU, linear, from latents (B, latents) to (B, *event_shape)."""

    block: type[nn.Module] = _ResidualDense
    min_width = MIN_WIDTH

    def __init__(self, event_shape: tuple[int, ...], latents: int, output: nn.Module) -> None:
        super().__init__(output)
        size = math.prod(event_shape)
        width = min(max(size, self.min_width), MAX_WIDTH)
        self.layers = nn.Sequential(
            nn.Linear(latents, width),
            nn.SiLU(),
            self.block(width),
            nn.SiLU(),
            nn.Linear(width, size),
            nn.Unflatten(1, event_shape),
        )
