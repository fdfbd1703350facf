"""Noise of an estimator's gradient."""

from __future__ import annotations

from typing import NamedTuple

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_nbvae.errors import check_number
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel


class GradientMoments(NamedTuple):
    """Moments of the gradient in the guide's parameters.

    Both are unbiased, so ``signal`` may be below zero if the noise is much larger than the signal.

    Attributes:
        signal: squared norm of the mean.
        noise: trace of the covariance.

    Example::

        >>> GradientMoments(signal=2.0, noise=0.5)
        GradientMoments(signal=2.0, noise=0.5)
    """

    signal: float
    noise: float


def gradient_moments(
    elbo: ELBO, model: GenerativeModel, guide: AmortizedGuide, x: Tensor, repeats: int, *, seed: int = 0
) -> GradientMoments:
    r"""Estimate the moments of the gradient of the loss per observation, on one batch.

    .. math:: \mathrm{signal} = \|E[\hat g]\|^2, \qquad \mathrm{noise} = \mathrm{tr}\,\mathrm{Cov}(\hat g)

    Pyro's parameter store and torch's random numbers are left unchanged.

    Args:
        elbo: an ELBO with ``differentiable_loss``.
        model, guide: the pair.
        x: observations (B, *event_shape).
        repeats: number of draws of the latents, at least 2.
        seed: random seed.

    Returns:
        The moments.

    Raises:
        InputError: for fewer than 2 repeats.
        NotImplementedError: by this package's ELBOs, for a guide whose latents have no ``rsample``.

    See also: docs/mathematics.md, section 5.5 (Bias and noise).

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> moments = gradient_moments(pyro.infer.TraceMeanField_ELBO(), model, guide, torch.zeros(4, 5), repeats=3)
        >>> moments.noise > 0
        True
    """
    check_number("repeats", repeats, 2)
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
