"""The interface of relaxations."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import Field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Size, Tensor
from torch.autograd.function import Function, FunctionCtx

if TYPE_CHECKING:
    from pyro_nbvae.distributions.relaxed import RelaxedCount


class DivergedError(ValueError):
    """A sum over counts or a sample that cannot be computed; with validation off it is nan instead."""


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


def check_relaxation(relaxation: Any, kind: type = Relaxation) -> Any:
    """Return the relaxation; raise TypeError if it is neither of this class nor None."""
    if relaxation is not None and not isinstance(relaxation, kind):
        raise TypeError(f"relaxation must be a {kind.__name__} or None, got {relaxation!r}")
    return relaxation


def check_temperature(temperature: float | Tensor) -> None:
    """Check that a temperature is a positive and finite number, or a tensor of such numbers.

    A tensor on a GPU is not checked, because the host would wait for it: samples are nan where it is out of range.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(temperature, Tensor):
        batched = torch._C._functorch.is_batchedtensor(temperature)  # vmap has no single value
        if batched or temperature.device.type != "cpu":
            return
    ends = temperature.detach().aminmax() if isinstance(temperature, Tensor) else (temperature, temperature)
    lowest, highest = map(float, ends)
    if not (lowest > 0 and math.isfinite(highest)):
        raise ValueError(
            f"temperature must be positive and finite, got {temperature}; relaxation=None draws exact integers"
        )


class _Temperature(Function):
    """The present temperature of ``owner.relaxation``; a traced program looks it up at each of its runs.

    It is 1 for a relaxation without one.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, owner: Any, traced: Relaxation | None, like: Tensor) -> Tensor:
        now = owner.relaxation
        if (now and now.at(1.0)) != (traced and traced.at(1.0)):
            raise RuntimeError(
                f"a traced loss such as JitTrace_ELBO keeps its relaxation, {traced}, and follows its temperature "
                f"alone: the relaxation is now {now}; use a new loss, or Trace_ELBO"
            )
        temperature = torch.as_tensor(getattr(now, "temperature", 1.0), dtype=torch.float64, device="cpu")
        return temperature.clone()


def followed(owner: Any, like: Tensor) -> Relaxation | None:
    """Return ``owner.relaxation``; while ``torch.jit`` traces, with a temperature that follows that attribute.

    Args:
        owner: an object whose attribute ``relaxation`` may be changed between steps.
        like: a tensor that the program depends on.
    """
    relaxation: Relaxation | None = owner.relaxation
    if not torch.jit.is_tracing():
        return relaxation
    temperature = _Temperature.apply(owner, relaxation, like.detach())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # that the check of a temperature is not traced
        return relaxation and relaxation.at(temperature)
