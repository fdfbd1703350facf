"""Pathwise samples of relaxed Poisson counts, value and derivative in one pass (DESIGN 3.5).

A sampler maps a log rate to a count. Each is a custom autograd function that works through bounded pieces of noise
and keeps only dz / d(log rate), so that its backward pass is one multiplication. The noise comes from a generator
function of its own (:func:`arrivals`, :func:`races`), which makes the reductions deterministic given the noise.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable
from torch.nn.functional import softplus

Relaxation = Literal["arrival", "gumbel"]
Indicator = Literal["sigmoid", "smoothstep"]
RELAXATIONS: tuple[Relaxation, ...] = ("arrival", "gumbel")
INDICATORS: tuple[Indicator, ...] = ("sigmoid", "smoothstep")

# Arrivals later than 1 + SOFT_TAIL * temperature enter a sigmoid count through their mean alone. Their share of the
# variance, rate * temperature * exp(-2 * SOFT_TAIL) / 2, is 2e-4 of the rate at temperature 1.
SOFT_TAIL = 4.0
# Events, or races, in one piece of noise: the working memory, whatever the rates.
PIECE = 1 << 17
# More arrivals than this in one draw are refused: minutes of work, and the mark of parameters that have diverged.
MOST_EVENTS = 10_000_000_000
# Counts whose Poisson tail is below exp(-GUMBEL_CUT) take no part in a Gumbel race.
GUMBEL_CUT = 20.0
# The warning that a rate nears max_count comes where P(count > max_count) may exceed exp(-GUMBEL_WARN).
GUMBEL_WARN = 7.0


class DivergedError(ValueError):
    """Rates that are not finite, or so large that their arrivals cannot be drawn."""


# --- arrival times -------------------------------------------------------------------------------------------------


def horizon(temperature: float | Tensor, indicator: Indicator) -> float | Tensor:
    """The time T after which arrivals are not drawn one by one: 1 + c * temperature."""
    return 1 + temperature * (SOFT_TAIL if indicator == "sigmoid" else 1.0)


def arrivals(rate: Tensor, until: float | Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Arrival times of unit-interval Poisson processes, all latents laid out flat.

    Given their number on [0, T], the arrivals are independent and uniform there, so no running sum is needed.

    Args:
        rate: (n,) expected arrivals on [0, 1].
        until: the horizon T; a number, or (n,).

    Yields:
        ``(index, time)``, both of one length of at most ``PIECE``: arrival ``time`` belongs to latent ``index``.

    Raises:
        DivergedError: for rates that are not finite, and for more than ``MOST_EVENTS`` arrivals.
    """
    try:
        counts = torch.poisson(rate * until).long()
    except RuntimeError as error:  # torch's own check: a rate that is not a number
        raise DivergedError("a Poisson rate is not finite") from error
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    if not 0 <= total <= MOST_EVENTS:
        raise DivergedError(
            f"the rates call for more than {MOST_EVENTS:.0e} arrivals in one draw (largest rate "
            f"{float(rate.max()):.3g})"
        )
    for start in range(0, total, PIECE):
        stop = min(start + PIECE, total)
        if stop - start == total:
            first, inside = 0, counts
        else:  # the latents with arrivals in this piece, the first and the last of them perhaps in part
            bounds = torch.searchsorted(ends, torch.tensor([start, stop - 1], device=ends.device), right=True)
            first, last = int(bounds[0]), int(bounds[1]) + 1
            inside = torch.diff(ends[first:last].clamp(max=stop), prepend=ends.new_tensor([start]))
        index = torch.arange(first, first + len(inside), device=rate.device)
        index = torch.repeat_interleave(index, inside, output_size=stop - start)
        time = torch.rand(stop - start, dtype=rate.dtype, device=rate.device)
        yield index, time * (until[index] if isinstance(until, Tensor) and until.dim() else until)


