"""Generative models, one file per family."""

from pyro_nbvae.models.categorical import CategoricalModel
from pyro_nbvae.models.gaussian import GaussianModel, ScaledGaussianModel
from pyro_nbvae.models.laplace import LaplaceModel
from pyro_nbvae.models.negative_binomial import NegativeBinomialModel
from pyro_nbvae.models.poisson import PoissonModel

__all__ = [
    "CategoricalModel",
    "GaussianModel",
    "LaplaceModel",
    "NegativeBinomialModel",
    "PoissonModel",
    "ScaledGaussianModel",
]
