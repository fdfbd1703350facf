"""Amortised guides with a normal posterior (G-VAE, GS-VAE)."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from pyro_nbvae.models.gaussian import LearnedScale
from pyro_nbvae.vae import AmortizedGuide


class GaussianGuide(AmortizedGuide):
    """q(z | x) = Normal(location, scale), both from the encoder.

    It is the prior if the encoder's outputs are 0.

    Args:
        model: a :class:`~pyro_nbvae.models.GaussianModel`.
        encoder, initial_output_scale: as :class:`~pyro_nbvae.vae.AmortizedGuide`.
        relaxation: not used.

    Raises:
        ValueError: as :class:`~pyro_nbvae.vae.AmortizedGuide`.

    Example::

        >>> import torch
        >>> from pyro_nbvae.models import GaussianModel
        >>> model = GaussianModel((5,), latents=3, decoder="linear")
        >>> guide = GaussianGuide(model, encoder="linear")
        >>> guide.posterior(torch.zeros(4, 5)).batch_shape
        torch.Size([4, 3])
    """

    heads = 2

    def posterior_from(self, outputs: tuple[Tensor, ...]) -> dist.Normal:
        location, log_scale = outputs
        return dist.Normal(location, log_scale.exp())


class ScaledGaussianGuide(GaussianGuide):
    """q(z | x) = Normal(s * location, s * scale), with s the prior's scale, and location and scale from the encoder.

    It is the prior if the encoder's outputs are 0.

    Args:
        model: a :class:`~pyro_nbvae.models.ScaledGaussianModel`.
        encoder, initial_output_scale: as :class:`~pyro_nbvae.vae.AmortizedGuide`.
        relaxation: not used.

    Raises:
        TypeError: for a model with another prior.
        ValueError: as :class:`~pyro_nbvae.vae.AmortizedGuide`.

    Example::

        >>> import torch
        >>> from pyro_nbvae.models import ScaledGaussianModel
        >>> guide = ScaledGaussianGuide(ScaledGaussianModel((5,), latents=3, decoder="linear"), encoder="linear")
        >>> guide.posterior(torch.zeros(4, 5)).batch_shape
        torch.Size([4, 3])
    """

    prior: LearnedScale
    prior_class = LearnedScale

    def posterior_from(self, outputs: tuple[Tensor, ...]) -> dist.Normal:
        location, log_scale = outputs
        scale = self.prior.scale
        return dist.Normal(scale * location, scale * log_scale.exp())
