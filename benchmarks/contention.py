"""Time of the samplers and of the exact KLs while other processes keep every core busy.

python -m benchmarks.contention    about a minute
"""

from __future__ import annotations

import multiprocessing

import torch

from benchmarks.measure import forward_backward, report, seconds
from benchmarks.samplers import SHAPE, com_poisson, com_poisson_kl, exact_kl, ours, parameters
from pyro_nbvae.distributions import (
    ArrivalTimes,
    GumbelSoftmax,
    Integer,
)


def _busy() -> None:
    while True:
        pass


def main() -> None:
    torch.manual_seed(0)
    kinds = {
        "arrival times, temperature 0.1": ours(ArrivalTimes(0.1)),
        "Gumbel-softmax, temperature 1": ours(GumbelSoftmax(1.0)),
        "integers, negative binomial": ours(Integer()),
        "integers, COM-Poisson": com_poisson,
        "KL, negative binomial": exact_kl,
        "KL, COM-Poisson": com_poisson_kl,
    }
    cases = {name: forward_backward(kind, *parameters()) for name, kind in kinds.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = seconds(cases, repeats=15)
    torch.set_num_threads(threads)
    alone = seconds(cases, repeats=15)
    neighbours = [multiprocessing.Process(target=_busy, daemon=True) for _ in range(2)]
    for neighbour in neighbours:
        neighbour.start()
    try:
        crowded = seconds(cases, repeats=15)
    finally:
        for neighbour in neighbours:
            neighbour.kill()
    rows = [
        {
            "": name,
            "one thread, ms": round(1e3 * one[name], 1),
            f"{threads} threads, ms": round(1e3 * alone[name], 1),
            f"{threads} threads, two busy neighbours, ms": round(1e3 * crowded[name], 1),
            "crowded / one thread": round(crowded[name] / one[name], 2),
        }
        for name in cases
    ]
    report("contention", rows, f"{SHAPE[0]} x {SHAPE[1]} latents, forward and backward")


if __name__ == "__main__":
    main()
