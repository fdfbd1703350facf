"""Gamma draws on the log scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_nbvae.distributions.relaxations.base import SAMPLERS, pathwise
from pyro_nbvae.distributions.relaxations.noise import pieces, unit_exponentials


def _draw(seed: int, parameters: Sequence[Tensor], temperature: None) -> tuple[Tensor, Tensor]:
    """Draw log Gamma(shape, 1), with its derivative: -inf and 0 at shape 0, nan where the shape is not allowed."""
    (given,) = parameters
    positive = (given > 0) & (given < torch.inf)
    shape = torch.where(positive, given, 1.0)
    value, slope = torch.empty_like(shape), torch.empty_like(shape)
    for piece in pieces(len(shape), 4, shape.device):
        a = shape[piece]
        boosted = a + (a < 1)
        draw = torch._standard_gamma(boosted)
        # log U / shape for the draws that are boosted, 0 for the others
        boost = unit_exponentials(1, a)[0].neg_().mul_(a < 1).div_(a)
        value[piece] = draw.log().add_(boost)
        # finite at the smallest shapes too, where the count that is drawn with it is 0
        change = torch._standard_gamma_grad(boosted, draw).div_(draw).sub_(boost.div_(a))
        slope[piece] = change.clamp_(max=torch.finfo(a.dtype).max)
    edge = torch.where(given == 0, 0.0, torch.nan).to(shape.dtype)
    return torch.where(positive, value, edge - torch.inf), torch.where(positive, slope, edge)


SAMPLERS["log_gamma"] = _draw


def log_standard_gamma(shape: Tensor) -> Tensor:
    """Draw the logarithm of a Gamma(shape, 1) variable, differentiable in ``shape`` (Figurnov et al., 2018).

    Small shapes are drawn as Gamma(shape + 1) * U^(1 / shape) on the log scale, because the draws themselves underflow:
    at shape 0.01 nearly half of them are below the smallest single-precision number.

    See also: docs/mathematics.md, section 5.3 (The Gamma draw).
    """
    return pathwise("log_gamma", shape)
