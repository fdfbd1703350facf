"""Expectations over counts as differentiable functions of the parameters, for any count family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_nbvae.distributions import windows
from pyro_nbvae.distributions.elementwise import KERNELS, Kernel, evaluate, sampler, unexpanded
from pyro_nbvae.distributions.families import Family
from pyro_nbvae.distributions.kernels import choose
from pyro_nbvae.distributions.windows import Integrand, LogQOverP


def _kernel(name: str, value: Callable[..., Sequence[Tensor]], general: Callable[..., Sequence[Tensor]]) -> Kernel:
    """Make a kernel of functions of flat tensors; ``general`` consists of differentiable operations."""

    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        shape = arguments[0].shape
        work = general if torch.is_grad_enabled() else value
        return tuple(part.reshape(shape) for part in work(shape, *arguments))

    return Kernel(name, run, lambda *arguments_and_wanted: run(*arguments_and_wanted[:-1])[1:])


def _of_parameters(work: Callable[[Family, Sequence[Tensor]], list[Tensor]]) -> Callable[[str, Family], Kernel]:
    def make(name: str, family: Family) -> Kernel:
        def general(_: torch.Size, *own: Tensor) -> list[Tensor]:
            return work(family, [p.reshape(-1) for p in own])

        return _kernel(name, general, general)

    return make


def _mode(family: Family, own: Sequence[Tensor]) -> list[Tensor]:
    return [*windows.mode(family, own), *map(torch.zeros_like, own)]


def _expectation(name: str, family: Family, integrand: Integrand) -> Kernel:
    number = len(family.arg_constraints)

    def flat(shape: torch.Size, arguments: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        return [p.reshape(-1) for p in arguments[:number]], *unexpanded(arguments[number:], shape)

    def general(shape: torch.Size, *arguments: Tensor) -> list[Tensor]:
        return windows.expectation(family, integrand, *flat(shape, arguments))

    def by_kernel(shape: torch.Size, *arguments: Tensor) -> list[Tensor]:
        own, rest, table_row = flat(shape, arguments)
        assert family.as_com_poisson is not None
        rate, nu = family.as_com_poisson(*own)
        found = choose("com_poisson_kl", rate)(rate, nu, integrand, rest, table_row)
        return [*found[: 1 + number], *found[3:]]

    is_kernel = family.as_com_poisson is not None and isinstance(integrand, LogQOverP)
    return _kernel(name, by_kernel if is_kernel else general, general)


def _integers(name: str, family: Family) -> Kernel:
    def draw(seed: int, _: Tensor, *own: Tensor) -> list[Tensor]:
        uniform = torch.rand_like(own[0])
        if family.as_com_poisson is None:
            return windows.invert(family, own, uniform)
        return choose("com_poisson_integers", uniform)(*family.as_com_poisson(*own), uniform)[: 1 + len(own)]

    return sampler(name, draw)


KERNELS.makers |= {
    "log_normalizer": _of_parameters(windows.log_normalizer),
    "variance": _of_parameters(windows.variance),
    "mode": _of_parameters(_mode),
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
