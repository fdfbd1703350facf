"""The kernels of a GPU in Triton, for single precision.

A lane is one element, and the lanes of a program are 32 observations of one unit: their counts are alike, so that their
loops end at about the same step. Sums over counts go outward from the mode, in one pass, until the weights are below
exp(-18) of the mode's: no window has to be computed and nothing is scaled again. The host reads nothing from the
device, and the seed stays on it, so that a CUDA graph can be replayed with new noise.

The distributions are those of reference.py. The random numbers are a Philox stream with the seed as its key, and the
element and the draw as its counter.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyro_nbvae.distributions.kernels.reference import LARGEST, RIGHT, RULES, TAIL

# Observations of one unit in a program: one warp.
SIZE = 32
# Stop an element after this many arrivals: its count is then nan, and training reports it.
_MAX_ARRIVALS = 1 << 22
# What a kernel of sums computes.
_MEAN, _VARIANCE, _ENTROPY, _KL = range(4)

INFINITY: tl.constexpr = tl.constexpr(math.inf)
NAN: tl.constexpr = tl.constexpr(math.nan)
# Sums end where a weight over the mode's is below exp(END).
END: tl.constexpr = tl.constexpr(-18.0)
# Largest half width of a sum over counts; beyond it a result is nan.
WIDEST: tl.constexpr = tl.constexpr(float(1 << 19))
MOST: tl.constexpr = tl.constexpr(LARGEST)


# --- functions ------------------------------------------------------------------------------------------------------


@triton.jit
def _log1p(x):
    u = 1.0 + x
    return tl.log(u) - ((u - 1.0) - x) / u  # the second term is the rounding of u


@triton.jit
def _expm1(x):
    # the rounding of exp(x) cancels in the quotient (Kahan)
    u = tl.exp(x)
    near = (u > 0.5) & (u < 2.0) & (u != 1.0)
    log = tl.log(tl.where(near, u, 2.0))
    return tl.where(near, (u - 1.0) * (x / log), tl.where(u == 1.0, x, u - 1.0))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _omega(x):
    """log Gamma(1 + x) - x log x + x, as special.omega"""
    small = x < 8.0
    y = tl.where(small, x + 8.0, x)
    i = 1.0 / y
    i2 = i * i
    series = 0.5 * tl.log(6.283185307179586 * y) + i * (1.0 / 12 - i2 * (1.0 / 360 - i2 * (1.0 / 1260)))
    product = (x + 1.0) * (x + 2.0) * (x + 3.0) * (x + 4.0) * (x + 5.0) * (x + 6.0) * (x + 7.0) * (x + 8.0)
    below = tl.maximum(tl.where(small, x, 1.0), 1e-30)
    # y log y - x log x - 8 = 8 log y + x log(y / x) - 8
    shift = 8.0 * tl.log(y) + below * _log1p(8.0 / below) - 8.0 - tl.log(tl.where(small, product, 1.0))
    return tl.where(small, series + shift, series)


@triton.jit
def _rho(x):
    """digamma(x) - log x, as special.rho"""
    small = x < 8.0
    y = tl.where(small, x + 8.0, x)
    i = 1.0 / y
    i2 = i * i
    series = -0.5 * i - i2 * (1.0 / 12 - i2 * (1.0 / 120 - i2 * (1.0 / 252)))
    x = tl.maximum(tl.where(small, x, 1.0), 1e-30)
    pairs = 1.0 / x + 1.0 / (x + 1.0) + 1.0 / (x + 2.0) + 1.0 / (x + 3.0)
    pairs += 1.0 / (x + 4.0) + 1.0 / (x + 5.0) + 1.0 / (x + 6.0) + 1.0 / (x + 7.0)
    return tl.where(small, series + _log1p(8.0 / x) - pairs, series)


@triton.jit
def _log_gamma_and_digamma(x):
    """Both in double precision, by Stirling's series and the recurrence"""
    small = x < 8.0
    y = tl.where(small, x + 8.0, x)
    log = tl.log(y)
    i = 1.0 / y
    i2 = i * i
    series = i2 * (1.0 / 1680 - i2 * (1.0 / 1188 - i2 * (691.0 / 360360)))
    series = i * (1.0 / 12 - i2 * (1.0 / 360 - i2 * (1.0 / 1260 - series)))
    value = (y - 0.5) * log - y + 0.9189385332046727 + series
    slope = i2 * (1.0 / 252 - i2 * (1.0 / 240 - i2 * (1.0 / 132 - i2 * (691.0 / 32760))))
    slope = log - 0.5 * i - i2 * (1.0 / 12 - i2 * (1.0 / 120 - slope))
    x = tl.where(small, x, 1.0)
    # the eight factors in pairs
    a, b, c, d = x * (x + 7.0), (x + 1.0) * (x + 6.0), (x + 2.0) * (x + 5.0), (x + 3.0) * (x + 4.0)
    product = tl.log(a) + tl.log(b * c * d)
    harmonic = (2.0 * x + 7.0) * (1.0 / a + 1.0 / b + 1.0 / c + 1.0 / d)
    return tl.where(small, value - product, value), tl.where(small, slope - harmonic, slope)


@triton.jit
def _exponential(seed, element, k):
    """The k-th Exponential(1) draw of an element, at least half of the spacing of its uniform numbers"""
    low, high = (element & 0xFFFFFFFF).to(tl.uint32), (element >> 32).to(tl.uint32)
    bits, _, _, _ = tl.philox(seed, low, high, low * 0 + k.to(tl.uint32), low * 0)
    uniform = (bits >> 8).to(tl.float32) * 5.9604644775390625e-08
    return tl.maximum(-tl.log(1.0 - uniform), 2.9802322e-08)


@triton.jit
def _any(lanes):
    return tl.max(lanes.to(tl.int32), 0) > 0


