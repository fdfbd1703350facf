r"""Integer samples with a gradient.

For any family over counts with mass q and distribution function F, exactly

.. math:: \partial E[f(z)] = E\Big[\frac{A(z)}{q(z)} (f(z + 1) - f(z))\Big], \qquad A = -\partial F

(Cong et al., 2019). With :math:`f(z + 1) - f(z) \approx \tfrac12 (f'(z) + f'(z + 1))` it becomes a backward pass at the
integer itself,

.. math:: \frac{dz}{d\theta} = \frac{A(z) + A(z - 1)}{2\,q(z)},

which is exactly unbiased if f is quadratic in each unit. For a Poisson :math:`dz / d\lambda = \tfrac12 (1 + z /
\lambda)`; for a negative binomial :math:`dz / dl = \tfrac12 (z + (z + r)\,\sigma(l))`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Size, Tensor

from pyro_nbvae.distributions.elementwise import KERNELS, pathwise, sampler
from pyro_nbvae.distributions.relaxations.base import Relaxation
from pyro_nbvae.distributions.relaxations.gamma import exact_counts

if TYPE_CHECKING:
    from pyro_nbvae.distributions.relaxed import RelaxedCount


@dataclass(frozen=True)
class Integer(Relaxation):
    r"""Integer samples with a gradient.

    .. math:: \frac{dz}{d\theta} = \frac{A(z) + A(z - 1)}{2\,q(z)}, \qquad A = -\frac{\partial F}{\partial \theta}

    for the mass function q and the distribution function F (:mod:`pyro_nbvae.distributions.relaxations.integer`). There
    is no temperature: the model is trained on the same counts that it is tested on. The gradient is exact for a
    function that is quadratic in each unit, and close for a smooth one. A sampled KL is neither: use
    :class:`~pyro_nbvae.infer.AnalyticKL_ELBO`.

    Reference: Cong et al., 2019, for the exact gradient that this approximates.

    See also: docs/mathematics.md, section 5.4 (Integers).

    Example::

        >>> import torch
        >>> from pyro_nbvae.distributions import RelaxedPoisson
        >>> rate = torch.tensor([3.0], requires_grad=True)
        >>> z = RelaxedPoisson(rate, relaxation=Integer()).rsample()
        >>> z.sum().backward()
        >>> torch.allclose(rate.grad, (1 + z / 3.0) / 2), torch.equal(z, z.round())
        (True, True)
    """

    def rsample(self, distribution: RelaxedCount, shape: Size) -> Tensor:
        """Draw counts of this shape.

        Raises:
            TypeError: for a family without an integer sampler.
        """
        name, parameters = distribution.integer_sampler(shape)
        return pathwise(name, *parameters)


def _poisson(seed: Tensor, temperature: Tensor, log_rate: Tensor) -> tuple[Tensor, Tensor]:
    """Draw Poisson counts from log rates, with dz / d(log rate) = (rate + z) / 2."""
    rate = log_rate.exp()
    z = exact_counts(rate)
    return z, (rate + z).mul_(0.5)


KERNELS["poisson_integers"] = sampler("poisson_integers", _poisson)
