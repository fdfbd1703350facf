r"""Bias and noise of the gradient through a relaxation.

The objective is that of the model with integer counts, :math:`L = E_q[-\log p(x \mid z)]`, without the KL, which
:class:`~pyro_nbvae.infer.AnalyticKL_ELBO` computes without samples. Its gradient is taken in the encoder's outputs and
averaged over observations: it is what reaches the biases of the encoder's heads. Relative to the squared norm of the
true gradient g,

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
from pyro_nbvae.errors import InputError, check_number
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, evaluation_mode

# Observations in one call of the decoder.
DECODED = 8192
# Number of groups of draws from which the bias is estimated.
GROUPS = 5


@dataclass(frozen=True)
class GradientError:
    """Error of one gradient estimator, relative to the squared norm of the true gradient.

    Args:
        bias: squared norm of the mean error; an unbiased estimate, so it may be below zero if the bias is small.
        bias_error: standard error of ``bias``.
        noise: trace of the covariance of one draw, for a batch of the given size.

    Example::

        >>> GradientError(bias=0.25, bias_error=0.01, noise=0.5).total
        0.75
    """

    bias: float
    bias_error: float
    noise: float

    @property
    def total(self) -> float:
        """Mean squared error of one draw."""
        return max(self.bias, 0.0) + self.noise


@contextmanager
def outputs(guide: AmortizedGuide, x: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Context in which the guide's posterior is computed from leaf tensors, the encoder's outputs on ``x``.

    The gradient in these leaves can then be taken.
    """
    with torch.no_grad():
        leaves = tuple(h.detach().clone().requires_grad_() for h in guide.encode(x))
    guide.encode = lambda x: leaves  # type: ignore[method-assign]
    try:
        with torch.enable_grad():
            yield leaves
    finally:
        del guide.encode


def negative_log_likelihood(model: GenerativeModel, z: Tensor, x: Tensor) -> Tensor:
    """Return -log p(x | z) of each observation, (B,)."""
    return -model.observation(z).log_prob(x)


def _mean_over_observations(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.double().mean(0) for g in gradients])


def exact_draw(model: GenerativeModel, guide: AmortizedGuide, x: Tensor) -> Tensor:
    r"""Draw an unbiased gradient: :math:`E[A(z) / q(z) (f(z + 1) - f(z))]`, unit by unit (Cong et al., 2019).

    :math:`A(z) / q(z)` is the derivative of :class:`~pyro_nbvae.distributions.Integer` minus half of
    :math:`\partial \log q(z)`. Each draw decodes every observation once for each latent.

    See also: docs/mathematics.md, section 5.4 (Integers).
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
    """Draw a gradient through relaxed counts."""
    guide.relaxation = relaxation
    with outputs(guide, x) as leaves:
        loss = negative_log_likelihood(model, guide.posterior(x).rsample(), x).sum()
        return _mean_over_observations(torch.autograd.grad(loss, leaves))


def score_draw(model: GenerativeModel, guide: AmortizedGuide, x: Tensor, samples: int) -> Tensor:
    """Draw a gradient by the score function.

    With one sample it is the plain estimator. With more it is VarGrad, in which the baseline of each sample is the mean
    of the others (Richter et al., 2020).
    """
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
    """Return several draws, (draws, size of the gradient)."""
    return torch.stack([draw() for _ in range(draws)])


def compare(estimates: Tensor, exact: Tensor, batches: float = 1.0) -> GradientError:
    """Compare draws of an estimator with draws of the exact gradient, (draws, size) each.

    Args:
        batches: size of the batch for which the noise is reported, divided by the number of observations here.

    Raises:
        InputError: if the exact gradient cannot be told from 0, so that nothing can be relative to it.
    """
    exact_noise = float(exact.var(0).sum())
    norm = float(exact.mean(0).square().sum()) - exact_noise / len(exact)
    if not norm > 0:
        raise InputError(
            f"{len(exact)} exact draws of the gradient cannot be told from 0: draw more, or take more data"
        )
    # products of the errors of independent groups of draws are unbiased: the noise averages out
    pairs = zip(estimates.tensor_split(GROUPS), exact.tensor_split(GROUPS), strict=True)
    errors = torch.stack([a.mean(0) - b.mean(0) for a, b in pairs])
    products = (errors @ errors.T).fill_diagonal_(0)
    bias = float(products.sum()) / (GROUPS * (GROUPS - 1))
    left_out = (products.sum() - 2 * products.sum(1)) / ((GROUPS - 1) * (GROUPS - 2))
    spread = float(left_out.var(correction=0) * (GROUPS - 1)) ** 0.5  # jackknife
    return GradientError(bias / norm, spread / norm, float(estimates.var(0).sum()) / batches / norm)


@contextmanager
def undisturbed(model: GenerativeModel, guide: AmortizedGuide, seed: int) -> Iterator[None]:
    """Context in evaluation mode with a separate random stream; modes and the guide's relaxation are restored.

    With dropout the difference of two decodings would be mostly that of their masks.
    """
    relaxation = guide.relaxation
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with evaluation_mode(model, guide), torch.random.fork_rng(devices), pyro.validation_enabled(False):
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
    r"""Compare the gradient of each relaxation with the mean of exact draws, on one batch.

    .. math:: \mathrm{bias}^2 = \|E[\hat g] - g\|^2 / \|g\|^2, \qquad
        \mathrm{noise} = \mathrm{tr}\,\mathrm{Cov}(\hat g) / \|g\|^2

    for the gradient in the encoder's outputs (:mod:`pyro_nbvae.metrics.gradient_bias`), without dropout. Random numbers
    and the guide's relaxation are left unchanged.

    Args:
        model, guide: the pair; its latents are counts.
        x: observations (B, *event_shape).
        relaxations: the relaxations to compare.
        draws: number of draws for each relaxation, at least 5.
        exact_draws: number of exact draws, at least 5; each decodes every observation once for each latent.
        batch_size: batch size for which the noise is reported. Default: the number of observations in ``x``.
        seed: random seed.

    Returns:
        The error of each relaxation.

    Raises:
        InputError: for observations of the wrong shape or type, for too few draws, and if the exact gradient cannot be
            told from 0.

    Reference: Cong et al., 2019, for the exact gradient.

    See also: docs/mathematics.md, section 5.5 (Bias and noise).

    Example::

        >>> from pyro_nbvae.distributions import ArrivalTimes
        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> ways = [Integer(), ArrivalTimes(1.0)]
        >>> errors = gradient_errors(model, guide, torch.ones(4, 5), ways, draws=5, exact_draws=5)
        >>> len(errors), errors[0].noise > 0
        (2, True)
    """
    check_number("draws", draws, GROUPS)
    check_number("exact_draws", exact_draws, GROUPS)
    with undisturbed(model, guide, seed):
        exact = draw_many(lambda: exact_draw(model, guide, x), exact_draws)
        batches = (batch_size or len(x)) / len(x)
        estimates = [draw_many(functools.partial(pathwise_draw, model, guide, x, r), draws) for r in relaxations]
        return [compare(one, exact, batches) for one in estimates]
