"""Time of log masses of counts beside torch's, forward and backward.

python -m benchmarks.log_mass    seconds
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributions as theirs
from torch.nn.functional import softplus

from benchmarks.measure import device, forward_backward, report, seconds
from pyro_nbvae.distributions import ConwayMaxwellPoisson, NegativeBinomial, RelaxedPoisson
from pyro_nbvae.distributions.observations import (
    SoftplusConwayMaxwellPoisson,
    SoftplusNegativeBinomial,
    SoftplusPoisson,
)

SHAPE = (512, 256)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(SHAPE, generator=generator)
    x = torch.poisson(softplus(h), generator=generator).to(device())
    h, log_r = h.to(device()), torch.linspace(-1, 1, SHAPE[1], device=device())

    def logits(h: Tensor, log_r: Tensor) -> Tensor:
        return softplus(h).log() - log_r

    options: Any = {"validate_args": False}
    poisson: dict[str, Callable[[Tensor], Tensor]] = {
        "Poisson, torch": lambda h: theirs.Poisson(softplus(h), **options).log_prob(x),
        "Poisson": lambda h: RelaxedPoisson(softplus(h), **options).log_prob(x),
        "Poisson, likelihood": lambda h: SoftplusPoisson(h, **options).log_prob(x),
    }
    dispersed: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "negative binomial, torch": lambda h, a: theirs.NegativeBinomial(
            a.exp(), logits=logits(h, a), **options
        ).log_prob(x),
        "negative binomial": lambda h, a: NegativeBinomial(a.exp(), logits=logits(h, a), **options).log_prob(x),
        "negative binomial, likelihood": lambda h, a: SoftplusNegativeBinomial(h, a, **options).log_prob(x),
        "COM-Poisson": lambda h, a: ConwayMaxwellPoisson(softplus(h), a.exp(), **options).log_prob(x),
        "COM-Poisson, likelihood by the mean": lambda h, a: SoftplusConwayMaxwellPoisson(h, a, **options).log_prob(x),
    }
    cases = {name: forward_backward(f, h) for name, f in poisson.items()}
    cases |= {name: forward_backward(f, h, log_r) for name, f in dispersed.items()}
    taken = seconds(cases, repeats=9)
    rows = []
    for name, t in taken.items():
        of_torch = taken.get(f"{name.split(',')[0]}, torch")
        rows.append(
            {
                "log mass": name,
                "ms": round(1e3 * t, 1),
                "ns per element": round(1e9 * t / h.numel()),
                "/ torch's": round(t / of_torch, 2) if of_torch else "",
            }
        )
    note = f"{SHAPE[0]} x {SHAPE[1]} counts of means softplus(h), a dispersion for each of {SHAPE[1]} neurons"
    report("log_mass", rows, f"{note}; forward and backward in h and the dispersions")


if __name__ == "__main__":
    main()
