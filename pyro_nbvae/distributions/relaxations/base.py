"""The interface of relaxations, and samples with known pathwise derivatives."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import Field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Size, Tensor
from torch.autograd.function import Function, FunctionCtx

from pyro_nbvae.distributions.elementwise import Context
from pyro_nbvae.distributions.threads import unsplit

if TYPE_CHECKING:
    from pyro_nbvae.distributions.relaxed import RelaxedCount


class DivergedError(ValueError):
    """Parameters that are not finite, or so large that their counts cannot be computed."""


# More arrivals in one draw are refused: they would take minutes, and are a sign that the parameters have diverged.
MOST_EVENTS = 1_000_000_000


def check_rates(mean: Tensor) -> None:
    """Raise DivergedError if mean counts (n,) are not finite, or if their sum is too large to draw."""
    total = float(mean.sum())
    if not math.isfinite(total):
        raise DivergedError("a rate is not finite")
    if total > MOST_EVENTS:
        raise DivergedError(
            f"the rates require more than {MOST_EVENTS:.0e} arrivals in one draw (largest rate {float(mean.max()):.3g})"
        )


class Relaxation(ABC):
    """Base class of relaxations: how a count is differentiated.

    Pass one to a distribution as ``relaxation``. A subclass is a frozen dataclass that defines :meth:`rsample`. Its
    fields are its options; those that are also in a run's configuration (``temperature``, ``indicator``, ``max_count``,
    ``straight_through``) are set from there.

    A relaxation with a ``temperature`` can be annealed: :meth:`at` returns the same relaxation at another temperature.
    A relaxation without one is returned unchanged. ``coldest`` is the final temperature of annealing by default.

    Example::

        >>> from pyro_nbvae.distributions import ArrivalTimes, Integer
        >>> ArrivalTimes(0.24).at(0.1).temperature, Integer().at(0.1)
        (0.1, Integer())
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    coldest: float | None = None

    @abstractmethod
    def rsample(self, distribution: RelaxedCount, shape: Size) -> Tensor:
        """Draw from a distribution over counts, differentiable in its parameters.

        Args:
            distribution: the distribution to draw from.
            shape: of the result, sample_shape + batch_shape.

        Raises:
            TypeError: for a family that this relaxation cannot draw.
        """

    def at(self, temperature: float | Tensor) -> Relaxation:
        """Return the same relaxation at another temperature."""
        return self


def check_relaxation(relaxation: Relaxation | None) -> Relaxation | None:
    """Return the relaxation; raise TypeError if it is neither a Relaxation nor None."""
    if relaxation is not None and not isinstance(relaxation, Relaxation):
        raise TypeError(f"relaxation must be a Relaxation, such as ArrivalTimes(0.24), or None, got {relaxation!r}")
    return relaxation


def check_temperature(temperature: float | Tensor) -> None:
    """Check that a temperature is a positive and finite number, or a tensor of such numbers.

    Raises:
        TypeError: if it is neither a number nor a tensor, or is an empty tensor.
        ValueError: if it is not positive and finite.
    """
    if not isinstance(temperature, (int, float, Tensor)) or (
        isinstance(temperature, Tensor) and not len(temperature.reshape(-1))
    ):
        raise TypeError(f"temperature must be a number or a tensor of numbers, got {temperature!r}")
    lowest, highest = (float(t) for t in torch.as_tensor(temperature).detach().aminmax())
    if not (lowest > 0 and math.isfinite(highest)):
        raise ValueError(
            f"temperature must be positive and finite, got {temperature}; relaxation=None draws exact integers"
        )


def _check_constant(temperature: float | Tensor) -> None:
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        raise TypeError("the temperature of counts gets no gradient: pass temperature.detach()")


def flat_temperature(temperature: float | Tensor, like: Tensor) -> float | Tensor:
    """Return a number, or one temperature for each element of ``like``, flattened.

    Raises:
        TypeError: for a temperature that requires a gradient, which it would not get.
    """
    _check_constant(temperature)
    if isinstance(temperature, Tensor) and temperature.dim():
        dtype = torch.promote_types(like.dtype, torch.float32)
        return temperature.to(like.device, dtype).expand(like.shape).reshape(-1)
    return temperature


def per_latent(temperature: float | Tensor, like: Tensor) -> Tensor:
    """Return one temperature for each element of ``like``, (n,); errors as :func:`flat_temperature`."""
    _check_constant(temperature)
    if isinstance(temperature, Tensor) and temperature.dim():
        return temperature.to(like).contiguous()
    return torch.full_like(like, float(temperature))


def full_precision(x: Tensor) -> Tensor:
    """Convert half precisions to single precision; keep others."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def exact_counts(rate: Tensor) -> Tensor:
    """Draw Poisson counts; rates saturate at 2^53, the largest number up to which doubles hold every integer."""
    return torch.poisson(rate.clamp(max=2.0**53))


class _Refuse(Function):
    """The identity; its backward pass raises an error."""

    @staticmethod
    def forward(ctx: FunctionCtx, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        raise NotImplementedError(
            "rsample has no second derivative in the parameters of the counts: its samples are differentiable once"
        )


class _DependsOn(Function):
    """Return a gradient unchanged, but as a function of these parameters for autograd."""

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(p) for p in ctx.saved_tensors)


class _Pathwise(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, sampler: Callable[..., Sequence[Tensor]], *parameters: Tensor) -> Tensor:
        with unsplit():
            value, *derivatives = sampler(*(full_precision(p.reshape(-1)) for p in parameters))
            like = parameters[0]
            ctx.save_for_backward(*(d.view(like.shape).to(like.dtype) for d in derivatives), *parameters)
            return value.view(like.shape).to(like.dtype)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        derivatives, parameters = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        with unsplit():
            gradients = [gradient * d for d in derivatives]
        if torch.is_grad_enabled():  # a second derivative may be requested
            refusing = [_Refuse.apply(p) for p in parameters]
            gradients = [_DependsOn.apply(g, *refusing) for g in gradients]
        return None, *gradients


def pathwise(sampler: Callable[..., Sequence[Tensor]], *parameters: Tensor) -> Tensor:
    """Draw a sample with pathwise derivatives in its parameters.

    Args:
        sampler: takes the flattened parameters, and returns a sample and its derivative in each of them, all (n,).
        *parameters: tensors of one shape.

    Returns:
        The sample, of the parameters' shape.

    Raises:
        NotImplementedError: in the backward pass, if a second derivative in the parameters is requested.
    """
    return _Pathwise.apply(sampler, *parameters)
