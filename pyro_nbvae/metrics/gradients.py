r"""Bias and variance of gradients: of the gradient through a relaxation, and of an ELBO estimator.

:func:`gradient_errors` compares relaxations. The objective is that of the model with integer counts,
:math:`L = E_q[-\log p(x \mid z)]`, without the KL, which :class:`~pyro_nbvae.infer.AnalyticKL_ELBO` computes without
samples. Gradients are those with respect to the encoder's outputs, averaged over observations; the biases of the
encoder's heads receive this gradient. :func:`gradient_moments` measures the gradient of an ELBO estimator with respect
to the guide's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_nbvae.batching import Batch, Recording
from pyro_nbvae.distributions import Integer, Relaxation
from pyro_nbvae.errors import InputError
from pyro_nbvae.seeds import stream_seed
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, evaluating

# Number of observations that the decoder receives at a time.
_DECODED = 8192
# Number of groups of samples from which the bias is estimated.
GROUPS = 5


@dataclass(frozen=True)
class GradientError:
    """Error of a gradient estimator, relative to the squared norm of the true gradient.

    Args:
        squared_bias: squared norm of the mean error; an unbiased estimate, so it may be negative if the bias is small.
        squared_bias_error: standard error of ``squared_bias``.
        variance: trace of the covariance of one gradient sample, for a batch of the given size.

    Example::

        >>> GradientError(squared_bias=0.25, squared_bias_error=0.01, variance=0.5).total
        0.75
    """

    squared_bias: float
    squared_bias_error: float
    variance: float

    @property
    def total(self) -> float:
        """Mean squared error of one gradient sample."""
        return max(self.squared_bias, 0.0) + self.variance


class GradientMoments(NamedTuple):
    """Moments of a gradient.

    Both estimates are unbiased, so ``squared_norm`` may be negative if the variance is much larger.

    Attributes:
        squared_norm: squared norm of the mean.
        variance: trace of the covariance.

    Example::

        >>> GradientMoments(squared_norm=2.0, variance=0.5)
        GradientMoments(squared_norm=2.0, variance=0.5)
    """

    squared_norm: float
    variance: float


def encoder_outputs(guide: AmortizedGuide, x: Batch) -> tuple[Tensor, ...]:
    """Return the encoder's outputs for observations ``x`` as leaves, for gradients with respect to them."""
    batch = Recording.of(x)
    with torch.no_grad():
        return tuple(h.detach().clone().requires_grad_() for h in guide.encode(batch.x, **batch.given))


def mean_gradient(loss: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """Return the gradient of a loss with respect to the encoder's outputs, averaged over observations."""
    return _mean_over_observations(torch.autograd.grad(loss, outputs))


def _mean_over_observations(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.double().mean(0) for g in gradients])


def _negative_log_likelihood(model: GenerativeModel, z: Tensor, x: Batch) -> Tensor:
    """Return -log p(x | z) of each observation, (B,)."""
    batch = Recording.of(x)
    return -model.observation(z, **batch.given).log_prob(batch.filled())  # a value with a finite gradient


