"""Whether the fused forms of the samplers, one Triton kernel each, can be used."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _kernels() -> Any:
    try:
        from pyro_nbvae.distributions.relaxations import fused
    except ImportError:
        return None
    return fused


def fused_kernels(x: Tensor) -> Any:
    """The module of kernels where ``x`` lies on a GPU with Triton in single precision, else None."""
    return _kernels() if x.is_cuda and x.dtype == torch.float32 else None
