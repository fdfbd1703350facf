"""Generative model with a standard Laplace prior (L-VAE)."""

from __future__ import annotations

import pyro.distributions as dist

from pyro_nbvae.vae import GenerativeModel, StandardPrior


class LaplaceModel(GenerativeModel):
    """z ~ Laplace(0, 1), x ~ likelihood(decoder(z)).

    Arguments and errors as :class:`~pyro_nbvae.vae.GenerativeModel`.

    Example::

        >>> z, mean = LaplaceModel((5,), latents=3, decoder="linear").generate(2)
        >>> z.shape, mean.shape
        (torch.Size([2, 3]), torch.Size([2, 5]))
    """

    prior: StandardPrior

    def factorised_prior(self) -> dist.Laplace:
        """Return Laplace(0, 1), batch shape (K,)."""
        zeros = self.prior.zeros
        return dist.Laplace(zeros, zeros + 1)
