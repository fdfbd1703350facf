"""Constraints of the parameters of counts, with the transforms that torch has for parameters of these kinds."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import ExpTransform, Transform, identity_transform


class _Dispersion(constraints.Constraint):
    """Dispersions from 0, at which every count is 0, to 1e12; unconstrained numbers are their logarithms."""

    def check(self, value: Tensor) -> Tensor:
        return (value >= 0) & (value <= 1e12)

    def __repr__(self) -> str:
        return "from 0 to 1e12"


class _Logits(constraints.Constraint):
    """Logits from -60 to 60, or infinite; unconstrained numbers are the logits."""

    def check(self, value: Tensor) -> Tensor:
        return (value.abs() <= 60) | (value.abs() == torch.inf)

    def __repr__(self) -> str:
        return "from -60 to 60, or infinite"


dispersion, bounded_logits = _Dispersion(), _Logits()


@transform_to.register(_Dispersion)
@biject_to.register(_Dispersion)
def _logarithm(constraint: constraints.Constraint) -> Transform:
    return ExpTransform()


@transform_to.register(_Logits)
@biject_to.register(_Logits)
def _itself(constraint: constraints.Constraint) -> Transform:
    return identity_transform
