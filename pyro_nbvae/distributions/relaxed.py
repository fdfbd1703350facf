"""What the relaxed count distributions share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from pyro.distributions import constraints
from torch import Size, Tensor

from pyro_nbvae.distributions.relaxations.base import Relaxation
from pyro_nbvae.distributions.relaxations.integer import draw_negative_binomial, draw_poisson

Shape: TypeAlias = torch.Size | list[int] | tuple[int, ...]


def as_floats(value: Tensor | float) -> Tensor:
    """A number, or a tensor of integers, in the default precision; a tensor of floats as it is."""
    tensor = torch.as_tensor(value)
    return tensor if isinstance(value, Tensor) and value.is_floating_point() else tensor.to(torch.get_default_dtype())


def floats(*values: Tensor | float) -> list[Tensor]:
    """Each as :func:`as_floats`; numbers take the precision and the device of the first tensor beside them."""
    tensors = [as_floats(v) for v in values]
    like = next((t for t, v in zip(tensors, values, strict=True) if isinstance(v, Tensor)), None)
    if like is None:
        return tensors
    return [t if isinstance(v, Tensor) else t.to(like) for t, v in zip(tensors, values, strict=True)]


class RelaxedCount:
    """Mixin of a distribution over counts whose samples may be relaxed.

    Put it before the exact distribution: ``class RelaxedX(RelaxedCount, X)``. That one provides ``_exact(shape)``,
    integer samples, and, where it is one, :meth:`gamma_poisson`.

    Args:
        relaxation: how samples are differentiated (:mod:`pyro_nbvae.distributions.relaxations`). With None they are
            integers, ``has_rsample`` is False, and there is no gradient.
    """

    support: Any = constraints.nonnegative
    relaxation: Relaxation | None

    def _with_temperature(self, parameter: Tensor | float) -> Tensor | float:
        """A parameter, broadcast with the relaxation's temperature where that is a tensor of several."""
        temperature = getattr(self.relaxation, "temperature", None)
        if not isinstance(temperature, Tensor) or not temperature.dim():
            return parameter
        tensor = as_floats(parameter)
        try:
            return torch.broadcast_tensors(tensor, temperature)[0]
        except RuntimeError:
            raise ValueError(
                f"temperature of shape {tuple(temperature.shape)} does not broadcast with a parameter of shape "
                f"{tuple(tensor.shape)}"
            ) from None

    @property
    def has_rsample(self) -> bool:
        """Whether there is a relaxation."""
        return self.relaxation is not None

    def gamma_poisson(self, shape: Size) -> tuple[Tensor | None, Tensor]:
        """The parameters as a Poisson of a Gamma rate, of that shape: dispersion r and logits l, or None and the log
        rate of a plain Poisson.

        Raises:
            TypeError: for a family that is neither.
        """
        raise TypeError(f"{type(self).__name__} is no Gamma-Poisson mixture: {self.relaxation} cannot relax it")

    def integer_sampler(self, shape: Size) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """What :class:`~pyro_nbvae.distributions.Integer` draws with: a sampler, and its parameters, of that shape.

        The sampler takes the parameters, flat, and returns counts and their derivative in each of them.
        """
        r, logits = self.gamma_poisson(shape)
        return (draw_poisson, (logits,)) if r is None else (draw_negative_binomial, (r, logits))

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, relaxation: {self.relaxation})"

    def rsample(self: Any, sample_shape: Shape = torch.Size()) -> Tensor:
        """Relaxed counts of shape sample_shape + batch_shape, differentiable in the parameters, once.

        Raises:
            NotImplementedError: without a relaxation.
        """
        if self.relaxation is None:
            raise NotImplementedError(
                f"{type(self).__name__} without a relaxation draws integers: it has no rsample. Give one, such as "
                "relaxation=ArrivalTimes(0.24)"
            )
        return self.relaxation.rsample(self, self._extended_shape(sample_shape))

    def sample(self: Any, sample_shape: Shape = torch.Size()) -> Tensor:
        """Relaxed counts without a gradient; integers without a relaxation."""
        with torch.no_grad():
            if self.relaxation is not None:
                return self.rsample(sample_shape)
            return self._exact(self._extended_shape(sample_shape))
