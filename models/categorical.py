"""Generative model with a uniform categorical prior (C-VAE)."""

from __future__ import annotations

from typing import Any

from pyro_nbvae.distributions import RelaxedOneHotCategorical
from pyro_nbvae.errors import InputError
from pyro_nbvae.vae import GenerativeModel, StandardPrior


class CategoricalModel(GenerativeModel):
    """z ~ uniform one-hot categorical, x ~ likelihood(decoder(z)).

    Site ``z`` is (B, variables, categories).

    Args:
        event_shape, **options: as :class:`~pyro_nbvae.vae.GenerativeModel`.
        latents: dimension of z, the number of variables times ``categories``.
        categories: number of categories of each variable. The defaults give 32 variables.

    Raises:
        InputError: if ``categories`` does not divide ``latents``, or is below 2.
        ValueError: as :class:`~pyro_nbvae.vae.GenerativeModel`.

    Example::

        >>> z, mean = CategoricalModel((5,), latents=12, categories=4, decoder="linear").generate(2)
        >>> z.shape, mean.shape
        (torch.Size([2, 3, 4]), torch.Size([2, 5]))
    """

    prior: StandardPrior

    def __init__(
        self, event_shape: tuple[int, ...], latents: int = 256, *, categories: int = 8, **options: Any
    ) -> None:
        if categories < 2 or latents % categories:
            raise InputError(f"categories must be at least 2 and divide latents ({latents}), got {categories}")
        super().__init__(event_shape, latents, latent_shape=(latents // categories, categories), **options)

    def factorised_prior(self) -> RelaxedOneHotCategorical:
        """Return the uniform prior, batch shape (variables,): samples are one-hot, the support is the simplex."""
        return RelaxedOneHotCategorical(logits=self.prior.zeros)