def count_arrivals(
    events: Iterable[tuple[Tensor, Tensor]],
    rate: Tensor,
    temperature: float | Tensor,
    indicator: Indicator,
    straight_through: bool = False,
) -> tuple[Tensor, Tensor]:
    """Relaxed counts of the arrivals before time 1, and their derivative in the log rate.

    z = sum_k h((1 - S_k) / temperature), h the logistic function or the cubic smoothstep. With the unit-rate arrivals
    rate * S_k held fixed, dz / d(log rate) = sum_k h'(x_k) S_k / temperature.

    Args:
        events: what :func:`arrivals` yields, up to :func:`horizon`.
        rate: (n,); ``temperature``: positive number, or (n,).
        straight_through: return the hard count #{S_k < 1}, with the derivative of the soft one.

    Returns:
        ``(z, dz)``, both (n,).
    """
    z, dz = torch.zeros_like(rate), torch.zeros_like(rate)
    per_latent = isinstance(temperature, Tensor) and temperature.dim() > 0
    for index, time in events:
        tau = temperature[index] if per_latent else temperature  # type: ignore[index]
        x = (1 - time) / tau
        if indicator == "sigmoid":
            h = torch.sigmoid(x)
            slope = h * (1 - h)
        else:
            x = x.clamp(-1, 1)
            square = x * x
            h = 0.5 + x * (0.75 - 0.25 * square)
            slope = 0.75 * (1 - square)
        dz.index_add_(0, index, slope * time / tau)
        z.index_add_(0, index, (time < 1).to(h.dtype) if straight_through else h)
    if indicator == "sigmoid":
        # The mean of what arrives after T; the second term of the derivative is the flux across T.
        until = horizon(temperature, indicator)
        ratio = torch.as_tensor((1 - until) / temperature, dtype=rate.dtype, device=rate.device)
        beyond = rate * temperature * softplus(ratio)
        dz += beyond + rate * until * torch.sigmoid(ratio)
        if not straight_through:
            z += beyond
    return z, dz


# --- Gumbel-softmax ------------------------------------------------------------------------------------------------


def bernstein(rate: Tensor, nats: float | Tensor) -> Tensor:
    """A count that a Poisson variable exceeds with probability at most exp(-nats) (Bernstein's inequality)."""
    return rate + nats / 3 + torch.sqrt(nats * nats / 9 + 2 * nats * rate)


