"""Metrics of a trained model and guide, with integer counts."""

from pyro_nbvae.metrics.bound import importance_weighted_bound
from pyro_nbvae.metrics.clusters import cluster_scores, latent_clusters
from pyro_nbvae.metrics.dispersion import (
    Score,
    compare_likelihoods,
    condition_rates,
    fano_factors,
    fit_dispersion,
    leave_one_out_rates,
    null_rates,
    poisson_log_mass,
)
from pyro_nbvae.metrics.distances import distances, reference_statistics
from pyro_nbvae.metrics.errors import standard_error
from pyro_nbvae.metrics.features import ClassifierFeatures, Features, InceptionFeatures
from pyro_nbvae.metrics.gradients import GradientError, GradientMoments, gradient_errors, gradient_moments
from pyro_nbvae.metrics.held_out import HeldOut, fano_factor, held_out
from pyro_nbvae.metrics.information import unit_information
from pyro_nbvae.metrics.latents import classification, latent_classification, represent
from pyro_nbvae.metrics.spikes import Calibration, bits_per_spike, calibration, co_smoothing, nlb_bits, psth_r2

__all__ = [
    "Calibration",
    "ClassifierFeatures",
    "Features",
    "GradientError",
    "GradientMoments",
    "HeldOut",
    "InceptionFeatures",
    "Score",
    "bits_per_spike",
    "calibration",
    "classification",
    "cluster_scores",
    "co_smoothing",
    "compare_likelihoods",
    "condition_rates",
    "distances",
    "fano_factor",
    "fano_factors",
    "fit_dispersion",
    "gradient_errors",
    "gradient_moments",
    "held_out",
    "importance_weighted_bound",
    "latent_classification",
    "latent_clusters",
    "leave_one_out_rates",
    "nlb_bits",
    "null_rates",
    "poisson_log_mass",
    "psth_r2",
    "reference_statistics",
    "represent",
    "standard_error",
    "unit_information",
]
