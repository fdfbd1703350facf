"""The kernels of counts: one signature each, in up to three places.

:mod:`~pyro_nbvae.distributions.kernels.reference` states every kernel in a few operations of PyTorch, ``cpu`` has the
compiled loops and ``gpu`` those in Triton. A kernel maps tensors of one shape and precision to a list of the value and
its derivative in each parameter, of that shape. They are nan where a parameter is not allowed. The last dimension is
that of the units, which are alike from one observation to the next: this decides what runs together on a GPU. Those of
``reference`` and ``cpu`` take flat tensors (n,).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyro_nbvae.distributions.kernels import reference


@functools.cache
def _module(name: str) -> Any:
    """Import ``cpu`` or ``gpu`` at its first use, because its compiler takes half a second; None without a compiler."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError:
        return None


def find(name: str, like: Tensor) -> Callable[..., list[Tensor]]:
    """Return the fastest kernel of this name for tensors of this device and precision.

    A meta tensor has no values: the kernels of a GPU, which launch nothing for it, return meta tensors. A tracer, such
    as that of ``torch.func.linearize``, records operations of PyTorch, and would not see what a kernel writes.
    """
    place = None
    if detect_fake_mode() is not None or get_proxy_mode() is not None:
        pass
    elif like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64):
        place = _module("cpu")
    elif like.device.type in ("cuda", "meta") and like.dtype == torch.float32:
        place = _module("gpu")
    return getattr(place, name, None) or getattr(reference, name)


def choose(name: str, like: Tensor) -> Callable[..., list[Tensor]]:
    """Return :func:`find`'s kernel as a function of tensors of the shape of ``like``."""
    kernel = find(name, like)
    if kernel.__module__.endswith(".gpu"):
        return kernel

    def shaped(*arguments: Any) -> list[Tensor]:
        found = kernel(*(a.reshape(-1) if isinstance(a, Tensor) else a for a in arguments))
        return [part.reshape(like.shape) for part in found]

    return shaped


def chosen(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """Return the fastest kernel of this name as a function that chooses it for its first argument, at each call."""
    return lambda *arguments: tuple(choose(name, arguments[0])(*arguments))
