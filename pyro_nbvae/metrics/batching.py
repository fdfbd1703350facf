"""Going over much data under a progress bar."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from tqdm.auto import tqdm

from pyro_nbvae.data import BATCH


def shown(data: Tensor, what: str, progress: bool) -> Iterator[Tensor]:
    """Batches of data (N, ...) as they are, under a progress bar."""
    return iter(tqdm(data.split(BATCH), desc=what, disable=not progress, leave=False))
