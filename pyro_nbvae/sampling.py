"""Samplers for trained models: the prior, or the posteriors of training data; and a prior fitted to these afterwards.

Samples from the prior evaluate the whole model. Samples from the aggregate posterior are reconstructions of training
data, the best that any prior can reach: the increase of FID with the prior is due to its mismatch with the aggregate
posterior.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions import constraints
from tqdm.auto import tqdm

from pyro_nbvae.batching import BATCH, Batch, Observations, RandomSubset, evaluation_batches
from pyro_nbvae.errors import InputError
from pyro_nbvae.priors import FittedMixture
from pyro_nbvae.seeds import stream_seed
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, evaluating, evaluation_mode

# Maximum number of observations that a prior is fitted to; one of so many is held out.
_MAX_FITTED, _HELD_OUT = 60_000, 10
# Number of mixtures that are compared at least.
_TRIED = 4
# Maximum number of observations at whose posteriors a joint prior begins.
_MAX_STARTED = 20_000


class Sampler(Protocol):
    """Interface of samplers.

    Example::

        >>> class Zeros:
        ...     def sample(self, count):
        ...         return torch.zeros(count, 3)
        >>> Zeros().sample(2).shape
        torch.Size([2, 3])
    """

    def sample(self, count: int) -> Tensor:
        """Sample latents (count, *latent_shape) with the global random state of torch."""


@dataclass(frozen=True)
class PriorSampler:
    """Sampler of latents from the prior of a model; counts are integers.

    Args:
        model: the generative model.

    Example::

        >>> from pyro_nbvae.models import PoissonModel
        >>> PriorSampler(PoissonModel((5,), latents=3, decoder="linear")).sample(2).shape
        torch.Size([2, 3])
    """

    model: GenerativeModel

    def sample(self, count: int) -> Tensor:
        return self.model.prior_distribution().sample(torch.Size([count]))


def start_prior(model: GenerativeModel, guide: AmortizedGuide, data: Observations, *, seed: int = 0) -> None:
    """Move the joint prior of a model, if it has one, to the posteriors of data; call it after the first epoch.

    Args:
        model, guide: the pair.
        data: (N, *event_shape), as a data set holds them, or a DataLoader; at most 20,000 random observations are used.
        seed: random seed.

    See also: :meth:`pyro_nbvae.priors.JointPrior.start`.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> from pyro_nbvae.priors import Mixture
        >>> model = PoissonModel((5,), latents=3, decoder="linear", prior=Mixture(4))
        >>> start_prior(model, PoissonGuide(model, encoder="linear"), torch.rand(50, 5))
        >>> bool((model.prior_distribution().component_logits != 0).all())
        True
    """
    joint = model.joint_prior
    if joint is not None and joint.starts:
        with evaluating(model, guide, stream_seed(seed, "fit")):
            z = posterior_samples(model, guide, data, _MAX_STARTED)
            joint.start(model.factorised_prior(), z, seed)


def fit_prior(
    model: GenerativeModel,
    guide: AmortizedGuide,
    data: Observations,
    components: int = 200,
    *,
    seed: int = 0,
    progress: bool = False,
) -> tuple[FittedMixture, dict[int, float]]:
    """Fit a mixture to the posteriors of data: a better prior, found after training (ex-post density estimation).

    Mixtures of ``components``, a half, a quarter and an eighth of them, and fewer as long as these are better, are
    fitted to one sample of the posterior for each observation but a tenth, whose likelihood chooses the number; the
    mixture is then fitted to all samples.
    ``model.set_joint_prior(fitted)`` makes it the prior of a model, for samples and for bounds.

    Args:
        model, guide: the trained pair.
        data: (N, *event_shape), as a data set holds them, or a DataLoader (:func:`~pyro_nbvae.metrics.held_out`), at
            least two observations; at most 60,000 random ones are used.
        components: largest number of components; not more than there are observations are used.
        seed: random seed; the noise is another than that of :func:`~pyro_nbvae.metrics.held_out` with this seed.
        progress: show a progress bar.

    Returns:
        The mixture, on the device of the model, and log p(z) in nats of the held-out tenth, by number of components.

    Raises:
        InputError: for latents that are neither counts nor real numbers, such as categories, and for fewer than two
            observations.

    Reference: Ghosh et al., 2020.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> fitted, scores = fit_prior(model, guide, torch.rand(50, 5), components=4)
        >>> model.set_joint_prior(fitted)
        >>> model.generate(2)[0].shape, sorted(scores)
        (torch.Size([2, 3]), [1, 2, 4])
    """
    if components < 1:
        raise InputError(f"components must be at least 1, got {components}")
    with evaluating(model, guide, stream_seed(seed, "fit")):
        first = model.to_input(next(iter(evaluation_batches(data, "data")))[:1])
        support: Any = guide.posterior(first.x, **first.given).support
        counted = getattr(support, "lower_bound", None) == 0 and getattr(support, "upper_bound", None) is None
        if support.event_dim or not (support is constraints.real or (support.is_discrete and counted)):
            raise InputError(f"a mixture needs latents that are counts or real numbers, got {support}")
        z = posterior_samples(model, guide, data, _MAX_FITTED).flatten(1).cpu()
    if len(z) < 2:
        raise InputError(f"a mixture needs at least 2 observations, got {len(z)}")
    # at random, because data may be in a periodic order
    chance = torch.Generator().manual_seed(stream_seed(0, "held out"))
    held_out = torch.randperm(len(z), generator=chance) % _HELD_OUT == 1
    number, scores = min(components, int((~held_out).sum())), dict[int, float]()
    with tqdm(desc="mixtures", unit="fit", disable=not progress, leave=None) as bar:
        # at least four numbers, and half as many components as long as fewer are better
        while number and (len(scores) < _TRIED or min(scores) == max(scores, key=lambda each: scores[each])):
            fitted = FittedMixture.fit(z[~held_out], number, counts=support.is_discrete, seed=seed)
            scores[number] = float(fitted.distribution.log_prob(z[held_out]).double().mean())
            number //= 2
            bar.update()
    best = max(scores, key=lambda each: scores[each])
    return FittedMixture.fit(z, best, counts=support.is_discrete, seed=seed).to(model.device), scores


@dataclass(frozen=True)
class PosteriorSampler:
    r"""Sampler of latents from the aggregate posterior of data; counts are integers.

    .. math:: q(z) = \frac{1}{N} \sum_n q(z | x_n)

    Decoded, they are reconstructions of observations that are chosen at random, with replacement.

    Args:
        model, guide: the trained pair.
        data: (N, *event_shape), as a data set holds them, at least one observation.

    Reference: Hoffman and Johnson, 2016.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> PosteriorSampler(model, PoissonGuide(model, encoder="linear"), torch.rand(20, 5)).sample(4).shape
        torch.Size([4, 3])
    """

    model: GenerativeModel
    guide: AmortizedGuide
    data: Batch

    def sample(self, count: int) -> Tensor:
        return self.sample_pairs(count)[0]

    @torch.no_grad()
    def sample_pairs(self, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Sample latents, and the exposures and covariates of the observations that they belong to."""
        batch = self.model.to_input(self.data[torch.randint(len(self.data), (count,))])
        with evaluation_mode(self.guide), self.guide.exact():
            return self.guide.posterior(batch.x, **batch.given).sample(), batch.conditions


