r"""Relaxation by Gumbel-softmax over the counts 0, ..., max_count (Jang et al., 2017; Maddison et al., 2017).

With :math:`E_k` unit exponentials (:math:`-\log E_k` is a Gumbel variable),

.. math:: w = \mathrm{softmax}\big((\log \mathrm{Poisson}(k; \lambda) - \log E_k) / \tau\big), \qquad z = \sum_k k\,w_k.

For fixed noise :math:`dz / d\log\lambda` is the variance of k under w, divided by :math:`\tau`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor

from pyro_nbvae.distributions.relaxations.base import (
    DivergedError,
    Relaxation,
    check_temperature,
    flat_temperature,
    pathwise,
    per_latent,
)
from pyro_nbvae.distributions.relaxations.gamma import log_standard_gamma
from pyro_nbvae.distributions.relaxations.kernels import fused_kernels
from pyro_nbvae.distributions.relaxations.noise import Noise, pieces, put, seed, take, unit_exponentials
from pyro_nbvae.distributions.threads import compiled, in_pieces, is_compiled_for

if TYPE_CHECKING:
    from pyro_nbvae.distributions.relaxed import RelaxedCount

# Counts whose Poisson tail is below exp(-CUT) are left out.
CUT = 20.0
# Warn that a rate is close to max_count if P(count > max_count) may exceed exp(-WARN).
WARN = 7.0


@dataclass(frozen=True)
class GumbelSoftmax(Relaxation):
    r"""Gumbel-softmax relaxation over the counts 0, ..., max_count.

    .. math:: z = \sum_k k\,w_k, \qquad w = \mathrm{softmax}\big((\log \mathrm{Poisson}(k; \lambda) + g_k) / \tau\big)

    with Gumbel noise :math:`g_k`. Counts of a negative binomial are drawn in two steps: a Gamma-distributed rate with
    implicit reparametrisation gradients (Figurnov et al., 2018), then the count.

    Args:
        temperature: :math:`\tau`, positive; a number, or a tensor that broadcasts to the distribution's batch shape.
        max_count: the largest count. Mass above it is cut off, with a warning if that matters. Counts far above a
            latent's rate are left out, so a large value costs nothing.
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
    max_count: int = field(default=1000, kw_only=True)
    straight_through: bool = field(default=False, kw_only=True)

    coldest = 0.25  # the gradients are noisy at lower temperatures

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if self.max_count < 1:
            raise ValueError(f"max_count must be at least 1, got {self.max_count}")

    def at(self, temperature: float | Tensor) -> GumbelSoftmax:
        return replace(self, temperature=temperature)

    def rsample(self, distribution: RelaxedCount, shape: Size) -> Tensor:
        """Draw relaxed counts of this shape.

        Raises:
            DivergedError: for rates that are not finite.
            TypeError: for a family that is not a Gamma-Poisson mixture.
        """
        r, logits = distribution.gamma_poisson(shape)
        log_rate = logits if r is None else log_standard_gamma(r) + logits
        temperature = flat_temperature(self.temperature, log_rate)

        def sampler(flat: Tensor) -> tuple[Tensor, Tensor]:
            if not len(flat):
                return flat.clone(), flat.clone()
            largest = flat.max().exp()
            arguments = (temperature, self.max_count, self.straight_through)
            kernels = fused_kernels(flat)
            if kernels is not None:
                _watch.see(largest, self.max_count)
                return kernels.run_races(flat, gumbel_reach(flat.exp(), temperature), *arguments)
            if not bool(largest.isfinite()):
                raise DivergedError("a rate is not finite")
            _warn_if_cut(largest, self.max_count)
            return (_compiled_races if is_compiled_for(flat) else run_races)(flat, *arguments)

        return pathwise(sampler, log_rate)

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
        return torch.nn.functional.gumbel_softmax(logits, temperature, hard=self.straight_through)


def largest_count(rate: Tensor, nats: float | Tensor) -> Tensor:
    """Return a count k that a Poisson variable reaches with probability at most exp(-nats).

    By Chernoff's bound the probability is below exp(-(k log(k / rate) - k + rate)). Newton's method starts from
    Bernstein's bound, which lies to the right of the root of this convex function, and approaches the root from there.
    """
    rate = rate.clamp(min=1e-30)
    k = rate + nats / 3 + torch.sqrt(nats * nats / 9 + 2 * nats * rate)
    for _ in range(2):
        slope = torch.log(k / rate)
        k = k - (k * slope - k + rate - nats) / slope
    return k


def gumbel_reach(rate: Tensor, temperature: float | Tensor) -> Tensor:
    """Return the largest count that is kept for each latent.

    The tail above it is below exp(-CUT), or exp(-CUT * temperature) for temperatures above 1, which flatten the
    weights.
    """
    flattened = torch.as_tensor(temperature, dtype=rate.dtype).to(rate.device, non_blocking=True).clamp(min=1)
    return largest_count(rate, CUT * flattened)


