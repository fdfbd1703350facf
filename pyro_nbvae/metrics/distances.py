"""FID and KID between real and generated images, by torchmetrics."""

from __future__ import annotations

import hashlib
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pyro_nbvae.errors import InputError, check_seed
from pyro_nbvae.files import cached
from pyro_nbvae.metrics.batching import shown
from pyro_nbvae.metrics.features import Features

# KID is an average over this many pairs of subsets of this many images (torchmetrics' defaults), and draws those of
# the real images from this many of them.
KID_SUBSETS, KID_SUBSET_SIZE, KID_REAL = 100, 1000, 10_000


class _AsTheyAre(nn.Module):
    """What torchmetrics takes for the network where it is given features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


@torch.no_grad()
def _extract(features: Features, images: Tensor, what: str, progress: bool) -> Tensor:
    device = next(features.parameters()).device
    return torch.cat([features(batch.to(device)).float() for batch in shown(images, what, progress)])


def _frechet(features: Features) -> Any:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_AsTheyAre(features.num_features))
    metric.persistent(True)
    return metric


def _reference(features: Features, real: Tensor, progress: bool) -> dict[str, Any]:
    """What FID and KID need of the real images, from the cache where it was computed before."""

    def compute() -> dict[str, Any]:
        extracted = _extract(features, real, "real images", progress).cpu()
        metric = _frechet(features)
        metric.update(extracted, real=True)
        return {"fid": metric.state_dict(), "kid": extracted[:: math.ceil(len(extracted) / KID_REAL)].clone()}

    pixels = hashlib.sha256(real.cpu().contiguous().numpy().tobytes())
    key = hashlib.sha256(f"{pixels.hexdigest()} {tuple(real.shape)} {features.digest} {KID_REAL}".encode())
    return cached(f"features-{features.network}-{key.hexdigest()[:16]}.pt", compute)


def distances(
    features: Features, real: Tensor, generated: Tensor, *, seed: int = 0, progress: bool = False
) -> dict[str, float]:
    """FID and KID between two sets of uint8 images (N, C, H, W).

    Args:
        features: what they are compared in; its suffix marks the names of the figures.
        real: the images to compare with; their statistics are cached, keyed by the pixels and the features' weights.
        generated: the images that are judged.
        seed: of the subsets that KID draws.

    Returns:
        ``fid``, and ``kid`` and ``kid_std``, mean and deviation over 100 subsets of up to 1,000 images.

    Raises:
        InputError: for fewer than two images.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    check_seed(seed)
    if min(len(real), len(generated)) < 2:
        raise InputError(f"FID and KID need at least 2 images each, got {len(real)} and {len(generated)}")
    reference = _reference(features, real, progress)
    extracted = _extract(features, generated, "generated images", progress).cpu()
    frechet = _frechet(features)
    frechet.load_state_dict(reference["fid"])
    frechet.update(extracted, real=False)
    size = min(KID_SUBSET_SIZE, len(extracted), len(reference["kid"]))
    given = _AsTheyAre(features.num_features)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save all extracted features")  # as it should
        kernel = KernelInceptionDistance(feature=given, subsets=KID_SUBSETS, subset_size=size)
    kernel.update(reference["kid"], real=True)
    kernel.update(extracted, real=False)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        kid, spread = kernel.compute()
    figures = {"fid": float(frechet.compute()), "kid": float(kid), "kid_std": float(spread)}
    return {f"{name}{features.suffix}": value for name, value in figures.items()}
