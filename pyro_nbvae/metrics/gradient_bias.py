r"""How far a relaxation's gradient is from the truth, and how noisy it is.

The objective is that of the model with integer counts, :math:`L = E_q[-\log p(x \mid z)]` (the KL has no samples in
it), its gradient that in the encoder's outputs, averaged over observations: what reaches the biases of the encoder's
heads. Relative to the squared norm of the truth g,

.. math:: \mathrm{bias}^2 = \|E[\hat g] - g\|^2 / \|g\|^2, \qquad
    \mathrm{noise} = \mathrm{tr}\,\mathrm{Cov}(\hat g) / \|g\|^2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from pyro_nbvae.distributions import Integer, Relaxation
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel

# Observations that one call of the decoder takes.
DECODED = 8192
# Groups of draws that the bias is estimated from.
GROUPS = 5


@dataclass(frozen=True)
class GradientError:
    """Of one way to estimate the gradient, relative to the squared norm of the truth.

    Args:
        bias: the squared norm of the mean error; estimated without bias, so that a small one may come out below zero.
        bias_error: its standard error.
        noise: the trace of the covariance of one draw's gradient, on a batch of the size it is given for.
    """

    bias: float
    bias_error: float
    noise: float

    @property
    def total(self) -> float:
        """The mean squared error of one draw."""
        return max(self.bias, 0.0) + self.noise


@contextmanager
def outputs(guide: AmortizedGuide, x: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The encoder's outputs on ``x`` as leaves that the guide's posterior is differentiated in, within the context."""
    with torch.no_grad():
        leaves = tuple(h.detach().clone().requires_grad_() for h in guide.encode(x))
    guide.encode = lambda x: leaves  # type: ignore[method-assign]
    try:
        with torch.enable_grad():
            yield leaves
    finally:
        del guide.encode


def negative_log_likelihood(model: GenerativeModel, z: Tensor, x: Tensor) -> Tensor:
    """-log p(x | z) of each observation, (B,)."""
    return -model.observation(z).log_prob(x)


def _mean_over_observations(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.double().mean(0) for g in gradients])


def exact_draw(model: GenerativeModel, guide: AmortizedGuide, x: Tensor) -> Tensor:
    r"""An unbiased draw of the gradient: :math:`E[A(z) / q(z) (f(z + 1) - f(z))]`, unit by unit (Cong et al., 2019).

    :math:`A(z) / q(z)` is the slope of :class:`~pyro_nbvae.distributions.Integer` less half of
    :math:`\partial \log q(z)`. A draw decodes every observation once for each latent.
    """
    guide.relaxation = Integer()
    with outputs(guide, x) as leaves:
        q = guide.posterior(x)
        z = q.rsample()
        slopes = torch.autograd.grad(z.sum(), leaves, retain_graph=True)
        scores = torch.autograd.grad(q.log_prob(z.detach()).sum(), leaves)
    with torch.no_grad():
        z = z.detach()
        here = negative_log_likelihood(model, z, x)
        rows = max(1, DECODED // len(x))
        units = torch.eye(z.shape[1], dtype=z.dtype, device=z.device).split(rows)
        change = torch.cat([negative_log_likelihood(model, z + u[:, None], x) - here for u in units]).T
        return _mean_over_observations([(a - s / 2) * change for a, s in zip(slopes, scores, strict=True)])


def pathwise_draw(model: GenerativeModel, guide: AmortizedGuide, x: Tensor, relaxation: Relaxation) -> Tensor:
    """A draw of the gradient through relaxed counts."""
    guide.relaxation = relaxation
    with outputs(guide, x) as leaves:
        loss = negative_log_likelihood(model, guide.posterior(x).rsample(), x).sum()
        return _mean_over_observations(torch.autograd.grad(loss, leaves))


def score_draw(model: GenerativeModel, guide: AmortizedGuide, x: Tensor, samples: int) -> Tensor:
    """A draw by the score function: plain with one sample, with more VarGrad, each sample's baseline being the mean of
    the others (Richter et al., 2020)."""
    guide.relaxation = None
    with outputs(guide, x) as leaves:
        q = guide.posterior(x)
        z = q.sample(torch.Size([samples]))
        with torch.no_grad():
            f = negative_log_likelihood(model, z, x)
            weight = f if samples == 1 else (f - f.mean(0)) * samples / (samples - 1)
        loss = (weight * q.log_prob(z).sum(-1)).mean(0).sum()
        return _mean_over_observations(torch.autograd.grad(loss, leaves))


def draw_many(draw: Callable[[], Tensor], draws: int) -> Tensor:
    """So many draws, (draws, size of the gradient)."""
    return torch.stack([draw() for _ in range(draws)])


def compare(estimates: Tensor, exact: Tensor, batches: float = 1.0) -> GradientError:
    """Draws of an estimate (draws, size) against draws of the truth.

    Args:
        batches: the size of the batch that the noise is given for, over the number of observations here.
    """
    exact_noise = float(exact.var(0).sum())
    norm = float(exact.mean(0).square().sum()) - exact_noise / len(exact)
    norm = max(norm, torch.finfo(torch.float64).tiny)
    # products of the errors of independent groups of draws have no noise in their mean
    pairs = zip(estimates.tensor_split(GROUPS), exact.tensor_split(GROUPS), strict=True)
    errors = torch.stack([a.mean(0) - b.mean(0) for a, b in pairs])
    products = (errors @ errors.T).fill_diagonal_(0)
    bias = float(products.sum()) / (GROUPS * (GROUPS - 1))
    left_out = (products.sum() - 2 * products.sum(1)) / ((GROUPS - 1) * (GROUPS - 2))
    spread = float(left_out.var(correction=0) * (GROUPS - 1)) ** 0.5  # jackknife
    return GradientError(bias / norm, spread / norm, float(estimates.var(0).sum()) / batches / norm)


@contextmanager
def undisturbed(guide: AmortizedGuide, device: torch.device, seed: int) -> Iterator[None]:
    """A random stream of its own; the guide's relaxation is put back."""
    relaxation = guide.relaxation
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), pyro.validation_enabled(False):
            torch.manual_seed(seed)
            yield
    finally:
        guide.relaxation = relaxation


def gradient_errors(
    model: GenerativeModel,
    guide: AmortizedGuide,
    x: Tensor,
    relaxations: Sequence[Relaxation],
    *,
    draws: int = 50,
    exact_draws: int = 20,
    batch_size: int | None = None,
    seed: int = 0,
) -> list[GradientError]:
    """The gradient of each relaxation against the mean of exact draws, on observations ``x`` (B, *event_shape).

    Args:
        draws: of each relaxation, 5 or more.
        exact_draws: of the truth, 5 or more; each decodes every observation once for each latent.
        batch_size: that the noise is given for. Default: the observations here.
    """
    with undisturbed(guide, x.device, seed):
        exact = draw_many(lambda: exact_draw(model, guide, x), exact_draws)
        batches = (batch_size or len(x)) / len(x)
        estimates = [draw_many(functools.partial(pathwise_draw, model, guide, x, r), draws) for r in relaxations]
        return [compare(one, exact, batches) for one in estimates]
