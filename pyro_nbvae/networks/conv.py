"""Convolutional networks.

They use the channels-last memory format, which halves their time on a CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.parametrizations import weight_norm

from pyro_nbvae.errors import InputError
from pyro_nbvae.networks.initialization import NormalizedEncoder
from pyro_nbvae.networks.outputs import Decoder


def check_image_shape(event_shape: tuple[int, ...], min_side: int = 1) -> None:
    """Raise InputError, a ValueError, unless a shape is (channels, height, width), with a minimum side."""
    if len(event_shape) != 3 or min(event_shape[1:]) < min_side:
        sides = f" with at least {min_side} pixels a side" if min_side > 1 else ""
        raise InputError(
            f"conv networks need observations of shape (channels, height, width){sides}, got {tuple(event_shape)}: use "
            "mlp, linear or a module of your own"
        )


class _ConvFeatures(nn.Module):
    """Two 4x4 convolutions of stride 2: from images (B, C, H, W) to (B, features).

    Sides are padded to the next multiple of 4, so that every pixel is seen.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = pad(x, (0, -width % 4, 0, -height % 4))
        return self.layers(x.contiguous(memory_format=torch.channels_last))


class ConvEncoder(NormalizedEncoder):
    """Two convolutions, and for each head a linear layer and a layer norm: (B, C, H, W) to (B, heads, latents)."""

    def build_features(self, event_shape: tuple[int, ...]) -> nn.Module:
        check_image_shape(event_shape)
        return _ConvFeatures(event_shape[0])


class ConvDecoder(Decoder):
    """A linear layer with weights normalised per latent, then two 4x4 transposed convolutions of stride 2.

    It maps latents (B, latents) to images (B, C, H, W). If a side is not a multiple of 4, the output is cropped from
    the next multiple.
    """

    min_side = 1

    def __init__(self, event_shape: tuple[int, ...], latents: int, output: nn.Module, bias: bool = True) -> None:
        super().__init__(output)
        check_image_shape(event_shape, self.min_side)
        channels, self.height, self.width = event_shape
        self.start = (128, math.ceil(self.height / 4), math.ceil(self.width / 4))
        self.expand = weight_norm(nn.Linear(latents, math.prod(self.start), bias=False), dim=1)
        self.bias = nn.Parameter(torch.zeros(math.prod(self.start))) if bias else None
        self.images = nn.Sequential(
            nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(64, channels, 4, stride=2, padding=1),
        )

    def decoded(self, z: Tensor) -> Tensor:
        """Return images before the last layer, with sides that are multiples of 4."""
        h = self.expand(z) if self.bias is None else self.expand(z) + self.bias
        return self.images(torch.relu(h).unflatten(1, self.start).contiguous(memory_format=torch.channels_last))

    def forward(self, z: Tensor) -> Tensor:
        return self.output(self.decoded(z)[..., : self.height, : self.width])
