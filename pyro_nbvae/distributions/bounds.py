"""Bounds of what networks say about a distribution's parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BOUND = 5.0


def bounded(h: Tensor) -> Tensor:
    """Bound a network's outputs smoothly to the range from -5 to 5; 0 stays 0, with slope 1.

    See also: docs/mathematics.md, section 7.1 (Bounds of the encoder).
    """
    return _BOUND * torch.tanh(h / _BOUND)


def rate_multiplier(h: Tensor) -> Tensor:
    r"""Return the multiplier of a rate for an encoder's output h: :math:`\log_2(1 + 4^h)`.

    At h = 0 it is 1 with slope 1, like :math:`e^h`. For negative h it decreases exponentially; for large h it
    approaches 2h, so that large counts are as easy to learn as the location of a Gaussian.

    Args:
        h: an encoder's outputs, of any shape.

    Returns:
        Positive tensor of the same shape.

    See also: docs/mathematics.md, section 2.5 (From the prior to the posterior).

    Example::

        >>> [round(g, 3) for g in rate_multiplier(torch.tensor([-3.0, 0.0, 3.0])).tolist()]
        [0.022, 1.0, 6.022]
    """
    return torch.nn.functional.softplus(2 * math.log(2) * h) / math.log(2)
