"""Observations as tensors: pixels and other values, batches of a tensor, and batches of a DataLoader."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_nbvae.errors import InputError
from pyro_nbvae.seeds import stream_seed

# Batch size for evaluation.
BATCH = 500
# Kind of the values of a data set, as a model takes them.
ValueKind = Literal["unit", "binary", "counts", "real"]
Sliced = TypeVar("Sliced", bound="Tensor | Recording")


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


def random_subset(x: Sliced, most: int) -> Sliced:
    """Return at most ``most`` observations, those of a :class:`RandomSubset`.

    Example::

        >>> random_subset(torch.arange(7), 3)
        tensor([0, 3, 6])
    """
    subset = RandomSubset(most)
    subset.add(x)
    return cast(Sliced, subset.observations)


# What may be known of observations besides their values, in the order of a program's arguments.
GIVEN = ("mask", "exposure", "covariates")


@dataclass(frozen=True, eq=False)
class Recording:
    """Observations with what is known of them: which values were observed, exposures and covariates.

    Evaluations and samplers take it in the place of a tensor of observations. A model and a guide take its parts:
    ``model(data.x, **data.given)``.

    Args:
        x: observations (N, *event_shape), such as counts (trials, neurons) or (trials, bins, neurons).
        mask: True where a value was observed: (N,), one for each observation, or of as many dimensions as x, to which
            it broadcasts. The other values may be anything, also NaN. Default: all were observed.
        exposure: positive known factor of the mean, such as the width of a bin or a size factor: a number, or as the
            mask. Default: 1.
        covariates: (N, C), what the observations are conditioned on, such as a one-hot stimulus. Default: none.

    Raises:
        InputError: for parts of other shapes or types. Values are checked where the recording is used (:meth:`check`).

    Example::

        >>> data = Recording(torch.tensor([[0.0, 3.0], [1.0, float("nan")]]), mask=torch.tensor([[1, 1], [1, 0]]) > 0)
        >>> len(data), data.event_shape, sorted(data[:1].given)
        (2, torch.Size([2]), ['mask'])
    """

    x: Tensor
    mask: Tensor | None = None
    exposure: Tensor | None = None
    covariates: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.x, Tensor):
            raise InputError(f"x must be a tensor, got {type(self.x).__name__}: torch.as_tensor(x)")
        if isinstance(self.exposure, int | float):
            object.__setattr__(self, "exposure", torch.full((len(self.x),), float(self.exposure)).to(self.x.device))
        for name, part in self.given.items():
            if not isinstance(part, Tensor):
                raise InputError(f"{name} must be a tensor, got {type(part).__name__}: torch.as_tensor({name})")
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise InputError(f"mask must be bool, True where a value was observed, got {self.mask.dtype}")
        for name in ("mask", "exposure"):
            part = getattr(self, name)
            if part is not None and part.dim() == 1 < self.x.dim():  # one of each observation
                object.__setattr__(self, name, part.reshape(-1, *(1 for _ in self.event_shape)))
        for name in ("mask", "exposure"):
            part = getattr(self, name)
            if part is not None and (part.dim() != self.x.dim() or not _broadcasts(part.shape, self.x.shape)):
                raise InputError(
                    f"{name} has shape {tuple(part.shape)}: it must broadcast to the observations, "
                    f"{tuple(self.x.shape)}"
                )
        c = self.covariates
        if c is not None and (c.dim() != 2 or c.shape[0] != self.x.shape[0]):
            raise InputError(f"covariates have shape {tuple(c.shape)}: expected ({len(self.x)}, number of covariates)")

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one observation."""
        return self.x.shape[1:]

    @property
    def given(self) -> dict[str, Tensor]:
        """What is known besides the values, as the arguments of model and guide."""
        return {name: part for name in GIVEN if (part := getattr(self, name)) is not None}

    @property
    def conditions(self) -> dict[str, Tensor]:
        """What is given without the mask: the arguments with which the model predicts every value."""
        return {name: part for name, part in self.given.items() if name != "mask"}

    def __len__(self) -> int:
        return len(self.x)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Recording:
        return Recording(change(self.x), **{name: change(part) for name, part in self.given.items()})

    def __getitem__(self, chosen: Any) -> Recording:
        """Return some of the observations: a slice, a mask (N,) or indices."""
        every = {name: part.expand(len(self), *part.shape[1:]) for name, part in self.given.items()}
        return Recording(self.x[chosen], **{name: part[chosen] for name, part in every.items()})

    def split(self, size: int) -> list[Recording]:
        """Return batches of this size; the last may be smaller."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def to(self, device: torch.device) -> Recording:
        """Return the recording on a device."""
        return self._each(lambda part: part.to(device))

    def like(self, other: Tensor) -> Recording:
        """Return the recording on the device and in the precision of a tensor; a mask stays bool."""
        return self._each(lambda part: part.to(other.device) if part.dtype == torch.bool else part.to(other))

    def floats(self) -> Recording:
        """Return the recording as floats, pixels scaled to [0, 1]; a mask stays bool."""
        given = {name: part if part.dtype == torch.bool else part.float() for name, part in self.given.items()}
        return Recording(to_floats(self.x), **given)

    def filled(self, value: float = 1.0) -> Tensor:
        """Return the observations, with this value where none was observed.

        Such values have no weight, but must have a finite gradient: nearly every likelihood has 1 in its support.
        """
        return self.x if self.mask is None else self.x.masked_fill(~self.mask, value)

    @property
    def number(self) -> Tensor:
        """Number of observed values of each observation, (N,)."""
        number = math.prod(self.event_shape)
        if self.mask is None:
            return torch.full((len(self),), number, device=self.x.device)
        return self.mask.expand(self.x.shape).flatten(1).sum(1)

    @property
    def never_observed(self) -> Tensor:
        """Which values were observed in none of the observations, bool (*event_shape)."""
        if self.mask is None:
            return torch.zeros(self.event_shape, dtype=torch.bool, device=self.x.device)
        return ~self.mask.any(0).expand(self.event_shape)

    @property
    def mean_exposure(self) -> float:
        """Mean exposure of the observed values; 1 without exposures."""
        if self.exposure is None:
            return 1.0
        exposure = self.exposure.double().expand(self.x.shape)
        return float(exposure.mean() if self.mask is None else exposure[self.mask.expand(self.x.shape)].mean())

    def check(self, what: str = "data") -> None:
        """Check the values of exposures and covariates.

        Raises:
            InputError: for an exposure that is not positive and finite, and for a covariate that is not finite.
        """
        e, c = self.exposure, self.covariates
        if e is not None and not bool(((e > 0) & e.isfinite()).all()):
            raise InputError(
                f"{what}: exposures must be positive and finite, got {float(e.min()):g} to {float(e.max()):g}"
            )
        if c is not None and not bool(c.isfinite().all()):
            raise InputError(f"{what}: covariates must be finite")

    @staticmethod
    def of(data: Tensor | Recording) -> Recording:
        """Return observations as a recording."""
        return data if isinstance(data, Recording) else Recording(data)

    @staticmethod
    def cat(parts: Sequence[Recording]) -> Recording:
        """Join recordings that have the same parts.

        Raises:
            InputError: if one has a mask, an exposure or covariates that another lacks.
        """
        if len(parts) == 1:
            return parts[0]
        known = {name for part in parts for name in part.given}
        for name in GIVEN:
            if name in known and not all(name in part.given for part in parts):
                raise InputError(f"some of the recordings have {name}: give it to all, or to none")
        given = {
            name: torch.cat([getattr(p, name).expand(len(p), *getattr(p, name).shape[1:]) for p in parts])
            for name in parts[0].given
        }
        return Recording(torch.cat([p.x for p in parts]), **given)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return all(a in (1, b) for a, b in zip(shape, to, strict=True))


def joined(parts: Sequence[Batch]) -> Batch:
    """Join batches: tensors, or recordings."""
    if isinstance(parts[0], Recording):
        return Recording.cat(cast("Sequence[Recording]", parts))
    return torch.cat(cast("list[Tensor]", list(parts)))


# A batch of observations (B, *event_shape).
Batch: TypeAlias = Tensor | Recording
# Observations (N, *event_shape), or an iterable of batches of them. A batch may be a sequence such as (x, y) of a
# DataLoader: its first tensor is the observations.
Observations: TypeAlias = Batch | Iterable[Batch | Sequence[Tensor]]


def _kind(batch: Batch) -> str:
    x = Recording.of(batch)
    known = "".join(f" with {name}" for name in x.given)
    return f"{x.x.dtype} of shape {tuple(x.event_shape)}{known}"


def _loaded(data: Iterable[Batch | Sequence[Tensor]], what: str) -> Iterator[Batch]:
    """Iterate over the observations of a DataLoader's batches."""
    first: Batch | None = None
    iterator, end = None, object()
    while True:
        with torch.random.fork_rng([]):  # the random numbers of a DataLoader are not those of the latents
            iterator = iter(data) if iterator is None else iterator
            batch: Any = next(iterator, end)
        if batch is end:
            return
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        first = x if first is None else first
        if _kind(x) != _kind(first):  # cat would convert pixels to floats unscaled
            raise InputError(f"{what}: batches must have one shape and dtype, got {_kind(first)}, then {_kind(x)}")
        yield x


