"""Amortised guide with a Conway-Maxwell-Poisson posterior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_nbvae.distributions import ConwayMaxwellPoisson, Integer, Relaxation
from pyro_nbvae.distributions.bounds import rate_multiplier
from pyro_nbvae.vae import AmortizedGuide, CountPrior, GenerativeModel

# log nu per unit of the encoder's bounded output, from -5 to 5: nu is from e^-3 to e^3.
_LOG_DISPERSION_SCALE = 0.6


class ConwayMaxwellPoissonGuide(AmortizedGuide):
    """q(z | x) = COM-Poisson(m * g(x), nu(x)), with m the prior's mean: each unit may be under- or overdispersed.

    The multiplier g is :func:`~pyro_nbvae.distributions.bounds.rate_multiplier` of the encoder's first output; the
    second determines the dispersion parameter nu (:class:`~pyro_nbvae.distributions.ConwayMaxwellPoisson`). The
    posterior is Poisson(m) if the encoder's outputs are 0.

    Args:
        model: a model with a prior over counts, such as :class:`~pyro_nbvae.models.NegativeBinomialModel`.
        relaxation: :class:`~pyro_nbvae.distributions.Integer`, or None for integer counts without a gradient.
        initial_output_scale: as :class:`~pyro_nbvae.vae.AmortizedGuide`; values below 1 have trained best.
        **options: as :class:`~pyro_nbvae.vae.AmortizedGuide`.

    Raises:
        TypeError, ValueError: as :class:`~pyro_nbvae.vae.AmortizedGuide`.

    Example::

        >>> from pyro_nbvae.models import NegativeBinomialModel
        >>> model = NegativeBinomialModel((5,), latents=3, decoder="linear")
        >>> guide = ConwayMaxwellPoissonGuide(model, encoder="linear")
        >>> guide.posterior(torch.zeros(4, 5)).batch_shape
        torch.Size([4, 3])
    """

    prior: CountPrior
    prior_class = CountPrior
    heads = 2

    def __init__(
        self,
        model: GenerativeModel,
        *,
        relaxation: Relaxation | None = Integer(),
        initial_output_scale: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(model, relaxation=relaxation, initial_output_scale=initial_output_scale, **options)

    def posterior_from(self, outputs: tuple[Tensor, ...]) -> ConwayMaxwellPoisson:
        shift, dispersion = outputs
        rate, nu = self.prior.mean * rate_multiplier(shift), (_LOG_DISPERSION_SCALE * dispersion).exp()
        return ConwayMaxwellPoisson(rate, nu, relaxation=self.relaxation)

    @torch.no_grad()
    def modulation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior's mean over the prior's mean, and its Fano factor (1 for a Poisson), (B, K) each."""
        q = self.posterior(x)
        return q.mean / self.prior.mean, torch.where(q.mean > 0, q.variance / q.mean, 1.0)
