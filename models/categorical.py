"""Uniform categorical prior over the latents (C-VAE)."""

from __future__ import annotations

from typing import Any

from pyro_nbvae.distributions import RelaxedOneHotCategorical
from pyro_nbvae.errors import InputError
from pyro_nbvae.vae import GenerativeModel, StandardPrior


class CategoricalModel(GenerativeModel):
    """z ~ one-hot categorical, uniform, x ~ likelihood(decoder(z)).

    Args:
        latents: dimensions of z, variables times categories.
        categories: of each variable; 8 by default, which makes 32 variables of 256 dimensions.
        **options: as :class:`~pyro_nbvae.vae.GenerativeModel`.

    Site ``z`` is (B, variables, categories).

    Raises:
        InputError: where ``categories`` does not divide ``latents``, or is below 2.
    """

    prior: StandardPrior

    def __init__(
        self, event_shape: tuple[int, ...], latents: int = 256, *, categories: int = 8, **options: Any
    ) -> None:
        if categories < 2 or latents % categories:
            raise InputError(f"categories must be at least 2 and divide latents ({latents}), got {categories}")
        super().__init__(event_shape, latents, latent_shape=(latents // categories, categories), **options)

    def prior_distribution(self) -> RelaxedOneHotCategorical:
        """Uniform over the categories, batch shape (variables,): samples are one-hot, the support is the simplex."""
        return RelaxedOneHotCategorical(logits=self.prior.zeros)
