"""The Conway-Maxwell-Poisson: counts that vary more or less than a Poisson's."""

from __future__ import annotations

from pyro.distributions import constraints
from torch import Tensor

from pyro_nbvae.distributions.counts import CountDistribution, poisson_log_weight, poisson_window


class ConwayMaxwellPoisson(CountDistribution):
    r"""Spike counts of any dispersion.

    .. math:: q(k) \propto \Big(\frac{\mu^k}{k!}\Big)^{\nu}, \qquad k = 0, 1, 2, \ldots

    At :math:`\nu = 1` it is Poisson(:math:`\mu`), above it is narrower, below wider. The mean is about
    :math:`\mu + 1 / (2 \nu) - 1/2`, the variance about :math:`\mu / \nu`, where :math:`\mu` is not small; the mode is
    floor(:math:`\mu`). (Shmueli et al., 2005; :math:`\mu = \lambda^{1/\nu}` is the centring of Guikema and Coffelt,
    2008.)

    Mean, variance, entropy, ``log_prob`` and KL are accurate to 1e-8 * max(1, value) in float64 and 1e-4 in float32
    for means from 1e-3 to 1e3 and nu from e^-3 to e^5. Beyond they are finite and cost the window's width, about
    12 standard deviations in float32, until that is wider than 2^20 counts (DivergedError). A float32 rate below 1e-38
    counts as 0.

    Args:
        rate: :math:`\mu > 0`.
        nu: :math:`\nu > 0`.
        relaxation, validate_args, and what is raised: as :class:`CountDistribution`.

    Example::

        >>> import torch
        >>> d = ConwayMaxwellPoisson(4.0, torch.tensor([0.5, 1.0, 4.0]))
        >>> [round(float(v), 2) for v in d.variance / d.mean]
        [1.74, 1.0, 0.28]
    """

    arg_constraints = {"rate": constraints.positive, "nu": constraints.positive}

    @staticmethod
    def log_weight(k: Tensor, rate: Tensor, nu: Tensor) -> Tensor:
        return poisson_log_weight(k, rate) * nu

    @staticmethod
    def scores(k: Tensor, rate: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
        return (k - rate) * (nu / rate), poisson_log_weight(k, rate)

    @staticmethod
    def window(nats: float, rate: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
        return poisson_window(nats / nu, rate)

    @staticmethod
    def as_com_poisson(rate: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
        """What compiled loops are told of."""
        return rate, nu
