r"""Relaxation by arrival times: a count is the number of arrivals before time 1, each counted by a soft indicator.

The arrivals of a Poisson process whose rate is Gamma(r, scale e^l) are a Polya process: with unit exponentials E_j,

.. math:: S_k = \sum_{j<k} \frac{E_j}{r + j}, \qquad u_k = e^{-l} (e^{S_k} - 1),

and the number of u_k < 1 is exactly NB(r, l). The relaxed count is :math:`z = \sum_k h((1 - u_k) / \tau)` with h the
logistic function or the cubic smoothstep. For fixed noise :math:`du_k/dl = -u_k` and
:math:`du_k/dr = -(u_k + e^{-l}) \sum_{j<k} E_j / (r + j)^2`, so that one pass gives the value and the derivatives.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Size, Tensor

from pyro_nbvae.distributions.relaxations.base import (
    LARGEST,
    SAMPLERS,
    Relaxation,
    check_temperature,
    draw_where,
    pathwise,
    per_latent,
)
from pyro_nbvae.distributions.relaxations.kernels import fused_kernels
from pyro_nbvae.distributions.relaxations.noise import (
    Noise,
    add,
    pieces,
    put,
    running_sum,
    take,
    unit_exponentials,
)
from pyro_nbvae.distributions.threads import compiled, in_pieces, is_compiled_for

if TYPE_CHECKING:
    from pyro_nbvae.distributions.relaxed import RelaxedCount

Indicator = Literal["sigmoid", "smoothstep"]

# Arrivals are drawn up to the first one after 1 + TAIL * temperature. Later arrivals add their conditional mean to a
# sigmoid count (the variance that this neglects is below 2e-4 of the rate at temperature 1) and nothing to a smoothstep
# count.
TAIL: dict[Indicator, float] = {"sigmoid": 4.0, "smoothstep": 1.0}
# Largest number of arrivals per latent in one round.
MOST_AT_ONCE = 4096


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
        TypeError: for a temperature that is neither a number nor a tensor.

    Reference: for the Poisson, Vafaii et al., 2024 (sigmoid) and Ibrahim et al., 2026 (smoothstep).

    See also: docs/mathematics.md, section 5.1 (Arrival times).

    Example::

        >>> from pyro_nbvae.distributions import RelaxedPoisson
        >>> RelaxedPoisson(torch.ones(3), relaxation=ArrivalTimes(0.24)).rsample().shape
        torch.Size([3])
    """

    temperature: float | Tensor = 0.24
    indicator: Indicator = field(default="sigmoid", kw_only=True)
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
        options = self.indicator == "smoothstep", self.straight_through
        return pathwise("arrivals", *parameters, temperature=self.temperature, options=options)


def _draw(
    seed: int, parameters: Sequence[Tensor], temperature: float | Tensor, smoothstep: bool, straight_through: bool
) -> list[Tensor]:
    """Sampler of :class:`ArrivalTimes`: the parameters are the dispersion, unless it is a Poisson, and the logits."""
    indicator: Indicator = "smoothstep" if smoothstep else "sigmoid"

    def sampler(*own: Tensor) -> tuple[Tensor, ...]:
        r, logits = own[0] if len(own) == 2 else None, own[-1]
        options = (temperature, indicator, bool(straight_through))
        kernels = fused_kernels(logits)
        if kernels is not None:
            z, d_logits, d_r = kernels.count_arrivals(seed, r, logits, *options, TAIL[indicator])
        elif is_compiled_for(logits):
            z, d_logits, d_r = compiled_arrivals(seed, r, logits, *options)
        else:
            z, d_logits, d_r = count_arrivals(r, logits, *options)
        return (z, d_logits) if d_r is None else (z, d_r, d_logits)

    if is_compiled_for(parameters[-1]):
        return list(sampler(*parameters))
    rate = functools.reduce(torch.mul, parameters[:-1], parameters[-1].exp())
    return draw_where((rate > 0) & (rate <= LARGEST), rate == 0, sampler, *parameters)


SAMPLERS["arrivals"] = _draw


def horizon(temperature: float | Tensor, indicator: Indicator) -> float | Tensor:
    """Return the time T up to which arrivals are drawn one by one: 1 + c * temperature."""
    return 1 + temperature * TAIL[indicator]


