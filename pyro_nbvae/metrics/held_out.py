"""Likelihood, KL, reconstruction and statistics of the latents on held-out data, in one pass.

The ELBO is that of the model with integer counts, in nats, with the model's own likelihood. The KL is the exact KL of
prior and posterior, whatever KL the pair was trained with. If none is registered, it is a Monte Carlo KL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution

from pyro_nbvae.batching import Observations, RandomSubset, Recording, is_image_shape, value_kind, value_range
from pyro_nbvae.distributions.elementwise import double
from pyro_nbvae.distributions.relaxed import RelaxedCount
from pyro_nbvae.distributions.tilted import Tilted
from pyro_nbvae.infer.elbo import NoKLError, log_mass, registered_kl
from pyro_nbvae.metrics.errors import standard_error
from pyro_nbvae.metrics.information import OBSERVATIONS, unit_information
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, evaluating

if TYPE_CHECKING:
    from torchmetrics.image import StructuralSimilarityIndexMeasure

# A unit is collapsed if its information is below this.
COLLAPSED_NATS = 0.01
# Number of samples per latent for a Monte Carlo KL.
_KL_SAMPLES = 20
# Number of pixels of SSIM's window on each side of its centre; a smaller image has no SSIM.
SSIM_MARGIN = 5


@dataclass(frozen=True)
class HeldOut:
    """Results on held-out data, from one sample of the posterior per observation (integer counts).

    Standard errors are those of means over observations, or over groups of them, and None for a single one.

    Attributes:
        log_likelihood: log p(x | z) in nats, per observation.
        squared_error: squared error of the likelihood's mean, per observation; None if the likelihood has no mean.
        kl: KL in nats, per observation.
        elbo: ``log_likelihood - kl``, in nats per observation.
        mse: squared error per observed element; None if the likelihood has no mean.
        ssim: structural similarity; None if the data are not images of more than 5 pixels a side, or the likelihood
            has no mean.
        fano: Fano factor of the posterior (variance over mean), averaged; None if the latents are not counts.
        unit_mean, unit_variance: mean and variance of the samples across observations, (*latent_shape).
        unit_kl: mean KL of each unit in nats, of the prior's batch shape; to the factorised reference of a joint prior
            of this package (their sum is then not ``kl``), and the total for another joint prior.
        unit_information: information of each unit in nats, (units,), from at most 1,000 random observations
            (:func:`~pyro_nbvae.metrics.unit_information`); None if it was not computed. On the same observations, the
            mean KL of a unit is its information plus the KL of the aggregate posterior to the prior.
        posterior_mean, posterior_variance: the posterior's mean and variance of each unit, averaged over observations;
            None if the latents are not counts.
        log_likelihood_error, squared_error_error, kl_error, elbo_error, mse_error: standard errors.

    Example::

        >>> zeros = torch.zeros(3)
        >>> found = HeldOut(-2.0, 1.0, 0.5, -2.5, 0.2, None, None, zeros, zeros, zeros, torch.tensor([0.5, 0.0, 0.0]))
        >>> found.information, found.collapsed_units
        (0.5, 2)
    """

    log_likelihood: float
    squared_error: float | None
    kl: float
    elbo: float
    mse: float | None
    ssim: float | None
    fano: float | None
    unit_mean: Tensor
    unit_variance: Tensor
    unit_kl: Tensor
    unit_information: Tensor | None = None
    posterior_mean: Tensor | None = None
    posterior_variance: Tensor | None = None
    log_likelihood_error: float | None = None
    squared_error_error: float | None = None
    kl_error: float | None = None
    elbo_error: float | None = None
    mse_error: float | None = None

    @property
    def information(self) -> float | None:
        """Sum over units of their information, in nats.

        The joint information of all units is lower if units are redundant, and may be higher if they complement each
        other.
        """
        return None if self.unit_information is None else float(self.unit_information.sum())

    @property
    def collapsed_units(self) -> int | None:
        """Number of units whose information is below 0.01 nats: their posterior hardly depends on the observation."""
        return None if self.unit_information is None else int((self.unit_information < COLLAPSED_NATS).sum())

    @property
    def underdispersed_active_units(self) -> float | None:
        """Fraction of the active units (not collapsed) whose posterior is underdispersed, on average over observations.

        None if all units are collapsed, or if the latents are not counts.
        """
        if self.posterior_mean is None or self.posterior_variance is None or self.unit_information is None:
            return None
        active = self.unit_information.to(self.posterior_mean.device) >= COLLAPSED_NATS
        if not bool(active.any()):
            return None
        return float((self.posterior_variance < (1 - 1e-4) * self.posterior_mean)[active].double().mean())

    @property
    def overdispersion(self) -> float | None:
        """Marginal Fano factor: variance over mean of the counts across observations, averaged over units that fired.

        None if no unit fired, or if the latents are not counts.
        """
        fired = self.unit_mean > 0
        if self.fano is None or not bool(fired.any()):
            return None
        return float((self.unit_variance / self.unit_mean)[fired].mean())


def fano_factor(q: TorchDistribution) -> Tensor | None:
    r"""Compute the Fano factor of a posterior over counts, averaged over units.

    .. math:: F = \frac{1}{K} \sum_k \mathrm{Var}[z_k] / E[z_k]

    A unit with mean 0 has a Fano factor of 1, the limit for small means.

    Args:
        q: a posterior with batch shape (B, K).

    Returns:
        (B,), or None if the latents are not counts of this package.

    Example::

        >>> from pyro_nbvae.distributions import RelaxedPoisson
        >>> fano_factor(RelaxedPoisson(torch.ones(2, 3)))
        tensor([1., 1.])
    """
    return _fano(q.mean, q.variance) if isinstance(q, RelaxedCount) else None


def _fano(mean: Tensor, variance: Tensor) -> Tensor:
    return torch.where(mean > 0, variance / mean, 1.0).mean(-1)


def mean_or_none(observed: Distribution) -> Tensor | None:
    """Return the mean of a distribution over observations, or None if it has none."""
    try:
        mean = observed.mean
    except (NotImplementedError, AttributeError):
        return None
    # torch returns NaN for distributions without a mean, such as a Cauchy or categories
    return None if bool(mean.isnan().all()) else mean


def _kl(q: TorchDistribution, p: TorchDistribution, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(q || p) in nats, of each unit and in total: (B, *batch_shape of p) and (B,).

    A Monte Carlo KL if none is registered. With a tilted prior, the KLs of units are those to its reference.

    Args:
        q: posteriors, of batch shape (B, K) or (B, variables).
        p: the prior. A joint prior, with event shape (K,), has one KL for all units.
        z: a sample of q, at which the tilt of a joint prior is taken.
    """
    if isinstance(p, Tilted):
        each = _registered_or_sampled(q, p.reference.expand(q.batch_shape))
        given, tilt = p.factors(z)
        total = each if given is p.reference else _registered_or_sampled(q, given.expand(q.batch_shape))
        return each, total.sum(-1) - double(tilt)
    joint = max(len(q.event_shape), len(p.event_shape))
    q, p = (d.to_event(joint - len(d.event_shape)) for d in (q, p))
    each = _registered_or_sampled(q, p.expand(q.batch_shape))
    return each, each.flatten(1).sum(1) if each.dim() > 1 else each


