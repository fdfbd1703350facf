"""How noisy an estimator's gradient is."""

from __future__ import annotations

from typing import NamedTuple

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_nbvae.vae import AmortizedGuide, GenerativeModel


class GradientMoments(NamedTuple):
    """Of the gradient in the guide's parameters: the squared norm of its mean, and the trace of its covariance.

    Both are unbiased, so that the first may be below zero where the noise is far above the signal.
    """

    signal: float
    noise: float


def gradient_moments(
    elbo: ELBO, model: GenerativeModel, guide: AmortizedGuide, x: Tensor, repeats: int, *, seed: int = 0
) -> GradientMoments:
    """Moments of the gradient of the loss per observation on one batch, from so many draws of the latents.

    Pyro's parameter store and torch's random numbers are left as they were.
    """
    parameters = [p for p in guide.parameters() if p.requires_grad]
    total: Tensor | float = 0.0
    squares = 0.0
    devices = [x.device] if x.is_cuda else []
    with pyro.get_param_store().scope(), pyro.validation_enabled(False), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for _ in range(repeats):
            loss = elbo.differentiable_loss(model, guide, x) / len(x)  # type: ignore[attr-defined]
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()
            total = total + gradient
            squares += float(gradient.square().sum())
    of_mean = float((torch.as_tensor(total) / repeats).square().sum())
    noise = (squares - repeats * of_mean) / (repeats - 1)
    return GradientMoments(of_mean - noise / repeats, noise)
