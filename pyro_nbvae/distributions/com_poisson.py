"""Conway-Maxwell-Poisson distribution: counts with more or less variance than a Poisson."""

from __future__ import annotations

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_nbvae.distributions.counts import CountDistribution
from pyro_nbvae.distributions.masses import poisson_log_weight, poisson_window


class ConwayMaxwellPoisson(CountDistribution):
    r"""Conway-Maxwell-Poisson distribution: counts of any dispersion.

    .. math:: q(k) \propto \Big(\frac{\mu^k}{k!}\Big)^{\nu}, \qquad k = 0, 1, 2, \ldots

    It is Poisson(:math:`\mu`) at :math:`\nu = 1`, narrower for larger :math:`\nu` and wider for smaller :math:`\nu`.
    Unless :math:`\mu` is small, the mean is about :math:`\mu + 1 / (2 \nu) - 1/2` and the variance about
    :math:`\mu / \nu`. The mode is floor(:math:`\mu`).

    The errors of mean, variance, entropy, ``log_prob`` and KL are below 1e-8 * max(1, value) in float64 and
    1e-4 * max(1, value) in float32, for means from 1e-3 to 1e3 and nu from e^-3 to e^5. Outside this range they are
    finite. The cost grows with the width of the window, about 12 standard deviations in float32. At rate 0 every count
    is 0, and derivatives in the parameters are 0.

    Args:
        rate: :math:`\mu`, not negative; broadcasts with ``nu`` to the batch shape.
        nu: :math:`\nu`, positive.
        relaxation, validate_args: as :class:`CountDistribution`.

    Raises:
        ValueError, TypeError: as :class:`CountDistribution`.

    Reference: Shmueli et al., 2005; the parameter :math:`\mu = \lambda^{1/\nu}` is that of Guikema and Coffelt, 2008.

    See also: docs/mathematics.md, section 2.3 (COM-Poisson).

    Example::

        >>> import torch
        >>> d = ConwayMaxwellPoisson(4.0, torch.tensor([0.5, 1.0, 4.0]))
        >>> [round(float(v), 2) for v in d.variance / d.mean]
        [1.74, 1.0, 0.28]
    """

    arg_constraints = {"rate": constraints.nonnegative, "nu": constraints.positive}

    @staticmethod
    def log_weight(k: Tensor, rate: Tensor, nu: Tensor) -> Tensor:
        """Return the log weight nu * log Poisson(k; rate)."""
        none = rate == 0
        log_weight = poisson_log_weight(k, torch.where(none, 1.0, rate)) * nu
        return torch.where(none, torch.zeros_like(log_weight).masked_fill(k > 0, -torch.inf), log_weight)

    @staticmethod
    def scores(k: Tensor, rate: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
        """Return the derivatives of the log weight in rate and nu."""
        limits = torch.finfo(rate.dtype)
        # finite where nu / rate is not: such counts have no mass
        of_rate = ((k - rate) / rate.clamp(min=limits.tiny) * nu).clamp(max=limits.max / 4)
        none = rate == 0
        of_nu = poisson_log_weight(k, torch.where(none, 1.0, rate))
        return of_rate.masked_fill(none, 0), of_nu.masked_fill(none, 0)

    @staticmethod
    def window(nats: float, rate: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and the last count of the window."""
        return poisson_window(nats / nu, rate.clamp(min=torch.finfo(rate.dtype).tiny))

    @staticmethod
    def as_com_poisson(rate: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
        """Return rate and nu, for the compiled loops."""
        return rate, nu
