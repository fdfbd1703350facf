"""The kernels as loops compiled for a CPU by numba: each over the elements of one chunk, in double precision inside.

The functions that :func:`pyro_nbvae.distributions.kernels.choose` returns are at the end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from pyro_nbvae.distributions import windows
from pyro_nbvae.distributions.kernels import reference
from pyro_nbvae.distributions.kernels.reference import END, LARGEST, RULES, START, TAIL
from pyro_nbvae.distributions.threads import CHUNK_ELEMENTS, in_chunks, unsplit

# Numbers that are computed together; a multiple of 8 that divides 2 * _MAX_HALF_WIDTH.
_WIDTH = 32
_compile_loop: Callable[..., Any] = njit(nogil=True, cache=True, error_model="numpy")
# With a product and a sum in one instruction.
_compile_fused: Callable[..., Any] = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
_compile_inline: Callable[..., Any] = njit(nogil=True, error_model="numpy", inline="always")
# Sums in any order, as many terms at once as the processor's vectors hold.
_compile_sum: Callable[..., Any] = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"})
# The largest of numbers that are not NaN, in vectors as well.
_compile_largest: Callable[..., Any] = njit(nogil=True, cache=True, error_model="numpy", fastmath={"nnan", "nsz"})

# Number of counts on each side of the mode whose weights a loop keeps.
_MAX_HALF_WIDTH = 1 << 20
# log k! of the first counts. Larger ones would lose digits in a difference.
_COUNTS = np.arange(1 << 12, dtype=np.longdouble)
_POSITIVE = np.maximum(_COUNTS, 1)
_LONG_LOG_FACTORIALS = np.cumsum(np.log(_POSITIVE))
_LOG_FACTORIALS = _LONG_LOG_FACTORIALS.astype(np.float64)
_LOGARITHMS = np.log(_POSITIVE.astype(np.float64))
# omega(k) = log k! - k log k + k, and digamma(k + 1) - log(k + 1), of these counts.
_OMEGA = (_LONG_LOG_FACTORIALS - _COUNTS * np.log(_POSITIVE) + _COUNTS).astype(np.float64)
_RHO = (np.cumsum(1 / _POSITIVE) - 1 - np.longdouble(np.euler_gamma) - np.log(_COUNTS + 1)).astype(np.float64)


def _reinterpreted(source: Any, target: Any) -> Any:
    @intrinsic
    def reinterpret(typing, value):
        def lower(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), lower

    return reinterpret


_bits_of = _reinterpreted(types.float64, types.int64)
_of_bits = _reinterpreted(types.int64, types.float64)


# The C library's logarithm and exponential take one number at a time. Those below have no branches, so that the
# compiler computes as many numbers at once as the processor's vectors hold.


@_compile_fused
def _log_of(x):
    """Return log(x): x = 2^e m, log m = 2 atanh((m - 1) / (m + 1)).

    Where x is 0, subnormal or not finite, the result is a wrong number.
    """
    bits = _bits_of(x)
    m = _of_bits((bits & 0xFFFFFFFFFFFFF) | 0x3FE0000000000000)  # from 1/2 to 1
    power = _of_bits((bits >> 52) | 0x4330000000000000) - (4503599627370496.0 + 1022)
    above = m > 0.7071067811865476
    m = m if above else 2 * m
    power = power if above else power - 1
    s = (m - 1) / (m + 1)
    y = s * s  # at most 0.0295
    series = 1 / 17 + y * (1 / 19 + y * (1 / 21 + y / 23))
    series = 1 / 9 + y * (1 / 11 + y * (1 / 13 + y * (1 / 15 + y * series)))
    series = y * (1 / 3 + y * (1 / 5 + y * (1 / 7 + y * series)))
    return power * 0.6931471805599453 + 2 * (s + s * series)


@_compile_fused
def _power_and_rest(x):
    """Return 2^n and exp(f) - 1, with x = n log 2 + f, for x from -700 to 700."""
    shifted = x * 1.4426950408889634 + 6755399441055744.0  # 1.5 * 2^52: the last bits hold n
    n = shifted - 6755399441055744.0
    f = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10  # log 2 in two parts; |f| < 0.347
    series = 1 / 3628800 + f * (1 / 39916800 + f * (1 / 479001600 + f * (1 / 6227020800)))
    series = 1 / 720 + f * (1 / 5040 + f * (1 / 40320 + f * (1 / 362880 + f * series)))
    series = f * (1 / 2 + f * (1 / 6 + f * (1 / 24 + f * (1 / 120 + f * series))))
    return _of_bits((_bits_of(shifted) + 1023) << 52), f + f * series


@_compile_fused
def _exp(x):
    power, rest = _power_and_rest(x)
    return power + power * rest


@_compile_fused
def _expm1(x):
    power, rest = _power_and_rest(x)
    return power * rest + (power - 1)


@_compile_loop
def _log1p(x):
    """Return log(1 + x) for x from 0 to 1e300."""
    y = 1 + x
    return _log_of(y) - ((y - 1) - x) / y  # the second term is the rounding of y


@_compile_inline
def _softplus(x):
    return max(x, 0.0) + _log1p(_exp(-min(abs(x), 700.0)))


@_compile_inline
def _softplus_difference(x, y):
    """Return softplus(x) - softplus(y) without cancellation."""
    low, high = min(x, y), max(x, y)
    near = _log1p(_expm1(min(high - low, 30.0)) / (1 + _exp(max(min(-low, 700.0), -700.0))))
    difference = near if high - low < 30 else _softplus(high) - _softplus(low)
    return difference if x > y else -difference


@_compile_loop
def _digamma(x):
    value = 0.0
    while x < 8:
        value -= 1 / x
        x += 1
    y = 1 / (x * x)
    return value + math.log(x) - 0.5 / x - y * (1 / 12 - y * (1 / 120 - y * (1 / 252 - y * (1 / 240 - y / 132))))


@_compile_loop
def _negative_binomial_integers_loop(chunk, r, logits, uniform, z, d_r, d_logits, start, end, most):
    """Loop of :func:`negative_binomial_integers`.

    It is nan where a parameter is not allowed, or where more than about ``most`` counts would be summed. It starts
    about ``start`` nats below the mode and ends beyond the mean where the masses that are left, about
    mass * (1 + odds), are below ``end``.
    """
    for i in range(len(r)):
        shape, logit, level = np.float64(r[i]), np.float64(logits[i]), np.float64(uniform[i])
        odds = math.exp(logit)
        success = odds / (1 + odds)
        mean = shape * odds
        if not (shape >= 0 and math.sqrt(2 * start * mean * (1 + odds)) + (1 + odds) <= most):
            z[i], d_r[i], d_logits[i] = np.nan, np.nan, np.nan
            continue
        k, score = 0.0, -math.log1p(odds)
        log_mass = shape * score
        first = math.floor(mean - math.sqrt(2 * start * mean * (1 + odds)))
        if first > 0:
            k = first
            log_mass += math.lgamma(shape + k) - math.lgamma(shape) - math.lgamma(k + 1) + k * math.log(success)
            score += _digamma(shape + k) - _digamma(shape)
        mass = math.exp(log_mass)
        total, moment = mass, 0.0
        while total < level and (mass * (1 + odds) > end or k < mean):
            moment += mass * score
            mass *= (shape + k) * success / (k + 1)
            score += 1 / (shape + k)
            k += 1
            total += mass
        z[i] = k
        d_r[i] = -(moment / mass + 0.5 * score)
        d_logits[i] = 0.5 * (k + (k + shape) * success)


@_compile_loop
def _stride(rate, nu, end):
    """Return the distance of counts whose sum, times it, is the sum over all counts, up to exp(end).

    By Poisson's summation formula the relative error is the characteristic function at t = 2 pi / stride. That of a
    Poisson is exp(-rate (1 - cos t)). Here it is about exp(-nu rate (1 - cos(t / nu))), and for nu above 1 below
    exp(-rate / nu (1 - cos t)). The window must not touch 0.
    """
    wide = min(nu, 1.0)
    decay = wide * wide * rate / nu
    end -= 6  # for the derivatives, whose factors are large at the window's ends
    if nu * (rate - 0.5 * math.log(2 * math.pi * max(rate, 1.0))) < -end or 2 * decay < -end:
        return 1
    return max(1, int(2 * math.pi / (wide * math.acos(1 + end / decay))))


@_compile_fused
def _stirling(inverse):
    """Return log Gamma(x) - (x - 1/2) log x + x - log(2 pi) / 2 and digamma(x) - log x, of 1 / x for x from 8."""
    y = inverse * inverse
    value = inverse * (1 / 12 - y * (1 / 360 - y * (1 / 1260 - y * (1 / 1680 - y * (1 / 1188 - y * (691 / 360360))))))
    slope = 1 / 12 - y * (1 / 120 - y * (1 / 252 - y * (1 / 240 - y * (1 / 132 - y * (691 / 32760)))))
    return value, -0.5 * inverse - y * slope


@_compile_fused
def _log_gamma_ratio(base, inverse_base, log_base, d):
    """Return log Gamma(base + d) and digamma(base + d) up to constants, by Stirling's series; both arguments from 8."""
    x = d * inverse_base
    y = 1 + x
    inverse_y = 1 / y
    log = _log_of(y) - ((y - 1) - x) * inverse_y  # log(1 + x), as in _log1p
    value, slope = _stirling(inverse_y * inverse_base)
    return (base + d - 0.5) * log + d * (log_base - 1) + value, log + slope


