"""The kernels of a GPU in Triton, for single precision.

A thread draws one element's noise, sums its count and its derivatives, and stops when that element is done. Only the
results are written, and the host does not have to wait. The distributions are those of reference.py; the random numbers
are Triton's Philox stream with the low bits of the seed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyro_nbvae.distributions.kernels import reference

_BLOCK = 128
# Stop an element after this many arrivals: its count is then nan, and training reports it.
_MAX_ARRIVALS = 1 << 22


@triton.jit
def _exponential(seed, offset):
    # 1 - rand is in (0, 1]; at 1 the draw is half the spacing
    return tl.maximum(-tl.log(1.0 - tl.rand(seed, offset)), 2.9802322e-08)


@triton.jit
def _expm1(x):
    # the series is accurate at small x, which a large dispersion gives
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120)))))
    return tl.where(x < 0.1, series, tl.exp(tl.minimum(x, 85.0)) - 1.0)


@triton.jit
def _arrivals(
    total_count,
    logits,
    temperature,
    value,
    in_logits,
    in_total_count,
    n,
    seed,
    POISSON: tl.constexpr,
    SMOOTHSTEP: tl.constexpr,
    HARD: tl.constexpr,
    TAIL: tl.constexpr,
    MOST: tl.constexpr,
    SIZE: tl.constexpr,
):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = i < n
    # the clamp keeps every product finite, as in reference.py
    b = tl.exp(-tl.minimum(tl.maximum(tl.load(logits + i, mask=there, other=0.0), -80.0), 80.0))
    r = b * 0.0
    if not POISSON:
        r = tl.maximum(tl.load(total_count + i, mask=there, other=1.0), 1e-15)
    t = tl.load(temperature + i, mask=there, other=1.0)
    until = 1.0 + t * TAIL
    clock = b * 0.0
    drift = b * 0.0
    z = b * 0.0
    d_l = b * 0.0
    d_r = b * 0.0
    go = there
    k = 0
    while (tl.max(go.to(tl.int32), 0) > 0) & (k < MOST):
        # a separate stream for every arrival: the seed depends on the arrival, the offset is the latent
        e = _exponential(seed + k, i)
        if POISSON:
            clock += e
            u = clock * b
        else:
            waiting = r + k
            gap = e / waiting
            clock += gap
            drift += gap / waiting
            u = _expm1(clock) * b
        u = tl.minimum(u, 1e30)
        x = (1.0 - u) / t
        if SMOOTHSTEP:
            x = tl.minimum(tl.maximum(x, -1.0), 1.0)
            h = 0.5 + x * (0.75 - 0.25 * x * x)
            slope = 0.75 * (1.0 - x * x) / t
        else:
            # the logistic function, without overflow at large negative x
            small = tl.exp(-tl.abs(x))
            h = tl.where(x >= 0, 1.0, small) / (1.0 + small)
            slope = small / ((1.0 + small) * (1.0 + small)) / t
        if HARD:
            z += tl.where(go & (u < 1.0), 1.0, 0.0)
        else:
            z += tl.where(go, h, 0.0)
        d_l += tl.where(go, slope * u, 0.0)
        if not POISSON:
            d_r += tl.where(go, slope * (u + b) * drift, 0.0)
        late = go & (u >= until)
        if not SMOOTHSTEP:
            # Mean contribution of later arrivals: see reference.py.
            if POISSON:
                rate = 1.0 / b
            else:
                rate = (r + k + 1.0) / (b + u)
            # softplus of x, which is below -TAIL here, by the series of log(1 + small)
            log1p = tl.where(small < 0.01, small * (1.0 - small * (0.5 - small * (1.0 / 3))), tl.log(1.0 + small))
            tail = rate * t * log1p
            flux = rate * h
            if not HARD:
                z += tl.where(late, tail, 0.0)
            d_l += tl.where(late, tail + flux * u, 0.0)
            if not POISSON:
                d_r += tl.where(late, tail / (r + k + 1.0) + drift * (tail + flux * (b + u)), 0.0)
        go = go & (u < until)
        k += 1
    z = tl.where(go, float("nan"), z)
    tl.store(value + i, z, mask=there)
    tl.store(in_logits + i, d_l, mask=there)
    if not POISSON:
        tl.store(in_total_count + i, d_r, mask=there)


@triton.jit
def _races(
    log_rate,
    lowest,
    highest,
    temperature,
    value,
    derivative,
    n,
    seed,
    HARD: tl.constexpr,
    SIZE: tl.constexpr,
):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = i < n
    a = tl.load(log_rate + i, mask=there, other=-30.0)
    first = tl.load(lowest + i, mask=there, other=0.0)
    last = tl.load(highest + i, mask=there, other=0.0)
    t = tl.load(temperature + i, mask=there, other=1.0)
    rate = tl.exp(a)
    top = tl.full([SIZE], -float("inf"), tl.float32)
    total = tl.zeros([SIZE], tl.float32)
    mean = tl.zeros([SIZE], tl.float32)
    squares = tl.zeros([SIZE], tl.float32)
    winner = tl.zeros([SIZE], tl.float32)
    # relative to the first count's, so that it stays accurate at large counts
    log_mass = tl.zeros([SIZE], tl.float32)
    step = 0
    width = tl.max(tl.where(there, last - first, 0.0), 0)
    while step <= width:
        k = first + step
        e = _exponential(seed + step, i)
        score = tl.where(k <= last, (log_mass - tl.log(e)) / t, -float("inf"))
        better = tl.maximum(top, score)
        winner = tl.where(score > top, k, winner)
        shrink = tl.exp(top - better)
        weight = tl.exp(score - better)
        # West's update of a weighted mean and of the squares about it, without a cancellation
        offset = k - rate - mean
        total = total * shrink + weight
        change = offset * weight / total
        squares = squares * shrink + weight * offset * (offset - change)
        mean += change
        top = better
        log_mass += a - tl.log(k + 1.0)
        step += 1
    tl.store(derivative + i, squares / total / t, mask=there)
    if HARD:
        tl.store(value + i, winner, mask=there)
    else:
        tl.store(value + i, tl.maximum(mean + rate, 0.0), mask=there)


def _drawn_where(rate: Tensor, draw: Callable[..., list[Tensor]], *arguments: Tensor) -> list[Tensor]:
    """Return ``draw(*arguments)`` where the rate may be drawn, 0 where it is 0, and else nan.

    The arguments are 1 there instead; so the host does not read them.
    """
    fine = (rate > 0) & (rate <= reference.LARGEST)
    drawn = draw(*(torch.where(fine, a, 1.0).contiguous() for a in arguments))
    fill = torch.where(rate == 0, 0.0, math.nan).to(rate.dtype)
    return [torch.where(fine, part, fill) for part in drawn]


def _launch(kernel: Any, like: Tensor, seed: int, *arguments: object, **options: object) -> None:
    """Launch a kernel for the elements of a tensor, on its device and with a seed of 31 bits."""
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[(triton.cdiv(len(like), _BLOCK),)](*arguments, len(like), seed % (2**31 - 2**24), **options, SIZE=_BLOCK)


def arrivals(
    seed: int, r: Tensor | None, logits: Tensor, temperature: Tensor, indicator: str, straight_through: bool
) -> list[Tensor]:
    """As :func:`reference.arrivals`; an element with more than ``_MAX_ARRIVALS`` arrivals is nan."""

    def draw(tau: Tensor, *own: Tensor) -> list[Tensor]:
        z, d_l, d_r = (torch.empty_like(logits) for _ in range(3))
        options = {"POISSON": r is None, "SMOOTHSTEP": indicator == "smoothstep", "HARD": straight_through}
        arrays = own[0], own[-1], tau, z, d_l, d_r
        _launch(_arrivals, logits, seed, *arrays, TAIL=reference.TAIL[indicator], MOST=_MAX_ARRIVALS, **options)
        return [z, d_l] if r is None else [z, d_r, d_l]

    if r is None:
        return _drawn_where(logits.exp(), draw, temperature, logits)
    return _drawn_where(r * logits.exp(), draw, temperature, r, logits)


def races(
    seed: int, log_rate: Tensor, first: Tensor, last: Tensor, temperature: Tensor, straight_through: bool
) -> list[Tensor]:
    """As :func:`reference.races`."""

    def draw(*own: Tensor) -> list[Tensor]:
        drawn = [torch.empty_like(log_rate) for _ in range(2)]
        _launch(_races, log_rate, seed, *own, *drawn, HARD=straight_through)
        return drawn

    return _drawn_where(log_rate.exp(), draw, log_rate, first, last, temperature)
