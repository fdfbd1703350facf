"""Relaxed counts in the usual form, with autograd through all of the noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The largest number of arrivals in the paper's released code.
MOST = 826


def arrival_events(rate: Tensor) -> int:
    """Return the number of arrivals that the fixed-length form draws for every latent."""
    return min(MOST, math.ceil(5 * max(float(rate.max()), 1.0)))


def arrivals(rate: Tensor, temperature: float) -> Tensor:
    """sum_k sigmoid((1 - S_k) / temperature), with S_k the running sums of exponentials of that rate."""
    gaps = torch.empty(arrival_events(rate), *rate.shape, device=rate.device).exponential_() / rate
    return torch.sigmoid((1 - gaps.cumsum(0)) / temperature).sum(0)


def gumbel(rate: Tensor, temperature: float, max_count: int) -> Tensor:
    """sum_k k softmax((log Poisson(k) + Gumbel noise) / temperature)."""
    k = torch.arange(max_count + 1.0, device=rate.device)
    log_pmf = k * rate.log()[..., None] - rate[..., None] - torch.lgamma(k + 1)
    noise = -torch.log(-torch.log(torch.rand_like(log_pmf).clamp(1e-20, 1 - 1e-7)))
    return (torch.softmax((log_pmf + noise) / temperature, -1) * k).sum(-1)


def negative_binomial_rate(log_r: Tensor, logits: Tensor) -> Tensor:
    """Draw the Gamma-distributed rate with torch's own distribution."""
    return torch.distributions.Gamma(log_r.exp(), torch.exp(-logits), validate_args=False).rsample()
