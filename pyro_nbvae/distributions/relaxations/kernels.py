"""Access to the fused samplers, one Triton kernel each, if they can be used."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from pyro_nbvae.distributions.relaxations import fused
    except ImportError:
        return None
    return fused


def fused_kernels(x: Tensor) -> ModuleType | None:
    """Return the module of kernels if ``x`` is on a GPU with Triton and in single precision, else None."""
    return _kernels() if x.is_cuda and x.dtype == torch.float32 else None
