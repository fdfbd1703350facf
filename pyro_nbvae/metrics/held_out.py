"""Reconstruction, KL and the latents' statistics on held-out images, in one pass.

The ELBO is that of the count model, in nats, with its constant; its KL is in closed form or by quadrature for every
variant, however it was trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_nbvae.data import to_unit_interval
from pyro_nbvae.distributions.relaxed import RelaxedCount
from pyro_nbvae.metrics.batching import shown
from pyro_nbvae.vae import AmortizedGuide, ImageModel, evaluating

# A unit that tells less than this about an image, on average, is dead.
DEAD_NATS = 0.01


@dataclass(frozen=True)
class HeldOut:
    """What one exact sample for each held-out image tells.

    ``squared_error``, ``kl`` (nats) and ``elbo`` (nats) are per image; ``mse`` is per pixel and ``ssim`` structural
    similarity, both on [0, 1]; ``fano`` is the posterior's mean variance over mean, None where the latents are not
    counts. The rest is per unit: mean and variance of the samples across images, (*latent_shape), and mean KL in nats,
    of the prior's batch shape.
    """

    squared_error: float
    kl: float
    elbo: float
    mse: float
    ssim: float
    fano: float | None
    unit_mean: Tensor
    unit_variance: Tensor
    unit_kl: Tensor

    @property
    def dead_units(self) -> int:
        """How many units have a mean KL below 0.01 nats."""
        return int((self.unit_kl < DEAD_NATS).sum())

    @property
    def overdispersion(self) -> float | None:
        """Variance over mean of the counts across images, averaged over the units that fired; None without any."""
        fired = self.unit_mean > 0
        if self.fano is None or not bool(fired.any()):
            return None
        return float((self.unit_variance / self.unit_mean)[fired].mean())


def fano_factor(q: TorchDistribution) -> Tensor | None:
    """Variance over mean of a posterior over counts, averaged over units; None where the latents are not counts."""
    if not isinstance(q, RelaxedCount):
        return None
    return (q.variance / q.mean).mean(-1)


def log_likelihood(model: ImageModel, squared_error: Tensor) -> Tensor:
    """log p(x | z) in nats from the squared error per image."""
    return -squared_error / model.beta - math.prod(model.image_shape) / 2 * math.log(math.pi * model.beta)


def squared_error(x: Tensor, mean: Tensor) -> Tensor:
    """Images (..., C, H, W) to sums over their pixels, (...)."""
    return (x - mean).square().sum((-3, -2, -1))


def held_out(
    model: ImageModel, guide: AmortizedGuide, images: Tensor, *, seed: int = 0, progress: bool = False
) -> HeldOut:
    """Measures a pair on uint8 images (N, C, H, W), one exact sample (integer counts) each."""
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    similarity = StructuralSimilarityIndexMeasure(data_range=1.0, sync_on_compute=False).to(images.device)
    error = fano = total = squares = kl = torch.zeros((), device=images.device, dtype=torch.float64)
    counts = False
    with evaluating(model, guide, seed):
        for batch in shown(images, "held out", progress):
            x = to_unit_interval(batch)
            q = guide.posterior(x)
            z = q.sample()
            mean = model.decode(z)
            similarity.update(mean, x)
            error = error + squared_error(x, mean).double().sum()
            kl = kl + kl_divergence(q, model.prior_distribution().expand(q.batch_shape)).double().sum(0)
            z = z.double()
            total, squares = total + z.sum(0), squares + z.square().sum(0)
            factor = fano_factor(q)
            if factor is not None:
                counts = True
                fano = fano + factor.double().sum()
    number = len(images)
    unit_mean, unit_kl, error = total / number, kl / number, error / number
    nats = float(unit_kl.sum())
    return HeldOut(
        squared_error=float(error),
        kl=nats,
        elbo=float(log_likelihood(model, error)) - nats,
        mse=float(error) / math.prod(model.image_shape),
        ssim=float(torch.as_tensor(similarity.compute())),
        fano=float(fano) / number if counts else None,
        unit_mean=unit_mean,
        unit_variance=(squares - number * unit_mean.square()).clamp_min(0) / max(1, number - 1),
        unit_kl=unit_kl,
    )
