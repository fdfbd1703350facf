"""Standard Laplace prior over the latents (L-VAE)."""

from __future__ import annotations

import pyro.distributions as dist

from pyro_nbvae.vae import GenerativeModel, StandardPrior


class LaplaceModel(GenerativeModel):
    """z ~ Laplace(0, 1), x ~ likelihood(decoder(z)); arguments as :class:`~pyro_nbvae.vae.GenerativeModel`."""

    prior: StandardPrior

    def prior_distribution(self) -> dist.Laplace:
        """Laplace(0, 1), batch shape (K,)."""
        return dist.Laplace(self.prior.zeros, self.prior.zeros + 1)
