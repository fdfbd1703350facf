"""Amortised guide with a categorical posterior and Gumbel-softmax samples (C-VAE)."""

from __future__ import annotations

from torch import Tensor, nn

from pyro_nbvae.distributions import GumbelSoftmax, RelaxedOneHotCategorical
from pyro_nbvae.models.categorical import CategoricalModel
from pyro_nbvae.vae import AmortizedGuide


class CategoricalGuide(AmortizedGuide):
    """q(z | x) = one-hot categorical with the encoder's logits, relaxed.

    It is the prior if the encoder's outputs are 0.

    Args:
        model: a :class:`~pyro_nbvae.models.CategoricalModel`.
        encoder: as :class:`~pyro_nbvae.vae.AmortizedGuide`.
        relaxation: a :class:`~pyro_nbvae.distributions.GumbelSoftmax`; None for one-hot latents without a gradient.

    Raises:
        TypeError: for another relaxation, when the posterior is computed.
        ValueError: as :class:`~pyro_nbvae.vae.AmortizedGuide`.

    Example::

        >>> import torch
        >>> from pyro_nbvae.models import CategoricalModel
        >>> model = CategoricalModel((5,), latents=12, categories=4, decoder="linear")
        >>> guide = CategoricalGuide(model, encoder="linear")
        >>> guide.posterior(torch.zeros(4, 5)).batch_shape
        torch.Size([4, 3])
    """

    relaxation: GumbelSoftmax | None

    def __init__(
        self,
        model: CategoricalModel,
        *,
        encoder: str | nn.Module = "conv",
        relaxation: GumbelSoftmax | None = GumbelSoftmax(),
    ) -> None:
        super().__init__(model, encoder=encoder, relaxation=relaxation)

    def posterior_from(self, outputs: tuple[Tensor, ...]) -> RelaxedOneHotCategorical:
        (logits,) = outputs
        return RelaxedOneHotCategorical(logits=logits.unflatten(1, self.latent_shape), relaxation=self.relaxation)
