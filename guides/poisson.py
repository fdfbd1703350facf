"""Amortised guide with a Poisson posterior (P-VAE)."""

from __future__ import annotations

from torch import Tensor

from pyro_nbvae.distributions import RelaxedPoisson
from pyro_nbvae.distributions.bounds import rate_multiplier
from pyro_nbvae.vae import AmortizedGuide, CountPrior


class PoissonGuide(AmortizedGuide):
    """q(z | x) = Poisson(m * g(x)), relaxed, with m the prior's mean.

    The multiplier g is :func:`~pyro_nbvae.distributions.bounds.rate_multiplier` of the encoder's output. The posterior
    is Poisson(m) if the encoder's outputs are 0.

    Args:
        model: a model with a prior over counts: :class:`~pyro_nbvae.models.PoissonModel` or
            :class:`~pyro_nbvae.models.NegativeBinomialModel`.
        encoder, relaxation, initial_output_scale: as :class:`~pyro_nbvae.vae.AmortizedGuide`.

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

    def posterior_from(self, outputs: tuple[Tensor, ...]) -> RelaxedPoisson:
        (shift,) = outputs
        return RelaxedPoisson(self.prior.mean * rate_multiplier(shift), relaxation=self.relaxation)
