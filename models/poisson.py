"""Generative model with a Poisson prior (P-VAE)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyro_nbvae.distributions import RelaxedPoisson
from pyro_nbvae.vae import CountModel, CountPrior


class PoissonPrior(CountPrior):
    """Learned log rate of each latent."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.zeros(latents))

    @property
    def rate(self) -> Tensor:
        """Rate, (K,)."""
        return self.log_rate.exp()

    @property
    def mean(self) -> Tensor:
        return self.rate

    def initialize(self, mean: float) -> None:
        nn.init.constant_(self.log_rate, math.log(mean))


class PoissonModel(CountModel):
    """z ~ Poisson(rate), x ~ likelihood(decoder(standardize(z))).

    Args:
        prior_mean: initial mean count of each unit, positive.
        event_shape, latents, **options: as :class:`~pyro_nbvae.vae.GenerativeModel`.

    Raises:
        ValueError: as :class:`~pyro_nbvae.vae.CountModel`.

    Example::

        >>> z, mean = PoissonModel((5,), latents=3, decoder="linear").generate(2)
        >>> z.shape, mean.shape
        (torch.Size([2, 3]), torch.Size([2, 5]))
    """

    prior_class = PoissonPrior
    prior: PoissonPrior

    def factorised_prior(self) -> RelaxedPoisson:
        """Return Poisson(rate), batch shape (K,): samples are integers, the support includes relaxed counts."""
        return RelaxedPoisson(self.prior.rate)
