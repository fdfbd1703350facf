"""Generative models with a normal prior, of scale 1 (G-VAE) or of a learned scale (GS-VAE)."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_nbvae.vae import GenerativeModel, StandardPrior


class GaussianModel(GenerativeModel):
    """z ~ Normal(0, 1), x ~ likelihood(decoder(z)).

    Arguments and errors as :class:`~pyro_nbvae.vae.GenerativeModel`.

    Example::

        >>> z, mean = GaussianModel((5,), latents=3, decoder="linear").generate(2)
        >>> z.shape, mean.shape
        (torch.Size([2, 3]), torch.Size([2, 5]))
    """

    prior: StandardPrior

    def factorised_prior(self) -> dist.Normal:
        """Return Normal(0, 1), batch shape (K,)."""
        zeros = self.prior.zeros
        return dist.Normal(zeros, zeros + 1)


class LearnedScale(nn.Module):
    """Logarithm of the prior's scale of each latent, initially 0.

    Example::

        >>> LearnedScale(3).scale.detach()
        tensor([1., 1., 1.])
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(shape))

    @property
    def scale(self) -> Tensor:
        """Scale of each latent, (K,)."""
        return self.log_scale.exp()


class ScaledGaussianModel(GaussianModel):
    r"""z ~ Normal(0, s), x ~ likelihood(decoder(z)), with a learned scale s of each latent.

    It has the same expressive power as :class:`GaussianModel`, since a decoder may scale its input itself. But the KL
    to its guide does not depend on s, so a scale that learns faster than the networks can increase or switch off a
    latent within a few steps. The means of count priors can do the same, so this model is the fair comparison.

    Arguments and errors as :class:`~pyro_nbvae.vae.GenerativeModel`.

    Example::

        >>> z, mean = ScaledGaussianModel((5,), latents=3, decoder="linear").generate(2)
        >>> z.shape, mean.shape
        (torch.Size([2, 3]), torch.Size([2, 5]))
    """

    prior_class = LearnedScale
    prior: LearnedScale  # type: ignore[assignment]

    def factorised_prior(self) -> dist.Normal:
        """Return Normal(0, s), batch shape (K,)."""
        scale = self.prior.scale
        return dist.Normal(torch.zeros_like(scale), scale)
