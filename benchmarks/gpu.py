"""Everything that only an NVIDIA GPU can show: the errors of its kernels, the time of a step, seconds per epoch.

python -m benchmarks.gpu    needs an NVIDIA GPU; sized for ten minutes with compilation
"""

from __future__ import annotations

import importlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
import tyro
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import device, progress, report, seconds
from benchmarks.step import BATCH, steps_of
from pyro_nbvae.batching import to_floats
from pyro_nbvae.distributions.kernels.reference import TAIL
from pyro_nbvae.errors import InputError
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.data import load
from pyro_nbvae.study.training import train
from pyro_nbvae.study.variants import VARIANTS

# Steps between two synchronisations, so that the host can queue steps in advance as in training.
STEPS = 20


def difference(name: str, check: Callable[[], list[float]]) -> dict[str, Any]:
    """Return the row of a kernel; an error in one kernel does not end the benchmark."""
    row: dict[str, Any] = {"kernel": name}
    try:
        errors = check()
    except Exception as error:  # of any kind: also of Triton's compiler
        distances = re.findall(r"Greatest absolute difference: (\S+)", str(error))
        return row | {"result": f"{type(error).__name__} {' '.join(distances) or str(error).strip()[:60]}"}
    if not errors:
        return row | {"result": "within the tolerance of the test"}
    return row | {"error of the value": f"{errors[0]:.1e}", "of the derivatives": f"{max(errors[1:]):.1e}"}


def kernels(place: torch.device) -> list[dict[str, Any]]:
    """Return the largest errors of every kernel on a device, relative to max(1, value)."""
    tests: Any = importlib.import_module("tests.distributions.gpu_on_cpu")
    textbook = tests.by_textbook
    seed = tests.SEED.to(place)

    def noise(rows: int, n: int) -> Tensor:
        out = torch.empty(rows, n, device=place)
        size = 1 << (n - 1).bit_length()
        tests._draw[(1,)](seed, out, n, ROWS=rows, SIZE=size)
        return out.double().cpu()

    def there(kernel: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
        def run(*arguments: Any) -> list[Tensor]:
            moved = (a.to(place) if isinstance(a, Tensor) else a for a in arguments)
            return [part.cpu() for part in kernel(seed, *moved)]

        return run

    arrivals, races = there(tests.gpu.arrivals), there(tests.gpu.races)

    def agree(check: Callable[..., object], *arguments: Any, **options: Any) -> Callable[[], list[float]]:
        def run() -> list[float]:
            check(*arguments, **options)
            return []

        return run

    cases: dict[str, Callable[[], list[float]]] = {}
    for name, (parameters, _, _) in tests.CASES.items():
        moved = [a.to(place) for a in parameters]
        cases[name] = lambda name=name, moved=moved: tests.errors(name, moved)  # type: ignore[misc]
    for name, numbers in tests.EXTREME.items():
        moved = [torch.full((2,), float(x), device=place) for x in numbers]
        cases[f"{name}, extreme"] = lambda name=name, moved=moved: tests.errors(name, moved)  # type: ignore[misc]
    for hard in (False, True):
        for indicator in TAIL:
            for poisson in (False, True):
                family = "Poisson" if poisson else "negative binomial"
                label = f"arrivals, {indicator}, {family}{', integers' if hard else ''}"
                cases[label] = agree(textbook.arrivals, arrivals, noise, poisson, indicator, varied=hard, hard=hard)
        cases[f"races{', integers' if hard else ''}"] = agree(textbook.races, races, noise, varied=hard, hard=hard)
    return [difference(name, cases[name]) for name in progress(list(cases), "kernels")]


def calls(step: Callable[[], object]) -> tuple[int, int]:
    """Return how many kernels the host launches in a step, and how often it waits for the device."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in recorded.events() or ()]
    waits = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
    return sum("LaunchKernel" in name for name in names), sum(name in waits for name in names)


def images() -> tuple[Tensor, str]:
    """Return a batch of MNIST, or of random images if the data are missing, and what it is."""
    try:
        return to_floats(load("mnist", download=False).train[:BATCH]).to(device()), "MNIST"
    except InputError:
        return torch.rand(BATCH, 1, 28, 28, device=device()), "random images"


def steps() -> tuple[list[dict[str, Any]], str]:
    """Return the times and launches of a training step of every variant, and a note."""
    x, what = images()
    with pyro.validation_enabled(False), pyro.get_param_store().scope():
        prepared = {name: steps_of(name, x, "mnist") for name in progress(list(VARIANTS), "preparing")}
        counted = {name: calls(kinds["Pyro"]) for name, kinds in prepared.items()}

        def repeated(step: Callable[[], Tensor]) -> Callable[[], object]:
            return lambda: [step() for _ in range(STEPS)]

        kinds = ("Pyro", "bfloat16")
        cases = {f"{name} {kind}": repeated(prepared[name][kind]) for name in prepared for kind in kinds}
        taken = {case: 1e3 * total / STEPS for case, total in seconds(cases, repeats=5, warm_up=1).items()}
    rows = [
        {
            "variant": name,
            "step, ms": f"{taken[f'{name} Pyro']:.2f}",
            "step / G-VAE's": f"{taken[f'{name} Pyro'] / taken['G-VAE Pyro']:.2f}",
            "in bfloat16, ms": f"{taken[f'{name} bfloat16']:.2f}",
            "in bfloat16, step / G-VAE's": f"{taken[f'{name} bfloat16'] / taken['G-VAE bfloat16']:.2f}",
            "launches": launches,
            "waits": waits,
        }
        for name, (launches, waits) in counted.items()
    ]
    ratio = taken["CMP Pyro"] / taken["G-VAE Pyro"]
    note = f"Training steps on {what}, batch {BATCH}, 256 latents, conv, with clipping and Adam"
    return rows, f"{note}; CMP / G-VAE = {ratio:.3f}, target 1.25"


def epochs() -> list[dict[str, Any]]:
    """Return the seconds of the first epoch of CMP and G-VAE on the data sets that are there."""
    rows = []
    for data in ("mnist", "cifar16"):
        try:
            load(data, download=False)
        except InputError:
            print(f"{data} is missing: no epoch on it")
            continue
        for name in ("CMP", "G-VAE"):
            config = configure(name, preset="published", data=data, epochs=1, device="cuda")
            with tempfile.TemporaryDirectory() as folder:
                logged: list[dict[str, float]] = []
                began = time.perf_counter()
                train(config, folder, progress=False, on_epoch=logged.append)
                taken = time.perf_counter() - began
            row = {"data": data, "variant": name, "epoch, s": f"{logged[-1].get('seconds', float('nan')):.1f}"}
            rows.append(row | {"with loading and evaluation, s": f"{taken:.1f}"})
    return rows


def main() -> None:
    """Compare the kernels with their reference, and time steps and epochs."""
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs an NVIDIA GPU, and PyTorch finds none: run it on a machine with one")
    report("gpu_kernels", kernels(device()), "Largest errors of the kernels, relative to max(1, value)", "gpu")
    rows, note = steps()
    report("gpu_steps", rows, note, "gpu")
    if rows := epochs():
        report("gpu_epochs", rows, "First epoch with the published settings, batch 512", "gpu")


if __name__ == "__main__":
    tyro.cli(main)
