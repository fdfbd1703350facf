"""Standard normal prior over the latents (G-VAE)."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist

from pyro_nbvae.vae import ImageModel, StandardPrior


class GaussianModel(ImageModel):
    """z ~ Normal(0, 1), x ~ Normal(decoder(z), sqrt(beta / 2)); arguments as :class:`~pyro_nbvae.vae.ImageModel`."""

    prior: StandardPrior

    def __init__(self, image_shape: tuple[int, int, int], latents: int = 256, **options: Any) -> None:
        super().__init__(image_shape, latents, **options)
        self.prior = StandardPrior(latents)

    def prior_distribution(self) -> dist.Normal:
        """Normal(0, 1), batch shape (K,)."""
        return dist.Normal(self.prior.zeros, self.prior.zeros + 1)
