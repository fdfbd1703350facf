"""Standard normal prior over the latents (G-VAE)."""

from __future__ import annotations

import pyro.distributions as dist

from pyro_nbvae.vae import GenerativeModel, StandardPrior


class GaussianModel(GenerativeModel):
    """z ~ Normal(0, 1), x ~ likelihood(decoder(z)); arguments as :class:`~pyro_nbvae.vae.GenerativeModel`."""

    prior: StandardPrior

    def prior_distribution(self) -> dist.Normal:
        """Normal(0, 1), batch shape (K,)."""
        return dist.Normal(self.prior.zeros, self.prior.zeros + 1)
