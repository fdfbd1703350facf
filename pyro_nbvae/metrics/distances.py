"""FID and KID between real and generated images, by torchmetrics."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_nbvae.batching import shown, thinned
from pyro_nbvae.errors import InputError, check_seed
from pyro_nbvae.metrics.features import Features

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

# KID is an average over KID_SUBSETS pairs of subsets of KID_SUBSET_SIZE images (torchmetrics' defaults). The subsets of
# the real images are drawn from KID_REAL of them.
KID_SUBSETS, KID_SUBSET_SIZE, KID_REAL = 100, 1000, 10_000


class _AsTheyAre(nn.Module):
    """The identity, which torchmetrics uses as the network because it is given features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


@torch.no_grad()
def _extract(features: Features, images: Tensor | Iterable[Tensor], what: str, progress: bool) -> Tensor:
    device = next(features.parameters()).device
    extracted = []
    for batch in shown(images, what, progress):
        if batch.dtype != torch.uint8:
            raise InputError(f"{what}: FID and KID are of uint8 images, 0 to 255, got {batch.dtype}")
        extracted.append(features(batch.to(device)).float().cpu())
    return torch.cat(extracted)


def _frechet(features: Features) -> FrechetInceptionDistance:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_AsTheyAre(features.num_features))
    metric.persistent(True)
    return metric


@torch.no_grad()
def reference_statistics(features: Features, real: Tensor, *, progress: bool = False) -> dict[str, Any]:
    """Return what FID and KID need to know of the real images, for :func:`distances`.

    Args:
        features: the features to compare the images in.
        real: uint8 images (N, C, H, W).
        progress: show a progress bar.

    Returns:
        ``{"fid": ..., "kid": ...}`` of tensors and plain values, which ``torch.save`` accepts.

    Raises:
        ValueError: for fewer than two images, and for images that are not uint8.
    """
    if len(real) < 2:
        raise InputError(f"FID and KID need at least 2 real images, got {len(real)}")
    extracted = _extract(features, real, "real images", progress)
    metric = _frechet(features)
    metric.update(extracted, real=True)
    return {"fid": metric.state_dict(), "kid": thinned(extracted, KID_REAL).clone()}


def distances(
    features: Features,
    real: Tensor | Mapping[str, Any],
    generated: Tensor | Iterable[Tensor],
    *,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, float]:
    r"""Compute FID and KID between two sets of uint8 images (N, C, H, W).

    For features with means :math:`\mu, \mu'` and covariances :math:`\Sigma, \Sigma'`

    .. math:: \mathrm{FID} = \|\mu - \mu'\|^2 + \mathrm{tr}(\Sigma + \Sigma' - 2 (\Sigma \Sigma')^{1/2}),

    and KID is the squared maximum mean discrepancy with the kernel :math:`(x^T y / d + 1)^3`, d features.

    Args:
        features: the features to compare the images in; their ``suffix`` is appended to the names in the result.
        real: the reference images, or their :func:`reference_statistics`, to compute these only once.
        generated: the images to evaluate, as one tensor or in batches; only their features are kept in memory.
        seed: random seed of the subsets that KID draws.
        progress: show a progress bar.

    Returns:
        ``fid``, and ``kid`` and ``kid_std``, the mean and standard deviation over 100 subsets of up to 1,000 images.
        Without twice as many images as in a subset there is no ``kid_std``: such subsets are too much alike.

    Raises:
        InputError: for fewer than two images, images that are not uint8, or a seed that is out of range.

    Reference: Heusel et al., 2017 (FID); Bińkowski et al., 2018 (KID).

    Example::

        >>> from pyro_nbvae.metrics.features import ClassifierFeatures
        >>> images = torch.randint(0, 256, (40, 1, 16, 16), dtype=torch.uint8)
        >>> found = distances(ClassifierFeatures("digits"), images[:20], images[20:])
        >>> sorted(found), found["fid_c"] > 0
        (['fid_c', 'kid_c'], True)
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    check_seed(seed)
    reference = reference_statistics(features, real, progress=progress) if isinstance(real, Tensor) else real
    extracted = _extract(features, generated, "generated images", progress)
    if len(extracted) < 2:
        raise InputError(f"FID and KID need at least 2 generated images, got {len(extracted)}")
    frechet = _frechet(features)
    frechet.load_state_dict(reference["fid"])
    frechet.update(extracted, real=False)
    fewest = min(len(extracted), len(reference["kid"]))
    size = min(KID_SUBSET_SIZE, fewest)
    given = _AsTheyAre(features.num_features)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save all extracted features")  # which is intended
        kernel = KernelInceptionDistance(feature=given, subsets=KID_SUBSETS, subset_size=size)
    device = next(features.parameters()).device  # 300 products of matrices of 1,000 rows are quick on a GPU
    kernel.update(reference["kid"].to(device), real=True)
    kernel.update(extracted.to(device), real=False)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        kid, spread = kernel.compute()
    figures = {"fid": float(frechet.compute()), "kid": float(kid)}
    if 2 * size <= fewest:
        figures["kid_std"] = float(spread)
    return {f"{name}{features.suffix}": value for name, value in figures.items()}
