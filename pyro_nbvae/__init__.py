"""Variational autoencoders whose latents are overdispersed spike counts, as Pyro programs."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyro_nbvae.vae import AmortizedGuide, GenerativeModel

__version__ = version("pyro-nbvae")


def load(path: str | Path, device: str = "auto") -> tuple[GenerativeModel, AmortizedGuide]:
    """Model and guide of a trained run, in evaluation mode: :func:`pyro_nbvae.runs.folder.load`."""
    from pyro_nbvae.runs.folder import load

    return load(path, device)
