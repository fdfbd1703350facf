"""The kernels of counts: one signature each, in up to three places.

:mod:`~pyro_nbvae.distributions.kernels.reference` states every kernel in a few operations of PyTorch, ``cpu`` has the
compiled loops and ``gpu`` those in Triton. A kernel maps flat tensors (n,) of one precision to a list of the value and
its derivative in each parameter, (n,) each. They are nan where a parameter is not allowed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_nbvae.distributions.kernels import reference


@functools.cache
def _module(name: str) -> Any:
    """Import ``cpu`` or ``gpu`` at its first use, because its compiler takes half a second; None without a compiler."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError:
        return None


def choose(name: str, like: Tensor) -> Callable[..., list[Tensor]]:
    """Return the fastest kernel of this name for tensors of this device and precision."""
    place = None
    if like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64):
        place = _module("cpu")
    elif like.is_cuda and like.dtype == torch.float32:
        place = _module("gpu")
    return getattr(place, name, None) or getattr(reference, name)
