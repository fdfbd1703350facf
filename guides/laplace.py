"""Amortised guide with a Laplace posterior (L-VAE)."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from pyro_nbvae.vae import AmortizedGuide


class LaplaceGuide(AmortizedGuide):
    """q(z | x) = Laplace(location, scale), both from the encoder.

    It is the prior if the encoder's outputs are 0.

    Args:
        model: a :class:`~pyro_nbvae.models.LaplaceModel`.
        encoder, initial_output_scale: as :class:`~pyro_nbvae.vae.AmortizedGuide`.
        relaxation: not used.

    Raises:
        ValueError: as :class:`~pyro_nbvae.vae.AmortizedGuide`.

    Example::

        >>> import torch
        >>> from pyro_nbvae.models import LaplaceModel
        >>> model = LaplaceModel((5,), latents=3, decoder="linear")
        >>> guide = LaplaceGuide(model, encoder="linear")
        >>> guide.posterior(torch.zeros(4, 5)).batch_shape
        torch.Size([4, 3])
    """

    heads = 2

    def posterior_from(self, outputs: tuple[Tensor, ...]) -> dist.Laplace:
        location, log_scale = outputs
        return dist.Laplace(location, log_scale.exp())
