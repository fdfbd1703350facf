"""Moments of the gradient, for a loss whose gradient's distribution is known."""

import math

import torch
from torch import nn

from pyro_nbvae.metrics import gradient_moments

SIGNAL, NOISE, PARAMETERS, REPEATS = 0.3, 2.0, 40, 50


class KnownGradient:
    """A loss whose gradient is normal, of mean ``SIGNAL`` and deviation ``NOISE`` in every parameter."""

    def differentiable_loss(self, model, guide, x):
        gradient = SIGNAL + NOISE * torch.randn(PARAMETERS)
        return (guide.weight.flatten() * gradient).sum() * len(x)


def test_signal_and_noise_are_unbiased():
    """Means over 200 estimates, each of 50 gradients, within 4 standard errors."""
    guide = nn.Linear(PARAMETERS, 1, bias=False)
    found = [gradient_moments(KnownGradient(), None, guide, torch.zeros(7, 1), REPEATS, seed=k) for k in range(200)]
    truth = (PARAMETERS * SIGNAL**2, PARAMETERS * NOISE**2)
    for values, true in zip(torch.tensor(found, dtype=torch.float64).T, truth, strict=True):
        assert abs(float(values.mean()) - true) < 4 * float(values.std()) / math.sqrt(len(values))
