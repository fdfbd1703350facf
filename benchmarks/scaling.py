"""Scaling of the samplers and of the exact KL: with the batch, the latents, the mean count, and one unit of large mean.

python -m benchmarks.scaling    about a minute on two cores
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import device, forward_backward, report, seconds
from pyro_nbvae.distributions import ArrivalTimes, GumbelSoftmax, Relaxation, RelaxedNegativeBinomial
from pyro_nbvae.distributions.kl import negative_binomial_kl


def _cases(log_r: Tensor, logits: Tensor) -> dict[str, Callable[[], object]]:
    zero = torch.zeros((), device=device())

    def drawn(relaxation: Relaxation) -> Callable[[Tensor, Tensor], Tensor]:
        def draw(log_r: Tensor, logits: Tensor) -> Tensor:
            q = RelaxedNegativeBinomial(log_r.exp(), logits=logits, relaxation=relaxation, validate_args=False)
            return q.rsample()

        return draw

    return {
        "arrival": forward_backward(drawn(ArrivalTimes(0.1)), log_r, logits),
        "gumbel": forward_backward(drawn(GumbelSoftmax(0.25, max_count=1000)), log_r, logits),
        "exact KL": forward_backward(lambda a, b: negative_binomial_kl(a.exp(), b, zero.exp(), zero), log_r, logits),
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
        **{f"mean count {m}": _spread(512, 256, mean=m) for m in (0.1, 1.0, 10.0, 100.0)},
        "one unit of mean 8,000": busy,
    }
    cases = {(point, name): run for point, pair in points.items() for name, run in _cases(*pair).items()}
    taken = seconds(cases, repeats=5)  # type: ignore[arg-type]
    rows = []
    for point, (log_r, _) in points.items():
        row: dict[str, object] = {"": point}
        for name in _cases(*points[point]):
            t = taken[point, name]  # type: ignore[index]
            row |= {f"{name}, ms": round(1e3 * t, 1), f"{name}, ns a latent": round(1e9 * t / log_r.numel())}
        rows.append(row)
    report("scaling", rows, "Relaxed negative binomial, forward and backward; mean count 1 unless said otherwise")


if __name__ == "__main__":
    main()
