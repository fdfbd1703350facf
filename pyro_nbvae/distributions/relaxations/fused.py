"""The samplers of :mod:`pyro_nbvae.distributions.relaxations` as one Triton kernel each, for a GPU.

A thread draws one latent's noise, sums its count and its derivatives, and stops when that latent is done. Only the
results are written, and the host does not have to wait. The distributions are those of the torch versions; the random
numbers are Triton's Philox stream with the low bits of the seed.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
# Stop a latent after this many arrivals: its count is then nan, and training reports it.
MOST_ARRIVALS = 1 << 22


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
def _count_arrivals(
    total_count,
    logits,
    temperature,
    value,
    in_logits,
    in_total_count,
    n,
    seed,
    most,
    POISSON: tl.constexpr,
    SMOOTHSTEP: tl.constexpr,
    HARD: tl.constexpr,
    PER_LATENT: tl.constexpr,
    SOFT_TAIL: tl.constexpr,
    SIZE: tl.constexpr,
):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = i < n
    given = tl.load(logits + i, mask=there, other=0.0)
    # the clamp keeps every product finite, as in arrival_times.py
    b = tl.exp(-tl.minimum(tl.maximum(given, -80.0), 80.0))
    r = b * 0.0
    if not POISSON:
        r = tl.maximum(tl.load(total_count + i, mask=there, other=1.0), 1e-15)
    if PER_LATENT:
        t = tl.load(temperature + i, mask=there, other=1.0)
    else:
        t = tl.load(temperature) + b * 0.0
    until = 1.0 + t * SOFT_TAIL
    clock = b * 0.0
    drift = b * 0.0
    z = b * 0.0
    d_l = b * 0.0
    d_r = b * 0.0
    go = there
    k = 0
    while (tl.max(go.to(tl.int32), 0) > 0) & (k < most):
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
            # Mean contribution of later arrivals: see count_arrivals in arrival_times.py.
            if POISSON:
                rate = 1.0 / b
            else:
                rate = (r + k + 1.0) / (b + u)
            # softplus of x, which is below -SOFT_TAIL here, by the series of log(1 + small)
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
    # minimum and maximum turn nan into a number: restore it
    z = tl.where(go | (given != given), float("nan"), z)
    tl.store(value + i, z, mask=there)
    tl.store(in_logits + i, d_l, mask=there)
    if not POISSON:
        tl.store(in_total_count + i, d_r, mask=there)


@triton.jit
def _run_races(
    log_rate,
    lowest,
    highest,
    temperature,
    value,
    derivative,
    n,
    seed,
    largest,
    HARD: tl.constexpr,
    PER_LATENT: tl.constexpr,
    SIZE: tl.constexpr,
):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = i < n
    a = tl.load(log_rate + i, mask=there, other=-30.0)
    first = tl.load(lowest + i, mask=there, other=0.0)
    last = tl.load(highest + i, mask=there, other=0.0)
    if PER_LATENT:
        t = tl.load(temperature + i, mask=there, other=1.0)
    else:
        t = tl.load(temperature) + first * 0.0
    rate = tl.exp(a)
    fine = rate <= largest
    top = tl.full([SIZE], -float("inf"), tl.float32)
    total = tl.zeros([SIZE], tl.float32)
    mean = tl.zeros([SIZE], tl.float32)
    squares = tl.zeros([SIZE], tl.float32)
    winner = tl.zeros([SIZE], tl.float32)
    # relative to the first count's, so that it stays accurate at large counts
    log_mass = tl.zeros([SIZE], tl.float32)
    step = 0
    width = tl.max(tl.where(there & fine, last - first, 0.0), 0)
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
        tl.store(value + i, tl.where(fine, winner, float("nan")), mask=there)
    else:
        tl.store(value + i, tl.where(fine, tl.maximum(mean + rate, 0.0), float("nan")), mask=there)


def _device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Context that makes the tensor's device current, because Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _launch(n: int, temperature: float | Tensor, seed: int, like: Tensor) -> tuple[tuple[int], Tensor, bool, int]:
    """Return the grid, the temperature on the device, whether there is one per latent, and a seed of 31 bits."""
    tau = torch.as_tensor(temperature, dtype=like.dtype)
    seed %= 2**31 - 2**24
    tau = tau.to(like.device, non_blocking=True).contiguous()  # the kernels read it by position
    return (triton.cdiv(n, BLOCK),), tau, tau.dim() > 0, seed


def count_arrivals(
    seed: int,
    total_count: Tensor | None,
    logits: Tensor,
    temperature: float | Tensor,
    indicator: str,
    straight_through: bool,
    soft_tail: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same as :func:`pyro_nbvae.distributions.relaxations.arrival_times.count_arrivals`, float32 only.

    A latent with more than ``MOST_ARRIVALS`` arrivals gets the count nan.
    """
    n = len(logits)
    grid, tau, per_latent, seed = _launch(n, temperature, seed, logits)
    z, d_l = torch.empty_like(logits), torch.empty_like(logits)
    d_r = z if total_count is None else torch.empty_like(logits)
    with _device_of(logits):
        _count_arrivals[grid](
            z if total_count is None else total_count.contiguous(),
            logits.contiguous(),
            tau,
            z,
            d_l,
            d_r,
            n,
            seed,
            MOST_ARRIVALS,
            POISSON=total_count is None,
            SMOOTHSTEP=indicator == "smoothstep",
            HARD=straight_through,
            PER_LATENT=per_latent,
            SOFT_TAIL=soft_tail,
            SIZE=BLOCK,
        )
    return z, d_l, None if total_count is None else d_r


def run_races(
    seed: int,
    log_rate: Tensor,
    lowest: Tensor,
    highest: Tensor,
    largest: float,
    temperature: float | Tensor,
    straight_through: bool,
) -> tuple[Tensor, Tensor]:
    """The same as :func:`pyro_nbvae.distributions.relaxations.gumbel_softmax.run_races`, float32 only.

    ``lowest`` and ``highest`` are the first and the last count of each latent. A latent with a rate that is not finite
    or above ``largest`` gets the count nan.
    """
    n = len(log_rate)
    grid, tau, per_latent, seed = _launch(n, temperature, seed, log_rate)
    z, dz = torch.empty_like(log_rate), torch.empty_like(log_rate)
    with _device_of(log_rate):
        _run_races[grid](
            log_rate.contiguous(),
            lowest,
            highest,
            tau,
            z,
            dz,
            n,
            seed,
            largest,
            HARD=straight_through,
            PER_LATENT=per_latent,
            SIZE=BLOCK,
        )
    return z, dz
