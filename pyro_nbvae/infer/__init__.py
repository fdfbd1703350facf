"""ELBO estimators that can replace Pyro's own, a reparametriser that relaxes the counts of a program, and rates."""

from pyro_nbvae.infer.elbo import AnalyticKL_ELBO, MonteCarloKL_ELBO, SiteKL_ELBO
from pyro_nbvae.infer.rates import learning_rates
from pyro_nbvae.infer.reparam import RelaxReparam

__all__ = ["AnalyticKL_ELBO", "MonteCarloKL_ELBO", "RelaxReparam", "SiteKL_ELBO", "learning_rates"]
