"""Conway-Maxwell-Poisson distribution, by its rate or by its mean: counts with more or less variance than a Poisson."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from pyro_nbvae.distributions.count_distribution import CountDistribution
from pyro_nbvae.distributions.elementwise import Wanted, double, elementwise
from pyro_nbvae.distributions.families import com_poisson
from pyro_nbvae.distributions.kernels import chosen
from pyro_nbvae.distributions.kernels.reference import com_poisson_moments
from pyro_nbvae.distributions.relaxed import Shape, floats


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


def _log_lambda_gradient(log_mean: Tensor, log_nu: Tensor, wanted: Wanted) -> tuple[Tensor, ...]:
    nu = log_nu.exp()
    _, _, variance, _, covariance = com_poisson_moments(com_poisson_log_lambda(log_mean, log_nu), nu)
    return log_mean.exp() / variance, nu * covariance / variance


def _log_mass_gradient(count: Tensor, log_mean: Tensor, log_nu: Tensor, wanted: Wanted) -> tuple[Tensor, ...]:
    nu, from_mean = log_nu.exp(), count - log_mean.exp()
    theta = com_poisson_log_lambda(log_mean, log_nu)
    _, _, variance, of_x, covariance = com_poisson_moments(theta, nu)
    of_nu = from_mean * covariance / variance - (torch.lgamma(count + 1) - of_x)
    return theta - nu * torch.digamma(count + 1), log_mean.exp() * from_mean / variance, nu * of_nu


def _flat(gradient: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Return a gradient of tensors of one shape from one of flat tensors."""

    def shaped(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, wanted = arguments
        found = gradient(*(t.reshape(-1) for t in tensors), wanted)
        return tuple(part.reshape(tensors[0].shape) for part in found)

    return shaped


com_poisson_log_lambda = elementwise(
    "com_poisson_log_lambda", chosen("com_poisson_log_lambda"), _flat(_log_lambda_gradient)
)
com_poisson_log_mass = elementwise("com_poisson_log_mass", chosen("com_poisson_log_mass"), _flat(_log_mass_gradient))


class MeanConwayMaxwellPoisson(TorchDistribution):
    r"""Conway-Maxwell-Poisson distribution with a given mean, for observations.

    .. math:: p(x) = \frac{\lambda^x}{(x!)^\nu Z(\lambda, \nu)}, \qquad \sum_x x\, p(x) = m

    :math:`\lambda` is solved for by Newton's method. With :math:`V` the variance, the derivatives are implicit:
    :math:`\partial \log \lambda / \partial m = 1 / V` and :math:`\partial \log \lambda / \partial \nu =
    \mathrm{Cov}(X, \log X!) / V`, so that

    .. math:: \frac{\partial \log p}{\partial m} = \frac{x - m}{V}, \qquad \frac{\partial \log p}{\partial \nu} =
        (x - m) \frac{\mathrm{Cov}(X, \log X!)}{V} - (\log x! - \mathrm{E} \log X!)

    It is Poisson(m) at :math:`\nu = 1`, overdispersed below (a geometric distribution at 0) and underdispersed above (a
    Bernoulli distribution if also m < 1). The Fano factor is between 0 and 1 + m.

    Log masses are computed in float64, with an error below 1e-10 * max(1, value) for means from 1e-4 to 1e4, and are
    differentiable twice.

    Args:
        log_mean: log m, from -700 to 20 log 2; broadcasts with ``log_nu`` to the batch shape.
        log_nu: :math:`\log \nu`, from -3 to 3.
        dtype: precision of the results. Default: that of ``log_mean``.
        validate_args: as in torch.

    Raises:
        ValueError: with validation on, for parameters out of range, and for values that are not counts.

    Reference: Huang, 2017.

    See also: docs/mathematics.md, section 1.4 (Likelihoods of counts).

    Example::

        >>> import torch
        >>> d = MeanConwayMaxwellPoisson(torch.tensor(0.5).log(), torch.tensor([-1.0, 0.0, 1.0]))
        >>> [round(float(v), 3) for v in d.mean], [round(float(v), 3) for v in d.variance / d.mean]
        ([0.5, 0.5, 0.5], [1.242, 1.0, 0.702])
    """

    arg_constraints = {
        "log_mean": constraints.interval(-700.0, math.log(1 << 20)),
        "log_nu": constraints.interval(-3 - 1e-6, 3 + 1e-6),
    }
    support: Constraint = constraints.nonnegative_integer

    def __init__(
        self,
        log_mean: Tensor | float,
        log_nu: Tensor | float,
        *,
        dtype: torch.dtype | None = None,
        validate_args: bool | None = None,
    ) -> None:
        given = floats(log_mean, log_nu)
        self.dtype = dtype or given[0].dtype
        self.log_mean, self.log_nu = torch.broadcast_tensors(*given)
        super().__init__(self.log_mean.shape, validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Distribution | None = None) -> MeanConwayMaxwellPoisson:
        new = self._get_checked_instance(type(self), _instance)
        new.dtype = self.dtype
        new.log_mean, new.log_nu = (t.expand(batch_shape) for t in (self.log_mean, self.log_nu))
        super(MeanConwayMaxwellPoisson, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """The mean m, of the batch shape."""
        return self.log_mean.exp().to(self.dtype)

    @property
    def _counts(self) -> ConwayMaxwellPoisson:
        """The same distribution, by its rate; in float64, because a rate may be as small as e^-200."""
        log_mean, log_nu = double(self.log_mean), double(self.log_nu)
        log_rate = com_poisson_log_lambda(log_mean, log_nu) / log_nu.exp()
        return ConwayMaxwellPoisson(log_rate.exp(), log_nu.exp(), validate_args=False)

    @property
    def variance(self) -> Tensor:
        """The variance, of the batch shape."""
        return self._counts.variance.to(self.log_mean.device, self.dtype)

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Return counts, without a gradient."""
        with torch.no_grad():
            return self._counts.sample(torch.Size(sample_shape)).to(self.log_mean.device, self.dtype)

    def cdf(self, value: Tensor) -> Tensor:
        """Return P(count <= value)."""
        return self._counts.cdf(double(value)).to(self.log_mean.device, self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log mass of ``value`` in nats; ``value`` broadcasts with the batch shape.

        Raises:
            ValueError: with validation on, for values that are not counts.
        """
        if self._validate_args:
            self._validate_sample(value)
        found = com_poisson_log_mass(double(value), double(self.log_mean), double(self.log_nu))
        return found.to(self.log_mean.device, torch.promote_types(value.dtype, self.dtype))
