"""Conway-Maxwell-Poisson distribution: counts with more or less variance than a Poisson."""

from __future__ import annotations

from pyro_nbvae.distributions.count_distribution import CountDistribution
from pyro_nbvae.distributions.families import com_poisson


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

    arg_constraints = com_poisson.arg_constraints
    smooth, kernels = True, com_poisson.kernels
    log_weight = staticmethod(com_poisson.log_weight)
    scores = staticmethod(com_poisson.scores)
    window = staticmethod(com_poisson.window)
    kernel_parameters = staticmethod(com_poisson.kernel_parameters)
