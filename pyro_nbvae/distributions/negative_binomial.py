"""The negative binomial, exact and relaxed."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor
from torch.distributions import Distribution, register_kl
from torch.distributions.constraints import Constraint
from torch.distributions.utils import clamp_probs, lazy_property, logits_to_probs

from pyro_nbvae.distributions.constraints import bounded_logits, dispersion
from pyro_nbvae.distributions.elementwise import computed_in
from pyro_nbvae.distributions.kl import kl_form, negative_binomial_kl, shared_dispersion_kl
from pyro_nbvae.distributions.masses import AtMost, NegativeBinomialMass, Surprise
from pyro_nbvae.distributions.relaxations import Relaxation
from pyro_nbvae.distributions.relaxations.base import check_relaxation, exact_counts
from pyro_nbvae.distributions.relaxations.gamma import log_standard_gamma
from pyro_nbvae.distributions.relaxed import RelaxedCount, Shape, computed, floats, relaxed_counts
from pyro_nbvae.distributions.special import negative_binomial_log_prob
from pyro_nbvae.distributions.windows import expectation


class derived_property(lazy_property):
    """torch's lazy_property, computed at each use: the parameter that was given may change."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return super().__get__(None, owner) if instance is None else self.wrapped(instance)


class NegativeBinomial(TorchDistribution):
    r"""Negative binomial distribution: counts with a variance above their mean.

    .. math:: p(z) = \frac{\Gamma(z + r)}{\Gamma(r)\, z!} \, \sigma(l)^z \, \sigma(-l)^r, \qquad z = 0, 1, 2, \ldots

    ``total_count`` is the dispersion r and ``logits`` is l, as in torch: the mean is m = r e^l, the variance m (1 +
    e^l) = m + m^2 / r, the Fano factor 1 + e^l, the mode floor((r - 1) e^l) or 0. It is a Poisson with a
    Gamma-distributed rate of *shape* r and *scale* e^l; for fixed m it approaches a Poisson as r grows. The paper's p
    is sigma(-l); torch's ``probs`` is sigma(l) and may be given instead of ``logits``. The argument order is torch's,
    so pass ``logits`` by name.

    All arguments broadcast to the batch shape; events are scalars. ``log_prob`` is accurate at large and small r
    (:mod:`pyro_nbvae.distributions.special`). The KL between two negative binomials is exact
    (:mod:`pyro_nbvae.distributions.kl`), also if one or both are Pyro's or torch's.

    For r from 1e-12 to 1e12 and |l| up to 60 nothing is NaN, in single precision either; validation refuses larger
    values, and accepts smaller r, of which log masses may be -inf in single precision. Samples saturate at 2^53.

    Args:
        total_count: r from 0, at which every count is 0, to 1e12, not necessarily an integer.
        probs: sigma(l) in [0, 1). At exactly 0, samples, mean and variance are 0; log masses at 0 and 1 are torch's,
            those of its rounding unit, without a gradient in ``probs``.
        logits: l, from -60 to 60 or infinite. Give either this or ``probs``.
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
        validate_args: bool | None = None,
    ) -> None:
        if (probs is None) == (logits is None):
            raise ValueError("give exactly one of logits and probs")
        name, given = ("probs", probs) if logits is None else ("logits", logits)
        assert given is not None
        self.given_total_count = total_count
        self.total_count, given = torch.broadcast_tensors(*floats(total_count, given))
        setattr(self, name, given)
        super().__init__(torch.Size(self.total_count.shape), validate_args=validate_args)

    def __getstate__(self) -> dict[str, Any]:
        # without the weak reference of Pyro's constrained parameters, which cannot be pickled
        return {
            name: value.view_as(value) if hasattr(value, "unconstrained") else value
            for name, value in vars(self).items()
        }

    @derived_property
    def logits(self) -> Tensor:
        """l = log(probs / (1 - probs)), of the batch shape."""
        return self._finite[1].to(self.probs.dtype)

    @derived_property
    def probs(self) -> Tensor:
        """sigma(l), of the batch shape."""
        return logits_to_probs(self.logits, is_binary=True)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of samples and results."""
        given = self.logits if "logits" in self.__dict__ else self.probs
        return torch.promote_types(self.total_count.dtype, given.dtype)

    @property
    def _finite(self) -> tuple[Tensor, Tensor]:
        """r and l in one precision, half precisions as single precision; at probs 0 and 1 l is torch's."""
        dtype = computed_in(self.dtype)
        if "logits" in self.__dict__:
            return self.total_count.to(dtype), self.logits.to(dtype)
        probs = self.probs.to(dtype)
        edge = (probs == 0) | (probs == 1)
        probs = torch.where(edge, clamp_probs(self.probs.detach()).to(dtype), probs)
        # torch's probs_to_logits would make all small probs those of its rounding unit
        return self.total_count.to(dtype), (probs.log() - torch.log1p(-probs)).clamp(-60, 60)

    @property
    def _exactly(self) -> tuple[Tensor, Tensor]:
        """The same, but at probs 0 l is -inf."""
        r, logits = self._finite
        return (r, logits) if "logits" in self.__dict__ else (r, logits.masked_fill(self.probs == 0, -torch.inf))

    @property
    def _in_range(self) -> tuple[Tensor, Tensor]:
        """The same, but nan where r is out of its range."""
        r, logits = self._exactly
        return torch.where((r >= 0) & (r < torch.inf), r, torch.nan), logits

    @property
    def mean(self) -> Tensor:
        """m = r e^l."""
        r, logits = self._in_range
        return (r * logits.exp()).to(self.dtype)

    @property
    def mode(self) -> Tensor:
        """floor((r - 1) e^l), or 0 for r below 1."""
        r, logits = self._in_range
        return ((r - 1).clamp(min=0) * logits.exp()).floor().to(self.dtype)

    @property
    def variance(self) -> Tensor:
        """m (1 + e^l) = m + m^2 / r."""
        r, logits = self._in_range
        return (r * logits.exp() * (1 + logits.exp())).to(self.dtype)

    def entropy(self) -> Tensor:
        """Return the entropy in nats, of the batch shape: a sum over counts.

        Raises:
            DivergedError: with validation on, for windows wider than 2^20 counts.
        """
        own = self._exactly
        return computed(expectation(NegativeBinomialMass, Surprise, *own), self).to(self.dtype)

    def cdf(self, value: Tensor) -> Tensor:
        """Return P(count <= value), a sum over counts; ``value`` broadcasts with the batch shape.

        Raises:
            ValueError: with validation on, for values outside the support.
            DivergedError: with validation on, for windows wider than 2^20 counts.
        """
        if self._validate_args:
            self._validate_sample(value)
        own = self._exactly
        return computed(expectation(NegativeBinomialMass, AtMost, *own, value), self).to(self.dtype)

    def expand(self, batch_shape: Shape, _instance: Distribution | None = None) -> NegativeBinomial:
        new = self._get_checked_instance(NegativeBinomial, _instance)
        batch_shape = torch.Size(batch_shape)
        new.given_total_count = self.given_total_count
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
        r, logits = self._exactly
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
        raise NotImplementedError(
            "NegativeBinomial draws integers and has no rsample: use RelaxedNegativeBinomial with a relaxation"
        )

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
        return negative_binomial_log_prob(value, *self._finite).to(dtype)


