"""Networks by name."""

from __future__ import annotations

from torch import nn

from pyro_nbvae.errors import check_member
from pyro_nbvae.networks.conv import ConvDecoder, ConvEncoder
from pyro_nbvae.networks.initialization import Encoder
from pyro_nbvae.networks.linear import LinearDecoder, LinearEncoder
from pyro_nbvae.networks.mlp import MLPDecoder, MLPEncoder
from pyro_nbvae.networks.released import (
    ReleasedConvDecoder,
    ReleasedConvEncoder,
    ReleasedLinearDecoder,
    ReleasedLinearEncoder,
    ReleasedMLPDecoder,
    ReleasedMLPEncoder,
)

ENCODERS: dict[str, type[nn.Module]] = {
    "conv": ConvEncoder,
    "mlp": MLPEncoder,
    "linear": LinearEncoder,
    "released_conv": ReleasedConvEncoder,
    "released_mlp": ReleasedMLPEncoder,
    "released_linear": ReleasedLinearEncoder,
}
DECODERS: dict[str, type[nn.Module]] = {
    "conv": ConvDecoder,
    "mlp": MLPDecoder,
    "linear": LinearDecoder,
    "released_conv": ReleasedConvDecoder,
    "released_mlp": ReleasedMLPDecoder,
    "released_linear": ReleasedLinearDecoder,
}


def build_encoder(
    name: str, event_shape: tuple[int, ...], latents: int, heads: int, spread: float = 1.0, discrete: bool = False
) -> nn.Module:
    """Build an encoder from observations (B, *event_shape) to (B, heads, latents), unbounded reals.

    Args:
        name: a key of ``ENCODERS``: ``"conv"`` (images only), ``"mlp"`` or ``"linear"``, which start from data and keep
            all its directions, or one of the paper's as released: ``"released_conv"``, ``"released_mlp"``,
            ``"released_linear"``.
        event_shape: shape of one observation.
        latents: number of latents.
        heads: number of outputs for each latent.
        spread: initial spread of the outputs: 0.15 of it is their standard deviation over data; in the conv networks,
            whose heads end in a layer norm, it is that over the latents, and in the released dense networks a factor.
        discrete: whether observations are whole numbers from 0, which are read as log(1 + x); not in released networks.

    Raises:
        ValueError: for an unknown name, and for a conv network if observations are not images.

    Example::

        >>> import torch
        >>> build_encoder("linear", (5,), latents=3, heads=2)(torch.zeros(4, 5)).shape
        torch.Size([4, 2, 3])
    """
    check_member("encoder", name, ENCODERS)
    kind = ENCODERS[name]
    options = {"discrete": discrete} if issubclass(kind, Encoder) else {}
    return kind(event_shape, latents, heads, spread, **options)


def build_decoder(name: str, event_shape: tuple[int, ...], latents: int, output: nn.Module) -> nn.Module:
    """Build a decoder from latents (B, latents) to (B, *event_shape).

    Args:
        name: a key of ``DECODERS``, the same names as those of :func:`build_encoder`.
        event_shape: shape of one observation.
        latents: number of latents.
        output: the last layer.

    Raises:
        ValueError: for an unknown name, and for a conv network if observations are not images.

    Example::

        >>> import torch
        >>> build_decoder("linear", (5,), latents=3, output=nn.Identity())(torch.zeros(4, 3)).shape
        torch.Size([4, 5])
    """
    check_member("decoder", name, DECODERS)
    return DECODERS[name](event_shape, latents, output)
