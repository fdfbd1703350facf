"""Linear networks, one layer each."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def scale_outputs(layer: nn.Linear, factor: float) -> None:
    """Multiply a layer's weights and bias, and so its outputs."""
    for parameter in layer.parameters():
        parameter.mul_(factor)


class LinearEncoder(nn.Module):
    """A linear layer from observations (B, *event_shape) to (B, heads, latents)."""

    def __init__(self, event_shape: tuple[int, ...], latents: int, heads: int, spread: float = 1.0) -> None:
        super().__init__()
        last = nn.Linear(math.prod(event_shape), heads * latents)
        scale_outputs(last, spread)
        self.layers = nn.Sequential(nn.Flatten(), last, nn.Unflatten(1, (heads, latents)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class LinearDecoder(nn.Module):
    """A linear layer from latents (B, latents) to (B, *event_shape); its weight columns are the units' features."""

    def __init__(self, event_shape: tuple[int, ...], latents: int, output: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(latents, math.prod(event_shape)), output, nn.Unflatten(1, event_shape))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)
