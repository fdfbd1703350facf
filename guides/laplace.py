"""Amortised Laplace posterior (L-VAE)."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from pyro_nbvae.vae import AmortizedGuide


class LaplaceGuide(AmortizedGuide):
    """q(z | x) = Laplace(location, scale), both from the encoder; at encoder outputs of 0 it is the prior.

    Arguments as :class:`~pyro_nbvae.vae.AmortizedGuide`, of a :class:`~pyro_nbvae.models.LaplaceModel`; the relaxation
    plays no part.
    """

    heads = 2

    def posterior(self, x: Tensor) -> dist.Laplace:
        """q(z | x), batch shape (B, K)."""
        location, log_scale = self.encode(x)
        return dist.Laplace(location, log_scale.exp())
