"""Elementwise functions and samplers of tensors, with hand-written derivatives.

Functions are differentiable twice and samples once. They keep their derivatives wherever PyTorch's own functions do:
under ``torch.func`` (grad, jacrev, jacfwd, hessian, jvp, vmap, and nests of these), for tensor subclasses (such as
those that Pyro's TraceGraph_ELBO passes), and under ``torch.compile``, where each call is one custom operator.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function, FunctionCtx
from torch.overrides import handle_torch_function, has_torch_function

from pyro_nbvae.distributions.threads import unsplit

# Devices without double precision: values and samples are computed on the CPU there.
_WITHOUT_DOUBLE = ("mps",)
Wanted = Sequence[bool]
_Dimensions = Sequence[int | None]
_ONCE = "rsample has no second derivative in the parameters of the counts: its samples are differentiable once"
_COMPILED_ONCE = "counts have no second derivative under torch.compile"


class _Context(FunctionCtx):
    """PyTorch's context of a function, with the attributes that its stubs lack and those that are set here."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    kernel: Kernel
    number: int
    message: str


def promote(*tensors: Tensor) -> tuple[list[Tensor], torch.dtype]:
    """Broadcast tensors and convert them to one precision for the computation; also return the precision of the result.

    Integers are treated as the default precision; half precisions are computed in single precision.
    """
    # a number on the CPU goes with any device, as in torch
    device = next((t.device for t in tensors if t.dim()), tensors[0].device)
    tensors = tuple(t if t.dim() else t.to(device) for t in tensors)
    floats = [t.dtype for t in tensors if t.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, floats) if floats else torch.get_default_dtype()
    return [t.to(computed_in(dtype)) for t in torch.broadcast_tensors(*tensors)], dtype


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of the computation for results of this precision: single precision for half precisions."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def full_precision(x: Tensor) -> Tensor:
    """Convert half precisions to single precision; keep others."""
    return x.to(computed_in(x.dtype))


def double(x: Tensor) -> Tensor:
    """Convert to double precision; on the CPU if the device has none."""
    return x.to("cpu" if x.device.type in _WITHOUT_DOUBLE else x.device, torch.float64)


def unexpanded(arguments: Sequence[Tensor], shape: Size) -> tuple[list[Tensor], Tensor]:
    """Flatten tensors of one shape, without the dimensions along which all of them are only expanded.

    Returns:
        The flat tensors, and for each element of the shape its index in them, (n,).
    """
    for dim in range(len(shape)):
        if shape[dim] > 1 and all(a.stride(dim) == 0 for a in arguments):
            arguments = [a.narrow(dim, 0, 1) for a in arguments]
    kept = arguments[0].shape if arguments else torch.Size()
    which = torch.arange(kept.numel(), device=arguments[0].device if arguments else None).reshape(kept)
    return [a.reshape(-1) for a in arguments], which.expand(shape).reshape(-1)


def _plain(x: Tensor) -> Tensor:
    """Return a tensor of a subclass as a plain one, with its gradient; ``Function.apply`` drops those of others."""
    return x if type(x) in (Tensor, torch.nn.Parameter) else x.as_subclass(Tensor)


@dataclass(frozen=True, eq=False)
class Kernel:
    """The value and the derivatives of an elementwise function, for tensors of one shape and precision.

    Args:
        name: its name in ``KERNELS``.
        value: maps the arguments to a tuple: the value, and the derivative in each argument if the same pass computes
            them too.
        gradient: ``gradient(*arguments, wanted)`` returns the derivative in each argument, by differentiable
            operations; it may be None where ``wanted`` is false. None for a sampler, whose ``value`` has the
            derivatives and two arguments more at the front, a seed and a temperature.
    """

    name: str
    value: Callable[..., tuple[Tensor, ...]]
    gradient: Callable[..., tuple[Tensor | None, ...]] | None

    @property
    def leading(self) -> int:
        """The number of arguments without a derivative, at the front."""
        return 2 if self.gradient is None else 0

    def derivatives(self, arguments: Sequence[Tensor], wanted: Wanted) -> tuple[Tensor, ...]:
        """Return the derivative in each argument, 0 where it is not wanted."""
        assert self.gradient is not None
        found = self.gradient(*arguments, wanted)
        return tuple(torch.zeros_like(a) if d is None else d for d, a in zip(found, arguments, strict=True))


