"""What the relaxed count distributions share: how they are relaxed, and when they can be differentiated."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_nbvae.distributions.samplers import INDICATORS, RELAXATIONS, Indicator, Relaxation, relaxed_count

Shape: TypeAlias = torch.Size | list[int] | tuple[int, ...]


def check_temperature(temperature: float | Tensor) -> bool:
    """Whether samples at this temperature are relaxed (it is positive) rather than exact (it is 0).

    Raises:
        ValueError: where it is negative or not finite, or 0 in some places only.
    """
    lowest, highest = (float(t) for t in torch.as_tensor(temperature).detach().aminmax())
    if not (lowest >= 0 and math.isfinite(highest)):
        raise ValueError(f"temperature must be non-negative and finite, got {temperature}")
    if lowest == 0 < highest:
        raise ValueError(f"temperature must be positive everywhere or 0 everywhere, got {temperature}")
    return highest > 0


class RelaxedCount:
    """Mixin of a distribution over counts whose samples can be relaxed.

    The distribution beside it provides ``_process(shape)``: the dispersion (None of a Poisson) and the logits (the log
    rate of a Poisson), expanded to that shape; and ``_exact(shape)``, integer samples. Everything about the relaxation
    is here.

    Args:
        temperature: non-negative, a number or a tensor that broadcasts to the batch shape. At 0 (all of it) samples
            are integers, ``has_rsample`` is False, and there is no gradient.
        relaxation: ``"arrival"`` (arrival times) or ``"gumbel"`` (Gumbel-softmax over 0, ..., max_count).
        indicator: ``"sigmoid"`` or ``"smoothstep"``; arrival times only.
        max_count: the largest count of a Gumbel-softmax.
        straight_through: integer samples with the gradient of the relaxed ones.
    """

    support: Any = constraints.nonnegative
    has_rsample: bool
    temperature: float | Tensor
    _RELAXATION_ARGUMENTS = ("relaxation", "indicator", "max_count", "straight_through")

    def _set_relaxation(
        self,
        temperature: float | Tensor,
        relaxation: Relaxation,
        indicator: Indicator,
        max_count: int,
        straight_through: bool,
    ) -> None:
        self.has_rsample = check_temperature(temperature)
        if relaxation not in RELAXATIONS:
            raise ValueError(f"relaxation must be one of {', '.join(RELAXATIONS)}, got {relaxation!r}")
        if indicator not in INDICATORS:
            raise ValueError(f"indicator must be one of {', '.join(INDICATORS)}, got {indicator!r}")
        if max_count < 1:
            raise ValueError(f"max_count must be at least 1, got {max_count}")
        self.temperature = temperature
        self.relaxation = relaxation
        self.indicator = indicator
        self.max_count = max_count
        self.straight_through = straight_through

    def _copy_relaxation(self, other: RelaxedCount) -> None:
        for name in ("temperature", "has_rsample", *self._RELAXATION_ARGUMENTS):
            setattr(self, name, getattr(other, name))

    def rsample(self: Any, sample_shape: Shape = torch.Size()) -> Tensor:
        """Relaxed counts of shape sample_shape + batch_shape, differentiable in the parameters.

        Raises:
            NotImplementedError: at temperature 0.
        """
        if not self.has_rsample:
            raise NotImplementedError(f"{type(self).__name__} at temperature 0 draws integers: there is no rsample")
        total_count, logits = self._process(self._extended_shape(sample_shape))
        arguments = {name: getattr(self, name) for name in self._RELAXATION_ARGUMENTS}
        return relaxed_count(total_count, logits, self.temperature, **arguments)

    def sample(self: Any, sample_shape: Shape = torch.Size()) -> Tensor:
        """Relaxed counts without a gradient; integers at temperature 0."""
        with torch.no_grad():
            if self.has_rsample:
                return self.rsample(sample_shape)
            return self._exact(self._extended_shape(sample_shape))