def _registered_or_sampled(q: TorchDistribution, p: TorchDistribution) -> Tensor:
    try:
        return double(registered_kl(q, p))
    except NoKLError:
        z = q.sample(torch.Size([_KL_SAMPLES]))
        return double(log_mass(q, z) - log_mass(p, z)).mean(0)


class _Values:
    """Values of observations, or their sums over observations, in float64, by name."""

    def __init__(self) -> None:
        self.of: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add the values of a batch, (B,)."""
        self.of.setdefault(name, []).append(double(values))

    def add_sum(self, name: str, values: Tensor) -> None:
        """Add the sum of a batch (B, ...) over its observations."""
        total = double(values).sum(0)
        self.of[name] = [self.of[name][0] + total if name in self.of else total]

    def sum(self, name: str) -> Tensor:
        return self.of[name][0]

    def mean(
        self, name: str, groups: Tensor | None = None, per: Tensor | None = None
    ) -> tuple[float | None, float | None]:
        """Return the mean over observations, or the ratio to ``per``, and its standard error; None if there is none."""
        if name not in self.of:
            return None, None
        values = torch.cat(self.of[name])
        mean = values.mean() if per is None else values.sum() / per.sum().clamp_min(1)
        return float(mean), standard_error(values, per, groups)


def _similarity(x: Tensor, limits: tuple[float, float]) -> StructuralSimilarityIndexMeasure | None:
    """Return SSIM for values between these limits; None for counts, small images or no images."""
    if not is_image_shape(tuple(x.shape[1:])) or min(x.shape[2:]) <= SSIM_MARGIN or value_kind(x) == "counts":
        return None
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    low, high = limits
    return StructuralSimilarityIndexMeasure(data_range=high - low, sync_on_compute=False).to(x.device)


def held_out(
    model: GenerativeModel,
    guide: AmortizedGuide,
    data: Observations,
    *,
    units: bool = True,
    groups: Tensor | None = None,
    limits: tuple[float, float] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> HeldOut:
    """Evaluate a model and a guide on held-out data, with one sample of the posterior per observation (integer counts).

    Args:
        model, guide: the trained pair.
        data: (N, *event_shape), as a data set holds them: pixels as uint8, other values unchanged; or a
            :class:`~pyro_nbvae.batching.Recording`, or a DataLoader, of which a batch is such a tensor or recording, or
            a tuple whose first element is a tensor. The batches do not affect the result.
        units: whether to compute the information and the posterior moments of the units, which may take seconds.
        groups: the group of each observation, (N,), such as its trial: standard errors are those over groups. Default:
            over observations.
        limits: the values of black and white, whose difference is the range of SSIM. Default: 0 and 1, or the smallest
            and the largest value of data that exceed them (of a loader, of its first 500 observations).
        seed: random seed.
        progress: show a progress bar.

    Returns:
        The results.

    Raises:
        InputError: for data of the wrong shape, without an observation or outside the likelihood's support, and for
            groups of another number of observations.

    See also: docs/mathematics.md, section 6.2 (Which values are bounds).

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> held_out(model, guide, torch.zeros(4, 5)).unit_kl.shape
        torch.Size([3])
    """
    values, similarity, compared = _Values(), None, RandomSubset(OBSERVATIONS)
    number = 0
    with evaluating(model, guide, seed):
        for batch in model.input_batches(data, "data", progress):
            if not number:
                seen = data.x if isinstance(data, Recording) else data if isinstance(data, Tensor) else batch.x
                similarity = None if batch.mask is not None else _similarity(batch.x, limits or value_range(seen))
            number += len(batch)
            compared.add(batch)
            q = guide.posterior(batch.x, **batch.given)
            z = q.sample()
            observed = model.observation(z, **batch.given)
            likelihood = double(observed.log_prob(batch.x))
            values.add("log_likelihood", likelihood)
            mean = mean_or_none(observed)
            if mean is not None:
                errors = double(batch.x - mean).square()
                if batch.mask is not None:
                    errors = errors.masked_fill(~batch.mask, 0)
                values.add("squared_error", errors.flatten(1).sum(1))
                values.add("elements", batch.number)
                if similarity is not None:
                    similarity.update(mean, batch.x)
            unit_kl, kl = _kl(q, model.prior_distribution(), z)
            values.add("kl", kl)
            values.add("elbo", likelihood - kl)
            values.add_sum("unit_kl", unit_kl)
            values.add_sum("z", z)
            values.add_sum("z_squared", double(z).square())
            counts = isinstance(q, RelaxedCount)
            if counts and units:
                mean, variance = q.mean, q.variance  # once: they are sums over counts
                values.add("fano", _fano(mean, variance))
                values.add_sum("posterior_mean", mean)
                values.add_sum("posterior_variance", variance)
        informed = unit_information(guide, compared.observations) if units else None
    unit_mean = values.sum("z") / number
    of_sums: dict[str, Any] = {}
    for name in ("log_likelihood", "squared_error", "kl", "elbo"):
        of_sums[name], of_sums[f"{name}_error"] = values.mean(name, groups)
    elements = torch.cat(values.of["elements"]) if "elements" in values.of else None
    of_sums["mse"], of_sums["mse_error"] = values.mean("squared_error", groups, elements)
    return HeldOut(
        **of_sums,
        ssim=None
        if similarity is None or "squared_error" not in values.of
        else float(torch.as_tensor(similarity.compute())),
        fano=values.mean("fano")[0],
        unit_mean=unit_mean,
        unit_variance=(values.sum("z_squared") - number * unit_mean.square()).clamp_min(0) / max(1, number - 1),
        unit_kl=values.sum("unit_kl") / number,
        unit_information=informed,
        posterior_mean=values.sum("posterior_mean") / number if counts and units else None,
        posterior_variance=values.sum("posterior_variance") / number if counts and units else None,
    )