class RelaxedNegativeBinomial(RelaxedCount, NegativeBinomial):  # type: ignore[override]
    """Negative binomial distribution whose samples are relaxed counts with pathwise gradients.

    ``mean``, ``variance``, ``log_prob`` and the KL are those of the exact distribution. ``log_prob`` is the mass
    function of :class:`NegativeBinomial`, extended to real values by the gamma function: exact at integers, an
    approximation at relaxed counts. The support is the non-negative reals.

    Args:
        total_count, probs, logits, validate_args: as for :class:`NegativeBinomial`.
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
        validate_args: bool | None = None,
    ) -> None:
        self.relaxation = check_relaxation(relaxation)
        total_count = self._with_temperature(total_count)
        super().__init__(total_count, probs=probs, logits=logits, validate_args=validate_args)

    gamma_poisson = NegativeBinomial.gamma_poisson

    def expand(self, batch_shape: Shape, _instance: Distribution | None = None) -> RelaxedNegativeBinomial:
        new = self._get_checked_instance(RelaxedNegativeBinomial, _instance)
        new.relaxation = self.relaxation
        return super().expand(batch_shape, _instance=new)


# This package's, or torch's, of which Pyro's is a subclass.
NegativeBinomials: TypeAlias = NegativeBinomial | torch.distributions.NegativeBinomial


def _parameters(d: NegativeBinomials) -> tuple[Tensor, Tensor]:
    return d._finite if isinstance(d, NegativeBinomial) else (d.total_count, d.logits)


def _kl_negative_binomial(q: NegativeBinomials, p: NegativeBinomials) -> Tensor:
    (r_q, l_q), (r_p, l_p) = _parameters(q), _parameters(p)
    shared = kl_form(q, p) == "shared"
    kl = shared_dispersion_kl(r_q, l_q, l_p) if shared else negative_binomial_kl(r_q, l_q, r_p, l_p)
    return kl.to(torch.promote_types(q.total_count.dtype, p.total_count.dtype))


for _q in (NegativeBinomial, torch.distributions.NegativeBinomial):
    for _p in (NegativeBinomial, torch.distributions.NegativeBinomial):
        register_kl(_q, _p)(_kl_negative_binomial)
