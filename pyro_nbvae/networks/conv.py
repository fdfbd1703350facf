"""The paper's convolutional networks.

Both use the channels-last memory format, which halves their time on a CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pyro_nbvae.errors import InputError


def check_image_shape(event_shape: tuple[int, ...]) -> None:
    """Raise InputError, a ValueError, unless a shape is (channels, height, width) of at least 8 pixels a side."""
    if len(event_shape) != 3 or min(event_shape[1:]) < 8:
        raise InputError(
            f"conv networks need observations of shape (channels, height, width) of 8 pixels a side or more, got "
            f"{tuple(event_shape)}: use mlp, linear or a module of your own"
        )


class ConvEncoder(nn.Module):
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


class ConvDecoder(nn.Module):
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
            output,
        )

    def forward(self, z: Tensor) -> Tensor:
        h = torch.relu(self.expand(z)).unflatten(1, self.start)
        return self.images(h.contiguous(memory_format=torch.channels_last))[..., : self.height, : self.width]
