"""What is measured of a trained pair, always with exact latents: integer counts, temperature 0."""

from pyro_nbvae.metrics.bound import importance_weighted_bound
from pyro_nbvae.metrics.distances import distances
from pyro_nbvae.metrics.features import FEATURES, Features, build_features
from pyro_nbvae.metrics.held_out import HeldOut, fano_factor, held_out

__all__ = [
    "FEATURES",
    "Features",
    "HeldOut",
    "build_features",
    "distances",
    "fano_factor",
    "held_out",
    "importance_weighted_bound",
]
