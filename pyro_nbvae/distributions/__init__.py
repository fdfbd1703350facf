"""Distributions over spike counts and one-hot vectors, exact and relaxed, and the KL divergences between them."""

from pyro_nbvae.distributions.categorical import RelaxedOneHotCategorical
from pyro_nbvae.distributions.com_poisson import ConwayMaxwellPoisson, MeanConwayMaxwellPoisson
from pyro_nbvae.distributions.count_distribution import CountDistribution
from pyro_nbvae.distributions.divergences import kl_form, negative_binomial_kl, poisson_kl, shared_dispersion_kl
from pyro_nbvae.distributions.families.poisson import log_weight as poisson_log_weight
from pyro_nbvae.distributions.families.poisson import window as poisson_window
from pyro_nbvae.distributions.family_checks import check_family
from pyro_nbvae.distributions.negative_binomial import NegativeBinomial, RelaxedNegativeBinomial
from pyro_nbvae.distributions.normal import IsotropicNormal
from pyro_nbvae.distributions.observations import (
    LogitBernoulli,
    SoftplusConwayMaxwellPoisson,
    SoftplusNegativeBinomial,
    SoftplusPoisson,
)
from pyro_nbvae.distributions.poisson import RelaxedPoisson
from pyro_nbvae.distributions.relaxations import ArrivalTimes, GumbelSoftmax, Integer, Relaxation
from pyro_nbvae.distributions.relaxed import RelaxedCount
from pyro_nbvae.distributions.tilted import MixtureOfNegativeBinomials, Tilted, TiltedAutoregressive, TiltedMixture

__all__ = [
    "ArrivalTimes",
    "ConwayMaxwellPoisson",
    "CountDistribution",
    "GumbelSoftmax",
    "Integer",
    "IsotropicNormal",
    "LogitBernoulli",
    "MeanConwayMaxwellPoisson",
    "MixtureOfNegativeBinomials",
    "NegativeBinomial",
    "Relaxation",
    "RelaxedCount",
    "RelaxedNegativeBinomial",
    "RelaxedOneHotCategorical",
    "RelaxedPoisson",
    "SoftplusConwayMaxwellPoisson",
    "SoftplusNegativeBinomial",
    "SoftplusPoisson",
    "Tilted",
    "TiltedAutoregressive",
    "TiltedMixture",
    "check_family",
    "kl_form",
    "negative_binomial_kl",
    "poisson_kl",
    "poisson_log_weight",
    "poisson_window",
    "shared_dispersion_kl",
]
