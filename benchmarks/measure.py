"""Measuring and reporting for all benchmarks: the cases alternate in one run, and the median counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_nbvae.study.provenance import write_page

FOLDER = Path(__file__).parent.parent / "results" / "benchmarks"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(cases: Mapping[str, Callable[[], object]], repeats: int = 9, warm_up: int = 2) -> dict[str, float]:
    """Return the median seconds of each case; the cases alternate, so that a slow machine slows all of them."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warm_up + repeats):
        for name, run in cases.items():
            _finish()
            began = time.perf_counter()
            run()
            _finish()
            if turn >= warm_up:
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in taken.items()}


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak memory of a call, beyond what was allocated before."""
    if torch.cuda.is_available():
        _finish()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        _finish()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    changes = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def forward_backward(sample: Callable[..., Tensor], *parameters: Tensor) -> Callable[[], Tensor]:
    """Return a function that draws a sample and differentiates its sum in the parameters."""
    leaves = [p.detach().requires_grad_() for p in parameters]

    def run() -> Tensor:
        value = sample(*leaves)
        torch.autograd.grad(value.sum(), leaves)
        return value

    return run


def progress(items: Sequence[Any], what: str) -> tqdm:
    return tqdm(items, desc=what, leave=False)


def report(name: str, rows: Sequence[Mapping[str, Any]], note: str, benchmark: str | None = None) -> None:
    """Print a table, and write it to ``results/benchmarks``, from where docs/performance.md includes it.

    Args:
        name: name of the file.
        rows: rows of the table.
        note: caption of the table.
        benchmark: the module that was run. Default: ``name``.
    """
    command = f"python -m benchmarks.{benchmark or name}"
    print(write_page(FOLDER / f"{name}.md", rows, note, command, device().type))