def races(reach: Tensor, max_count: int) -> Iterator[tuple[int, int, Tensor]]:
    """Unit exponentials for the race between the counts 0, ..., max_count of each latent.

    Args:
        reach: (n,) in descending order: the largest count that takes part, one per latent.

    Yields:
        ``(k, active, noise)``: noise (k', active) for the counts k, ..., k + k' - 1 of the first ``active`` latents.
    """
    k = 0
    edges = torch.arange(max_count + 1, dtype=reach.dtype, device=reach.device)
    # How many latents still run at each k: one look-up, so one synchronisation.
    running = torch.searchsorted(-reach, -edges, right=True).tolist()
    while k <= max_count and running[k]:
        width = max(1, min(max_count + 1 - k, PIECE // running[k], 8))
        noise = torch.rand(width, running[k], dtype=reach.dtype, device=reach.device)
        # rand is in [0, 1), a multiple of eps / 2: its 0 stands for what is below half of that.
        yield k, running[k], -torch.log(1 - noise).clamp(max=-torch.finfo(reach.dtype).eps / 4)
        k += width


def run_races(
    noise: Iterable[tuple[int, int, Tensor]],
    log_rate: Tensor,
    temperature: float | Tensor,
    max_count: int,
    straight_through: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gumbel-softmax counts z = sum_k k w_k, w = softmax((log Poisson(k; rate) - log E_k) / temperature).

    E_k are unit exponentials (-log E_k is a Gumbel variable). With them held fixed dz / d(log rate) is the variance
    of k under w over the temperature, so three running sums and a running maximum are all that is kept.

    Args:
        noise: what :func:`races` yields.
        log_rate: (n,); ``temperature``: positive number, or (n,).
        straight_through: return the arg max, with the derivative of the soft count.

    Returns:
        ``(z, dz)``, both (n,).
    """
    top = torch.full_like(log_rate, -math.inf)
    winner = torch.zeros_like(log_rate)
    s0, s1, s2 = (torch.zeros_like(log_rate) for _ in range(3))
    # Moments are taken about the rate, so that large counts cost no digits.
    centre = log_rate.exp().clamp(max=max_count)
    per_latent = isinstance(temperature, Tensor) and temperature.dim() > 0
    for k0, active, exponentials in noise:
        here = slice(0, active)
        tau = temperature[here] if per_latent else temperature  # type: ignore[index]
        k = torch.arange(k0, k0 + len(exponentials), dtype=log_rate.dtype, device=log_rate.device)[:, None]
        score = (k * log_rate[here] - torch.lgamma(k + 1) - exponentials.log()) / tau
        best, which = score.max(0)
        winner[here] = torch.where(best > top[here], k0 + which.to(winner.dtype), winner[here])
        new_top = torch.maximum(top[here], best)
        shrink = torch.exp(top[here] - new_top)
        weight = torch.exp(score - new_top)
        offset = k - centre[here]
        moment = weight * offset
        s0[here] = s0[here] * shrink + weight.sum(0)
        s1[here] = s1[here] * shrink + moment.sum(0)
        s2[here] = s2[here] * shrink + (moment * offset).sum(0)
        top[here] = new_top
    mean = s1 / s0
    dz = (s2 / s0 - mean * mean).clamp(min=0) / temperature
    return (winner if straight_through else (centre + mean).clamp(min=0)), dz


def _gumbel(
    log_rate: Tensor, temperature: float | Tensor, max_count: int, straight_through: bool
) -> tuple[Tensor, Tensor]:
    # Busy latents first: those still in the race at a count k are then a prefix, and the others cost nothing more.
    rate, order = log_rate.exp().sort(descending=True)
    if bool((bernstein(rate[:1], GUMBEL_WARN) > max_count).any()):
        warnings.warn(
            f"a Poisson rate nears max_count={max_count}: counts above it are cut off and their mean is biased "
            "downwards; raise max_count (--max-count)",
            RuntimeWarning,
            stacklevel=2,
        )
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature[order]
    hottest = torch.as_tensor(temperature).max().clamp(min=1)  # a high temperature flattens the weights
    reach = bernstein(rate, GUMBEL_CUT * hottest.to(rate)).ceil()
    pair = run_races(races(reach, max_count), log_rate[order], temperature, max_count, straight_through)
    z, dz = (torch.empty_like(v).index_copy_(0, order, v) for v in pair)
    return z, dz


# --- the differentiable entry point --------------------------------------------------------------------------------


class _RelaxedPoisson(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        log_rate: Tensor,
        temperature: float | Tensor,
        relaxation: Relaxation,
        indicator: Indicator,
        max_count: int,
        straight_through: bool,
    ) -> Tensor:
        flat = log_rate.reshape(-1)
        if isinstance(temperature, Tensor) and temperature.dim():
            temperature = temperature.expand(log_rate.shape).reshape(-1)
        if relaxation == "arrival":
            rate = flat.exp()
            events = arrivals(rate, horizon(temperature, indicator))
            z, dz = count_arrivals(events, rate, temperature, indicator, straight_through)
        else:
            z, dz = _gumbel(flat, temperature, max_count, straight_through)
        ctx.save_for_backward(dz.reshape(log_rate.shape))
        return z.reshape(log_rate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (dz,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * dz, None, None, None, None, None


def relaxed_poisson(
    log_rate: Tensor,
    temperature: float | Tensor,
    relaxation: Relaxation = "arrival",
    indicator: Indicator = "sigmoid",
    max_count: int = 100,
    straight_through: bool = False,
) -> Tensor:
    """One relaxed Poisson count per element of ``log_rate``, differentiable in it (DESIGN 3.5).

    Args:
        log_rate: logarithm of the mean count; any shape.
        temperature: positive; a number or a tensor that broadcasts to ``log_rate`` (not differentiated).

    Returns:
        Non-negative reals of ``log_rate``'s shape; integers with ``straight_through``.
    """
    return _RelaxedPoisson.apply(log_rate, temperature, relaxation, indicator, max_count, straight_through)


def log_standard_gamma(shape: Tensor) -> Tensor:
    """Logarithm of a Gamma(shape, 1) draw, differentiable in ``shape`` (implicit reparametrisation).

    Small shapes are drawn as Gamma(shape + 1) * U^(1 / shape) in logarithms, since the draws themselves underflow:
    at shape 0.01 nearly half of them are below the smallest single-precision number.
    """
    small = shape < 1
    boosted = torch.where(small, shape + 1, shape)
    log_uniform = torch.log1p(-torch.rand_like(shape))
    return torch._standard_gamma(boosted).log() + torch.where(small, log_uniform / shape, torch.zeros_like(shape))
