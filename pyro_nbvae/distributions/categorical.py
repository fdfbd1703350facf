"""Relaxed one-hot categorical: Gumbel-softmax samples, and the log mass and KL of the exact distribution."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import OneHotCategorical, constraints
from torch import Tensor
from torch.distributions import Distribution

from pyro_nbvae.distributions.relaxations import GumbelSoftmax
from pyro_nbvae.distributions.relaxations.base import check_relaxation
from pyro_nbvae.distributions.relaxed import RelaxedSupport, Shape, required_relaxation


class RelaxedOneHotCategorical(OneHotCategorical):
    r"""One-hot categorical distribution whose samples are points of the simplex with pathwise gradients.

    .. math:: z = \mathrm{softmax}((l + g) / \tau), \qquad g_k \sim \mathrm{Gumbel}(0, 1)

    Without a relaxation, samples are one-hot. ``log_prob`` is :math:`\sum_k z_k \log p_k`, the exact log mass at
    one-hot vectors. Mean, variance and KL are those of the exact distribution. (torch's class of the same name has the
    density of the relaxed variable instead, and no KL.)

    Args:
        probs, logits: as in torch, (..., categories); give exactly one, by name.
        relaxation: :class:`~pyro_nbvae.distributions.relaxations.GumbelSoftmax`; its ``max_count`` is not used. With
            None, samples are one-hot without a gradient, and ``has_rsample`` is False.
        validate_args: as in torch.

    Raises:
        ValueError: as torch's OneHotCategorical.
        TypeError: if ``relaxation`` is of another class.

    Reference: Jang et al., 2017.

    Example::

        >>> d = RelaxedOneHotCategorical(logits=torch.zeros(4), relaxation=GumbelSoftmax(0.5))
        >>> d.rsample().shape
        torch.Size([4])
    """

    support: Any = RelaxedSupport(constraints.simplex)

    def __init__(
        self,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        *,
        relaxation: GumbelSoftmax | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.relaxation = check_relaxation(relaxation, GumbelSoftmax)
        super().__init__(probs=probs, logits=logits, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether the distribution has a relaxation."""
        return self.relaxation is not None

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether its values can be enumerated: if it has no relaxation."""
        return self.relaxation is None

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all one-hot vectors, as torch does.

        Raises:
            NotImplementedError: if there is a relaxation.
        """
        if self.relaxation is not None:
            raise NotImplementedError(
                f"{type(self).__name__} is relaxed and has no values to enumerate: relaxation=None"
            )
        return super().enumerate_support(expand)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(logits: {tuple(self.logits.shape)}, relaxation: {self.relaxation})"

    def expand(self, batch_shape: Shape, _instance: Distribution | None = None) -> RelaxedOneHotCategorical:
        new = self._get_checked_instance(RelaxedOneHotCategorical, _instance)
        new.relaxation = self.relaxation
        return super().expand(batch_shape, _instance=new)

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Draw points of the simplex, of shape sample_shape + batch_shape + (categories,), with pathwise gradients.

        Raises:
            NotImplementedError: if there is no relaxation.
        """
        relaxation = required_relaxation(self, "one-hot vectors: give it one, such as relaxation=GumbelSoftmax(0.5)")
        return relaxation.one_hot(self.logits.expand(self._extended_shape(sample_shape)))

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Draw relaxed samples without a gradient, or one-hot samples if there is no relaxation."""
        with torch.no_grad():
            drawn = self.rsample(sample_shape) if self.has_rsample else super().sample(torch.Size(sample_shape))
            return drawn.detach()  # a traced program has no no_grad

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the sum of z_k log p_k over the categories, in nats, of ``value`` (..., categories).

        Raises:
            ValueError: with validation on, for values outside the simplex.
        """
        if self._validate_args:
            self._validate_sample(value)
        # a category of probability 0 adds 0, not nan, where z_k is 0
        return (value * self.logits.clamp(min=torch.finfo(self.logits.dtype).min)).sum(-1)
