"""Scaling of samplers and exact KLs: with the number of latents and with the mean count, in time and in memory.

python -m benchmarks.scaling    some minutes on two cores
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import kl_divergence

from benchmarks.measure import FOLDER, device, forward_backward, peak_bytes, progress, report, seconds
from benchmarks.samplers import com_poisson, com_poisson_kl, ours
from pyro_nbvae.distributions import (
    ArrivalTimes,
    GumbelSoftmax,
    Integer,
    negative_binomial_kl,
)
from pyro_nbvae.study.files import write_atomically

Case = Callable[[Tensor, Tensor], Tensor]
BATCH, LATENTS, MEANS = 64, (16, 64, 256, 1024, 4096, 16384), (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10_000.0)


def _com_poisson_kl(log_nu: Tensor, log_rate: Tensor, own: bool = False) -> Tensor:
    """KL to negative binomials of about the posteriors' mean: one for a unit, or each element's own."""
    logits = log_rate.detach() if own else log_rate.detach()[0]
    return com_poisson_kl(log_nu, log_rate, torch.zeros_like(logits), logits)


def _gaussian(log_scale: Tensor, loc: Tensor) -> Tensor:
    """Sample and KL of a Gaussian VAE."""
    q = dist.Normal(loc, log_scale.exp(), validate_args=False)
    prior = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc), validate_args=False)
    return q.rsample() + kl_divergence(q, prior)


def _zero(*parameters: Tensor) -> Tensor:
    return torch.stack([0 * p.sum() for p in parameters]).sum()


def _torch_poisson(log_r: Tensor, logits: Tensor) -> Tensor:
    """A draw without a gradient in the parameters."""
    return torch.poisson(logits.detach().exp()) + _zero(log_r, logits)


def _torch_gamma_poisson(log_r: Tensor, logits: Tensor) -> Tensor:
    gamma = torch.distributions.Gamma(log_r.detach().exp(), (-logits.detach()).exp(), validate_args=False)
    return torch.poisson(gamma.sample()) + _zero(log_r, logits)


CASES: dict[str, Case] = {
    "Gaussian, sample and KL": _gaussian,
    "torch's Poisson": _torch_poisson,
    "torch's Gamma and Poisson": _torch_gamma_poisson,
    "COM-Poisson, integers": com_poisson,
    "COM-Poisson, KL": _com_poisson_kl,
    "COM-Poisson, KL, own priors": functools.partial(_com_poisson_kl, own=True),
    "negative binomial, integers": ours(Integer()),
    "negative binomial, arrivals": ours(ArrivalTimes(0.1)),
    "negative binomial, Gumbel": ours(GumbelSoftmax(0.25)),
    "negative binomial, KL": lambda log_r, logits: negative_binomial_kl(
        log_r.exp(), logits, torch.ones_like(log_r[0]), torch.zeros_like(log_r[0])
    ),
}
# Their cost is proportional to the mean.
LINEAR = ("negative binomial, arrivals", "negative binomial, Gumbel")


def _spread(*shape: int, mean: float = 1.0, narrow: float = 1.0) -> tuple[Tensor, Tensor]:
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device())
    return 0.5 * narrow * noise[0], 0.5 * narrow * noise[1] + torch.tensor(mean).log()


def _nanoseconds(points: Mapping[float, tuple[Tensor, Tensor]], what: str) -> dict[str, dict[float, float]]:
    """Return the nanoseconds per latent, forward and backward, of each case at each point."""
    found: dict[str, dict[float, float]] = {name: {} for name in CASES}
    for point, both in progress(list(points.items()), what):
        names = [name for name in CASES if not (what == "means" and name in LINEAR and point > 100)]
        taken = seconds({name: forward_backward(CASES[name], *both) for name in names}, repeats=7)
        for name in names:
            found[name][point] = 1e9 * taken[name] / both[0].numel()
    return found


def _plot(panels: Sequence[tuple[str, dict[str, dict[float, float]]]], memory: Mapping[str, float]) -> None:
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, (label, times) in zip((left, middle), panels, strict=True):
        for i, (name, values) in enumerate(times.items()):
            style = "--" if i < 3 else "-"
            axes.plot(list(values), list(values.values()), style, marker="o", markersize=3, color=f"C{i}", label=name)
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.grid(alpha=0.3)
    left.set_ylabel("ns per latent, forward and backward")
    right.barh(list(memory), list(memory.values()), color=[f"C{i}" for i in range(len(memory))])
    right.invert_yaxis()
    right.set(xlabel="peak memory / output")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small")
    write_atomically(FOLDER / "scaling.svg", lambda file: figure.savefig(file, format="svg"))


def main() -> None:
    torch.manual_seed(0)
    latents = _nanoseconds({k: _spread(BATCH, k) for k in LATENTS}, "latents")
    means = _nanoseconds({m: _spread(512, 64, mean=m, narrow=0.5) for m in MEANS}, "means")
    both = _spread(512, 256)
    output = both[0].numel() * both[0].element_size()
    memory = {name: peak_bytes(forward_backward(case, *both)) / output for name, case in CASES.items()}
    rows = [
        {
            "": name,
            **{f"{k} latents": round(latents[name][k]) for k in (16, 256, 16384)},
            **{f"mean {m:g}": round(means[name][m]) if m in means[name] else "" for m in (0.01, 1.0, 100.0, 10_000.0)},
            "memory / output": f"{memory[name]:.1f}",
        }
        for name in CASES
    ]
    panels = [("latents", latents), ("mean count", means)]
    _plot(panels, memory)
    note = f"Nanoseconds per latent, forward and backward: batch {BATCH} at a mean count of about 1; 512 x 64 latents"
    report("scaling", rows, f"{note} by mean count; peak memory of 512 x 256 latents over that of the output")


if __name__ == "__main__":
    main()
