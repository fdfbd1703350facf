"""Arrays of a user's own as tensors: which values they may hold, and which of them are pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_nbvae.batching import is_image_shape
from pyro_nbvae.errors import InputError
from pyro_nbvae.study.data.base import Labels, Split, class_labels
from pyro_nbvae.study.errors import first_line
from pyro_nbvae.study.tree import DEFAULT_READING, Reading

# uint8 arrays (N, a, b) with both sides as long as this look like images without channels; they are images if some
# value is as large as LIGHT.
SIDE, LIGHT = 8, 128
# The largest and the smallest positive number of float32 (with all digits), and the largest range of whole numbers.
LARGEST, SMALLEST, WHOLE = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny), 2**24


def fold_of(
    number: int, reading: Reading, labels: np.ndarray | None = None, groups: np.ndarray | None = None
) -> np.ndarray:
    """Assign observations to folds of about one size, (number,), with about as many of each label in each.

    If the whole data are asked for, no fold has an observation.

    Args:
        number: number of observations.
        reading: the number of folds, and whether they are drawn at random with a fixed seed or are blocks of the order
            of the observations, which is that of time, within each label.
        labels: the label of each observation, (number,).
        groups: the group of each observation, of which all are in one fold; its label is that of the first.

    Raises:
        InputError: for fewer observations, or groups, than folds.
    """
    if reading.whole:
        return np.full(number, -1)
    folds = reading.folds
    groups = np.arange(number) if groups is None else groups
    each, first, of_observation = np.unique(groups, return_index=True, return_inverse=True)
    if len(each) < folds:
        what = "observations" if len(each) == number else "groups of observations"
        fewer = f", or give --folds {len(each)} or fewer" if len(each) > 1 else ""
        raise InputError(f"{len(each)} {what} are too few: {folds} or more are needed to hold some out{fewer}")
    # at random, because data may be in a periodic order, such as that of their labels
    blocks = reading.split == "blocks"
    order = np.argsort(first, kind="stable") if blocks else np.random.default_rng(0).permutation(len(each))
    fold = np.empty(len(each), int)
    label = np.zeros(len(each), int) if labels is None else labels[first]
    dealt = 0
    for one in np.unique(label):
        own = order[label[order] == one]
        if blocks and len(own) < folds:
            raise InputError(
                f"a label has {len(own)} observations: blocks in {folds} folds need {folds} or more of each"
            )
        places = np.arange(len(own))
        fold[own] = places * folds // len(own) if blocks else folds - 1 - (dealt + places) % folds
        dealt += len(own)
    return fold[of_observation]


def check_read(what: str, reading: Reading, *used: str) -> None:
    """Check that the options of a reading that are not used, labels, group, folds, fold or split, are the default ones.

    Raises:
        InputError: if not: who gave them would take the data for others.
    """
    for name in ("labels", "group", "folds", "fold", "split"):
        given = getattr(reading, name)
        if name not in used and given != getattr(DEFAULT_READING, name) and not reading.whole:
            shown = given if str(given).isprintable() else repr(given)
            raise InputError(f"--{name} {shown} is not used: {what}; leave it out")


def column_of(path: Path, name: str, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the array, or column, that an option names.

    Raises:
        InputError: if there is none of this name.
    """
    if name not in columns:
        raise InputError(f"{path} has no {name}: it holds {', '.join(columns)}")
    return columns[name]


def hold_out(x: Tensor, labels: Labels, reading: Reading, groups: np.ndarray | None = None) -> Split:
    """Hold out a fold of the observations.

    Args:
        x: the observations.
        labels: their labels, or None.
        reading: which fold.
        groups: the group of each observation, or None; those of a group stay together.

    Raises:
        InputError: for fewer observations than folds.
    """
    if reading.whole:
        groups = None
    codes = None
    if labels is not None:
        (coded, _, _) = class_labels((labels, None), (len(x), 0))  # one for each observation, or an error
        assert coded is not None
        codes = coded.numpy()
    if groups is not None and (groups.shape != (len(x),) or pd.isna(groups).any() or "" in groups.astype(str)):
        raise InputError(f"--group {reading.group} needs one value for each of {len(x)} observations, none missing")
    of = None if groups is None else np.unique(groups, return_inverse=True)[1]
    held_out = fold_of(len(x), reading, codes, of) == reading.fold
    at = torch.from_numpy(held_out)
    own, other = (None, None) if labels is None else (labels[~held_out], labels[held_out])
    return Split(x[~at], x[at], own, other, groups=groups_of(of, held_out), is_held_out=at)


def groups_of(groups: np.ndarray | None, held_out: np.ndarray) -> tuple[Tensor | None, Tensor | None]:
    """Return the groups of training and of held-out observations."""
    if groups is None:
        return None, None
    return torch.from_numpy(groups[~held_out]), torch.from_numpy(groups[held_out])


