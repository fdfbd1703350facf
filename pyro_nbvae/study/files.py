"""Atomic file writing, and the cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pyro_nbvae.errors import InputError
from pyro_nbvae.study.errors import first_line

if TYPE_CHECKING:
    import numpy as np


def check_out(path: Path) -> None:
    """Raise InputError if ``--out`` cannot be written: its folder does not exist, or it is a folder."""
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} does not exist: create it, or choose another --out")
    if path.is_dir():
        raise InputError(f"{path} is a folder: --out must be the path of a file")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: under a temporary name in the same folder, then renamed.

    Args:
        path: path of the file.
        write: writes the content to the open file.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # so that the renamed file is not empty after a power failure
        os.replace(part, path)
    except OSError as error:  # the error of a full disk does not name the file
        error.filename = error.filename or str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove temporary files of a killed process. The caller must hold the lock of the folder."""
    for part in folder.glob("*.part"):
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Write a ``.npz`` file atomically, and return its path."""
    import numpy as np

    write_atomically(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
    return path


def write_tensors(path: Path, content: Mapping[str, object]) -> None:
    """Write a dictionary with ``torch.save``, atomically and with a checksum. Raise OSError if the disk is full."""
    import torch

    buffer = io.BytesIO()  # torch.save to a full disk raises another kind of error
    torch.save(content, buffer)
    data = buffer.getvalue()
    write_atomically(path, lambda file: file.write(data + _MARK + hashlib.sha256(data).hexdigest().encode()))


# Separates the output of torch.save from its checksum; torch.load ignores what follows.
_MARK = b"\nsha256 "


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a file of :func:`write_tensors`, on the CPU; only tensors and plain values are accepted.

    Raises:
        OSError: for a file that cannot be opened.
        ValueError: for content that is damaged.
    """
    import torch

    data, mark, digest = path.read_bytes().rpartition(_MARK)
    if mark and hashlib.sha256(data).hexdigest().encode() != digest:
        raise ValueError("its checksum is wrong")
    try:
        content = torch.load(io.BytesIO(data if mark else digest), map_location="cpu", weights_only=True)
        if not mark and zipfile.ZipFile(io.BytesIO(digest)).testzip():  # written before files had checksums
            raise ValueError("its checksum is wrong")
    except Exception as error:
        raise ValueError(first_line(error)) from error
    if not isinstance(content, dict):
        raise ValueError(f"it contains a {type(content).__name__}, expected a dictionary")
    return content


def cache_root() -> Path:
    """Return the cache folder: the environment variable NBVAE_CACHE, else the platform's user cache folder."""
    import platformdirs

    return expanded(os.environ.get("NBVAE_CACHE") or platformdirs.user_cache_dir("nbvae"))


def expanded(path: str | Path) -> Path:
    """Return a path with ``~`` replaced by the home folder.

    Raises:
        InputError: for a user that does not exist.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: {first_line(error)}") from None


def cached(name: str, make: Callable[[], dict[str, object]]) -> dict[str, Any]:
    """Return the result of ``make``, from the cache if it is there and not damaged.

    Args:
        name: name of the file; it must contain a hash of everything that the content depends on.
        make: returns a dictionary that ``torch.save`` accepts.
    """
    path = cache_root() / name
    try:
        return read_tensors(path)
    except (OSError, ValueError):  # missing or damaged
        content = make()
    with contextlib.suppress(OSError):  # without a writable cache the result is only computed again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, content)
    return content
