"""The relaxations written out plainly, on given noise, against samplers that are not."""

import math

import torch

from pyro_nbvae.distributions.kernels.reference import TAIL
from pyro_nbvae.distributions.relaxations.gumbel_softmax import _window


def close(got, expected):
    torch.testing.assert_close(got.double(), expected.detach(), rtol=2e-5, atol=2e-5)


def arrivals(sampler, noise, poisson, indicator, varied, hard, largest=60):
    """A kernel ``arrivals`` with its seed given; ``noise(rows, n)`` are the exponentials that it draws next."""
    n = 150  # of means from 0.1 to the largest, dispersions up to 1e4
    r = torch.logspace(-1, 4, n, dtype=torch.float64).requires_grad_()
    log_mean = torch.linspace(-2.3, math.log(largest), n, dtype=torch.float64)
    logits = (log_mean if poisson else log_mean - r.detach().log()).requires_grad_()
    tau = torch.linspace(0.05, 1.0, n) if varied else torch.full((n,), 0.3)
    gaps = noise(10 * largest, n)
    count = None if poisson else r.detach().float()
    tail = TAIL[indicator]
    z, *derivatives = sampler(tau, count, logits.detach().float(), indicator, hard)
    textbook, integers = [], []
    for i in range(n):
        t = float(tau[i])
        b = torch.exp(-logits[i])
        if poisson:
            u = b * gaps[:, i].cumsum(0)
        else:
            u = b * torch.expm1((gaps[:, i] / (r[i] + torch.arange(len(gaps)))).cumsum(0))
        drawn = int((u < 1 + tail * t).sum()) + 1
        u = u[:drawn]
        x = (1 - u) / t
        if indicator == "sigmoid":
            future = logits[i].exp() if poisson else (r[i] + drawn) / (b + u[-1])
            textbook.append(torch.sigmoid(x).sum() + future * t * torch.nn.functional.softplus(x[-1]))
        else:
            x = x.clamp(-1, 1)
            textbook.append((0.5 + 0.75 * x - 0.25 * x**3).sum())
        integers.append((u < 1).sum())
    soft = torch.stack(textbook)
    expected = torch.autograd.grad(soft.sum(), (logits,) if poisson else (r, logits))
    close(z, torch.stack(integers).double() if hard else soft)
    for ours, theirs in zip(derivatives, expected, strict=True):
        close(ours, theirs)


def races(sampler, noise, varied, hard):
    """A kernel ``races`` with its seed given."""
    n, max_count = 150, 130  # rates from 0.1 to 150: some windows begin above 0, some are truncated
    log_rate = torch.linspace(5, -2, n, dtype=torch.float64).requires_grad_()
    tau = torch.linspace(0.1, 1.0, n) if varied else torch.full((n,), 0.5)
    rate = log_rate.detach().float()
    first, last = _window(rate.exp(), tau, max_count)
    assert first.max() > 0 and last.max() == max_count
    exponentials = noise(int((last - first).max()) + 1, n)
    z, dz = sampler(tau, rate, first, last, hard)
    textbook, winners = [], []
    for i in range(n):
        k = torch.arange(float(first[i]), float(last[i]) + 1, dtype=torch.float64)
        score = k * log_rate[i] - torch.lgamma(k + 1) - exponentials[: len(k), i].log()
        textbook.append((torch.softmax(score / float(tau[i]), 0) * k).sum())
        winners.append(k[score.argmax()])
    soft = torch.stack(textbook)
    close(z, torch.stack(winners).double() if hard else soft)
    expected = torch.autograd.grad(soft.sum(), log_rate)[0]
    torch.testing.assert_close(dz.double(), expected, rtol=1e-3, atol=1e-4)