# What composed names refer to: count families and integrands.
PARTS: dict[str, Any] = {}
_numbers = itertools.count()


class _Registry(dict[str, Kernel]):
    """Kernels by name, so that custom operators can refer to them.

    One that is composed, "maker/part/part", is made at its first use, of ``PARTS`` or of the words themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.makers: dict[str, Callable[..., Kernel]] = {}

    def __missing__(self, name: str) -> Kernel:
        maker, *parts = name.split("/")
        made = self[name] = self.makers[maker](name, *(PARTS.get(part, part) for part in parts))
        return made


KERNELS = _Registry()


def register_part(part: object, name: str) -> str:
    """Put something into ``PARTS``; return its key, which begins with ``name`` and is new."""
    key = f"{name.replace('/', '.')}#{next(_numbers)}"
    PARTS[key] = part
    return key


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Context inside a ``jvp``, where PyTorch turns forward mode off: outer transforms would see zero derivatives."""
    with forward_ad._set_fwd_grad_enabled(True):
        yield


_own = threading.local()


@contextmanager
def _inside() -> Iterator[None]:
    """Context inside a ``forward``, where :func:`evaluate` calls no other ``forward`` for what needs no gradient.

    ``torch.jit`` would keep that call, and with it what it depends on here, which may not be an operation.
    """
    before, _own.inside = getattr(_own, "inside", False), True
    try:
        yield
    finally:
        _own.inside = before


def _primal(x: Tensor) -> Tensor:
    """Return a tensor without its tangent."""
    return forward_ad.unpack_dual(x).primal


