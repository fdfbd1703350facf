"""The importance-weighted bound on log p(x)."""

from __future__ import annotations

import math

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyro_nbvae.batching import Observations
from pyro_nbvae.distributions.elementwise import double
from pyro_nbvae.errors import InputError
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, evaluating

# Number of samples whose log masses are computed at once.
_CHUNK = 16


def importance_weighted_bound(
    model: GenerativeModel,
    guide: AmortizedGuide,
    data: Observations,
    samples: int,
    *,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    r"""Compute the importance-weighted lower bound on log p(x), in nats, for each observation.

    .. math:: \log \frac{1}{S} \sum_{s=1}^{S} \frac{p(x, z_s)}{q(z_s \mid x)}, \qquad z_s \sim q(z \mid x)

    It becomes tighter as S grows.

    Args:
        model, guide: the trained pair.
        data: (N, *event_shape), as a data set holds them, or a DataLoader (:func:`~pyro_nbvae.metrics.held_out`).
        samples: number of latents S per observation, integers for counts; at least 1.
        seed: random seed.
        progress: show a progress bar.

    Returns:
        (N,), in float64.

    Raises:
        InputError: for data of the wrong shape, without an observation or outside the likelihood's support, and for no
            samples.

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
    if samples < 1:
        raise InputError(f"samples must be at least 1, got {samples}")
    bounds = []
    with evaluating(model, guide, seed):
        for batch in model.input_batches(data, "data", progress):
            q = guide.posterior(batch.x, **batch.given)
            p = model.prior_distribution()
            log_weights = []
            for start in range(0, samples, _CHUNK):  # one normalizer of q and of p for all samples of a chunk
                z = q.sample(torch.Size([min(_CHUNK, samples - start)]))
                of_prior, of_posterior = (sum_rightmost(double(d.log_prob(z)), -2) for d in (p, q))
                for z_s, log_p_over_q in zip(z, of_prior - of_posterior, strict=True):
                    log_likelihood = model.observation(z_s, **batch.given).log_prob(batch.x)
                    log_weights.append(double(log_likelihood) + log_p_over_q)
            bounds.append(torch.logsumexp(torch.stack(log_weights), 0) - math.log(samples))
    return torch.cat(bounds)
