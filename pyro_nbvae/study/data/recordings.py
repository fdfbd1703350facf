"""Recordings of spike counts: ``.npz`` files with the array ``counts``, and ``.h5ad`` files."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_nbvae.errors import InputError
from pyro_nbvae.study.data.arrays import check_values, fold_of, groups_of
from pyro_nbvae.study.data.base import Split
from pyro_nbvae.study.errors import first_line

if TYPE_CHECKING:
    from pyro_nbvae.study.tree import Reading

# Arrays that have a meaning of their own beside counts.
KNOWN = ("mask", "exposure", "covariates", "labels", "trial", "session")


def _of_each(path: Path, name: str, array: np.ndarray, counts: np.ndarray) -> Tensor:
    """Return an array that broadcasts to counts: of their shape, one number, (N,), (bins,), or (N, neurons)."""
    shape = counts.shape
    if array.shape == shape:
        return torch.from_numpy(np.ascontiguousarray(array))
    if not array.ndim:
        return torch.from_numpy(array.reshape(*(1 for _ in shape)))
    if len(shape) == 3 and array.shape == shape[1:2]:
        if shape[0] == shape[1]:
            raise InputError(f"{path}: {name} has shape {array.shape}, of trials or of bins: give it that of counts")
        return torch.from_numpy(np.ascontiguousarray(array.reshape(1, -1, 1)))
    if array.shape == shape[:1]:
        return torch.from_numpy(np.ascontiguousarray(array.reshape(-1, *(1 for _ in shape[1:]))))
    if len(shape) == 3 and shape[1] == shape[2] and array.shape == shape[:2]:
        raise InputError(f"{path}: {name} has shape {array.shape}, of neurons or of bins: give it the shape of counts")
    if len(shape) == 3 and array.shape == (shape[0], shape[2]):
        return torch.from_numpy(np.ascontiguousarray(array[:, None]))
    raise InputError(
        f"{path}: {name} has shape {array.shape} and counts {shape}: expected that of counts, one number, {shape[:1]}"
        + (f", {shape[1:2]} or {(shape[0], shape[2])}" if len(shape) == 3 else "")
    )


def _checked_counts(path: Path, counts: np.ndarray, mask: Tensor | None) -> Tensor:
    if counts.dtype.kind not in "biuf" or counts.ndim not in (2, 3) or not counts.size:
        raise InputError(
            f"{path}: counts are {counts.dtype} of shape {counts.shape}: expected whole numbers of shape (trials, "
            "neurons) or (trials, bins, neurons)"
        )
    seen = np.ones(counts.shape, bool) if mask is None else mask.expand(counts.shape).numpy()
    if counts.dtype.kind == "f":
        missing = seen & ~np.isfinite(counts)
        if missing.any():
            at = tuple(np.argwhere(missing)[0].tolist())
            raise InputError(
                f"{path}: counts{list(at)} is {counts[at]} ({missing.sum()} such values): give the array mask, True "
                "where a count was observed, as mask=numpy.isfinite(counts)"
            )
    observed = np.where(seen, counts, 0)
    wrong = (observed < 0) | (observed != np.rint(observed))
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0].tolist())
        raise InputError(f"{path}: counts{list(at)} is {counts[at]}: counts are whole numbers of at least 0")
    check_values(path, observed, lambda at: f"counts{at}")
    return torch.from_numpy(
        counts.astype(np.int16 if observed.max() < 2**15 else np.float32)
        if mask is None
        else observed.astype(np.int16 if observed.max() < 2**15 else np.float32)
    )


def _optional(path: Path, name: str, arrays: Mapping[str, np.ndarray], number: int) -> np.ndarray | None:
    """Return an array with one value for each trial, None if there is none or some are missing."""
    return _of_trials(path, name, arrays, number) if name in arrays and not pd.isna(arrays[name]).any() else None


def _of_trials(path: Path, name: str, arrays: Mapping[str, np.ndarray], number: int) -> np.ndarray:
    """Return an array with one value for each trial, none of them missing."""
    if name not in arrays:
        there = ", ".join(sorted(set(arrays) - {"counts", "mask", "exposure", "covariates"})) or "none"
        raise InputError(f"{path} has no array {name}: of each trial it holds {there}")
    array = arrays[name]
    if array.shape != (number,):
        raise InputError(f"{path}: {name} has shape {array.shape}: expected ({number},), one for each trial")
    missing = pd.isna(array)
    if missing.any():
        raise InputError(
            f"{path}: {name} has {missing.sum()} missing values, the first of trial {missing.argmax()}: fill them, or "
            "leave these trials out"
        )
    return array


def _codes(array: np.ndarray) -> np.ndarray:
    return np.unique(array, return_inverse=True)[1]


def split_counts(path: Path, arrays: Mapping[str, np.ndarray], reading: Reading) -> Split:
    """Return training and held-out parts of the arrays of a recording.

    Args:
        path: the file, for messages.
        arrays: ``counts``, (trials, neurons) or (trials, bins, neurons); ``mask``, True where a count was observed;
            ``exposure``; ``covariates``, (trials, C); and arrays of one value for each trial.
        reading: which of these are labels and groups, and which fold is held out.

    Raises:
        InputError: for arrays of other shapes or values, and names that the file lacks.
    """
    number = len(arrays["counts"]) if arrays["counts"].ndim else 0
    counts = arrays["counts"]
    given: dict[str, Tensor] = {}
    if "mask" in arrays:
        mask = arrays["mask"]
        if mask.dtype.kind not in "biu" or not np.isin(mask, (0, 1)).all():
            raise InputError(f"{path}: mask must be True where a count was observed, else False, got {mask.dtype}")
        given["mask"] = _of_each(path, "mask", mask.astype(bool), counts)
    if "exposure" in arrays:
        exposure = arrays["exposure"].astype(np.float32)
        if not (np.isfinite(exposure) & (exposure > 0)).all():
            raise InputError(f"{path}: exposure must be positive and finite, got {exposure.min():g}")
        given["exposure"] = _of_each(path, "exposure", exposure, counts)
    if "covariates" in arrays:
        covariates = arrays["covariates"]
        covariates = covariates[:, None] if covariates.ndim == 1 else covariates
        if covariates.dtype.kind not in "biuf" or covariates.ndim != 2 or len(covariates) != number:
            raise InputError(
                f"{path}: covariates are {covariates.dtype} of shape {covariates.shape}: expected numbers ({number}, "
                "C); for classes use --condition labels"
            )
        if not np.isfinite(covariates).all():
            raise InputError(f"{path}: covariates must be finite")
        given["covariates"] = torch.from_numpy(covariates.astype(np.float32))
    x = _checked_counts(path, counts, given.get("mask"))
    group, labels, of = reading.group or "trial", None, None
    if reading.whole:  # nothing is held out, and new data need neither
        labels, of = (_optional(path, name, arrays, number) for name in (reading.labels, group))
    else:
        if reading.labels in arrays or reading.labels != "labels":
            labels = _of_trials(path, reading.labels, arrays, number)
        if group in arrays or reading.group is not None:
            of = _of_trials(path, group, arrays, number)
    groups = None if of is None else _codes(of)
    held_out = fold_of(number, reading, None if labels is None else _codes(labels), groups) == reading.fold
    parts: list[Any] = []
    session = _optional(path, "session", arrays, number)
    sessions = None if session is None else torch.from_numpy(_codes(session))
    whole = {name: part.expand(number, *part.shape[1:]) for name, part in given.items()}
    for which, chosen in (("training", ~held_out), ("held-out", held_out)):
        at = torch.from_numpy(chosen)
        own = {name: part[at] for name, part in whole.items()}
        if chosen.any() and "mask" in own and not own["mask"].any():
            raise InputError(f"{path}: mask is False for every count of the {which} trials: none was observed")
        parts.append(
            (x[at], None if labels is None else labels[chosen], own, None if sessions is None else sessions[at])
        )
    (train, train_labels, train_given, train_session), (test, test_labels, test_given, test_session) = parts
    sessions_of = (train_session, test_session)
    of_trials = [name for name, array in arrays.items() if array.shape == (number,) and name not in KNOWN]
    unused = tuple(name for name in of_trials if labels is None and name != group)
    at = torch.from_numpy(held_out)
    labels_of, given_of = (train_labels, test_labels), (train_given, test_given)
    return Split(train, test, *labels_of, *given_of, sessions_of, groups_of(groups, held_out), unused, at, counted=True)


def read_recording(path: Path, arrays: Mapping[str, np.ndarray], reading: Reading) -> Split:
    """Return the parts of the arrays of a ``.npz`` file.

    Raises:
        InputError: as :func:`split_counts`, and for a name that is nearly one that is read.
    """
    for name in set(arrays) - {*KNOWN, "counts", reading.labels, reading.group}:
        for meant in get_close_matches(name.lower(), ("mask", "exposure", "covariates"), 1, 0.8):
            raise InputError(
                f"{path}: the array {name} is not read: rename it to {meant} if it is one, or leave it out"
            )
    return split_counts(path, arrays, reading)


def read_h5ad(path: Path, reading: Reading) -> Split:
    """Read the counts of a ``.h5ad`` file, cells x genes or trials x neurons.

    They are the layer ``counts``, or X. Columns of ``obs`` are labels, groups and sessions; ``size_factors`` is the
    exposure; ``obsm["covariates"]`` has covariates.

    Raises:
        InputError: if anndata is not installed, and as :func:`split_counts`.
    """
    return split_counts(path, h5ad_arrays(path), reading)


def h5ad_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a ``.h5ad`` file by the names of :func:`split_counts`."""
    try:
        import anndata
    except ImportError:
        raise InputError(f"{path}: .h5ad files need anndata: pip install 'pyro-nbvae[anndata]'") from None
    try:
        found = anndata.read_h5ad(path)
        counts = found.layers.get("counts", found.X)
        counts = counts.toarray() if hasattr(counts, "toarray") else np.asarray(counts)
    except Exception as error:  # of several libraries
        raise InputError(f"{path} cannot be read as a .h5ad file: {first_line(error)}") from None
    arrays = {str(name): _column(found.obs[name]) for name in found.obs}
    if "size_factors" in arrays:
        arrays["exposure"] = arrays.pop("size_factors")
    if "covariates" in found.obsm:
        arrays["covariates"] = np.asarray(found.obsm["covariates"])
    return {**arrays, "counts": counts}


def _column(values: Any) -> np.ndarray:
    array, missing = values.to_numpy(), values.isna().to_numpy()
    if array.dtype.kind in "biuf":
        return array
    text = array.astype(str)
    if missing.any():
        text = text.astype(object)
        text[missing] = None
    return text
