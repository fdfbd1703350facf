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
    """Build an encoder from observations (B, *event_shape) to (B, heads, latents), unbounded reals.

    Args:
        name: a key of ``ENCODERS``: ``"conv"`` (images only), ``"mlp"`` or ``"linear"``.
        event_shape: shape of one observation.
        latents: number of latents.
        heads: number of outputs for each latent.
        spread: initial factor of the outputs. For ``"conv"``, whose heads end in a LayerNorm, it is their standard
            deviation over the latents.

    Raises:
        ValueError: for an unknown name, and for ``"conv"`` if observations are not images of 8 pixels a side or more.

    Example::

        >>> import torch
        >>> build_encoder("linear", (5,), latents=3, heads=2)(torch.zeros(4, 5)).shape
        torch.Size([4, 2, 3])
    """
    check_member("encoder", name, ENCODERS)
    return ENCODERS[name](event_shape, latents, heads, spread)


def build_decoder(name: str, event_shape: tuple[int, ...], latents: int, output: nn.Module) -> nn.Module:
    """Build a decoder from latents (B, latents) to (B, *event_shape).

    Args:
        name: a key of ``DECODERS``: ``"conv"`` (images only), ``"mlp"`` or ``"linear"``.
        event_shape: shape of one observation.
        latents: number of latents.
        output: the last layer.

    Raises:
        ValueError: for an unknown name, and for ``"conv"`` if observations are not images of 8 pixels a side or more.

    Example::

        >>> import torch
        >>> build_decoder("linear", (5,), latents=3, output=nn.Identity())(torch.zeros(4, 3)).shape
        torch.Size([4, 5])
    """
    check_member("decoder", name, DECODERS)
    return DECODERS[name](event_shape, latents, output)