def _batched(size: int, dims: _Dimensions, arguments: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors whose first dimension is the one that vmap maps over, of this size."""
    return [
        a.expand(size, *a.shape) if dim is None else a.movedim(dim, 0) for a, dim in zip(arguments, dims, strict=True)
    ]


def _one_draw(size: int, dims: _Dimensions, seed: Tensor, temperature: Tensor, like: Tensor) -> list[Tensor]:
    """Return the seed and the temperature of a draw of all elements that vmap maps over."""
    if dims[0] is None:
        raise RuntimeError('rsample under vmap draws noise for each element: use vmap(..., randomness="different")')
    if temperature.dim() or dims[1] is not None:
        (temperature,) = _batched(size, dims[1:2], [temperature])
        missing = like.dim() - temperature.dim()
        temperature = temperature.reshape(*temperature.shape, *(1 for _ in range(missing))).expand(like.shape)
    # one of the seeds draws different noise for all elements
    return [seed.select(dims[0], 0), temperature]


@torch.compiler.disable
def _compute(kernel: Kernel, arguments: Sequence[Tensor], wanted: Wanted | None = None) -> list[Tensor]:
    """Return the value (and what came with it) or, with ``wanted``, the derivatives.

    They are computed on the CPU if the device has no double precision.
    """
    device = arguments[-1].device
    there = device.type not in _WITHOUT_DOUBLE
    own = arguments if there else [a.cpu() for a in arguments]
    with _inside():
        found = kernel.value(*own) if wanted is None else kernel.derivatives(own, wanted)
    return list(found) if there else [part.to(device) for part in found]


def _refuse_forward_mode() -> None:
    """Raise an error inside forward mode, of which a custom operator would drop the tangents."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError("counts have no forward mode under torch.compile: use reverse mode, such as jacrev")


class _Refuse(Function):
    """The identity; its derivative raises an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[str, Tensor], output: Tensor) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[None, Tensor]:
        raise NotImplementedError(ctx.message)

    jvp = backward


class _DependsOn(Function):
    """Return a gradient unchanged, but as a function of these parameters for autograd."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *parameters: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(p) for p in ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: _Context, tangent: Tensor, *tangents: Tensor) -> Tensor:
        return tangent.view_as(tangent)


def _once(gradient: Tensor, arguments: Sequence[Tensor], message: str) -> Tensor:
    """Return a gradient whose own derivative in these arguments is an error with this message."""
    return _DependsOn.apply(gradient, *(_Refuse.apply(message, a) for a in arguments))


class _Value(Function):
    """The value and, not differentiable, the derivatives that came with it."""

    @staticmethod
    def forward(kernel: Kernel, *arguments: Tensor) -> tuple[Tensor, ...]:
        return tuple(_compute(kernel, arguments))

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.kernel = inputs[0]
        arguments = inputs[1 + ctx.kernel.leading :]
        ctx.number = len(arguments)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*arguments, *output[1:])
        ctx.save_for_forward(*arguments, *output[1:])

    @staticmethod
    def backward(ctx: _Context, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint gives them once
        arguments, derivatives = saved[: ctx.number], saved[ctx.number :]
        sampled, again = ctx.kernel.gradient is None, torch.is_grad_enabled()
        wanted = ctx.needs_input_grad[1 + ctx.kernel.leading :]
        if not sampled and (again or not derivatives):
            derivatives = _Derivatives.apply(ctx.kernel, wanted, *arguments)
        with unsplit():
            products = [grad * d if want else None for d, want in zip(derivatives, wanted, strict=True)]
        if sampled and again:  # a second derivative may be requested
            products = [None if p is None else _once(p, arguments, _ONCE) for p in products]
        return *(None for _ in range(1 + ctx.kernel.leading)), *products

    @staticmethod
    def jvp(ctx: _Context, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        with _forward_mode():
            saved = ctx.saved_tensors
            own, derivatives = [_primal(a) for a in saved[: ctx.number]], saved[ctx.number :]
            tangents = tangents[ctx.kernel.leading :]
            if ctx.kernel.gradient is None:
                first = [_once(d, own, _ONCE) for d in derivatives]
            else:
                first = _Derivatives.apply(ctx.kernel, [t is not None for t in tangents], *own)
            terms = [t * d for t, d in zip(tangents, first, strict=True) if t is not None]
            return sum(terms[1:], terms[0]), *(None for _ in derivatives)

    @staticmethod
    def vmap(info: Any, dims: _Dimensions, kernel: Kernel, *arguments: Tensor) -> tuple[Sequence[Tensor], _Dimensions]:
        dims, leading = dims[1:], kernel.leading
        own = _batched(info.batch_size, dims[leading:], arguments[leading:])
        given = _one_draw(info.batch_size, dims, arguments[0], arguments[1], own[0]) if leading else []
        output = _Value.apply(kernel, *given, *own)
        return output, tuple(0 for _ in output)


class _Derivatives(Function):
    """The derivative in each argument. Its own derivatives are the second ones, of which the matrix is symmetric."""

    @staticmethod
    def forward(kernel: Kernel, wanted: Wanted, *arguments: Tensor) -> tuple[Tensor, ...]:
        return tuple(_compute(kernel, arguments, wanted))

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.kernel, _, *arguments = inputs
        ctx.save_for_backward(*arguments)
        ctx.save_for_forward(*arguments)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_Curvature.apply(ctx.kernel, *ctx.saved_tensors, *grads)

    @staticmethod
    def jvp(ctx: _Context, _: None, __: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        with _forward_mode():
            arguments = [_primal(a) for a in ctx.saved_tensors]
            given = [torch.zeros_like(a) if t is None else t for a, t in zip(arguments, tangents, strict=True)]
            return _Curvature.apply(ctx.kernel, *arguments, *given)

    @staticmethod
    def vmap(
        info: Any, dims: _Dimensions, kernel: Kernel, wanted: Wanted, *arguments: Tensor
    ) -> tuple[Sequence[Tensor], _Dimensions]:
        output = _Derivatives.apply(kernel, wanted, *_batched(info.batch_size, dims[2:], arguments))
        return output, tuple(0 for _ in output)


_CURVATURE_CHUNK = 1 << 14


def _curvature_of(kernel: Kernel, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the product of :class:`_Curvature` for flat tensors."""
    number = len(arguments) // 2
    with torch.enable_grad():
        # elements of their own: an expanded tensor would have the sum of their derivatives in one
        own = [a.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for a in arguments[:number]]
        first = kernel.derivatives(own, [True] * number)
        terms = zip(first, arguments[number:], strict=True)
        product = sum((d * v).sum() for d, v in terms if d.requires_grad)
        if not isinstance(product, Tensor):  # a linear function
            return tuple(map(torch.zeros_like, own))
        found = torch.autograd.grad(product, own, allow_unused=True)
    return tuple(torch.zeros_like(a) if d is None else d for d, a in zip(found, own, strict=True))


class _Curvature(Function):
    """The matrix of second derivatives of each element, times a vector of as many tensors as there are arguments."""

    @staticmethod
    def forward(kernel: Kernel, *arguments: Tensor) -> tuple[Tensor, ...]:
        shape = arguments[0].shape
        # in chunks, since PyTorch keeps what each of the many operations computes
        pieces = zip(*(a.reshape(-1).split(_CURVATURE_CHUNK) for a in arguments), strict=True)
        products = zip(*(_curvature_of(kernel, piece) for piece in pieces), strict=True)
        return tuple(torch.cat(parts).reshape(shape) for parts in products)

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.kernel = inputs[0]

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor | None) -> tuple[Tensor, ...]:
        raise NotImplementedError(f"{ctx.kernel.name} is differentiable twice: it has no third derivative")

    jvp = backward

    @staticmethod
    def vmap(info: Any, dims: _Dimensions, kernel: Kernel, *arguments: Tensor) -> tuple[Sequence[Tensor], _Dimensions]:
        output = _Curvature.apply(kernel, *_batched(info.batch_size, dims[1:], arguments))
        return output, tuple(0 for _ in output)


def _operator(name: str, leading: list[Tensor], arguments: list[Tensor], derivatives: bool) -> list[Tensor]:
    """Return the value and, if they are asked for, the derivatives.

    They are copies of one precision: results of an operator must not share memory, and are as its fake version's.
    """
    kernel, number = KERNELS[name], len(arguments)
    output = _compute(kernel, [*leading, *arguments])
    if derivatives and len(output) == 1:
        output += _compute(kernel, arguments, [True] * number)
    like = arguments[0]
    kept = output[: 1 + derivatives * number]
    return [part.to(like.dtype, copy=True, memory_format=torch.contiguous_format) for part in kept]


def _fake(name: str, leading: list[Tensor], arguments: list[Tensor], derivatives: bool) -> list[Tensor]:
    like = arguments[0]
    return [like.new_empty(like.shape) for _ in range(1 + derivatives * len(arguments))]


def _register_operator(name: str, message: str, tags: Sequence[torch.Tag] = ()) -> None:
    """Register a custom operator; ``message`` is of the error if a second derivative is requested."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        ctx.leading, ctx.number = len(inputs[1]), len(inputs[2])
        ctx.save_for_backward(*inputs[2], *output[1:])

    def multiply(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        products = [grads[0] * d for d in saved[ctx.number :]]
        if torch.is_grad_enabled():
            products = [_once(p, saved[: ctx.number], message) for p in products]
        return None, [None] * ctx.leading, products, None

    operator = torch.library.custom_op(f"pyro_nbvae::{name}", _operator, mutates_args=(), tags=tags)
    operator.register_fake(_fake)
    operator.register_autograd(multiply, setup_context=save)


_register_operator("elementwise", _COMPILED_ONCE)
_register_operator("draw", _ONCE, (torch.Tag.nondeterministic_seeded,))


def evaluate(name: str, *arguments: Tensor) -> Tensor:
    """Return the value of a function of ``KERNELS``, differentiable in its arguments.

    Args:
        name: its name there.
        *arguments: tensors, which are broadcast and converted to one precision (:func:`promote`).
    """
    if torch.compiler.is_compiling():
        promoted, dtype = promote(*arguments)
        _refuse_forward_mode()
        needed = torch.is_grad_enabled() and any(a.requires_grad for a in promoted)
        return torch.ops.pyro_nbvae.elementwise(name, [], promoted, needed)[0].to(dtype)
    if getattr(_own, "inside", False) and not torch.is_grad_enabled():
        promoted, dtype = promote(*arguments)
        return KERNELS[name].value(*promoted)[0].to(dtype)
    if has_torch_function(arguments):
        return handle_torch_function(evaluate, arguments, name, *arguments)
    promoted, dtype = promote(*map(_plain, arguments))
    return _Value.apply(KERNELS[name], *promoted)[0].to(dtype)


def elementwise(
    name: str,
    value: Callable[..., tuple[Tensor, ...]],
    gradient: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Tensor]:
    """Make a differentiable function of tensors from its value and its gradient; arguments as :class:`Kernel`.

    Returns:
        A function of tensors (:func:`evaluate`).
    """
    KERNELS[name] = Kernel(name, value, gradient)
    return functools.partial(evaluate, name)


def sampler(name: str, draw: Callable[..., Sequence[Tensor]]) -> Kernel:
    """Make a kernel for :func:`pathwise` of ``draw(seed, temperature, *parameters)``.

    It maps the seed, the temperature (either a number, or of the parameters' shape) and parameters of one shape to a
    sample and its derivative in each parameter, of that shape.
    """

    def value(seed: Tensor, temperature: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        with unsplit():
            return tuple(draw(seed, temperature.to(parameters[0], non_blocking=True), *parameters))

    return Kernel(name, value, None)


def pathwise(name: str, *parameters: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Draw a sample with pathwise derivatives in its parameters.

    The seed is a tensor, drawn from torch's generator for the parameters' device. So noise differs from call to call,
    also where a transform such as ``torch.compile`` takes calls with the same arguments as one, and where a CUDA graph
    is replayed; and the host does not wait for the device.

    Args:
        name: a :func:`sampler` of ``KERNELS``.
        *parameters: tensors of one shape, in single or double precision.
        temperature: a number, or a tensor that broadcasts to the parameters.

    Returns:
        The sample, of the parameters' shape; differentiable once.

    Raises:
        NotImplementedError: in the backward pass, if a second derivative in the parameters is requested.
        TypeError: for a temperature that requires a gradient, which it would not get.
        RuntimeError: under ``vmap``, unless its randomness is "different".
    """
    if isinstance(temperature, Tensor) and (
        temperature.requires_grad or forward_ad.unpack_dual(temperature).tangent is not None
    ):
        raise TypeError("the temperature of counts gets no gradient: pass temperature.detach()")
    if has_torch_function(parameters):
        draw = functools.partial(pathwise, name, temperature=temperature)
        return handle_torch_function(draw, parameters, *parameters)
    own = [_plain(p) for p in parameters]
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature.to(own[0]).expand(own[0].shape)
    elif not isinstance(temperature, Tensor):  # torch.full, because torch.tensor waits for a GPU
        temperature = torch.full((), temperature, dtype=own[0].dtype, device=own[0].device)
    seed = torch.randint(1 << 62, (), device=own[0].device)
    if torch.compiler.is_compiling():
        _refuse_forward_mode()
        return torch.ops.pyro_nbvae.draw(name, [seed, temperature], own, True)[0]
    return _Value.apply(KERNELS[name], seed, temperature, *own)[0]
