"""Amortised Poisson posterior (P-VAE)."""

from __future__ import annotations

from torch import Tensor

from pyro_nbvae.distributions import RelaxedPoisson
from pyro_nbvae.models.poisson import PoissonPrior
from pyro_nbvae.vae import AmortizedGuide


class PoissonGuide(AmortizedGuide):
    """q(z | x) = Poisson(rate * dr(x)), relaxed; at encoder outputs of 0 it is the prior.

    Arguments as :class:`~pyro_nbvae.vae.AmortizedGuide`, of a :class:`~pyro_nbvae.models.PoissonModel`.
    """

    prior: PoissonPrior
    prior_class = PoissonPrior

    def posterior(self, x: Tensor) -> RelaxedPoisson:
        """q(z | x), batch shape (B, K), under the guide's present relaxation."""
        (log_ratio,) = self.encode(x)
        return RelaxedPoisson(self.prior.rate * log_ratio.exp(), relaxation=self.relaxation)
