"""FID and KID between real and generated images, by torchmetrics."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from pyro_nbvae.batching import evaluation_batches, random_subset
from pyro_nbvae.errors import InputError
from pyro_nbvae.metrics.features import Features
from pyro_nbvae.seeds import stream_seed

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

# KID is an average over pairs of subsets of KID_SUBSET_SIZE images (both numbers are defaults of torchmetrics). The
# subsets of the real images are drawn from KID_REAL of them.
KID_SUBSETS, KID_SUBSET_SIZE, KID_REAL = 100, 1000, 10_000


class _Identity(nn.Module):
    """Network for torchmetrics, which receives features instead of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


@torch.no_grad()
def _extract(features: Features, images: Tensor | Iterable[Tensor], what: str, progress: bool) -> Tensor:
    device = next(features.parameters()).device
    extracted = []
    for batch in cast("Iterator[Tensor]", evaluation_batches(images, what, progress)):
        if batch.dtype != torch.uint8:
            raise InputError(f"{what}: FID and KID require uint8 images (0 to 255), got {batch.dtype}")
        extracted.append(features(batch.to(device)).float().cpu())
    return torch.cat(extracted)


def _frechet(features: Features) -> FrechetInceptionDistance:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Identity(features.num_features))
    metric.persistent(True)
    return metric


@torch.no_grad()
def reference_statistics(features: Features, real: Tensor, *, progress: bool = False) -> dict[str, Any]:
    """Return the statistics of real images that :func:`distances` uses, to compute them only once.

    Args:
        features: features of the images.
        real: uint8 images (N, C, H, W), at least 2.
        progress: show a progress bar.

    Returns:
        ``{"fid": ..., "kid": ...}`` with tensors and plain values, which ``torch.save`` accepts.

    Raises:
        InputError: for images that are not uint8.
    """
    extracted = _extract(features, real, "real images", progress)
    metric = _frechet(features)
    metric.update(extracted, real=True)
    return {"fid": metric.state_dict(), "kid": random_subset(extracted, KID_REAL).clone()}


def distances(
    features: Features,
    real: Tensor | Mapping[str, Any],
    generated: Tensor | Iterable[Tensor],
    *,
    kid_subsets: int = KID_SUBSETS,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, float]:
    r"""Compute FID and KID between two sets of uint8 images (N, C, H, W).

    For features with means :math:`\mu, \mu'` and covariances :math:`\Sigma, \Sigma'`

    .. math:: \mathrm{FID} = \|\mu - \mu'\|^2 + \mathrm{tr}(\Sigma + \Sigma' - 2 (\Sigma \Sigma')^{1/2}),

    and KID is the squared maximum mean discrepancy with the kernel :math:`(x^T y / d + 1)^3`, d features.

    Args:
        features: features of the images; their ``suffix`` is appended to the names in the result.
        real: the reference images, or their :func:`reference_statistics`.
        generated: the images to evaluate, at least 2, as one tensor or in batches; only their features are stored.
        kid_subsets: number of pairs of subsets for KID; 0 omits KID, which takes longer than FID.
        seed: random seed of the subsets.
        progress: show a progress bar.

    Returns:
        ``fid``, and ``kid`` and ``kid_std``, the mean and standard deviation over the subsets of up to 1,000 images.
        ``kid_std`` is omitted if there are fewer than twice as many images as in a subset: the subsets then overlap.

    Raises:
        InputError: for images that are not uint8.

    Reference: Heusel et al., 2017 (FID); Bińkowski et al., 2018 (KID).

    Example::

        >>> from pyro_nbvae.metrics.features import ClassifierFeatures
        >>> images = torch.randint(0, 256, (40, 1, 16, 16), dtype=torch.uint8)
        >>> found = distances(ClassifierFeatures("digits"), images[:20], images[20:])
        >>> sorted(found), found["fid_c"] > 0
        (['fid_c', 'kid_c'], True)
    """
    reference = reference_statistics(features, real, progress=progress) if isinstance(real, Tensor) else real
    extracted = _extract(features, generated, "generated images", progress)
    frechet = _frechet(features)
    frechet.load_state_dict(copy.deepcopy(reference["fid"]))  # its sums are changed in place
    frechet.update(extracted, real=False)
    results = {"fid": float(frechet.compute())}
    if kid_subsets:
        results |= _kernel_distance(features, reference["kid"], extracted, kid_subsets, seed)
    return {f"{name}{features.suffix}": value for name, value in results.items()}


def _kernel_distance(features: Features, real: Tensor, generated: Tensor, subsets: int, seed: int) -> dict[str, float]:
    from torchmetrics.image.kid import KernelInceptionDistance

    fewest = min(len(generated), len(real))
    size = min(KID_SUBSET_SIZE, fewest)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save all extracted features")  # which is intended
        kernel = KernelInceptionDistance(feature=_Identity(features.num_features), subsets=subsets, subset_size=size)
    device = next(features.parameters()).device  # products of matrices of 1,000 rows are quick on a GPU
    kernel.update(real.to(device), real=True)
    kernel.update(generated.to(device), real=False)
    with torch.random.fork_rng([]):
        torch.manual_seed(stream_seed(seed, "KID"))
        mean, std = kernel.compute()
    return {"kid": float(mean)} | ({"kid_std": float(std)} if 2 * size <= fewest else {})
