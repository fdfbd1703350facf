r"""Joint distributions over latents, as tilts of a factorised one: mixtures and autoregressive distributions.

A joint prior makes the units depend on each other, so that samples from it are as coherent as the posteriors' own. Each
is stated relative to a factorised *reference*, such as a negative binomial with parameters r and l for each unit. A
context c (a component, or the units before) shifts the logits by :math:`\delta(c)`, and the log Gamma functions cancel:

.. math:: \log\frac{p(z \mid c)}{\mathrm{ref}(z)} = \sum_i a_i z_i + b_i, \qquad
    a = \log\frac{\sigma(l + \delta)}{\sigma(l)}, \quad b = r \log\frac{\sigma(-l - \delta)}{\sigma(-l)}.

This *tilt* is linear in the counts; for a Poisson with rate :math:`\lambda` it has :math:`a = \delta` and
:math:`b = -\lambda (e^\delta - 1)`; for a normal it is linear in the standardised value and its square. So the KL from
a factorised posterior is an exact KL and the mean of a tilt, which needs no second sample: it is taken at the sample
that is decoded anyway.

See also: docs/mathematics.md, section 3.6 (Joint priors).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Size, Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint

from pyro_nbvae.distributions.bounds import rate_multiplier
from pyro_nbvae.distributions.elementwise import computed_in
from pyro_nbvae.distributions.negative_binomial import NegativeBinomial, RelaxedNegativeBinomial
from pyro_nbvae.distributions.normal import IsotropicNormal
from pyro_nbvae.distributions.poisson import RelaxedPoisson
from pyro_nbvae.distributions.relaxed import Shape

# log scale per unit of a network's bounded output, from -5 to 5.
_LOG_SCALE = 0.6
# Number of elements (observation, component, unit) of a tilt that are computed at once: on a CPU they fit in its cache.
_ELEMENTS_OF_CPU, _ELEMENTS = 1 << 18, 1 << 24


class _Growth(torch.autograd.Function):
    r"""Sums :math:`\sum_i t_{bi} \log(1 + s_{bi} e_{ci} + s'_{bi} e'_{ci})`, (B, C).

    Arguments: t, s, s' (B, K) and e, e' (C, K).

    The elements (b, c, i) are computed again in the backward pass, a part at a time.
    """

    generate_vmap_rule = True

    @staticmethod
    def _parts(e: Tensor, *rows: Tensor) -> Any:
        most = max(1, (_ELEMENTS_OF_CPU if e.device.type == "cpu" else _ELEMENTS) // e.numel())
        return zip(*(each.unsqueeze(1).split(most) for each in rows), strict=True)

    @staticmethod
    def forward(total: Tensor, s: Tensor, other_s: Tensor, e: Tensor, other_e: Tensor) -> Tensor:
        return torch.cat(
            [
                (torch.log1p(own * e + other * other_e) @ t.mT).squeeze(2)
                for t, own, other in _Growth._parts(e, total, s, other_s)
            ]
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        total, s, other_s, e, other_e = ctx.saved_tensors
        rows: tuple[list[Tensor], ...] = ([], [], [])
        of_e: tuple[list[Tensor], ...] = ([], [])
        for t, own, other, g in _Growth._parts(e, total, s, other_s, gradient):
            x = own * e + other * other_e
            slope = g.mT / (1 + x)
            rows[0].append((g @ torch.log1p(x)).squeeze(1))
            for k, (here, its) in enumerate(((own, e), (other, other_e))):
                rows[1 + k].append((slope * its).sum(1) * t.squeeze(1))
                of_e[k].append((slope * (t * here)).sum(0))
        return (*(torch.cat(each) for each in rows), *(torch.stack(each).sum(0) for each in of_e))


# The largest shift of counts: with more, e^shift and mean counts overflow.
MOST_SHIFT = 30


def _limited(shift: Sequence[Tensor]) -> Tensor:
    """Return the shift of counts, between -30 and 30."""
    (delta,) = shift
    return delta.clamp(-MOST_SHIFT, MOST_SHIFT)


class CountShift:
    """A shift of negative binomials and Poissons: one number for each unit, by which the log odds or the log rate grow.

    For a negative binomial and a Poisson it multiplies the mean by e^shift.
    """

    parts = 1

    def heads(self, reference: Any) -> int:
        """Return the number of outputs that :meth:`conditional` reads."""
        return 2 if isinstance(reference, NegativeBinomial) else 1

    def standardised(self, reference: Any, value: Tensor) -> Tensor:
        """Return what a network reads of counts, without a gradient of the reference.

        It is (value - mean) / (standard deviation + 0.3), so that a unit that is nearly always 0 stays small.
        """
        mean, deviation = reference.mean.detach(), reference.variance.detach().sqrt()
        return (value - mean) / (deviation + 0.3)

    def conditional(self, reference: Any, outputs: Sequence[Tensor]) -> TorchDistribution:
        """Return the distributions with the mean multiplied by g(h) and, for negative binomials, r by e^h'."""
        log_multiplier = rate_multiplier(outputs[0]).log()
        if isinstance(reference, NegativeBinomial):
            log_r = outputs[1]
            logits = reference.logits + log_multiplier - log_r
            return RelaxedNegativeBinomial(reference.total_count * log_r.exp(), logits=logits, validate_args=False)
        return RelaxedPoisson(reference.rate * log_multiplier.exp(), validate_args=False)

    def shifted(self, given: Any, shift: Sequence[Tensor]) -> TorchDistribution:
        """Return a factorised distribution with this shift, (..., K)."""
        delta = _limited(shift)
        if isinstance(given, NegativeBinomial):
            return RelaxedNegativeBinomial(given.total_count, logits=given.logits + delta, validate_args=False)
        return RelaxedPoisson(given.rate * delta.exp(), validate_args=False)

    def tilts(self, given: Any, shift: Sequence[Tensor], value: Tensor) -> Tensor:
        r"""Return log p(value) - log given(value), summed over units, for every component: (..., C).

        With :math:`G = \log(1 + \sigma(l)(e^\delta - 1))` it is the sum of :math:`\delta z - (z + r) G`. For l > 0,
        where these cancel, it is that of :math:`-\delta r - (z + r) H` with
        :math:`H = \log(1 + \sigma(-l)(e^{-\delta} - 1))`.
        """
        delta = _limited(shift).to(value)
        if not isinstance(given, NegativeBinomial):
            rate = given.rate.to(value)
            return value @ delta.mT - rate @ torch.expm1(delta).mT
        r, logits = given.total_count.to(value), given.logits.to(value)
        above, e, other_e = logits > 0, torch.expm1(delta), torch.expm1(-delta)
        if logits.dim() == 1:  # the same for all observations
            grown = torch.log1p(torch.where(above, torch.sigmoid(-logits) * other_e, torch.sigmoid(logits) * e))
            of_value, of_one = torch.where(above, -grown, delta - grown), torch.where(above, -delta - grown, -grown)
            return value @ of_value.mT + of_one @ r
        shape = torch.broadcast_shapes(value.shape, logits.shape)
        s, other_s = torch.sigmoid(logits).masked_fill(above, 0), torch.sigmoid(-logits).masked_fill(~above, 0)
        rows = [each.expand(shape).reshape(-1, shape[-1]) for each in (value + r, s, other_s)]
        grown = _Growth.apply(*rows, e, other_e).reshape(*shape[:-1], len(delta))
        return torch.where(above, -r, value) @ delta.mT - grown

    def between(self, given: Any, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        """Return the shifts of components with these means and variances within, (C, K); counts need only the mean."""
        return ((mean / given.mean).clamp_min(1e-4).log(),)

    def coordinates(self, given: Any, value: Tensor) -> Tensor:
        """Return values on a scale on which their variance hardly depends on the mean."""
        return value.clamp_min(0).sqrt()


class NormalShift:
    """A shift of normals: for each unit a location, in scales, and the logarithm of a factor of the scale."""

    parts = 2

    def heads(self, reference: Any) -> int:
        """Return the number of outputs that :meth:`conditional` reads."""
        return 2

    def standardised(self, reference: Any, value: Tensor) -> Tensor:
        """Return what a network reads of values: those in scales, without a gradient of the reference."""
        return (value - reference.loc.detach()) / reference.scale.detach()

    def conditional(self, reference: Any, outputs: Sequence[Tensor]) -> TorchDistribution:
        """Return the distributions with another location, in scales, and the scale multiplied by e^(0.6 h)."""
        return self.shifted(reference, (outputs[0], _LOG_SCALE * outputs[1]))

    def shifted(self, given: Any, shift: Sequence[Tensor]) -> TorchDistribution:
        """Return a factorised distribution with this shift, (..., K)."""
        location, log_scale = shift
        return Normal(given.loc + given.scale * location, given.scale * log_scale.exp(), validate_args=False)

    def tilts(self, given: Any, shift: Sequence[Tensor], value: Tensor) -> Tensor:
        """Return log p(value) - log given(value), summed over units, for every component: (..., C)."""
        location, log_scale = (part.to(value) for part in shift)
        u, precision = (value - given.loc) / given.scale, (-2 * log_scale).exp()
        constant = (log_scale + 0.5 * location.square() * precision).sum(-1)
        return u @ (location * precision).mT + 0.5 * u.square() @ (1 - precision).mT - constant

    def between(self, given: Any, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        """Return the shifts of components with these means and variances within, (C, K)."""
        return (mean - given.loc) / given.scale, 0.5 * (variance / given.scale.square()).clamp_min(1e-4).log()

    def coordinates(self, given: Any, value: Tensor) -> Tensor:
        """Return values in units of the scale."""
        return self.standardised(given, value)


_OF_COUNTS = (NegativeBinomial.log_prob, RelaxedNegativeBinomial.log_prob, RelaxedPoisson.log_prob)
_OF_NORMALS = (torch.distributions.Normal.log_prob, IsotropicNormal.log_prob)


def shift_of(reference: Distribution) -> CountShift | NormalShift:
    """Return how a reference is shifted.

    Raises:
        TypeError: for another distribution than negative binomials and Poissons of this package, and normals.
    """
    if isinstance(reference, torch.distributions.Distribution) and len(reference.batch_shape) > 0:
        log_prob = type(reference).log_prob  # a subclass may have another
        if isinstance(reference, NegativeBinomial | RelaxedPoisson) and log_prob in _OF_COUNTS:
            return CountShift()
        if isinstance(reference, torch.distributions.Normal) and log_prob in _OF_NORMALS:
            return NormalShift()
    raise TypeError(
        "a joint prior needs a reference of batch shape (..., K) that is a NegativeBinomial, a RelaxedPoisson or a "
        f"Normal, got {type(reference).__name__} {tuple(getattr(reference, 'batch_shape', ()))}"
    )


class Tilted(TorchDistribution):
    r"""Base class of joint distributions that tilt a factorised one.

    .. math:: \log p(z) = \sum_i \log g_i(z_i; z) + \mathrm{tilt}(z)

    g is the reference or, for an autoregressive distribution, that of each unit given those before. The KL from a
    factorised posterior is :math:`\sum_i KL(q_i \,\|\, g_i)`, exact, minus the mean of the tilt;
    :class:`~pyro_nbvae.infer.AnalyticKL_ELBO` takes the tilt at the decoded sample. No KL is registered, because a
    registered one would be sampled.

    A subclass defines :meth:`factors` and :meth:`sample`.

    Args:
        reference: a factorised distribution, batch shape (..., K).
        validate_args: as in torch.

    Example::

        >>> class Even(Tilted):
        ...     '''Counts with an even sum: half of the mass of Poissons, nearly, and twice as likely.'''
        ...     def factors(self, value):
        ...         odd = value.sum(-1) % 2 == 1
        ...         mass = (1 + (-2 * self.reference.rate.sum(-1)).exp()) / 2
        ...         return self.reference, torch.where(odd, -torch.inf, -mass.log())
        >>> d = Even(RelaxedPoisson(torch.tensor([1.0, 2.0])))
        >>> grid = torch.cartesian_prod(torch.arange(20.0), torch.arange(20.0))
        >>> d.event_shape, round(float(d.log_prob(grid).exp().sum()), 4)
        (torch.Size([2]), 1.0)
    """

    arg_constraints: dict[str, Constraint] = {}

    def __init__(self, reference: Any, *, validate_args: bool | None = None) -> None:
        self.reference = reference
        batch_shape, event_shape = reference.batch_shape[:-1], reference.batch_shape[-1:]
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=validate_args)

    @property
    def support(self) -> Constraint:
        """Vectors of values in the reference's support."""
        return constraints.independent(self.reference.support, 1)

    def expand(self, batch_shape: Shape, _instance: Distribution | None = None) -> Any:
        # parameters keep their shape: a tilt of shared parameters is a matrix product
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        if torch.broadcast_shapes(self.batch_shape, new._batch_shape) != new._batch_shape:
            raise RuntimeError(f"a batch shape {tuple(self.batch_shape)} cannot be expanded to {tuple(batch_shape)}")
        return new

    def factors(self, value: Tensor) -> tuple[Any, Tensor]:
        """Return the factorised distribution g, of batch shape (..., K), and the tilt at ``value`` in nats, (...).

        Args:
            value: (..., K).
        """
        raise NotImplementedError

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log mass or density of ``value`` (..., K) in nats, (...).

        Raises:
            ValueError: with validation on, for values outside the support.
        """
        if self._validate_args:
            self._validate_sample(value)
        given, tilt = self.factors(value)
        found = given.log_prob(value).sum(-1) + tilt
        return found.expand(torch.broadcast_shapes(found.shape, self.batch_shape))


class TiltedMixture(Tilted):
    r"""Mixture whose components shift the parameters of a reference.

    .. math:: p(z) = \sum_c \pi_c \prod_i g(z_i; \delta_{ci}), \qquad
        \mathrm{tilt}(z) = \log \sum_c \pi_c \exp\Big[\sum_i a_{ci} z_i + b_{ci}\Big]

    Args:
        reference: a factorised distribution, batch shape (..., K), or a :class:`TiltedAutoregressive`, of which the
            components then shift every conditional distribution.
        shift: shifts of the components, (C, K) each: for negative binomials and Poissons (log odds or log rate,),
            limited to 30 either way; for normals (location in scales, log of a factor of the scale).
        component_logits: logarithms of the components' weights up to a constant, (C,).
        validate_args: as in torch.

    Raises:
        TypeError: for another reference than negative binomials and Poissons of this package, and normals.

    Example::

        >>> d = TiltedMixture(RelaxedPoisson(torch.ones(3)), (torch.randn(5, 3),), torch.zeros(5))
        >>> d.sample(torch.Size([4])).shape, d.log_prob(torch.ones(4, 3)).shape
        (torch.Size([4, 3]), torch.Size([4]))
    """

    def __init__(
        self,
        reference: Any,
        shift: Sequence[Tensor],
        component_logits: Tensor,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.inner = reference if isinstance(reference, TiltedAutoregressive) else None
        self.shift, self.component_logits = tuple(shift), component_logits
        reference = reference if self.inner is None else self.inner.reference
        self._by = shift_of(reference)
        want = (*component_logits.shape, *reference.batch_shape[-1:])
        if len(self.shift) != self._by.parts or any(part.shape != want for part in self.shift) or len(want) != 2:
            raise ValueError(
                f"component_logits {tuple(component_logits.shape)} and shift {[tuple(part.shape) for part in shift]} "
                f"must be (C,) and {self._by.parts} of (C, {reference.batch_shape[-1]})"
            )
        super().__init__(reference, validate_args=validate_args)

    def _by_component(self, value: Tensor) -> tuple[Any, Tensor]:
        """Return g and log p(c, value) - log g(value), (..., C)."""
        given = self.reference if self.inner is None else self.inner.factors(value)[0]
        dtype = computed_in(torch.promote_types(value.dtype, self.component_logits.dtype))
        kind = value.device.type
        # matrix products, but of densities: autocast is for networks
        full = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
        with full:
            weights = self.component_logits.to(dtype).log_softmax(-1)
            return given, weights + self._by.tilts(given, self.shift, value.to(dtype))

    def factors(self, value: Tensor) -> tuple[Any, Tensor]:
        given, tilts = self._by_component(value)
        return given, tilts.logsumexp(-1)

    def responsibilities(self, value: Tensor) -> Tensor:
        """Return p(c | value) of each component, (..., C), for values (..., K)."""
        return self._by_component(value)[1].softmax(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Draw values of shape sample_shape + batch_shape + (K,)."""
        shape = torch.Size(sample_shape) + self.batch_shape
        drawn = torch.distributions.Categorical(logits=self.component_logits).sample(shape)
        return self.sample_given(drawn)

    @torch.no_grad()
    def sample_given(self, component: Tensor) -> Tensor:
        """Draw values (..., K), one for each component of a tensor (...) of whole numbers from 0 to C - 1."""
        return self._values([part[component] for part in self.shift], lambda d: d.sample())

    @torch.no_grad()
    def path(self, first: int, last: int, steps: int) -> Tensor:
        """Return latents on the way from one component to another, real numbers also for counts.

        Args:
            first, last: the components.
            steps: number of points, both ends included.

        Returns:
            (steps, K): the means of components with shifts on the line between the two; with an autoregressive
            reference, of each unit given the means before it.
        """
        along = torch.linspace(0, 1, steps).to(self.component_logits)[:, None]
        return self._values([(1 - along) * part[first] + along * part[last] for part in self.shift], lambda d: d.mean)

    def _values(self, shift: Sequence[Tensor], take: Callable[[Any], Tensor]) -> Tensor:
        if self.inner is None:
            return take(self._by.shifted(self.reference, shift))
        return self.inner.by_group(shift[0].shape[:-1], lambda given: take(self._by.shifted(given, shift)))

    @property
    def components(self) -> TorchDistribution:
        """The components, a factorised distribution of batch shape (C, K); without those given other units."""
        return self._by.shifted(self.reference, self.shift)

    @property
    def mean(self) -> Tensor:
        """Mean of each unit, (K,); of a mixture of factorised components."""
        self._factorised("mean")
        return self._over_components(self.components.mean)

    @property
    def variance(self) -> Tensor:
        """Variance of each unit, (K,); of a mixture of factorised components."""
        self._factorised("variance")
        parts = self.components
        return self._over_components(parts.variance + (parts.mean - self.mean).square())

    def _over_components(self, each: Tensor) -> Tensor:
        """Return the mean over components of (C, K); no matrix product, which autocast would round."""
        return (self.component_logits.softmax(-1)[:, None] * each).sum(0)

    def _factorised(self, name: str) -> None:
        if self.inner is not None or self.reference.batch_shape != self.event_shape:
            raise NotImplementedError(f"a mixture of autoregressive components has no {name} in closed form")


class MixtureOfNegativeBinomials(TiltedMixture):
    r"""Mixture of products of negative binomials that share the dispersion of each unit.

    .. math:: p(z) = \sum_c \pi_c \prod_i \mathrm{NB}(z_i; r_i, l_{ci})

    Its reference is NB(r, l) with the mean of the mixture.

    Args:
        total_count: dispersions r, (K,), positive.
        logits: l, (C, K).
        component_logits: logarithms of the components' weights up to a constant, (C,).
        validate_args: as in torch.

    Raises:
        ValueError: for arguments of other shapes and, with validation on, for logits of a component that are not within
            30 of those of the reference.

    Example::

        >>> d = MixtureOfNegativeBinomials(torch.ones(2), torch.tensor([[0.0, -2.0], [-2.0, 0.0]]), torch.zeros(2))
        >>> round(float(d.log_prob(torch.zeros(2)).exp()), 4)
        0.4404
    """

    def __init__(
        self, total_count: Tensor, logits: Tensor, component_logits: Tensor, *, validate_args: bool | None = None
    ) -> None:
        if (total_count.shape, component_logits.shape) != (logits.shape[1:], logits.shape[:1]):
            raise ValueError(
                f"total_count {tuple(total_count.shape)}, logits {tuple(logits.shape)} and component_logits "
                f"{tuple(component_logits.shape)} must be (K,), (C, K) and (C,)"
            )
        middle = (component_logits.log_softmax(-1)[:, None] + logits).logsumexp(0)
        reference = NegativeBinomial(total_count, logits=middle, validate_args=validate_args)
        shift = logits - middle
        super().__init__(reference, (shift,), component_logits, validate_args=validate_args)
        largest = shift[component_logits > -torch.inf].abs().max()
        if self._validate_args and bool(largest > MOST_SHIFT):
            raise ValueError(
                f"logits are up to {float(largest):.3g} from those of the mean of the mixture, "
                f"{MOST_SHIFT} is the most: limit them"
            )


class TiltedAutoregressive(Tilted):
    r"""Autoregressive distribution: each unit given those of earlier groups.

    .. math:: p(z) = \prod_i g(z_i; z_{<i})

    The KL from a factorised posterior is the mean over draws of the exact KL of each unit given those before.

    Args:
        reference: a factorised distribution, batch shape (K,).
        conditional: maps values (..., K) to the factorised distribution of each unit given those of earlier groups, of
            batch shape (..., K). It may read all units; the distribution of a unit must depend on earlier groups only.
        group: the group of each unit, (K,), whole numbers from 0.
        groups: number of groups.
        validate_args: as in torch.

    Example::

        >>> def conditional(z):
        ...     before = torch.cat([torch.zeros_like(z[..., :1]), z[..., :-1]], -1)
        ...     return RelaxedPoisson(1 + 0.5 * before)
        >>> d = TiltedAutoregressive(RelaxedPoisson(torch.ones(3)), conditional, torch.arange(3), groups=3)
        >>> d.sample(torch.Size([4])).shape, d.log_prob(torch.ones(4, 3)).shape
        (torch.Size([4, 3]), torch.Size([4]))
    """

    def __init__(
        self,
        reference: Any,
        conditional: Callable[[Tensor], Any],
        group: Tensor,
        groups: int,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.conditional, self.group, self.groups = conditional, group, groups
        super().__init__(reference, validate_args=validate_args)

    def factors(self, value: Tensor) -> tuple[Any, Tensor]:
        return self.conditional(value), value.new_zeros(value.shape[:-1])

    @torch.no_grad()
    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Draw values of shape sample_shape + batch_shape + (K,), one group after the other."""
        return self.by_group(torch.Size(sample_shape) + self.batch_shape, lambda given: given.sample())

    def by_group(self, shape: Size, take: Callable[[Any], Tensor]) -> Tensor:
        """Return values of shape ``shape`` + (K,), group by group: ``take`` of the conditional distributions."""
        value = self.reference.mean.expand(*shape, -1)
        for group in range(self.groups):
            value = torch.where(self.group == group, take(self.conditional(value)), value)
        return value
