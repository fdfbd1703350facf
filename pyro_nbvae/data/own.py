"""The user's own data: a folder of images, a ``.npy`` or a ``.npz`` file.

A tenth of the observations, drawn at random with a fixed seed, is held out, unless the file says which ones are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_nbvae.data.sources import Source, Split
from pyro_nbvae.errors import InputError, first_line

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
# One in so many observations is held out.
HOLD_OUT = 10
# uint8 arrays (N, a, b) with both sides as long as this look like images without channels.
SIDE = 8
# Type to which images of each type are converted: grey, or red, green and blue.
MODES = {
    "1": "L",
    "L": "L",
    "LA": "L",
    "RGB": "RGB",
    "RGBA": "RGB",
    "P": "RGB",
    "PA": "RGB",
    "CMYK": "RGB",
    "YCbCr": "RGB",
}


def _split(x: Tensor, labels: Tensor | None = None) -> Split:
    if len(x) < HOLD_OUT:
        raise InputError(f"{len(x)} observations are too few: {HOLD_OUT} or more are needed to hold some out")
    # at random, because data may be in a periodic order, such as that of their labels
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: len(x) // HOLD_OUT]
    held_out = torch.zeros(len(x), dtype=torch.bool)
    held_out[chosen] = True
    of = (None, None) if labels is None else (labels[~held_out], labels[held_out])
    return x[~held_out], x[held_out], *of


def as_tensor(path: Path, name: str, array: np.ndarray) -> Tensor:
    """Convert an array (N, *event_shape) to a tensor; uint8 is kept, so that pixels are recognised.

    Raises:
        InputError: for an array that does not hold finite numbers of this shape, and for images of another layout.
    """
    if array.dtype.kind not in "biuf" or array.ndim < 2 or not array.size:
        raise InputError(
            f"{path} holds no observations ({name}: {array.dtype}, shape {array.shape}): expected numbers of shape "
            "(N, *event_shape), such as (N, 1) for one number each"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        wrong = np.argwhere(~np.isfinite(array))
        raise InputError(
            f"{path} holds {len(wrong)} values that are NaN or infinite, the first at {name}{wrong[0].tolist()}: "
            "remove or replace them"
        )
    channels_last = array.ndim == 4 and array.shape[-1] in (1, 3) and array.shape[1] not in (1, 3)
    if array.dtype == np.uint8 and (channels_last or (array.ndim == 3 and min(array.shape[1:]) >= SIDE)):
        right = ".transpose(0, 3, 1, 2)" if channels_last else "[:, None]"
        raise InputError(
            f"{path} looks like images of another layout ({name}: uint8 of shape {array.shape}): save images as (N, "
            f"channels, height, width), {name}{right}, and numbers that are no pixels as another type, such as int64"
        )
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    # booleans are numbers, not pixels; torch has no unsigned integers wider than a byte
    kept = array.dtype == np.uint8 or array.dtype.kind in "if"
    return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=") if kept else np.float32))


def _labels(path: Path, name: str, array: np.ndarray, number: int) -> Tensor:
    if array.dtype.kind not in "iu" or array.shape != (number,):
        raise InputError(
            f"{path}: {name} is {array.dtype} of shape {array.shape}, expected {number} whole numbers, one for each "
            "observation"
        )
    return torch.from_numpy(array.astype(np.int64))


def read_npy(path: Path) -> np.ndarray:
    """Read the array of a ``.npy`` file.

    Raises:
        InputError: for a file that is not a ``.npy`` array.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # of several libraries
        raise InputError(f"{path} cannot be read as a .npy array: {first_line(error)}") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} cannot be read as a .npy array: it holds several arrays")
    return array


def _read_npz(path: Path) -> Split:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # of several libraries
        raise InputError(f"{path} cannot be read as a .npz file: {first_line(error)}") from None
    names = set(arrays)
    if names <= {"train", "test", "train_labels", "test_labels"} and names >= {"train", "test"}:
        train, test = (as_tensor(path, k, arrays[k]) for k in ("train", "test"))
        if train.dtype != test.dtype:
            raise InputError(f"{path}: train is {train.dtype} and test {test.dtype}: they must be of one type")
        of_train, of_test = (
            _labels(path, k, arrays[k], len(x)) if k in names else None
            for k, x in (("train_labels", train), ("test_labels", test))
        )
        return train, test, of_train, of_test
    data = names - {"labels"}
    if len(data) == 1:
        (only,) = data
        x = as_tensor(path, only, arrays[only])
        return _split(x, _labels(path, "labels", arrays["labels"], len(x)) if "labels" in names else None)
    raise InputError(
        f"{path} holds {', '.join(arrays) or 'nothing'}: expected the arrays train and test (and train_labels, "
        "test_labels), or one array (and labels)"
    )


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)


def _read_picture(path: Path) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            if opened.mode not in MODES:
                raise InputError(f"{path} has pixels of type {opened.mode}: save it with 8 bits for each channel")
            if opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1:  # MPO: a JPEG with a preview
                raise InputError(f"{path} holds {opened.n_frames} images: save each as a file, or all as a .npy file")
            if opened.has_transparency_data and np.asarray(opened.convert("RGBA"))[..., 3].min() < 255:
                raise InputError(f"{path} has transparent pixels: save it on a background")
            upright = ImageOps.exif_transpose(opened)
            pixels = np.asarray(upright.convert(MODES[opened.mode]))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} cannot be read as an image: {first_line(error)}") from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _read_pictures(folder: Path, files: list[Path]) -> Split:
    from tqdm.auto import tqdm

    shape = _read_picture(files[0]).shape
    images = np.empty((len(files), *shape), np.uint8)
    for k, path in enumerate(tqdm(files, desc=folder.name, leave=False)):
        pixels = _read_picture(path)
        if pixels.shape != shape:
            raise InputError(
                f"{path} is {pixels.shape} (channels, height, width) and {files[0]} is {shape}: images of one folder "
                "must be of one size and all grey or all coloured"
            )
        images[k] = pixels
    return _split(torch.from_numpy(images))


def own_source(path: Path) -> Source:
    """Return the source of a folder of images, or of a ``.npy`` or ``.npz`` file.

    The images of a folder and its subfolders must have one size; an EXIF orientation is applied. An array is
    (N, *event_shape): uint8 arrays (N, 1 or 3, H, W) are pixels, scaled to [0, 1]; all other values are used unchanged.
    A ``.npz`` file holds ``train`` and ``test`` (and ``train_labels``, ``test_labels``), or one array (and ``labels``).

    Raises:
        InputError: for a file that is none of these, and a folder without images.
    """
    if path.is_dir():
        files = _pictures(path)
        if not files:
            raise InputError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))})")
        return Source(
            _read_picture(files[0]).shape, lambda _: _read_pictures(path, files), lambda _: files, cached=True
        )
    if not path.is_file():
        raise InputError(
            f"{path} does not exist: give a registered name (--import its module), a folder of images, or a .npy or "
            ".npz file"
        )
    split = _read_npz(path) if path.suffix == ".npz" else _split(as_tensor(path, "array", read_npy(path)))
    return Source(tuple(split[0].shape[1:]), lambda _: split)
