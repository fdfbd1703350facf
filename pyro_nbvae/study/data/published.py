"""Published data sets: the files that each is made from, how they are read and downloaded."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_nbvae.study.data.base import Source, Split
from pyro_nbvae.study.errors import first_line


def _all_or_none(paths: list[Path]) -> list[Path]:
    return paths if all(p.is_file() for p in paths) else []


# --- digits --------------------------------------------------------------------------------------------------------


def _read_digits(root: Path) -> Split:
    """scikit-learn's 1,797 real 8x8 digits, enlarged to 16x16; the last 297 are held out. Needs no files."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    large = torch.nn.functional.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
    images = (large * 255).round().to(torch.uint8)
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    return Split(images[:1500], images[1500:], labels[:1500], labels[1500:])


# --- MNIST and Fashion-MNIST -----------------------------------------------------------------------------------------


def _idx(folder: str, class_name: str, classifier: str) -> Source:
    """Return the source of a data set in MNIST's format, read and downloaded by torchvision."""

    def dataset(root: Path, train: bool, download: bool = False):
        import torchvision.datasets

        return getattr(torchvision.datasets, class_name)(str(root), train=train, download=download)

    def files(root: Path) -> list[Path]:
        names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
        return _all_or_none([root / folder / "raw" / name for name in names])

    def read(root: Path) -> Split:
        train, test = dataset(root, True), dataset(root, False)
        return Split(train.data[:, None], test.data[:, None], train.targets, test.targets)

    def download(root: Path) -> None:
        dataset(root, True, download=True)

    layout = f"the four *-ubyte files in {folder}/raw"
    return Source((1, 28, 28), read, files, download, layout, classifier, cached=True)


# --- CIFAR-10 at 16x16 and 32x32 --------------------------------------------------------------------------------------

_CIFAR_PARTS = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]


def _cifar_files(root: Path) -> list[Path]:
    """Return the files of the binary version, or of the pickled version that torchvision downloads."""
    binary = [root / "cifar-10-batches-bin" / f"{part}.bin" for part in _CIFAR_PARTS]
    return _all_or_none(binary) or _all_or_none([root / "cifar-10-batches-py" / part for part in _CIFAR_PARTS])


def _cifar_md5s() -> dict[str, str]:
    """Return the MD5 of each official file, from torchvision."""
    from torchvision.datasets import CIFAR10

    return dict(map(tuple, (*CIFAR10.train_list, *CIFAR10.test_list)))


class _ArraysOnly(pickle.Unpickler):
    """Reads arrays, numbers, strings and containers; a pickle that names anything else is refused."""

    _ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no array needs")
        return super().find_class(module, name)


def _cifar_part(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read pixels (N, 3072) and labels (N,) of one file, both uint8."""
    if path.suffix == ".bin":
        records = np.fromfile(path, np.uint8).reshape(-1, 3073)
        return records[:, 1:], records[:, 0]
    data = path.read_bytes()
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != _cifar_md5s()[path.name]:
        raise ValueError(f"{path.name} is not the official file (its MD5 differs)")
    content = _ArraysOnly(io.BytesIO(data), encoding="latin1").load()
    return np.asarray(content["data"], np.uint8), np.asarray(content["labels"], np.uint8)


def _resized(images: Tensor) -> Tensor:
    """Resize to 16x16 as the paper's code does: torchvision's ``Resize(16)``, bilinear with antialiasing."""
    from torchvision.transforms.v2.functional import resize

    return torch.cat([resize(part, [16, 16], antialias=True) for part in images.split(1_000)])


def _block_averages(images: Tensor) -> Tensor:
    """Average over squares of 2x2 pixels."""
    return torch.nn.functional.avg_pool2d(images.float(), 2).round().to(torch.uint8)


def _cifar(side: int, classifier: str, prepare: Callable[[Tensor], Tensor] = lambda images: images) -> Source:
    """Return the source of CIFAR-10 with images of this side, made by ``prepare`` from those of 32x32 pixels."""

    def prepared(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
        pixels, labels = (torch.from_numpy(np.concatenate(a)) for a in zip(*parts, strict=True))
        return prepare(pixels.reshape(-1, 3, 32, 32)), labels.long()

    def read(root: Path) -> Split:
        *train, test = (_cifar_part(path) for path in _cifar_files(root))
        (images, labels), (test_images, test_labels) = prepared(train), prepared([test])
        return Split(images, test_images, labels, test_labels)

    layout = "CIFAR-10 in cifar-10-batches-bin/*.bin or cifar-10-batches-py"
    return Source((3, side, side), read, _cifar_files, _download_cifar, layout, classifier, cached=True)


def _download_cifar(root: Path) -> None:
    from torchvision.datasets import CIFAR10

    CIFAR10(str(root), download=True)


# --- CelebA at 64x64 -------------------------------------------------------------------------------------------------

# The paper's crop of the official 178x218 images, as fractions: left, upper, right, lower.
_CELEBA_CROP = (15 / 178, 40 / 218, 163 / 178, 188 / 218)


def _celeba_files(root: Path) -> list[Path]:
    images = sorted((root / "celeba" / "img_align_celeba").glob("*.jpg"))
    partition = root / "celeba" / "list_eval_partition.txt"
    return [*images, *(path for path in (partition,) if path.is_file())] if images else []


def _read_celeba64(root: Path) -> Split:
    """Faces, cropped as in the paper and resized; the official test part, or else the last tenth, is held out."""
    from PIL import Image
    from tqdm.auto import tqdm

    def face(path: Path) -> np.ndarray:
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except Exception as error:
            raise ValueError(f"{path.name}: {first_line(error)}") from error
        if image.size == (64, 64):
            return np.asarray(image)
        width, height = image.size
        left, upper, right, lower = _CELEBA_CROP
        box = (left * width, upper * height, right * width, lower * height)
        return np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR, box=box))

    files = [p for p in _celeba_files(root) if p.suffix == ".jpg"]
    partition = root / "celeba" / "list_eval_partition.txt"
    if partition.is_file():
        part = dict(line.split() for line in partition.read_text().splitlines() if line.strip())
        train, test = ([p for p in files if part.get(p.name) == which] for which in ("0", "2"))
    else:
        held_out = max(1, len(files) // 10)
        train, test = files[:-held_out], files[-held_out:]

    def stacked(paths: list[Path]) -> Tensor:
        pixels = np.stack([face(p) for p in tqdm(paths, desc="CelebA", leave=False)])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    return Split(stacked(train), stacked(test))


def _download_celeba(root: Path) -> None:
    from torchvision.datasets import CelebA

    CelebA(str(root), split="all", download=True)


# --- all -------------------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, Source] = {
    "digits": Source((1, 16, 16), _read_digits, classifier="digits"),
    "mnist": _idx("MNIST", "MNIST", "mnist"),
    "fashion_mnist": _idx("FashionMNIST", "FashionMNIST", "fashion_mnist"),
    "cifar16": _cifar(16, "cifar16-blocks", _resized),
    "cifar16-blocks": _cifar(16, "cifar16-blocks", _block_averages),
    "cifar32": _cifar(32, "cifar32"),
    "celeba64": Source(
        (3, 64, 64),
        _read_celeba64,
        _celeba_files,
        _download_celeba,
        "the aligned images in celeba/img_align_celeba/*.jpg",
        cached=True,
    ),
}
