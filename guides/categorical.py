"""Amortised categorical posterior, Gumbel-softmax (C-VAE)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyro_nbvae.distributions import GumbelSoftmax, RelaxedOneHotCategorical
from pyro_nbvae.models.categorical import CategoricalModel
from pyro_nbvae.vae import AmortizedGuide


class CategoricalGuide(AmortizedGuide):
    """q(z | x) = one-hot categorical with the encoder's logits, relaxed; at encoder outputs of 0 it is the prior.

    Args:
        model: a :class:`~pyro_nbvae.models.CategoricalModel`.
        encoder: as :class:`~pyro_nbvae.vae.AmortizedGuide`.
        relaxation: a :class:`~pyro_nbvae.distributions.GumbelSoftmax`.
    """

    relaxation: Any

    def __init__(
        self,
        model: CategoricalModel,
        *,
        encoder: str | nn.Module = "conv",
        relaxation: GumbelSoftmax | None = GumbelSoftmax(),
    ) -> None:
        super().__init__(model, encoder=encoder, relaxation=relaxation)

    def posterior(self, x: Tensor) -> RelaxedOneHotCategorical:
        """q(z | x), batch shape (B, variables), under the guide's present relaxation."""
        (logits,) = self.encode(x)
        return RelaxedOneHotCategorical(logits=logits.unflatten(1, self.latent_shape), relaxation=self.relaxation)
