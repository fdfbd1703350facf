"""Standard Laplace prior over the latents (L-VAE)."""

from __future__ import annotations

import pyro.distributions as dist

from pyro_nbvae.vae import ImageModel, StandardPrior


class LaplaceModel(ImageModel):
    """z ~ Laplace(0, 1), x ~ Normal(decoder(z), sqrt(beta / 2)); arguments as :class:`~pyro_nbvae.vae.ImageModel`."""

    prior: StandardPrior

    def prior_distribution(self) -> dist.Laplace:
        """Laplace(0, 1), batch shape (K,)."""
        return dist.Laplace(self.prior.zeros, self.prior.zeros + 1)
