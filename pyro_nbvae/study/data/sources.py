"""Sources of data sets. Each lists the files that it is made from and reads them to tensors; ``SOURCES`` names them.

The prepared tensors are cached outside the data root, keyed by the source and its files, so that a data set is decoded
and resized only once.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_nbvae.batching import BATCH, ValueKind, is_image_shape, is_pixels, to_floats, value_kind, value_range
from pyro_nbvae.errors import InputError
from pyro_nbvae.study.errors import first_line
from pyro_nbvae.study.files import cached, expanded

# Increase this when the same files are prepared differently, so that older cached tensors are not used.
RECIPE = 4


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

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        return tuple(self.train.shape[1:])

    @cached_property
    def values(self) -> ValueKind:
        """What the values are; see :func:`value_kind`."""
        return value_kind(self.train, self.test)

    @property
    def images(self) -> bool:
        """Whether the observations are images, (1 or 3, H, W), and not counts."""
        return is_image_shape(self.event_shape) and self.values != "counts"

    @cached_property
    def limits(self) -> tuple[float, float]:
        """The values that are drawn black and white: those of the training data; see :func:`value_range`."""
        return value_range(self.train)

    @cached_property
    def scale(self) -> float:
        """Range of the values of images; standard deviation of other values about the means of their elements."""
        if is_image_shape(self.event_shape):
            low, high = self.limits
            return high - low
        mean = sum(x.double().sum(0) for x in self.train.split(BATCH)) / len(self.train)
        square = sum(float((x.double() - mean).square().sum()) for x in self.train.split(BATCH)) / self.train.numel()
        return math.sqrt(square) or 1.0

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the training and the held-out observations, by which a run recognises its data."""
        digest = hashlib.blake2b(digest_size=16)
        for x in (self.train, self.test):
            digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
            digest.update(x.contiguous().numpy().data)
        return digest.hexdigest()


# Labels are of any type that :func:`class_labels` takes.
Labels = Tensor | np.ndarray | None
Split = tuple[Tensor, Tensor, Labels, Labels]


