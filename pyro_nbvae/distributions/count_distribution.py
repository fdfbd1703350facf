"""The base class of count distributions that are defined by their weights."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint
from typing_extensions import Self

from pyro_nbvae.distributions import sums
from pyro_nbvae.distributions.elementwise import PARTS, double, full_precision, pathwise, register_part
from pyro_nbvae.distributions.family_checks import check_often
from pyro_nbvae.distributions.relaxations import Relaxation
from pyro_nbvae.distributions.relaxations.base import check_relaxation
from pyro_nbvae.distributions.relaxed import RelaxedCount, Shape, computed, floats
from pyro_nbvae.distributions.windows import AtMost, Count, Integrand, LogQOverP, Surprise


class CountDistribution(RelaxedCount, TorchDistribution):  # type: ignore[override]
    r"""Base class of distributions over the counts 0, 1, 2, ... that are defined by their weights.

    .. math:: q(k) = \frac{w_k}{\sum_j w_j}, \qquad T_k = \frac{\partial \log w_k}{\partial \theta}.

    A subclass defines ``arg_constraints``, which names its parameters in order, and three static methods:

    - ``log_weight(k, *parameters)``: :math:`\log w_k`. A term that does not depend on k may be left out. Return -inf
      where q has no mass, never nan. Estimators that sample the KL also need a finite derivative in k, at k = 0 too;
    - ``scores(k, *parameters)``: a tuple with :math:`T_k` of every parameter, the derivative of ``log_weight`` as it is
      written; None for a parameter without a derivative;
    - ``window(nats, *parameters)``: the first and the last count of a window; the mass outside it is at most
      :math:`e^{-\mathrm{nats}}`. Tensors; they may be negative or not whole. For a family with tails like a Poisson's
      see :func:`poisson_window`.

    They give the distribution samples, ``rsample`` with :class:`~pyro_nbvae.distributions.Integer`, ``log_prob``,
    ``mean``, ``variance``, ``entropy``, ``cdf``, and a KL divergence to and from every other count distribution of this
    package and of PyTorch (Poisson, negative binomial). All are sums over the window, exact up to the mass outside it,
    and differentiable twice (``rsample`` once); the cost grows with the width of the window.

    Args:
        *parameters: parameters by position or by name (``**named``); they broadcast to the batch shape.
        relaxation: how samples are differentiated; with None they have no gradient.
        validate_args: as in torch.

    Raises:
        ValueError: with validation on, for parameters or counts outside their range, and for a subclass whose functions
            contradict each other (see :func:`check_family`).
        TypeError: for a subclass without one of the four, for missing or unknown parameters, or if ``relaxation`` is
            not a :class:`~pyro_nbvae.distributions.Relaxation`.

    With validation on, every sum raises DivergedError (a ValueError) for windows wider than 2^20 counts. With
    validation off that element is nan.

    See also: docs/mathematics.md, section 4 (Families that are given by their weights).

    Example::

        >>> class Geometric(CountDistribution):
        ...     arg_constraints = {"logits": constraints.real}
        ...     log_weight = staticmethod(lambda k, logits: k * torch.nn.functional.logsigmoid(logits))
        ...     scores = staticmethod(lambda k, logits: (k * torch.sigmoid(-logits),))
        ...     window = staticmethod(lambda nats, logits: (0 * logits, nats / torch.nn.functional.softplus(-logits)))
        >>> d = Geometric(torch.tensor([0.0, 1.0]))
        >>> [round(float(m), 4) for m in d.mean]
        [1.0, 2.7183]
    """

    support: Constraint = constraints.nonnegative_integer
    normalized = smooth = False
    kernels: str | None = None
    kernel_parameters: Callable[..., tuple[Tensor, ...]]
    log_weight: Callable[..., Tensor]
    scores: Callable[..., tuple[Tensor | None, ...]]
    window: Callable[..., tuple[Tensor, Tensor]]
    key: str
    log_q_over_p: LogQOverP
    uses: Counter[tuple[object, ...]]  # by :func:`check_often`

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        cls._register()

    @classmethod
    def _register(cls) -> None:
        cls.key = register_part(cls, cls.__qualname__)
        if not {"log_weight", "scores"}.isdisjoint(vars(cls)) and "kernels" not in vars(cls):
            cls.kernels = None  # those of the class above compute another family
        cls.uses = Counter()
        cls.log_q_over_p = LogQOverP(cls)

    def __init__(
        self,
        *parameters: Tensor | float,
        relaxation: Relaxation | None = None,
        validate_args: bool | None = None,
        **named: Tensor | float,
    ) -> None:
        self.relaxation = check_relaxation(relaxation)
        if PARTS.get(type(self).key) is not type(self):  # of another process, or inherited past __init_subclass__
            self._register()
        defined = ("arg_constraints", "log_weight", "scores", "window")
        missing = [n for n in defined if getattr(type(self), n, None) is getattr(CountDistribution, n, None)]
        if missing:
            raise TypeError(f"{type(self).__name__} must define {', '.join(missing)}")
        names = tuple(self.arg_constraints)
        given = dict(zip(names, parameters, strict=False)) | named
        if len(parameters) + len(named) != len(names) or set(given) != set(names):
            raise TypeError(f"{type(self).__name__} takes the parameters {', '.join(names)}")
        values = torch.broadcast_tensors(*(self._with_temperature(v) for v in floats(*(given[n] for n in names))))
        for name, value in zip(names, values, strict=True):
            setattr(self, name, value)
        super().__init__(torch.Size(values[0].shape), validate_args=validate_args)  # a subclass may give a tuple
        if self._validate_args:
            check_often(self)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The parameters, of the batch shape, in the order of ``arg_constraints``."""
        return tuple(getattr(self, name) for name in self.arg_constraints)

    def expand(self, batch_shape: Shape, _instance: Distribution | None = None) -> Self:
        new = self._get_checked_instance(type(self), _instance)
        new.relaxation = self.relaxation
        batch_shape = torch.Size(batch_shape)
        for name, value in zip(self.arg_constraints, self.parameters, strict=True):
            setattr(new, name, value.expand(batch_shape))
        super(CountDistribution, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def dtype(self) -> torch.dtype:
        """Precision of samples and results."""
        return functools.reduce(torch.promote_types, (p.dtype for p in self.parameters))

    @property
    def _full(self) -> tuple[Tensor, ...]:
        """The parameters in one precision; half precisions as single precision."""
        return tuple(full_precision(p.to(self.dtype)) for p in self.parameters)

    def _expect(self, integrand: type[Integrand], *arguments: Tensor) -> Tensor:
        return computed(sums.expectation(type(self), integrand, *self.parameters, *arguments), self).to(self.dtype)

    @property
    def log_normalizer(self) -> Tensor:
        """Log of the sum of all weights, of the batch shape."""
        return computed(sums.log_normalizer(type(self), *self.parameters), self)

    @property
    def mean(self) -> Tensor:
        """Mean count, of the batch shape."""
        return self._expect(Count)

    @property
    def variance(self) -> Tensor:
        """Variance of the count, of the batch shape."""
        return computed(sums.variance(type(self), *self.parameters), self)

    @property
    def mode(self) -> Tensor:
        """The most probable count, of the batch shape, without a gradient; the smallest, if several are.

        It is searched in the window.
        """
        return computed(sums.mode(type(self), *self.parameters), self)

    def entropy(self) -> Tensor:
        """Return the entropy in nats, of the batch shape."""
        return self._expect(Surprise)

    def cdf(self, value: Tensor) -> Tensor:
        """Return P(count <= value); ``value`` broadcasts with the batch shape.

        Raises:
            ValueError: with validation on, for values that are not counts.
        """
        if self._validate_args:
            self._validate_sample(value)
        return self._expect(AtMost, value)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log mass of ``value`` in nats; ``value`` broadcasts with the batch shape.

        Raises:
            ValueError: with validation on, for values that are not counts.
        """
        if self._validate_args:
            self._validate_sample(value)
        dtype = torch.promote_types(value.dtype, self.dtype)
        # in double precision, derivatives too: a difference of two numbers that may be large
        precise = [double(p) for p in self.parameters]
        normalizer = computed(sums.log_normalizer(type(self), *precise), self)
        k, *own = torch.broadcast_tensors(double(value), *precise)
        return (self.log_weight(k, *own) - normalizer).to(value.device, dtype)

    def _exact(self, shape: Size) -> Tensor:
        name, own = self.integer_sampler(shape)
        return computed(pathwise(name, *own), self).to(self.dtype)

    def integer_sampler(self, shape: Size) -> tuple[str, tuple[Tensor, ...]]:
        return f"integers/{self.key}", tuple(p.expand(shape) for p in self._full)
