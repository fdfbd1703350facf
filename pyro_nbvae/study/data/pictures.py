"""Folders of images, in every format that Pillow reads."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pyro_nbvae.errors import InputError
from pyro_nbvae.study.data.arrays import check_read, check_values, hold_out
from pyro_nbvae.study.data.base import Source, Split
from pyro_nbvae.study.errors import first_line
from pyro_nbvae.study.tree import Reading

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
# Names of folders, in lower case, that split the images.
TRAIN, TEST, VALIDATION = {"train", "training"}, {"test", "testing"}, {"val", "valid", "validation", "dev"}


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of the formats that Pillow reads as images."""
    from PIL import Image
    from PIL.ImageFile import StubImageFile

    def reads(kind: str) -> bool:
        factory = Image.OPEN[kind][0] if kind in Image.OPEN else None
        stub = factory is None or (isinstance(factory, type) and issubclass(factory, StubImageFile))  # no decoder
        return not stub and Image.MIME.get(kind, "image/").startswith("image/")  # no films

    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if reads(kind))


def _is_run(folder: Path) -> bool:
    """Whether the folder is one that nbvae train writes: its plots are not data."""
    return (folder / "config.json").is_file() and any((folder / k).is_file() for k in ("checkpoint.pt", ".lock"))


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Iterate over the files below a folder, through links; hidden files and folders, and runs, are left out."""
    here = folder.resolve()
    if here in above or _is_run(folder):  # a link to a folder above would never end
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__MACOSX":
            continue
        if path.is_dir():
            yield from _files(path, (*above, here))
        else:
            yield path


def _classes(inside: list[tuple[str, ...]]) -> list[str] | None:
    """Return the name of the class folder of each image; None if there are no class folders.

    Folders that hold all images are passed through.

    Args:
        inside: path of each image below the folder of its part.
    """
    depth = 0
    while all(len(parts) > depth + 1 for parts in inside):
        names = [parts[depth] for parts in inside]
        if len(set(names)) > 1:
            return names
        depth += 1
    return None


class Pictures(NamedTuple):
    """The images of a folder.

    Args:
        train, test: the images; without ``test`` some of ``train`` must be held out.
        classes: the class of each image of both; None if there are none.
        unread: the other files.
    """

    train: list[Path]
    test: list[Path]
    classes: list[str] | None
    unread: list[Path]


def find_pictures(folder: Path) -> Pictures:
    """Find the images below a folder, how they are split, and their classes.

    Raises:
        InputError: for a run folder, and a folder without images.
    """
    if _is_run(folder):
        raise InputError(f"{folder} is a run folder, not data: give a folder of images")
    files = sorted(_files(folder))
    seen: dict[Path, Path] = {}
    for path in files:  # an image that links lead to once more counts once
        if path.suffix.lower() in picture_suffixes() and path.is_file():
            seen.setdefault(path.resolve(), path)
    images = list(seen.values())
    if not images:
        raise InputError(f"{folder} holds no images: give a folder of PNG or JPEG files, or of another type of image")
    # folders that hold nothing but one folder are passed through, for archives are often unpacked into one
    base = folder
    while True:
        parts: dict[str | None, list[Path]] = {}
        for path in images:
            inside = path.relative_to(base).parts
            parts.setdefault(inside[0] if len(inside) > 1 else None, []).append(path)
        (first, *others) = parts
        if others or first is None:
            break
        base /= first
    parts_of = {None if name is None else name.lower(): name for name in parts}
    train, test, validation = (
        next((name for key, name in parts_of.items() if key in names), None) for names in (TRAIN, TEST, VALIDATION)
    )
    held_out = test or validation
    if train and held_out:
        chosen = [(path, path.relative_to(base / name)) for name in (train, held_out) for path in parts[name]]
        number = len(parts[train])
    else:
        if train or test:
            missing = "train" if test else "test or val"
            warnings.warn(
                f"{base}: the folder {train or test} is data like the others, because there is no folder {missing} "
                "beside it",
                stacklevel=3,
            )
        chosen, number = [(path, path.relative_to(base)) for path in images], len(images)
    paths = [path for path, _ in chosen]
    known = {path.resolve() for path in paths}
    unread = [path for path in files if path.resolve() not in known]
    return Pictures(paths[:number], paths[number:], _classes([inside.parts for _, inside in chosen]), unread)


def _read_picture(path: Path) -> np.ndarray:
    """Read an image as (channels, height, width): uint8, or float32 if it has more than 8 bits."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            if opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1:  # MPO: a JPEG with a preview
                raise InputError(f"{path} holds {opened.n_frames} images: save each as a file, or all as a .npy file")
            pixels = _deep(path, opened)
            if pixels is None and opened.mode not in MODES:
                raise InputError(f"{path} has pixels of type {opened.mode}: convert it to grey or RGB")
            if opened.has_transparency_data and np.asarray(opened.convert("RGBA"))[..., 3].min() < 255:
                raise InputError(f"{path} has transparent pixels: save it on a background")
            if pixels is None:
                pixels = np.asarray(ImageOps.exif_transpose(opened).convert(MODES[opened.mode]))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} cannot be read as an image: {first_line(error)}") from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _deep(path: Path, opened: Any) -> np.ndarray | None:
    """Read an image with more than 8 bits, (height, width[, channels]), float32; None if it has 8.

    Whole numbers of 16 bits are scaled to [0, 1]; other numbers are not. Pillow keeps such numbers in grey images only.
    """
    from PIL import ImageOps

    if opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format in ("PNG", "PPM")):
        return np.asarray(ImageOps.exif_transpose(opened)).astype(np.float32) / np.float32(65535)
    if opened.mode in ("I", "F"):
        pixels = np.asarray(ImageOps.exif_transpose(opened))
        check_values(path, pixels, "pixel {}".format)
        return pixels.astype(np.float32)
    if not opened.tile:
        return None
    codec, _, offset, arguments = opened.tile[0]
    if opened.format == "PPM" and isinstance(arguments, tuple) and arguments[1] > 255:
        if codec == "ppm":  # binary
            numbers = np.fromfile(path, ">u2", 3 * opened.width * opened.height, offset=offset)
            return (numbers / np.float32(arguments[1])).reshape(opened.height, opened.width, 3)
    elif ";16" not in str(arguments):
        return None
    if opened.format != "PNG":
        raise InputError(
            f"{path} has colours of 16 bits, which are read from PNG and binary PPM files: convert it to PNG"
        )
    from torchvision.io import ImageReadMode, decode_image

    pixels = decode_image(str(path), ImageReadMode.UNCHANGED, apply_exif_orientation=True).numpy()
    colours = pixels[: len(pixels) - (len(pixels) in (2, 4))]  # without alpha; where it is not opaque, it is refused
    return (colours.transpose(1, 2, 0) / np.float32(65535)).squeeze(-1 if len(colours) == 1 else ())


