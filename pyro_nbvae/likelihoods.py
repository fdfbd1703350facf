"""What a decoder's output says of the data: p(x | z) as a distribution.

A likelihood is a callable from the decoder's output, (..., *event_shape), to a distribution. These four ship; a model
takes any other callable in their place. Each says what it reads the output as, so that a decoder of your own knows what
to give; the built-in decoders end in what the likelihood asks for.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_nbvae import distributions
from pyro_nbvae.errors import InputError


class Likelihood(nn.Module):
    """Base of the likelihoods: from a decoder's output h to p(x | h), element by element.

    Attributes:
        loss_scale: what training multiplies the ELBO with, so that losses are in handy units; 1 for nats.
    """

    loss_scale = 1.0

    def setup(self, event_shape: tuple[int, ...]) -> None:
        """Called by the model with the shape of one observation, before it is used: the place to make parameters."""

    def output(self, on_images: bool) -> nn.Module:
        """What a built-in decoder ends in: the identity, unless a subclass says otherwise.

        Args:
            on_images: whether an observation is an image, values in [0, 1].
        """
        return nn.Identity()

    def forward(self, h: Tensor) -> Any:
        """The distribution of x, of batch shape ``h.shape``."""
        raise NotImplementedError


class Gaussian(Likelihood):
    r"""x ~ Normal(h, sqrt(beta / 2)): h is the mean.

    .. math:: -\beta \log p(x \mid h) = (x - h)^2 + \tfrac{\beta}{2} \log(\pi \beta)

    so that -beta * ELBO is the squared error + beta * KL + a constant: beta is the squared error that a nat of KL is
    worth. Training minimises that. On images the built-in decoders end in a sigmoid, elsewhere in a linear layer.

    Args:
        beta: 2 sigma^2, positive, in squared units of the data.

    Raises:
        ValueError: for a beta that is not positive and finite.

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

    def output(self, on_images: bool) -> nn.Module:
        return nn.Sigmoid() if on_images else nn.Identity()

    def forward(self, h: Tensor) -> dist.Normal:
        return dist.Normal(h, math.sqrt(self.beta / 2))

    def extra_repr(self) -> str:
        return f"beta={self.beta:g}"


class Bernoulli(Likelihood):
    """x ~ Bernoulli(sigma(h)): h is the logit, x is 0 or 1.

    Example::

        >>> float(Bernoulli()(torch.zeros(3)).mean[0])
        0.5
    """

    def forward(self, h: Tensor) -> dist.Bernoulli:
        return dist.Bernoulli(logits=h)


def log_softplus(h: Tensor) -> Tensor:
    """log log(1 + e^h), which is h far below 0.

    A mean of softplus(h) grows like h, where e^h would explode with a burst of the latents.
    """
    low = h.clamp(min=-80.0)
    return torch.where(low < -15, low, torch.nn.functional.softplus(low.clamp(min=-15)).log())


class Poisson(Likelihood):
    """x ~ Poisson(softplus(h)), x a count; far below 0 the rate is e^h, far above it is h.

    Example::

        >>> round(float(Poisson()(torch.zeros(3)).mean[0]), 3)
        0.693
    """

    def forward(self, h: Tensor) -> dist.Poisson:
        return dist.Poisson(log_softplus(h).exp())


class NegativeBinomial(Likelihood):
    r"""x ~ NB of mean softplus(h) and a learned dispersion r for each element of an observation, x a count.

    The variance is :math:`m + m^2 / r`. ``log_total_count``, of shape event_shape, is log r; it starts at 0.

    Example::

        >>> likelihood = NegativeBinomial()
        >>> likelihood.setup((3,))
        >>> x = likelihood(torch.zeros(3))
        >>> torch.allclose(x.variance, x.mean + x.mean**2)
        True
    """

    def setup(self, event_shape: tuple[int, ...]) -> None:
        self.log_total_count = nn.Parameter(torch.zeros(event_shape))

    def forward(self, h: Tensor) -> distributions.NegativeBinomial:
        return distributions.NegativeBinomial(self.log_total_count.exp(), logits=log_softplus(h) - self.log_total_count)


# The names that configurations and the command use.
LIKELIHOODS: dict[str, type[Likelihood]] = {
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
}
