"""The relaxed Poisson, the limit of the negative binomial at infinite dispersion (DESIGN 3.5)."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Poisson, constraints
from torch import Size, Tensor
from torch.distributions import register_kl

from pyro_nbvae.distributions.kl import poisson_kl
from pyro_nbvae.distributions.relaxed import RelaxedCount, Shape
from pyro_nbvae.distributions.samplers import Indicator, Relaxation
from pyro_nbvae.distributions.special import poisson_log_prob


class RelaxedPoisson(RelaxedCount, Poisson):
    r"""A Poisson whose samples are relaxed counts with pathwise gradients in the rate (DESIGN 3.5).

    ``mean``, ``variance`` and ``log_prob`` (continued through the gamma function) are the exact Poisson's; the
    support is the non-negative reals.

    Args:
        rate: mean count, positive.
        temperature, relaxation, indicator, max_count, straight_through: see
            :class:`~pyro_nbvae.distributions.relaxed.RelaxedCount`.

    Raises:
        ValueError: for a rate or temperature out of range or a relaxation that does not exist.
    """

    arg_constraints = {"rate": constraints.positive}
    support: Any = constraints.nonnegative

    def __init__(
        self,
        rate: Tensor | float,
        *,
        temperature: float | Tensor,
        relaxation: Relaxation = "arrival",
        indicator: Indicator = "sigmoid",
        max_count: int = 100,
        straight_through: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        self._set_relaxation(temperature, relaxation, indicator, max_count, straight_through)
        rate = torch.as_tensor(rate, dtype=None if isinstance(rate, Tensor) else torch.get_default_dtype())
        if isinstance(temperature, Tensor) and temperature.dim():
            rate, _ = torch.broadcast_tensors(rate, temperature)
        super().__init__(rate, validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> RelaxedPoisson:
        new = self._get_checked_instance(RelaxedPoisson, _instance)
        new._copy_relaxation(self)
        return super().expand(batch_shape, _instance=new)

    def _process(self, shape: Size) -> tuple[None, Tensor]:
        return None, self.rate.log().expand(shape)

    def _exact(self, shape: Size) -> Tensor:
        return torch.poisson(self.rate.expand(shape))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return poisson_log_prob(value, self.rate)


@register_kl(RelaxedPoisson, RelaxedPoisson)
def _kl_relaxed_poisson(q: RelaxedPoisson, p: RelaxedPoisson) -> Tensor:
    return poisson_kl(q.rate, p.rate)
