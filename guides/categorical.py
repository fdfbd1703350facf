"""Amortised categorical posterior, Gumbel-softmax (C-VAE)."""

from __future__ import annotations

from torch import Tensor

from pyro_nbvae.distributions import RelaxedOneHotCategorical
from pyro_nbvae.vae import AmortizedGuide


class CategoricalGuide(AmortizedGuide):
    """q(z | x) = one-hot categorical with the encoder's logits, relaxed; at encoder outputs of 0 it is the prior.

    Arguments as :class:`~pyro_nbvae.vae.AmortizedGuide`, of a :class:`~pyro_nbvae.models.CategoricalModel`; of the
    relaxation only ``temperature`` and ``straight_through`` play a part.
    """

    def posterior(self, x: Tensor) -> RelaxedOneHotCategorical:
        """q(z | x), batch shape (B, variables), at the guide's present temperature."""
        (logits,) = self.encode(x)
        return RelaxedOneHotCategorical(
            logits=logits.unflatten(1, self.latent_shape),
            temperature=self.temperature,
            straight_through=self.relaxation["straight_through"],
        )
