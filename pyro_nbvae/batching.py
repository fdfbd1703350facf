"""Observations as tensors: pixels and other values, batches of a tensor, and batches of a DataLoader."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_nbvae.errors import InputError

# Batch size for evaluation.
BATCH = 500
# Kind of the values of a data set, as a model takes them.
ValueKind = Literal["unit", "binary", "counts", "real"]


def is_image_shape(event_shape: tuple[int, ...]) -> bool:
    """Whether an observation of this shape is an image: (1 or 3 channels, height, width)."""
    return len(event_shape) == 3 and event_shape[0] in (1, 3)


def is_pixels(x: Tensor) -> bool:
    """Whether a batch contains images as pixels: uint8, (N, 1 or 3, H, W)."""
    return x.dtype == torch.uint8 and is_image_shape(x.shape[1:])


def value_kind(*parts: Tensor) -> ValueKind:
    """Return the kind of the values of observations, after :func:`to_floats`.

    Args:
        *parts: observations (N, *event_shape), such as the training set and the held-out data.

    Returns:
        ``binary`` if all are 0 or 1; ``unit`` if the observations are images and all values are in [0, 1]; ``counts``
        if all are whole numbers of at least 0; ``real`` otherwise.

    Example::

        >>> value_kind(torch.tensor([[0.0, 3.0]])), value_kind(torch.tensor([[0.5, -1.0]]))
        ('counts', 'real')
    """
    if all(map(is_pixels, parts)):
        return "binary" if _all(parts, lambda x: (x == 0) | (x == 255)) else "unit"
    if any(float(x.min()) < 0 for x in parts):
        return "real"
    whole = _all(parts, lambda x: x == x.round() if x.is_floating_point() else x >= 0)
    if max(float(x.max()) for x in parts) <= 1:
        return "binary" if whole else "unit" if is_image_shape(tuple(parts[0].shape[1:])) else "real"
    return "counts" if whole else "real"


def _all(parts: tuple[Tensor, ...], holds: Callable[[Tensor], Tensor]) -> bool:
    """Whether a condition holds for all elements; checks batch by batch and stops at the first failure."""
    return all(bool(holds(batch).all()) for x in parts for batch in x.split(BATCH))


def value_range(x: Tensor) -> tuple[float, float]:
    """Return the values that are plotted in black and white: 0 and 1, or the range of values that exceed it.

    Args:
        x: observations of any shape.

    Example::

        >>> value_range(torch.tensor([0.2, 0.7])), value_range(torch.tensor([-1.0, 0.5]))
        ((0.0, 1.0), (-1.0, 0.5))
    """
    if is_pixels(x) or not len(x):
        return 0.0, 1.0
    low, high = float(x.min()), float(x.max())
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return low, high if high > low else low + 1


def to_floats(x: Tensor) -> Tensor:
    """Convert a batch to the floats that a model takes: pixels scaled to [0, 1], other values unchanged.

    Args:
        x: (N, *event_shape).

    Returns:
        Tensor of the same shape, float32.

    Example::

        >>> float(to_floats(torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)).max())
        1.0
    """
    return x.float().div_(255) if is_pixels(x) else x.float()


def to_bytes(images: Tensor, limits: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Convert images to uint8, rounded to the nearest; values outside the limits are clamped.

    Args:
        images: tensor of any shape.
        limits: the values that become 0 and 255.

    Returns:
        Tensor of the same shape, uint8.

    Example::

        >>> to_bytes(torch.tensor([0.0, 0.4, 1.0])).tolist()
        [0, 102, 255]
        >>> to_bytes(torch.tensor([-1.0, 0.0, 2.0]), (-1.0, 1.0)).tolist()
        [0, 128, 255]
    """
    low, high = limits
    return (((images - low) / (high - low)).clamp(0, 1) * 255).round().to(torch.uint8)


def batches(x: Tensor, size: int, order: Tensor | None = None) -> Iterator[Tensor]:
    """Iterate over batches, converted by :func:`to_floats`.

    Args:
        x: (N, *event_shape).
        size: observations per batch; the last batch may be smaller.
        order: indices of the observations, in their order. Default: all of them.

    Example::

        >>> [len(batch) for batch in batches(torch.rand(5, 7), size=2)]
        [2, 2, 1]
    """
    for start in range(0, len(x if order is None else order), size):
        chosen = slice(start, start + size) if order is None else order[start : start + size]
        yield to_floats(x[chosen])


def evenly_spaced(x: Tensor, most: int) -> Tensor:
    """Return at most ``most`` observations, evenly spaced, because data may be sorted.

    Example::

        >>> evenly_spaced(torch.arange(7), 3)
        tensor([0, 3, 6])
    """
    return x[:: max(1, math.ceil(len(x) / most))]


# Observations (N, *event_shape), or an iterable of batches of them. A batch may be a sequence such as (x, y) of a
# DataLoader: its first tensor is the observations.
Observations: TypeAlias = Tensor | Iterable[Tensor | Sequence[Tensor]]


def _loaded(data: Iterable[Tensor | Sequence[Tensor]], what: str) -> Iterator[Tensor]:
    """Iterate over the observations of a DataLoader's batches."""
    first: Tensor | None = None
    iterator, end = None, object()
    while True:
        with torch.random.fork_rng([]):  # the random numbers of a DataLoader are not those of the latents
            iterator = iter(data) if iterator is None else iterator
            batch: Any = next(iterator, end)
        if batch is end:
            return
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        first = x if first is None else first
        if (x.shape[1:], x.dtype) != (first.shape[1:], first.dtype):  # cat would convert pixels to floats unscaled
            raise InputError(
                f"{what}: batches must have one shape and dtype, got {first.dtype} of shape {tuple(first.shape)}, then "
                f"{x.dtype} of shape {tuple(x.shape)}"
            )
        yield x


def _regrouped(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Regroup batches into those of a tensor, so that results do not depend on how the data were batched."""
    waiting: list[Tensor] = []
    for batch in batches:
        waiting.append(batch)
        while sum(map(len, waiting)) >= BATCH:
            whole = torch.cat(waiting)
            yield whole[:BATCH]
            waiting = [whole[BATCH:]]
    if sum(map(len, waiting)):
        yield torch.cat(waiting)


def evaluation_batches(data: Observations, what: str, progress: bool = False) -> Iterator[Tensor]:
    """Iterate over data in batches of one size, unchanged, with a progress bar.

    Args:
        data: a tensor (N, ...), or an iterable of batches: tensors, or tuples whose first element is one.
        what: name for the progress bar and for errors.
        progress: show a progress bar.

    Raises:
        InputError: for data without an observation, and for batches that differ in shape or dtype.
    """
    whole = isinstance(data, Tensor)
    batches = data.split(BATCH) if isinstance(data, Tensor) else _regrouped(_loaded(data, what))
    total = math.ceil(len(data) / BATCH) if isinstance(data, Tensor) else None
    empty = True
    for batch in tqdm(batches, desc=what, total=total, disable=not progress, leave=False):
        if len(batch):
            empty = False
            yield batch
    if empty:
        raise InputError(f"{what}: the data have no observation ({'an empty tensor' if whole else 'an empty loader'})")


class EvenSubset:
    """At most ``most`` observations of a stream of unknown length, evenly spaced, and at least half as many.

    Every 2^j-th observation is stored, with the smallest j that is enough.

    Args:
        most: maximum number of observations.
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
    def observations(self) -> Tensor:
        """The stored observations, (n, ...)."""
        return torch.cat(self.parts)
