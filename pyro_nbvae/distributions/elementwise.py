"""Elementwise functions of tensors with hand-written derivatives.

They are differentiable twice and keep their derivatives wherever PyTorch's own functions do: under ``torch.func``
(grad, jacrev, jacfwd, hessian, jvp, vmap, and nests of these), for tensor subclasses (such as those that Pyro's
TraceGraph_ELBO passes), and under ``torch.compile``, where each call is one custom operator.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Size, Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function, FunctionCtx
from torch.overrides import handle_torch_function, has_torch_function

from pyro_nbvae.distributions.threads import unsplit

# Devices without double precision: kernels and samplers compute on the CPU there.
WITHOUT_DOUBLE = ("mps",)
Wanted = Sequence[bool]
Dimensions = Sequence[int | None]


class Context(FunctionCtx):
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
    return x.to("cpu" if x.device.type in WITHOUT_DOUBLE else x.device, torch.float64)


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


def plain(x: Tensor) -> Tensor:
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
            operations; it may be None where ``wanted`` is false.
    """

    name: str
    value: Callable[..., tuple[Tensor, ...]]
    gradient: Callable[..., tuple[Tensor | None, ...]]

    def derivatives(self, arguments: Sequence[Tensor], wanted: Wanted) -> tuple[Tensor, ...]:
        """Return the derivative in each argument, 0 where it is not wanted."""
        found = self.gradient(*arguments, wanted)
        return tuple(torch.zeros_like(a) if d is None else d for d, a in zip(found, arguments, strict=True))


Made = TypeVar("Made")
# What composed names refer to: count families and integrands.
PARTS: dict[str, Any] = {}
_numbers = itertools.count()


class Registry(dict[str, Made]):
    """Things by name, so that custom operators can refer to them.

    One that is composed, "maker/part/part", is made of ``PARTS`` when it is first asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.makers: dict[str, Callable[..., Made]] = {}

    def __missing__(self, name: str) -> Made:
        maker, *parts = name.split("/")
        made = self[name] = self.makers[maker](name, *(PARTS[part] for part in parts))
        return made


KERNELS: Registry[Kernel] = Registry()


def register_part(part: object, name: str) -> str:
    """Put something into ``PARTS``; return its key, which begins with ``name`` and is new."""
    key = f"{name.replace('/', '.')}#{next(_numbers)}"
    PARTS[key] = part
    return key


@contextmanager
def forward_mode() -> Iterator[None]:
    """Context inside a ``jvp``, where PyTorch turns forward mode off: outer transforms would see zero derivatives."""
    with forward_ad._set_fwd_grad_enabled(True):
        yield


_own = threading.local()


@contextmanager
def inside() -> Iterator[None]:
    """Context inside a ``forward``, where :func:`evaluate` calls no other ``forward`` for what needs no gradient.

    ``torch.jit`` would keep that call, and with it what it depends on here, which may not be an operation.
    """
    before, _own.inside = getattr(_own, "inside", False), True
    try:
        yield
    finally:
        _own.inside = before


def primal(x: Tensor) -> Tensor:
    """Return a tensor without its tangent."""
    return forward_ad.unpack_dual(x).primal


def batched(size: int, dims: Dimensions, arguments: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors whose first dimension is the one that vmap maps over, of this size."""
    return [
        a.expand(size, *a.shape) if dim is None else a.movedim(dim, 0) for a, dim in zip(arguments, dims, strict=True)
    ]


def where_double_is(work: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor], *more: Any) -> list[Tensor]:
    """Return ``work(arguments, *more)``, computed on the CPU if the device has no double precision."""
    device = arguments[0].device
    if device.type not in WITHOUT_DOUBLE:
        return list(work(arguments, *more))
    return [part.to(device) for part in work([a.cpu() for a in arguments], *more)]


@torch.compiler.disable
def _compute(kernel: Kernel, arguments: Sequence[Tensor], wanted: Wanted | None = None) -> list[Tensor]:
    """Return the value (and what came with it) or, with ``wanted``, the derivatives."""
    with inside():
        if wanted is None:
            return where_double_is(lambda own: kernel.value(*own), arguments)
        return where_double_is(kernel.derivatives, arguments, wanted)


