"""The negative binomial, exact and relaxed."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint
from torch.distributions.utils import clamp_probs, lazy_property, logits_to_probs

from pyro_nbvae.distributions.constraints import bounded_logits, dispersion
from pyro_nbvae.distributions.elementwise import computed_in, elementwise
from pyro_nbvae.distributions.families import negative_binomial
from pyro_nbvae.distributions.kernels import chosen
from pyro_nbvae.distributions.relaxations import Relaxation
from pyro_nbvae.distributions.relaxations.base import check_relaxation
from pyro_nbvae.distributions.relaxations.gamma import exact_counts, log_standard_gamma
from pyro_nbvae.distributions.relaxed import RelaxedCount, Shape, computed, floats, relaxed_counts, required_relaxation
from pyro_nbvae.distributions.sums import expectation
from pyro_nbvae.distributions.windows import AtMost, Surprise

negative_binomial_log_mass = elementwise(
    "negative_binomial_log_mass", chosen("negative_binomial_log_mass"), negative_binomial.log_prob_gradient
)


class _derived_property(lazy_property):
    """torch's lazy_property, computed at each use: the parameter that was given may change."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return super().__get__(None, owner) if instance is None else self.wrapped(instance)


def _version(x: Tensor) -> int | None:
    """Return how often a tensor was changed in place; None where PyTorch does not count it."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


class NegativeBinomial(TorchDistribution):
    r"""Negative binomial distribution: counts with a variance above their mean.

    .. math:: p(z) = \frac{\Gamma(z + r)}{\Gamma(r)\, z!} \, \sigma(l)^z \, \sigma(-l)^r, \qquad z = 0, 1, 2, \ldots

    ``total_count`` is the dispersion r and ``logits`` is l, as in torch: the mean is m = r e^l, the variance m (1 +
    e^l) = m + m^2 / r, the Fano factor 1 + e^l, the mode floor((r - 1) e^l) or 0. It is a Poisson with a
    Gamma-distributed rate of *shape* r and *scale* e^l; for fixed m it approaches a Poisson as r grows. The paper's p
    is sigma(-l); torch's ``probs`` is sigma(l) and may be given instead of ``logits``. The argument order is torch's,
    so pass ``logits`` by name.

    All arguments broadcast to the batch shape; events are scalars. ``log_prob`` is accurate at large and small r
    (:mod:`pyro_nbvae.distributions.families.negative_binomial`). The KL between two negative binomials is exact
    (:mod:`pyro_nbvae.distributions.divergences`), also if one or both are Pyro's or torch's.

    For r from 1e-12 to 1e12 and |l| up to 60 nothing is NaN, in single precision either; validation refuses larger
    values, and accepts smaller r, of which log masses may be -inf in single precision. Samples saturate at 2^53.

    Args:
        total_count: r from 0, at which every count is 0, to 1e12, not necessarily an integer.
        probs: sigma(l) in [0, 1). At exactly 0, samples, mean and variance are 0; log masses at 0 and 1 are torch's,
            those of its rounding unit, without a gradient in ``probs``.
        logits: l, from -60 to 60 or infinite. Give either this or ``probs``.
        dispersion_source: the tensor that ``total_count`` is computed from; ``total_count`` itself by default. Two
            distributions with one source and the same function of it share their dispersion, and their KL has a closed
            form (:func:`kl_form`): pass a learned parameter here if both compute ``total_count`` from it. A source
            that changed in place in between is noticed where PyTorch counts changes; where it does not (compiled
            programs, inference mode) the KL is the exact one.
        validate_args: as in torch.

    Raises:
        ValueError: if both or neither of ``probs`` and ``logits`` are given, and, with validation on, for arguments or
            counts outside their range.

    See also: docs/mathematics.md, section 2.2 (Negative binomial).

    Example::

        >>> d = NegativeBinomial(2.0, logits=0.0)
        >>> float(d.mean), float(d.variance), float(d.mode)
        (2.0, 4.0, 1.0)
    """

    arg_constraints = {
        "total_count": dispersion,
        "probs": constraints.half_open_interval(0.0, 1.0),
        "logits": bounded_logits,
    }
    support: Constraint = constraints.nonnegative_integer

    def __init__(
        self,
        total_count: Tensor | float,
        probs: Tensor | float | None = None,
        logits: Tensor | float | None = None,
        *,
        dispersion_source: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if (probs is None) == (logits is None):
            raise ValueError("give exactly one of logits and probs")
        name, given = ("probs", probs) if logits is None else ("logits", logits)
        assert given is not None
        source = total_count if dispersion_source is None else dispersion_source
        self.total_count, given = torch.broadcast_tensors(*floats(total_count, given))
        # a change in place of total_count is one of both distributions, unless this is a copy in another precision
        copied = source is not total_count or getattr(source, "dtype", None) != self.total_count.dtype
        self._source = source, _version(source) if copied and isinstance(source, Tensor) else 0
        setattr(self, name, given)
        super().__init__(torch.Size(self.total_count.shape), validate_args=validate_args)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_source": (None, 0)}  # another process has other tensors

    def shares_dispersion(self, other: NegativeBinomial) -> bool:
        """Return whether both have one ``dispersion_source``, with one value, and both or neither have a gradient."""
        (one, version), (two, other_version) = self._source, other._source
        same_gradient = self.total_count.requires_grad == other.total_count.requires_grad
        same_value = version is not None and version == other_version
        return isinstance(one, Tensor) and one is two and same_value and same_gradient

    @_derived_property
    def logits(self) -> Tensor:
        """l = log(probs / (1 - probs)), of the batch shape."""
        return self._finite_logits.to(self.probs.dtype)

    @_derived_property
    def probs(self) -> Tensor:
        """sigma(l), of the batch shape."""
        return logits_to_probs(self.logits, is_binary=True)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of samples and results."""
        given = self.logits if "logits" in self.__dict__ else self.probs
        return torch.promote_types(self.total_count.dtype, given.dtype)

    @property
    def _finite_logits(self) -> Tensor:
        """l, half precisions as single precision; at probs 0 and 1 it is torch's."""
        dtype = computed_in(self.dtype)
        if "logits" in self.__dict__:
            return self.logits.to(dtype)
        probs = self.probs.to(dtype)
        edge = (probs == 0) | (probs == 1)
        probs = torch.where(edge, clamp_probs(self.probs.detach()).to(dtype), probs)
        # torch's probs_to_logits would make all small probs those of its rounding unit
        return (probs.log() - torch.log1p(-probs)).clamp(-60, 60)

    @property
    def _parameters(self) -> tuple[Tensor, Tensor]:
        """r and l in one precision, half precisions as single precision; at probs 0 l is -inf."""
        logits = self._finite_logits
        if "probs" in self.__dict__:
            logits = logits.masked_fill(self.probs == 0, -torch.inf)
        return self.total_count.to(logits), logits

    @property
    def mean(self) -> Tensor:
        """m = r e^l."""
        return negative_binomial.mean(*self._parameters).to(self.dtype)

    @property
    def mode(self) -> Tensor:
        """floor((r - 1) e^l), or 0 for r below 1."""
        return negative_binomial.mode(*self._parameters).to(self.dtype)

    @property
    def variance(self) -> Tensor:
        """m (1 + e^l) = m + m^2 / r."""
        return negative_binomial.variance(*self._parameters).to(self.dtype)

    def entropy(self) -> Tensor:
        """Return the entropy in nats, of the batch shape: a sum over counts.

        Raises:
            DivergedError: with validation on, for windows wider than 2^20 counts.
        """
        entropy = expectation(negative_binomial, Surprise, *self._parameters)
        return computed(entropy, self).to(self.dtype)

    def cdf(self, value: Tensor) -> Tensor:
        """Return P(count <= value), a sum over counts; ``value`` broadcasts with the batch shape.

        Raises:
            ValueError: with validation on, for values outside the support.
            DivergedError: with validation on, for windows wider than 2^20 counts.
        """
        if self._validate_args:
            self._validate_sample(value)
        below = expectation(negative_binomial, AtMost, *self._parameters, value)
        return computed(below, self).to(self.dtype)

    def expand(self, batch_shape: Shape, _instance: Distribution | None = None) -> NegativeBinomial:
        new = self._get_checked_instance(NegativeBinomial, _instance)
        batch_shape = torch.Size(batch_shape)
        new._source = self._source
        new.total_count = self.total_count.expand(batch_shape)
        for name in ("logits", "probs"):
            if name in self.__dict__:
                setattr(new, name, getattr(self, name).expand(batch_shape))
        super(NegativeBinomial, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def gamma_poisson(self, shape: Size) -> tuple[Tensor, Tensor]:
        """Return r and l, expanded to ``shape``: the counts are Poisson(rate), rate ~ Gamma(r, scale e^l).

        Half precisions are converted to single precision.
        """
        r, logits = self._parameters
        return r.expand(shape), logits.expand(shape)

    def _exact(self, shape: Size) -> Tensor:
        r, logits = self.gamma_poisson(shape)
        return exact_counts((log_standard_gamma(r) + logits).exp()).to(self.dtype)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Raise an error, as :meth:`RelaxedCount.enumerate_support`."""
        return RelaxedCount.enumerate_support(self, expand)

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Raise an error: integers have no pathwise gradient.

        Raises:
            NotImplementedError: always.
        """
        return required_relaxation(self, "integers: use RelaxedNegativeBinomial with a relaxation")

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Draw integer counts of shape sample_shape + batch_shape."""
        with torch.no_grad():
            return self._exact(self._extended_shape(sample_shape)).detach()

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log mass of ``value`` in nats; ``value`` broadcasts with the batch shape.

        Raises:
            ValueError: with validation on, for values outside the support.
        """
        if self._validate_args:
            self._validate_sample(value)
        dtype = torch.promote_types(value.dtype, self.dtype)
        return negative_binomial_log_mass(value, self.total_count, self._finite_logits).to(dtype)


class RelaxedNegativeBinomial(RelaxedCount, NegativeBinomial):  # type: ignore[override]
    """Negative binomial distribution whose samples are relaxed counts with pathwise gradients.

    ``mean``, ``variance``, ``log_prob`` and the KL are those of the exact distribution. ``log_prob`` is the mass
    function of :class:`NegativeBinomial`, extended to real values by the gamma function: exact at integers, an
    approximation at relaxed counts. The support is the non-negative reals.

    Args:
        total_count, probs, logits, dispersion_source, validate_args: as for :class:`NegativeBinomial`.
        relaxation: how samples are differentiated, such as
            :class:`~pyro_nbvae.distributions.relaxations.ArrivalTimes`; with None they are integers without a gradient.

    Raises:
        ValueError: as :class:`NegativeBinomial`.
        TypeError: if ``relaxation`` is not a :class:`~pyro_nbvae.distributions.relaxations.Relaxation`.

    Example::

        >>> from pyro_nbvae.distributions import ArrivalTimes
        >>> d = RelaxedNegativeBinomial(torch.ones(3), logits=torch.zeros(3), relaxation=ArrivalTimes(0.24))
        >>> d.rsample(torch.Size([5])).shape
        torch.Size([5, 3])
    """

    support: Constraint = relaxed_counts

    def __init__(
        self,
        total_count: Tensor | float,
        probs: Tensor | float | None = None,
        logits: Tensor | float | None = None,
        *,
        relaxation: Relaxation | None = None,
        dispersion_source: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.relaxation = check_relaxation(relaxation)
        total_count = self._with_temperature(total_count)
        options: Any = {"dispersion_source": dispersion_source, "validate_args": validate_args}
        super().__init__(total_count, probs=probs, logits=logits, **options)

    gamma_poisson = NegativeBinomial.gamma_poisson

    def expand(self, batch_shape: Shape, _instance: Distribution | None = None) -> RelaxedNegativeBinomial:
        new = self._get_checked_instance(RelaxedNegativeBinomial, _instance)
        new.relaxation = self.relaxation
        return super().expand(batch_shape, _instance=new)
