"""The interface of relaxations, and samples with known pathwise derivatives."""

from __future__ import annotations

import functools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import Field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Size, Tensor
from torch.autograd.function import Function, FunctionCtx
from torch.overrides import handle_torch_function, has_torch_function

from pyro_nbvae.distributions.elementwise import (
    Context,
    Dimensions,
    Registry,
    batched,
    forward_mode,
    has_tangent,
    inside,
    once,
    own_memory,
    plain,
    primal,
    products_of_saved,
    refuse_forward_mode,
    where_double_is,
)
from pyro_nbvae.distributions.threads import unsplit

if TYPE_CHECKING:
    from pyro_nbvae.distributions.relaxed import RelaxedCount


class DivergedError(ValueError):
    """A sum over counts or a sample that cannot be computed; with validation off it is nan instead."""


# Largest mean count that arrivals and Gumbel races are drawn for, and largest number of counts of an inversion: counts
# above it are not exact in single precision, and each takes as many steps.
LARGEST = float(1 << 24)


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
    if isinstance(temperature, Tensor) and torch._C._functorch.is_batchedtensor(temperature):
        return  # vmap has no single value
    ends = temperature.detach().aminmax() if isinstance(temperature, Tensor) else (temperature, temperature)
    lowest, highest = map(float, ends)
    if not (lowest > 0 and math.isfinite(highest)):
        raise ValueError(
            f"temperature must be positive and finite, got {temperature}; relaxation=None draws exact integers"
        )


def per_latent(temperature: float | Tensor, like: Tensor) -> Tensor:
    """Return one temperature for each element of ``like``, (n,)."""
    if isinstance(temperature, Tensor):
        return temperature.to(like).contiguous()
    return torch.full_like(like, float(temperature))


def exact_counts(rate: Tensor) -> Tensor:
    """Draw Poisson counts; nan where a rate is negative or nan.

    Rates saturate at 2^53, the largest number up to which doubles hold every integer.
    """
    allowed = rate >= 0
    return torch.poisson(torch.where(allowed, rate, 0).clamp(max=2.0**53)).masked_fill(~allowed, math.nan)


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


SAMPLES = "rsample has no second derivative in the parameters of the counts: its samples are differentiable once"
# Maps a seed, the flattened parameters, a temperature (a number, or one for each latent) and the options to a sample
# and its derivative in each parameter, (n,) each.
Sampler = Callable[..., Sequence[Tensor]]
SAMPLERS: Registry[Sampler] = Registry()


def draw_where(
    fine: Tensor, zero: Tensor, sampler: Callable[..., Sequence[Tensor]], *parameters: Tensor
) -> list[Tensor]:
    """Return ``sampler(*parameters)``: where it is not fine, 0 where the count is surely 0, and else nan.

    No number is read by the host, which would wait for a GPU: where they are not fine, the parameters are set to 1.
    """
    drawn = sampler(*(torch.where(fine, p, 1.0) for p in parameters))
    fill = torch.where(zero, 0.0, math.nan).to(parameters[0].dtype)
    return [torch.where(fine, part, fill) for part in drawn]


@torch.compiler.disable
def _run(
    name: str, options: Sequence[int], seed: Tensor, temperature: Tensor | None, parameters: Sequence[Tensor]
) -> list[Tensor]:
    """Return a sample and its derivatives, of the parameters' shape."""
    shape = parameters[0].shape
    given: float | Tensor | None = None
    if temperature is not None:
        given = temperature.reshape(-1) if temperature.dim() else float(temperature)
    with inside(), unsplit():

        def sampler(flat: Sequence[Tensor]) -> Sequence[Tensor]:
            there = given.to(flat[0].device) if isinstance(given, Tensor) else given
            return SAMPLERS[name](int(seed), flat, there, *options)

        found = where_double_is(sampler, [p.reshape(-1) for p in parameters])
        return [part.reshape(shape) for part in found]