def _regrouped(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Regroup batches into those of a tensor, so that results do not depend on how the data were batched."""
    waiting: list[Batch] = []
    for batch in batches:
        waiting.append(batch)
        while sum(map(len, waiting)) >= BATCH:
            whole = joined(waiting)
            yield whole[:BATCH]
            waiting = [whole[BATCH:]]
    if sum(map(len, waiting)):
        yield joined(waiting)


def evaluation_batches(data: Observations, what: str, progress: bool = False) -> Iterator[Batch]:
    """Iterate over data in batches of one size, unchanged, with a progress bar.

    Args:
        data: a tensor (N, ...) or a recording, or an iterable of batches: such, or tuples whose first element is one.
        what: name for the progress bar and for errors.
        progress: show a progress bar.

    Raises:
        InputError: for data without an observation, and for batches that differ in shape or dtype.
    """
    whole = isinstance(data, Tensor | Recording)
    batches = data.split(BATCH) if isinstance(data, Tensor | Recording) else _regrouped(_loaded(data, what))
    total = math.ceil(len(data) / BATCH) if isinstance(data, Tensor | Recording) else None
    empty = True
    for batch in tqdm(batches, desc=what, total=total, disable=not progress, leave=False):
        if len(batch):
            empty = False
            yield batch
    if empty:
        raise InputError(f"{what}: the data have no observation ({'an empty tensor' if whole else 'an empty loader'})")


class RandomSubset:
    """At most ``most`` observations of a stream of unknown length, chosen at random, in their order.

    The choice depends only on the number of observations: data may be sorted, or in a periodic order such as that of
    conditions that alternate.

    Args:
        most: maximum number of observations.
    """

    def __init__(self, most: int) -> None:
        self.most, self._generator = most, torch.Generator().manual_seed(stream_seed(0, "subset"))
        self._keys = torch.empty(0, dtype=torch.float64)
        self._largest = math.inf  # a key above it is not among the smallest
        self._parts: list[Batch] = []

    def add(self, x: Batch) -> None:
        """Add a batch (B, ...)."""
        new = torch.rand(len(x), generator=self._generator, dtype=torch.float64)
        chosen = (new < self._largest).nonzero().flatten()
        if len(chosen) < len(x):
            x, new = x[chosen], new[chosen]
        if len(new) or not self._parts:  # of no observation, the shape
            self._keys = torch.cat([self._keys, new])
            self._parts.append(x)
        if len(self._keys) > 2 * self.most:  # seldom, because it copies all
            self._cut()

    def _cut(self) -> None:
        if len(self._keys) > self.most:  # those with the smallest keys stay
            smallest = self._keys.topk(self.most, largest=False)
            kept = smallest.indices.sort().values
            self._largest = float(smallest.values.max())
            self._keys, self._parts = self._keys[kept], [joined(self._parts)[kept]]

    @property
    def observations(self) -> Batch:
        """The stored observations, (n, ...)."""
        self._cut()
        return joined(self._parts)
