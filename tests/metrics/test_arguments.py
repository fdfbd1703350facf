"""Metrics raise an error for what they cannot measure."""

import numpy as np
import pyro.infer
import pytest
import torch

from pyro_nbvae.batching import Recording
from pyro_nbvae.distributions import Integer
from pyro_nbvae.errors import InputError
from pyro_nbvae.guides import PoissonGuide
from pyro_nbvae.metrics import gradient_moments, held_out, importance_weighted_bound
from pyro_nbvae.metrics.gradients import gradient_errors
from pyro_nbvae.metrics.latents import classification
from pyro_nbvae.models import PoissonModel
from pyro_nbvae.sampling import reconstructed


@pytest.fixture
def pair():
    model = PoissonModel((5,), latents=3, decoder="linear")
    return model, PoissonGuide(model, encoder="linear")


X = torch.rand(4, 5)
ELBO = pyro.infer.TraceMeanField_ELBO()
ONE = np.zeros(30, dtype=int)
RARE = np.arange(100_000) // 99_999


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda *pair: held_out(*pair, torch.zeros(0, 5)), "no observation"),
        (lambda *pair: importance_weighted_bound(*pair, torch.zeros(0, 5), 2), "no observation"),
        (lambda *pair: list(reconstructed(*pair, torch.zeros(0, 5))), "no observation"),
        (lambda *pair: list(reconstructed(*pair, Recording(torch.zeros(0, 5)))), "no observation"),
        (lambda *pair: importance_weighted_bound(*pair, X, 0), "samples must be at least 1, got 0"),
        (lambda *pair: gradient_moments(ELBO, *pair, X, 1), "samples must be at least 2, got 1"),
        (lambda *pair: gradient_errors(*pair, X, [Integer()], samples=4, unbiased_samples=5), "must be at least 5"),
        (lambda *pair: gradient_errors(*pair, X, [Integer()], samples=5, unbiased_samples=4), "must be at least 5"),
        (lambda *_: classification(np.eye(30), ONE, np.eye(30), ONE), "at least 2 classes|greater than one"),
        (lambda *_: classification(RARE[:, None], RARE, RARE[:, None], RARE, splits=1), "at least 2 classes"),
    ],
)
def test_what_cannot_be_measured_is_refused(pair, measure, message):
    with pytest.raises((InputError, ValueError), match=message):
        measure(*pair)
