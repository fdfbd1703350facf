"""What a data set is: observations, labels and where they come from."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_nbvae.batching import BATCH, Recording, ValueKind, is_image_shape, value_kind, value_range
from pyro_nbvae.errors import InputError
from pyro_nbvae.networks.initialization import moments


@dataclass(frozen=True)
class Data:
    """A data set: observations and labels for training, and held out.

    uint8 arrays of images, (N, 1 or 3, H, W), are pixels: :func:`to_floats` scales them to [0, 1]. All other values are
    used unchanged.

    Args:
        name: name of the data set.
        train, test: observations for training and held out, (N, *event_shape).
        train_labels, test_labels: (N,), int64, indices of classes; None if there are none.
        classes: names of the classes; None if there are no labels.
        train_given, test_given: what is known of them besides their values, the parts of a
            :class:`~pyro_nbvae.batching.Recording` by name.
        sessions: indices of the sessions of training and held-out data, (N,), for plots; None if there are none.
        groups: the group of each observation of both, indices (N,): those of a group stay together; None if there are
            none.
        unused: names of arrays that have a value for each observation, of which one may be the labels.
        is_held_out: which observations are held out, bool, in the order of the file; None for registered data.
        counted: whether the values are counts, also if all are 0 or 1.

    Example::

        >>> data = Data("noise", torch.rand(90, 7), torch.rand(10, 7))
        >>> data.event_shape, data.values, data.images
        ((7,), 'real', False)
    """

    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None
    classes: tuple[str, ...] | None = None
    train_given: dict[str, Tensor] = field(default_factory=dict)
    test_given: dict[str, Tensor] = field(default_factory=dict)
    sessions: tuple[Tensor | None, Tensor | None] = (None, None)
    groups: tuple[Tensor | None, Tensor | None] = (None, None)
    unused: tuple[str, ...] = ()
    is_held_out: Tensor | None = None
    counted: bool = False

    @property
    def training(self) -> Recording:
        """The training data with what is known of them."""
        return Recording(self.train, **self.train_given)

    @property
    def held_out(self) -> Recording:
        """The held-out data with what is known of them."""
        return Recording(self.test, **self.test_given)

    @property
    def covariates(self) -> int:
        """Number of covariates."""
        return self.train_given["covariates"].shape[1] if "covariates" in self.train_given else 0

    def joined(self) -> Data:
        """Return the data with none held out, in the order of the file; if it is not known, held-out ones last."""
        held_out = torch.arange(len(self.train) + len(self.test)) >= len(self.train)
        if self.is_held_out is not None:
            held_out = self.is_held_out
        place = torch.cat([(~held_out).nonzero(), held_out.nonzero()]).flatten().argsort()
        both = Recording.cat([self.training, self.held_out])[place]

        def join(train: Tensor | None, test: Tensor | None) -> Tensor | None:
            return None if train is None or test is None else torch.cat([train, test])[place]

        labels = join(self.train_labels, self.test_labels)
        return Data(
            self.name,
            both.x,
            both.x[:0],
            labels,
            None,
            None if labels is None else self.classes,
            both.given,
            {name: part[:0] for name, part in both.given.items()},
            (join(*self.sessions), None),
            (join(*self.groups), None),
            counted=self.counted,
        )

    def conditioned(self, on: str | None, classes: tuple[str, ...] | None = None, array: str = "labels") -> Data:
        """Return the data with the covariates that a model is conditioned on.

        Args:
            on: ``covariates``, those of the data; ``labels``, the labels as one-hot covariates; None for none.
            classes: the labels that the covariates stand for, in their order. Default: those of the data.
            array: name of the array of the labels, for messages.

        Raises:
            InputError: if the data have none, or a label that is not one of the classes.
        """
        classes = classes or self.classes or ()
        if on == "labels" and (unknown := set(self.classes or ()) - set(classes)):
            raise InputError(
                f"{self.name} has the label {sorted(unknown)[0]}, on which the run is not conditional: it knows "
                f"{', '.join(classes)}"
            )
        if on == "labels" and self.train_labels is not None and len(self.test):
            seen = set(self.train_labels.tolist())
            for k, name in enumerate(self.classes or ()):
                if k not in seen:
                    warnings.warn(
                        f"{self.name}: no training observation has the label {name}: what is conditional on it is not "
                        "trained",
                        stacklevel=2,
                    )
        number = {name: k for k, name in enumerate(classes)}
        code = torch.tensor([number[name] for name in self.classes or () if name in number], dtype=torch.long)
        parts = ("train", self.train_given, self.train_labels), ("test", self.test_given, self.test_labels)
        changed: dict[str, Any] = {}
        for part, given, labels in parts:
            new = {name: value for name, value in given.items() if name != "covariates"}
            if on == "covariates":
                if "covariates" not in given:
                    raise InputError(
                        f"{self.name} has no covariates to condition on: give the array covariates, or train without "
                        "--condition"
                    )
                new["covariates"] = given["covariates"]
            elif on == "labels":
                if labels is None and (part == "train" or len(self.test)):
                    raise InputError(
                        f"{self.name} has no labels to condition on: give that of each observation in the array "
                        f"{array!r}, or train without --condition"
                    )
                labels = torch.zeros(0, dtype=torch.long) if labels is None else labels
                new["covariates"] = one_hot(code[labels], len(classes)).float()
            changed[f"{part}_given"] = new
        return replace(self, **changed)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        return tuple(self.train.shape[1:])

    @cached_property
    def values(self) -> ValueKind:
        """What the values are; see :func:`value_kind`."""
        return "counts" if self.counted else value_kind(self.training.filled(0), self.held_out.filled(0))

    @property
    def images(self) -> bool:
        """Whether the observations are images, (1 or 3, H, W), and not counts."""
        return is_image_shape(self.event_shape) and self.values != "counts"

    @cached_property
    def limits(self) -> tuple[float, float]:
        """The values that are drawn black and white: those of the training data; see :func:`value_range`."""
        return value_range(self.training.filled(0))

    @cached_property
    def scale(self) -> float:
        """Range of the values of images; standard deviation of other values about the means of their elements."""
        if is_image_shape(self.event_shape):
            low, high = self.limits
            return high - low
        if self.train_given.get("mask") is not None:
            _, deviation = moments(self.train, (0,), self.train_given["mask"])
            return float(deviation.square().mean().sqrt()) or 1.0
        mean = sum(x.double().sum(0) for x in self.train.split(BATCH)) / len(self.train)
        square = sum(float((x.double() - mean).square().sum()) for x in self.train.split(BATCH)) / self.train.numel()
        return math.sqrt(square) or 1.0

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the training and the held-out observations, by which a run recognises its data."""
        digest = hashlib.blake2b(digest_size=16)
        for x in (self.train, self.test, *self.train_given.values(), *self.test_given.values()):
            digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
            digest.update(x.contiguous().numpy().data)
        return digest.hexdigest()


