"""Samplers after training: latents from the prior, or from a mixture fitted to the training data's posteriors.

Samples of the prior show the model. Samples of a mixture show the decoder: they are of where the posteriors lie, so the
difference in FID is the part of the prior (ex-post density estimation, Ghosh et al., ICLR 2020).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pyro_nbvae.data import BATCH, batches, to_floats
from pyro_nbvae.distributions.relaxed import RelaxedCount
from pyro_nbvae.errors import InputError, check_number, check_seed
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, evaluating

SamplerName = Literal["prior", "mixture"]
# Components of the mixture, steps of its EM, and the training observations that it is fitted to, at most.
COMPONENTS, STEPS, FITTED = 100, 30, 20_000
MOST_SAMPLES = 10_000_000
# The least mean count of a unit in a component: an empty one would exclude what fires once.
LEAST = 1e-4


class Sampler(Protocol):
    """Draws latents (count, *latent_shape)."""

    def sample(self, count: int) -> Tensor:
        """Latents from the global random generator."""


@dataclass(frozen=True)
class PriorSampler:
    """Latents from a model's prior, integers where they are counts."""

    model: GenerativeModel

    def sample(self, count: int) -> Tensor:
        return self.model.prior_distribution().sample(torch.Size([count]))


@dataclass(frozen=True)
class CountMixture:
    r"""A mixture of products of negative binomials (Poissons where the variance is not above the mean).

    .. math:: p(z) = \sum_c \pi_c \prod_k NB(z_k; \mathrm{mean}_{ck}, \mathrm{variance}_{ck})

    Args:
        weights: of the components, (C,).
        mean, variance: of the counts in each component, (C, K).
    """

    weights: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def fit(cls, mean: Tensor, variance: Tensor, components: int = COMPONENTS, steps: int = STEPS) -> CountMixture:
        """Fits a mixture to posteriors of N observations.

        EM under the Poisson quasi-likelihood of the means, from k-means of their square roots; the variances are then
        those of the counts within a component, the posteriors' own included.

        Args:
            mean, variance: of the posteriors, (N, K).
            components: at most; N at most.
            steps: of EM.

        Raises:
            ValueError: for means that are negative or not finite.

        Example::

            >>> import torch
            >>> mean = torch.tensor([[0.0, 9.0], [9.0, 0.0]]).repeat(50, 1)
            >>> mixture = CountMixture.fit(mean, mean, components=2)
            >>> mixture.weights
            tensor([0.5000, 0.5000])
        """
        from sklearn.cluster import MiniBatchKMeans

        if not bool(((mean >= 0) & mean.isfinite()).all()):
            raise InputError("a count mixture needs means that are finite and not negative")
        mean, variance = mean.double(), variance.double()
        components = min(components, len(mean))
        labels = MiniBatchKMeans(components, random_state=0, n_init=1).fit_predict(mean.sqrt().numpy())
        share = torch.nn.functional.one_hot(torch.as_tensor(labels).long(), components).double()
        for _ in range(steps):
            weights = share.sum(0) / len(mean)
            rate = (share.T @ mean / share.sum(0).clamp_min(1e-12)[:, None]).clamp_min(LEAST)
            share = (weights.log() + mean @ rate.log().T - rate.sum(1)).softmax(1)
        size = share.sum(0).clamp_min(1e-12)[:, None]
        centre = share.T @ mean / size
        spread = share.T @ (variance + mean.square()) / size - centre.square()
        return cls((share.sum(0) / len(mean)).float(), centre.float(), spread.float())

    def sample(self, count: int) -> Tensor:
        """Integer counts (count, K)."""
        which = torch.multinomial(self.weights, count, replacement=True)
        mean, excess = self.mean[which], (self.variance - self.mean)[which]
        over = (excess > 1e-6 * mean) & (mean > 0)
        concentration = torch.where(over, mean.square() / excess.clamp_min(1e-30), 1.0)
        rate = torch.where(over, torch._standard_gamma(concentration) * mean / concentration, mean)
        return torch.poisson(rate)


@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of Gaussians with diagonal covariances, for latents on the real line; scikit-learn fits it.

    Args:
        weights: of the components, (C,).
        mean, variance: of each component, (C, K).
    """

    weights: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def fit(cls, mean: Tensor, variance: Tensor, components: int = COMPONENTS, steps: int = STEPS) -> GaussianMixture:
        """Fits a mixture to posteriors of N observations: to their means; each component's posterior variance is added.

        Args:
            mean, variance: of the posteriors, (N, K).
            components: at most; N at most.
            steps: of EM.
        """
        import warnings

        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture as Fitted

        fitted = Fitted(min(components, len(mean)), covariance_type="diag", max_iter=steps, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the steps are what was asked for
            share = torch.as_tensor(fitted.fit(mean.numpy()).predict_proba(mean.numpy())).double()
        inner = share.T @ variance.double() / share.sum(0).clamp_min(1e-12)[:, None]
        weights, centre, outer = (torch.as_tensor(v) for v in (fitted.weights_, fitted.means_, fitted.covariances_))
        return cls(weights.float(), centre.float(), (inner + outer).float())

    def sample(self, count: int) -> Tensor:
        """Latents (count, K)."""
        which = torch.multinomial(self.weights, count, replacement=True)
        return torch.normal(self.mean[which], self.variance[which].sqrt())


@dataclass(frozen=True)
class _Placed:
    """A sampler whose latents go to a device and a shape."""

    sampler: Sampler
    like: GenerativeModel

    def sample(self, count: int) -> Tensor:
        return self.sampler.sample(count).reshape(count, *self.like.latent_shape).to(self.like.device)


def fit_mixture(model: GenerativeModel, guide: AmortizedGuide, data: Tensor, components: int = COMPONENTS) -> Sampler:
    """The mixture that fits the posteriors of data: of counts, or, for real latents, of Gaussians.

    Args:
        model, guide: a trained pair.
        data: (N, *event_shape), as a data set holds them; the first 20,000 are taken.
        components: at most.

    Raises:
        InputError: for latents whose posterior has no mean and variance of the latents' own kind (categories).
    """
    means, variances, counts = [], [], False
    with evaluating(model, guide, 0):
        for batch in batches(data[:FITTED], BATCH):
            q = guide.posterior(to_floats(batch).to(model.device))
            if len(q.event_shape) or not hasattr(q, "mean"):
                raise InputError(f"a mixture sampler needs counts or real latents: {type(q).__name__} has neither")
            counts = isinstance(q, RelaxedCount)
            means.append(q.mean.flatten(1).cpu())
            variances.append(q.variance.flatten(1).cpu())
        kind = CountMixture if counts else GaussianMixture
        return _Placed(kind.fit(torch.cat(means), torch.cat(variances), components), model)


def decoded(
    model: GenerativeModel, guide: AmortizedGuide, sampler: Sampler, count: int, *, seed: int = 0
) -> Iterator[Tensor]:
    """Means of ``count`` observations at latents of a sampler, in batches (B, *event_shape) on the CPU.

    Raises:
        InputError: for a count below 1, or above ten million.
    """
    check_number("the number of samples", count, 1, MOST_SAMPLES)
    check_seed(seed)
    for batch, done in enumerate(range(0, count, BATCH)):
        # a stream for each batch: between them the caller's random numbers are its own
        with evaluating(model, guide, (seed * 1_000_003 + batch) % 2**32):
            means = model.observation(sampler.sample(min(BATCH, count - done))).mean.cpu()
        yield means
