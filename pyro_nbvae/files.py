"""Writing files so that they are never half written."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file under a temporary name beside it and renames it, so that ``path`` is never half written."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
        os.replace(part, path)
    except OSError as error:  # a full disk does not say where
        error.filename = error.filename or str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes text, never half of it."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Writes what ``torch.save`` takes, never half of it. A full disk is an OSError, as it is for every other file."""
    import torch

    buffer = io.BytesIO()  # torch.save into a file that cannot grow fails with an error of its own
    torch.save(content, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def cache_root() -> Path:
    """Where what can be made again is kept: the variable NBVAE_CACHE, else the platform's user cache folder."""
    import platformdirs

    return Path(os.environ.get("NBVAE_CACHE") or platformdirs.user_cache_dir("nbvae")).expanduser()


def cached(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` returns, from the cache where it was made before; made again where its file is damaged.

    Args:
        name: of the file; holds a digest of everything that the content depends on.
        make: returns a dictionary that ``torch.save`` takes.
    """
    import torch

    path = cache_root() / name
    try:
        return torch.load(path, weights_only=True)
    except Exception:  # not there, or damaged
        content = make()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not data
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, content)
    return content
