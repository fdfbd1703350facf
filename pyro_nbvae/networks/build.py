"""Networks by name."""

from __future__ import annotations

from torch import nn

from pyro_nbvae.errors import check_member
from pyro_nbvae.networks.conv import ConvDecoder, ConvEncoder
from pyro_nbvae.networks.linear import LinearDecoder, LinearEncoder
from pyro_nbvae.networks.mlp import MLPDecoder, MLPEncoder

ENCODERS: dict[str, type[nn.Module]] = {"conv": ConvEncoder, "mlp": MLPEncoder, "linear": LinearEncoder}
DECODERS: dict[str, type[nn.Module]] = {"conv": ConvDecoder, "mlp": MLPDecoder, "linear": LinearDecoder}


def build_encoder(name: str, event_shape: tuple[int, ...], latents: int, heads: int, spread: float = 1.0) -> nn.Module:
    """An encoder from observations (B, *event_shape) to (B, heads, latents), unbounded reals.

    Args:
        spread: factor of the outputs before training; of ``"conv"``, whose heads end in a LayerNorm, their standard
            deviation over the latents.

    Raises:
        ValueError: for an unknown name, and for ``"conv"`` on what is no image.
    """
    check_member("encoder", name, ENCODERS)
    return ENCODERS[name](event_shape, latents, heads, spread)


def build_decoder(name: str, event_shape: tuple[int, ...], latents: int, output: nn.Module) -> nn.Module:
    """A decoder from latents (B, latents) to (B, *event_shape), ending in ``output``.

    Raises:
        ValueError: for an unknown name, and for ``"conv"`` on what is no image.
    """
    check_member("decoder", name, DECODERS)
    return DECODERS[name](event_shape, latents, output)
