"""Metrics of a trained model and guide, with integer counts."""

from pyro_nbvae.metrics.bound import importance_weighted_bound
from pyro_nbvae.metrics.clusters import cluster_scores, latent_clusters
from pyro_nbvae.metrics.distances import distances, reference_statistics
from pyro_nbvae.metrics.features import ClassifierFeatures, Features, InceptionFeatures
from pyro_nbvae.metrics.gradients import GradientError, GradientMoments, gradient_errors, gradient_moments
from pyro_nbvae.metrics.held_out import HeldOut, fano_factor, held_out
from pyro_nbvae.metrics.information import unit_information
from pyro_nbvae.metrics.latents import classification, latent_classification, represent

__all__ = [
    "ClassifierFeatures",
    "Features",
    "GradientError",
    "GradientMoments",
    "HeldOut",
    "InceptionFeatures",
    "classification",
    "cluster_scores",
    "distances",
    "fano_factor",
    "gradient_errors",
    "gradient_moments",
    "held_out",
    "importance_weighted_bound",
    "latent_classification",
    "latent_clusters",
    "reference_statistics",
    "represent",
    "unit_information",
]
