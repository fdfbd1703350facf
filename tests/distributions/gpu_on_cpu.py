"""Run by test_gpu.py with TRITON_INTERPRET=1: the kernels of a GPU against the textbook on their noise."""

import functools
import math

import torch
import triton
import triton.language as tl

from pyro_nbvae.distributions.kernels import gpu
from pyro_nbvae.distributions.kernels.reference import TAIL
from pyro_nbvae.distributions.relaxations.gumbel_softmax import _window
from tests.distributions import by_textbook


@triton.jit
def _draw(out, n, seed, ROWS: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    for k in range(ROWS):
        tl.store(out + k * n + i, gpu._exponential(seed + k, i), mask=i < n)


SEED = 271_828_182


@functools.cache
def noise(rows, n):
    """The unit exponentials that the kernels draw with this seed, (rows, n)."""
    out = torch.empty(rows, n)
    _draw[(triton.cdiv(n, gpu._BLOCK),)](out, n, SEED, ROWS=rows, SIZE=gpu._BLOCK)
    return out.double()


arrivals = functools.partial(gpu.arrivals, SEED)
races = functools.partial(gpu.races, SEED)


def races_in_windows(log_rate, temperature, hard):
    tau = torch.full_like(log_rate, temperature)
    return races(log_rate, *_window(log_rate.exp(), tau), tau, hard)


if __name__ == "__main__":
    for poisson in (False, True):
        for indicator in TAIL:
            by_textbook.arrivals(arrivals, noise, poisson, indicator, varied=poisson, hard=False)
            by_textbook.arrivals(arrivals, noise, poisson, indicator, varied=not poisson, hard=True)
    by_textbook.races(races, noise, varied=False, hard=False)
    by_textbook.races(races, noise, varied=True, hard=True)
    bad, *_ = arrivals(None, torch.tensor([0.0, math.nan]), torch.full((2,), 0.1), "sigmoid", False)
    assert bad[0].isfinite() and bad[1].isnan()
    for hard in (False, True):
        bad, _ = races_in_windows(torch.tensor([0.0, math.nan, math.inf, 17.0]), 0.5, hard)
        assert bad[0].isfinite() and bad[1:].isnan().all()
        nothing, slope = races_in_windows(torch.tensor([-math.inf, -200.0, -90.0]), 0.5, hard)
        assert (nothing == 0).all() and (slope == 0).all()
    print("ok")