def compiled_arrivals(
    seed: int,
    r: Tensor | None,
    logits: Tensor,
    temperature: float | Tensor,
    indicator: Indicator,
    straight_through: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same as :func:`count_arrivals`, by a compiled loop, from a seed."""
    z, d_logits, d_r = (torch.empty_like(logits) for _ in range(3))
    arrays = (
        (logits if r is None else r).contiguous(),
        logits.contiguous(),
        per_latent(temperature, logits),
        z,
        d_r,
        d_logits,
    )
    options = seed, r is None, indicator == "smoothstep", TAIL[indicator], straight_through, LARGEST
    in_pieces(compiled().arrivals, len(logits), *arrays, options=options)
    return z, d_logits, None if r is None else d_r


def count_arrivals(
    total_count: Tensor | None,
    logits: Tensor,
    temperature: float | Tensor,
    indicator: Indicator,
    straight_through: bool = False,
    noise: Noise = unit_exponentials,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw relaxed counts of the arrivals before time 1, with their derivatives in the parameters.

    The arrivals of a Poisson process whose rate is Gamma(r, scale e^l) are a Polya process: with unit exponentials E_j,
    S_k = sum_{j<k} E_j / (r + j) and u_k = e^-l (e^S_k - 1), #{u_k < 1} is NB(r, l). Without a dispersion u_k is e^-l
    sum_{j<k} E_j, a Poisson process of rate e^l. The relaxed count is z = sum_k h((1 - u_k) / temperature), with h the
    logistic function or the cubic smoothstep. For fixed noise du_k/dl = -u_k and du_k/dr = -(u_k + e^-l) sum_{j<k} E_j
    / (r + j)^2.

    Each latent's arrivals are drawn in rounds of 2, 4, 8, ... until one is later than T (:func:`horizon`). Later
    arrivals add to a sigmoid count their mean given the last arrival drawn, so that the mean and its gradient are
    exact.

    Args:
        total_count: r, (n,), or None for a Poisson process.
        logits: l, (n,); the log rate for a Poisson process.
        temperature: positive number, or (n,).
        straight_through: return the hard count #{u_k < 1}, with the derivatives of the soft one.
        noise: draws unit exponentials.

    Returns:
        ``(z, dz/dl, dz/dr)``, all (n,); the last is None without ``total_count``.
    """
    # The clamp keeps every product finite. Larger rates are not drawn, smaller ones have no arrival.
    scale = torch.exp(-logits.clamp(-80.0, 80.0))
    r = None if total_count is None else total_count.clamp(min=1e-15)
    # `clock` and `drift` are the running sums of E / (r + j) and E / (r + j)^2 so far
    z, d_logits, d_r, clock, drift = (torch.empty_like(logits) for _ in range(5))
    tau = temperature if isinstance(temperature, Tensor) and temperature.dim() else None
    active: Tensor | None = None  # all
    seen, width = 0, 2
    while active is None or len(active):
        left = []
        for piece in pieces(len(logits) if active is None else len(active), width, logits.device):
            here: Any = piece if active is None else active[piece]
            b = take(scale, here)
            gap = noise(width, b)
            if r is not None:
                waiting = take(r, here) + torch.arange(seen, seen + width, dtype=b.dtype, device=b.device)[:, None]
                gap = gap.div_(waiting)
                steps = gap / waiting
                if active is not None:
                    steps[0] += take(drift, here)
                steps = running_sum(steps)
            if active is not None:
                gap[0] += take(clock, here)
            gap = running_sum(gap)
            last = gap[-1].clone()
            u = (gap if r is None else gap.expm1_()).mul_(b).clamp_(max=1e30)
            t = temperature if tau is None else take(tau, here)
            x = (1 - u).div_(t)
            if indicator == "sigmoid":
                h = x.sigmoid_()
                slope = h.addcmul(h, h, value=-1)
            else:
                x = x.clamp_(-1, 1)
                slope = (x * x).sub_(1).mul_(-0.75)
                h = x.mul_((x * x).mul_(-0.25).add_(0.75)).add_(0.5)
            value = ((u < 1).to(h.dtype) if straight_through else h).sum(0)
            in_l = (slope * u).sum(0).div_(t)
            if r is not None:
                in_r = slope.mul_(u + b).mul_(steps).sum(0).div_(t)
            go = u[-1] < horizon(t, indicator)
            if indicator == "sigmoid":
                # Mean contribution of the arrivals after the last one drawn, for latents that are done: after n
                # arrivals up to time u, arrivals come at the rate (r + n) / (e^-l + u).
                end = u[-1]
                rate = 1 / b if r is None else (waiting[-1] + 1) / (b + end)
                rate.mul_(~go)
                # h is the sigmoid of (1 - u) / t, and -log(1 - h) is its softplus; h is small for latents that are done
                small = h[-1].clamp(max=0.5)
                tail = torch.log1p(-small).mul_(rate).mul_(t).neg_()
                flux = rate.mul_(small)
                if not straight_through:
                    value += tail
                in_l += tail + flux * end
                if r is not None:
                    in_r += tail / (waiting[-1] + 1) + steps[-1] * (tail + flux * (b + end))
            add(z, here, value)
            add(d_logits, here, in_l)
            put(clock, here, last)
            if r is not None:
                add(d_r, here, in_r)
                put(drift, here, steps[-1])
            again = go.nonzero()[:, 0]
            left.append(again + piece.start if active is None else here[again])
        active = torch.cat(left)
        seen, width = seen + width, min(2 * width, MOST_AT_ONCE)
    return z, d_logits, None if r is None else d_r
