r"""Relaxation by arrival times: a count is the number of arrivals before time 1, each counted by a soft indicator.

The arrivals of a Poisson process whose rate is Gamma(r, scale e^l) are a Polya process: with unit exponentials E_j,

.. math:: S_k = \sum_{j<k} \frac{E_j}{r + j}, \qquad u_k = e^{-l} (e^{S_k} - 1),

and the number of u_k < 1 is exactly NB(r, l). The relaxed count is :math:`z = \sum_k h((1 - u_k) / \tau)` with h the
logistic function or the cubic smoothstep. For fixed noise :math:`du_k/dl = -u_k` and
:math:`du_k/dr = -(u_k + e^{-l}) \sum_{j<k} E_j / (r + j)^2`, so that one pass gives the value and the derivatives.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from torch import Size, Tensor

from pyro_nbvae.distributions.elementwise import KERNELS, Kernel, pathwise, sampler
from pyro_nbvae.distributions.kernels import choose
from pyro_nbvae.distributions.kernels.reference import TAIL
from pyro_nbvae.distributions.relaxations.base import Relaxation, check_temperature

if TYPE_CHECKING:
    from pyro_nbvae.distributions.relaxed import RelaxedCount


@dataclass(frozen=True)
class ArrivalTimes(Relaxation):
    r"""Relaxation by arrival times: the arrivals before time 1, each counted by a soft indicator.

    .. math:: z = \sum_k h((1 - u_k) / \tau)

    With h the sigmoid, the mean count is too large by the factor :math:`\tau\,\mathrm{softplus}(1/\tau)` (1.313 at
    temperature 1, 1.0000045 at 0.1). With the smoothstep the mean is exact up to temperature 1.

    Args:
        temperature: :math:`\tau`, positive; a number, or a tensor that broadcasts to the distribution's batch shape.
        indicator: h, ``"sigmoid"`` or ``"smoothstep"``.
        straight_through: return integer samples, with the gradient of the relaxed ones.

    Raises:
        ValueError: for a temperature or an indicator out of range.

    Reference: for the Poisson, Vafaii et al., 2024 (sigmoid) and Ibrahim et al., 2026 (smoothstep).

    See also: docs/mathematics.md, section 5.1 (Arrival times).

    Example::

        >>> import torch
        >>> from pyro_nbvae.distributions import RelaxedPoisson
        >>> RelaxedPoisson(torch.ones(3), relaxation=ArrivalTimes(0.24)).rsample().shape
        torch.Size([3])
    """

    temperature: float | Tensor = 0.24
    indicator: Literal["sigmoid", "smoothstep"] = field(default="sigmoid", kw_only=True)
    straight_through: bool = field(default=False, kw_only=True)

    coldest = 0.05

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if self.indicator not in TAIL:
            raise ValueError(f"indicator must be one of {', '.join(TAIL)}, got {self.indicator!r}")

    def at(self, temperature: float | Tensor) -> ArrivalTimes:
        return replace(self, temperature=temperature)

    def rsample(self, distribution: RelaxedCount, shape: Size) -> Tensor:
        """Draw relaxed counts of this shape.

        Counts are nan where a rate is not finite or above 2^24.

        Raises:
            TypeError: for a family that is not a Gamma-Poisson mixture.
        """
        parameters = [p for p in distribution.gamma_poisson(shape) if p is not None]
        name = f"arrivals/{self.indicator}/{int(self.straight_through)}"
        return pathwise(name, *parameters, temperature=self.temperature)


def _arrivals(name: str, indicator: str, straight_through: str) -> Kernel:
    def draw(seed: Tensor, temperature: Tensor, *parameters: Tensor) -> list[Tensor]:
        *dispersion, logits = parameters
        r = dispersion[0] if dispersion else None
        return choose("arrivals", logits)(seed, temperature, r, logits, indicator, straight_through == "1")

    return sampler(name, draw)


KERNELS.makers["arrivals"] = _arrivals
