"""Scaling of the samplers and of the exact KLs: with the batch, the latents, the mean count, and one large unit.

python -m benchmarks.scaling    about a minute on two cores
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from benchmarks.measure import device, forward_backward, report, seconds
from benchmarks.samplers import com_poisson, ours
from pyro_nbvae.distributions import (
    ArrivalTimes,
    ConwayMaxwellPoisson,
    GumbelSoftmax,
    Integer,
    NegativeBinomial,
    negative_binomial_kl,
)


def _cases(log_r: Tensor, logits: Tensor) -> dict[str, Callable[[], object]]:
    zero = torch.zeros((), device=device())
    # a prior of the same mean, shared by the batch
    prior = NegativeBinomial(log_r[0].exp(), logits=logits[0], validate_args=False).expand(log_r.shape)

    def com_poisson_kl(log_nu: Tensor, log_rate: Tensor) -> Tensor:
        return kl_divergence(ConwayMaxwellPoisson(log_rate.exp(), log_nu.exp(), validate_args=False), prior)

    return {
        "arrivals": forward_backward(ours(ArrivalTimes(0.1)), log_r, logits),
        "Gumbel": forward_backward(ours(GumbelSoftmax(0.25)), log_r, logits),
        "integers": forward_backward(ours(Integer()), log_r, logits),
        "KL": forward_backward(lambda a, b: negative_binomial_kl(a.exp(), b, zero.exp(), zero), log_r, logits),
        "COM-Poisson": forward_backward(com_poisson, log_r, logits),
        "its KL": forward_backward(com_poisson_kl, log_r, logits),
    }


def _spread(*shape: int, mean: float = 1.0) -> tuple[Tensor, Tensor]:
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device())
    return 0.5 * noise[0], 0.7 * noise[1] + torch.tensor(mean).log() - 0.37  # e^(0.37) is the mean at 0


def main() -> None:
    torch.manual_seed(0)
    busy = _spread(512, 256)
    busy[1][0, 0] += 9.0  # its mean is 8,000
    points = {
        **{f"batch {b}, 256 latents": _spread(b, 256) for b in (64, 256, 1024, 4096)},
        **{f"batch 512, {k} latents": _spread(512, k) for k in (64, 256, 1024)},
        **{f"mean count {m}": _spread(512, 256, mean=m) for m in (0.1, 1.0, 20.0, 100.0)},
        "one unit of mean 8,000": busy,
    }
    cases = {(point, name): run for point, pair in points.items() for name, run in _cases(*pair).items()}
    taken = seconds(cases, repeats=5)  # type: ignore[arg-type]
    rows = []
    for point, (log_r, _) in points.items():
        row: dict[str, object] = {"": point}
        for name in _cases(*points[point]):
            row[name] = round(1e9 * taken[point, name] / log_r.numel())  # type: ignore[index]
        rows.append(row)
    report(
        "scaling",
        rows,
        "Nanoseconds a latent, forward and backward: samplers and KL of a negative binomial and of a COM-Poisson; "
        "mean count 1 unless said otherwise",
    )


if __name__ == "__main__":
    main()
