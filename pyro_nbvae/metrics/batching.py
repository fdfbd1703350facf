"""Iterating over large data with a progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor
from tqdm.auto import tqdm

from pyro_nbvae.data import BATCH
from pyro_nbvae.errors import InputError


def shown(data: Tensor | Iterable[Tensor], what: str, progress: bool) -> Iterator[Tensor]:
    """Iterate over batches of data (N, ...), unchanged, with a progress bar.

    Raises:
        InputError: for data without an observation.
    """
    if isinstance(data, Tensor) and not len(data):
        raise InputError(f"{what}: the data have no observation (shape {tuple(data.shape)})")
    batches = data.split(BATCH) if isinstance(data, Tensor) else data
    return iter(tqdm(batches, desc=what, disable=not progress, leave=False))
