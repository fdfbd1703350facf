"""Negative binomial prior over the latents."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from pyro_nbvae.distributions import RelaxedNegativeBinomial
from pyro_nbvae.vae import CountModel, CountPrior


class NegativeBinomialPrior(CountPrior):
    """Learned dispersion r and logits l, one per latent; both log r and l start at 0 (mean 1, Fano factor 2)."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.log_total_count = nn.Parameter(torch.zeros(latents))
        self.logits = nn.Parameter(torch.zeros(latents))

    @property
    def total_count(self) -> Tensor:
        """r, (K,). Like Pyro's own constrained parameters it remembers what it is made from, so that the KL can tell
        where model and guide share it."""
        r: Any = self.log_total_count.exp()
        r.unconstrained = weakref.ref(self.log_total_count)
        return r

    @property
    def mean(self) -> Tensor:
        return (self.log_total_count + self.logits).exp()

    def start(self, mean: float) -> None:
        """Sets the logits, at a dispersion of 1."""
        nn.init.constant_(self.logits, math.log(mean))


class NegativeBinomialModel(CountModel):
    """z ~ NB(r, l), x ~ likelihood(decoder(z)).

    Args:
        prior_mean: mean count of each unit at the start; the Fano factor is then 1 + prior_mean.
        **options: as :class:`~pyro_nbvae.vae.GenerativeModel`.

    The prior's parameters are few and far from their optimum: give them a learning rate of their own, some 30 times
    the networks' (``model.prior.parameters()``).
    """

    prior_class = NegativeBinomialPrior
    prior: NegativeBinomialPrior

    def prior_distribution(self) -> RelaxedNegativeBinomial:
        """NB(r, l), batch shape (K,): samples are integers, the support takes relaxed counts too."""
        return RelaxedNegativeBinomial(self.prior.total_count, logits=self.prior.logits)
