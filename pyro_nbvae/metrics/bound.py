"""The importance-weighted bound on log p(x)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_nbvae.data import to_floats
from pyro_nbvae.metrics.batching import shown
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, evaluating


def importance_weighted_bound(
    model: GenerativeModel, guide: AmortizedGuide, data: Tensor, samples: int, *, seed: int = 0, progress: bool = False
) -> Tensor:
    """log mean_s p(x, z_s) / q(z_s | x), in nats, per observation: a lower bound on log p(x) that tightens with
    ``samples``.

    Args:
        data: (N, *event_shape), as a data set holds them.
        samples: exact latents per observation.

    Returns:
        (N,).
    """
    bounds = []
    with evaluating(model, guide, seed):
        for batch in shown(data, "bound", progress):
            x = to_floats(batch)
            q = guide.posterior(x)
            p = model.prior_distribution()
            log_weights = []
            for _ in range(samples):
                z = q.sample()
                log_ratio = (p.log_prob(z) - q.log_prob(z)).flatten(1).sum(1)
                log_weights.append(model.observation(z).log_prob(x) + log_ratio)
            bounds.append(torch.logsumexp(torch.stack(log_weights), 0) - math.log(samples))
    return torch.cat(bounds)
