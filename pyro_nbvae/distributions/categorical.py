"""The relaxed one-hot categorical: Gumbel-softmax samples, the exact distribution's mass and KL."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import OneHotCategorical, constraints
from torch import Tensor

from pyro_nbvae.distributions.relaxed import Shape, check_temperature


class RelaxedOneHotCategorical(OneHotCategorical):
    r"""A one-hot categorical whose samples are points of the simplex with pathwise gradients (Jang et al., 2017).

    Samples are softmax((logits + Gumbel noise) / temperature), one-hot at temperature 0. ``log_prob`` is the sum of
    z_k log p_k, which on one-hot vectors is the exact mass; mean, variance and the KL are the exact distribution's.
    (torch's class of the same name has instead the density of the relaxed variable, and no KL.)

    Args:
        probs, logits: as in torch, (..., categories); give one, by name.
        temperature: non-negative number. At 0 there is no gradient and ``has_rsample`` is False.
        straight_through: one-hot samples with the gradient of the relaxed ones.

    Raises:
        ValueError: as torch's OneHotCategorical, and for a negative temperature.
    """

    support: Any = constraints.simplex

    def __init__(
        self,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        *,
        temperature: float,
        straight_through: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        self.has_rsample = check_temperature(temperature)
        self.temperature = temperature
        self.straight_through = straight_through
        super().__init__(probs=probs, logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> RelaxedOneHotCategorical:
        new = self._get_checked_instance(RelaxedOneHotCategorical, _instance)
        for name in ("temperature", "straight_through", "has_rsample"):
            setattr(new, name, getattr(self, name))
        return super().expand(batch_shape, _instance=new)

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Points of the simplex, sample_shape + batch_shape + (categories,), differentiable in the parameters.

        Raises:
            NotImplementedError: at temperature 0.
        """
        if not self.has_rsample:
            raise NotImplementedError(
                f"{type(self).__name__} at temperature 0 draws one-hot vectors: it has no rsample"
            )
        logits = self.logits.expand(self._extended_shape(sample_shape))
        return torch.nn.functional.gumbel_softmax(logits, self.temperature, hard=self.straight_through)

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Relaxed samples without a gradient; one-hot at temperature 0."""
        with torch.no_grad():
            return self.rsample(sample_shape) if self.has_rsample else super().sample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return (value * self.logits).sum(-1)
