"""Distributions over spike counts and one-hot vectors, exact and relaxed, and the KL divergences between them."""

from pyro_nbvae.distributions.categorical import RelaxedOneHotCategorical
from pyro_nbvae.distributions.kl import kl_form, negative_binomial_kl, poisson_kl
from pyro_nbvae.distributions.negative_binomial import NegativeBinomial, RelaxedNegativeBinomial
from pyro_nbvae.distributions.poisson import RelaxedPoisson

__all__ = [
    "NegativeBinomial",
    "RelaxedNegativeBinomial",
    "RelaxedOneHotCategorical",
    "RelaxedPoisson",
    "kl_form",
    "negative_binomial_kl",
    "poisson_kl",
]
