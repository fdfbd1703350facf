"""Data sets by name or path: found, downloaded, read, checked and cached.

The prepared tensors are cached outside the data root, keyed by the source and its files, so that a data set is decoded
and resized only once.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from dataclasses import fields
from pathlib import Path

import torch

from pyro_nbvae.batching import is_pixels, to_floats
from pyro_nbvae.errors import InputError
from pyro_nbvae.study.data.arrays import check_read
from pyro_nbvae.study.data.base import Data, Source, Split, class_labels
from pyro_nbvae.study.data.own import own_source
from pyro_nbvae.study.data.published import PUBLISHED
from pyro_nbvae.study.errors import first_line
from pyro_nbvae.study.files import cached, expanded
from pyro_nbvae.study.tree import DEFAULT_READING, Reading

# All registered data sets.
SOURCES: dict[str, Source] = dict(PUBLISHED)
# Increase this when the same files are prepared differently, so that older cached tensors are not used.
RECIPE = 7


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


def source_of(name: str, reading: Reading = DEFAULT_READING) -> Source:
    """Return the source of a data set.

    Args:
        name: a registered name, a folder of images, or a ``.npy``, ``.npz``, ``.h5ad``, ``.csv`` or ``.tsv`` file
            (:mod:`pyro_nbvae.study.data.own`).
        reading: how a file of the user's own is read.

    Raises:
        InputError: for a name that is none of these.

    Example::

        >>> source_of("cifar16").event_shape
        (3, 16, 16)
    """
    if name in SOURCES:
        check_read(f"{name} says what is held out, and has its labels", reading)
        return SOURCES[name]
    path = expanded(name)
    if (name.strip() and _exists(path)) or path.suffix or len(path.parts) > 1:
        return own_source(path, reading)
    raise InputError(
        f"unknown data {name!r}: choose from {', '.join(SOURCES)}, or name a folder of images, or a .npy, .npz, "
        ".h5ad, .csv or .tsv file"
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


def _checked(data: Data, source: Source, empty: bool = False) -> Data:
    both = (data.training, data.train_labels, "train"), (data.held_out, data.test_labels, "held-out")
    for recording, labels, part in both:
        x = recording.x
        if tuple(x.shape[1:]) != tuple(source.event_shape) or not (len(x) or empty):
            raise ValueError(
                f"{part} data have shape {tuple(x.shape)}, expected (N, {', '.join(map(str, source.event_shape))})"
            )
        if labels is not None and labels.shape != (len(x),):
            raise ValueError(f"{part} labels have shape {tuple(labels.shape)}, expected ({len(x)},)")
        if (
            labels is not None
            and len(labels)
            and not 0 <= int(labels.min()) <= int(labels.max()) < len(data.classes or ())
        ):
            raise ValueError(f"{part} labels must be indices of the classes")
        if x.is_floating_point() and not bool(recording.filled(0).isfinite().all()):
            raise ValueError(f"{part} data hold values that are not finite")
    return data


def load(
    name: str, root: str | Path | None = None, *, download: bool = True, reading: Reading = DEFAULT_READING
) -> Data:
    """Load a data set, from the cache if it has been prepared before.

    Args:
        name: a registered name (``SOURCES``), a folder of images, or a ``.npy``, ``.npz``, ``.h5ad``, ``.csv`` or
            ``.tsv`` file.
        root: folder with the files of registered data sets; see :func:`data_root`.
        download: download missing files into the data root.
        reading: how a file of the user's own is read, and whether a part is held out.

    Raises:
        InputError: for an unknown name, and for files that are missing, not available or damaged.

    Example::

        >>> load("digits").train.shape
        torch.Size([1500, 1, 16, 16])
    """
    source, folder = source_of(name, reading), data_root(root)

    def read() -> Data:
        try:
            split = Split(*source.read(folder))
            sizes = len(split.train), len(split.test)
            labels = class_labels((split.train_labels, split.test_labels), sizes)
            given = dict(split.train_given), dict(split.test_given)
            data = Data(
                name,
                split.train,
                split.test,
                *labels,
                *given,
                split.sessions,
                split.groups,
                split.unused,
                split.is_held_out,
                split.counted,
            )
            return _checked(data.joined() if reading.whole and len(data.test) else data, source, reading.whole)
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
    key = hashlib.sha256(repr((RECIPE, name, reading, made_from)).encode()).hexdigest()[:16]

    def content() -> dict[str, object]:
        data = read()
        return {field.name: getattr(data, field.name) for field in fields(Data)}

    prepared = cached(f"{Path(name).stem}-{key}.pt", content)
    try:
        return _checked(Data(**prepared), source, reading.whole)
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
    units = (" bins", " neurons")[-len(data.event_shape) :] if data.counted else ("",) * len(data.event_shape)
    shape = " x ".join(f"{size}{unit}" for size, unit in zip(data.event_shape, units, strict=True))
    lines = [f"{data.name}: {shape} ({kind})"]
    things, values = ("images" if data.images else "observations"), ("pixels" if pixels else "values")
    train, held_out = (data.train, data.train_labels), (data.test, data.test_labels)
    for part, (x, labels), groups in zip(("train", "held out"), (train, held_out), data.groups, strict=True):
        recording = data.training if part == "train" else data.held_out
        numbers = to_floats(x)
        if recording.mask is not None:
            seen = recording.mask.expand(x.shape)
            x, numbers, hidden = x[seen], numbers[seen], float((~seen).double().mean())
        text = f"{part}: {len(recording)} {things}, {values} {x.min().item():g} to {x.max().item():g}"
        text += f", mean {float(numbers.mean()):.4f}, deviation {float(numbers.std()):.4f}"
        if recording.mask is not None:
            text += f", {hidden:.1%} not observed"
        if labels is None:
            text += ", no labels"
        else:
            names = data.classes or tuple(map(str, range(int(labels.max()) + 1)))
            counts = torch.bincount(labels, minlength=len(names)).tolist()
            shown = names if len(names) <= 5 else (*names[:3], "…", names[-1])
            text += f", {len(names)} classes ({', '.join(shown)}) with {min(counts)} to {max(counts)} {things} each"
        text += "" if groups is None else f", {len(groups.unique())} groups"
        lines.append(text)
    if data.counted:
        known = [*data.train_given, *(["session"] if data.sessions[0] is not None else [])]
        known += ["groups"] if data.groups[0] is not None else []
        lines.append(f"with {', '.join(known)}" if known else "without mask, exposure, covariates, session and groups")
    if hint := unlabelled(data):
        lines.append(hint)
    return "\n".join(lines)


def unlabelled(data: Data) -> str | None:
    """Return how to give the labels of a recording that has some under another name, else None."""
    if not data.unused:
        return None
    names = ", ".join(data.unused)
    return f"no labels, so that conditions are not told apart: the file has {names}; give --labels NAME for one of them"
