"""Generative models, one file a family."""

from pyro_nbvae.models.negative_binomial import NegativeBinomialModel

__all__ = ["NegativeBinomialModel"]