def _lost_digits(array: np.ndarray) -> np.ndarray | None:
    """Return where whole numbers are not those of float32; None if some values are not whole."""
    if array.dtype.kind == "f":
        return array.astype(np.float32) != array if bool((array == np.rint(array)).all()) else None
    size = np.where(array < 0, -array, array) if array.dtype.kind == "i" else array
    return (size > WHOLE) & (size // np.maximum(size & (~size + 1), 1) > WHOLE)  # without trailing binary zeros


def check_values(path: Path, array: np.ndarray, place: Callable[[list[int]], str]) -> None:
    """Check that float32 holds the values of an array: models compute in it.

    Args:
        path: the file, for messages.
        array: integers or floats.
        place: returns the name of an element, from its indices.

    Raises:
        InputError: for values that are not finite, too large or too small, and whole numbers that would lose digits.
    """

    def first(wrong: np.ndarray) -> tuple[str, object]:
        at = np.argwhere(wrong)[0].tolist()
        return place(at), array[tuple(at)]

    if array.dtype.kind not in "iuf" or not array.size:
        return
    if array.dtype.kind == "f":
        wrong = ~np.isfinite(array)
        if wrong.any():
            raise InputError(
                f"{path} holds {wrong.sum()} values that are NaN or infinite, the first at {first(wrong)[0]}: remove "
                "or replace them"
            )
    largest = max(abs(array.max().item()), abs(array.min().item()))
    remedy = f"divide the data, for example by {largest:g}"
    if largest > LARGEST:
        where, value = first((array > LARGEST) | (array < -LARGEST))
        raise InputError(f"{path}: {where} is {value:g}: float32 holds at most {LARGEST:.2g}: {remedy}")
    if 0 < largest < SMALLEST:
        where, value = first(array != 0)
        raise InputError(f"{path}: {where} is {value:g}: float32 needs values of at least {SMALLEST:.2g}: {remedy}")
    lost = _lost_digits(array) if largest > WHOLE else None
    if lost is not None and lost.any():
        where, value = first(lost)
        raise InputError(
            f"{path}: {where} is {int(value)}: float32 holds whole numbers exactly up to {WHOLE}: {remedy}"  # type: ignore[call-overload]
        )


def _pixels(path: Path, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return uint8 arrays as (N, channels, height, width) if they are clearly images, and as numbers if they are not.

    Raises:
        InputError: for arrays that may be images without channels or with the channels last.
    """
    name, first = next(iter(arrays.items()))
    largest = max(array.max() for array in arrays.values())
    if largest <= 1:  # 0 and 1, not the two darkest of 256 shades
        kind = np.float32 if is_image_shape(first.shape[1:]) else np.uint8
        return [array.astype(kind) for array in arrays.values()]
    last = first.ndim == 4 and first.shape[-1] in (1, 3) and first.shape[1] not in (1, 3)
    if not last and not (first.ndim == 3 and min(first.shape[1:]) >= SIDE):
        return list(arrays.values())
    if largest >= LIGHT and min(first.shape[1:3]) >= SIDE:
        return [array.transpose(0, 3, 1, 2) if last else array[:, None] for array in arrays.values()]
    right = ".transpose(0, 3, 1, 2)" if last else "[:, None]"
    raise InputError(
        f"{path} looks like images of another layout ({name}: uint8 of shape {first.shape}): save images as (N, "
        f"channels, height, width), {name}{right}, and numbers that are not pixels as another type, such as int64"
    )


def as_tensors(
    path: Path, arrays: Mapping[str, np.ndarray], place: Callable[[str, list[int]], str] = "{}{}".format
) -> list[Tensor]:
    """Convert arrays (N, *event_shape) of one file to tensors; uint8 images stay uint8, so that they are known.

    Args:
        path: the file, for messages.
        arrays: maps the name of an array to it.
        place: returns the name of an element, from the array's name and the indices.

    Raises:
        InputError: for arrays that do not hold finite numbers of this shape, that float32 cannot hold, that are of
            several types, and for images of another layout.
    """
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf" or array.ndim < 2 or not array.size:
            raise InputError(
                f"{path} does not hold observations ({name}: {array.dtype}, shape {array.shape}): expected numbers of "
                "shape (N, *event_shape), such as (N, 1) for one number each"
            )
        check_values(path, array, lambda at, name=name: place(name, at))  # type: ignore[misc]
    if len({array.dtype for array in arrays.values()}) > 1:
        types = " and ".join(f"{name} is {array.dtype}" for name, array in arrays.items())
        raise InputError(f"{path}: {types}: save them with one type")
    if all(array.dtype == np.uint8 for array in arrays.values()):
        parts = _pixels(path, arrays)
    else:
        parts = [_known(array) for array in arrays.values()]
    return [torch.from_numpy(np.ascontiguousarray(a, a.dtype.newbyteorder("="))) for a in parts]


def _known(array: np.ndarray) -> np.ndarray:
    """Return numbers in a type that torch has; booleans as floats."""
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        return array.astype(np.float64)
    return array if array.dtype.kind in "if" else array.astype(np.float32)


def read_npy(path: Path) -> np.ndarray:
    """Read the array of a ``.npy`` file.

    Raises:
        InputError: for a file that is not a ``.npy`` array.
    """
    array = _load(path, ".npy array")
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} cannot be read as a .npy array: it holds several arrays: name the file .npz")
    return array


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a ``.npz`` file.

    Raises:
        InputError: for a file that is not a ``.npz`` file.
    """
    found = _load(path, ".npz file")
    if isinstance(found, np.ndarray):
        raise InputError(f"{path} cannot be read as a .npz file: it holds one array without a name: name the file .npy")
    return found


def _load(path: Path, kind: str) -> np.ndarray | dict[str, np.ndarray]:
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            return {name: found[name] for name in found.files}
    except Exception as error:  # of several libraries
        if "Object arrays" in str(error):  # pickled, which may run code
            raise InputError(
                f"{path} cannot be read as a {kind}: it holds objects: save numbers as array.astype(float) and text as "
                "array.astype(str)"
            ) from None
        # numpy takes a file without its mark for a pickle
        reason = "it has another format" if "allow_pickle" in str(error) else first_line(error)
        raise InputError(f"{path} cannot be read as a {kind}: {reason}") from None
