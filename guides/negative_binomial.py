"""Amortised guide with a negative binomial posterior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_nbvae.distributions import RelaxedNegativeBinomial
from pyro_nbvae.models.negative_binomial import NegativeBinomialModel, NegativeBinomialPrior
from pyro_nbvae.vae import AmortizedGuide


class NegativeBinomialGuide(AmortizedGuide):
    """q(z | x) = NB(r * dr(x), l + dl(x)), relaxed, with the prior's dispersion parameter r and logits l.

    It is the prior if the encoder's outputs are 0.

    Args:
        model: a :class:`~pyro_nbvae.models.NegativeBinomialModel`.
        shared_dispersion: whether the posterior has the prior's dispersion parameter (dr = 1, the DS variants); the
            encoder then has one head instead of two.
        **options: as :class:`~pyro_nbvae.vae.AmortizedGuide`.

    Raises:
        TypeError, ValueError: as :class:`~pyro_nbvae.vae.AmortizedGuide`.

    Example::

        >>> from pyro_nbvae.models import NegativeBinomialModel
        >>> model = NegativeBinomialModel((5,), latents=3, decoder="linear")
        >>> guide = NegativeBinomialGuide(model, encoder="linear")
        >>> guide.posterior(torch.zeros(4, 5)).batch_shape
        torch.Size([4, 3])
    """

    prior: NegativeBinomialPrior
    prior_class = NegativeBinomialPrior
    heads = 2

    def __init__(self, model: NegativeBinomialModel, *, shared_dispersion: bool = False, **options: Any) -> None:
        self.heads = 1 if shared_dispersion else self.heads
        super().__init__(model, **options)

    def posterior_from(self, outputs: tuple[Tensor, ...]) -> RelaxedNegativeBinomial:
        shift, *log_dispersion_ratio = outputs
        r, logits = self.prior.total_count, self.prior.logits + shift
        if log_dispersion_ratio:
            return RelaxedNegativeBinomial(r * log_dispersion_ratio[0].exp(), logits=logits, relaxation=self.relaxation)
        source = self.prior.log_total_count
        return RelaxedNegativeBinomial(r, logits=logits, relaxation=self.relaxation, dispersion_source=source)

    @torch.no_grad()
    def modulation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the paper's modulation ratios (dr, dp) = (r_q / r, sigma(-l_q) / sigma(-l)), (B, K) each."""
        q = self.posterior(x)
        return q.total_count / self.prior.total_count, torch.sigmoid(-q.logits) / torch.sigmoid(-self.prior.logits)
