"""What every relaxation shares: its interface, and a sample that carries the derivatives known beside it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor
from torch.autograd.function import Function, FunctionCtx

from pyro_nbvae.distributions.threads import unsplit

if TYPE_CHECKING:
    from pyro_nbvae.distributions.relaxed import RelaxedCount


class DivergedError(ValueError):
    """Rates that are not finite, or so large that their arrivals cannot be drawn."""


# More arrivals than this in one draw are refused: minutes of work, and the mark of parameters that have diverged.
MOST_EVENTS = 10_000_000_000


def check_rates(mean: Tensor) -> None:
    """Raises DivergedError for mean counts, (n,), that are not finite or of which too many are to be drawn."""
    total = float(mean.sum())
    if not math.isfinite(total):
        raise DivergedError("a rate is not finite")
    if total > MOST_EVENTS:
        raise DivergedError(
            f"the rates call for more than {MOST_EVENTS:.0e} arrivals in one draw (largest rate "
            f"{float(mean.max()):.3g})"
        )


class Relaxation(ABC):
    """How a count is differentiated: one object, given to a distribution as ``relaxation``.

    A subclass is a frozen dataclass. Its fields are its options, and those that a run's configuration has too
    (``temperature``, ``indicator``, ``max_count``, ``straight_through``) are set from there.

    A relaxation with a ``temperature`` can be annealed: :meth:`at` returns the same one at another temperature. One
    without is returned as it is. ``coldest`` is the temperature that training anneals it to by default.
    """

    coldest: float | None = None

    @abstractmethod
    def rsample(self, distribution: RelaxedCount, shape: Size) -> Tensor:
        """Draws of a distribution over counts, of that shape, differentiable in its parameters.

        Raises:
            TypeError: for a family that this relaxation cannot draw.
        """

    def at(self, temperature: float | Tensor) -> Relaxation:
        """The same relaxation at another temperature."""
        return self


def check_relaxation(relaxation: Relaxation | None) -> Relaxation | None:
    """The relaxation; raises TypeError for what is none."""
    if relaxation is not None and not isinstance(relaxation, Relaxation):
        raise TypeError(f"relaxation must be a Relaxation, such as ArrivalTimes(0.24), or None, got {relaxation!r}")
    return relaxation


def check_temperature(temperature: float | Tensor) -> None:
    """Raises an error unless a temperature is a number or a tensor, all of it positive and finite."""
    if not isinstance(temperature, (int, float, Tensor)) or (
        isinstance(temperature, Tensor) and not len(temperature.reshape(-1))
    ):
        raise TypeError(f"temperature must be a number or a tensor of numbers, got {temperature!r}")
    lowest, highest = (float(t) for t in torch.as_tensor(temperature).detach().aminmax())
    if not (lowest > 0 and math.isfinite(highest)):
        raise ValueError(
            f"temperature must be positive and finite, got {temperature}; relaxation=None draws exact integers"
        )


def flat_temperature(temperature: float | Tensor, like: Tensor) -> float | Tensor:
    """A number, or one temperature for each element of ``like``, laid out flat."""
    if isinstance(temperature, Tensor) and temperature.dim():
        return temperature.to(like.dtype).expand(like.shape).reshape(-1)
    return temperature


def per_latent(temperature: float | Tensor, like: Tensor) -> Tensor:
    """One temperature for each element of ``like``, (n,)."""
    if isinstance(temperature, Tensor) and temperature.dim():
        return temperature.to(like).contiguous()
    return torch.full_like(like, float(temperature))


def full_precision(x: Tensor) -> Tensor:
    """Half precisions in single, others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _Refuse(Function):
    """The identity, where no derivative may pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        raise NotImplementedError(
            "rsample has no second derivative in the parameters of the counts: its samples are differentiable once"
        )


class _DependsOn(Function):
    """A gradient as it is, but known to depend on these parameters."""

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(p) for p in ctx.saved_tensors)


class _Pathwise(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, sampler: Callable[..., Any], *parameters: Tensor) -> Tensor:
        with unsplit():
            value, *derivatives = sampler(*(full_precision(p.reshape(-1)) for p in parameters))
            like = parameters[0]
            ctx.save_for_backward(*(d.view(like.shape).to(like.dtype) for d in derivatives), *parameters)
            return value.view(like.shape).to(like.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        derivatives, parameters = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        with unsplit():
            gradients = [gradient * d for d in derivatives]
        if torch.is_grad_enabled():  # a second derivative may be asked for
            refusing = [_Refuse.apply(p) for p in parameters]
            gradients = [_DependsOn.apply(g, *refusing) for g in gradients]
        return None, *gradients


def pathwise(sampler: Callable[..., tuple[Tensor, ...]], *parameters: Tensor) -> Tensor:
    """A sample with pathwise derivatives in its parameters.

    Args:
        sampler: takes the parameters, flat, and returns a sample and its derivative in each of them, all (n,).
        *parameters: tensors of one shape.

    Returns:
        The sample, of the parameters' shape.

    Raises:
        NotImplementedError: when a second derivative in the parameters is asked for.
    """
    return _Pathwise.apply(sampler, *parameters)