def drawn_rows(given: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Draw so many rows of exposures and covariates, (M, ...) each, at random and together."""
    chosen = {len(part): torch.randint(len(part), (count,)) for part in given.values()}
    return {name: part[chosen[len(part)]] for name, part in given.items()}


@torch.no_grad()
def posterior_samples(model: GenerativeModel, guide: AmortizedGuide, data: Observations, most: int) -> Tensor:
    """Draw a sample of the posterior for each of N observations, with the guide's current relaxation.

    Args:
        model, guide: the trained pair, in the context of :func:`~pyro_nbvae.vae.evaluating` for integer counts.
        data: (N, *event_shape), as a data set holds them, or a DataLoader.
        most: maximum number of observations; if there are more, random ones are used.

    Returns:
        Latents (N, *latent_shape).

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> from pyro_nbvae.vae import evaluating
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> with evaluating(model, guide, seed=0):
        ...     posterior_samples(model, guide, torch.rand(20, 5), most=10).shape
        torch.Size([10, 3])
    """
    used = RandomSubset(most)
    for batch in evaluation_batches(data, "data"):
        used.add(batch)
    batches = map(model.to_input, used.observations.split(BATCH))
    return torch.cat([guide.posterior(batch.x, **batch.given).sample() for batch in batches])


def reconstructed(model: GenerativeModel, guide: AmortizedGuide, data: Batch, *, seed: int = 0) -> Iterator[Tensor]:
    """Iterate over the reconstructions of observations from one exact posterior sample each (integer counts).

    Args:
        model, guide: the pair.
        data: observations (N, *event_shape), or a :class:`~pyro_nbvae.batching.Recording`.
        seed: random seed.

    Returns:
        An iterator over means of the likelihood (B, *event_shape), on the CPU.

    Raises:
        InputError: for observations of the wrong shape or type, or none.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> [means.shape for means in reconstructed(model, guide, torch.zeros(4, 5))]
        [torch.Size([4, 5])]
    """
    for number, part in enumerate(evaluation_batches(data, "observations")):
        with evaluating(model, guide, stream_seed(seed, f"batch {number}")):
            batch = model.to_input(part)
            z = guide.posterior(batch.x, **batch.given).sample()
            means = model.observation(z, **batch.given).mean.cpu()
        yield means


class Generated(NamedTuple):
    """Observations that a model generated, on the CPU.

    Attributes:
        z: latents (B, *latent_shape).
        mean: means of their observations, (B, *event_shape).
        x: observations: one draw from the likelihood each, (B, *event_shape).
        given: their exposures and covariates, by name.
    """

    z: Tensor
    mean: Tensor
    x: Tensor
    given: dict[str, Tensor]


def generated(
    model: GenerativeModel,
    guide: AmortizedGuide,
    sampler: Sampler,
    count: int,
    *,
    seed: int = 0,
    given: Mapping[str, Tensor] | None = None,
) -> Iterator[Generated]:
    """Sample latents and iterate over their observations, in batches.

    Args:
        model, guide: the pair.
        sampler: the sampler.
        count: number of observations.
        seed: random seed.
        given: ``exposure`` (M, ...) and ``covariates`` (M, C), if the data have them, such as the ``conditions`` of the
            training data: rows are drawn at random. A sampler of posteriors has those of its own observations. Default:
            an exposure of 1.

    Returns:
        An iterator over batches of up to 500 observations.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> [batch.x.shape for batch in generated(model, guide, PriorSampler(model), 2)]
        [torch.Size([2, 5])]
    """
    for batch, done in enumerate(range(0, count, BATCH)):
        with evaluating(model, guide, stream_seed(seed, f"batch {batch}")):
            number = min(BATCH, count - done)
            if isinstance(sampler, PosteriorSampler):
                z, own = sampler.sample_pairs(number)
            else:
                z, own = sampler.sample(number), drawn_rows(given or {}, number)
            observed = model.observation(z, **{name: part.to(z) for name, part in own.items()})
            own = {name: part.cpu() for name, part in own.items()}
            found = Generated(z.cpu(), observed.mean.cpu(), observed.sample().cpu(), own)
        yield found
