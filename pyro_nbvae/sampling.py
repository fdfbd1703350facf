"""Samplers for trained models: the prior, a mixture fitted to the posteriors of training data, or these posteriors.

Samples from the prior evaluate the whole model. Samples from the aggregate posterior are reconstructions of training
data, the best that any prior can reach: the increase of FID with the prior is due to its mismatch with the aggregate
posterior. A mixture fitted to the posteriors is a better prior, found after training (ex-post density estimation, Ghosh
et al., 2020).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyro_nbvae.batching import BATCH, EvenSubset, Observations, evaluation_batches
from pyro_nbvae.distributions.relaxed import RelaxedCount
from pyro_nbvae.errors import InputError
from pyro_nbvae.metrics.held_out import mean_or_none
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, evaluating, evaluation_mode

# Maximum number of mixture components, number of EM steps, maximum number of training observations for the fit.
_COMPONENTS, _STEPS, _MAX_FITTED = 100, 30, 20_000
# Minimum mean count of a unit in a component: with a mean of 0, one count would have probability 0.
_MIN_MEAN = 1e-4


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


@dataclass(frozen=True)
class CountMixture:
    r"""Mixture of products of negative binomials (or Poissons, where the variance does not exceed the mean).

    .. math:: p(z) = \sum_c \pi_c \prod_k NB(z_k; \mathrm{mean}_{ck}, \mathrm{variance}_{ck})

    Args:
        weights: weights of the components, (C,).
        mean, variance: moments of the counts in each component, (C, K).

    Example::

        >>> mean = torch.tensor([[1.0, 5.0]])
        >>> CountMixture(torch.ones(1), mean, 2 * mean).sample(4).shape
        torch.Size([4, 2])
    """

    weights: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def fit(cls, mean: Tensor, variance: Tensor, components: int = _COMPONENTS, steps: int = _STEPS) -> CountMixture:
        """Fit a mixture to the posteriors of N observations.

        The fit is EM with the Poisson quasi-likelihood of the posterior means, initialised by k-means of their square
        roots. The variances are those of the counts within a component, including the variances of the posteriors.

        Args:
            mean, variance: moments of the posteriors, (N, K).
            components: maximum number of components; not more than N are used.
            steps: number of EM steps.

        Raises:
            ValueError: by scikit-learn, for means that are negative or not finite.

        Example::

            >>> import torch
            >>> mean = torch.tensor([[0.0, 9.0], [9.0, 0.0]]).repeat(50, 1)
            >>> mixture = CountMixture.fit(mean, mean, components=2)
            >>> mixture.weights
            tensor([0.5000, 0.5000])
        """
        from sklearn.cluster import MiniBatchKMeans

        mean, variance = mean.double(), variance.double()
        components = min(components, len(mean))
        labels = MiniBatchKMeans(components, random_state=0, n_init=1).fit_predict(mean.sqrt().numpy())
        share = torch.nn.functional.one_hot(torch.as_tensor(labels).long(), components).double()
        for _ in range(steps):
            weights = share.sum(0) / len(mean)
            rate = (share.T @ mean / share.sum(0).clamp_min(1e-12)[:, None]).clamp_min(_MIN_MEAN)
            share = (weights.log() + mean @ rate.log().T - rate.sum(1)).softmax(1)
        size = share.sum(0).clamp_min(1e-12)[:, None]
        centre = share.T @ mean / size
        within = share.T @ (variance + mean.square()) / size - centre.square()
        return cls((share.sum(0) / len(mean)).float(), centre.float(), within.float())

    def sample(self, count: int) -> Tensor:
        """Sample integer counts (count, K)."""
        which = torch.multinomial(self.weights, count, replacement=True)
        mean, excess = self.mean[which], (self.variance - self.mean)[which]
        over = (excess > 1e-6 * mean) & (mean > 0)
        concentration = torch.where(over, mean.square() / excess.clamp_min(1e-30), 1.0)
        rate = torch.where(over, torch._standard_gamma(concentration) * mean / concentration, mean)
        return torch.poisson(rate)


@dataclass(frozen=True)
class GaussianMixture:
    """Mixture of Gaussians with diagonal covariances, for real-valued latents.

    Args:
        weights: weights of the components, (C,).
        mean, variance: moments of each component, (C, K).

    Example::

        >>> GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1, 2)).sample(4).shape
        torch.Size([4, 2])
    """

    weights: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def fit(cls, mean: Tensor, variance: Tensor, components: int = _COMPONENTS, steps: int = _STEPS) -> GaussianMixture:
        """Fit a mixture to the posteriors of N observations.

        The mixture is fitted to the posterior means with scikit-learn; the mean posterior variance of each component
        is added to its variance.

        Args:
            mean, variance: moments of the posteriors, (N, K).
            components: maximum number of components; not more than N are used.
            steps: number of EM steps.
        """
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture as Fitted

        fitted = Fitted(min(components, len(mean)), covariance_type="diag", max_iter=steps, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the number of steps is intended
            share = torch.as_tensor(fitted.fit(mean.numpy()).predict_proba(mean.numpy())).double()
        inner = share.T @ variance.double() / share.sum(0).clamp_min(1e-12)[:, None]
        weights, centre, outer = (torch.as_tensor(v) for v in (fitted.weights_, fitted.means_, fitted.covariances_))
        return cls(weights.float(), centre.float(), (inner + outer).float())

    def sample(self, count: int) -> Tensor:
        """Sample latents (count, K)."""
        which = torch.multinomial(self.weights, count, replacement=True)
        return torch.normal(self.mean[which], self.variance[which].sqrt())


@dataclass(frozen=True)
class _Placed:
    """Sampler that moves latents to the device of a model and gives them its latent shape."""

    sampler: Sampler
    like: GenerativeModel

    def sample(self, count: int) -> Tensor:
        return self.sampler.sample(count).reshape(count, *self.like.latent_shape).to(self.like.device)


def fit_mixture(
    model: GenerativeModel, guide: AmortizedGuide, data: Observations, components: int = _COMPONENTS
) -> Sampler:
    """Fit a mixture to the posteriors of data: a CountMixture or, for real-valued latents, a GaussianMixture.

    Args:
        model, guide: the trained pair.
        data: (N, *event_shape), as a data set holds them, or a DataLoader (:func:`~pyro_nbvae.metrics.held_out`); at
            most 20,000 observations are used, evenly spaced.
        components: maximum number of components.

    Returns:
        A sampler of latents (count, *latent_shape), on the device of the model.

    Raises:
        InputError: for latents that are neither counts nor real numbers, such as categories, and for data without an
            observation.

    Reference: Ghosh et al., 2020.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> fit_mixture(model, guide, torch.rand(20, 5), components=2).sample(4).shape
        torch.Size([4, 3])
    """
    means, variances, counts = [], [], False
    fitted = EvenSubset(_MAX_FITTED)
    for batch in evaluation_batches(data, "data"):
        fitted.add(batch)
    with evaluating(model, guide, 0):
        for batch in fitted.observations.split(BATCH):
            q = guide.posterior(model.to_input(batch))
            mean = mean_or_none(q)
            if len(q.event_shape) or mean is None:
                raise InputError(f"a mixture needs counts or real latents, got {type(q).__name__}")
            counts = isinstance(q, RelaxedCount) or bool(getattr(q.support, "is_discrete", False))
            means.append(mean.flatten(1).cpu())
            variances.append(q.variance.flatten(1).cpu())
        kind = CountMixture if counts else GaussianMixture
        return _Placed(kind.fit(torch.cat(means), torch.cat(variances), components), model)


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
    data: Tensor

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        x = self.data[torch.randint(len(self.data), (count,))]
        with evaluation_mode(self.guide), self.guide.exact():
            return self.guide.posterior(self.model.to_input(x)).sample()


@torch.no_grad()
def posterior_samples(model: GenerativeModel, guide: AmortizedGuide, data: Observations, most: int) -> Tensor:
    """Draw a sample of the posterior for each of N observations, with the guide's current relaxation.

    Args:
        model, guide: the trained pair, in the context of :func:`~pyro_nbvae.vae.evaluating` for integer counts.
        data: (N, *event_shape), as a data set holds them, or a DataLoader.
        most: maximum number of observations; if there are more, evenly spaced ones are used.

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
    used = EvenSubset(most)
    for batch in evaluation_batches(data, "data"):
        used.add(batch)
    batches = used.observations.split(BATCH)
    return torch.cat([guide.posterior(model.to_input(batch)).sample() for batch in batches])


def decoded(
    model: GenerativeModel, guide: AmortizedGuide, sampler: Sampler, count: int, *, seed: int = 0
) -> Iterator[Tensor]:
    """Sample latents and iterate over the means of their observations, in batches.

    Args:
        model, guide: the pair.
        sampler: the sampler.
        count: number of observations.
        seed: random seed.

    Returns:
        An iterator over means (B, *event_shape), on the CPU.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> [means.shape for means in decoded(model, guide, PriorSampler(model), 2)]
        [torch.Size([2, 5])]
    """
    for batch, done in enumerate(range(0, count, BATCH)):
        # a separate random stream for each batch, so that the caller's random numbers do not affect it
        with evaluating(model, guide, (seed * 1_000_003 + batch) % 2**32):
            means = model.observation(sampler.sample(min(BATCH, count - done))).mean.cpu()
        yield means
