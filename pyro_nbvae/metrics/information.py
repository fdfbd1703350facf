"""Mutual information between each unit and the observation, under the aggregate posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, Laplace, Normal
from torch.nn.functional import logsigmoid

from pyro_nbvae.batching import BATCH, Batch, Recording, random_subset
from pyro_nbvae.distributions.divergences import Counted, as_q
from pyro_nbvae.distributions.elementwise import double
from pyro_nbvae.distributions.families import negative_binomial
from pyro_nbvae.infer.elbo import has_own_log_prob
from pyro_nbvae.vae import AmortizedGuide

# Maximum number of observations whose posteriors are compared.
OBSERVATIONS = 1000
# The window of counts omits a mass of exp(-NATS), about 1e-7, of each posterior.
NATS = 16.0
# Maximum number of points of one unit's sum, and of elements that are computed at once: they fit in a core's cache.
MOST_POINTS, CHUNK_ELEMENTS = 1 << 11, 1 << 16
# Number of observations of a Monte Carlo estimate, and number of samples for each.
_SAMPLED_OBSERVATIONS, _SAMPLES = 300, 4


def _normal(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return -0.5 * ((z - loc) / scale).square()


def _laplace(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return -((z - loc) / scale).abs()


# Densities that are summed on a grid: log density up to a constant, number of points per scale, and number of scales on
# each side of a location. The density of a Laplace has a kink.
_GRIDS: tuple[tuple[type, Callable[..., Tensor], int, float], ...] = (
    (Normal, _normal, 2, 7.0),
    (Laplace, _laplace, 16, 21.0),
)


def unit_information(guide: AmortizedGuide, data: Batch) -> Tensor:
    r"""Compute the mutual information between each unit and the observation, in nats.

    .. math:: I = \frac{1}{N} \sum_n KL(q(z | x_n) \,\|\, q(z)), \qquad q(z) = \frac{1}{N} \sum_n q(z | x_n)

    It is 0 if the posterior is the same for all observations, whatever the prior, and at most log N. The mean KL to the
    prior is :math:`I + KL(q(z) \,\|\, p(z))`.

    It is computed as a sum over counts or categories, up to a mass of 1e-7, or over a grid for Normal and Laplace
    densities, with an error below 1e-3 nats. For other families, and for units whose sum would have more than 2,048
    points, it is a Monte Carlo estimate from 4 samples for each of at most 300 observations.

    Args:
        guide: the guide, in the context of :func:`~pyro_nbvae.vae.evaluating`, so that counts are integers.
        data: observations (N, *event_shape), floats, or a :class:`~pyro_nbvae.batching.Recording`.

    Returns:
        (units,), in float64; (), the joint information of all latents, if the guide has a joint posterior.

    Reference: Hoffman and Johnson, 2016.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> from pyro_nbvae.vae import evaluating
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> with evaluating(model, guide, seed=0):
        ...     found = unit_information(guide, torch.ones(4, 5))  # four times the same observation
        >>> [round(nats, 6) for nats in found.tolist()]
        [0.0, 0.0, 0.0]
    """
    data = Recording.of(data)
    posteriors = [_units(guide.posterior(batch.x, **batch.given)) for batch in data.split(BATCH)]
    shape = torch.Size(posteriors[0].batch_shape[1:])  # some families have a tuple
    found = torch.stack([each.cpu() for each in _summed(posteriors)] or [torch.tensor(math.nan)])
    found = found.to(torch.float64).expand(shape.numel()).clone()
    if bool(found.isnan().any()):
        few = random_subset(data, _SAMPLED_OBSERVATIONS)
        sampled = _sampled(_units(guide.posterior(few.x, **few.given))).cpu()
        found = torch.where(found.isnan(), sampled, found)
    return found.clamp(min=0).reshape(shape)  # rounding may make it negative


def _units(q: TorchDistribution) -> Distribution:
    """Return a posterior with the units in its batch shape, if they are independent."""
    base: Distribution = q
    while isinstance(base, Independent):
        base = base.base_dist
    return base


def _summed(posteriors: Sequence[Distribution]) -> list[Tensor]:
    """Return the information of each unit as a sum, nan if it has too many points; an empty list for other families."""
    q = posteriors[0]
    if q.has_enumerate_support:
        try:
            parts = [each.log_prob(each.enumerate_support(expand=False)).flatten(2) for each in posteriors]
        except NotImplementedError:  # a Binomial whose total_count differs between elements
            return []
        return [_of_log_masses([part]) for part in double(torch.cat(parts, 1)).unbind(2)]
    if has_own_log_prob(q):
        return []
    if isinstance(q, Counted):
        family = as_q(q)[0]
        log_weight = _negative_binomial if family is negative_binomial else family.log_weight
        found = []
        for own in _by_unit([as_q(each)[1] for each in posteriors]):  # type: ignore[arg-type]
            low, high = family.window(NATS, *own)
            first, last = float(low.min().clamp(min=0).floor()), float(high.max().ceil())
            found.append(_on_points(first, last, 1.0, log_weight, own))
        return found
    for kind, log_density, points, sides in _GRIDS:
        if isinstance(q, kind):
            found = []
            for loc, scale in _by_unit([(each.loc, each.scale) for each in posteriors]):  # type: ignore[attr-defined]
                first, last = float((loc - sides * scale).min()), float((loc + sides * scale).max())
                found.append(_on_points(first, last, float(scale.min()) / points, log_density, (loc, scale)))
            return found
    return []


def _by_unit(parameters: Iterable[Sequence[Tensor]]) -> Iterable[list[Tensor]]:
    """Iterate over units: the parameters of each, (N,), from those of batches, (B, *units)."""
    whole = [double(torch.cat(parts)).flatten(1) for parts in zip(*parameters, strict=True)]
    return ([p[:, unit] for p in whole] for unit in range(whole[0].shape[1]))


def _on_points(
    first: float, last: float, step: float, log_weight: Callable[..., Tensor], parameters: Sequence[Tensor]
) -> Tensor:
    """Return the information of posteriors with parameters (N,) each, summed over points; nan for too many."""
    if not (step > 0 and last - first < step * MOST_POINTS):  # or nan
        return torch.tensor(math.nan)
    number = math.ceil((last - first) / step) + 1
    points = first + step * torch.arange(number, dtype=torch.float64, device=parameters[0].device)
    chunks = zip(*(p.split(max(1, CHUNK_ELEMENTS // number)) for p in parameters), strict=True)
    return _of_log_masses(log_weight(points[:, None], *own) for own in chunks)


def _of_log_masses(chunks: Iterable[Tensor]) -> Tensor:
    """Return the information of posteriors from their log weights (points, n), which are normalised here.

    It is the entropy of the mean minus the mean of the entropies.
    """
    total: Tensor | float = 0.0
    entropy: Tensor | float = 0.0
    number = 0
    for log_weight in chunks:
        log_mass = log_weight.log_softmax(0)
        q = log_mass.exp()
        total, entropy = total + q.sum(1), entropy - (q * log_mass.clamp(min=-1e4)).sum()
        number += q.shape[1]
    return torch.special.entr(torch.as_tensor(total) / number).sum() - entropy / number


def _negative_binomial(k: Tensor, r: Tensor, logits: Tensor) -> Tensor:
    """Return log NB(k; r, logits) at successive counts (points, 1), up to a constant.

    A cumulative sum of log NB(k + 1) - log NB(k) is ten times as fast as log Gamma functions of all elements.
    """
    steps = torch.log((k + r) / (k + 1)).add_(logsigmoid(logits))
    return torch.cat([torch.zeros_like(steps[:1]), steps[:-1]]).cumsum(0)


def _sampled(q: Distribution) -> Tensor:
    """Return a Monte Carlo estimate of the information from posteriors of batch shape (n, *units), (units,)."""
    z = q.sample(torch.Size([_SAMPLES]))
    own = q.log_prob(z).double().mean((0, 1))
    each = z.flatten(0, 1).unsqueeze(1)  # (samples, 1, *units, *event)
    mixture = [
        q.log_prob(chunk).double().logsumexp(1).sum(0)
        for chunk in each.split(max(1, CHUNK_ELEMENTS // torch.Size(q.batch_shape).numel()))
    ]
    return (own - torch.stack(mixture).sum(0) / len(each) + math.log(q.batch_shape[0])).flatten()
