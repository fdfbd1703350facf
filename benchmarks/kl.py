"""Time of the forms of the KL between counts, forward and backward.

python -m benchmarks.kl    seconds
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.measure import device, forward_backward, report, seconds
from benchmarks.samplers import SHAPE, com_poisson_kl, exact_kl, parameters
from pyro_nbvae.distributions import (
    ArrivalTimes,
    NegativeBinomial,
    RelaxedNegativeBinomial,
    shared_dispersion_kl,
)
from pyro_nbvae.distributions.divergences import negative_binomial_log_q_over_p


def main() -> None:
    torch.manual_seed(0)
    posterior = parameters()
    shared = torch.zeros(2, SHAPE[1], device=device()).unbind()
    own = torch.zeros(2, *SHAPE, device=device()).unbind()
    log_r, logits = posterior
    with torch.no_grad():
        z = RelaxedNegativeBinomial(log_r.exp(), logits=logits, relaxation=ArrivalTimes(0.1)).sample(torch.Size([5]))

    def monte_carlo(log_r: Tensor, logits: Tensor, prior_log_r: Tensor, prior_logits: Tensor) -> Tensor:
        q = NegativeBinomial(log_r.exp(), logits=logits, validate_args=False)
        p = NegativeBinomial(prior_log_r.exp(), logits=prior_logits, validate_args=False)
        return (q.log_prob(z) - p.log_prob(z)).mean(0)

    def as_one(log_r: Tensor, logits: Tensor, prior_log_r: Tensor, prior_logits: Tensor) -> Tensor:
        return negative_binomial_log_q_over_p(list(z), log_r.exp(), logits, prior_log_r.exp(), prior_logits)

    def same_dispersion(logits: Tensor, prior_log_r: Tensor, prior_logits: Tensor) -> Tensor:
        return shared_dispersion_kl(prior_log_r.exp(), logits, prior_logits)

    cases = {
        "shared dispersion": forward_backward(same_dispersion, logits, *shared),
        "exact": forward_backward(exact_kl, *posterior, *shared),
        "exact, each element with a prior of its own": forward_backward(exact_kl, *posterior, *own),
        "COM-Poisson, exact": forward_backward(com_poisson_kl, *posterior, *shared),
        "COM-Poisson, exact, each element with a prior of its own": forward_backward(com_poisson_kl, *posterior, *own),
        "Monte Carlo, 5 samples given": forward_backward(monte_carlo, *posterior, *shared),
        "Monte Carlo, 5 samples given, as one function": forward_backward(as_one, *posterior, *shared),
    }
    taken = seconds(cases, repeats=15)
    rows = [
        {"KL": name, "ms": round(1e3 * t, 1), "relative to exact": round(t / taken["exact"], 2)}
        for name, t in taken.items()
    ]
    report("kl", rows, f"KL of {SHAPE[0]} x {SHAPE[1]} posteriors from their priors, forward and backward in both")


if __name__ == "__main__":
    main()
