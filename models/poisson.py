"""Poisson prior over the latents (P-VAE)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyro_nbvae.distributions import RelaxedPoisson
from pyro_nbvae.vae import CountModel, CountPrior


class PoissonPrior(CountPrior):
    """Learned log rate, one per latent, 0 at the start (mean 1)."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.zeros(latents))

    @property
    def rate(self) -> Tensor:
        """(K,)."""
        return self.log_rate.exp()

    @property
    def mean(self) -> Tensor:
        return self.rate

    def start(self, mean: float) -> None:
        nn.init.constant_(self.log_rate, math.log(mean))


class PoissonModel(CountModel):
    """z ~ Poisson(rate), x ~ likelihood(decoder(z)).

    Args:
        prior_mean: mean count of each unit at the start.
        **options: as :class:`~pyro_nbvae.vae.GenerativeModel`.
    """

    prior_class = PoissonPrior
    prior: PoissonPrior

    def prior_distribution(self) -> RelaxedPoisson:
        """Poisson(rate), batch shape (K,): samples are integers, the support takes relaxed counts too."""
        return RelaxedPoisson(self.prior.rate)
