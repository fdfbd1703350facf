"""The relaxed one-hot categorical: Gumbel-softmax samples, the exact distribution's mass and KL."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import OneHotCategorical, constraints
from torch import Tensor

from pyro_nbvae.distributions.relaxations import GumbelSoftmax
from pyro_nbvae.distributions.relaxed import Shape


class RelaxedOneHotCategorical(OneHotCategorical):
    r"""A one-hot categorical whose samples are points of the simplex with pathwise gradients (Jang et al., 2017).

    Samples are softmax((logits + Gumbel noise) / temperature), one-hot without a relaxation. ``log_prob`` is the sum of
    z_k log p_k, which on one-hot vectors is the exact mass; mean, variance and the KL are the exact distribution's.
    (torch's class of the same name has instead the density of the relaxed variable, and no KL.)

    Args:
        probs, logits: as in torch, (..., categories); give one, by name.
        relaxation: :class:`~pyro_nbvae.distributions.relaxations.GumbelSoftmax`, whose ``max_count`` plays no part;
            with None samples are one-hot, without a gradient, and ``has_rsample`` is False.

    Raises:
        ValueError: as torch's OneHotCategorical.
        TypeError: for another relaxation.

    Example::

        >>> d = RelaxedOneHotCategorical(logits=torch.zeros(4), relaxation=GumbelSoftmax(0.5))
        >>> d.rsample().shape
        torch.Size([4])
    """

    support: Any = constraints.simplex

    def __init__(
        self,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        *,
        relaxation: GumbelSoftmax | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if relaxation is not None and not isinstance(relaxation, GumbelSoftmax):
            raise TypeError(f"relaxation of a one-hot categorical must be GumbelSoftmax or None, got {relaxation!r}")
        self.relaxation = relaxation
        super().__init__(probs=probs, logits=logits, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether there is a relaxation."""
        return self.relaxation is not None

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, relaxation: {self.relaxation})"

    def expand(self, batch_shape: Shape, _instance: Any = None) -> RelaxedOneHotCategorical:
        new = self._get_checked_instance(RelaxedOneHotCategorical, _instance)
        new.relaxation = self.relaxation
        return super().expand(batch_shape, _instance=new)

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Points of the simplex, sample_shape + batch_shape + (categories,), differentiable in the parameters.

        Raises:
            NotImplementedError: without a relaxation.
        """
        if self.relaxation is None:
            raise NotImplementedError(
                f"{type(self).__name__} without a relaxation draws one-hot vectors: it has no rsample. Give one, such "
                "as relaxation=GumbelSoftmax(0.5)"
            )
        return self.relaxation.one_hot(self.logits.expand(self._extended_shape(sample_shape)))

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Relaxed samples without a gradient; one-hot without a relaxation."""
        with torch.no_grad():
            return self.rsample(sample_shape) if self.has_rsample else super().sample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        # a category of no mass adds nothing where it is not drawn
        return (value * self.logits.clamp(min=torch.finfo(self.logits.dtype).min)).sum(-1)
