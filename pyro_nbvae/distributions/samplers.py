"""Pathwise samples of relaxed counts, value and derivative in one pass (DESIGN 3.5).

A sampler maps the parameters of a Poisson or a negative binomial to a relaxed count. Each is a custom autograd function
that works through bounded pieces of noise and keeps only the derivatives of the count, so that its backward pass is one
multiplication each. The noise comes from a function of its own (:func:`unit_exponentials`), which makes the reductions
deterministic given the noise. On a GPU with Triton they are one kernel each (:mod:`pyro_nbvae.distributions.fused`).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable

Relaxation = Literal["arrival", "gumbel"]
Indicator = Literal["sigmoid", "smoothstep"]
RELAXATIONS: tuple[Relaxation, ...] = ("arrival", "gumbel")
INDICATORS: tuple[Indicator, ...] = ("sigmoid", "smoothstep")

# Arrivals are drawn until they are later than 1 + SOFT_TAIL * temperature; what a sigmoid count gets from later ones
# enters through its mean given those. Its share of the variance is below 2e-4 of the rate at temperature 1.
SOFT_TAIL = 4.0
# Numbers in one piece of noise: the working memory, whatever the rates. On a CPU some of these fit into a core's cache.
PIECE = {"cpu": 1 << 16, "cuda": 1 << 22}
# A round draws no more arrivals of one latent than this.
MOST_AT_ONCE = 4096
# More arrivals than this in one draw are refused: minutes of work, and the mark of parameters that have diverged.
MOST_EVENTS = 10_000_000_000
# Counts whose Poisson tail is below exp(-GUMBEL_CUT) take no part in a Gumbel race.
GUMBEL_CUT = 20.0
# The warning that a rate nears max_count comes where P(count > max_count) may exceed exp(-GUMBEL_WARN).
GUMBEL_WARN = 7.0


class DivergedError(ValueError):
    """Rates that are not finite, or so large that their arrivals cannot be drawn."""


Noise = Callable[[int, Tensor], Tensor]


def unit_exponentials(width: int, like: Tensor) -> Tensor:
    """(width, n) draws of Exponential(1) for the n latents of ``like``."""
    uniform = torch.rand(width, len(like), dtype=like.dtype, device=like.device)
    # rand is in [0, 1), a multiple of eps / 2: its 0 stands for what is below half of that.
    return uniform.clamp_(min=torch.finfo(like.dtype).eps / 4).log_().neg_()


def _pieces(count: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of ``count`` latents so that ``width`` numbers for each make one piece."""
    size = max(1, PIECE.get(device.type, PIECE["cuda"]) // width)
    return (slice(start, min(start + size, count)) for start in range(0, max(1, count), size))


def _running_sum(x: Tensor) -> Tensor:
    """Along the first axis; in place where that is short, which is quicker than a scan."""
    if len(x) > 8:
        return x.cumsum(0)
    for k in range(1, len(x)):
        x[k] += x[k - 1]
    return x


def _take(x: Tensor, here: slice | Tensor) -> Tensor:
    return x[here] if isinstance(here, slice) else x.index_select(0, here)


def _put(x: Tensor, here: slice | Tensor, part: Tensor) -> None:
    if isinstance(here, slice):
        x[here] = part
    else:
        x.index_copy_(0, here, part)


def _add(total: Tensor, here: slice | Tensor, part: Tensor) -> None:
    """Adds to a total; the first round, which goes over all latents in slices, begins it."""
    if isinstance(here, slice):
        total[here] = part
    else:
        total.index_add_(0, here, part)


# --- arrival times -------------------------------------------------------------------------------------------------


def horizon(temperature: float | Tensor, indicator: Indicator) -> float | Tensor:
    """The time T up to which arrivals are drawn one by one: 1 + c * temperature."""
    return 1 + temperature * (SOFT_TAIL if indicator == "sigmoid" else 1.0)


def _check_rates(mean: Tensor) -> None:
    total = float(mean.sum())
    if not math.isfinite(total):
        raise DivergedError("a rate is not finite")
    if total > MOST_EVENTS:
        raise DivergedError(
            f"the rates call for more than {MOST_EVENTS:.0e} arrivals in one draw (largest rate "
            f"{float(mean.max()):.3g})"
        )


def count_arrivals(
    total_count: Tensor | None,
    logits: Tensor,
    temperature: float | Tensor,
    indicator: Indicator,
    straight_through: bool = False,
    noise: Noise = unit_exponentials,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Relaxed counts of the arrivals before time 1, and their derivatives in the parameters.

    The arrivals of a Poisson process whose rate is Gamma(r, scale e^l) are a Polya process: with unit exponentials E_j,
    S_k = sum_{j<k} E_j / (r + j) and u_k = e^-l (e^S_k - 1), #{u_k < 1} is NB(r, l). Without a dispersion u_k is
    e^-l sum_{j<k} E_j, a Poisson process of rate e^l. The relaxed count is z = sum_k h((1 - u_k) / temperature), h the
    logistic function or the cubic smoothstep, and with the noise held fixed du_k/dl = -u_k and
    du_k/dr = -(u_k + e^-l) sum_{j<k} E_j / (r + j)^2.

    Each latent's arrivals are drawn in rounds of 2, 4, 8, ... until one is later than T (:func:`horizon`); what a
    sigmoid count gets from the arrivals after the last one drawn is replaced by its mean given that one, which leaves
    the mean and its gradient exact.

    Args:
        total_count: r, (n,), or None for a Poisson process.
        logits: l, (n,); of a Poisson process the log rate.
        temperature: positive number, or (n,).
        straight_through: return the hard count #{u_k < 1}, with the derivatives of the soft one.
        noise: draws unit exponentials.

    Returns:
        ``(z, dz/dl, dz/dr)``, all (n,); the last is None without ``total_count``.

    Raises:
        DivergedError: for rates that are not finite, and for more than ``MOST_EVENTS`` expected arrivals.
    """
    rate = logits.exp()
    _check_rates(rate if total_count is None else rate.mul_(total_count))
    del rate
    # Bounds outside which nothing is ever drawn (above, or no arrival at all) keep every product below finite.
    scale = torch.exp(-logits.clamp(-80.0, 80.0))
    r = None if total_count is None else total_count.clamp(min=1e-15)
    # `clock` and `drift` are the running sums of E / (r + j) and E / (r + j)^2 so far
    z, d_logits, d_r, clock, drift = (torch.empty_like(logits) for _ in range(5))
    tau = temperature if isinstance(temperature, Tensor) and temperature.dim() else None
    active: Tensor | None = None  # all
    seen, width = 0, 2
    while active is None or len(active):
        left = []
        for piece in _pieces(len(logits) if active is None else len(active), width, logits.device):
            here: Any = piece if active is None else active[piece]
            b = _take(scale, here)
            gap = noise(width, b)
            if r is not None:
                waiting = _take(r, here) + torch.arange(seen, seen + width, dtype=b.dtype, device=b.device)[:, None]
                gap = gap.div_(waiting)
                steps = gap / waiting
                if active is not None:
                    steps[0] += _take(drift, here)
                steps = _running_sum(steps)
            if active is not None:
                gap[0] += _take(clock, here)
            gap = _running_sum(gap)
            last = gap[-1].clone()
            u = (gap if r is None else gap.expm1_()).mul_(b).clamp_(max=1e30)
            t = temperature if tau is None else _take(tau, here)
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
                # The mean of what comes after the last arrival drawn, of a latent that is done: arrivals come at the
                # rate (r + n) / (e^-l + u) after n of them up to time u.
                end = u[-1]
                rate = 1 / b if r is None else (waiting[-1] + 1) / (b + end)
                rate.mul_(~go)
                # h is the logistic function of (1 - u) / t, -log(1 - h) its softplus; small where a latent is done
                small = h[-1].clamp(max=0.5)
                tail = torch.log1p(-small).mul_(rate).mul_(t).neg_()
                flux = rate.mul_(small)
                if not straight_through:
                    value += tail
                in_l += tail + flux * end
                if r is not None:
                    in_r += tail / (waiting[-1] + 1) + steps[-1] * (tail + flux * (b + end))
            _add(z, here, value)
            _add(d_logits, here, in_l)
            _put(clock, here, last)
            if r is not None:
                _add(d_r, here, in_r)
                _put(drift, here, steps[-1])
            again = go.nonzero()[:, 0]
            left.append(again + piece.start if active is None else here[again])
        active = torch.cat(left)
        seen, width = seen + width, min(2 * width, MOST_AT_ONCE)
    return z, d_logits, None if r is None else d_r


# --- Gumbel-softmax ------------------------------------------------------------------------------------------------


def largest_count(rate: Tensor, nats: float | Tensor) -> Tensor:
    """A count k that a Poisson variable reaches with probability at most exp(-nats).

    Chernoff: the probability is below exp(-(k log(k / rate) - k + rate)). From Bernstein's bound, which lies to the
    right, Newton's steps approach the root of this convex function from the right.
    """
    rate = rate.clamp(min=1e-30)
    k = rate + nats / 3 + torch.sqrt(nats * nats / 9 + 2 * nats * rate)
    for _ in range(2):
        slope = torch.log(k / rate)
        k = k - (k * slope - k + rate - nats) / slope
    return k


def gumbel_reach(rate: Tensor, temperature: float | Tensor) -> Tensor:
    """The largest count that takes part in each latent's race: of ``GUMBEL_CUT`` nats, times a temperature above 1,
    which flattens the weights."""
    flattened = torch.as_tensor(temperature, dtype=rate.dtype).to(rate.device, non_blocking=True).clamp(min=1)
    return largest_count(rate, GUMBEL_CUT * flattened)


def run_races(
    log_rate: Tensor,
    temperature: float | Tensor,
    max_count: int,
    straight_through: bool = False,
    noise: Noise = unit_exponentials,
) -> tuple[Tensor, Tensor]:
    """Gumbel-softmax counts z = sum_k k w_k, w = softmax((log Poisson(k; rate) - log E_k) / temperature).

    E_k are unit exponentials (-log E_k is a Gumbel variable). With them held fixed dz / d(log rate) is the variance
    of k under w over the temperature, so three running sums and a running maximum are all that is kept. Counts that
    are out of a latent's reach (:func:`gumbel_reach`) take no part.

    Args:
        log_rate: (n,); ``temperature``: positive number, or (n,).
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
    # Moments are taken about the rate, so that large counts cost no digits.
    centre = rate.clamp_(max=max_count)
    active: Tensor | None = None  # all
    first, width = 0, 8
    while first <= max_count and (active is None or len(active)):
        left = []
        width = min(width, max_count + 1 - first)
        k = torch.arange(first, first + width, dtype=rate.dtype, device=rate.device)
        middle = first + (width - 1) / 2
        powers = torch.stack([torch.ones_like(k), k - middle, (k - middle).square()])
        for piece in _pieces(len(rate) if active is None else len(active), width, rate.device):
            here: Any = piece if active is None else active[piece]
            a = _take(log_rate, here)
            score = torch.addcmul(-torch.lgamma(k + 1)[:, None], k[:, None], a)
            score = score.sub_(noise(width, a).log_()).div_(temperature if tau is None else _take(tau, here))
            highest = score.amax(0)
            which = first + score.argmax(0).to(rate.dtype) if winner is not None else highest
            if active is None:
                m0, m1, m2 = powers @ score.sub_(highest).exp_()
            else:
                before, best = _take(top, here), highest
                highest = torch.maximum(before, best)
                m0, m1, m2 = powers @ score.sub_(highest).exp_()
                if winner is not None:
                    which = torch.where(best > before, which, _take(winner, here))
            shift = middle - _take(centre, here)
            m2 += shift * (2 * m1 + shift * m0)
            m1 += shift * m0
            if active is not None:
                shrink = torch.exp(before - highest)
                m0, m1, m2 = (m + _take(s, here) * shrink for m, s in ((m0, s0), (m1, s1), (m2, s2)))
            for total, part in ((top, highest), (s0, m0), (s1, m1), (s2, m2)):
                _put(total, here, part)
            if winner is not None:
                _put(winner, here, which)
            again = (_take(reach, here) >= first + width).nonzero()[:, 0]
            left.append(again + piece.start if active is None else here[again])
        active = torch.cat(left)
        first += width
        width = max(4, first // 4)
    mean = s1.div_(s0)
    dz = s2.div_(s0).sub_(mean * mean).clamp_(min=0).div_(temperature)
    return (mean.add_(centre).clamp_(min=0) if winner is None else winner), dz


def _warn_if_cut(largest: Tensor, max_count: int) -> None:
    if bool(largest_count(largest, GUMBEL_WARN) > max_count):
        warnings.warn(
            f"a Poisson rate nears max_count={max_count}: counts above it are cut off and their mean is biased "
            "downwards; raise max_count (--max-count)",
            RuntimeWarning,
            stacklevel=2,
        )


# --- on a GPU ------------------------------------------------------------------------------------------------------


@functools.cache
def _kernels() -> Any:
    """The fused forms, or None where there is no Triton."""
    try:
        from pyro_nbvae.distributions import fused
    except ImportError:
        return None
    return fused


def _fused(x: Tensor) -> Any:
    return _kernels() if x.is_cuda and x.dtype == torch.float32 else None


class _Watch:
    """Looks at the largest rates that a GPU has met once they have reached the host, without waiting for them."""

    def __init__(self) -> None:
        self.coming: list[tuple[torch.cuda.Event, Tensor, int]] = []

    def see(self, largest: Tensor, max_count: int) -> None:
        host = torch.empty((), dtype=largest.dtype, pin_memory=True).copy_(largest, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.coming.append((event, host, max_count))
        while self.coming and self.coming[0][0].query():
            _, arrived, limit = self.coming.pop(0)
            _warn_if_cut(arrived, limit)


_watch = _Watch()


def _arrivals(
    total_count: Tensor | None,
    logits: Tensor,
    temperature: float | Tensor,
    indicator: Indicator,
    straight_through: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    fused = _fused(logits)
    if fused is None:
        return count_arrivals(total_count, logits, temperature, indicator, straight_through)
    tail = SOFT_TAIL if indicator == "sigmoid" else 1.0
    return fused.count_arrivals(total_count, logits, temperature, indicator, straight_through, tail)


def _races(
    log_rate: Tensor, temperature: float | Tensor, max_count: int, straight_through: bool
) -> tuple[Tensor, Tensor]:
    largest = log_rate.max().exp()
    fused = _fused(log_rate)
    if fused is None:
        if not bool(largest.isfinite()):
            raise DivergedError("a rate is not finite")
        _warn_if_cut(largest, max_count)
        return run_races(log_rate, temperature, max_count, straight_through)
    _watch.see(largest, max_count)
    return fused.run_races(
        log_rate, gumbel_reach(log_rate.exp(), temperature), temperature, max_count, straight_through
    )


# --- the differentiable entry points -------------------------------------------------------------------------------


class _Relaxed(Function):
    """Counts of any shape, with the derivatives that a sampler of flat latents returns beside them."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        total_count: Tensor | None,
        logits: Tensor,
        temperature: float | Tensor,
        relaxation: Relaxation,
        indicator: Indicator,
        max_count: int,
        straight_through: bool,
    ) -> Tensor:
        flat = logits.reshape(-1)
        if isinstance(temperature, Tensor) and temperature.dim():
            temperature = temperature.expand(logits.shape).reshape(-1)
        d_r = None
        if relaxation == "arrival":
            r = None if total_count is None else total_count.reshape(-1)
            z, d_logits, d_r = _arrivals(r, flat, temperature, indicator, straight_through)
        elif len(flat):
            z, d_logits = _races(flat, temperature, max_count, straight_through)
        else:
            z = d_logits = flat.clone()
        ctx.save_for_backward(*(None if d is None else d.view_as(logits) for d in (d_r, d_logits)))  # type: ignore[arg-type]
        return z.view_as(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # type: ignore[attr-defined]
        return *(None if d is None else grad * d for d in kept), None, None, None, None, None


class _LogStandardGamma(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, shape: Tensor) -> Tensor:
        flat = shape.reshape(-1)
        value, slope = torch.empty_like(flat), torch.empty_like(flat)
        for piece in _pieces(len(flat), 4, flat.device):
            a = flat[piece]
            boosted = a + (a < 1)
            draw = torch._standard_gamma(boosted)
            # log U of the draws that are boosted, over the shape; 0 for the others
            boost = unit_exponentials(1, a)[0].neg_().mul_(a < 1).div_(a)
            value[piece] = draw.log().add_(boost)
            slope[piece] = torch._standard_gamma_grad(boosted, draw).div_(draw).sub_(boost.div_(a))
        ctx.save_for_backward(slope.view_as(shape))
        return value.view_as(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * slope


def log_standard_gamma(shape: Tensor) -> Tensor:
    """Logarithm of a Gamma(shape, 1) draw, differentiable in ``shape`` (implicit reparametrisation).

    Small shapes are drawn as Gamma(shape + 1) * U^(1 / shape) in logarithms, since the draws themselves underflow:
    at shape 0.01 nearly half of them are below the smallest single-precision number.
    """
    return _LogStandardGamma.apply(shape)


def relaxed_count(
    total_count: Tensor | None,
    logits: Tensor,
    temperature: float | Tensor,
    relaxation: Relaxation = "arrival",
    indicator: Indicator = "sigmoid",
    max_count: int = 100,
    straight_through: bool = False,
) -> Tensor:
    """One relaxed count per element, differentiable in both parameters (DESIGN 3.5).

    Args:
        total_count: dispersion r of a negative binomial, of the shape of ``logits``; None for a Poisson.
        logits: l of a negative binomial, or the log rate of a Poisson; any shape.
        temperature: positive; a number or a tensor that broadcasts to ``logits`` (not differentiated).

    Returns:
        Non-negative reals of the shape of ``logits``; integers with ``straight_through``.

    Raises:
        DivergedError: for rates that are not finite, or too large to draw their arrivals.
    """
    if total_count is not None and relaxation == "gumbel":
        logits, total_count = log_standard_gamma(total_count) + logits, None
    return _Relaxed.apply(total_count, logits, temperature, relaxation, indicator, max_count, straight_through)
