"""Amortised Poisson posterior (P-VAE)."""

from __future__ import annotations

from torch import Tensor

from pyro_nbvae.distributions import RelaxedPoisson
from pyro_nbvae.vae import AmortizedGuide, CountPrior


class PoissonGuide(AmortizedGuide):
    """q(z | x) = Poisson(m * dr(x)), relaxed, m the prior's mean; over a Poisson prior, encoder outputs of 0 give it.

    Arguments as :class:`~pyro_nbvae.vae.AmortizedGuide`, of a model whose prior is over counts:
    :class:`~pyro_nbvae.models.PoissonModel` or :class:`~pyro_nbvae.models.NegativeBinomialModel`.
    """

    prior: CountPrior
    prior_class = CountPrior

    def posterior(self, x: Tensor) -> RelaxedPoisson:
        """q(z | x), batch shape (B, K), under the guide's present relaxation."""
        (log_ratio,) = self.encode(x)
        return RelaxedPoisson(self.prior.mean * log_ratio.exp(), relaxation=self.relaxation)