def has_tangent(x: Tensor) -> bool:
    """Whether a tensor has a tangent of forward mode."""
    return forward_ad.unpack_dual(x).tangent is not None


def refuse_forward_mode() -> None:
    """Raise an error inside forward mode, of which a custom operator would drop the tangents.

    Raises:
        NotImplementedError: inside ``torch.func.jvp``, ``jacfwd`` or a dual level.
    """
    if forward_ad._current_level >= 0:
        raise NotImplementedError("counts have no forward mode under torch.compile: use reverse mode, such as jacrev")


class _Refuse(Function):
    """The identity; its derivative raises an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[str, Tensor], output: Tensor) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[None, Tensor]:
        raise NotImplementedError(ctx.message)

    @staticmethod
    def jvp(ctx: Context, _: None, tangent: Tensor) -> Tensor:
        raise NotImplementedError(ctx.message)


class _DependsOn(Function):
    """Return a gradient unchanged, but as a function of these parameters for autograd."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *parameters: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(p) for p in ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Context, tangent: Tensor, *tangents: Tensor) -> Tensor:
        return tangent.view_as(tangent)


def once(gradient: Tensor, arguments: Sequence[Tensor], message: str) -> Tensor:
    """Return a gradient whose own derivative in these arguments is refused with this message."""
    return _DependsOn.apply(gradient, *(_Refuse.apply(message, a) for a in arguments))


