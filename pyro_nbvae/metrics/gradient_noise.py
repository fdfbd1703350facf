"""How noisy an estimator's gradient is."""

from __future__ import annotations

from typing import NamedTuple

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
    elbo: ELBO, model: GenerativeModel, guide: AmortizedGuide, x: Tensor, repeats: int
) -> GradientMoments:
    """Moments of the gradient of the loss per image on one batch, from so many draws of the latents."""
    parameters = [p for p in guide.parameters() if p.requires_grad]
    total: Tensor | float = 0.0
    squares = 0.0
    for _ in range(repeats):
        loss = elbo.differentiable_loss(model, guide, x) / len(x)  # type: ignore[attr-defined]
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()
        total = total + gradient
        squares += float(gradient.square().sum())
    of_mean = float((torch.as_tensor(total) / repeats).square().sum())
    noise = (squares - repeats * of_mean) / (repeats - 1)
    return GradientMoments(of_mean - noise / repeats, noise)
