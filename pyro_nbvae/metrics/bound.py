"""The importance-weighted bound on log p(x)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_nbvae.data import to_unit_interval
from pyro_nbvae.metrics.batching import shown
from pyro_nbvae.metrics.held_out import log_likelihood, squared_error
from pyro_nbvae.vae import AmortizedGuide, ImageModel, evaluating


def importance_weighted_bound(
    model: ImageModel, guide: AmortizedGuide, images: Tensor, samples: int, *, seed: int = 0, progress: bool = False
) -> Tensor:
    """log mean_s p(x, z_s) / q(z_s | x), in nats, per image: a lower bound on log p(x) that tightens with ``samples``.

    Args:
        images: uint8 (N, C, H, W).
        samples: exact latents per image.

    Returns:
        (N,).
    """
    bounds = []
    with evaluating(model, guide, seed):
        for batch in shown(images, "bound", progress):
            x = to_unit_interval(batch)
            q = guide.posterior(x)
            p = model.prior_distribution()
            log_weights = []
            for _ in range(samples):
                z = q.sample()
                likelihood = log_likelihood(model, squared_error(x, model.decode(z)))
                log_weights.append(likelihood + (p.log_prob(z) - q.log_prob(z)).sum(-1))
            bounds.append(torch.logsumexp(torch.stack(log_weights), 0) - math.log(samples))
    return torch.cat(bounds)
