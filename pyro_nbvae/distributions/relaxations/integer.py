r"""Integer samples with a gradient.

For any family over counts with mass q and distribution function F, exactly

.. math:: \partial E[f(z)] = E\Big[\frac{A(z)}{q(z)} (f(z + 1) - f(z))\Big], \qquad A = -\partial F

(Cong et al., 2019). With :math:`f(z + 1) - f(z) \approx \tfrac12 (f'(z) + f'(z + 1))` it becomes a backward pass at the
integer itself,

.. math:: \frac{dz}{d\theta} = \frac{A(z) + A(z - 1)}{2\,q(z)},

which is exactly unbiased if f is quadratic in each unit. For a Poisson :math:`dz / d\lambda = \tfrac12 (1 + z /
\lambda)`; for a negative binomial :math:`dz / dl = \tfrac12 (z + (z + r)\,\sigma(l))`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Size, Tensor
from torch.nn.functional import softplus

from pyro_nbvae.distributions.relaxations.base import (
    LARGEST,
    SAMPLERS,
    Relaxation,
    draw_where,
    exact_counts,
    pathwise,
)
from pyro_nbvae.distributions.relaxations.noise import number_in_piece, pieces, running_sum
from pyro_nbvae.distributions.special import negative_binomial_log_prob
from pyro_nbvae.distributions.threads import compiled, in_pieces, is_compiled_for

if TYPE_CHECKING:
    from pyro_nbvae.distributions.relaxed import RelaxedCount


@dataclass(frozen=True)
class Integer(Relaxation):
    r"""Integer samples with a gradient.

    .. math:: \frac{dz}{d\theta} = \frac{A(z) + A(z - 1)}{2\,q(z)}, \qquad A = -\frac{\partial F}{\partial \theta}

    for the mass function q and the distribution function F (:mod:`pyro_nbvae.distributions.relaxations.integer`). There
    is no temperature: the model is trained on the same counts that it is tested on. The gradient is exact for a
    function that is quadratic in each unit, and close for a smooth one. A sampled KL is neither: use
    :class:`~pyro_nbvae.infer.AnalyticKL_ELBO`.

    Reference: Cong et al., 2019, for the exact gradient that this approximates.

    See also: docs/mathematics.md, section 5.4 (Integers).

    Example::

        >>> from pyro_nbvae.distributions import RelaxedPoisson
        >>> rate = torch.tensor([3.0], requires_grad=True)
        >>> z = RelaxedPoisson(rate, relaxation=Integer()).rsample()
        >>> z.sum().backward()
        >>> torch.allclose(rate.grad, (1 + z / 3.0) / 2), torch.equal(z, z.round())
        (True, True)
    """

    def rsample(self, distribution: RelaxedCount, shape: Size) -> Tensor:
        """Draw counts of this shape.

        Raises:
            TypeError: for a family without an integer sampler.
        """
        sampler, parameters = distribution.integer_sampler(shape)
        return pathwise(sampler, *parameters)


def draw_poisson(log_rate: Tensor) -> tuple[Tensor, Tensor]:
    """Draw Poisson counts from log rates (n,), with dz / d(log rate) = (rate + z) / 2."""
    rate = log_rate.exp()
    z = exact_counts(rate)
    return z, (rate + z).mul_(0.5)


# The recurrence begins at a count whose mass is about exp(-START), and ends beyond the mean where the masses that are
# left, about q_k (1 + e^l), are below exp(-END).
START = {torch.float32: 16.0, torch.float64: 40.0}
END = {torch.float32: 21.0, torch.float64: 42.0}
# Counts per latent in the first round, which goes over the latents of one piece at a time.
FIRST = 2


def draw_negative_binomial(r: Tensor, logits: Tensor, uniform: Tensor | None = None) -> list[Tensor]:
    r"""Draw negative binomial counts by inversion, with their derivatives in r and in the logits.

    Masses and scores in r follow from recurrences,

    .. math:: q_{k+1} = q_k \frac{(r + k)\,\sigma(l)}{k + 1}, \qquad T_{k+1} = T_k + \frac{1}{r + k}, \qquad
        T_0 = \log \sigma(-l), \quad E[T] = 0,

    and :math:`dz / dr = -(\sum_{k<z} q_k T_k + \tfrac12 q_z T_z) / q_z`.

    Args:
        r, logits: (n,).
        uniform: uniform numbers in (0, 1) that determine the counts, (n,); by default they are drawn.

    Returns:
        ``(z, dz/dr, dz/dl)``, (n,) each; nan where r is negative, a parameter is nan, or more than ``LARGEST`` counts
        would have to be summed.
    """
    u = torch.rand_like(r) if uniform is None else uniform
    if is_compiled_for(r):
        drawn = [torch.empty_like(r) for _ in range(3)]
        options = START[r.dtype], math.exp(-END[r.dtype]), LARGEST
        loop = compiled().negative_binomial_integers
        in_pieces(loop, len(r), r.contiguous(), logits.contiguous(), u, *drawn, options=options)
        return drawn
    odds = logits.exp()
    spread = torch.sqrt(2 * START[r.dtype] * r * odds * (1 + odds)) + 1 + odds
    fine = (r >= 0) & (spread <= LARGEST)
    return draw_where(fine, torch.zeros_like(fine), functools.partial(_inverted, u), r, logits)


def _inverted(u: Tensor, r: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = r * logits.exp()
    z, d_r = torch.empty_like(r), torch.empty_like(r)
    first = mean - torch.sqrt(2 * START[r.dtype] * mean * (1 + logits.exp()))
    first, r = first.clamp_(min=0).floor_(), r.clamp(min=torch.finfo(r.dtype).tiny)
    for piece in pieces(len(r), FIRST, r.device):
        z[piece], d_r[piece] = _invert(*(x[piece] for x in (r, logits, mean, first, u)))
    return z, d_r, torch.addcmul(z, z + r, torch.sigmoid(logits)).mul_(0.5)


def _invert(r: Tensor, logits: Tensor, mean: Tensor, k: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw the counts of one piece, with dz/dr; ``k`` is the count where the sum of each latent starts."""
    z, mass_at, sum_to = (torch.empty_like(r) for _ in range(3))
    t = -softplus(logits)
    p = (r * t).exp()
    late = k.nonzero()[:, 0]
    if len(late):
        k_late, r_late = k[late], r[late]
        p[late] = negative_binomial_log_prob(k_late, r_late, logits[late]).exp()
        t[late] += torch.digamma(k_late + r_late) - torch.digamma(r_late)
    success, seen, partial = torch.sigmoid(logits), torch.zeros_like(r), torch.zeros_like(r)
    end, index, width = math.exp(-END[r.dtype]), torch.arange(len(r), device=r.device), FIRST
    while len(index):
        # far in the tail, where the sum of the masses no longer grows, a latent is done at once
        u = u.masked_fill((p < end * (1 - success)) & (k > mean), 0)
        count = k + torch.arange(width, dtype=r.dtype, device=r.device)[:, None]
        shifted = count + r
        ratio = shifted * success
        ratio /= count.add_(1)
        gain = shifted.reciprocal_()
        masses, scores = torch.cat([p[None], ratio]).cumprod(0), torch.cat([t[None], gain]).cumsum(0)
        (mass, score), (p, t) = (masses[:-1], scores[:-1]), (masses[-1], scores[-1])
        sums = running_sum(mass.clone()).add_(seen)
        above = (sums < u).to(r.dtype)
        moment = score.mul_(mass)
        steps = above.sum(0)
        row = steps.clamp(max=width - 1).long()[None]
        partial = partial + above.mul_(moment).sum(0)
        z[index] = k + steps
        mass_at[index] = mass.gather(0, row)[0]
        sum_to[index] = torch.add(partial, moment.gather(0, row)[0], alpha=0.5)
        again = (steps >= width).nonzero()[:, 0]
        index, r, success, mean, u, k, p, t, seen, partial = (
            x[again] for x in (index, r, success, mean, u, k + width, p, t, sums[-1], partial)
        )
        width = min(2 * width, max(FIRST, number_in_piece(len(index), r.device)))
    return z, sum_to.div_(mass_at.clamp_(min=torch.finfo(r.dtype).tiny)).neg_()


SAMPLERS |= {
    "poisson": lambda seed, parameters, temperature: draw_poisson(*parameters),
    "negative_binomial": lambda seed, parameters, temperature: draw_negative_binomial(*parameters),
}
