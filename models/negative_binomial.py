"""Generative model with a negative binomial prior."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyro_nbvae.distributions import RelaxedNegativeBinomial
from pyro_nbvae.vae import CountModel, CountPrior


class NegativeBinomialPrior(CountPrior):
    """Learned dispersion r and logits l of each latent, stored as log r and l."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.log_total_count = nn.Parameter(torch.zeros(latents))
        self.logits = nn.Parameter(torch.zeros(latents))

    @property
    def total_count(self) -> Tensor:
        """r, (K,)."""
        return self.log_total_count.exp()

    @property
    def mean(self) -> Tensor:
        """r e^l, (K,)."""
        return (self.log_total_count + self.logits).exp()

    def initialize(self, mean: float) -> None:
        """Set this mean count, with a Fano factor of 2: r = mean, logits = 0."""
        nn.init.constant_(self.log_total_count, math.log(mean))
        nn.init.zeros_(self.logits)


class NegativeBinomialModel(CountModel):
    """z ~ NB(r, l), x ~ likelihood(decoder(standardize(z))).

    The prior has few parameters, and their initial values are far from the optimum: use a higher learning rate for them
    (:func:`~pyro_nbvae.infer.learning_rates`).

    Args:
        prior_mean: initial mean count of each unit, positive; the initial Fano factor is 2.
        event_shape, latents, **options: as :class:`~pyro_nbvae.vae.GenerativeModel`.

    Raises:
        ValueError: as :class:`~pyro_nbvae.vae.CountModel`.

    Example::

        >>> z, mean = NegativeBinomialModel((5,), latents=3, decoder="linear").generate(2)
        >>> z.shape, mean.shape
        (torch.Size([2, 3]), torch.Size([2, 5]))
    """

    prior_class = NegativeBinomialPrior
    prior: NegativeBinomialPrior

    def factorised_prior(self) -> RelaxedNegativeBinomial:
        """Return NB(r, l), batch shape (K,): samples are integers, the support includes relaxed counts."""
        source = self.prior.log_total_count  # a guide that shares the dispersion has the same
        return RelaxedNegativeBinomial(self.prior.total_count, logits=self.prior.logits, dispersion_source=source)