def _read(folder: Path, found: Pictures, reading: Reading) -> Split:
    from tqdm.auto import tqdm

    files = [*found.train, *found.test]
    shape = _read_picture(files[0]).shape
    images = np.empty((len(files), *shape), np.uint8)
    for k, path in enumerate(tqdm(files, desc=folder.name, leave=False)):
        pixels = _read_picture(path)
        if pixels.shape != shape:
            raise InputError(
                f"{path} is {pixels.shape} (channels, height, width) and {files[0]} is {shape}: images of one folder "
                "must be of one size and all grey or all coloured"
            )
        if pixels.dtype != images.dtype:  # one image of more than 8 bits makes all of them floats
            if images.dtype == np.uint8:
                images = images.astype(np.float32) / 255
            else:
                pixels = pixels.astype(np.float32) / 255
        images[k] = pixels
    labels = None if found.classes is None else np.array(found.classes)
    x, number = torch.from_numpy(images), len(found.train)
    if not found.test:
        return hold_out(x, labels, reading)
    of = (None, None) if labels is None else (labels[:number], labels[number:])
    return Split(x[:number], x[number:], *of)


def folder_source(folder: Path, reading: Reading) -> Source:
    """Return the source of a folder of images of one size; an EXIF orientation is applied.

    Folders ``train`` and ``test`` (or ``val``, if there is no ``test``) in it are the training and the held-out images.
    Other folders are classes: their names are the labels. Links are followed. Hidden files, hidden folders and run
    folders are not data. A warning names other files that are not read.

    Images with 8 bits per channel are uint8. Those with 16 bits are float32 in [0, 1]; one such image makes all of them
    float32. Images of floating-point numbers are not scaled.

    Args:
        folder: the folder.
        reading: which part is held out, if the folder does not say so.

    Raises:
        InputError: for a folder without images.
    """
    found = find_pictures(folder)
    if found.test:
        check_read(f"{folder} holds training and held-out images", reading)
    else:
        check_read(f"{folder} holds images, whose folders are their labels", reading, "folds", "fold", "split")

    def files(_: Path) -> list[Path]:
        if found.unread:
            names = [str(path.relative_to(folder)) for path in found.unread]
            number = "1 file was" if len(names) == 1 else f"{len(names)} files were"
            shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            warnings.warn(f"{folder}: {number} not read: {shown}", stacklevel=2)
        return [*found.train, *found.test]

    return Source(_read_picture(found.train[0]).shape, lambda _: _read(folder, found, reading), files, cached=True)
