"""Networks by name."""

from __future__ import annotations

from torch import nn

from pyro_nbvae.errors import InputError
from pyro_nbvae.networks.conv import ConvDecoder, ConvEncoder
from pyro_nbvae.networks.initialization import Encoder
from pyro_nbvae.networks.linear import LinearDecoder, LinearEncoder
from pyro_nbvae.networks.mlp import MLPDecoder, MLPEncoder
from pyro_nbvae.networks.released import RELEASED_DECODERS, RELEASED_ENCODERS
from pyro_nbvae.networks.temporal import (
    TemporalBinsDecoder,
    TemporalBinsEncoder,
    TemporalDecoder,
    TemporalEncoder,
)

ENCODERS: dict[str, type[nn.Module]] = {
    "conv": ConvEncoder,
    "mlp": MLPEncoder,
    "linear": LinearEncoder,
    "temporal": TemporalEncoder,
    "temporal_bins": TemporalBinsEncoder,
    **RELEASED_ENCODERS,
}
DECODERS: dict[str, type[nn.Module]] = {
    "conv": ConvDecoder,
    "mlp": MLPDecoder,
    "linear": LinearDecoder,
    "temporal": TemporalDecoder,
    "temporal_bins": TemporalBinsDecoder,
    **RELEASED_DECODERS,
}


def _known(kinds: dict[str, type[nn.Module]], name: str) -> type[nn.Module]:
    if name not in kinds:
        raise InputError(f"unknown network {name!r}: choose from {', '.join(kinds)}, or pass a module of your own")
    return kinds[name]


def build_encoder(
    name: str,
    event_shape: tuple[int, ...],
    latents: int,
    heads: int,
    initial_output_scale: float = 1.0,
    discrete: bool = False,
    covariates: int = 0,
) -> nn.Module:
    """Build an encoder from observations (B, *event_shape) to unbounded outputs (B, heads, latents).

    Args:
        name: a key of ``ENCODERS``: ``"conv"`` (images only), ``"mlp"``, ``"linear"``, or ``"temporal"`` and
            ``"temporal_bins"`` (observations (bins, neurons) only), which are initialised from data; or a network of
            the paper as released: ``"released_conv"``, ``"released_mlp"``, ``"released_linear"``.
        event_shape: shape of one observation.
        latents: number of latents K.
        heads: number of outputs per latent.
        initial_output_scale: scale of the outputs at initialisation. In ``"mlp"`` and ``"linear"`` their standard
            deviation over the data is 0.15 times this; in the conv networks, whose heads end in a layer norm, it is
            their standard deviation over the latents; in the released dense networks it is a factor.
        discrete: whether observations are counts, which are read as log(1 + x); the released networks ignore it.
        covariates: number of covariates, which the released networks do not take.

    Raises:
        ValueError: for an unknown name, for covariates of a released network, and if observations are not images for
            a conv network, or not (bins, neurons) for a temporal one.

    Example::

        >>> import torch
        >>> build_encoder("linear", (5,), latents=3, heads=2)(torch.zeros(4, 5)).shape
        torch.Size([4, 2, 3])
    """
    kind = _known(ENCODERS, name)
    options = {"discrete": discrete, "covariates": covariates} if issubclass(kind, Encoder) else {}
    if covariates and not options:
        raise InputError(f"the network {name} takes no covariates: use conv, mlp or linear, or a module of your own")
    return kind(event_shape, latents, heads, initial_output_scale, **options)


def build_decoder(
    name: str, event_shape: tuple[int, ...], latents: int, output: nn.Module, covariates: int = 0
) -> nn.Module:
    """Build a decoder from latents and covariates (B, latents + covariates) to (B, *event_shape).

    Args:
        name: a key of ``DECODERS``, the same names as for :func:`build_encoder`.
        event_shape: shape of one observation.
        latents: number of latents K.
        output: the last layer.
        covariates: number of covariates, behind the latents.

    Raises:
        ValueError: for an unknown name, and for a conv network if observations are not images.

    Example::

        >>> import torch
        >>> build_decoder("linear", (5,), latents=3, output=nn.Identity())(torch.zeros(4, 3)).shape
        torch.Size([4, 5])
    """
    kind = _known(DECODERS, name)
    options = {"covariates": covariates} if issubclass(kind, TemporalBinsDecoder) else {}
    return kind(event_shape, latents + (0 if options else covariates), output, **options)
