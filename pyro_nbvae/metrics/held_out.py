"""Likelihood, KL, reconstruction and the latents' statistics on held-out data, in one pass.

The ELBO is that of the count model, in nats, under the model's own likelihood. Its KL is in closed form or by
quadrature where one is registered for the pair, however the pair was trained, and else by Monte Carlo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_nbvae.data import to_floats
from pyro_nbvae.data.sources import is_pixels
from pyro_nbvae.distributions.relaxed import RelaxedCount
from pyro_nbvae.infer.elbo import log_mass
from pyro_nbvae.metrics.batching import shown
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, evaluating

# A unit that tells less than this about an observation, on average, is dead.
DEAD_NATS = 0.01
# Samples a latent of a KL that is not registered.
KL_SAMPLES = 20


@dataclass(frozen=True)
class HeldOut:
    """What one exact sample for each held-out observation tells.

    ``log_likelihood``, ``kl``, ``elbo`` (nats) and ``squared_error`` are per observation; ``mse`` is per element. Both
    are of the likelihood's mean, None where it has none. ``ssim`` is the structural similarity, None where the data are
    not images. ``kl_error`` is the standard error of a Monte Carlo KL, None where the KL is exact. ``fano`` is the
    posterior's mean variance over mean, None where the latents are not counts. The rest is per unit: mean and variance
    of the samples across observations, (*latent_shape), mean KL in nats, of the prior's batch shape, and, of counts,
    the posterior's mean and variance, averaged over observations.
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
        """How many units have a mean KL below 0.01 nats."""
        return int((self.unit_kl < DEAD_NATS).sum())

    @property
    def underdispersed_units(self) -> float | None:
        """The share of the units that are not dead whose posterior varies less than a Poisson; None without any."""
        alive = self.unit_kl >= DEAD_NATS
        if self.posterior_mean is None or self.posterior_variance is None or not bool(alive.any()):
            return None
        return float((self.posterior_variance < (1 - 1e-4) * self.posterior_mean)[alive].double().mean())

    @property
    def overdispersion(self) -> float | None:
        """Variance over mean of the counts across observations, averaged over units that fired; None without any."""
        fired = self.unit_mean > 0
        if self.fano is None or not bool(fired.any()):
            return None
        return float((self.unit_variance / self.unit_mean)[fired].mean())


def fano_factor(q: TorchDistribution) -> Tensor | None:
    """Variance over mean of a posterior over counts, averaged over units; None where the latents are not counts.

    A unit that does not fire at all counts as 1, the limit at small means.
    """
    if not isinstance(q, RelaxedCount):
        return None
    return torch.where(q.mean > 0, q.variance / q.mean, 1.0).mean(-1)


def mean_of(observed: Any) -> Tensor | None:
    """The mean of a distribution over observations; None where it has none."""
    try:
        return observed.mean
    except (NotImplementedError, AttributeError):
        return None


def unit_kl(q: Any, p: Any) -> tuple[Tensor, Tensor | None]:
    """KL(q || p) in nats, of their batch shape, and None; or a Monte Carlo estimate and, (B,), the variance of its sum
    over units."""
    try:
        return kl_divergence(q, p), None
    except NotImplementedError:
        z = q.sample(torch.Size([KL_SAMPLES]))
        each = log_mass(q, z) - log_mass(p, z)
        return each.mean(0), each.flatten(2).sum(-1).var(0) / KL_SAMPLES


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
    """Measures a pair on data (N, *event_shape), one exact sample (integer counts) each.

    Args:
        data: as a data set holds them: pixels as uint8, anything else as it is.
    """
    sums, similarity = _Sums(), None
    if is_pixels(data):
        from torchmetrics.image import StructuralSimilarityIndexMeasure

        similarity = StructuralSimilarityIndexMeasure(data_range=1.0, sync_on_compute=False).to(data.device)
    with evaluating(model, guide, seed):
        for batch in shown(data, "held out", progress):
            x = to_floats(batch)
            q = guide.posterior(x)
            z = q.sample()
            observed = model.observation(z)
            sums.add("log_likelihood", observed.log_prob(x).double().sum())
            mean = mean_of(observed)
            if mean is not None:
                sums.add("squared_error", (x - mean).square().flatten(1).sum(1).double().sum())
                if similarity is not None:
                    similarity.update(mean, x)
            kl, variance = unit_kl(q, model.prior_distribution().expand(q.batch_shape))
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