@torch.enable_grad()
def unbiased_gradient(model: GenerativeModel, guide: AmortizedGuide, x: Batch) -> Tensor:
    r"""Return an unbiased gradient sample: :math:`E[A(z) / q(z) (f(z + 1) - f(z))]`, unit by unit (Cong et al., 2019).

    :math:`A(z) / q(z)` is the derivative of :class:`~pyro_nbvae.distributions.Integer` minus half of
    :math:`\partial \log q(z)`. Each sample decodes every observation once per latent.

    See also: docs/mathematics.md, section 5.4 (Integers).
    """
    outputs = encoder_outputs(guide, x)
    with guide.relaxed(Integer()):
        q = guide.posterior_from(outputs)
    z = q.rsample()
    slopes = torch.autograd.grad(z.sum(), outputs, retain_graph=True)
    z = z.detach()
    scores = torch.autograd.grad(q.log_prob(z).sum(), outputs)
    with torch.no_grad():
        f = _negative_log_likelihood(model, z, x)
        rows = max(1, _DECODED // len(x))
        units = torch.eye(z.shape[1], dtype=z.dtype, device=z.device).split(rows)
        change = torch.cat([_negative_log_likelihood(model, z + u[:, None], x) - f for u in units]).T
        return _mean_over_observations([(a - s / 2) * change for a, s in zip(slopes, scores, strict=True)])


@torch.enable_grad()
def pathwise_gradient(model: GenerativeModel, guide: AmortizedGuide, x: Batch, relaxation: Relaxation) -> Tensor:
    """Return a gradient sample through relaxed counts."""
    outputs = encoder_outputs(guide, x)
    with guide.relaxed(relaxation):
        q = guide.posterior_from(outputs)
    return mean_gradient(_negative_log_likelihood(model, q.rsample(), x).sum(), outputs)


@torch.enable_grad()
def score_gradient(model: GenerativeModel, guide: AmortizedGuide, x: Batch, samples: int) -> Tensor:
    """Return a gradient sample of the score-function estimator.

    With one sample of the latents it is the plain estimator. With more it is VarGrad, in which the baseline of each
    sample is the mean over the others (Richter et al., 2020).
    """
    outputs = encoder_outputs(guide, x)
    with guide.exact():
        q = guide.posterior_from(outputs)
    z = q.sample(torch.Size([samples]))
    with torch.no_grad():
        f = _negative_log_likelihood(model, z, x)
        weight = f if samples == 1 else (f - f.mean(0)) * samples / (samples - 1)
    return mean_gradient((weight * q.log_prob(z).sum(-1)).mean(0).sum(), outputs)


def gradient_error(estimates: Tensor, unbiased: Tensor, batches: float = 1.0) -> GradientError:
    """Compare gradient samples of an estimator with unbiased ones.

    Args:
        estimates, unbiased: gradient samples, (samples, size) each.
        batches: size of the batch for which the variance is reported, over the number of observations used here.

    Raises:
        InputError: if the true gradient is not distinguishable from 0, so that nothing can be relative to it.
    """
    norm = float(unbiased.mean(0).square().sum()) - float(unbiased.var(0).sum()) / len(unbiased)
    if not norm > 0:
        raise InputError(
            f"the true gradient is not distinguishable from 0 with {len(unbiased)} unbiased samples: use more samples "
            "or more observations"
        )
    # products of the errors of independent groups of samples are unbiased: their variances do not contribute
    pairs = zip(estimates.tensor_split(GROUPS), unbiased.tensor_split(GROUPS), strict=True)
    errors = torch.stack([a.mean(0) - b.mean(0) for a, b in pairs])
    products = (errors @ errors.T).fill_diagonal_(0)
    bias = float(products.sum()) / (GROUPS * (GROUPS - 1))
    left_out = (products.sum() - 2 * products.sum(1)) / ((GROUPS - 1) * (GROUPS - 2))
    error = float(left_out.var(correction=0) * (GROUPS - 1)) ** 0.5  # jackknife
    return GradientError(bias / norm, error / norm, float(estimates.var(0).sum()) / batches / norm)


def gradient_errors(
    model: GenerativeModel,
    guide: AmortizedGuide,
    x: Batch,
    relaxations: Sequence[Relaxation],
    *,
    samples: int = 50,
    unbiased_samples: int = 20,
    batch_size: int | None = None,
    seed: int = 0,
) -> list[GradientError]:
    r"""Compare the gradient through each relaxation with the mean of unbiased gradient samples, on one batch.

    For a gradient sample :math:`\hat g` and the true gradient g

    .. math:: \mathrm{squared\ bias} = \|E[\hat g] - g\|^2 / \|g\|^2, \qquad
        \mathrm{variance} = \mathrm{tr}\,\mathrm{Cov}(\hat g) / \|g\|^2

    with respect to the encoder's outputs, without dropout. The global random state and the guide's relaxation are not
    changed.

    Args:
        model, guide: the pair; its latents are counts.
        x: observations (B, *event_shape), or a :class:`~pyro_nbvae.batching.Recording`.
        relaxations: the relaxations to compare.
        samples: number of gradient samples per relaxation, at least 5.
        unbiased_samples: number of unbiased gradient samples, at least 5; each decodes every observation once per
            latent.
        batch_size: batch size for which the variance is reported. Default: the number of observations in ``x``.
        seed: random seed.

    Returns:
        The error of each relaxation.

    Raises:
        InputError: for observations of the wrong shape or dtype, for too few samples, and if the true gradient is not
            distinguishable from 0.

    Reference: Cong et al., 2019, for the unbiased gradient.

    See also: docs/mathematics.md, section 5.5 (Bias and noise).

    Example::

        >>> from pyro_nbvae.distributions import ArrivalTimes
        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> relaxations = [Integer(), ArrivalTimes(1.0)]
        >>> errors = gradient_errors(model, guide, torch.ones(4, 5), relaxations, samples=5, unbiased_samples=5)
        >>> len(errors), errors[0].variance > 0
        (2, True)
    """
    if min(samples, unbiased_samples) < GROUPS:
        raise InputError(f"samples and unbiased_samples must be at least {GROUPS}, got {samples}, {unbiased_samples}")

    def repeated(gradient: Callable[..., Tensor], number: int, *arguments: object) -> Tensor:
        return torch.stack([gradient(model, guide, x, *arguments) for _ in range(number)])

    with evaluating(model, guide, seed):
        unbiased = repeated(unbiased_gradient, unbiased_samples)
        estimates = [repeated(pathwise_gradient, samples, relaxation) for relaxation in relaxations]
        return [gradient_error(each, unbiased, (batch_size or len(x)) / len(x)) for each in estimates]


def gradient_moments(
    elbo: ELBO, model: GenerativeModel, guide: AmortizedGuide, x: Batch, samples: int, *, seed: int = 0
) -> GradientMoments:
    r"""Estimate the moments of the gradient of the loss per observation, on one batch.

    .. math:: \mathrm{squared\ norm} = \|E[\hat g]\|^2, \qquad \mathrm{variance} = \mathrm{tr}\,\mathrm{Cov}(\hat g)

    The gradient is that with respect to the guide's parameters. Pyro's parameter store and the global random state are
    not changed.

    Args:
        elbo: an ELBO with ``differentiable_loss``.
        model, guide: the pair.
        x: observations (B, *event_shape), or a :class:`~pyro_nbvae.batching.Recording`.
        samples: number of gradient samples, at least 2.
        seed: random seed.

    Raises:
        InputError: for fewer than two samples.
        NotImplementedError: by this package's ELBOs, for a guide whose latents have no ``rsample``.

    See also: docs/mathematics.md, section 5.5 (Bias and noise).

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> moments = gradient_moments(pyro.infer.TraceMeanField_ELBO(), model, guide, torch.zeros(4, 5), samples=3)
        >>> moments.variance > 0
        True
    """
    if samples < 2:
        raise InputError(f"samples must be at least 2, got {samples}")
    parameters = [p for p in guide.parameters() if p.requires_grad]
    total: Tensor | float = 0.0
    squares = 0.0
    batch = Recording.of(x)
    number = getattr(model, "data_size", None) or len(x)  # with a data size, the loss is that of all data
    devices = [batch.x.device] if batch.x.is_cuda else []
    with pyro.get_param_store().scope(), pyro.validation_enabled(False), torch.random.fork_rng(devices):
        torch.manual_seed(stream_seed(seed, "gradients"))
        for _ in range(samples):
            loss = elbo.differentiable_loss(model, guide, batch.x, **batch.given) / number  # type: ignore[attr-defined]
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()
            total = total + gradient
            squares += float(gradient.square().sum())
    of_mean = float((torch.as_tensor(total) / samples).square().sum())
    variance = (squares - samples * of_mean) / (samples - 1)
    return GradientMoments(of_mean - variance / samples, variance)
