"""Distributions over spike counts, exact and relaxed, and the KL divergences between them."""

from pyro_nbvae.distributions.kl import kl_form, negative_binomial_kl, poisson_kl
from pyro_nbvae.distributions.negative_binomial import NegativeBinomial, RelaxedNegativeBinomial
from pyro_nbvae.distributions.poisson import RelaxedPoisson

__all__ = [
    "NegativeBinomial",
    "RelaxedNegativeBinomial",
    "RelaxedPoisson",
    "kl_form",
    "negative_binomial_kl",
    "poisson_kl",
]
