r"""Relaxation by Gumbel-softmax over the counts 0, 1, 2, ... (Jang et al., 2017; Maddison et al., 2017).

With :math:`E_k` unit exponentials (:math:`-\log E_k` is a Gumbel variable),

.. math:: w = \mathrm{softmax}\big((\log \mathrm{Poisson}(k; \lambda) - \log E_k) / \tau\big), \qquad z = \sum_k k\,w_k.

For fixed noise :math:`dz / d\log\lambda` is the variance of k under w, divided by :math:`\tau`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

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
from pyro_nbvae.distributions.relaxations.gamma import log_standard_gamma
from pyro_nbvae.distributions.relaxations.kernels import fused_kernels
from pyro_nbvae.distributions.relaxations.noise import Noise, pieces, running_sum, unit_exponentials
from pyro_nbvae.distributions.threads import compiled, in_pieces, is_compiled_for

if TYPE_CHECKING:
    from pyro_nbvae.distributions.relaxed import RelaxedCount

# Counts whose Poisson tail is below exp(-CUT) are left out.
CUT = 20.0
# Warn that a rate is close to max_count if P(count > max_count) may exceed exp(-WARN).
WARN = 7.0


@dataclass(frozen=True)
class GumbelSoftmax(Relaxation):
    r"""Gumbel-softmax relaxation over the counts 0, 1, 2, ....

    .. math:: z = \sum_k k\,w_k, \qquad w = \mathrm{softmax}\big((\log \mathrm{Poisson}(k; \lambda) + g_k) / \tau\big)

    with Gumbel noise :math:`g_k`. Counts of a negative binomial are drawn in two steps: a Gamma-distributed rate with
    implicit reparametrisation gradients (Figurnov et al., 2018), then the count.

    Args:
        temperature: :math:`\tau`, positive; a number, or a tensor that broadcasts to the distribution's batch shape.
        max_count: the largest count; None for no limit. The mass above it is cut off, with a warning if that matters: a
            KL that is then estimated from samples is too small, without a bound. Time grows with the square root of
            the rate either way, because counts far from it are left out.
        straight_through: return integer samples (the arg max), with the gradient of the relaxed ones.

    Raises:
        ValueError: for a temperature or a max_count out of range.
        TypeError: for a temperature that is neither a number nor a tensor.

    Reference: Jang et al., 2017; Maddison et al., 2017.

    See also: docs/mathematics.md, section 5.2 (Gumbel-softmax).

    Example::

        >>> from pyro_nbvae.distributions import RelaxedPoisson
        >>> RelaxedPoisson(torch.ones(3), relaxation=GumbelSoftmax(0.5, max_count=50)).rsample().shape
        torch.Size([3])
    """

    temperature: float | Tensor = 1.0
    max_count: int | None = field(default=None, kw_only=True)
    straight_through: bool = field(default=False, kw_only=True)

    coldest = 0.25  # the gradients are noisy at lower temperatures

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if self.max_count is not None and self.max_count < 1:
            raise ValueError(f"max_count must be at least 1, got {self.max_count}")

    def at(self, temperature: float | Tensor) -> GumbelSoftmax:
        return replace(self, temperature=temperature)

    def rsample(self, distribution: RelaxedCount, shape: Size) -> Tensor:
        """Draw relaxed counts of this shape.

        Counts are nan where a rate is not finite or above 2^24.

        Raises:
            TypeError: for a family that is not a Gamma-Poisson mixture.
        """
        r, logits = distribution.gamma_poisson(shape)
        log_rate = logits if r is None else log_standard_gamma(r) + logits
        options = self.max_count or 0, self.straight_through
        return pathwise("races", log_rate, temperature=self.temperature, options=options)

    def one_hot(self, logits: Tensor) -> Tensor:
        """Draw a point of the simplex for each vector of logits: softmax((logits + Gumbel noise) / temperature).

        Args:
            logits: (..., categories).

        Returns:
            Of the shape of ``logits``; one-hot vectors with ``straight_through``.
        """
        temperature: Any = self.temperature
        if isinstance(temperature, Tensor) and temperature.dim():
            temperature = temperature.unsqueeze(-1)  # one for each vector
        uniform = torch.rand_like(logits).clamp(min=torch.finfo(logits.dtype).tiny)
        soft = ((logits - uniform.log().neg().log()) / temperature).softmax(-1)
        if not self.straight_through:
            return soft
        hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        return hard - soft.detach() + soft


def _draw(
    seed: int, parameters: Sequence[Tensor], temperature: float | Tensor, max_count: int, straight_through: bool
) -> list[Tensor]:
    """Sampler of :class:`GumbelSoftmax`, of a log rate; without a limit ``max_count`` is 0."""

    def sampler(log_rate: Tensor) -> tuple[Tensor, Tensor]:
        rate = log_rate.exp()
        if max_count and len(rate):
            _watch.see(rate.max(), max_count)
        window = gumbel_window(rate, temperature, max_count or None)
        kernels = fused_kernels(log_rate)
        options = temperature, bool(straight_through)
        if kernels is not None:
            return kernels.run_races(seed, log_rate, *window, LARGEST, *options)
        if is_compiled_for(log_rate):
            return compiled_races(seed, log_rate, *window, *options)
        return run_races(log_rate, *window, *options)

    if is_compiled_for(parameters[0]):
        return list(sampler(*parameters))
    rate = parameters[0].exp()
    return draw_where((rate > 0) & (rate <= LARGEST), rate == 0, sampler, *parameters)


SAMPLERS["races"] = _draw


def largest_count(rate: Tensor, nats: float | Tensor) -> Tensor:
    """Return a count k that a Poisson variable reaches with probability at most exp(-nats).

    By Chernoff's bound the probability is below exp(-(k log(k / rate) - k + rate)). Newton's method starts from
    Bernstein's bound, which lies to the right of the root of this convex function, and approaches the root from there.
    """
    rate = rate.clamp(min=1e-30)
    beyond = nats / 3 + torch.sqrt(nats * nats / 9 + 2 * nats * rate)  # k - rate, which rounding leaves accurate
    for _ in range(2):
        slope = torch.log1p(beyond / rate)
        beyond = beyond - ((rate + beyond) * slope - beyond - nats) / slope
    return rate + beyond


def gumbel_window(rate: Tensor, temperature: float | Tensor, max_count: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the first and the last count that are kept for each latent.

    Each tail left out is below exp(-CUT), or exp(-CUT * temperature) for temperatures above 1, which flatten the
    weights. The lower bound is that of a normal variable, which holds for a Poisson: P(k <= rate - t) is at most
    exp(-t^2 / (2 rate)).
    """
    flattened = torch.as_tensor(temperature, dtype=rate.dtype).to(rate.device, non_blocking=True).clamp(min=1)
    nats = CUT * flattened
    last = largest_count(rate, nats).floor()
    if max_count is not None:  # most of the mass that is left of a larger rate is close to max_count
        last, rate = last.clamp(max=max_count), rate.clamp(max=max_count)
    return (rate - torch.sqrt(2 * nats * rate)).clamp(min=0).floor(), last