# Labels are of any type that :func:`class_labels` takes.
Labels = Tensor | np.ndarray | None


class Split(NamedTuple):
    """What a data set is read as; a tuple of the first four is one too.

    Args:
        train, test: observations for training and held out, (N, *event_shape).
        train_labels, test_labels: labels of both, or None.
        train_given, test_given: as of :class:`Data`.
        sessions: the session of each observation of both, indices (N,), or None.
        groups: the group of each observation of both, indices (N,), or None: those of a group stay together.
        unused, is_held_out, counted: as of :class:`Data`.
    """

    train: Tensor
    test: Tensor
    train_labels: Labels = None
    test_labels: Labels = None
    train_given: Mapping[str, Tensor] = {}
    test_given: Mapping[str, Tensor] = {}
    sessions: tuple[Tensor | None, Tensor | None] = (None, None)
    groups: tuple[Tensor | None, Tensor | None] = (None, None)
    unused: tuple[str, ...] = ()
    is_held_out: Tensor | None = None
    counted: bool = False


@dataclass(frozen=True)
class Source:
    """How a data set is found, read and downloaded.

    Args:
        event_shape: shape of one observation; for an image (channels, height, width).
        read: maps the data root to a :class:`Split`, or to (train, test, train labels, test labels). Labels are None,
            or one class for each observation: whole numbers, booleans or text.
        files: maps the data root to the files that the data set is made from; an empty list if any is missing. None if
            it needs no files: then nothing is searched, downloaded or cached.
        download: downloads the files into the data root.
        layout: which files belong where in the data root, for the message if they are missing.
        classifier: whose features its FID-c and KID-c are computed in, a name in ``pyro_nbvae/metrics/weights``.
        cached: keep what ``read`` returns in the cache until the files change; for a ``read`` that will not change.

    Example::

        >>> noise = torch.rand(100, 7)
        >>> source = Source((7,), lambda root: (noise[:90], noise[90:], None, None))
        >>> source.event_shape, source.files is None
        ((7,), True)
    """

    event_shape: tuple[int, ...]
    read: Callable[[Path], Split | tuple[Any, ...]]
    files: Callable[[Path], list[Path]] | None = None
    download: Callable[[Path], object] | None = None
    layout: str = ""
    classifier: str = "cifar32"
    cached: bool = False


def _as_classes(labels: np.ndarray, part: str) -> np.ndarray:
    """Return labels as whole numbers, booleans or text."""
    if labels.dtype.kind == "S":
        return np.char.decode(labels)
    if labels.dtype.kind in "biuUT":
        return labels
    got = str(labels.dtype)
    if labels.dtype.kind == "f":
        between = labels[~(np.isfinite(labels) & (labels == np.rint(labels)))]
        if not len(between):
            return labels.astype(np.int64)
        got = str(between[0])
    raise InputError(
        f"{part} labels must be classes (whole numbers, booleans or text), got {got}: convert them, or leave them out"
    )


def class_labels(
    labels: tuple[Labels, Labels], sizes: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None, tuple[str, ...] | None]:
    """Number classes from 0 to K - 1, in their order, with one mapping for training and held-out labels.

    Args:
        labels: labels for training and held out: whole numbers, booleans or text, (N,); None if there are none.
        sizes: the numbers of observations.

    Returns:
        Training labels and held-out labels, int64, and the names of the classes; None where there are no labels.

    Raises:
        InputError: for labels of another type, or not one for each observation.

    Example::

        >>> class_labels((np.array(["dog", "cat"]), np.array(["cat"])), (2, 1))
        (tensor([1, 0]), tensor([0]), ('cat', 'dog'))
    """
    known: list[np.ndarray] = []
    for given, size, part in zip(labels, sizes, ("train", "held-out"), strict=True):
        if given is None:
            continue
        array = np.asarray(given)
        if array.shape != (size,):
            more = ": if they are one-hot, give labels.argmax(1)" if array.ndim == 2 and len(array) == size else ""
            raise InputError(
                f"{part} labels have shape {array.shape}, expected ({size},), one for each observation{more}"
            )
        known.append(_as_classes(array, part))
    if not known:
        return None, None, None
    if len({"text" if array.dtype.kind in "UT" else "number" for array in known}) > 1:
        raise InputError("train labels and held-out labels must both be numbers or both text: convert one of them")
    classes, codes = np.unique(np.concatenate(known), return_inverse=True)
    coded = iter(torch.from_numpy(codes.astype(np.int64)).split([len(array) for array in known]))
    train, test = (None if given is None else next(coded) for given in labels)
    return train, test, tuple(map(str, classes.tolist()))
