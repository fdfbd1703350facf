"""The paper's networks as released, which its tables keep.

They lose information where latents or observations are few, and do not start from data: conv, mlp and linear do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pyro_nbvae.errors import InputError
from pyro_nbvae.networks.initialization import DataDependent


def fixed(output: nn.Module) -> nn.Module:
    """Return a last layer that does not depend on data."""
    return output.fixed() if isinstance(output, DataDependent) else output  # type: ignore[operator]


def check_image_shape(event_shape: tuple[int, ...]) -> None:
    """Raise InputError, a ValueError, unless a shape is (channels, height, width) of at least 8 pixels a side."""
    if len(event_shape) != 3 or min(event_shape[1:]) < 8:
        raise InputError(
            f"conv networks need observations of shape (channels, height, width) of 8 pixels a side or more, got "
            f"{tuple(event_shape)}: use mlp, linear or a module of your own"
        )


class ReleasedConvEncoder(nn.Module):
    """Two 4x4 convolutions of stride 2, then one linear layer and a LayerNorm per head.

    It maps images (B, C, H, W) to (B, heads, latents).
    """

    def __init__(self, event_shape: tuple[int, ...], latents: int, heads: int, spread: float = 1.0) -> None:
        super().__init__()
        check_image_shape(event_shape)
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
                nn.init.constant_(part.weight, spread)

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x.contiguous(memory_format=torch.channels_last))
        return torch.stack([head(h) for head in self.heads], dim=1)


class ReleasedConvDecoder(nn.Module):
    """A linear layer with weights normalised per latent, then two 4x4 transposed convolutions of stride 2.

    It maps latents (B, latents) to images (B, C, H, W). If a side is not a multiple of 4, the output is cropped from
    the next multiple.
    """

    def __init__(self, event_shape: tuple[int, ...], latents: int, output: nn.Module) -> None:
        super().__init__()
        check_image_shape(event_shape)
        channels, self.height, self.width = event_shape
        self.start = (128, math.ceil(self.height / 4), math.ceil(self.width / 4))
        self.expand = weight_norm(nn.Linear(latents, 128 * self.start[1] * self.start[2], bias=False), dim=1)
        self.images = nn.Sequential(
            nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(64, channels, 4, stride=2, padding=1),
            fixed(output),
        )

    def forward(self, z: Tensor) -> Tensor:
        h = torch.relu(self.expand(z)).unflatten(1, self.start)
        return self.images(h.contiguous(memory_format=torch.channels_last))[..., : self.height, : self.width]


@torch.no_grad()
def scale_outputs(layer: nn.Linear, factor: float) -> None:
    """Multiply a layer's weights and bias, and so its outputs."""
    for parameter in layer.parameters():
        parameter.mul_(factor)


class ReleasedLinearEncoder(nn.Module):
    """A linear layer from observations (B, *event_shape) to (B, heads, latents)."""

    def __init__(self, event_shape: tuple[int, ...], latents: int, heads: int, spread: float = 1.0) -> None:
        super().__init__()
        last = nn.Linear(math.prod(event_shape), heads * latents)
        scale_outputs(last, spread)
        self.layers = nn.Sequential(nn.Flatten(), last, nn.Unflatten(1, (heads, latents)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ReleasedLinearDecoder(nn.Module):
    """A linear layer from latents (B, latents) to (B, *event_shape); its weight columns are the units' features."""

    def __init__(self, event_shape: tuple[int, ...], latents: int, output: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(latents, math.prod(event_shape)), fixed(output), nn.Unflatten(1, event_shape)
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


# Up to this many elements the residual block works on the observation itself, beyond on a linear projection to this
# width (64-pixel colour images would need 1.2e9 weights per layer).
WIDEST = 1024


class ReleasedDense(nn.Module):
    """LayerNorm(h + Linear(Dropout(ReLU(Linear(h))))), with a hidden layer eight times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 8 * width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h + self.inner(h))


class ReleasedMLPEncoder(nn.Module):
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
            ReleasedDense(width),
            last,
            nn.Unflatten(1, (heads, latents)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ReleasedMLPDecoder(nn.Module):
    """Linear, SiLU, residual dense block, SiLU, linear, from latents (B, latents) to (B, *event_shape)."""

    def __init__(self, event_shape: tuple[int, ...], latents: int, output: nn.Module) -> None:
        super().__init__()
        size = math.prod(event_shape)
        width = min(size, WIDEST)
        self.layers = nn.Sequential(
            nn.Linear(latents, width),
            nn.SiLU(),
            ReleasedDense(width),
            nn.SiLU(),
            nn.Linear(width, size),
            fixed(output),
            nn.Unflatten(1, event_shape),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)
