"""Poisson draws, and Gamma draws on the log scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_nbvae.distributions.elementwise import KERNELS, pathwise, sampler
from pyro_nbvae.distributions.windows import chunks

# A GPU draws counts of rates above this from rounded normals: torch.poisson has 32-bit counts there.
_LARGE = 2.0**24
# Devices on which torch.poisson draws at every rate. A CPU has 64-bit counts; their variance was accurate up to rates
# of 1e13, about 1 % off at 1e15 and 20 % at 2^53. MPS was not measured.
_EXACT = ("cpu", "mps")


def exact_counts(rate: Tensor) -> Tensor:
    """Draw Poisson counts; nan where a rate is negative or nan.

    Rates saturate at 2^53, the largest number up to which doubles hold every integer.
    """
    allowed = rate >= 0
    given = torch.where(allowed, rate, 0).clamp(max=2.0**53)
    counts = torch.poisson(given) if rate.device.type in _EXACT else _counts_of_a_gpu(given)
    return counts.masked_fill(~allowed, math.nan)


def _counts_of_a_gpu(rate: Tensor) -> Tensor:
    """Draw Poisson counts where ``torch.poisson`` saturates at 32 bits; the host waits for no value."""
    small = torch.poisson(rate.clamp(max=_LARGE))
    # A normal variable with the Poisson's skewness (Cornish and Fisher), rounded: its distribution function differs
    # from the Poisson's by O(1 / rate), below 1e-7 here.
    large = rate.detach().double()
    g = torch.randn_like(large)
    drawn = (large + large.sqrt() * g + (g * g - 1) / 6).round_()
    return torch.where(rate > _LARGE, drawn.to(rate.dtype), small)


def _draw(seed: Tensor, temperature: Tensor, shape: Tensor) -> list[Tensor]:
    """Draw log Gamma(shape, 1), with its derivative: -inf and 0 at shape 0, nan where the shape is not allowed."""
    given = shape.reshape(-1)
    positive = (given > 0) & (given < torch.inf)
    ordinary = torch.where(positive, given, 1.0)
    value, slope = torch.empty_like(ordinary), torch.empty_like(ordinary)
    for chunk in chunks(len(ordinary), 4, ordinary.device):
        a = ordinary[chunk]
        boosted = a + (a < 1)
        draw = torch._standard_gamma(boosted)
        # log U / shape for the draws that are boosted, 0 for the others
        # rand returns multiples of eps / 2 in [0, 1); its 0 stands for all values below half of that
        boost = torch.rand_like(a).clamp_(min=torch.finfo(a.dtype).eps / 4).log_().mul_(a < 1).div_(a)
        value[chunk] = draw.log().add_(boost)
        # finite at the smallest shapes too, where the count that is drawn with it is 0
        change = torch._standard_gamma_grad(boosted, draw).div_(draw).sub_(boost.div_(a))
        slope[chunk] = change.clamp_(max=torch.finfo(a.dtype).max)
    edge = torch.where(given == 0, 0.0, torch.nan).to(shape.dtype)
    drawn = torch.where(positive, value, edge - torch.inf), torch.where(positive, slope, edge)
    return [part.reshape(shape.shape) for part in drawn]


KERNELS["log_gamma"] = sampler("log_gamma", _draw)


def log_standard_gamma(shape: Tensor) -> Tensor:
    """Draw the logarithm of a Gamma(shape, 1) variable, differentiable in ``shape`` (Figurnov et al., 2018).

    Small shapes are drawn as Gamma(shape + 1) * U^(1 / shape) on the log scale, because the draws themselves underflow:
    at shape 0.01 nearly half of them are below the smallest single-precision number.

    See also: docs/mathematics.md, section 5.3 (The Gamma draw).
    """
    return pathwise("log_gamma", shape)
