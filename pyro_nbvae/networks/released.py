"""The paper's networks as released, which the reproduced tables use.

They lose information if there are few latents or small observations, and they are not initialised from data, unlike
conv, mlp and linear.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyro_nbvae.networks.conv import ConvDecoder, check_image_shape
from pyro_nbvae.networks.linear import LinearDecoder
from pyro_nbvae.networks.mlp import MAX_WIDTH, MLPDecoder
from pyro_nbvae.networks.outputs import Output

# Minimum number of pixels a side.
_MIN_SIDE = 8


def _fixed(output: nn.Module) -> nn.Module:
    """Return a last layer that does not depend on data."""
    return output.fixed() if isinstance(output, Output) else output


class _ReleasedConvEncoder(nn.Module):
    """Two 4x4 convolutions of stride 2, then one linear layer and a LayerNorm per head.

    It maps images (B, C, H, W) to (B, heads, latents).
    """

    def __init__(
        self, event_shape: tuple[int, ...], latents: int, heads: int, initial_output_scale: float = 1.0
    ) -> None:
        super().__init__()
        check_image_shape(event_shape, _MIN_SIDE)
        padding = 0 if event_shape[1:] == (28, 28) else 1
        self.features = nn.Sequential(
            nn.Conv2d(event_shape[0], 32, 4, stride=2, padding=padding),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=padding),
            nn.ReLU(),
            nn.Flatten(),
        )
        with torch.no_grad():
            width = self.features(torch.zeros(1, *event_shape)).shape[1]
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, latents), nn.LayerNorm(latents)) for _ in range(heads)
        )
        for part in self.heads.modules():
            if isinstance(part, nn.LayerNorm):
                nn.init.constant_(part.weight, initial_output_scale)

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x.contiguous(memory_format=torch.channels_last))
        return torch.stack([head(h) for head in self.heads], dim=1)


class _ReleasedConvDecoder(ConvDecoder):
    """The layers of :class:`ConvDecoder`, without a bias behind the linear layer."""

    min_side = _MIN_SIDE

    def __init__(self, event_shape: tuple[int, ...], latents: int, output: nn.Module) -> None:
        super().__init__(event_shape, latents, _fixed(output), bias=False)

    def forward(self, z: Tensor) -> Tensor:
        return self.output(self.decoded(z))[..., : self.height, : self.width]


def _scaled(layer: nn.Linear, factor: float) -> nn.Linear:
    """Return the layer with its outputs multiplied by a factor."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(factor)
    return layer


class _ReleasedLinearEncoder(nn.Module):
    """A linear layer from observations (B, *event_shape) to (B, heads, latents)."""

    def __init__(
        self, event_shape: tuple[int, ...], latents: int, heads: int, initial_output_scale: float = 1.0
    ) -> None:
        super().__init__()
        last = _scaled(nn.Linear(math.prod(event_shape), heads * latents), initial_output_scale)
        self.layers = nn.Sequential(nn.Flatten(), last, nn.Unflatten(1, (heads, latents)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _ReleasedLinearDecoder(LinearDecoder):
    """The layer of :class:`LinearDecoder`."""

    def __init__(self, event_shape: tuple[int, ...], latents: int, output: nn.Module) -> None:
        super().__init__(event_shape, latents, _fixed(output))


class _ReleasedDense(nn.Module):
    """LayerNorm(h + Linear(Dropout(ReLU(Linear(h))))), with a hidden layer eight times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 8 * width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h + self.inner(h))


class _ReleasedMLPEncoder(nn.Module):
    """A residual dense block and a linear layer, from observations (B, *event_shape) to (B, heads, latents).

    The block is as wide as an observation; above 1,024 elements, a linear projection to this width precedes it.
    """

    def __init__(
        self, event_shape: tuple[int, ...], latents: int, heads: int, initial_output_scale: float = 1.0
    ) -> None:
        super().__init__()
        size = math.prod(event_shape)
        width = min(size, MAX_WIDTH)
        last = _scaled(nn.Linear(width, heads * latents), initial_output_scale)
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Identity() if width == size else nn.Linear(size, width),
            _ReleasedDense(width),
            last,
            nn.Unflatten(1, (heads, latents)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _ReleasedMLPDecoder(MLPDecoder):
    """The layers of :class:`MLPDecoder`, with another residual block that is as wide as an observation."""

    block = _ReleasedDense
    min_width = 1

    def __init__(self, event_shape: tuple[int, ...], latents: int, output: nn.Module) -> None:
        super().__init__(event_shape, latents, _fixed(output))


RELEASED_ENCODERS: dict[str, type[nn.Module]] = {
    "released_conv": _ReleasedConvEncoder,
    "released_mlp": _ReleasedMLPEncoder,
    "released_linear": _ReleasedLinearEncoder,
}
RELEASED_DECODERS: dict[str, type[nn.Module]] = {
    "released_conv": _ReleasedConvDecoder,
    "released_mlp": _ReleasedMLPDecoder,
    "released_linear": _ReleasedLinearDecoder,
}