@_compile_fused
def _log_gamma_ratios(r, mode, low, stride, log_gamma, digamma):
    """Compute log Gamma(k + r) and digamma(k + r), up to constants, at the counts k = mode + (low + i) * stride.

    A few successive small numbers are multiplied. Others are differences from the terms of Stirling's series at a point
    near the mode, which stay accurate where that is large; arguments below 8 are moved up by 8.
    """
    first = (mode + low * stride) + r  # in this order: the count is exact, and r may be tiny
    if stride == 1 and first < 8 and len(log_gamma) <= 128:  # 136! / 8! is a number
        for i in range(len(digamma)):
            digamma[i] = 1 / (first + i)
        product, inverses = 1.0, 0.0
        for i in range(len(log_gamma)):
            inverse = digamma[i]
            log_gamma[i], digamma[i] = product, inverses
            product *= first + i
            inverses += inverse
        for i in range(len(log_gamma)):
            log_gamma[i] = _log_of(log_gamma[i])
        return
    up = 8.0 if mode + r < 8 else 0.0
    base = mode + r + up
    inverse_base, log_base = 1 / base, math.log(base)
    small = min(max(math.ceil((8 - min(r, 8.0) - mode) / stride) - low, 0), len(log_gamma))
    for i in range(len(log_gamma)):
        d = np.float64((low + i) * stride) + ((8.0 if i < small else 0.0) - up)
        log_gamma[i], digamma[i] = _log_gamma_ratio(base, inverse_base, log_base, d)
    # whole vectors, of which the last may go beyond the small ones
    for i in range(min((small + 7) // 8 * 8, len(log_gamma))):
        x = (mode + (low + i) * stride) + r
        t = x * (x + 7)  # x (x + 1) ... (x + 7) = t (t + 6) (t + 10) (t + 12)
        outer, inner = t * (t + 6), (t + 10) * (t + 12)
        log_gamma[i] -= _log_of(outer * inner) if i < small else 0.0
        digamma[i] -= (2 * x + 7) * ((2 * t + 6) * inner + (2 * t + 22) * outer) / (outer * inner) if i < small else 0.0


@_compile_loop
def _log_rising(r, k):
    """Return log Gamma(r + k) - log Gamma(r) and digamma(r + k) - digamma(r), for a count k."""
    product, inverses = 1.0, 0.0
    while k > 0 and r < 8:
        product *= r
        inverses += 1 / r
        r += 1
        k -= 1
    if k == 0:
        return math.log(product), inverses
    log, of_r, of_sum = math.log1p(k / r), _stirling(1 / r), _stirling(1 / (r + k))
    value = (r + k - 0.5) * log + k * (math.log(r) - 1) + (of_sum[0] - of_r[0])
    return value + math.log(product), log + (of_sum[1] - of_r[1]) + inverses


@_compile_loop
def _weights(log_rate, nu, mode, stride, end, weight, log_weight):
    """Compute the weights of every ``stride``-th count around the mode, relative to the mode's, and their logs over nu.

    Returns:
        j of the first count, mode + j * stride, with a log weight above ``end``; the number of counts from there to the
        last such count, and at least to one above the mode; and their weights and logs over nu. These are views of the
        arrays, of whole vectors, which are 0 after the last count.
    """
    # The log weight over nu at a distance d + 1 above the mode is below -d^2 / 2 / (mode + 1 + d / 3), and at d + 1
    # below the mode below -d^2 / 2 / mode.
    depth = -end / nu
    up = 1 + depth / 3 + math.sqrt(depth * depth / 9 + 2 * depth * (mode + 1))
    down = 1 + math.sqrt(2 * depth * mode)
    high, low = (
        int(min(1 + up / stride, _MAX_HALF_WIDTH - 1)),
        -int(min(1 + down / stride, mode // stride, _MAX_HALF_WIDTH - 1)),
    )
    first, last = mode + low * stride, mode + high * stride
    log_weights = log_weight[: high - low + 1]
    # slices, because an index that might be negative is not computed in vectors
    if last < len(_LOG_FACTORIALS):
        factorials = _LOG_FACTORIALS[first : last + 1 : stride]
        for i in range(len(log_weights)):
            log_weights[i] = (low + i) * stride * log_rate - (factorials[i] - _LOG_FACTORIALS[mode])
    else:
        _log_gamma_ratios(1.0, mode, low, stride, log_weights, weight[: len(log_weights)])
        at_mode = log_weights[-low]
        for i in range(len(log_weights)):
            log_weights[i] = (low + i) * stride * log_rate - (log_weights[i] - at_mode)
    start, stop = 0, len(log_weights)
    while nu * log_weights[start] < end:
        start += 1
    # at least one above the mode, of which the derivatives at tiny rates are
    while stop > 2 - low and nu * log_weights[stop - 1] < end:
        stop -= 1
    number = stop - start
    for i in range(8):
        log_weight[stop + i] = 0.0
    size = (number + 7) // 8 * 8
    filled, logs = weight[:size], log_weight[start : start + size]
    for i in range(size):
        filled[i] = _exp(max(nu * logs[i], -700.0))
    for i in range(8):
        weight[number + i] = 0.0
    return low + start, number, filled, logs


@_compile_sum
def _sum_of(weights, values):
    total = 0.0
    for i in range(len(weights)):
        total += weights[i] * values[i]
    return total


@_compile_sum
def _sums(weights, log_weights, low):
    """Return the sums of the weights, of the weights times j, which starts at ``low``, and times the log weights."""
    total, by_count, by_log = 0.0, 0.0, 0.0
    for i in range(len(weights)):
        total += weights[i]
        by_count += weights[i] * (low + i)
        by_log += weights[i] * log_weights[i]
    return total, by_count, by_log


@_compile_sum
def _sums_of_log_q_over_p(weights, log_weights, low, nu, log_p):
    """Return the sums of the weights times f = nu log_weight - log p, times f j and times f log_weight."""
    total, by_count, by_log = 0.0, 0.0, 0.0
    for i in range(len(weights)):
        f = weights[i] * (nu * log_weights[i] - log_p[i])
        total += f
        by_count += f * (low + i)
        by_log += f * log_weights[i]
    return total, by_count, by_log


@_compile_loop
def _half_width(rate, nu, end):
    """Return a bound (Bernstein's) on how far the counts of a window are from the rate.

    It is 0 at rate 0, and nan where a parameter is not allowed or the window has more than _MAX_HALF_WIDTH counts.
    """
    if not (0 <= rate < 2.0**52 and 0 < nu < np.inf):  # larger counts are not exact
        return np.nan
    if rate == 0:
        return 0.0
    nats = -end / nu
    half_width = nats + math.sqrt(2 * nats * rate)
    return half_width if half_width < _MAX_HALF_WIDTH / 2 else np.nan


@_compile_loop
def _largest_counts_loop(chunk, rate, nu, largest_count, end):
    """Compute a count above each window, and 0 where there is none."""
    for i in range(len(rate)):
        mu = np.float64(rate[i])
        last = mu + _half_width(mu, np.float64(nu[i]), end)
        largest_count[i] = last if last >= 0 else 0.0


# Gauss's quadrature of a sum over 16, 32, 64, ... successive counts: nodes and weights.
_NODES = 8


def _gauss(counts: int) -> np.ndarray:
    """Return the nodes from 0 to ``counts`` - 1 and their weights, (2, _NODES), by Gram's polynomials."""
    n = np.arange(1.0, _NODES)
    beside = np.sqrt(n * n * (counts**2 - n * n) / (4 * (4 * n * n - 1)))
    nodes, vectors = np.linalg.eigh(np.diag(beside, 1) + np.diag(beside, -1))
    return np.stack([nodes + (counts - 1) / 2, counts * vectors[0] ** 2])


_BLOCKS = np.stack([_gauss(16 << i) for i in range(14)])


@_compile_loop
def _block(mu, nu, end):
    """Return i so that 16 << i counts are a block for :func:`_blocks`; negative where counts one by one are as fast.

    A block is at most a standard deviation and a third wide, and the window begins at least a block above 0.
    """
    if mu < 576 * nu:
        return -1
    i = min(int(math.log2(math.sqrt(mu / nu) * 4 / 3)), 17) - 4
    return i if mu - math.sqrt(-2 * end / nu * mu) > 2 * (16 << i) else -1


@_compile_fused
def _log_weights_at(distance, log_rate, nu, mode, weight, log_weight):
    """Compute weights relative to that of the mode, and their logs over nu, at real distances from the mode."""
    base = mode + 1.0
    inverse_base, log_base = 1 / base, math.log(base)
    at_mode = _log_gamma_ratio(base, inverse_base, log_base, 0.0)[0]
    for i in range(len(distance)):
        d = distance[i]
        log_weight[i] = d * log_rate - (_log_gamma_ratio(base, inverse_base, log_base, d)[0] - at_mode)
    for i in range(len(distance)):
        weight[i] = _exp(max(nu * log_weight[i], -700.0))


@_compile_sum
def _sums_of_block(nodes, weights, distances, log_weights):
    total, by_count, by_log = 0.0, 0.0, 0.0
    for i in range(_NODES):
        w = nodes[i] * weights[i]
        total += w
        by_count += w * distances[i]
        by_log += w * log_weights[i]
    return total, by_count, by_log


@_compile_loop
def _blocks(log_rate, nu, mode, block, end, blocks, distance, weight, log_weight):
    """Compute sums over blocks of counts by quadrature.

    Returns:
        The first count minus the mode, and the number of blocks; ``blocks`` has a row for each: the sum of the weights,
        relative to that of the mode, and the sums of these times the count minus the mode and times the log weight
        over nu.
    """
    depth, counts, nodes = -end / nu, 16 << block, _BLOCKS[block]
    low = -int(1 + math.sqrt(2 * depth * mode))
    high = int(1 + depth / 3 + math.sqrt(depth * depth / 9 + 2 * depth * (mode + 1)))
    number = (high - low) // counts + 1
    for b in range(number):
        for i in range(_NODES):
            distance[b * _NODES + i] = low + b * counts + nodes[0, i]
    _log_weights_at(distance[: number * _NODES], log_rate, nu, mode, weight, log_weight)
    for b in range(number):
        own = slice(b * _NODES, (b + 1) * _NODES)
        blocks[b, 0], blocks[b, 1], blocks[b, 2] = _sums_of_block(nodes[1], weight[own], distance[own], log_weight[own])
    return low, number


@_compile_inline
def _invert(uniform, weights, log_weights, low, total, by_count, by_log):
    """Return the j of the count, and -dz/dT summed up to it for the scores T = j and T = log weight.

    It sums from the nearer end, which avoids cancellation.
    """
    mean_count, mean_log = by_count / total, by_log / total
    level = uniform * total
    j, step, left = 0, 1, level
    if level > 0.5 * total:
        j, step, left = len(weights) - 1, -1, total - level
    moment_count, moment_log = 0.0, 0.0
    w = weights[j]
    while left > w and 0 <= j + step < len(weights):
        left -= w
        moment_count += w * (low + j - mean_count)
        moment_log += w * (log_weights[j] - mean_log)
        j += step
        w = weights[j]
    of_count = step * (moment_count / w + 0.5 * (low + j - mean_count))
    return low + j, of_count, step * (moment_log / w + 0.5 * (log_weights[j] - mean_log))


@_compile_loop
def _invert_by_blocks(uniform, log_rate, nu, mode, block, end, blocks, distance, weight, log_weight):
    """As :func:`_invert`, where only the counts of one block are summed one by one."""
    low, number = _blocks(log_rate, nu, mode, block, end, blocks, distance, weight, log_weight)
    total, by_count, by_log = 0.0, 0.0, 0.0
    for b in range(number):
        total += blocks[b, 0]
        by_count += blocks[b, 1]
        by_log += blocks[b, 2]
    mean_count, mean_log = by_count / total, by_log / total
    level = uniform * total
    b, step, left = 0, 1, level
    if level > 0.5 * total:
        b, step, left = number - 1, -1, total - level
    moment_count, moment_log = 0.0, 0.0
    while left > blocks[b, 0] and 0 <= b + step < number:
        left -= blocks[b, 0]
        moment_count += blocks[b, 1] - mean_count * blocks[b, 0]
        moment_log += blocks[b, 2] - mean_log * blocks[b, 0]
        b += step
    counts = 16 << block
    low += b * counts
    for k in range(counts):
        distance[k] = low + k
    _log_weights_at(distance[:counts], log_rate, nu, mode, weight, log_weight)
    j = 0 if step == 1 else counts - 1
    while left > weight[j] and 0 <= j + step < counts:
        left -= weight[j]
        moment_count += weight[j] * (low + j - mean_count)
        moment_log += weight[j] * (log_weight[j] - mean_log)
        j += step
    of_count = step * (moment_count / weight[j] + 0.5 * (low + j - mean_count))
    return low + j, of_count, step * (moment_log / weight[j] + 0.5 * (log_weight[j] - mean_log))


@_compile_loop
def _com_poisson_integers_loop(chunk, rate, nu, uniform, z, d_rate, d_nu, end):
    """Loop of :func:`com_poisson_integers`."""
    weight, log_weight = np.empty(2 * _MAX_HALF_WIDTH), np.empty(2 * _MAX_HALF_WIDTH)
    blocks, distance = np.empty((_MAX_HALF_WIDTH // 16, 3)), np.empty(_MAX_HALF_WIDTH)
    for i in range(len(rate)):
        mu, v, u = np.float64(rate[i]), np.float64(nu[i]), np.float64(uniform[i])
        half_width = _half_width(mu, v, end)
        if mu == 0 or not half_width < _MAX_HALF_WIDTH / 2:
            z[i] = d_rate[i] = d_nu[i] = half_width
            continue
        mode, log_mu, block = int(mu), math.log(mu), _block(mu, v, end)
        if block < 0:
            low, number, weights, log_weights = _weights(log_mu, v, mode, 1, end, weight, log_weight)
            weights, log_weights = weights[:number], log_weights[:number]
            total, by_count, by_log = _sums(weights, log_weights, low)
            count, of_count, of_log = _invert(u, weights, log_weights, low, total, by_count, by_log)
        else:
            count, of_count, of_log = _invert_by_blocks(
                u, log_mu, v, mode, block, end, blocks, distance, weight, log_weight
            )
        z[i], d_rate[i], d_nu[i] = mode + count, -of_count * v / mu, -of_log


@_compile_loop
def _com_poisson_kl_by_table_loop(
    chunk, rate, nu, largest_count, table_row, value, derivatives, tables, starts, smooth, end
):
    """Compute E[log q - log p] and its derivatives in the rate, in nu and in p's arguments.

    Args:
        largest_count: what :func:`_largest_counts_loop` computes.
        table_row: the row of the tables that each element reads.
        derivatives: (n, 2 + number of p's arguments), an output.
        tables: log p and its derivatives, (1 + number of p's arguments, counts of all rows), where a row has the counts
            from 0 that its elements reach.
        starts: the first place of each row.
        smooth: whether log p is a smooth function of the count, so that some of the counts are enough.
    """
    weight, log_weight = np.empty(2 * _MAX_HALF_WIDTH), np.empty(2 * _MAX_HALF_WIDTH)
    for i in range(len(rate)):
        mu, v, row = np.float64(rate[i]), np.float64(nu[i]), table_row[i]
        if not largest_count[i] > 0:  # every count is 0, or nan
            half_width = _half_width(mu, v, end)
            value[i], derivatives[i, :2] = half_width - tables[0, starts[row]], half_width
            derivatives[i, 2:] = half_width - tables[1:, starts[row]]
            continue
        mode = int(mu)
        stride = _stride(mu, v, end) if smooth else 1
        low, number, weights, log_weights = _weights(math.log(mu), v, mode, stride, end, weight, log_weight)
        weights, log_weights = weights[:number], log_weights[:number]
        of_p = tables[:, starts[row] + mode + low * stride :: stride]
        total, by_count, by_log = _sums(weights, log_weights, low)
        f_total, f_count, f_log = _sums_of_log_q_over_p(weights, log_weights, low, v, of_p[0])
        mean = f_total / total
        value[i] = mean - math.log(stride * total)
        derivatives[i, 0] = (f_count - mean * by_count) * stride / total * v / mu
        derivatives[i, 1] = (f_log - mean * by_log) / total
        for s in range(1, len(of_p)):
            derivatives[i, 1 + s] = -_sum_of(weights, of_p[s]) / total


@_compile_sum
def _sums_of_kl(weights, log_weights, low, nu, slant, log_gamma, of_mode, digamma, slope_of_mode):
    """Return the sums of :func:`_sums`, the sums of the weights times f, f j and f log_weight, and times digamma.

    f = log q - log p is (nu - 1) log_weight - log Gamma(k + r) + j slant here, and 0 at the mode, as is digamma.
    """
    total, by_count, by_log, f_total, f_count, f_log, slope = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(len(weights)):
        j, w, log = np.float64(low + i), weights[i], log_weights[i]
        f = w * (nu * log - log - (log_gamma[i] - of_mode) + j * slant)
        total += w
        by_count += w * j
        by_log += w * log
        f_total += f
        f_count += f * j
        f_log += f * log
        slope += w * (digamma[i] - slope_of_mode)
    return total, by_count, by_log, f_total, f_count, f_log, slope


@_compile_loop
def _com_poisson_kl_loop(chunk, rate, nu, r, logits, value, d_rate, d_nu, d_r, d_logits, end):
    """Loop of :func:`com_poisson_kl`."""
    weight, log_weight = np.empty(2 * _MAX_HALF_WIDTH), np.empty(2 * _MAX_HALF_WIDTH)
    log_gamma, digamma = np.empty(2 * _MAX_HALF_WIDTH), np.empty(2 * _MAX_HALF_WIDTH)
    for i in range(len(rate)):
        mu, v, shape, logit = np.float64(rate[i]), np.float64(nu[i]), np.float64(r[i]), np.float64(logits[i])
        half_width = _half_width(mu, v, end)
        if not (half_width < _MAX_HALF_WIDTH / 2 and 0 <= shape < np.inf and logit <= np.inf):
            value[i] = d_rate[i] = d_nu[i] = d_r[i] = d_logits[i] = np.nan
            continue
        if logit == np.inf or (mu > 0 and (shape == 0 or logit == -np.inf)):  # p has no mass there
            value[i] = np.inf
            d_rate[i] = d_nu[i] = d_r[i] = d_logits[i] = 0.0
            continue
        odds = math.exp(-abs(logit))  # at most 1
        fired, rest = (1 / (1 + odds), odds / (1 + odds)) if logit > 0 else (odds / (1 + odds), 1 / (1 + odds))
        soft = math.log1p(odds)
        log_fired, log_rest = min(logit, 0.0) - soft, -max(logit, 0.0) - soft
        if mu == 0:  # every count is 0: -log p(0)
            value[i], d_rate[i], d_nu[i], d_r[i] = -shape * log_rest, 0.0, 0.0, -log_rest
            d_logits[i] = shape * fired
            continue
        shape, mode, log_mu = max(shape, 1e-300), int(mu), math.log(mu)
        stride = _stride(mu, v, end)
        low, _, weights, log_weights = _weights(log_mu, v, mode, stride, end, weight, log_weight)
        ratios, slopes = log_gamma[: len(weights)], digamma[: len(weights)]
        _log_gamma_ratios(shape, mode, low, stride, ratios, slopes)
        slant = (log_mu - log_fired) * stride
        total, by_count, by_log, f_total, f_count, f_log, slope = _sums_of_kl(
            weights, log_weights, low, v, slant, ratios, ratios[-low], slopes, slopes[-low]
        )
        mean = f_total / total
        log_rising, score = _log_rising(shape, mode)
        factorial = _LOG_FACTORIALS[mode] if mode < len(_LOG_FACTORIALS) else math.lgamma(mode + 1.0)
        of_mode = log_rising - factorial + mode * log_fired + shape * log_rest  # log p
        value[i] = mean - math.log(stride * total) - of_mode
        d_rate[i] = (f_count - mean * by_count) * stride / total * v / mu
        d_nu[i] = (f_log - mean * by_log) / total
        d_r[i] = -slope / total - score - log_rest
        d_logits[i] = shape * fired - (mode + stride * by_count / total) * rest


@_compile_sum
def _higher_sums(weights, log_weights, low):
    """Return the sums of the weights times j^2, j x, x^2, j^3 and j^2 x; j starts at ``low``, x is the log weight."""
    jj, jx, xx, jjj, jjx = 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(len(weights)):
        w, j, x = weights[i], np.float64(low + i), log_weights[i]
        jj += w * j * j
        jx += w * j * x
        xx += w * x * x
        jjj += w * j * j * j
        jjx += w * j * j * x
    return jj, jx, xx, jjj, jjx


_LOG_NORMALIZER, _MEAN, _VARIANCE, _ENTROPY = range(4)


@_compile_loop
def _com_poisson_moments_loop(chunk, rate, nu, value, d_rate, d_nu, what, end):
    """Loop of :func:`com_poisson_log_normalizer`, and of the mean, the variance and the entropy."""
    weight, log_weight = np.empty(2 * _MAX_HALF_WIDTH), np.empty(2 * _MAX_HALF_WIDTH)
    for i in range(len(rate)):
        mu, v = np.float64(rate[i]), np.float64(nu[i])
        half_width = _half_width(mu, v, end)
        if mu == 0 or not half_width < _MAX_HALF_WIDTH / 2:
            value[i] = d_rate[i] = d_nu[i] = half_width
            continue
        mode, stride = int(mu), _stride(mu, v, end)
        low, _, weights, log_weights = _weights(math.log(mu), v, mode, stride, end, weight, log_weight)
        total, j, x = _sums(weights, log_weights, low)
        jj, jx, xx, jjj, jjx = _higher_sums(weights, log_weights, low)
        j, x, jj, jx, xx, jjj, jjx = j / total, x / total, jj / total, jx / total, xx / total, jjj / total, jjx / total
        variance, with_log = jj - j * j, jx - j * x
        if what == _LOG_NORMALIZER:
            of_mode = _poisson_log_mass(np.float64(mode), mu)[0]
            value[i] = math.log(stride * total) + v * of_mode
            d_rate[i] = ((mode - mu) + stride * j) * v / mu
            d_nu[i] = of_mode + x
            continue
        if what == _MEAN:
            value[i] = mode + stride * j
            by_count, by_log = variance * stride, with_log * stride
        elif what == _VARIANCE:
            value[i] = variance * stride * stride
            by_count = (jjj - 3 * j * jj + 2 * j * j * j) * stride * stride
            by_log = (jjx - jj * x - 2 * j * with_log) * stride * stride
        else:
            value[i] = math.log(stride * total) - v * x
            by_count, by_log = -v * with_log, -v * (xx - x * x)
        d_rate[i] = by_count * stride * v / mu
        d_nu[i] = by_log


# Weight of the counts that a sum leaves out, relative to the sum.
_LEFT_OUT = 1e-19
_MOST_STEPS = 100
# Counts whose powers are computed once for all steps of Newton's method; with means above, logs of weights are added,
# because products of ratios may overflow.
_SMALL_MEAN, _POWERS = 32, 128


@_compile_loop
def _logarithm(k):
    return _LOGARITHMS[k] if k < len(_LOGARITHMS) else math.log(np.float64(k))


@_compile_loop
def _com_poisson_sums(theta, nu, first, powers, known):
    """Return sums over counts k of the weights exp(theta k - nu log k!), relative to the weight of ``first``.

    The sums are of the weights and of the weights times j, j^2, x and j x, with j = k - first and x = log k! -
    log first!. ``powers`` holds the first ``known`` of k^-nu; their number is returned too.
    """
    rate, small = math.exp(theta), first < _SMALL_MEAN
    total, by_j, by_jj, by_x, by_jx = 1.0, 0.0, 0.0, 0.0, 0.0
    k, x, weight, log_weight = first, 0.0, 1.0, 0.0
    while k - first < _MAX_HALF_WIDTH:
        k += 1
        if small and k < _POWERS:
            if k >= known:
                powers[k] = math.exp(-nu * _LOGARITHMS[k])
                known = k + 1
            ratio = rate * powers[k]
            weight *= ratio
        else:
            step = theta - nu * _logarithm(k)
            ratio = math.exp(step)
            log_weight += step
            weight = weight * ratio if small else math.exp(log_weight)
        j = np.float64(k - first)
        x += _logarithm(k)
        total += weight
        by_j += weight * j
        by_jj += weight * j * j
        by_x += weight * x
        by_jx += weight * j * x
        if ratio < 1 and weight * ratio < _LEFT_OUT * (1 - ratio) * total:  # the ratios fall from here on
            break
    k, x, weight, log_weight = first, 0.0, 1.0, 0.0
    while k > 0:
        if small:
            ratio = 1 / (rate * powers[k])
            weight *= ratio
        else:
            step = nu * _logarithm(k) - theta
            ratio = math.exp(step)
            log_weight += step
            weight = math.exp(log_weight)
        x -= _logarithm(k)
        k -= 1
        j = np.float64(k - first)
        total += weight
        by_j += weight * j
        by_jj += weight * j * j
        by_x += weight * x
        by_jx += weight * j * x
        if ratio < 1 and weight * ratio < _LEFT_OUT * (1 - ratio) * total:
            break
    return total, by_j, by_jj, by_x, by_jx, known


@_compile_loop
def _com_poisson_of_mean(log_mean, log_nu, powers):
    """Return log lambda of the Conway-Maxwell-Poisson with this mean, and sums over its counts.

    Newton's method in log lambda for the log of the mean, between bounds that are known to enclose it.

    Returns:
        log lambda, the count whose weight is 1, the sum of the weights, the variance, Cov(k, log k!), and E[log k!]
        relative to that count; nan where there is no such distribution.
    """
    mean, nu = math.exp(log_mean), math.exp(log_nu)
    if not (mean > 0 and 0 < nu < np.inf and mean < _MAX_HALF_WIDTH):
        return np.nan, 0, np.nan, np.nan, np.nan, np.nan
    first = int(mean)
    near = mean + (nu - 1) / (2 * nu)
    # for small means mean = lambda + (2^(1 - nu) - 1) lambda^2 + ...
    theta = nu * math.log(near) if near > 1 else log_mean - math.log1p(mean * (2.0 ** (1 - nu) - 1))
    low, high = -np.inf, nu * math.log(mean + 2.0)  # the mean is above lambda^(1 / nu) - 1
    theta = min(theta, high)
    known = 1
    if first < _SMALL_MEAN:
        for k in range(1, first + 1):
            powers[k] = math.exp(-nu * _LOGARITHMS[k])
        known = first + 1
    for _ in range(_MOST_STEPS):
        total, by_j, by_jj, by_x, by_jx, known = _com_poisson_sums(theta, nu, first, powers, known)
        j, x = by_j / total, by_x / total
        # the mean from the sums alone where it is small: first + j would cancel
        found = first + j
        variance = by_jj / total - j * j
        error = math.log(found) - log_mean
        if error > 0:
            high = theta
        else:
            low = theta
        step = error * found / variance
        if abs(step) <= 1e-12 * (1 + abs(theta)):
            break
        after = theta - step
        if not low < after < high:
            after = 0.5 * (low + high) if high - low < np.inf else theta - max(min(step, 1.0), -1.0)
            if after == theta:
                break
        theta = after
    return theta, first, total, variance, by_jx / total - j * x, x


@_compile_loop
def _com_poisson_log_lambda_loop(chunk, log_mean, log_nu, value, d_log_mean, d_log_nu):
    powers = np.empty(_POWERS)
    for i in range(len(log_mean)):
        theta, _, _, variance, covariance, _ = _com_poisson_of_mean(log_mean[i], log_nu[i], powers)
        value[i] = theta
        d_log_mean[i] = math.exp(log_mean[i]) / variance
        d_log_nu[i] = math.exp(log_nu[i]) * covariance / variance


@_compile_loop
def _com_poisson_log_mass_loop(chunk, count, log_mean, log_nu, value, d_count, d_log_mean, d_log_nu):
    powers = np.empty(_POWERS)
    for i in range(len(count)):
        k = np.float64(count[i])
        theta, first, total, variance, covariance, x = _com_poisson_of_mean(log_mean[i], log_nu[i], powers)
        mean, nu = math.exp(log_mean[i]), math.exp(log_nu[i])
        whole = k == math.floor(k) and 0 <= k < len(_LOG_FACTORIALS) and first < len(_LOG_FACTORIALS)
        if whole:
            above = _LOG_FACTORIALS[int(k)] - _LOG_FACTORIALS[first]
        else:
            above = math.lgamma(k + 1) - math.lgamma(first + 1.0)
        value[i] = (k - first) * theta - nu * above - math.log(total)
        d_count[i] = theta - nu * _digamma(k + 1)
        d_log_mean[i] = mean * (k - mean) / variance
        d_log_nu[i] = nu * ((k - mean) * covariance / variance - (above - x))


@_compile_loop
def _negative_binomial_entropy_loop(chunk, r, logits, value, d_r, d_logits, start, end, most):
    """Loop of :func:`negative_binomial_entropy`; its counts are those of :func:`_negative_binomial_integers_loop`.

    With logs x of the weights and scores t, both relative to the first count's, the entropy is log(sum of the weights)
    - E[x], and its derivatives are covariances of x.
    """
    for i in range(len(r)):
        shape, logit = np.float64(r[i]), np.float64(logits[i])
        odds = math.exp(min(logit, 700.0))
        mean = shape * odds
        if not (shape >= 0 and math.sqrt(2 * start * mean * (1 + odds)) + (1 + odds) <= most):
            value[i], d_r[i], d_logits[i] = np.nan, np.nan, np.nan
            continue
        if mean == 0:
            value[i], d_r[i], d_logits[i] = 0.0, 0.0, 0.0
            continue
        success = odds / (1 + odds)
        k = max(math.floor(mean - math.sqrt(2 * start * mean * (1 + odds))), 0.0)
        mass, x, t = 1.0, 0.0, 0.0
        total, by_k, by_x, by_t, xk, xt = 1.0, k, 0.0, 0.0, 0.0, 0.0
        least = end * min(shape, 1.0)  # with a small r, the entropy is that of the few counts above 0
        while mass * (1 + odds) > least * total or k < mean:
            ratio = (shape + k) * success / (k + 1)
            t += 1 / (shape + k)
            mass *= ratio
            x += _log_of(ratio)
            k += 1
            total += mass
            by_k += mass * k
            by_x += mass * x
            by_t += mass * t
            xk += mass * x * k
            xt += mass * x * t
        by_k, by_x, by_t, xk, xt = by_k / total, by_x / total, by_t / total, xk / total, xt / total
        value[i] = math.log(total) - by_x
        d_r[i] = -(xt - by_x * by_t)
        d_logits[i] = -(xk - by_x * by_k) / (1 + odds)


@_compile_loop
def _mix(x):
    """Mixing function of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@_compile_loop
def _uniform(seed, element, k):
    """Return the k-th draw of a element, uniform in (0, 1)."""
    stream = _mix(np.uint64(seed) + np.uint64(element) * np.uint64(0x9E3779B97F4A7C15))
    bits = _mix(stream + np.uint64(k) * np.uint64(0x9E3779B97F4A7C15))
    return (np.float64(bits >> np.uint64(12)) + 0.5) * 2.0**-52  # with one bit more it could round to 1


@_compile_loop
def _exponential(seed, element, k):
    """Return the k-th Exponential(1) draw of a element."""
    return -_log_of(_uniform(seed, element, k))


@_compile_loop
def _arrivals_loop(
    chunk, r, logits, temperature, z, d_r, d_logits, seed, poisson, smoothstep, tail, straight_through, most
):
    """Loop of :func:`arrivals`.

    It is 0 where the rate is 0, and nan where there is no rate or it is above ``most``.

    Args:
        r: not used if ``poisson``.
    """
    gaps, clocks, drifts = np.empty(_WIDTH), np.empty(_WIDTH), np.zeros(_WIDTH)
    times, soft_ones, slopes = np.empty(_WIDTH), np.empty(_WIDTH), np.empty(_WIDTH)
    for i in range(len(logits)):
        rate = math.exp(np.float64(logits[i])) * (1.0 if poisson else np.float64(r[i]))
        if not 0 < rate <= most:
            z[i] = d_r[i] = d_logits[i] = 0.0 if rate == 0 else np.nan
            continue
        tau, shape = np.float64(temperature[i]), max(np.float64(r[i]), 1e-15)
        scale = math.exp(-min(max(np.float64(logits[i]), -80.0), 80.0))
        latest = 1 + tail * tau
        expected = latest / scale if poisson else latest * shape / scale
        width = int(min(8 + 2 * expected, _WIDTH)) // 8 * 8
        clock, drift, u, h = 0.0, 0.0, 0.0, 0.0
        soft, hard, in_l, in_r = 0.0, 0.0, 0.0, 0.0
        n = 0
        while u < latest:
            for j in range(width):
                gaps[j] = _exponential(seed, chunk * CHUNK_ELEMENTS + i, n + j)
            if poisson:
                for j in range(width):
                    clock += gaps[j]
                    clocks[j] = clock
                for j in range(width):
                    times[j] = min(clocks[j] * scale, 1e30)
            else:
                for j in range(width):
                    gaps[j] /= shape + (n + j)
                for j in range(width):
                    clock += gaps[j]
                    drift += gaps[j] / (shape + (n + j))
                    clocks[j], drifts[j] = clock, drift
                for j in range(width):
                    times[j] = min(_expm1(min(clocks[j], 700.0)) * scale, 1e30)
            if smoothstep:
                for j in range(width):
                    x = min(max((1 - times[j]) / tau, -1.0), 1.0)
                    soft_ones[j] = 0.5 + x * (0.75 - 0.25 * x * x)
                    slopes[j] = 0.75 * (1 - x * x) / tau
            else:
                for j in range(width):
                    x = max(min((times[j] - 1) / tau, 700.0), -700.0)
                    soft_ones[j] = 1 / (2 + _expm1(x))
                    slopes[j] = soft_ones[j] * (1 - soft_ones[j]) / tau
            j = 0
            while j < width and u < latest:
                u, h = times[j], soft_ones[j]
                soft += h
                hard += u < 1
                in_l += slopes[j] * u
                in_r += slopes[j] * (u + scale) * drifts[j]
                j += 1
            n += j
            drift = drifts[j - 1]
        if not smoothstep:  # mean contribution of the arrivals after the last one drawn
            rate = 1 / scale if poisson else (shape + n) / (scale + u)
            left = -math.log1p(-h) * rate * tau
            flux = rate * h
            soft += left
            in_l += left + flux * u
            in_r += left / (shape + n) + drift * (left + flux * (scale + u))
        z[i] = hard if straight_through else soft
        d_logits[i] = in_l
        d_r[i] = in_r


@_compile_largest
def _largest(values):
    highest = values[0]
    for i in range(len(values)):
        highest = values[i] if values[i] > highest else highest
    return highest


@_compile_sum
def _moments(scores, top, start):
    """Return the sums of w, w k and w k^2 with w = exp(score - top) and k counted from ``start``."""
    s0, s1, s2 = 0.0, 0.0, 0.0
    for j in range(len(scores)):
        w, k = _exp(max(scores[j] - top, -700.0)), np.float64(start + j)
        s0 += w
        s1 += w * k
        s2 += w * k * k
    return s0, s1, s2


@_compile_loop
def _races_loop(chunk, log_rate, temperature, lowest, highest, z, d_log_rate, seed, straight_through, most):
    """Loop of :func:`races`.

    It is 0 where the rate is 0, and nan where there is no rate or it is above ``most``.

    Args:
        lowest, highest: the first and the last count of each element.
    """
    scores, noise = np.empty(_WIDTH), np.empty(_WIDTH)
    for i in range(len(log_rate)):
        colder, log_mean, first = 1 / np.float64(temperature[i]), np.float64(log_rate[i]), np.float64(lowest[i])
        rate = math.exp(log_mean)
        if not 0 < rate <= most:
            z[i] = d_log_rate[i] = 0.0 if rate == 0 else np.nan
            continue
        number, log_mass, top, winner = int(np.float64(highest[i]) - first) + 1, 0.0, -1e300, 0
        s0, s1, s2 = 0.0, 0.0, 0.0
        for done in range(0, number, _WIDTH):
            width = min(_WIDTH, (number - done + 7) // 8 * 8)
            for j in range(width):
                noise[j] = _exponential(seed, chunk * CHUNK_ELEMENTS + i, done + j)
            for j in range(width):
                noise[j] = _log_of(noise[j])
            for j in range(width):
                scores[j] = log_mean - _log_of(first + (done + j + 1))  # of the next count's mass to this one's
            for j in range(width):
                ratio, scores[j] = scores[j], log_mass
                log_mass += ratio
            for j in range(width):
                scores[j] = (scores[j] - noise[j]) * colder if done + j < number else -1e300
            best = _largest(scores[:width])
            if best > top:
                shrink = math.exp(max(top - best, -700.0))
                s0, s1, s2, top = s0 * shrink, s1 * shrink, s2 * shrink, best
                j = 0
                while scores[j] < best:
                    j += 1
                winner = done + j
            w0, w1, w2 = _moments(scores[:width], top, done)
            s0, s1, s2 = s0 + w0, s1 + w1, s2 + w2
        average = s1 / s0
        z[i] = first + (winner if straight_through else average)
        d_log_rate[i] = max(s2 / s0 - average * average, 0.0) * colder


@_compile_loop
def _log_gamma_and_digamma(x):
    """Return log Gamma(x) and digamma(x), by Stirling's series above 8 and by the recurrence below."""
    product, harmonic = 1.0, 0.0
    if x < 8:
        t = x * (x + 7)  # x (x + 1) ... (x + 7) = t (t + 6) (t + 10) (t + 12)
        outer, inner = t * (t + 6), (t + 10) * (t + 12)
        product = outer * inner
        harmonic = (2 * x + 7) * ((2 * t + 6) * inner + (2 * t + 22) * outer) / product
        x += 8
    log = math.log(x)
    series, slope = _stirling(1 / x)
    return (x - 0.5) * log - x + 0.9189385332046727 + series - math.log(product), log + slope - harmonic


@_compile_loop
def _omega_and_rho(x, log):
    """Return log Gamma(1 + x) - x log x + x, and digamma(x) - log x, of x > 0 and its logarithm."""
    if x >= 8:
        series, slope = _stirling(1 / x)
        return 0.5 * log + 0.9189385332046727 + series, slope
    log_gamma, digamma = _log_gamma_and_digamma(x)
    return (log_gamma + log) - x * log + x, digamma - log


@_compile_loop
def _of_count(k):
    """Return log Gamma(1 + k) - k log k + k, and digamma(1 + k) - log(1 + k), for a real k >= 0."""
    if k < len(_OMEGA) and k == math.floor(k):
        return _OMEGA[int(k)], _RHO[int(k)]
    return _omega_and_rho(k, math.log(k))[0], _omega_and_rho(1 + k, math.log(1 + k))[1]


@_compile_loop
def _poisson_log_mass(k, rate):
    """Return the log mass of a real k >= 0, and its derivative in k, for a rate above 0; neither cancels."""
    over = k - rate
    log = math.log1p(over / rate) if abs(over) < 0.5 * rate else math.log(k) - math.log(rate)
    omega, rho = _of_count(k)
    return over - (k * log if k > 0 else 0.0) - omega, math.log(rate) - math.log1p(k) - rho


@_compile_loop
def _poisson_log_mass_loop(chunk, count, rate, value, d_count, d_rate):
    for i in range(len(count)):
        k, mean = np.float64(count[i]), np.float64(rate[i])
        if not (k >= 0 and 0 <= mean < np.inf):
            value[i] = -np.inf if k >= 0 and mean == np.inf else np.nan
            d_count[i] = d_rate[i] = np.nan
        elif mean == 0:
            value[i], d_count[i], d_rate[i] = (0.0 if k == 0 else -np.inf), -np.inf, (-1.0 if k == 0 else np.inf)
        else:
            value[i], d_count[i] = _poisson_log_mass(k, mean)
            d_rate[i] = (k - mean) / mean


@_compile_loop
def _negative_binomial_log_mass_loop(chunk, count, r, logits, value, d_count, d_r, d_logits):
    """Loop of :func:`negative_binomial_log_mass`, in the form of the family's functions, without cancellation."""
    for i in range(len(count)):
        k, given_r, given_logit = np.float64(count[i]), np.float64(r[i]), np.float64(logits[i])
        if not (k >= 0 and 0 <= given_r < np.inf) or np.isnan(given_logit):
            value[i] = d_count[i] = d_r[i] = d_logits[i] = np.nan
            continue
        zero = given_r == 0 or given_logit == -np.inf
        a, logit = (1.0, 0.0) if zero or given_logit == np.inf else (given_r, given_logit)
        given_odds = math.exp(min(given_logit, 700.0))
        odds = given_odds if logit == given_logit else 1.0
        n = a + k
        log_a, log_n, mean = math.log(a), math.log(n), a * odds
        log_mean, over = log_a + logit, (k - mean) / (a + mean)
        if abs(over) < 0.5:
            common = math.log1p(over)
        else:
            common = log_n - (math.log(a + mean) if a + mean < 1e300 else log_mean)
        relative = (a / n) * ((k - mean) / mean)  # of k and the mean at which both terms agree
        log = math.log1p(relative) if abs(relative) < 0.5 else math.log(max(k, 1e-300)) - log_mean - common
        of_sum, of_a, of_k = _omega_and_rho(n, log_n), _omega_and_rho(a, log_a), _of_count(k)
        ratio = log_n - log_a if k > 0.5 * a else math.log1p(k / a)
        value[i] = of_sum[0] - of_a[0] - of_k[0] - ratio - (k * log - a * common)
        d_count[i] = common + (of_sum[1] - of_k[1]) + (log_mean - math.log1p(k))
        d_r[i] = common + (of_sum[1] - of_a[1])  # the bracket is 0 at count 0
        d_logits[i] = k / (1 + given_odds) - given_r * (given_odds / (1 + given_odds))
        if zero:
            value[i] = 0.0 if k == 0 else -np.inf
            d_r[i] = -_softplus(given_logit)
        elif given_logit == np.inf:
            value[i] = -np.inf


@_compile_loop
def _negative_binomial_log_q_over_p_loop(chunk, z, r_q, l_q, r_p, l_p, value, d_z, d_rq, d_lq, d_rp, d_lp):
    """Loop of :func:`negative_binomial_log_q_over_p`; z and d_z are (n, samples)."""
    for i in range(len(r_q)):
        a, x, b, y = np.float64(r_q[i]), np.float64(l_q[i]), np.float64(r_p[i]), np.float64(l_p[i])
        if not (0 <= a < np.inf and 0 <= b < np.inf):
            value[i] = d_rq[i] = d_lq[i] = d_rp[i] = d_lp[i] = np.nan
            d_z[i] = np.nan
            continue
        a, b = max(a, 1e-300), max(b, 1e-300)
        fired_q, fired_p = 1 / (1 + math.exp(-x)), 1 / (1 + math.exp(-y))
        # logs of sigma(-l)
        rest_q = -x - math.log1p(math.exp(-x)) if x > 0 else -math.log1p(math.exp(x))
        rest_p = -y - math.log1p(math.exp(-y)) if y > 0 else -math.log1p(math.exp(y))
        count_coefficient = x + rest_q - y - rest_p
        of_a, slope_a = _log_gamma_and_digamma(a)
        of_b, slope_b = _log_gamma_and_digamma(b)
        total, count, in_a, in_b = 0.0, 0.0, 0.0, 0.0
        samples = z.shape[1]
        for s in range(samples):
            k = np.float64(z[i, s])
            with_a, slope_with_a = _log_gamma_and_digamma(k + a)
            with_b, slope_with_b = _log_gamma_and_digamma(k + b)
            total += with_a - with_b + k * count_coefficient
            count += k
            in_a += slope_with_a
            in_b += slope_with_b
            d_z[i, s] = slope_with_a - slope_with_b + count_coefficient
        value[i] = total + samples * (of_b - of_a + a * rest_q - b * rest_p)
        d_rq[i] = in_a + samples * (rest_q - slope_a)
        d_lq[i] = count * (1 - fired_q) - samples * a * fired_q
        d_rp[i] = samples * (slope_b - rest_p) - in_b
        d_lp[i] = samples * b * fired_p - count * (1 - fired_p)


@_compile_loop
def _dispersion_integrand(table, scale, a, odds, b, mean, of_value, of_a, of_b, of_l):
    """Compute the terms of J and of its derivatives in r_q (a), in r_p (b) and, over the mean, in l_q.

    In three loops, since a processor has too few registers for one.
    """
    nodes, weights = table[0], table[1]
    for i in range(len(nodes)):
        one_minus_s = -_expm1(-min(scale * nodes[i], 700.0))
        increase = odds * one_minus_s
        of_value[i] = one_minus_s
        of_a[i] = _log_of(1 + increase) - (((1 + increase) - 1) - increase) / (1 + increase)  # log(1 + increase)
    for i in range(len(nodes)):
        of_l[i] = -_expm1(-min(a * of_a[i], 700.0))
    for i in range(len(nodes)):
        t, one_minus_s, exponent, one_minus_g = scale * nodes[i], of_value[i], of_a[i], of_l[i]
        inverse, inverse_s = 1 / (1 + odds * one_minus_s), 1 / one_minus_s
        bracket = mean - one_minus_g * inverse_s
        from_q, from_p = weights[i] * _exp(-min(a * t, 700.0)), weights[i] * _exp(-min(b * t, 700.0))
        difference, flux = from_q - from_p, t * bracket
        g_difference = (1 - one_minus_g) * difference
        of_value[i] = bracket * difference
        of_a[i] = odds * difference - exponent * g_difference * inverse_s - flux * from_q
        of_b[i] = flux * from_p
        of_l[i] = difference - g_difference * inverse


@_compile_sum
def _sum(terms):
    total = 0.0
    for i in range(len(terms)):
        total += terms[i]
    return total


@_compile_loop
def _negative_binomial_kl_loop(
    chunk, r_q, l_q, r_p, l_p, value, d_rq, d_lq, d_rp, d_lp, tables, log_tail, log_range, log_dispersion_ratio
):
    """Loop of :func:`negative_binomial_kl`; the options are of three :class:`reference.Rule`."""
    n = len(r_q)
    odds, mean, scale, terms = np.empty(n), np.empty(n), np.empty(n), np.empty((5, n))
    rule, work = np.empty(n, np.int64), np.empty((4, tables[-1].shape[1]))
    coarse, middle, finest = log_tail
    # all but the integrals, in vectors of elements
    for i in range(n):
        a, x, b, y = np.float64(r_q[i]), np.float64(l_q[i]), np.float64(r_p[i]), np.float64(l_p[i])
        log_a, log_b, within = _log_of(a), _log_of(b), max(min(x, 700.0), -700.0)
        odds[i] = _exp(within) if x <= 700 else x * np.inf
        mean[i] = a * odds[i]
        furthest = max(max(log_a + max(x, 0.0), log_b + max(y, 0.0)), max(-log_a, -log_b))
        apart = abs(log_a - log_b)
        above = (furthest > log_range[0]) | (apart > log_dispersion_ratio[0])
        far_above = (furthest > log_range[1]) | (apart > log_dispersion_ratio[1])
        rule[i] = np.int64(above) + np.int64(far_above)
        tail = finest if far_above else middle if above else coarse
        # the abscissas are those of reference.by_rule
        last = (_log1p(mean[i]) - tail) / min(a, b)
        scale[i] = max(last / math.e, 1e-100)
        mean_coefficient, soft_p = log_a - log_b + _softplus_difference(-y, -within), _softplus(y)
        odds_p = _exp(max(min(y, 700.0), -700.0))
        terms[0, i] = mean[i] * mean_coefficient - a * _softplus_difference(x, y) + (b - a) * soft_p
        terms[1, i] = odds[i] * mean_coefficient + odds[i] - _softplus(x)
        terms[2, i] = mean[i] * mean_coefficient
        terms[3, i] = soft_p - mean[i] / b
        terms[4, i] = (b * odds_p - mean[i]) / (1 + odds_p)
    for i in range(n):
        table = tables[rule[i]]
        a, b, nodes = np.float64(r_q[i]), np.float64(r_p[i]), table.shape[1]
        x, y = np.float64(l_q[i]), np.float64(l_p[i])
        if not (0 < a < np.inf and 0 < b < np.inf and abs(x) < np.inf and abs(y) < np.inf):
            d_rq[i], d_lq[i], d_rp[i], d_lp[i] = 0.0, 0.0, 0.0, 0.0
            q_is_0, p_is_0 = a == 0 or x == -np.inf, b == 0 or y == -np.inf
            if not (0 <= a < np.inf and 0 <= b < np.inf and x < np.inf and y < np.inf):  # there is no distribution
                value[i] = d_rq[i] = d_lq[i] = d_rp[i] = d_lp[i] = np.nan
            elif q_is_0 and not p_is_0:  # -log p(0)
                d_rp[i] = _softplus(y)
                value[i], d_lp[i] = b * d_rp[i], b / (1 + math.exp(-y))
            else:
                value[i] = 0.0 if q_is_0 else np.inf
            continue
        of_value, of_a, of_b, of_l = work[0, :nodes], work[1, :nodes], work[2, :nodes], work[3, :nodes]
        _dispersion_integrand(table, scale[i], a, odds[i], b, mean[i], of_value, of_a, of_b, of_l)
        value[i] = max(terms[0, i] + _sum(of_value), 0.0)
        d_rq[i] = terms[1, i] + _sum(of_a)
        d_lq[i] = terms[2, i] + mean[i] * _sum(of_l)
        d_rp[i] = terms[3, i] + _sum(of_b)
        d_lp[i] = terms[4, i]


# --- kernels: signatures and results as in reference.py ---------------------------------------------------------------


def arrivals(
    seed: Tensor, temperature: Tensor, r: Tensor | None, logits: Tensor, indicator: str, straight_through: bool
) -> list[Tensor]:
    """As :func:`reference.arrivals`."""
    z, d_r, d_logits = (torch.empty_like(logits) for _ in range(3))
    arrays = logits if r is None else r, logits, temperature.expand(len(logits)), z, d_r, d_logits
    options = int(seed), r is None, indicator == "smoothstep", TAIL[indicator], straight_through, LARGEST
    in_chunks(_arrivals_loop, len(logits), *arrays, options=options)
    return [z, d_logits] if r is None else [z, d_r, d_logits]


def races(
    seed: Tensor, temperature: Tensor, log_rate: Tensor, first: Tensor, last: Tensor, straight_through: bool
) -> list[Tensor]:
    """As :func:`reference.races`."""
    drawn = [torch.empty_like(log_rate) for _ in range(2)]
    arrays = log_rate, temperature.expand(len(log_rate)), first, last, *drawn
    in_chunks(_races_loop, len(log_rate), *arrays, options=(int(seed), straight_through, LARGEST))
    return drawn


def negative_binomial_integers(r: Tensor, logits: Tensor, uniform: Tensor) -> list[Tensor]:
    """As :func:`reference.negative_binomial_integers`."""
    drawn = [torch.empty_like(r) for _ in range(3)]
    options = START[r.dtype], math.exp(-END[r.dtype]), LARGEST
    in_chunks(_negative_binomial_integers_loop, len(r), r, logits, uniform, *drawn, options=options)
    return drawn


def com_poisson_integers(rate: Tensor, nu: Tensor, uniform: Tensor) -> list[Tensor]:
    """As :func:`reference.com_poisson_integers`."""
    drawn = [torch.empty_like(rate) for _ in range(3)]
    end = -windows.NATS[rate.dtype]
    in_chunks(_com_poisson_integers_loop, len(rate), rate, nu, uniform, *drawn, options=(end,))
    return drawn


def com_poisson_kl(rate: Tensor, nu: Tensor, r: Tensor, logits: Tensor) -> list[Tensor]:
    """As :func:`reference.com_poisson_kl`."""
    found = [torch.empty_like(rate) for _ in range(5)]
    arrays = rate, nu, r, logits, *found
    in_chunks(_com_poisson_kl_loop, len(rate), *arrays, options=(-windows.NATS[rate.dtype],))
    return found


def _moment(what: int, rate: Tensor, nu: Tensor) -> list[Tensor]:
    found = [torch.empty_like(rate) for _ in range(3)]
    in_chunks(_com_poisson_moments_loop, len(rate), rate, nu, *found, options=(what, -windows.NATS[rate.dtype]))
    return found


def com_poisson_log_normalizer(rate: Tensor, nu: Tensor) -> list[Tensor]:
    """As :func:`reference.com_poisson_log_normalizer`."""
    return _moment(_LOG_NORMALIZER, rate, nu)


def com_poisson_mean(rate: Tensor, nu: Tensor) -> list[Tensor]:
    """As :func:`reference.com_poisson_mean`."""
    return _moment(_MEAN, rate, nu)


def com_poisson_variance(rate: Tensor, nu: Tensor) -> list[Tensor]:
    """As :func:`reference.com_poisson_variance`."""
    return _moment(_VARIANCE, rate, nu)


def com_poisson_entropy(rate: Tensor, nu: Tensor) -> list[Tensor]:
    """As :func:`reference.com_poisson_entropy`."""
    return _moment(_ENTROPY, rate, nu)


def com_poisson_log_lambda(log_mean: Tensor, log_nu: Tensor) -> list[Tensor]:
    """As :func:`reference.com_poisson_log_lambda`."""
    found = [torch.empty_like(log_mean) for _ in range(3)]
    in_chunks(_com_poisson_log_lambda_loop, len(log_mean), log_mean, log_nu, *found)
    return found


def com_poisson_log_mass(count: Tensor, log_mean: Tensor, log_nu: Tensor) -> list[Tensor]:
    """As :func:`reference.com_poisson_log_mass`."""
    found = [torch.empty_like(count) for _ in range(4)]
    in_chunks(_com_poisson_log_mass_loop, len(count), count, log_mean, log_nu, *found)
    return found


def negative_binomial_log_mass(count: Tensor, r: Tensor, logits: Tensor) -> list[Tensor]:
    """As :func:`reference.negative_binomial_log_mass`."""
    found = [torch.empty_like(count) for _ in range(4)]
    in_chunks(_negative_binomial_log_mass_loop, len(count), count, r, logits, *found)
    return found


def poisson_log_mass(count: Tensor, rate: Tensor) -> list[Tensor]:
    """As :func:`reference.poisson_log_mass`."""
    found = [torch.empty_like(count) for _ in range(3)]
    in_chunks(_poisson_log_mass_loop, len(count), count, rate, *found)
    return found


def negative_binomial_entropy(r: Tensor, logits: Tensor) -> list[Tensor]:
    """As :func:`reference.negative_binomial_entropy`."""
    found = [torch.empty_like(r) for _ in range(3)]
    options = START[r.dtype], math.exp(-END[r.dtype]), LARGEST
    in_chunks(_negative_binomial_entropy_loop, len(r), r, logits, *found, options=options)
    return found


def com_poisson_kl_by_table(
    rate: Tensor, nu: Tensor, log_q_over_p: windows.LogQOverP, arguments: list[Tensor], table_row: Tensor
) -> list[Tensor]:
    """As :func:`reference.com_poisson_kl_by_table`."""
    end = -windows.NATS[rate.dtype]
    high = torch.empty_like(rate, dtype=torch.float64)
    with unsplit():
        in_chunks(_largest_counts_loop, len(rate), rate, nu, high, options=(end,))
        largest_count = high.new_zeros(len(arguments[0])).scatter_reduce_(0, table_row, high, "amax")
        counts = largest_count.long() + 2
        ends = counts.cumsum(0)
        total = int(ends[-1]) if len(ends) else 0
        if total > 16 * len(rate):  # many counts, few elements: the tables would be most of the work
            own = rate.double(), nu.double(), log_q_over_p, [a.double() for a in arguments], table_row
            return [part.to(rate.dtype) for part in reference.com_poisson_kl_by_table(*own)]
        starts, row = ends - counts, torch.repeat_interleave(counts)
        k = torch.arange(total) - starts[row]
        tables = [t.expand(total) for t in log_q_over_p.tables(k.double(), *(a.double()[row] for a in arguments))]
        value, derivatives = torch.empty_like(rate), rate.new_empty(len(rate), 1 + len(tables))
        options = torch.stack(tables).numpy(), starts.numpy(), log_q_over_p.family.smooth, end
        in_chunks(
            _com_poisson_kl_by_table_loop, len(rate), rate, nu, high, table_row, value, derivatives, options=options
        )
    return [value, *derivatives.unbind(1)]


def negative_binomial_log_q_over_p(*samples_and_parameters: Tensor) -> list[Tensor]:
    """As :func:`reference.negative_binomial_log_q_over_p`."""
    *samples, r_q, l_q, r_p, l_p = samples_and_parameters
    z = torch.stack(samples, dim=1)
    value, d_z, *others = (torch.empty_like(x) for x in (r_q, z, r_q, r_q, r_q, r_q))
    arrays = z, r_q, l_q, r_p, l_p, value, d_z, *others
    in_chunks(_negative_binomial_log_q_over_p_loop, len(z), *arrays)
    return [value, *d_z.unbind(1), *others]


def negative_binomial_kl(r_q: Tensor, l_q: Tensor, r_p: Tensor, l_p: Tensor) -> list[Tensor]:
    """As :func:`reference.negative_binomial_kl`."""
    found = [torch.empty_like(r_q) for _ in range(5)]
    in_chunks(_negative_binomial_kl_loop, len(r_q), r_q, l_q, r_p, l_p, *found, options=_rule_options(r_q.dtype))
    return found


@functools.cache
def _rule_options(dtype: torch.dtype) -> tuple[Any, ...]:
    tail, _, _, log_range, log_dispersion_ratio = map(np.array, zip(*RULES[dtype], strict=True))
    tables = tuple(rule.table() for rule in RULES[dtype])
    return tables, tuple(np.log(tail).tolist()), log_range, log_dispersion_ratio