@dataclass(frozen=True)
class Source:
    """How a data set is found, read and downloaded.

    Args:
        event_shape: shape of one observation; for an image (channels, height, width).
        read: maps the data root to (train, test, train labels, test labels). Labels are None, or one class for each
            observation: whole numbers, booleans or text.
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
    read: Callable[[Path], Split]
    files: Callable[[Path], list[Path]] | None = None
    download: Callable[[Path], object] | None = None
    layout: str = ""
    classifier: str = "cifar32"
    cached: bool = False


def data_root(root: str | Path | None = None) -> Path:
    """Return the data root, the folder with the files of the registered data sets.

    Args:
        root: the folder. Default: the environment variable NBVAE_DATA, else the platform's user data folder.

    Example::

        >>> str(data_root("my_data"))
        'my_data'
    """
    import platformdirs

    return expanded(root or os.environ.get("NBVAE_DATA") or platformdirs.user_data_dir("nbvae"))


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
    return images[:1500], images[1500:], labels[:1500], labels[1500:]


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
        return train.data[:, None], test.data[:, None], train.targets, test.targets

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


def _cifar(area: int, classifier: str) -> Source:
    """Return the source of CIFAR-10, averaged over squares of ``area`` x ``area`` pixels."""

    def prepared(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
        pixels, labels = (torch.from_numpy(np.concatenate(a)) for a in zip(*parts, strict=True))
        means = torch.nn.functional.avg_pool2d(pixels.reshape(-1, 3, 32, 32).float(), area)
        return means.round().to(torch.uint8), labels.long()

    def read(root: Path) -> Split:
        *train, test = (_cifar_part(path) for path in _cifar_files(root))
        (images, labels), (test_images, test_labels) = prepared(train), prepared([test])
        return images, test_images, labels, test_labels

    layout = "CIFAR-10 in cifar-10-batches-bin/*.bin or cifar-10-batches-py"
    return Source((3, 32 // area, 32 // area), read, _cifar_files, _download_cifar, layout, classifier, cached=True)


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

    return stacked(train), stacked(test), None, None


def _download_celeba(root: Path) -> None:
    from torchvision.datasets import CelebA

    CelebA(str(root), split="all", download=True)


# --- by name ---------------------------------------------------------------------------------------------------------

SOURCES: dict[str, Source] = {
    "digits": Source((1, 16, 16), _read_digits, classifier="digits"),
    "mnist": _idx("MNIST", "MNIST", "mnist"),
    "fashion_mnist": _idx("FashionMNIST", "FashionMNIST", "fashion_mnist"),
    "cifar16": _cifar(2, "cifar16"),
    "cifar32": _cifar(1, "cifar32"),
    "celeba64": Source(
        (3, 64, 64),
        _read_celeba64,
        _celeba_files,
        _download_celeba,
        "the aligned images in celeba/img_align_celeba/*.jpg",
        cached=True,
    ),
}


def register_data(name: str, source: Source) -> None:
    """Register a data set under a name, for ``--data`` and everywhere else.

    Args:
        name: its name; an existing data set of this name is replaced.
        source: how it is read.

    Example::

        >>> noise = torch.rand(100, 7)
        >>> register_data("noise", Source((7,), lambda root: (noise[:90], noise[90:], None, None)))
        >>> load("noise").event_shape
        (7,)
    """
    SOURCES[name] = source


def source_of(name: str) -> Source:
    """Return the source of a data set.

    Args:
        name: a registered name, a folder of images, or a ``.npy``, ``.npz``, ``.csv`` or ``.tsv`` file
            (:mod:`pyro_nbvae.study.data.own`).

    Raises:
        InputError: for a name that is none of these.

    Example::

        >>> source_of("cifar16").event_shape
        (3, 16, 16)
    """
    from pyro_nbvae.study.data.own import own_source

    if name in SOURCES:
        return SOURCES[name]
    path = expanded(name)
    if (name.strip() and _exists(path)) or path.suffix or len(path.parts) > 1:
        return own_source(path)
    raise InputError(
        f"unknown data {name!r}: choose from {', '.join(SOURCES)}, or name a folder of images, or a .npy, .npz, .csv "
        "or .tsv file"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long a name, a null byte
        return False


def full_name(name: str) -> str:
    """Return a registered name unchanged, and a path as an absolute path, which is valid in every folder.

    Args:
        name: a registered name, or the path of a folder or a file.

    Example::

        >>> full_name("mnist")
        'mnist'
    """
    return name if name in SOURCES else str(expanded(name).resolve())


def _missing(name: str, source: Source, root: Path, reason: str) -> InputError:
    if not source.layout:
        return InputError(f"no {name} in {root} ({reason})")
    return InputError(
        f"no {name} in {root} ({reason}): put {source.layout} there, or give the folder that holds it with "
        "--data-root or the environment variable NBVAE_DATA"
    )


def _find(name: str, source: Source, root: Path, download: bool) -> list[Path]:
    assert source.files is not None
    files = source.files(root)
    if files:
        return files
    if source.download is None:
        raise _missing(name, source, root, "it has no download")
    if not download:
        raise _missing(name, source, root, "not downloaded; nbvae train downloads it if there is a network")
    try:
        # torchvision prints every mirror that it tries
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            source.download(root)
    except Exception as error:
        raise _missing(name, source, root, f"the download failed: {first_line(error)}") from error
    files = source.files(root)
    if not files:
        raise _missing(name, source, root, "its download has other files than expected")
    return files


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


def _checked(data: Data, source: Source) -> Data:
    for x, labels, part in ((data.train, data.train_labels, "train"), (data.test, data.test_labels, "held-out")):
        if tuple(x.shape[1:]) != tuple(source.event_shape) or not len(x):
            raise ValueError(
                f"{part} data have shape {tuple(x.shape)}, expected (N, {', '.join(map(str, source.event_shape))})"
            )
        if labels is not None and labels.shape != (len(x),):
            raise ValueError(f"{part} labels have shape {tuple(labels.shape)}, expected ({len(x)},)")
        if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < len(data.classes or ()):
            raise ValueError(f"{part} labels must be indices of the classes")
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise ValueError(f"{part} data hold values that are not finite")
    return data


def load(name: str, root: str | Path | None = None, *, download: bool = True) -> Data:
    """Load a data set, from the cache if it has been prepared before.

    Args:
        name: a registered name (``SOURCES``), a folder of images, or a ``.npy``, ``.npz``, ``.csv`` or ``.tsv`` file.
        root: folder with the files of registered data sets; see :func:`data_root`.
        download: download missing files into the data root.

    Raises:
        InputError: for an unknown name, and for files that are missing, not available or damaged.

    Example::

        >>> load("digits").train.shape
        torch.Size([1500, 1, 16, 16])
    """
    source, folder = source_of(name), data_root(root)

    def read() -> Data:
        try:
            train, test, *labels = source.read(folder)
            given, held_out, classes = class_labels((labels[0], labels[1]), (len(train), len(test)))
            return _checked(Data(name, train, test, given, held_out, classes), source)
        except InputError as error:
            raise error if name in str(error) else InputError(f"{name}: {error}") from None
        except Exception as error:
            again = f": replace {source.layout}" if source.layout else ""
            place = name if source.files is None else f"{name} in {folder}"
            raise InputError(f"{place} cannot be read ({first_line(error)}){again}") from error

    files = [] if source.files is None else _find(name, source, folder, download)
    if not source.cached:
        return read()
    # the folder of a picture may be its label
    names = [p.relative_to(folder) if p.is_relative_to(folder) else p for p in files]
    made_from = [(str(n), hashlib.blake2b(p.read_bytes()).hexdigest()) for n, p in zip(names, files, strict=True)]
    key = hashlib.sha256(repr((RECIPE, name, made_from)).encode()).hexdigest()[:16]

    def content() -> dict[str, object]:
        data = read()
        return {field.name: getattr(data, field.name) for field in fields(Data)}

    prepared = cached(f"{Path(name).stem}-{key}.pt", content)
    try:
        return _checked(Data(**prepared), source)
    except (TypeError, ValueError, AttributeError):  # the cached file has other content
        return read()


def describe(data: Data) -> str:
    """Describe a data set by its shapes, counts, ranges and labels, one line for each part.

    Args:
        data: the data set.

    Example::

        >>> print(describe(Data("ones", torch.ones(9, 7), torch.ones(1, 7))))
        ones: 7 (float32, 0 and 1)
        train: 9 observations, values 1 to 1, mean 1.0000, deviation 0.0000, no labels
        held out: 1 observations, values 1 to 1, mean 1.0000, deviation 0.0000, no labels
    """
    pixels = is_pixels(data.train)
    meaning = {"unit": "in [0, 1]", "binary": "0 and 1", "counts": "counts", "real": "real numbers"}[data.values]
    kind = "channels, height, width" if pixels else f"{str(data.train.dtype).removeprefix('torch.')}, {meaning}"
    lines = [f"{data.name}: {' x '.join(map(str, data.event_shape))} ({kind})"]
    things, values = ("images" if data.images else "observations"), ("pixels" if pixels else "values")
    for part, x, labels in (("train", data.train, data.train_labels), ("held out", data.test, data.test_labels)):
        numbers = to_floats(x)
        text = f"{part}: {len(x)} {things}, {values} {x.min().item():g} to {x.max().item():g}"
        text += f", mean {float(numbers.mean()):.4f}, deviation {float(numbers.std()):.4f}"
        if labels is None:
            text += ", no labels"
        else:
            names = data.classes or tuple(map(str, range(int(labels.max()) + 1)))
            counts = torch.bincount(labels, minlength=len(names)).tolist()
            shown = names if len(names) <= 5 else (*names[:3], "…", names[-1])
            text += f", {len(names)} classes ({', '.join(shown)}) with {min(counts)} to {max(counts)} {things} each"
        lines.append(text)
    return "\n".join(lines)
