"""Writing files so that they are never half written."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pyro_nbvae.errors import InputError, first_line


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file under a temporary name beside it and renames it, so that ``path`` is never half written."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # a renamed file must not be an empty one after a power cut
        os.replace(part, path)
    except OSError as error:  # a full disk does not say where
        error.filename = error.filename or str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what a killed process left of :func:`write_atomically`; only for one that holds the folder's lock."""
    for part in folder.glob("*.part"):
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes text, never half of it."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_tensors(path: Path, content: Mapping[str, object]) -> None:
    """Writes what ``torch.save`` takes, never half of it. A full disk is an OSError, as it is for every other file."""
    import torch

    buffer = io.BytesIO()  # torch.save into a file that cannot grow fails with an error of its own
    torch.save(content, buffer)
    data = buffer.getvalue()
    write_atomically(path, lambda file: file.write(data + _MARK + hashlib.sha256(data).hexdigest().encode()))


# Between what torch.save wrote and its digest; torch.load does not mind what follows.
_MARK = b"\nsha256 "


def read_tensors(path: Path) -> dict[str, Any]:
    """Read what :func:`write_tensors` wrote, on the CPU, tensors and plain values alone.

    Raises:
        OSError: for a file that cannot be opened.
        ValueError: for content that is not what was written, to the last bit.
    """
    import torch

    data, mark, digest = path.read_bytes().rpartition(_MARK)
    if mark and hashlib.sha256(data).hexdigest().encode() != digest:
        raise ValueError("its checksum is wrong")
    try:
        content = torch.load(io.BytesIO(data if mark else digest), map_location="cpu", weights_only=True)
        if not mark and zipfile.ZipFile(io.BytesIO(digest)).testzip():  # of a version before checksums
            raise ValueError("its checksum is wrong")
    except Exception as error:
        raise ValueError(first_line(error)) from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    return content


def cache_root() -> Path:
    """Where what can be made again is kept: the variable NBVAE_CACHE, else the platform's user cache folder."""
    import platformdirs

    return expanded(os.environ.get("NBVAE_CACHE") or platformdirs.user_cache_dir("nbvae"))


def expanded(path: str | Path) -> Path:
    """A path with ``~`` replaced.

    Raises:
        InputError: for a user that does not exist.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: {first_line(error)}") from None


def cached(name: str, make: Callable[[], dict[str, object]]) -> dict[str, Any]:
    """What ``make`` returns, from the cache where it was made before; made again where its file is damaged.

    Args:
        name: of the file; holds a digest of everything that the content depends on.
        make: returns a dictionary that ``torch.save`` takes.
    """
    path = cache_root() / name
    try:
        return read_tensors(path)
    except (OSError, ValueError):  # not there, or damaged
        content = make()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not data
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, content)
    return content
