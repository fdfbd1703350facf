"""Likelihood, KL, reconstruction and statistics of the latents on held-out data, in one pass.

The ELBO is that of the count model, in nats, with the model's own likelihood. The KL is the registered one of the pair
(in closed form or by quadrature), whichever KL it was trained with; if none is registered, it is a Monte Carlo
estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Distribution

from pyro_nbvae.data import to_floats
from pyro_nbvae.data.sources import is_image_shape, limits_of, values_of
from pyro_nbvae.distributions.relaxed import RelaxedCount
from pyro_nbvae.infer.elbo import NoKLError, log_mass, registered_kl
from pyro_nbvae.metrics.batching import shown
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, evaluating, in_support

# A unit is dead if its KL, averaged over observations, is below this.
DEAD_NATS = 0.01
# Samples per latent for a KL that is not registered.
KL_SAMPLES = 20
# Pixels of SSIM's window on each side of its centre; a smaller image has no window.
SSIM_MARGIN = 5


@dataclass(frozen=True)
class HeldOut:
    """Results on held-out data, from one exact sample per observation.

    Attributes:
        log_likelihood: log p(x | z) in nats, per observation.
        squared_error: squared error of the likelihood's mean, per observation; None if the likelihood has no mean.
        kl: KL in nats, per observation.
        kl_error: standard error of a Monte Carlo KL; None if the KL is exact.
        elbo: ``log_likelihood - kl``, in nats per observation.
        mse: ``squared_error`` per element; None if the likelihood has no mean.
        ssim: structural similarity; None if the data are not images of more than 5 pixels a side, or the likelihood
            has no mean.
        fano: Fano factor of the posterior (variance over mean), averaged; None if the latents are not counts.
        unit_mean, unit_variance: mean and variance of the samples across observations, (*latent_shape).
        unit_kl: mean KL of each unit in nats, of the prior's batch shape; the total for a joint prior.
        posterior_mean, posterior_variance: the posterior's mean and variance of each unit, averaged over observations;
            None if the latents are not counts.

    Example::

        >>> zeros = torch.zeros(3)
        >>> HeldOut(-2.0, 1.0, 0.5, None, -2.5, 0.2, None, None, zeros, zeros, torch.tensor([0.5, 0.0, 0.0])).dead_units
        2
    """

    log_likelihood: float
    squared_error: float | None
    kl: float
    kl_error: float | None
    elbo: float
    mse: float | None
    ssim: float | None
    fano: float | None
    unit_mean: Tensor
    unit_variance: Tensor
    unit_kl: Tensor
    posterior_mean: Tensor | None = None
    posterior_variance: Tensor | None = None

    @property
    def dead_units(self) -> int:
        """Number of units whose mean KL is below 0.01 nats."""
        return int((self.unit_kl < DEAD_NATS).sum())

    @property
    def underdispersed_units(self) -> float | None:
        """Fraction of the units that are not dead whose posterior has less variance than a Poisson.

        None if all units are dead, or if the latents are not counts.
        """
        alive = self.unit_kl >= DEAD_NATS
        if self.posterior_mean is None or self.posterior_variance is None or not bool(alive.any()):
            return None
        return float((self.posterior_variance < (1 - 1e-4) * self.posterior_mean)[alive].double().mean())

    @property
    def overdispersion(self) -> float | None:
        """Variance over mean of the counts across observations, averaged over units that fired.

        None if no unit fired, or if the latents are not counts.
        """
        fired = self.unit_mean > 0
        if self.fano is None or not bool(fired.any()):
            return None
        return float((self.unit_variance / self.unit_mean)[fired].mean())


def fano_factor(q: TorchDistribution) -> Tensor | None:
    r"""Fano factor of a posterior over counts, averaged over units.

    .. math:: F = \frac{1}{K} \sum_k \mathrm{Var}[z_k] / E[z_k]

    A unit of mean 0 counts as 1, the limit at small means.

    Args:
        q: a posterior with batch shape (B, K).

    Returns:
        (B,), or None if the latents are not counts of this package.

    Example::

        >>> from pyro_nbvae.distributions import RelaxedPoisson
        >>> fano_factor(RelaxedPoisson(torch.ones(2, 3)))
        tensor([1., 1.])
    """
    if not isinstance(q, RelaxedCount):
        return None
    return torch.where(q.mean > 0, q.variance / q.mean, 1.0).mean(-1)


def mean_of(observed: Distribution) -> Tensor | None:
    """Return the mean of a distribution over observations, or None if it has none."""
    try:
        mean = observed.mean
    except (NotImplementedError, AttributeError):
        return None
    # torch returns NaN for distributions without a mean, such as a Cauchy or categories
    return None if bool(mean.isnan().all()) else mean


def unit_kl(q: TorchDistribution, p: TorchDistribution) -> tuple[Tensor, Tensor | None]:
    """Return KL(q || p) in nats, (B, ...) with the batch shape of ``p`` behind B, and None.

    If no KL is registered, return a Monte Carlo estimate, and the variance of its sum over units, (B,).

    Args:
        q: posteriors, of batch shape (B, K) or (B, variables).
        p: the prior. A joint one, of event shape (K,), has one KL for all units.
    """
    joint = max(len(q.event_shape), len(p.event_shape))
    q, p = (d.to_event(joint - len(d.event_shape)) for d in (q, p))
    p = p.expand(q.batch_shape)
    try:
        return registered_kl(q, p), None
    except NoKLError:
        z = q.sample(torch.Size([KL_SAMPLES]))
        each = log_mass(q, z) - log_mass(p, z)
        return each.mean(0), sum_rightmost(each, -2).var(0) / KL_SAMPLES


class _Sums:
    """Sums over batches, in double precision, by name."""

    def __init__(self) -> None:
        self.of: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        value = value.double()
        self.of[name] = self.of[name] + value if name in self.of else value

    def mean(self, name: str, number: int) -> float | None:
        return float(self.of[name]) / number if name in self.of else None


def held_out(
    model: GenerativeModel, guide: AmortizedGuide, data: Tensor, *, seed: int = 0, progress: bool = False
) -> HeldOut:
    """Evaluate a model and a guide on held-out data, with one exact sample (integer counts) per observation.

    Args:
        model, guide: the pair.
        data: (N, *event_shape), as a data set holds them: pixels as uint8, other values unchanged.
        seed: random seed.
        progress: show a progress bar.

    Returns:
        The results.

    Raises:
        InputError: for data of the wrong shape or without an observation, and for a seed out of range.

    See also: docs/mathematics.md, section 6.2 (Which values are bounds).

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> held_out(model, guide, torch.zeros(4, 5)).unit_kl.shape
        torch.Size([3])
    """
    sums, similarity = _Sums(), None
    images = is_image_shape(tuple(data.shape[1:])) and len(data) > 0 and values_of(data) != "counts"
    if images and min(data.shape[2:]) > SSIM_MARGIN:
        from torchmetrics.image import StructuralSimilarityIndexMeasure

        low, high = limits_of(data)
        similarity = StructuralSimilarityIndexMeasure(data_range=high - low, sync_on_compute=False).to(data.device)
    with evaluating(model, guide, seed):
        for x in in_support(model, map(to_floats, shown(data, "held out", progress)), "data"):
            q = guide.posterior(x)
            z = q.sample()
            observed = model.observation(z)
            sums.add("log_likelihood", observed.log_prob(x).double().sum())
            mean = mean_of(observed)
            if mean is not None:
                sums.add("squared_error", (x - mean).square().flatten(1).sum(1).double().sum())
                if similarity is not None:
                    similarity.update(mean, x)
            kl, variance = unit_kl(q, model.prior_distribution())
            sums.add("kl", kl.double().sum(0))
            if variance is not None:
                sums.add("kl_variance", variance.double().sum())
            sums.add("z", z.double().sum(0))
            sums.add("z_squared", z.double().square().sum(0))
            factor = fano_factor(q)
            if factor is not None:
                sums.add("fano", factor.double().sum())
                sums.add("posterior_mean", q.mean.double().sum(0))
                sums.add("posterior_variance", q.variance.double().sum(0))
    number = len(data)
    unit_mean, kl_of_units = sums.of["z"] / number, sums.of["kl"] / number
    nats, likelihood = float(kl_of_units.sum()), float(sums.of["log_likelihood"]) / number
    error = sums.mean("squared_error", number)
    return HeldOut(
        log_likelihood=likelihood,
        squared_error=error,
        kl=nats,
        kl_error=math.sqrt(float(sums.of["kl_variance"])) / number if "kl_variance" in sums.of else None,
        elbo=likelihood - nats,
        mse=None if error is None else error / math.prod(model.event_shape),
        ssim=None if similarity is None or error is None else float(torch.as_tensor(similarity.compute())),
        fano=sums.mean("fano", number),
        unit_mean=unit_mean,
        unit_variance=(sums.of["z_squared"] - number * unit_mean.square()).clamp_min(0) / max(1, number - 1),
        unit_kl=kl_of_units,
        posterior_mean=sums.of["posterior_mean"] / number if factor is not None else None,
        posterior_variance=sums.of["posterior_variance"] / number if factor is not None else None,
    )
