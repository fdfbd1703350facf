"""The Conway-Maxwell-Poisson as functions of counts, the rate and nu: the log weight is nu times a Poisson's."""

from __future__ import annotations

import sys

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_nbvae.distributions.elementwise import register_part
from pyro_nbvae.distributions.families import poisson

arg_constraints = {"rate": constraints.nonnegative, "nu": constraints.positive}
normalized, smooth = False, True
kernels = "com_poisson"
key = register_part(sys.modules[__name__], "ConwayMaxwellPoisson")


def log_weight(k: Tensor, rate: Tensor, nu: Tensor) -> Tensor:
    """Return the log weight nu * log Poisson(k; rate)."""
    none = rate == 0
    log_weight = poisson.log_weight(k, torch.where(none, 1.0, rate)) * nu
    return torch.where(none, torch.zeros_like(log_weight).masked_fill(k > 0, -torch.inf), log_weight)


def scores(k: Tensor, rate: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives of the log weight in rate and nu."""
    limits = torch.finfo(rate.dtype)
    # finite where nu / rate is not: such counts have no mass
    of_rate = ((k - rate) / rate.clamp(min=limits.tiny) * nu).clamp(max=limits.max / 4)
    none = rate == 0
    of_nu = poisson.log_weight(k, torch.where(none, 1.0, rate))
    return of_rate.masked_fill(none, 0), of_nu.masked_fill(none, 0)


def window(nats: float, rate: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the last count of the window."""
    return poisson.window(nats / nu, rate.clamp(min=torch.finfo(rate.dtype).tiny))


def kernel_parameters(rate: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
    """Return rate and nu."""
    return rate, nu
