"""Expectations over counts as differentiable functions of the parameters, for any count family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_nbvae.distributions import windows
from pyro_nbvae.distributions.elementwise import KERNELS, Kernel, evaluate, sampler, unexpanded
from pyro_nbvae.distributions.families import Family, negative_binomial
from pyro_nbvae.distributions.kernels import choose, find, reference
from pyro_nbvae.distributions.windows import Integrand, LogQOverP


def _kernel(name: str, value: Callable[..., Sequence[Tensor]], general: Callable[..., Sequence[Tensor]]) -> Kernel:
    """Make a kernel of two functions of tensors of one shape; ``general`` consists of differentiable operations."""

    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        return tuple((general if torch.is_grad_enabled() else value)(*arguments))

    return Kernel(name, run, lambda *arguments_and_wanted: run(*arguments_and_wanted[:-1])[1:])


def _by_kernel(family: Family, what: str) -> Callable[..., list[Tensor]] | None:
    """Return the family's own kernel for what is computed, as a function of its parameters and others; None without."""
    name = f"{family.kernels}_{what}"
    if not hasattr(reference, name):
        return None
    number = len(family.arg_constraints)

    def compute(*arguments: Tensor) -> list[Tensor]:
        own = family.kernel_parameters(*arguments[:number])
        value, *derivatives = choose(name, own[0])(*own, *arguments[number:])
        return [value, *derivatives[:number], *derivatives[len(own) :]]

    return compute


def _of_parameters(
    what: str, work: Callable[[Family, Sequence[Tensor]], list[Tensor]]
) -> Callable[[str, Family], Kernel]:
    def make(name: str, family: Family) -> Kernel:
        def general(*own: Tensor) -> list[Tensor]:
            found = work(family, [p.reshape(-1) for p in own])
            return [part.reshape(own[0].shape) for part in found]

        return _kernel(name, _by_kernel(family, what) or general, general)

    return make


def _mode(family: Family, own: Sequence[Tensor]) -> list[Tensor]:
    return [*windows.mode(family, own), *map(torch.zeros_like, own)]


def _expectation(name: str, family: Family, integrand: Integrand) -> Kernel:
    number = len(family.arg_constraints)

    def flat(arguments: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        shape = arguments[0].shape
        return [p.reshape(-1) for p in arguments[:number]], *unexpanded(arguments[number:], shape)

    def general(*arguments: Tensor) -> list[Tensor]:
        found = windows.expectation(family, integrand, *flat(arguments))
        return [part.reshape(arguments[0].shape) for part in found]

    def by_table(*arguments: Tensor) -> list[Tensor]:
        own, rest, table_row = flat(arguments)
        rate, nu = family.kernel_parameters(*own)
        found = find("com_poisson_kl_by_table", rate)(rate, nu, integrand, rest, table_row)
        return [part.reshape(arguments[0].shape) for part in (*found[: 1 + number], *found[3:])]

    if isinstance(integrand, LogQOverP) and integrand.family is not negative_binomial:
        return _kernel(name, by_table if family.kernels == "com_poisson" else general, general)
    what = "kl" if isinstance(integrand, LogQOverP) else integrand.name
    return _kernel(name, _by_kernel(family, what) or general, general)


def _integers(name: str, family: Family) -> Kernel:
    by_kernel = _by_kernel(family, "integers")

    def draw(seed: Tensor, _: Tensor, *own: Tensor) -> list[Tensor]:
        uniform = torch.rand_like(own[0], memory_format=torch.contiguous_format)
        if by_kernel is not None:
            return by_kernel(*own, uniform)
        found = windows.invert(family, [p.reshape(-1) for p in own], uniform.reshape(-1))
        return [part.reshape(uniform.shape) for part in found]

    return sampler(name, draw)


KERNELS.makers |= {
    "log_normalizer": _of_parameters("log_normalizer", windows.log_normalizer),
    "variance": _of_parameters("variance", windows.variance),
    "mode": _of_parameters("mode", _mode),
    "expectation": _expectation,
    "integers": _integers,
}


def log_normalizer(family: Any, *parameters: Tensor) -> Tensor:
    r"""Return :math:`\log \sum_k w_k`; elementwise in the parameters, differentiable twice."""
    return evaluate(f"log_normalizer/{family.key}", *parameters)


def mode(family: Any, *parameters: Tensor) -> Tensor:
    """Return the most probable count; elementwise in the parameters, of which its derivatives are 0."""
    return evaluate(f"mode/{family.key}", *parameters)


def variance(family: Any, *parameters: Tensor) -> Tensor:
    """Return the variance of the count; elementwise in the parameters, differentiable twice."""
    return evaluate(f"variance/{family.key}", *parameters)


def expectation(family: Any, integrand: Any, *arguments: Tensor) -> Tensor:
    r"""Return :math:`\sum_k q_k f_k`, of a family's parameters and an integrand's arguments.

    It is elementwise and differentiable twice. That ``f`` may depend on :math:`\log q_k` adds nothing to the
    derivative: :math:`E[\partial \log q_k] = 0`.
    """
    return evaluate(f"expectation/{family.key}/{integrand.key}", *arguments)
