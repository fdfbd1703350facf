"""ELBO estimators that take the place of Pyro's own wherever Pyro takes a loss, and relaxing counts from outside."""

from pyro_nbvae.infer.elbo import AnalyticKL_ELBO, MonteCarloKL_ELBO, SiteKL_ELBO
from pyro_nbvae.infer.reparam import RelaxReparam

__all__ = ["AnalyticKL_ELBO", "MonteCarloKL_ELBO", "RelaxReparam", "SiteKL_ELBO"]
