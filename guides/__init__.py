"""Amortised guides, one file per family."""

from pyro_nbvae.guides.categorical import CategoricalGuide
from pyro_nbvae.guides.com_poisson import ConwayMaxwellPoissonGuide
from pyro_nbvae.guides.gaussian import GaussianGuide, ScaledGaussianGuide
from pyro_nbvae.guides.laplace import LaplaceGuide
from pyro_nbvae.guides.negative_binomial import NegativeBinomialGuide
from pyro_nbvae.guides.poisson import PoissonGuide

__all__ = [
    "CategoricalGuide",
    "ConwayMaxwellPoissonGuide",
    "GaussianGuide",
    "LaplaceGuide",
    "NegativeBinomialGuide",
    "PoissonGuide",
    "ScaledGaussianGuide",
]
