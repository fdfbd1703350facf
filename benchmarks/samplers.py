"""Time and memory of the relaxed negative binomial's samplers against the textbook's, forward and backward.

python -m benchmarks.samplers    a minute or two on two cores
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from benchmarks import textbook
from benchmarks.measure import device, forward_backward, peak_bytes, progress, report, seconds
from pyro_nbvae.distributions import (
    ArrivalTimes,
    ConwayMaxwellPoisson,
    GumbelSoftmax,
    Integer,
    NegativeBinomial,
    Relaxation,
    RelaxedNegativeBinomial,
    RelaxedPoisson,
    negative_binomial_kl,
)

SHAPE = (512, 256)


def parameters(shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    """Draw log r ~ N(0, 0.5^2) and logits ~ N(0, 0.7^2)."""
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device())
    return 0.5 * noise[0], 0.7 * noise[1]


def ours(relaxation: Relaxation):
    def sample(log_r: Tensor, logits: Tensor) -> Tensor:
        q = RelaxedNegativeBinomial(log_r.exp(), logits=logits, relaxation=relaxation, validate_args=False)
        return q.rsample()

    return sample


def theirs(relaxation: ArrivalTimes | GumbelSoftmax):
    def sample(log_r: Tensor, logits: Tensor) -> Tensor:
        rate = textbook.negative_binomial_rate(log_r, logits)
        if isinstance(relaxation, ArrivalTimes):
            return textbook.arrivals(rate, relaxation.temperature)  # type: ignore[arg-type]
        return textbook.gumbel(rate, relaxation.temperature, relaxation.max_count)  # type: ignore[arg-type]

    return sample


def _unit_prior(like: Tensor) -> tuple[Tensor, ...]:
    """log r and logits of a negative binomial prior of mean 1 for each latent, shared by the batch as in a model."""
    return torch.zeros_like(like[0]), torch.zeros_like(like[0])


def exact_kl(log_r: Tensor, logits: Tensor, *prior: Tensor) -> Tensor:
    """KL to a negative binomial prior of this log r and these logits. Default: of mean 1."""
    prior_log_r, prior_logits = prior or _unit_prior(log_r)
    return negative_binomial_kl(log_r.exp(), logits, prior_log_r.exp(), prior_logits)


def com_poisson(log_nu: Tensor, log_rate: Tensor) -> Tensor:
    return ConwayMaxwellPoisson(log_rate.exp(), log_nu.exp(), relaxation=Integer(), validate_args=False).rsample()


def com_poisson_kl(log_nu: Tensor, log_rate: Tensor, *prior: Tensor) -> Tensor:
    """KL to a negative binomial prior, as :func:`exact_kl`."""
    prior_log_r, prior_logits = prior or _unit_prior(log_nu)
    p = NegativeBinomial(prior_log_r.exp(), logits=prior_logits, validate_args=False).expand(log_nu.shape)
    return kl_divergence(ConwayMaxwellPoisson(log_rate.exp(), log_nu.exp(), validate_args=False), p)


def poisson(unused: Tensor, log_rate: Tensor) -> Tensor:
    q = RelaxedPoisson(log_rate.exp(), relaxation=Integer(), validate_args=False)
    return q.rsample() + 0 * unused


# There is no textbook gradient for integers.
INTEGERS = {
    "integers, negative binomial": ours(Integer()),
    "integers, Poisson": poisson,
    "integers, COM-Poisson": com_poisson,
}
CASES: dict[str, ArrivalTimes | GumbelSoftmax] = {
    "arrival times, sigmoid, temperature 0.1": ArrivalTimes(0.1),
    "arrival times, sigmoid, temperature 1": ArrivalTimes(1.0),
    "arrival times, smoothstep, temperature 0.1": ArrivalTimes(0.1, indicator="smoothstep"),
    "Gumbel-softmax, temperature 0.25": GumbelSoftmax(0.25, max_count=100),
    "Gumbel-softmax, temperature 1": GumbelSoftmax(1.0, max_count=100),
}


def main() -> None:
    torch.manual_seed(0)
    both = parameters()
    output = both[0].numel() * both[0].element_size()
    rows = []
    for name, relaxation in progress(list(CASES.items()), "samplers"):
        runs = {
            "ours": forward_backward(ours(relaxation), *both),
            "textbook": forward_backward(theirs(relaxation), *both),
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
    together = {name: forward_backward(sample, *both) for name, sample in INTEGERS.items()}
    together["arrivals"] = forward_backward(ours(ArrivalTimes(0.1)), *both)
    taken = seconds(together, repeats=15)
    for name in INTEGERS:
        rows.append(
            {
                "sampler": name,
                "ours, ms": round(1e3 * taken[name], 1),
                "arrivals at 0.1 / this": round(taken["arrivals"] / taken[name], 2),
                "ours, peak memory / output": round(peak_bytes(together[name]) / output, 1),
            }
        )
    report("samplers", rows, f"Relaxed negative binomial, {SHAPE[0]} x {SHAPE[1]} latents, forward and backward")


if __name__ == "__main__":
    main()
