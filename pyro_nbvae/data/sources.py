"""Sources of images. Each is a function from the data root to uint8 tensors, entered in ``SOURCES``."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyro_nbvae.errors import InputError


@dataclass(frozen=True)
class ImageData:
    """Images (N, C, H, W) as uint8 and labels (N,) as int64, for training and held out."""

    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.shape[1:]
        return channels, height, width


def to_unit_interval(images: Tensor) -> Tensor:
    """uint8 pixels as floats in [0, 1]."""
    return images.float().div_(255)


def batches(images: Tensor, size: int, order: Tensor | None = None) -> Iterator[Tensor]:
    """Batches of uint8 images (N, C, H, W) as floats in [0, 1], in the given order; the last may be smaller."""
    for start in range(0, len(images), size):
        chosen = slice(start, start + size) if order is None else order[start : start + size]
        yield to_unit_interval(images[chosen])


def data_root(root: str | Path | None = None) -> Path:
    """The data root: the argument, else the variable NBVAE_DATA, else the platform's user data folder."""
    import platformdirs

    return Path(root or os.environ.get("NBVAE_DATA") or platformdirs.user_data_dir("nbvae")).expanduser()


def _digits(root: Path) -> ImageData:
    """scikit-learn's 1,797 real 8x8 digits, enlarged to 16x16; the last 297 are held out. Needs no files."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    large = torch.nn.functional.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
    images = (large * 255).round().to(torch.uint8)
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    return ImageData("digits", images[:1500], images[1500:], labels[:1500], labels[1500:])


def _mnist(root: Path) -> ImageData:
    """MNIST in torchvision's layout, ``MNIST/raw/*-ubyte``; downloaded where it is missing."""
    from torchvision.datasets import MNIST

    def part(train: bool) -> tuple[Tensor, Tensor]:
        try:
            try:
                found = MNIST(str(root), train=train)
            except RuntimeError:  # not there
                # torchvision prints every mirror it tries
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    found = MNIST(str(root), train=train, download=True)
        except (OSError, RuntimeError, ValueError, AssertionError) as error:
            raise InputError(
                f"no usable MNIST in {root / 'MNIST' / 'raw'} and it could not be downloaded ({_first_line(error)}): "
                "put the four *-ubyte files there, or name the folder that holds MNIST/raw with --data-root or the "
                "variable NBVAE_DATA"
            ) from error
        return found.data[:, None], found.targets

    (train, train_labels), (test, test_labels) = part(True), part(False)
    return ImageData("mnist", train, test, train_labels, test_labels)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].strip().rstrip(":.") if str(error).strip() else type(error).__name__


SOURCES: dict[str, Callable[[Path], ImageData]] = {"digits": _digits, "mnist": _mnist}


def load(name: str, root: str | Path | None = None) -> ImageData:
    """The data of that name.

    Args:
        name: a key of ``SOURCES``.
        root: where its files are; see :func:`data_root`.

    Raises:
        InputError: for an unknown name, and for files that are neither there nor to be had.
    """
    if name not in SOURCES:
        raise InputError(f"unknown data {name!r}: choose from {', '.join(SOURCES)}")
    return SOURCES[name](data_root(root))
