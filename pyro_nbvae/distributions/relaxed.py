"""The base class of the relaxed count distributions."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from pyro.distributions import constraints
from torch import Size, Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from pyro_nbvae.distributions.families import negative_binomial
from pyro_nbvae.distributions.relaxations.base import DivergedError, Relaxation

Shape: TypeAlias = torch.Size | list[int] | tuple[int, ...]


def as_floats(value: Tensor | float) -> Tensor:
    """Convert a number or a tensor of integers to a tensor of the default precision; keep a tensor of floats."""
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    return tensor if isinstance(value, Tensor) and value.is_floating_point() else tensor.to(torch.get_default_dtype())


def floats(*values: Tensor | float) -> list[Tensor]:
    """Apply :func:`as_floats` to each value; numbers take precision and device of the first tensor among them."""
    tensors = [as_floats(v) for v in values]
    like = next((t for t, v in zip(tensors, values, strict=True) if isinstance(v, Tensor)), None)
    if like is None:
        return tensors
    return [t if isinstance(v, Tensor) else t.to(like) for t, v in zip(tensors, values, strict=True)]


def computed(value: Tensor, *distributions: Distribution) -> Tensor:
    """Return a value that is nan where a sum over counts, or a sample, cannot be computed.

    Raises:
        DivergedError: if it is nan anywhere and one of the distributions has validation on.
    """
    if any(d._validate_args for d in distributions) and bool(value.isnan().any()):
        names = " and ".join(type(d).__name__ for d in distributions)
        raise DivergedError(f"{names}: the parameters are too extreme for a sum over counts or a sample")
    return value


def required_relaxation(distribution: Any, draws: str) -> Any:
    """Return the relaxation of a distribution.

    Raises:
        NotImplementedError: if it has none; ``draws`` says what it draws then, and the remedy.
    """
    relaxation = getattr(distribution, "relaxation", None)
    if relaxation is None:
        name = type(distribution).__name__
        raise NotImplementedError(f"{name} has no rsample without a relaxation, because it draws {draws}")
    return relaxation


class RelaxedSupport(Constraint):
    """The support of a relaxation: the values of another constraint, which stand for discrete ones.

    So Pyro's inference for continuous variables (NUTS, autoguides) refuses them, as it refuses the exact family: the
    mass function, extended to these values, is not a density.

    Args:
        values: the constraint that samples satisfy.
    """

    is_discrete = True

    def __init__(self, values: Constraint) -> None:
        self.values = values
        self.event_dim = values.event_dim
        self.lower_bound = getattr(values, "lower_bound", None)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return self.values.check(value)

    def __repr__(self) -> str:
        return f"Relaxed({self.values!r})"


relaxed_counts = RelaxedSupport(constraints.half_open_interval(0.0, math.inf))


class RelaxedCount:
    """Mixin for count distributions whose samples may be relaxed.

    Put it before the exact distribution: ``class RelaxedX(RelaxedCount, X)``. ``RelaxedX`` or ``X`` must define
    ``dtype`` (of samples), ``_exact(shape)``, which draws integers, and, if it is a Gamma-Poisson mixture,
    :meth:`gamma_poisson`.

    Args:
        relaxation: how samples are differentiated (:mod:`pyro_nbvae.distributions.relaxations`). With None they are
            integers, ``has_rsample`` is False, and there is no gradient.

    Example::

        >>> from pyro_nbvae.distributions import ArrivalTimes, RelaxedPoisson
        >>> issubclass(RelaxedPoisson, RelaxedCount)
        True
        >>> RelaxedPoisson(2.0).has_rsample, RelaxedPoisson(2.0, relaxation=ArrivalTimes(0.24)).has_rsample
        (False, True)
    """

    support: Constraint = relaxed_counts
    relaxation: Relaxation | None

    def _with_temperature(self, parameter: Tensor | float) -> Tensor | float:
        """A parameter, broadcast with the relaxation's temperature if that is a tensor with one or more dimensions."""
        temperature = getattr(self.relaxation, "temperature", None)
        if not isinstance(temperature, Tensor) or not temperature.dim():
            return parameter
        return torch.broadcast_tensors(as_floats(parameter), temperature)[0]

    @property
    def has_rsample(self) -> bool:
        """Whether the distribution has a relaxation."""
        return self.relaxation is not None

    def gamma_poisson(self, shape: Size) -> tuple[Tensor | None, Tensor]:
        """Return the parameters as those of a Poisson with a Gamma-distributed rate, expanded to ``shape``.

        Returns:
            The dispersion r and the logits l; for a plain Poisson, None and the log rate. Half precisions are converted
            to single precision.

        Raises:
            TypeError: for a family that is neither.
        """
        raise TypeError(
            f"{type(self).__name__} is not a Gamma-Poisson mixture: {self.relaxation} cannot relax it; use Integer()"
        )

    def integer_sampler(self, shape: Size) -> tuple[str, tuple[Tensor, ...]]:
        """Return the name of the sampler for :class:`~pyro_nbvae.distributions.Integer`, and its parameters.

        They are expanded to ``shape``. The sampler returns the counts and their derivative in each parameter.
        """
        r, logits = self.gamma_poisson(shape)
        return ("poisson_integers", (logits,)) if r is None else (f"integers/{negative_binomial.key}", (r, logits))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Raise an error: there are infinitely many counts.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has infinitely many values and cannot be enumerated: use a relaxation, Trace_ELBO, "
            "or TraceTMC_ELBO with num_samples"
        )

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, relaxation: {self.relaxation})"

    def rsample(self: Any, sample_shape: Shape = torch.Size()) -> Tensor:
        """Draw relaxed counts of shape sample_shape + batch_shape, differentiable in the parameters, once.

        Raises:
            NotImplementedError: if there is no relaxation.
            TypeError: if the relaxation cannot draw this family.
            DivergedError: with validation on, for parameters too large to draw from; without it such counts are nan.
        """
        relaxation = required_relaxation(self, "integers: give it one, such as relaxation=Integer()")
        return computed(relaxation.rsample(self, self._extended_shape(sample_shape)), self).to(self.dtype)

    def sample(self: Any, sample_shape: Shape = torch.Size()) -> Tensor:
        """Draw relaxed counts without a gradient, or integers if there is no relaxation."""
        with torch.no_grad():
            drawn = (
                self._exact(self._extended_shape(sample_shape))
                if self.relaxation is None
                else self.rsample(sample_shape)
            )
            return drawn.detach()  # a traced program has no no_grad
