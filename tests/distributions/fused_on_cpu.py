"""Run by test_fused.py with TRITON_INTERPRET=1: the fused kernels, interpreted, against the textbook on their noise."""

import functools
import math

import torch
import triton
import triton.language as tl

from pyro_nbvae.distributions.relaxations import arrival_times, fused, gumbel_softmax
from tests.distributions import by_textbook


@triton.jit
def _draw(out, n, seed, ROWS: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    for k in range(ROWS):
        tl.store(out + k * n + i, fused._exponential(seed + k, i), mask=i < n)


SEED = 271_828_182


@functools.cache
def noise(rows, n):
    """The unit exponentials that the kernels draw with this seed, (rows, n)."""
    out = torch.empty(rows, n)
    _draw[(triton.cdiv(n, fused.BLOCK),)](out, n, SEED, ROWS=rows, SIZE=fused.BLOCK)
    return out.double()


def arrivals(r, logits, temperature, indicator, hard):
    return fused.count_arrivals(SEED, r, logits, temperature, indicator, hard, arrival_times.TAIL[indicator])


def races(log_rate, first, last, temperature, hard):
    return fused.run_races(SEED, log_rate, first, last, gumbel_softmax.LARGEST, temperature, hard)


def races_in_windows(log_rate, temperature, hard):
    return races(log_rate, *gumbel_softmax.gumbel_window(log_rate.exp(), temperature), temperature, hard)


if __name__ == "__main__":
    for poisson in (False, True):
        for indicator in arrival_times.TAIL:
            by_textbook.arrivals(arrivals, noise, poisson, indicator, per_latent=poisson, hard=False)
            by_textbook.arrivals(arrivals, noise, poisson, indicator, per_latent=not poisson, hard=True)
    by_textbook.races(races, noise, per_latent=False, hard=False)
    by_textbook.races(races, noise, per_latent=True, hard=True)
    tail = arrival_times.TAIL["sigmoid"]
    bad, *_ = fused.count_arrivals(
        SEED, None, torch.tensor([0.0, math.nan]), 0.1, "sigmoid", False, arrival_times.TAIL["sigmoid"]
    )
    assert bad[0].isfinite() and bad[1].isnan()
    for hard in (False, True):
        bad, _ = races_in_windows(torch.tensor([0.0, math.nan, math.inf, 17.0]), 0.5, hard)
        assert bad[0].isfinite() and bad[1:].isnan().all()
        nothing, slope = races_in_windows(torch.tensor([-math.inf, -200.0, -90.0]), 0.5, hard)
        assert (nothing == 0).all() and (slope == 0).all()
        one = torch.full((5, 2), 7.0)
        one[0, 0] = 0.5
        expected = races_in_windows(torch.ones(10), 0.5, hard)
        torch.testing.assert_close(races_in_windows(torch.ones(10), one[0, :1].expand(10), hard), expected)
    print("ok")
