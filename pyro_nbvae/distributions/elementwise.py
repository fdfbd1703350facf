"""Elementwise functions of tensors with hand-written derivatives.

They are differentiable twice, and work under ``torch.func`` (grad, jacrev, jacfwd, hessian, jvp, vmap).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function, FunctionCtx

from pyro_nbvae.distributions.threads import unsplit

Wanted = Sequence[bool]


class Context(FunctionCtx):
    """PyTorch's context of a function, with the attributes that its stubs lack and those that are set here."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    number: int
    outputs: int


def promote(*tensors: Tensor) -> tuple[list[Tensor], torch.dtype]:
    """Broadcast tensors and convert them to one precision for the computation; also return the precision of the result.

    Integers are treated as the default precision; half precisions are computed in single precision.
    """
    floats = [t.dtype for t in tensors if t.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, floats) if floats else torch.get_default_dtype()
    compute = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    return [t.to(compute) for t in torch.broadcast_tensors(*tensors)], dtype


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


def elementwise(
    value: Callable[..., tuple[Tensor, ...]], gradient: Callable[..., tuple[Tensor | None, ...]]
) -> Callable[..., Tensor]:
    """Make a differentiable function of tensors of one shape from its value and its gradient.

    Args:
        value: maps the arguments to a tuple: the value, and the derivative in each argument if the same pass computes
            them too.
        gradient: ``gradient(*arguments, wanted)`` returns the derivative in each argument, by differentiable
            operations; it may be None where ``wanted`` is false.

    Returns:
        A function of tensors, which it broadcasts and converts to one precision (:func:`promote`).
    """

    class Elementwise(Function):
        @staticmethod
        def forward(*arguments: Tensor) -> tuple[Tensor, ...]:
            return value(*arguments)

        @staticmethod
        def setup_context(ctx: Context, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            ctx.mark_non_differentiable(*output[1:])
            ctx.save_for_backward(*inputs, *output[1:])
            ctx.save_for_forward(*inputs)
            ctx.number, ctx.outputs = len(inputs), len(output)

        @staticmethod
        def backward(ctx: Context, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
            arguments, saved = ctx.saved_tensors[: ctx.number], ctx.saved_tensors[ctx.number :]
            derivatives = saved if saved and not torch.is_grad_enabled() else gradient(*arguments, ctx.needs_input_grad)
            with unsplit():
                return tuple(None if d is None else grad * d for d in derivatives)

        @staticmethod
        def jvp(ctx: Context, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
            # PyTorch turns forward mode off inside jvp, and outer transforms would then see zero derivatives.
            with forward_ad._set_fwd_grad_enabled(True):
                arguments = [forward_ad.unpack_dual(a).primal for a in ctx.saved_tensors[: ctx.number]]
                derivatives = gradient(*arguments, [t is not None for t in tangents])
                terms = [t * d for t, d in zip(tangents, derivatives, strict=True) if t is not None and d is not None]
                return sum(terms[1:], terms[0]), *(None for _ in range(ctx.outputs - 1))

        @staticmethod
        def vmap(
            info: Any, in_dims: Sequence[int | None], *arguments: Tensor
        ) -> tuple[Sequence[Tensor], Sequence[int]]:
            moved = [
                a.expand(info.batch_size, *a.shape) if dim is None else a.movedim(dim, 0)
                for a, dim in zip(arguments, in_dims, strict=True)
            ]
            output = Elementwise.apply(*moved)
            return output, tuple(0 for _ in output)

    def apply(*arguments: Tensor) -> Tensor:
        promoted, dtype = promote(*arguments)
        return Elementwise.apply(*promoted)[0].to(dtype)

    return apply
