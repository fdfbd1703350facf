"""Time of the forms of the KL between counts, forward and backward.

python -m benchmarks.kl    seconds
"""

from __future__ import annotations

import torch

from benchmarks.measure import device, forward_backward, report, seconds
from benchmarks.samplers import SHAPE, com_poisson_kl, parameters
from pyro_nbvae.distributions import (
    ArrivalTimes,
    NegativeBinomial,
    RelaxedNegativeBinomial,
    negative_binomial_kl,
    shared_dispersion_kl,
)
from pyro_nbvae.distributions.divergences import negative_binomial_log_q_over_p


def main() -> None:
    torch.manual_seed(0)
    log_r, logits = parameters()
    zero = torch.zeros(SHAPE[1], device=device())
    with torch.no_grad():
        z = RelaxedNegativeBinomial(log_r.exp(), logits=logits, relaxation=ArrivalTimes(0.1)).sample(torch.Size([5]))

    def monte_carlo(log_r, logits):
        q = NegativeBinomial(log_r.exp(), logits=logits, validate_args=False)
        p = NegativeBinomial(zero.exp(), logits=zero, validate_args=False)
        return (q.log_prob(z) - p.log_prob(z)).mean(0)

    cases = {
        "shared dispersion": lambda log_r, logits: shared_dispersion_kl(log_r.exp(), logits, zero),
        "exact": lambda log_r, logits: negative_binomial_kl(log_r.exp(), logits, zero.exp(), zero),
        "Monte Carlo, 5 samples given": monte_carlo,
    }
    cases["COM-Poisson, exact"] = com_poisson_kl
    cases["Monte Carlo, 5 samples given, as one function"] = lambda log_r, logits: negative_binomial_log_q_over_p(
        list(z), log_r.exp(), logits, zero.exp(), zero
    )
    taken = seconds({name: forward_backward(form, log_r, logits) for name, form in cases.items()}, repeats=15)
    rows = [
        {"KL": name, "ms": round(1e3 * t, 1), "relative to exact": round(t / taken["exact"], 2)}
        for name, t in taken.items()
    ]
    report("kl", rows, f"KL of {SHAPE[0]} x {SHAPE[1]} posteriors from their priors, forward and backward")


if __name__ == "__main__":
    main()