class _Value(Function):
    """The value and, not differentiable, the derivatives that came with it."""

    @staticmethod
    def forward(kernel: Kernel, *arguments: Tensor) -> tuple[Tensor, ...]:
        return tuple(_compute(kernel, arguments))

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.kernel, *arguments = inputs
        ctx.number = len(arguments)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*arguments, *output[1:])
        ctx.save_for_forward(*arguments, *output[1:])

    @staticmethod
    def backward(ctx: Context, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint gives them once
        arguments, derivatives = saved[: ctx.number], saved[ctx.number :]
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or not derivatives:
            derivatives = _Derivatives.apply(ctx.kernel, wanted, *arguments)
        with unsplit():
            return None, *(grad * d if want else None for d, want in zip(derivatives, wanted, strict=True))

    @staticmethod
    def jvp(ctx: Context, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        with forward_mode():
            saved = ctx.saved_tensors
            arguments, others = saved[: ctx.number], saved[ctx.number :]
            wanted = [t is not None for t in tangents]
            derivatives = _Derivatives.apply(ctx.kernel, wanted, *map(primal, arguments))
            terms = [t * d for t, d in zip(tangents, derivatives, strict=True) if t is not None]
            return sum(terms[1:], terms[0]), *(None for _ in others)

    @staticmethod
    def vmap(info: Any, dims: Dimensions, kernel: Kernel, *arguments: Tensor) -> tuple[Sequence[Tensor], Dimensions]:
        output = _Value.apply(kernel, *batched(info.batch_size, dims[1:], arguments))
        return output, tuple(0 for _ in output)


class _Derivatives(Function):
    """The derivative in each argument. Its own derivatives are the second ones, of which the matrix is symmetric."""

    @staticmethod
    def forward(kernel: Kernel, wanted: Wanted, *arguments: Tensor) -> tuple[Tensor, ...]:
        return tuple(_compute(kernel, arguments, wanted))

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.kernel, _, *arguments = inputs
        ctx.save_for_backward(*arguments)
        ctx.save_for_forward(*arguments)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_Curvature.apply(ctx.kernel, *ctx.saved_tensors, *grads)

    @staticmethod
    def jvp(ctx: Context, _: None, __: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        with forward_mode():
            arguments = [primal(a) for a in ctx.saved_tensors]
            given = [torch.zeros_like(a) if t is None else t for a, t in zip(arguments, tangents, strict=True)]
            return _Curvature.apply(ctx.kernel, *arguments, *given)

    @staticmethod
    def vmap(
        info: Any, dims: Dimensions, kernel: Kernel, wanted: Wanted, *arguments: Tensor
    ) -> tuple[Sequence[Tensor], Dimensions]:
        output = _Derivatives.apply(kernel, wanted, *batched(info.batch_size, dims[2:], arguments))
        return output, tuple(0 for _ in output)


class _Curvature(Function):
    """The matrix of second derivatives of each element, times a vector of as many tensors as there are arguments."""

    @staticmethod
    def forward(kernel: Kernel, *arguments: Tensor) -> tuple[Tensor, ...]:
        number = len(arguments) // 2
        with torch.enable_grad():
            # elements of their own: an expanded tensor would have the sum of their derivatives in one
            own = [a.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for a in arguments[:number]]
            first = kernel.gradient(*own, [True] * number)
            terms = zip(first, arguments[number:], strict=True)
            product = sum((d * v).sum() for d, v in terms if d is not None and d.requires_grad)
            if not isinstance(product, Tensor):  # a linear function
                return tuple(map(torch.zeros_like, own))
            found = torch.autograd.grad(product, own, allow_unused=True)
        return tuple(torch.zeros_like(a) if d is None else d for d, a in zip(found, own, strict=True))

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.kernel = inputs[0]

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError(f"{ctx.kernel.name} is differentiable twice: it has no third derivative")

    @staticmethod
    def jvp(ctx: Context, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        raise NotImplementedError(f"{ctx.kernel.name} is differentiable twice: it has no third derivative")

    @staticmethod
    def vmap(info: Any, dims: Dimensions, kernel: Kernel, *arguments: Tensor) -> tuple[Sequence[Tensor], Dimensions]:
        output = _Curvature.apply(kernel, *batched(info.batch_size, dims[1:], arguments))
        return output, tuple(0 for _ in output)


def own_memory(parts: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Return copies of one precision: results of an operator must not share memory, and are as its fake version's."""
    return [part.to(like.dtype, copy=True, memory_format=torch.contiguous_format) for part in parts]


@torch.library.custom_op("pyro_nbvae::elementwise", mutates_args=())
def _operator(name: str, arguments: list[Tensor], derivatives: bool) -> list[Tensor]:
    kernel, number = KERNELS[name], len(arguments)
    output = _compute(kernel, arguments)
    if derivatives and len(output) == 1:
        output += _compute(kernel, arguments, [True] * number)
    return own_memory(output[: 1 + derivatives * number], arguments[0])


@_operator.register_fake
def _(name: str, arguments: list[Tensor], derivatives: bool) -> list[Tensor]:
    like = arguments[0]
    return [like.new_empty(like.shape) for _ in range(1 + derivatives * len(arguments))]


def products_of_saved(operator: Any, leading: int, message: str) -> None:
    """Register the derivative of an operator that returns a value and its derivatives in its list of tensors.

    Args:
        operator: the custom operator; the list is its argument number ``leading``.
        leading: see there; other arguments have no derivative.
        message: of the error if a second derivative is requested.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        ctx.after = len(inputs) - leading - 1
        ctx.number = len(inputs[leading])
        ctx.save_for_backward(*inputs[leading], *output[1:])

    def multiply(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        products = [grads[0] * d for d in saved[ctx.number :]]
        if torch.is_grad_enabled():
            products = [once(p, saved[: ctx.number], message) for p in products]
        return *(None for _ in range(leading)), products, *(None for _ in range(ctx.after))

    operator.register_autograd(multiply, setup_context=save)


products_of_saved(_operator, 1, "counts have no second derivative under torch.compile")


def evaluate(name: str, *arguments: Tensor) -> Tensor:
    """Return the value of a kernel of ``KERNELS``, differentiable in its arguments.

    Args:
        name: its name there.
        *arguments: tensors, which are broadcast and converted to one precision (:func:`promote`).
    """
    if torch.compiler.is_compiling():
        promoted, dtype = promote(*arguments)
        refuse_forward_mode()
        needed = torch.is_grad_enabled() and any(a.requires_grad for a in promoted)
        return torch.ops.pyro_nbvae.elementwise(name, promoted, needed)[0].to(dtype)
    if getattr(_own, "inside", False) and not torch.is_grad_enabled():
        promoted, dtype = promote(*arguments)
        return KERNELS[name].value(*promoted)[0].to(dtype)
    if has_torch_function(arguments):
        return handle_torch_function(evaluate, arguments, name, *arguments)
    promoted, dtype = promote(*map(plain, arguments))
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
