"""The relaxed negative binomial's samplers against the textbook's, forward and backward: time and memory.

python -m benchmarks.samplers    a minute or two on two cores
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import textbook
from benchmarks.measure import device, forward_backward, peak_bytes, progress, report, seconds
from pyro_nbvae.distributions import RelaxedNegativeBinomial

SHAPE = (512, 256)
MAX_COUNT = 100


def parameters(shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    """log r ~ N(0, 0.5^2), logits ~ N(0, 0.7^2)."""
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device())
    return 0.5 * noise[0], 0.7 * noise[1]


def ours(temperature: float, **options: object):
    def sample(log_r: Tensor, logits: Tensor) -> Tensor:
        q = RelaxedNegativeBinomial(log_r.exp(), logits, temperature=temperature, validate_args=False, **options)  # type: ignore[arg-type]
        return q.rsample()

    return sample


def theirs(relaxation: str, temperature: float):
    def sample(log_r: Tensor, logits: Tensor) -> Tensor:
        rate = textbook.negative_binomial_rate(log_r, logits)
        if relaxation == "arrival":
            return textbook.arrivals(rate, temperature)
        return textbook.gumbel(rate, temperature, MAX_COUNT)

    return sample


CASES = {
    "arrival times, sigmoid, temperature 0.1": ("arrival", 0.1, {"indicator": "sigmoid"}),
    "arrival times, sigmoid, temperature 1": ("arrival", 1.0, {"indicator": "sigmoid"}),
    "arrival times, smoothstep, temperature 0.1": ("arrival", 0.1, {"indicator": "smoothstep"}),
    "Gumbel-softmax, temperature 0.25": ("gumbel", 0.25, {"max_count": MAX_COUNT}),
    "Gumbel-softmax, temperature 1": ("gumbel", 1.0, {"max_count": MAX_COUNT}),
}


def main() -> None:
    torch.manual_seed(0)
    both = parameters()
    output = both[0].numel() * both[0].element_size()
    rows = []
    for name, (relaxation, temperature, options) in progress(list(CASES.items()), "samplers"):
        runs = {
            "ours": forward_backward(ours(temperature, relaxation=relaxation, **options), *both),
            "textbook": forward_backward(theirs(relaxation, temperature), *both),
        }
        taken = seconds(runs, repeats=7)
        rows.append(
            {
                "sampler": name,
                "ours, ms": round(1e3 * taken["ours"], 1),
                "textbook, ms": round(1e3 * taken["textbook"], 1),
                "ratio": round(taken["textbook"] / taken["ours"], 1),
                "ours, peak memory / output": round(peak_bytes(runs["ours"]) / output, 1),
                "textbook's": round(peak_bytes(runs["textbook"]) / output, 1),
            }
        )
    report("samplers", rows, f"Relaxed negative binomial, {SHAPE[0]} x {SHAPE[1]} latents, forward and backward")


if __name__ == "__main__":
    main()
