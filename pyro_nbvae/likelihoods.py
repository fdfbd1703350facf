"""Likelihoods p(x | z), as distributions that are computed from a decoder's output.

A likelihood is a callable from the decoder's output, (..., *event_shape), to a distribution. These four are included; a
model accepts any other callable instead. Each states what it reads the output as, so that you know what your own
decoder must return; the built-in decoders end in the layer that the likelihood asks for.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_nbvae import distributions
from pyro_nbvae.batching import is_image_shape
from pyro_nbvae.errors import InputError
from pyro_nbvae.networks.outputs import CountOutput, ImageOutput, LogitOutput, Output, RealOutput


class Likelihood(nn.Module):
    """Base class of likelihoods: from a decoder's output h to p(x | h), element by element.

    Attributes:
        loss_scale: factor of the ELBO in the loss of published runs; beta for the Gaussian likelihood, 1 for nats.
        discrete: whether observations are whole numbers from 0; built-in encoders read them as log(1 + x).

    Example::

        >>> class Laplace(Likelihood):
        ...     def forward(self, h):
        ...         return dist.Laplace(h, 1.0)
        >>> Laplace()(torch.zeros(3)).batch_shape
        torch.Size([3])
    """

    loss_scale = 1.0
    discrete = False

    def setup(self, event_shape: tuple[int, ...]) -> None:
        """Create parameters for observations of this shape; the model calls this before the likelihood is used.

        Args:
            event_shape: shape of one observation.
        """

    def output(self, event_shape: tuple[int, ...]) -> nn.Module:
        """Return the last layer of a built-in decoder: the identity, unless a subclass overrides this.

        Args:
            event_shape: shape of one observation.
        """
        return nn.Identity()

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return the distribution of x, of batch shape ``h.shape``."""
        raise NotImplementedError


class Gaussian(Likelihood):
    r"""Gaussian likelihood, x ~ Normal(h, sqrt(beta / 2)): h is the mean.

    .. math:: -\beta \log p(x \mid h) = (x - h)^2 + \tfrac{\beta}{2} \log(\pi \beta)

    so that -beta * ELBO is the squared error + beta * KL + a constant: one nat of KL is
    worth a squared error of beta. On images the built-in decoders end in a sigmoid, from 0 to 1 or
    over the range of the training data, otherwise in a linear layer.

    Args:
        beta: 2 sigma^2, positive, in squared units of the data.

    Raises:
        ValueError: for a beta that is not positive and finite.

    See also: docs/mathematics.md, section 1.3 (Likelihoods, beta and loss_scale).

    Example::

        >>> float(Gaussian(0.5)(torch.zeros(3)).variance[0])
        0.25
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        if not (beta > 0 and math.isfinite(beta)):
            raise InputError(f"beta must be positive, got {beta}")
        self.beta = float(beta)
        self.loss_scale = self.beta

    def output(self, event_shape: tuple[int, ...]) -> Output:
        return ImageOutput(event_shape) if is_image_shape(event_shape) else RealOutput(event_shape)

    def forward(self, h: Tensor) -> distributions.IsotropicNormal:
        return distributions.IsotropicNormal(h, math.sqrt(self.beta / 2))

    def extra_repr(self) -> str:
        return f"beta={self.beta:g}"


class Bernoulli(Likelihood):
    """Bernoulli likelihood, x ~ Bernoulli(sigma(h)): h is the logit, x is 0 or 1.

    Example::

        >>> float(Bernoulli()(torch.zeros(3)).mean[0])
        0.5
    """

    discrete = True

    def output(self, event_shape: tuple[int, ...]) -> Output:
        return LogitOutput(event_shape)

    def forward(self, h: Tensor) -> distributions.LogitBernoulli:
        return distributions.LogitBernoulli(h)


class Poisson(Likelihood):
    """Poisson likelihood for counts x, x ~ Poisson(softplus(h)).

    The rate approaches e^h for very negative h and h for large h: it grows linearly, whereas e^h would explode when the
    latents are large.

    Example::

        >>> round(float(Poisson()(torch.zeros(3)).mean[0]), 3)
        0.693
    """

    discrete = True

    def output(self, event_shape: tuple[int, ...]) -> Output:
        return CountOutput(event_shape)

    def forward(self, h: Tensor) -> distributions.SoftplusPoisson:
        return distributions.SoftplusPoisson(h)


class NegativeBinomial(Likelihood):
    """Negative binomial likelihood for counts x, of mean m = softplus(h).

    Each element of an observation has its own learned dispersion r; the variance is :math:`m + m^2 / r`. The parameter
    ``log_total_count``, of shape event_shape, is log r; it starts at 0.

    Example::

        >>> likelihood = NegativeBinomial()
        >>> likelihood.setup((3,))
        >>> x = likelihood(torch.zeros(3))
        >>> torch.allclose(x.variance, x.mean + x.mean**2)
        True

    Raises:
        ValueError: if it is called before :meth:`setup`.
    """

    discrete = True

    def output(self, event_shape: tuple[int, ...]) -> Output:
        return CountOutput(event_shape)

    def setup(self, event_shape: tuple[int, ...]) -> None:
        known: nn.Parameter | None = getattr(self, "log_total_count", None)
        if known is None:
            self.log_total_count = nn.Parameter(torch.zeros(event_shape))
        elif known.shape != event_shape:
            raise InputError(
                f"this likelihood has dispersions of shape {tuple(known.shape)}, observations have {tuple(event_shape)}"
            )

    def forward(self, h: Tensor) -> distributions.SoftplusNegativeBinomial:
        if not hasattr(self, "log_total_count"):
            raise InputError("this likelihood has no dispersions yet: call its setup(event_shape), as a new model does")
        return distributions.SoftplusNegativeBinomial(h, self.log_total_count)


# Names in configurations and on the command line.
LIKELIHOODS: dict[str, type[Likelihood]] = {
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
}