def run_races(
    log_rate: Tensor,
    first: Tensor,
    last: Tensor,
    temperature: float | Tensor,
    straight_through: bool = False,
    noise: Noise = unit_exponentials,
) -> tuple[Tensor, Tensor]:
    """Draw Gumbel-softmax counts z = sum_k k w_k, w = softmax((log Poisson(k; rate) - log E_k) / temperature).

    E_k are unit exponentials (-log E_k is a Gumbel variable). For fixed E_k, dz / d(log rate) is the variance of k
    under w, divided by the temperature, so only three running sums and a running maximum are kept.

    Args:
        log_rate: (n,).
        first, last: the first and the last count of each latent (:func:`gumbel_window`), (n,).
        temperature: positive number, or (n,).
        straight_through: return the arg max, with the derivative of the soft count.
        noise: draws unit exponentials.

    Returns:
        ``(z, dz)``, both (n,).
    """
    rate = log_rate.exp()
    tau = temperature if isinstance(temperature, Tensor) and temperature.dim() else None
    # Log masses are relative to the first count's, and moments about the rate: both stay accurate at large counts.
    log_mass, top, s0, s1, s2 = (torch.zeros_like(rate) for _ in range(5))
    top.fill_(-math.inf)
    winner = first.clone()
    active: Tensor = torch.arange(len(rate), device=rate.device)
    done, width = 0, 8  # counts of every active latent so far, and in the next round
    while len(active):
        left = []
        steps = torch.arange(done, done + width, dtype=rate.dtype, device=rate.device)[:, None]
        for piece in pieces(len(active), width, rate.device):
            here = active[piece]
            a, start = log_rate[here], first[here]
            k = start + steps
            ratio = a - k.clamp(min=1).log()
            if not done:
                ratio[0] = 0
            mass = running_sum(ratio).add_(log_mass[here])
            log_mass[here] = mass[-1]
            score = (mass - noise(width, a).log_()).div_(temperature if tau is None else tau[here])
            score.masked_fill_(k > last[here], -math.inf)
            before, (best, which) = top[here], score.max(0)
            highest = torch.maximum(before, best)
            winner[here] = torch.where(best > before, start + done + which, winner[here])
            offset, weight, shrink = k - rate[here], (score - highest).exp_(), torch.exp(before - highest)
            for total in (s0, s1, s2):
                total[here] = total[here] * shrink + weight.sum(0)
                weight *= offset
            top[here] = highest
            left.append(here[last[here] >= start + done + width])
        active = torch.cat(left)
        done += width
        width = max(4, done // 4)
    mean = s1.div_(s0)
    dz = s2.div_(s0).sub_(mean * mean).clamp_(min=0).div_(temperature)
    return (winner if straight_through else mean.add_(rate).clamp_(min=0)), dz


def compiled_races(
    seed: int, log_rate: Tensor, first: Tensor, last: Tensor, temperature: float | Tensor, straight_through: bool
) -> tuple[Tensor, Tensor]:
    """The same as :func:`run_races`, by a compiled loop, from a seed."""
    z, dz = torch.empty_like(log_rate), torch.empty_like(log_rate)
    arrays = log_rate.contiguous(), per_latent(temperature, log_rate), first, last, z, dz
    in_pieces(compiled().races, len(log_rate), *arrays, options=(seed, straight_through, LARGEST))
    return z, dz


def _warn_if_cut(largest: Tensor, max_count: int) -> None:
    if bool(largest_count(largest, WARN) > max_count):
        warnings.warn(
            f"a Poisson rate is close to max_count={max_count}: counts above it are cut off, which lowers the mean; "
            "raise max_count, or leave it out (--max-count)",
            RuntimeWarning,
            stacklevel=2,
        )


class _Watch:
    """Checks the largest rates of draws on a GPU once they have reached the host, without waiting for them."""

    def __init__(self) -> None:
        self.coming: list[tuple[torch.cuda.Event, Tensor, int]] = []

    def see(self, largest: Tensor, max_count: int) -> None:
        if not largest.is_cuda:
            _warn_if_cut(largest, max_count)
            return
        host = torch.empty((), dtype=largest.dtype, pin_memory=True).copy_(largest, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(largest.device))
        self.coming.append((event, host, max_count))
        while self.coming and self.coming[0][0].query():
            _, arrived, limit = self.coming.pop(0)
            _warn_if_cut(arrived, limit)


_watch = _Watch()
