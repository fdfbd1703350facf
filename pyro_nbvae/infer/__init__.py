"""ELBO estimators that take the place of Pyro's own wherever Pyro takes a loss."""

from pyro_nbvae.infer.elbo import AnalyticKL_ELBO, MonteCarloKL_ELBO

__all__ = ["AnalyticKL_ELBO", "MonteCarloKL_ELBO"]
