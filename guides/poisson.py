"""Amortised guide with a Poisson posterior (P-VAE)."""

from __future__ import annotations

from torch import Tensor

from pyro_nbvae.distributions import RelaxedPoisson
from pyro_nbvae.vae import AmortizedGuide, CountPrior, gain


class PoissonGuide(AmortizedGuide):
    """q(z | x) = Poisson(m * g(x)), relaxed, with m the prior's mean.

    The gain g is :func:`~pyro_nbvae.vae.gain` of the encoder's output. The posterior equals a
    Poisson prior if the encoder's outputs are 0.

    Args:
        model: a model with a prior over counts: :class:`~pyro_nbvae.models.PoissonModel` or
            :class:`~pyro_nbvae.models.NegativeBinomialModel`.
        encoder, relaxation, spread: as :class:`~pyro_nbvae.vae.AmortizedGuide`.

    Raises:
        TypeError, ValueError: as :class:`~pyro_nbvae.vae.AmortizedGuide`.

    Example::

        >>> import torch
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> guide.posterior(torch.zeros(4, 5)).batch_shape
        torch.Size([4, 3])
    """

    prior: CountPrior
    prior_class = CountPrior

    def posterior(self, x: Tensor) -> RelaxedPoisson:
        """Return q(z | x) for ``x`` (B, *event_shape), with the guide's current relaxation; batch shape (B, K)."""
        (shift,) = self.encode(x)
        return RelaxedPoisson(self.prior.mean * gain(shift), relaxation=self.relaxation)