def run_races(
    log_rate: Tensor,
    temperature: float | Tensor,
    max_count: int,
    straight_through: bool = False,
    noise: Noise = unit_exponentials,
) -> tuple[Tensor, Tensor]:
    """Draw Gumbel-softmax counts z = sum_k k w_k, w = softmax((log Poisson(k; rate) - log E_k) / temperature).

    E_k are unit exponentials (-log E_k is a Gumbel variable). For fixed E_k, dz / d(log rate) is the variance of k
    under w, divided by the temperature, so only three running sums and a running maximum are kept. Counts above a
    latent's :func:`gumbel_reach` are left out.

    Args:
        log_rate: (n,).
        temperature: positive number, or (n,).
        max_count: the largest count.
        straight_through: return the arg max, with the derivative of the soft count.
        noise: draws unit exponentials.

    Returns:
        ``(z, dz)``, both (n,).

    Raises:
        DivergedError: for rates that are not finite.
    """
    rate = log_rate.exp()
    tau = temperature if isinstance(temperature, Tensor) and temperature.dim() else None
    reach = gumbel_reach(rate, temperature)
    top, s0, s1, s2 = (torch.empty_like(rate) for _ in range(4))
    winner = torch.empty_like(rate) if straight_through else None
    # Moments are taken about the rate, so that they stay accurate at large counts.
    centre = rate.clamp_(max=max_count)
    active: Tensor | None = None  # all
    first, width = 0, 8
    while first <= max_count and (active is None or len(active)):
        left = []
        width = min(width, max_count + 1 - first)
        k = torch.arange(first, first + width, dtype=rate.dtype, device=rate.device)
        middle = first + (width - 1) / 2
        powers = torch.stack([torch.ones_like(k), k - middle, (k - middle).square()])
        for piece in pieces(len(rate) if active is None else len(active), width, rate.device):
            here: Any = piece if active is None else active[piece]
            a = take(log_rate, here)
            score = torch.addcmul(-torch.lgamma(k + 1)[:, None], k[:, None], a)
            score = score.sub_(noise(width, a).log_()).div_(temperature if tau is None else take(tau, here))
            highest = score.amax(0)
            which = first + score.argmax(0).to(rate.dtype) if winner is not None else highest
            if active is None:
                m0, m1, m2 = powers @ score.sub_(highest).exp_()
            else:
                before, best = take(top, here), highest
                highest = torch.maximum(before, best)
                m0, m1, m2 = powers @ score.sub_(highest).exp_()
                if winner is not None:
                    which = torch.where(best > before, which, take(winner, here))
            shift = middle - take(centre, here)
            m2 += shift * (2 * m1 + shift * m0)
            m1 += shift * m0
            if active is not None:
                shrink = torch.exp(before - highest)
                m0, m1, m2 = (m + take(s, here) * shrink for m, s in ((m0, s0), (m1, s1), (m2, s2)))
            for total, part in ((top, highest), (s0, m0), (s1, m1), (s2, m2)):
                put(total, here, part)
            if winner is not None:
                put(winner, here, which)
            again = (take(reach, here) >= first + width).nonzero()[:, 0]
            left.append(again + piece.start if active is None else here[again])
        active = torch.cat(left)
        first += width
        width = max(4, first // 4)
    mean = s1.div_(s0)
    dz = s2.div_(s0).sub_(mean * mean).clamp_(min=0).div_(temperature)
    return (mean.add_(centre).clamp_(min=0) if winner is None else winner), dz


def _compiled_races(
    log_rate: Tensor, temperature: float | Tensor, max_count: int, straight_through: bool
) -> tuple[Tensor, Tensor]:
    """The same as :func:`run_races`, by a compiled loop."""
    z, dz = torch.empty_like(log_rate), torch.empty_like(log_rate)
    reach = gumbel_reach(log_rate.exp(), temperature)
    arrays = log_rate.contiguous(), per_latent(temperature, log_rate), reach, z, dz
    in_pieces(compiled().races, len(log_rate), *arrays, options=(seed(), max_count, straight_through))
    return z, dz


def _warn_if_cut(largest: Tensor, max_count: int) -> None:
    if bool(largest_count(largest, WARN) > max_count):
        warnings.warn(
            f"a Poisson rate is close to max_count={max_count}: counts above it are cut off, which lowers the mean; "
            "raise max_count (--max-count), or start from a smaller prior_mean (--prior-mean)",
            RuntimeWarning,
            stacklevel=2,
        )


class _Watch:
    """Checks the largest rates of draws on a GPU once they have reached the host, without waiting for them."""

    def __init__(self) -> None:
        self.coming: list[tuple[torch.cuda.Event, Tensor, int]] = []

    def see(self, largest: Tensor, max_count: int) -> None:
        host = torch.empty((), dtype=largest.dtype, pin_memory=True).copy_(largest, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(largest.device))
        self.coming.append((event, host, max_count))
        while self.coming and self.coming[0][0].query():
            _, arrived, limit = self.coming.pop(0)
            _warn_if_cut(arrived, limit)


_watch = _Watch()
