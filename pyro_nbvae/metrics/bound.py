"""The importance-weighted bound on log p(x)."""

from __future__ import annotations

import math

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyro_nbvae.batching import Observations, placed, shown
from pyro_nbvae.distributions.elementwise import double
from pyro_nbvae.errors import check_number
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, evaluating, in_support

# Samples whose log masses are computed together.
TOGETHER = 16


def importance_weighted_bound(
    model: GenerativeModel,
    guide: AmortizedGuide,
    data: Observations,
    samples: int,
    *,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    r"""Importance-weighted lower bound on log p(x), in nats, for each observation.

    .. math:: \log \frac{1}{S} \sum_{s=1}^{S} \frac{p(x, z_s)}{q(z_s \mid x)}, \qquad z_s \sim q(z \mid x)

    It tightens as S grows.

    Args:
        model, guide: the pair.
        data: (N, *event_shape), as a data set holds them, or a DataLoader (:func:`~pyro_nbvae.metrics.held_out`).
        samples: S, exact latents per observation.
        seed: random seed.
        progress: show a progress bar.

    Returns:
        (N,), in float64.

    Raises:
        InputError: for data of the wrong shape or without an observation, and for a seed or a number of samples out of
            range.

    Reference: Burda et al., 2016.

    See also: docs/mathematics.md, section 6.3 (The importance-weighted bound).

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> importance_weighted_bound(model, guide, torch.zeros(4, 5), samples=10).shape
        torch.Size([4])
    """
    check_number("samples", samples, 1)
    bounds = []
    with evaluating(model, guide, seed):
        for x in in_support(model, (placed(model, batch) for batch in shown(data, "bound", progress)), "data"):
            q = guide.posterior(x)
            p = model.prior_distribution()
            log_weights = []
            for start in range(0, samples, TOGETHER):  # the normalizers of q and p serve all samples of a piece
                z = q.sample(torch.Size([min(TOGETHER, samples - start)]))
                of_prior, of_posterior = (sum_rightmost(double(d.log_prob(z)), -2) for d in (p, q))
                for one, log_ratio in zip(z, of_prior - of_posterior, strict=True):
                    log_weights.append(double(model.observation(one).log_prob(x)) + log_ratio)
            bounds.append(torch.logsumexp(torch.stack(log_weights), 0) - math.log(samples))
    return torch.cat(bounds)
