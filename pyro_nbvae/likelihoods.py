"""Likelihoods p(x | z), as distributions that are computed from a decoder's output.

A likelihood is a callable from the decoder's output, (..., *event_shape), to a distribution. Four are included; a model
accepts any other callable. The documentation of each states how it reads the output, and so what a decoder of your own
must return; the built-in decoders end in the layer that the likelihood chooses.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_nbvae import distributions
from pyro_nbvae.batching import is_image_shape
from pyro_nbvae.errors import InputError
from pyro_nbvae.networks.outputs import CountOutput, ImageOutput, LogitOutput, Output, RealOutput


class Likelihood(nn.Module, ABC):
    """Base class of likelihoods: from a decoder's output h to p(x | h), element by element.

    Attributes:
        loss_scale: factor of the ELBO in the loss of published runs; beta for the Gaussian likelihood, 1 for nats.
        discrete: whether observations are counts; built-in encoders read them as log(1 + x).

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

    @abstractmethod
    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return the distribution of x, of batch shape ``h.shape``."""


class Gaussian(Likelihood):
    r"""Gaussian likelihood, x ~ Normal(h, sqrt(beta / 2)): h is the mean.

    .. math:: -\beta \log p(x \mid h) = (x - h)^2 + \tfrac{\beta}{2} \log(\pi \beta)

    so that -beta * ELBO is the squared error + beta * KL + a constant: one nat of KL has the weight of a squared error
    of beta. For images, the built-in decoders end in a sigmoid, scaled to [0, 1] or to the range of the training data;
    otherwise they end in a linear layer.

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

    The rate approaches e^h for very negative h and h for large h: it grows linearly, whereas e^h would overflow for
    large latents.

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
    """Negative binomial likelihood for counts x, with mean m = softplus(h).

    Each element of an observation has its own learned dispersion parameter r; the variance is :math:`m + m^2 / r`. The
    parameter ``log_total_count``, of shape event_shape, is log r; it is initially 0.

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
        if not hasattr(self, "log_total_count"):
            self.log_total_count = nn.Parameter(torch.zeros(event_shape))
        elif self.log_total_count.shape != event_shape:
            raise InputError(
                f"this likelihood is set up for observations of shape {tuple(self.log_total_count.shape)}, got "
                f"{tuple(event_shape)}: use another one"
            )

    def forward(self, h: Tensor) -> distributions.SoftplusNegativeBinomial:
        if not hasattr(self, "log_total_count"):
            raise InputError("this likelihood has no parameters yet: call setup(event_shape), as a new model does")
        return distributions.SoftplusNegativeBinomial(h, self.log_total_count)


# Names in configurations and on the command line.
LIKELIHOODS: dict[str, type[Likelihood]] = {
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
}
