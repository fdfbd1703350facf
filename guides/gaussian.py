"""Amortised normal posterior (G-VAE)."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from pyro_nbvae.vae import AmortizedGuide


class GaussianGuide(AmortizedGuide):
    """q(z | x) = Normal(location, scale), both from the encoder; at encoder outputs of 0 it is the prior.

    Arguments as :class:`~pyro_nbvae.vae.AmortizedGuide`, of a :class:`~pyro_nbvae.models.GaussianModel`; the relaxation
    plays no part.
    """

    heads = 2

    def posterior(self, x: Tensor) -> dist.Normal:
        """q(z | x), batch shape (B, K)."""
        location, log_scale = self.encode(x)
        return dist.Normal(location, log_scale.exp())
