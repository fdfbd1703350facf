"""Going over many images under a progress bar."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from tqdm.auto import tqdm

from pyro_nbvae.data import BATCH


def shown(images: Tensor, what: str, progress: bool) -> Iterator[Tensor]:
    """Batches of images (N, C, H, W) as they are, under a progress bar."""
    return iter(tqdm(images.split(BATCH), desc=what, disable=not progress, leave=False))
