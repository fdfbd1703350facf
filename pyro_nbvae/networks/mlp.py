"""Dense networks."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from pyro_nbvae.networks.initialization import Encoder, Head
from pyro_nbvae.networks.outputs import Decoder

# Minimum and maximum width of the residual block; 64-pixel colour images would need 1.2e9 weights per layer.
_MIN_WIDTH, MAX_WIDTH = 64, 1024


def _width(size: int) -> int:
    return min(max(size, _MIN_WIDTH), MAX_WIDTH)


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

    def __init__(
        self,
        event_shape: tuple[int, ...],
        latents: int,
        heads: int,
        initial_output_scale: float = 1.0,
        discrete: bool = False,
    ) -> None:
        size = math.prod(event_shape)
        width = _width(size)
        super().__init__(
            event_shape,
            nn.Sequential(nn.Flatten(), nn.Linear(size, width), _ResidualDense(width)),
            lambda width: (Head(width, latents, initial_output_scale) for _ in range(heads)),
            discrete,
        )


def dense_decoder(
    event_shape: tuple[int, ...], latents: int, width: int, block: Callable[[int], nn.Module]
) -> nn.Sequential:
    """Return linear, SiLU, a block of this width, SiLU, linear, from latents (B, latents) to (B, *event_shape)."""
    return nn.Sequential(
        nn.Linear(latents, width),
        nn.SiLU(),
        block(width),
        nn.SiLU(),
        nn.Linear(width, math.prod(event_shape)),
        nn.Unflatten(1, event_shape),
    )


class MLPDecoder(Decoder):
    """Linear, SiLU, residual dense block, SiLU, linear, from latents (B, latents) to (B, *event_shape)."""

    def __init__(self, event_shape: tuple[int, ...], latents: int, output: nn.Module) -> None:
        super().__init__(output)
        self.layers = dense_decoder(event_shape, latents, _width(math.prod(event_shape)), _ResidualDense)
