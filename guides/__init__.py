"""Amortised guides, one file a family."""

from pyro_nbvae.guides.negative_binomial import NegativeBinomialGuide

__all__ = ["NegativeBinomialGuide"]