class _Pathwise(Function):
    """A sample and, not differentiable, its derivatives in the parameters."""

    @staticmethod
    def forward(
        name: str, options: Sequence[int], seed: Tensor, temperature: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(_run(name, options, seed, temperature, parameters))

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        parameters = inputs[4:]
        ctx.number = len(parameters)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*parameters, *output[1:])
        ctx.save_for_forward(*parameters, *output[1:])

    @staticmethod
    def backward(ctx: Context, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint gives them once
        parameters, derivatives = saved[: ctx.number], saved[ctx.number :]
        with unsplit():
            gradients = [gradient * d for d in derivatives]
        if torch.is_grad_enabled():  # a second derivative may be requested
            gradients = [once(g, parameters, SAMPLES) for g in gradients]
        return None, None, None, None, *gradients

    @staticmethod
    def jvp(ctx: Context, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        with forward_mode():
            saved = ctx.saved_tensors
            parameters, derivatives = saved[: ctx.number], saved[ctx.number :]
            own = [primal(p) for p in parameters]
            pairs = zip(tangents[4:], derivatives, strict=True)
            terms = [t * once(d, own, SAMPLES) for t, d in pairs if t is not None]
            return sum(terms[1:], terms[0]), *(None for _ in derivatives)

    @staticmethod
    def vmap(
        info: Any,
        dims: Dimensions,
        name: str,
        options: Sequence[int],
        seed: Tensor,
        temperature: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Sequence[Tensor], Dimensions]:
        if dims[2] is None:
            raise RuntimeError('rsample under vmap draws noise for each element: use vmap(..., randomness="different")')
        own = batched(info.batch_size, dims[4:], parameters)
        if temperature is not None and (temperature.dim() or dims[3] is not None):
            (temperature,) = batched(info.batch_size, [dims[3]], [temperature])
            missing = own[0].dim() - temperature.dim()
            temperature = temperature.reshape(*temperature.shape, *(1 for _ in range(missing))).expand(own[0].shape)
        # one of the seeds draws different noise for all elements
        output = _Pathwise.apply(name, options, seed.select(dims[2], 0), temperature, *own)
        return output, tuple(0 for _ in output)


@torch.library.custom_op("pyro_nbvae::draw", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _operator(
    name: str, options: str, seed: Tensor, temperature: Tensor | None, parameters: list[Tensor]
) -> list[Tensor]:
    return own_memory(_run(name, [int(word) for word in options.split()], seed, temperature, parameters), parameters[0])


@_operator.register_fake
def _(name: str, options: str, seed: Tensor, temperature: Tensor | None, parameters: list[Tensor]) -> list[Tensor]:
    like = parameters[0]
    return [like.new_empty(like.shape) for _ in range(1 + len(parameters))]


products_of_saved(_operator, 4, SAMPLES)


def pathwise(
    name: str, *parameters: Tensor, temperature: float | Tensor | None = None, options: Sequence[int] = ()
) -> Tensor:
    """Draw a sample with pathwise derivatives in its parameters.

    The seed is a tensor, drawn from torch's generator for the CPU: so noise differs from call to call also where a
    transform, such as ``torch.compile``, takes calls with the same arguments as one.

    Args:
        name: a sampler of ``SAMPLERS``.
        *parameters: tensors of one shape, in single or double precision.
        temperature: a number, or a tensor that broadcasts to the parameters.
        options: more arguments of the sampler.

    Returns:
        The sample, of the parameters' shape; differentiable once.

    Raises:
        NotImplementedError: in the backward pass, if a second derivative in the parameters is requested.
        TypeError: for a temperature that requires a gradient, which it would not get.
        RuntimeError: under ``vmap``, unless its randomness is "different".
    """
    if isinstance(temperature, Tensor) and (temperature.requires_grad or has_tangent(temperature)):
        raise TypeError("the temperature of counts gets no gradient: pass temperature.detach()")
    if has_torch_function(parameters):
        draw = functools.partial(pathwise, name, temperature=temperature, options=options)
        return handle_torch_function(draw, parameters, *parameters)
    own = [plain(p) for p in parameters]
    if temperature is not None and not (isinstance(temperature, Tensor) and temperature.dim()):
        temperature = torch.as_tensor(temperature, dtype=torch.float64, device="cpu")
    elif temperature is not None:
        temperature = temperature.to(own[0]).expand(own[0].shape)
    seed = torch.randint(1 << 62, (), device="cpu")
    if torch.compiler.is_compiling():
        refuse_forward_mode()
        # in one word: an operator with a list of numbers has another signature where the list is empty
        words = " ".join(str(int(option)) for option in options)
        return torch.ops.pyro_nbvae.draw(name, words, seed, temperature, own)[0]
    return _Pathwise.apply(name, tuple(options), seed, temperature, *own)[0]