@triton.jit
def _lanes(rows, columns, SIZE: tl.constexpr):
    """This program's unit, its lanes' observations, and where there are such"""
    program = tl.program_id(0)
    row = (program // columns).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    return program % columns, row, row < rows


@triton.jit
def _load(array, row_stride, column_stride, unit, row, there):
    return tl.load(array + row * row_stride + unit * column_stride, mask=there, other=1.0)


# --- counts by their weights -----------------------------------------------------------------------------------------


@triton.jit
def _ordinary(first, second, NB: tl.constexpr):
    """The parameters where sums are possible, where they are not, and where every count is 0"""
    if NB:
        odds = tl.exp(second)
        mean = first * odds
        bad = ~((first >= 0) & (first < INFINITY)) | ~(second < INFINITY)
        empty = (first == 0) | (second == -INFINITY)
        bad |= ~empty & ~(tl.sqrt(36.0 * mean * (1.0 + odds)) + 18.0 * (1.0 + odds) < MOST)
    else:
        nats = tl.div_rn(second * 0.0 - END, second)
        bad = ~((first >= 0) & (first < MOST)) | ~((second > 0) & (second < INFINITY))
        bad |= ~(nats + tl.sqrt(2.0 * nats * first) < WIDEST)
        empty = first == 0
    usual = ~(bad | empty)
    return tl.where(usual, first, 1.0), tl.where(usual, second, 1.0 - 1.0 * NB), bad, empty


@triton.jit
def _mode(first, second, NB: tl.constexpr):
    if NB:
        return tl.floor(tl.maximum(first - 1.0, 0.0) * tl.exp(second))
    else:
        return tl.floor(first)


@triton.jit
def _log_ratio(k, first, success, NB: tl.constexpr):
    """Log weight of the count k over that of k - 1, over nu for a COM-Poisson"""
    if NB:
        return tl.log(tl.div_rn((first + (k - 1.0)) * success, k))
    else:
        return tl.log(tl.div_rn(first, k))


@triton.jit
def _end(first):
    """Where sums end: the counts above 0 have little mass and large scores where r or the rate is small"""
    return tl.maximum(tl.log(tl.maximum(tl.minimum(first, 1.0), 1e-30)) + END, -80.0)


@triton.jit
def _outward(j, x, t, mode, first, success, NB: tl.constexpr, DOWN: tl.constexpr):
    """One count further from the mode: its distance, log weight and second score, and the larger of the two counts"""
    if DOWN:
        k = tl.maximum(mode + j, 1.0)
        x -= _log_ratio(k, first, success, NB)
        if NB:
            t -= tl.div_rn(1.0, first + (k - 1.0))
        j -= 1.0
    else:
        k = mode + j + 1.0
        x += _log_ratio(k, first, success, NB)
        if NB:
            t += tl.div_rn(1.0, first + (k - 1.0))
        j += 1.0
    if not NB:
        t = x
    return j, x, t, k


@triton.jit
def _integers(
    first, first_row, first_column, second, second_row, second_column, uniform, uniform_row, uniform_column,
    z, d_first, d_second, rows, columns, NB: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Inversion from the nearer end, with the derivatives of windows.invert"""
    unit, row, there = _lanes(rows, columns, SIZE)
    a, b, bad, empty = _ordinary(
        _load(first, first_row, first_column, unit, row, there),
        _load(second, second_row, second_column, unit, row, there),
        NB,
    )
    u = _load(uniform, uniform_row, uniform_column, unit, row, there)
    bad |= ~(u >= 0)
    success = _sigmoid(b)
    nu = b
    if NB:
        nu = b * 0.0 + 1.0
    mode, end = _mode(a, b, NB), _end(a)
    zero = a * 0.0
    # the weights, relative to the mode's, and the second score, which for a COM-Poisson is the log weight over nu
    total = zero + 1.0
    by_j = zero
    by_t = zero
    high = zero
    low = zero
    x_high = zero
    x_low = zero
    t_high = zero
    t_low = zero
    for DOWN in tl.static_range(2):
        j = zero
        x = zero
        t = zero
        go = there & ~(bad | empty)
        while _any(go):
            j, x, t, _ = _outward(j, x, t, mode, a, success, NB, DOWN)
            go = go & (nu * x > end) & (mode + j >= 0)
            w = tl.where(go, tl.exp(nu * x), 0.0)
            total += w
            by_j += w * j
            by_t += tl.where(go, w * t, 0.0)
            if DOWN:
                low = tl.where(go, j, low)
                x_low = tl.where(go, x, x_low)
                t_low = tl.where(go, t, t_low)
            else:
                high = tl.where(go, j, high)
                x_high = tl.where(go, x, x_high)
                t_high = tl.where(go, t, t_high)
    mean_j = by_j / total
    mean_t = by_t / total
    if NB:  # E[score] = 0
        mean_t = tl.where(mode > 0, mean_t, _softplus(b))
    above = u > 0.5
    side = tl.where(above, -1.0, 1.0)
    left = tl.where(above, 1.0 - u, u) * total
    j = tl.where(above, high, low)
    x = tl.where(above, x_high, x_low)
    t = tl.where(above, t_high, t_low)
    last = tl.where(above, low, high)
    sum_j = zero
    sum_t = zero
    w = tl.exp(nu * x)
    go = there & (left > w) & (j != last)
    while _any(go):
        left -= tl.where(go, w, 0.0)
        sum_j += tl.where(go, w * (j - mean_j), 0.0)
        sum_t += tl.where(go, w * (t - mean_t), 0.0)
        k = tl.maximum(mode + tl.where(above, j, j + 1.0), 1.0)
        x = tl.where(go, x + side * _log_ratio(k, a, success, NB), x)
        if NB:
            t = tl.where(go, t + side * tl.div_rn(1.0, a + (k - 1.0)), t)
        else:
            t = x
        j = tl.where(go, j + side, j)
        w = tl.exp(nu * x)
        go = go & (left > w) & (j != last)
    count = mode + j
    # there is nothing below 0, and the sum from above ends before all mass of a small r
    at_0 = count == 0
    side = tl.where(at_0, 1.0, side)
    of_j = -side * (tl.where(at_0, 0.0, sum_j) / w + 0.5 * (j - mean_j))
    of_t = -side * (tl.where(at_0, 0.0, sum_t) / w + 0.5 * (t - mean_t))
    if NB:
        of_first = of_t
        of_second = 0.5 * (count + (count + a) * success)
        # r = 0, whose score at 0 is log sigma(-l), and l = -inf
        logit = _load(second, second_row, second_column, unit, row, there)
        of_first = tl.where(empty, 0.5 * _softplus(logit), of_first)
    else:
        of_first = of_j * nu / a
        of_second = of_t
        of_first = tl.where(empty, 0.0, of_first)
    of_second = tl.where(empty, 0.0, of_second)
    i = row * columns + unit
    tl.store(z + i, tl.where(bad, NAN, tl.where(empty, 0.0, count)), mask=there)
    tl.store(d_first + i, tl.where(bad, NAN, of_first), mask=there)
    tl.store(d_second + i, tl.where(bad, NAN, of_second), mask=there)


@triton.jit
def _log_mass_and_scores(k, r, logit):
    """log NB(k; r, l), in the form of families.negative_binomial, and its derivatives in r and in k"""
    log_mean = tl.log(r) + logit
    mean = tl.minimum(r * tl.exp(logit), 1e37)
    n = r + k
    apart = tl.div_rn(k - mean, r + mean)  # n / (r + mean) - 1
    near = tl.minimum(tl.maximum(apart, -0.5), 0.5)
    far = tl.where(mean < 1e37, tl.log(tl.div_rn(n, r + mean)), tl.log(n) - log_mean)
    log_n = tl.where(tl.abs(apart) < 0.5, _log1p(near), far)
    relative = (r / n) * tl.div_rn(k - mean, mean)
    near = tl.minimum(tl.maximum(relative, -0.5), 0.5)
    quotient = tl.div_rn(k, mean) * tl.div_rn(r + mean, n)
    usual = (quotient > 1e-37) & (quotient < 1e37)
    far = tl.where(usual, tl.log(tl.where(usual, quotient, 1.0)), tl.log(tl.maximum(k, 1e-37)) - log_mean - log_n)
    deviance = k * tl.where(tl.abs(relative) < 0.5, _log1p(near), far) - r * log_n
    log_mass = _omega(n) - _omega(r) - _omega(k) - _log1p(k / r) - deviance
    at_0 = -_softplus(logit)
    in_r = tl.where(k > 0, log_n + _rho(n) - _rho(r), at_0)
    in_k = log_n + (_rho(n) - _rho(1.0 + k)) + (log_mean - _log1p(k))
    return tl.where(k > 0, log_mass, r * at_0), in_r, in_k


@triton.jit
def _sums(
    first, first_row, first_column, second, second_row, second_column, r_p, r_row, r_column, l_p, l_row, l_column,
    value, d_first, d_second, d_r, d_l, rows, columns, WHAT: tl.constexpr, NB: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """E[f] and its derivatives, with f = j, j^2, the log weight or log q - log p; j is the count less the mode"""
    KL: tl.constexpr = WHAT == 3
    VARIANCE: tl.constexpr = WHAT == 1
    unit, row, there = _lanes(rows, columns, SIZE)
    given = _load(second, second_row, second_column, unit, row, there)
    a, b, bad, empty = _ordinary(_load(first, first_row, first_column, unit, row, there), given, NB)
    success = _sigmoid(b)
    nu = b
    if NB:
        nu = b * 0.0 + 1.0
    mode, end = _mode(a, b, NB), _end(a)
    zero = a * 0.0
    r = zero + 1.0
    fire = zero
    logit = zero
    if KL:
        given_r = _load(r_p, r_row, r_column, unit, row, there)
        given_l = _load(l_p, l_row, l_column, unit, row, there)
        bad |= ~((given_r >= 0) & (given_r < INFINITY)) | (given_l != given_l)
        point = (given_r == 0) | (tl.abs(given_l) == INFINITY)  # no mass above 0, or nowhere
        r = tl.where(bad | point, 1.0, given_r)
        logit = tl.where(bad | point, 0.0, given_l)
        fire = _sigmoid(logit)
    total = zero + 1.0
    by_j = zero
    by_t = zero
    f_sum = zero
    f_j = zero
    f_t = zero
    j_t = zero
    of_r = zero  # of p's score in r, relative to that at the mode
    for DOWN in tl.static_range(2):
        j = zero
        x = zero
        t = zero
        log_p = zero  # relative to that at the mode
        score = zero
        go = there & ~(bad | empty)
        while _any(go):
            j, x, t, k = _outward(j, x, t, mode, a, success, NB, DOWN)
            if KL:
                before = r + (k - 1.0)
                sign = 1.0 - 2.0 * DOWN
                log_p += sign * tl.log(tl.div_rn(before * fire, k))
                score += sign * tl.div_rn(1.0, before)
            go = go & (nu * x > end) & (mode + j >= 0)
            w = tl.where(go, tl.exp(nu * x), 0.0)
            if WHAT == 0:
                f = j
            if VARIANCE:
                f = j * j
            if WHAT == 2:
                f = nu * x
            if KL:
                f = nu * x - log_p
                of_r += tl.where(go, w * score, 0.0)
            f = tl.where(go, w * f, 0.0)
            t_there = tl.where(go, t, 0.0)
            total += w
            by_j += w * j
            by_t += w * t_there
            f_sum += f
            f_j += f * j
            f_t += f * t_there
            if VARIANCE:
                j_t += w * j * t_there
    mean_j = by_j / total
    mean_t = by_t / total
    mean = f_sum / total
    # covariances of f with the scores in j and t
    with_j = f_j / total - mean * mean_j
    with_t = f_t / total - mean * mean_t
    if VARIANCE:
        mean -= mean_j * mean_j
        with_j -= 2.0 * mean_j * mean
        with_t -= 2.0 * mean_j * (j_t / total - mean_j * mean_t)
    if WHAT == 0:
        mean += mode
    if WHAT == 2:
        mean = tl.log(total) - mean
        with_j, with_t = -with_j, -with_t
    if NB:
        of_first, of_second = with_t, with_j * _sigmoid(-b)
    else:
        of_first, of_second = with_j * nu / a, with_t
    at_0 = zero
    i = row * columns + unit
    if KL:
        log_mass, score_at_mode, _ = _log_mass_and_scores(mode, r, logit)
        mean = mean - log_mass - tl.log(total)
        mean = tl.where(point, INFINITY, mean)
        # every count is 0: -log p(0)
        at_0 = given_r * _softplus(given_l)
        fired = _sigmoid(given_l)
        of_prior = tl.where(point, 0.0, -score_at_mode - of_r / total)
        of_l = tl.where(point, 0.0, r * fire - (mode + mean_j) * _sigmoid(-logit))
        of_prior = tl.where(empty, _softplus(given_l), of_prior)
        of_l = tl.where(empty, given_r * fired, of_l)
        at_0 = tl.where(given_l == INFINITY, INFINITY, at_0)
        of_first = tl.where(point, 0.0, of_first)
        of_second = tl.where(point, 0.0, of_second)
        tl.store(d_r + i, tl.where(bad, NAN, of_prior), mask=there)
        tl.store(d_l + i, tl.where(bad, NAN, of_l), mask=there)
    tl.store(value + i, tl.where(bad, NAN, tl.where(empty, at_0, mean)), mask=there)
    tl.store(d_first + i, tl.where(bad, NAN, tl.where(empty, 0.0, of_first)), mask=there)
    tl.store(d_second + i, tl.where(bad, NAN, tl.where(empty, 0.0, of_second)), mask=there)


# --- relaxed counts -------------------------------------------------------------------------------------------------


@triton.jit
def _arrivals(
    seed, temperature, temperature_row, temperature_column, r_q, r_row, r_column, logits, l_row, l_column,
    z, d_r, d_logits, rows, columns, POISSON: tl.constexpr, SMOOTHSTEP: tl.constexpr, HARD: tl.constexpr,
    UNTIL: tl.constexpr, STEPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    unit, row, there = _lanes(rows, columns, SIZE)
    key = tl.load(seed)
    i = row * columns + unit
    tau = _load(temperature, temperature_row, temperature_column, unit, row, there)
    logit = _load(logits, l_row, l_column, unit, row, there)
    rate = tl.exp(logit)
    r = rate * 0.0
    if not POISSON:
        r = _load(r_q, r_row, r_column, unit, row, there)
        rate *= r
    bad = ~((rate >= 0) & (rate <= MOST)) | ~((tau > 0) & (tau < INFINITY))
    empty = rate == 0
    usual = ~(bad | empty)
    tau = tl.where(usual, tau, 1.0)
    # the clamps keep every product finite, as in reference.py
    b = tl.exp(-tl.minimum(tl.maximum(tl.where(usual, logit, 0.0), -80.0), 80.0))
    r = tl.maximum(tl.where(usual, r, 1.0), 1e-15)
    until = 1.0 + tau * UNTIL
    clock = b * 0.0
    drift = b * 0.0
    count = b * 0.0
    of_l = b * 0.0
    of_r = b * 0.0
    go = there & usual
    k = 0
    while _any(go) & (k < STEPS):
        e = _exponential(key, i, i * 0 + k)
        if POISSON:
            clock += e
            u = clock * b
        else:
            waiting = r + k
            gap = e / waiting
            clock += gap
            drift += gap / waiting
            u = _expm1(tl.minimum(clock, 80.0)) * b
        u = tl.minimum(u, 1e30)
        x = (1.0 - u) / tau
        if SMOOTHSTEP:
            x = tl.minimum(tl.maximum(x, -1.0), 1.0)
            h = 0.5 + x * (0.75 - 0.25 * x * x)
            slope = 0.75 * (1.0 - x * x) / tau
        else:
            # the logistic function, without overflow at large negative x
            small = tl.exp(-tl.abs(x))
            h = tl.where(x >= 0, 1.0, small) / (1.0 + small)
            slope = small / ((1.0 + small) * (1.0 + small)) / tau
        if HARD:
            count += tl.where(go & (u < 1.0), 1.0, 0.0)
        else:
            count += tl.where(go, h, 0.0)
        of_l += tl.where(go, slope * u, 0.0)
        if not POISSON:
            of_r += tl.where(go, slope * (u + b) * drift, 0.0)
        if not SMOOTHSTEP:
            # the mean contribution of later arrivals
            late = go & (u >= until)
            if POISSON:
                flux = 1.0 / b
            else:
                flux = (r + k + 1.0) / (b + u)
            tail = flux * tau * _log1p(small)  # softplus of x, which is below -UNTIL
            flux *= h
            if not HARD:
                count += tl.where(late, tail, 0.0)
            of_l += tl.where(late, tail + flux * u, 0.0)
            if not POISSON:
                of_r += tl.where(late, tail / (r + k + 1.0) + drift * (tail + flux * (b + u)), 0.0)
        go = go & (u < until)
        k += 1
    bad |= go
    tl.store(z + i, tl.where(bad, NAN, count), mask=there)
    tl.store(d_logits + i, tl.where(bad, NAN, of_l), mask=there)
    if not POISSON:
        tl.store(d_r + i, tl.where(bad, NAN, of_r), mask=there)


@triton.jit
def _races(
    seed, temperature, temperature_row, temperature_column, log_rate, rate_row, rate_column,
    lowest, lowest_row, lowest_column, highest, highest_row, highest_column,
    z, d_log_rate, rows, columns, HARD: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    unit, row, there = _lanes(rows, columns, SIZE)
    key = tl.load(seed)
    i = row * columns + unit
    tau = _load(temperature, temperature_row, temperature_column, unit, row, there)
    a = _load(log_rate, rate_row, rate_column, unit, row, there)
    rate = tl.exp(a)
    bad = ~((rate >= 0) & (rate <= MOST)) | ~((tau > 0) & (tau < INFINITY))
    empty = rate == 0
    usual = there & ~(bad | empty)
    first = tl.where(usual, _load(lowest, lowest_row, lowest_column, unit, row, there), 0.0)
    last = tl.where(usual, _load(highest, highest_row, highest_column, unit, row, there), 0.0)
    a = tl.where(usual, a, 0.0)
    rate = tl.where(usual, rate, 1.0)
    tau = tl.where(usual, tau, 1.0)
    zero = a * 0.0
    top = zero - INFINITY
    total = zero
    mean = zero
    squares = zero
    winner = zero
    log_mass = zero  # relative to the first count's, so that it stays accurate at large counts
    step = 0
    width = tl.max(last - first, 0)
    while step <= width:
        k = first + step
        score = tl.where(k <= last, (log_mass - tl.log(_exponential(key, i, i * 0 + step))) / tau, -INFINITY)
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
    count = winner
    if not HARD:
        count = tl.maximum(mean + rate, 0.0)
    tl.store(z + i, tl.where(bad, NAN, tl.where(empty, 0.0, count)), mask=there)
    tl.store(d_log_rate + i, tl.where(bad, NAN, tl.where(empty, 0.0, squares / total / tau)), mask=there)


# --- two negative binomials, in double precision ----------------------------------------------------------------------


@triton.jit
def _softplus_difference(x, y):
    """softplus(x) - softplus(y) without cancellation"""
    d = x - y
    near = _log1p(_sigmoid(y) * _expm1(tl.minimum(tl.maximum(d, -1.0), 1.0)))
    return tl.where(tl.abs(d) < 1.0, near, _softplus(x) - _softplus(y))


@triton.jit
def _negative_binomial_kl(
    r_q, rq_row, rq_column, l_q, lq_row, lq_column, r_p, rp_row, rp_column, l_p, lp_row, lp_column,
    value, d_rq, d_lq, d_rp, d_lp, rows, columns,
    STEP_0: tl.constexpr, NODES_0: tl.constexpr, RANGE_0: tl.constexpr, RATIO_0: tl.constexpr,
    STEP_1: tl.constexpr, NODES_1: tl.constexpr, RANGE_1: tl.constexpr, RATIO_1: tl.constexpr,
    STEP_2: tl.constexpr, NODES_2: tl.constexpr,
    LOG_TAIL: tl.constexpr, LOG_FINEST_TAIL: tl.constexpr, RIGHT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The quadrature of reference.by_rule, with the coarsest of its rules that is accurate enough for an element"""
    unit, row, there = _lanes(rows, columns, SIZE)
    given_a = _load(r_q, rq_row, rq_column, unit, row, there).to(tl.float64)
    given_x = _load(l_q, lq_row, lq_column, unit, row, there).to(tl.float64)
    given_b = _load(r_p, rp_row, rp_column, unit, row, there).to(tl.float64)
    given_y = _load(l_p, lp_row, lp_column, unit, row, there).to(tl.float64)
    bad = ~((given_a >= 0) & (given_a < INFINITY) & (given_x < INFINITY))
    bad |= ~((given_b >= 0) & (given_b < INFINITY) & (given_y < INFINITY))
    q_is_0 = (given_a == 0) | (given_x == -INFINITY)
    p_is_0 = (given_b == 0) | (given_y == -INFINITY)
    usual = ~(bad | q_is_0 | p_is_0)
    a = tl.where(usual, given_a, 1.0)
    x = tl.where(usual, given_x, 0.0)
    b = tl.where(usual, given_b, 1.0)
    y = tl.where(usual, given_y, 0.0)
    log_a = tl.log(a)
    log_b = tl.log(b)
    odds = tl.exp(x)
    mean = a * odds
    furthest = tl.maximum(log_a + tl.maximum(x, 0.0), log_b + tl.maximum(y, 0.0))
    furthest = tl.maximum(furthest, -tl.minimum(log_a, log_b))
    apart = tl.abs(log_a - log_b)
    coarse = (furthest <= RANGE_0) & (apart <= RATIO_0)
    middle = (furthest <= RANGE_1) & (apart <= RATIO_1)
    step = tl.where(coarse, STEP_0 + 0.0 * a, tl.where(middle, STEP_1 + 0.0 * a, STEP_2))
    nodes = tl.where(coarse, NODES_0, tl.where(middle, NODES_1, NODES_2))
    log_tail = tl.where(coarse | middle, LOG_TAIL, LOG_FINEST_TAIL)
    # right of the last node, exp(scale + 1), the integrand is below the tail
    scale = tl.maximum((_log1p(mean) - log_tail) / tl.minimum(a, b) * 0.36787944117144233, 1e-100)
    nodes = tl.where(there & usual, nodes, 0)
    zero = a * 0.0
    of_value = zero
    of_a = zero
    of_b = zero
    of_l = zero
    most = tl.max(nodes, 0)
    for i in range(0, most):
        # at its last node where an element has fewer, so that everything is finite
        v = RIGHT - step * (tl.minimum(i, nodes - 1) + 0.5)
        small = tl.exp(-v)
        weight = tl.where(i < nodes, step * (1.0 + small), 0.0)
        t = scale * tl.exp(v - small)
        one_minus_s = -_expm1(-t)
        increase = odds * one_minus_s
        exponent = _log1p(increase)
        one_minus_g = -_expm1(-a * exponent)
        bracket = mean - one_minus_g / one_minus_s
        from_q = weight * tl.exp(-a * t)
        from_p = weight * tl.exp(-b * t)
        difference = from_q - from_p
        flux = t * bracket
        g_difference = (1.0 - one_minus_g) * difference
        of_value += bracket * difference
        of_a += odds * difference - exponent * g_difference / one_minus_s - flux * from_q
        of_b += flux * from_p
        of_l += difference - g_difference / (1.0 + increase)
    # the part in closed form
    coefficient = log_a - log_b + _softplus_difference(-y, -x)
    soft_p = _softplus(y)
    kl = mean * coefficient - a * _softplus_difference(x, y) + (b - a) * soft_p + of_value
    of_rq = odds * coefficient + odds - _softplus(x) + of_a
    of_lq = mean * (coefficient + of_l)
    of_rp = soft_p - mean / b + of_b
    of_lp = (b * tl.exp(y) - mean) * _sigmoid(-y)
    # at the edges: -log p(0), infinite or 0
    from_0 = q_is_0 & ~p_is_0
    fired = _softplus(given_y)
    edge = tl.where(from_0, given_b * fired, tl.where(q_is_0, 0.0, INFINITY))
    i = row * columns + unit
    kl = tl.where(usual, tl.maximum(kl, 0.0), edge)
    of_rp = tl.where(usual, of_rp, tl.where(from_0, fired, 0.0))
    of_lp = tl.where(usual, of_lp, tl.where(from_0, given_b * _sigmoid(given_y), 0.0))
    of_rq = tl.where(usual, of_rq, 0.0)
    of_lq = tl.where(usual, of_lq, 0.0)
    tl.store(value + i, tl.where(bad, NAN, kl).to(tl.float32), mask=there)
    tl.store(d_rq + i, tl.where(bad, NAN, of_rq).to(tl.float32), mask=there)
    tl.store(d_lq + i, tl.where(bad, NAN, of_lq).to(tl.float32), mask=there)
    tl.store(d_rp + i, tl.where(bad, NAN, of_rp).to(tl.float32), mask=there)
    tl.store(d_lp + i, tl.where(bad, NAN, of_lp).to(tl.float32), mask=there)


@triton.jit
def _log_q_over_p(
    z, r_q, rq_row, rq_column, l_q, lq_row, lq_column, r_p, rp_row, rp_column, l_p, lp_row, lp_column,
    value, d_z, d_rq, d_lq, d_rp, d_lp, samples, rows, columns, SIZE: tl.constexpr,
):  # fmt: skip
    unit, row, there = _lanes(rows, columns, SIZE)
    a = _load(r_q, rq_row, rq_column, unit, row, there).to(tl.float64)
    x = _load(l_q, lq_row, lq_column, unit, row, there).to(tl.float64)
    b = _load(r_p, rp_row, rp_column, unit, row, there).to(tl.float64)
    y = _load(l_p, lp_row, lp_column, unit, row, there).to(tl.float64)
    bad = ~((a >= 0) & (a < INFINITY) & (b >= 0) & (b < INFINITY)) | (x != x) | (y != y)
    a = tl.where(bad, 1.0, tl.maximum(a, 1e-300))
    b = tl.where(bad, 1.0, tl.maximum(b, 1e-300))
    rest_q = -_softplus(x)
    rest_p = -_softplus(y)
    coefficient = x + rest_q - y - rest_p
    of_a, slope_a = _log_gamma_and_digamma(a)
    of_b, slope_b = _log_gamma_and_digamma(b)
    total = a * 0.0
    count = a * 0.0
    in_a = a * 0.0
    in_b = a * 0.0
    i = row * columns + unit
    size = rows.to(tl.int64) * columns
    for s in range(0, samples):
        k = tl.load(z + s * size + i, mask=there, other=0.0).to(tl.float64)
        with_a, slope_with_a = _log_gamma_and_digamma(k + a)
        with_b, slope_with_b = _log_gamma_and_digamma(k + b)
        total += with_a - with_b + k * coefficient
        count += k
        in_a += slope_with_a
        in_b += slope_with_b
        of_z = slope_with_a - slope_with_b + coefficient
        tl.store(d_z + s * size + i, tl.where(bad, NAN, of_z).to(tl.float32), mask=there)
    total += samples * (of_b - of_a + a * rest_q - b * rest_p)
    fired_q = _sigmoid(x)
    fired_p = _sigmoid(y)
    of_lq = count * (1.0 - fired_q) - samples * a * fired_q
    of_lp = samples * b * fired_p - count * (1.0 - fired_p)
    tl.store(value + i, tl.where(bad, NAN, total).to(tl.float32), mask=there)
    tl.store(d_rq + i, tl.where(bad, NAN, in_a + samples * (rest_q - slope_a)).to(tl.float32), mask=there)
    tl.store(d_lq + i, tl.where(bad, NAN, of_lq).to(tl.float32), mask=there)
    tl.store(d_rp + i, tl.where(bad, NAN, samples * (slope_b - rest_p) - in_b).to(tl.float32), mask=there)
    tl.store(d_lp + i, tl.where(bad, NAN, of_lp).to(tl.float32), mask=there)


# --- closed forms: one launch instead of a hundred --------------------------------------------------------------------


@triton.jit
def _shared_dispersion_kl(
    r, r_row, r_column, l_q, lq_row, lq_column, l_p, lp_row, lp_column,
    value, d_r, d_lq, d_lp, rows, columns, SIZE: tl.constexpr,
):  # fmt: skip
    unit, row, there = _lanes(rows, columns, SIZE)
    a = _load(r, r_row, r_column, unit, row, there)
    given_x = _load(l_q, lq_row, lq_column, unit, row, there)
    given_y = _load(l_p, lp_row, lp_column, unit, row, there)
    bad = ~((a >= 0) & (a < INFINITY) & (given_x < INFINITY) & (given_y < INFINITY))
    q_is_0 = (a == 0) | (given_x == -INFINITY)
    p_is_0 = (a == 0) | (given_y == -INFINITY)
    usual = ~(bad | q_is_0 | p_is_0)
    x = tl.where(usual, given_x, 0.0)
    y = tl.where(usual, given_y, 0.0)
    odds = tl.exp(x)
    coefficient = _softplus_difference(-y, -x)
    of_r = odds * coefficient - _softplus_difference(x, y)
    # at the edges: -log p(0), infinite or 0
    from_0 = q_is_0 & ~p_is_0
    fired = _softplus(given_y)
    edge = tl.where(from_0, a * fired, tl.where(q_is_0, 0.0, INFINITY))
    kl = tl.where(usual, a * of_r, edge)
    of_r = tl.where(usual, of_r, tl.where(from_0, fired, 0.0))
    of_lq = tl.where(usual, a * odds * coefficient, 0.0)
    of_lp = tl.where(usual, a * (tl.exp(y) - odds) * _sigmoid(-y), tl.where(from_0, a * _sigmoid(given_y), 0.0))
    i = row * columns + unit
    tl.store(value + i, tl.where(bad, NAN, kl), mask=there)
    tl.store(d_r + i, tl.where(bad, NAN, of_r), mask=there)
    tl.store(d_lq + i, tl.where(bad, NAN, of_lq), mask=there)
    tl.store(d_lp + i, tl.where(bad, NAN, of_lp), mask=there)


@triton.jit
def _deviance(a, b):
    """a log(a / b) - a + b, and log(a / b); a and b not both 0"""
    apart = (a - b) / b
    near = tl.minimum(tl.maximum(apart, -0.1), 0.1)
    # (1 + d) log(1 + d) - d = d^2 / 2 - d^3 / 6 + d^4 / 12 - ...
    series = near * 0.0
    for n in tl.static_range(9, 1, -1):
        series = series * near + (1.0 - 2.0 * (n % 2)) / (n * (n - 1))
    some = tl.maximum(a, 1.1754943508222875e-38)
    log = tl.where(tl.abs(apart) < 0.5, _log1p(tl.minimum(tl.maximum(apart, -0.5), 0.5)), tl.log(some) - tl.log(b))
    far = tl.where(a > 0, a * log, 0.0) - (a - b)
    return tl.where(tl.abs(apart) < 0.1, b * near * near * series, far), log


@triton.jit
def _poisson_kl(
    rate_q, q_row, q_column, rate_p, p_row, p_column, value, d_q, d_p, rows, columns, SIZE: tl.constexpr
):  # fmt: skip
    unit, row, there = _lanes(rows, columns, SIZE)
    a = _load(rate_q, q_row, q_column, unit, row, there)
    b = _load(rate_p, p_row, p_column, unit, row, there)
    bad = ~((a >= 0) & (b >= 0))
    empty = (a == 0) & (b == 0)
    kl, log = _deviance(a, tl.where(empty, 1.0, b))
    kl = tl.where(empty, 0.0, kl)
    i = row * columns + unit
    tl.store(value + i, tl.where(bad, NAN, kl), mask=there)
    tl.store(d_q + i, tl.where(bad, NAN, tl.where(empty, 0.0, log)), mask=there)
    tl.store(d_p + i, tl.where(bad, NAN, tl.where(empty, 1.0, (b - a) / b)), mask=there)


# --- log masses -----------------------------------------------------------------------------------------------------


@triton.jit
def _negative_binomial_log_mass(
    count, k_row, k_column, r, r_row, r_column, logits, l_row, l_column,
    value, d_count, d_r, d_logits, rows, columns, SIZE: tl.constexpr,
):  # fmt: skip
    unit, row, there = _lanes(rows, columns, SIZE)
    k = _load(count, k_row, k_column, unit, row, there)
    given_r = _load(r, r_row, r_column, unit, row, there)
    given_l = _load(logits, l_row, l_column, unit, row, there)
    bad = ~((k >= 0) & (given_r >= 0) & (given_r < INFINITY)) | (given_l != given_l)
    zero = (given_r == 0) | (given_l == -INFINITY)
    usual = ~(bad | zero | (given_l == INFINITY))
    log_mass, in_r, in_k = _log_mass_and_scores(k, tl.where(usual, given_r, 1.0), tl.where(usual, given_l, 0.0))
    log_mass = tl.where(usual, log_mass, tl.where(zero & (k == 0), 0.0, -INFINITY))
    in_r = tl.where(zero, -_softplus(given_l), in_r)
    in_l = k * _sigmoid(-given_l) - given_r * _sigmoid(given_l)
    i = row * columns + unit
    tl.store(value + i, tl.where(bad, NAN, log_mass), mask=there)
    tl.store(d_count + i, tl.where(bad, NAN, in_k), mask=there)
    tl.store(d_r + i, tl.where(bad, NAN, in_r), mask=there)
    tl.store(d_logits + i, tl.where(bad, NAN, in_l), mask=there)


@triton.jit
def _poisson_log_mass(
    count, k_row, k_column, rate, rate_row, rate_column, value, d_count, d_rate, rows, columns, SIZE: tl.constexpr
):  # fmt: skip
    unit, row, there = _lanes(rows, columns, SIZE)
    k = _load(count, k_row, k_column, unit, row, there)
    mean = _load(rate, rate_row, rate_column, unit, row, there)
    bad = ~((k >= 0) & (mean >= 0))
    usual = (mean > 0) & (mean < INFINITY)
    deviance, _ = _deviance(k, tl.where(usual, mean, 1.0))
    log_mass = tl.where(usual, -deviance - _omega(k), tl.where((mean == 0) & (k == 0), 0.0, -INFINITY))
    in_rate = tl.where((mean == 0) & (k == 0), -1.0, (k - mean) / mean)
    i = row * columns + unit
    tl.store(value + i, tl.where(bad, NAN, log_mass), mask=there)
    tl.store(d_count + i, tl.where(bad, NAN, tl.log(mean) - _log1p(k) - _rho(1.0 + k)), mask=there)
    tl.store(d_rate + i, tl.where(bad, NAN, in_rate), mask=there)


# --- kernels: signatures and results as in reference.py, but for tensors of any shape ---------------------------------


def layout(shape: torch.Size) -> tuple[int, int]:
    """Return the numbers of rows, which are observations, and of columns, which are units."""
    number = shape.numel()
    columns = shape[-1] if len(shape) > 1 else 1
    # few observations would leave lanes empty
    return (number // columns, columns) if columns and number // columns >= SIZE else (number, 1)


def _strided(x: Tensor, shape: torch.Size) -> tuple[Tensor, int, int]:
    """Return a tensor with the distances of its rows and of its columns; parameters that are shared have none."""
    x = x.expand(shape).reshape(layout(shape))
    return x, x.stride(0), x.stride(1)


def launch(kernel: Any, like: Tensor, *arguments: object, **options: object) -> None:
    """Launch a kernel with a lane for each element of a tensor; a tensor without values needs none."""
    rows, columns = layout(like.shape)
    if like.is_meta or not rows:
        return
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[(triton.cdiv(rows, SIZE) * columns,)](*arguments, rows, columns, **options, SIZE=SIZE, num_warps=1)


def _run(
    kernel: Any, like: Tensor, outputs: int, inputs: Sequence[Tensor], before: Sequence[Tensor] = (), **options: object
) -> list[Tensor]:
    """Run a kernel that reads ``before``, inputs of the shape of ``like``, and writes this number of outputs."""
    found = [torch.empty(like.shape, dtype=like.dtype, device=like.device) for _ in range(outputs)]
    strided = [part for x in inputs for part in _strided(x, like.shape)]
    launch(kernel, like, *before, *strided, *found, **options)
    return found


def arrivals(
    seed: Tensor, temperature: Tensor, r: Tensor | None, logits: Tensor, indicator: str, straight_through: bool
) -> list[Tensor]:
    """As :func:`reference.arrivals`; an element with more than ``_MAX_ARRIVALS`` arrivals is nan."""
    options = {"POISSON": r is None, "SMOOTHSTEP": indicator == "smoothstep", "HARD": straight_through}
    inputs = temperature, logits if r is None else r, logits
    z, d_r, d_l = _run(_arrivals, logits, 3, inputs, [seed], UNTIL=TAIL[indicator], STEPS=_MAX_ARRIVALS, **options)
    return [z, d_l] if r is None else [z, d_r, d_l]


def races(
    seed: Tensor, temperature: Tensor, log_rate: Tensor, first: Tensor, last: Tensor, straight_through: bool
) -> list[Tensor]:
    """As :func:`reference.races`."""
    return _run(_races, log_rate, 2, (temperature, log_rate, first, last), [seed], HARD=straight_through)


def com_poisson_integers(rate: Tensor, nu: Tensor, uniform: Tensor) -> list[Tensor]:
    """As :func:`reference.com_poisson_integers`."""
    return _run(_integers, rate, 3, (rate, nu, uniform), NB=False)


def negative_binomial_integers(r: Tensor, logits: Tensor, uniform: Tensor) -> list[Tensor]:
    """As :func:`reference.negative_binomial_integers`; nan where a sum would have more than about 2^24 counts."""
    return _run(_integers, r, 3, (r, logits, uniform), NB=True)


def _summed(what: int, first: Tensor, second: Tensor, *prior: Tensor, nb: bool = False) -> list[Tensor]:
    """Return the value and the derivatives of a kernel of sums."""
    inputs = (first, second, *prior) if prior else (first, second, first, second)
    return _run(_sums, first, 5, inputs, WHAT=what, NB=nb)[: 3 + len(prior)]


def com_poisson_mean(rate: Tensor, nu: Tensor) -> list[Tensor]:
    """As :func:`reference.com_poisson_mean`."""
    return _summed(_MEAN, rate, nu)


def com_poisson_variance(rate: Tensor, nu: Tensor) -> list[Tensor]:
    """As :func:`reference.com_poisson_variance`."""
    return _summed(_VARIANCE, rate, nu)


def com_poisson_entropy(rate: Tensor, nu: Tensor) -> list[Tensor]:
    """As :func:`reference.com_poisson_entropy`."""
    return _summed(_ENTROPY, rate, nu)


def negative_binomial_entropy(r: Tensor, logits: Tensor) -> list[Tensor]:
    """As :func:`reference.negative_binomial_entropy`."""
    return _summed(_ENTROPY, r, logits, nb=True)


def com_poisson_kl(rate: Tensor, nu: Tensor, r: Tensor, logits: Tensor) -> list[Tensor]:
    """As :func:`reference.com_poisson_kl`."""
    return _summed(_KL, rate, nu, r, logits)


def negative_binomial_kl(r_q: Tensor, l_q: Tensor, r_p: Tensor, l_p: Tensor) -> list[Tensor]:
    """As :func:`reference.negative_binomial_kl`, with the rules for single precision."""
    coarse, middle, finest = RULES[torch.float32]
    options: dict[str, Any] = {
        "STEP_0": coarse.step,
        "NODES_0": coarse.nodes,
        "RANGE_0": coarse.log_range,
        "RATIO_0": coarse.log_dispersion_ratio,
        "STEP_1": middle.step,
        "NODES_1": middle.nodes,
        "RANGE_1": middle.log_range,
        "RATIO_1": middle.log_dispersion_ratio,
        "STEP_2": finest.step,
        "NODES_2": finest.nodes,
        "LOG_TAIL": math.log(coarse.tail),
        "LOG_FINEST_TAIL": math.log(finest.tail),
        "RIGHT": RIGHT,
    }
    return _run(_negative_binomial_kl, r_q, 5, (r_q, l_q, r_p, l_p), **options)


def negative_binomial_log_q_over_p(*samples_and_parameters: Tensor) -> list[Tensor]:
    """As :func:`reference.negative_binomial_log_q_over_p`."""
    *samples, r_q, l_q, r_p, l_p = samples_and_parameters
    z = torch.stack(samples)
    d_z = torch.empty_like(z)
    value, *others = (torch.empty(r_q.shape, dtype=r_q.dtype, device=r_q.device) for _ in range(5))
    strided = [part for x in (r_q, l_q, r_p, l_p) for part in _strided(x, r_q.shape)]
    launch(_log_q_over_p, r_q, z, *strided, value, d_z, *others, len(samples))
    return [value, *d_z.unbind(0), *others]


def shared_dispersion_kl(r: Tensor, l_q: Tensor, l_p: Tensor) -> list[Tensor]:
    """As :func:`reference.shared_dispersion_kl`."""
    return _run(_shared_dispersion_kl, r, 4, (r, l_q, l_p))


def poisson_kl(rate_q: Tensor, rate_p: Tensor) -> list[Tensor]:
    """As :func:`reference.poisson_kl`."""
    return _run(_poisson_kl, rate_q, 3, (rate_q, rate_p))


def negative_binomial_log_mass(count: Tensor, r: Tensor, logits: Tensor) -> list[Tensor]:
    """As :func:`reference.negative_binomial_log_mass`."""
    return _run(_negative_binomial_log_mass, count, 4, (count, r, logits))


def poisson_log_mass(count: Tensor, rate: Tensor) -> list[Tensor]:
    """As :func:`reference.poisson_log_mass`."""
    return _run(_poisson_log_mass, count, 3, (count, rate))
