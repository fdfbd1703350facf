"""How metrics take data in: a tensor, or the batches of a DataLoader."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_nbvae.data import BATCH, to_floats
from pyro_nbvae.data.sources import is_pixels
from pyro_nbvae.errors import InputError
from pyro_nbvae.vae import GenerativeModel

# Observations (N, *event_shape), or an iterable of batches of them. A batch may be a sequence such as (x, y) of a
# DataLoader: its first tensor is the observations.
Observations: TypeAlias = Tensor | Iterable[Tensor | Sequence[Tensor]]


def _batches(data: Iterable[Tensor | Sequence[Tensor]], what: str) -> Iterator[Tensor]:
    first: Tensor | None = None
    iterator, end = None, object()
    while True:
        with torch.random.fork_rng([]):  # a DataLoader draws random numbers, which are not those of the latents
            iterator = iter(data) if iterator is None else iterator
            batch: Any = next(iterator, end)
        if batch is end:
            return
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor):
            raise InputError(
                f"{what}: a batch must be a tensor, or a tuple whose first is one, got {type(x).__name__}: use a "
                "DataLoader, or torch.as_tensor(x)"
            )
        if not x.dim():
            raise InputError(f"{what}: a batch must have shape (B, *event_shape), got a number: pass a list of tensors")
        first = x if first is None else first
        if (x.shape[1:], x.dtype) != (first.shape[1:], first.dtype):
            raise InputError(
                f"{what}: batches differ: {first.dtype} of shape {tuple(first.shape)}, then {x.dtype} of shape "
                f"{tuple(x.shape)}"
            )
        yield x


def _of_one_size(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Cut batches anew, into those of a tensor, so that results do not depend on how the data were batched."""
    waiting: list[Tensor] = []
    for batch in batches:
        waiting.append(batch)
        while sum(map(len, waiting)) >= BATCH:
            whole = torch.cat(waiting)
            yield whole[:BATCH]
            waiting = [whole[BATCH:]]
    if sum(map(len, waiting)):
        yield torch.cat(waiting)


def shown(data: Observations, what: str, progress: bool) -> Iterator[Tensor]:
    """Iterate over data in batches of one size, unchanged, with a progress bar.

    Args:
        data: a tensor (N, ...), or an iterable of batches: tensors, or tuples whose first is one.
        what: name for the progress bar and for errors.
        progress: show a progress bar.

    Raises:
        InputError: for data without an observation, and for batches that are not tensors of one shape and dtype.
    """
    if isinstance(data, Tensor):
        if not len(data):
            raise InputError(f"{what}: the data have no observation (shape {tuple(data.shape)})")
        batches: Iterable[Tensor] = data.split(BATCH)
        total: int | None = math.ceil(len(data) / BATCH)
    else:
        if not isinstance(data, Iterable):
            raise InputError(f"{what}: data must be a tensor or a DataLoader, got {type(data).__name__}")
        batches, total = _of_one_size(_batches(data, what)), None
    empty = True
    for batch in tqdm(batches, desc=what, total=total, disable=not progress, leave=False):
        empty = False
        yield batch
    if empty:
        raise InputError(f"{what}: the data have no observation (an empty DataLoader)")


def placed(model: GenerativeModel, x: Tensor) -> Tensor:
    """Return a batch as a model takes it: on its device and in its precision, pixels scaled to [0, 1]."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    x = x.to(model.device)
    return (to_floats(x) if is_pixels(x) else x).to(dtype)


class Thinned:
    """At most a number of observations of a stream of unknown length, evenly spaced, and at least half as many.

    Every 2^j-th observation is kept, with the smallest j that is enough.

    Args:
        most: the largest number of observations.
    """

    def __init__(self, most: int) -> None:
        self.most, self.step, self.seen = most, 1, 0
        self.parts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Add a batch (B, ...)."""
        self.parts.append(x[(-self.seen) % self.step :: self.step])
        self.seen += len(x)
        while sum(map(len, self.parts)) > self.most:
            self.parts, self.step = [torch.cat(self.parts)[::2]], 2 * self.step

    @property
    def kept(self) -> Tensor:
        """The observations that are kept, (n, ...)."""
        return torch.cat(self.parts)
