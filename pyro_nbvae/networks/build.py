"""Networks by name."""

from __future__ import annotations

from torch import nn

from pyro_nbvae.errors import InputError, check_member
from pyro_nbvae.networks.conv import ConvDecoder, ConvEncoder
from pyro_nbvae.networks.linear import LinearDecoder, LinearEncoder
from pyro_nbvae.networks.mlp import MLPDecoder, MLPEncoder

ENCODERS: dict[str, type[nn.Module]] = {"conv": ConvEncoder, "mlp": MLPEncoder, "linear": LinearEncoder}
DECODERS: dict[str, type[nn.Module]] = {"conv": ConvDecoder, "mlp": MLPDecoder, "linear": LinearDecoder}


def _pick(kind: str, name: str, image_shape: tuple[int, int, int]) -> type[nn.Module]:
    table = {"encoder": ENCODERS, "decoder": DECODERS}[kind]
    check_member(kind, name, table)
    channels, height, width = image_shape
    if channels not in (1, 3) or not (8 <= height <= 64 and 8 <= width <= 64):
        raise InputError(f"images of shape {tuple(image_shape)}: need 1 or 3 channels and 8 to 64 pixels a side")
    return table[name]


def build_encoder(name: str, image_shape: tuple[int, int, int], latents: int, heads: int) -> nn.Module:
    """An encoder from images (B, C, H, W) to (B, heads, latents), unbounded reals.

    Raises:
        ValueError: for a name or an image shape that is not supported.
    """
    return _pick("encoder", name, image_shape)(image_shape, latents, heads)


def build_decoder(name: str, image_shape: tuple[int, int, int], latents: int) -> nn.Module:
    """A decoder from latents (B, latents) to images (B, C, H, W) in [0, 1].

    Raises:
        ValueError: for a name or an image shape that is not supported.
    """
    return _pick("decoder", name, image_shape)(image_shape, latents)
