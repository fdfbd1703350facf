"""The relaxed Poisson, the limit of the negative binomial at infinite dispersion."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Poisson
from torch import Size, Tensor
from torch.distributions import Distribution

from pyro_nbvae.distributions.elementwise import elementwise, full_precision
from pyro_nbvae.distributions.families import poisson
from pyro_nbvae.distributions.kernels import chosen
from pyro_nbvae.distributions.relaxations import Relaxation
from pyro_nbvae.distributions.relaxations.base import check_relaxation
from pyro_nbvae.distributions.relaxations.gamma import exact_counts
from pyro_nbvae.distributions.relaxed import RelaxedCount, Shape, as_floats, computed, relaxed_counts
from pyro_nbvae.distributions.sums import expectation
from pyro_nbvae.distributions.windows import Surprise

poisson_log_mass = elementwise("poisson_log_mass", chosen("poisson_log_mass"), poisson.log_prob_gradient)


class RelaxedPoisson(RelaxedCount, Poisson):  # type: ignore[override]
    r"""Poisson distribution whose samples are relaxed counts with pathwise gradients in the rate.

    .. math:: p(z) = \lambda^z e^{-\lambda} / \Gamma(z + 1)

    ``mean``, ``variance``, ``log_prob`` and the KL are those of the exact Poisson; ``log_prob`` is extended to real
    values by the gamma function. The support is the non-negative reals.

    Args:
        rate: mean count, not negative; its shape is the batch shape.
        relaxation: how samples are differentiated, such as
            :class:`~pyro_nbvae.distributions.relaxations.ArrivalTimes`; with None they are integers without a gradient.
        validate_args: as in torch.

    Raises:
        ValueError: with validation on, for a rate or a count outside its range.
        TypeError: if ``relaxation`` is not a :class:`~pyro_nbvae.distributions.relaxations.Relaxation`.

    See also: docs/mathematics.md, section 2.1 (Poisson and categorical).

    Example::

        >>> from pyro_nbvae.distributions import ArrivalTimes
        >>> d = RelaxedPoisson(torch.tensor([1.0, 4.0]), relaxation=ArrivalTimes(0.24))
        >>> d.rsample().shape, d.mean
        (torch.Size([2]), tensor([1., 4.]))
    """

    support: Any = relaxed_counts

    def __init__(
        self, rate: Tensor | float, *, relaxation: Relaxation | None = None, validate_args: bool | None = None
    ) -> None:
        self.relaxation = check_relaxation(relaxation)
        super().__init__(as_floats(self._with_temperature(rate)), validate_args=validate_args)
        self._batch_shape = torch.Size(self._batch_shape)  # a tensor subclass may give a tuple

    def expand(self, batch_shape: Shape, _instance: Distribution | None = None) -> RelaxedPoisson:
        new = self._get_checked_instance(RelaxedPoisson, _instance)
        new.relaxation = self.relaxation
        return super().expand(batch_shape, _instance=new)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of samples and results."""
        return self.rate.dtype

    @property
    def mean(self) -> Tensor:
        """The rate; nan where it is negative."""
        return torch.where(self.rate >= 0, self.rate, torch.nan)

    @property
    def variance(self) -> Tensor:
        """The rate; nan where it is negative."""
        return self.mean

    @property
    def mode(self) -> Tensor:
        """floor(rate)."""
        return self.mean.floor()

    def gamma_poisson(self, shape: Size) -> tuple[None, Tensor]:
        rate = full_precision(self.rate)
        # log 0 has a gradient of 0, which is finite, here
        log_rate = torch.where(rate == 0, -torch.inf, torch.where(rate == 0, 1.0, rate).log())
        return None, log_rate.expand(shape)

    def _exact(self, shape: Size) -> Tensor:
        return exact_counts(full_precision(self.rate).expand(shape)).to(self.dtype)

    def entropy(self) -> Tensor:
        """Return the entropy in nats, of the batch shape: a sum over counts.

        Raises:
            DivergedError: with validation on, for rates above about 4e9.
        """
        return computed(expectation(poisson, Surprise, self.rate), self)

    def cdf(self, value: Tensor) -> Tensor:
        """Return P(count <= value) = Q(floor(value) + 1, rate), a regularised gamma function.

        ``value`` broadcasts with the batch shape.

        Raises:
            ValueError: with validation on, for values outside the support.
        """
        if self._validate_args:
            self._validate_sample(value)
        return poisson.cdf(value, self.rate).to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log mass of ``value`` in nats; ``value`` broadcasts with the batch shape.

        Raises:
            ValueError: with validation on, for negative values.
        """
        if self._validate_args:
            self._validate_sample(value)
        return poisson_log_mass(value, self.rate)
