"""Amortised Conway-Maxwell-Poisson posterior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_nbvae.distributions import ConwayMaxwellPoisson, Integer
from pyro_nbvae.vae import AmortizedGuide, CountPrior, GenerativeModel

# log nu is within this share of the encoder's bound: nu from e^-3 to e^3.
DISPERSION = 0.6


class ConwayMaxwellPoissonGuide(AmortizedGuide):
    """q(z | x) = COM-Poisson(m * dm(x), nu(x)), m the prior's mean: narrower or wider than a Poisson, unit by unit.

    At encoder outputs of 0 it is Poisson(m).

    Args:
        model: one whose prior is over counts, such as a :class:`~pyro_nbvae.models.NegativeBinomialModel`.
        relaxation: :class:`~pyro_nbvae.distributions.Integer`, or None.
        spread: as :class:`~pyro_nbvae.vae.AmortizedGuide`; a small one has trained best.
        **options: as :class:`~pyro_nbvae.vae.AmortizedGuide`.
    """

    prior: CountPrior
    prior_class = CountPrior
    heads = 2

    def __init__(
        self, model: GenerativeModel, *, relaxation: Any = Integer(), spread: float = 0.2, **options: Any
    ) -> None:
        super().__init__(model, relaxation=relaxation, spread=spread, **options)

    def posterior(self, x: Tensor) -> ConwayMaxwellPoisson:
        """q(z | x), batch shape (B, K), under the guide's present relaxation."""
        shift, dispersion = self.encode(x)
        rate = self.prior.mean * shift.exp()
        return ConwayMaxwellPoisson(rate, (DISPERSION * dispersion).exp(), relaxation=self.relaxation)

    @torch.no_grad()
    def modulation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over the prior's mean, and the Fano factor over a Poisson's, which is 1; (B, K) each."""
        q = self.posterior(x)
        return q.mean / self.prior.mean, torch.where(q.mean > 0, q.variance / q.mean, 1.0)
