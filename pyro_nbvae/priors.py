"""Joint priors over latents, as modules that turn a model's factorised prior into a joint distribution.

With a factorised prior the latents of generated observations are independent, which those of real observations are
not. A joint prior is an argument of every model::

    NegativeBinomialModel(shape, prior=Mixture(100))
    NegativeBinomialModel(shape, prior=Autoregressive(groups=16))
    NegativeBinomialModel(shape, prior=Mixture(100, of=Autoregressive(groups=16)))

The same classes serve Poisson and Gaussian models.

See also: docs/mathematics.md, section 3.6 (Joint priors).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot

from pyro_nbvae.batching import random_subset
from pyro_nbvae.distributions.bounds import bounded
from pyro_nbvae.distributions.negative_binomial import RelaxedNegativeBinomial
from pyro_nbvae.distributions.tilted import TiltedAutoregressive, TiltedMixture, shift_of
from pyro_nbvae.errors import InputError
from pyro_nbvae.infer.rates import MIXTURE_LR_MULTIPLIER, NETWORK_LR_MULTIPLIER

# Observations at the reference that a component's mean counts besides its own.
_PRIOR_OBSERVATIONS = 2.0
# Standard deviation of the shifts before the components are placed.
_SPREAD = 0.01


def _check_number(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {value}")


class JointPrior(nn.Module, ABC):
    """Base class of joint priors: a module from a model's factorised prior to a joint distribution.

    The factorised prior goes on to be learned: posteriors are relative to it, and decoders standardise counts by it.

    Attributes:
        lr_multiplier: learning rate of its own parameters relative to that of the networks.
        lr_decays: whether this rate falls to 0 in the course of training, also where that of the networks does not.

    Example::

        >>> from pyro_nbvae.distributions import TiltedMixture
        >>> from pyro_nbvae.models import PoissonModel
        >>> class Twofold(JointPrior):
        ...     '''Two components, one the mirror image of the other.'''
        ...     def setup(self, reference):
        ...         self.shift = nn.Parameter(0.1 * torch.randn(reference.batch_shape))
        ...     def forward(self, reference):
        ...         return TiltedMixture(reference, [torch.stack([self.shift, -self.shift])], torch.zeros(2))
        >>> model = PoissonModel((5,), latents=3, decoder="linear", prior=Twofold())
        >>> model.prior_distribution().event_shape
        torch.Size([3])
    """

    lr_multiplier = 1.0
    lr_decays = False
    _of: Any = None  # batch shape of the reference for which setup was called

    def setup_once(self, reference: Any) -> None:
        """Call :meth:`setup`, unless the parameters are there; move them to the reference's device and precision.

        Raises:
            ValueError: if they are for another number of latents.
        """
        if self._of not in (None, reference.batch_shape):
            raise InputError(f"this prior is of a model with latents of shape {tuple(self._of)}: make a new one")
        if self._of is None:
            self.setup(reference)
            self._of = reference.batch_shape
        self.to(reference.mean)

    @abstractmethod
    def setup(self, reference: Any) -> None:
        """Create the parameters for a reference of batch shape (K,); the model calls this once."""

    @abstractmethod
    def forward(self, reference: Any) -> Any:
        """Return p(z), of event shape (K,), for a factorised prior of batch shape (K,)."""

    def start(self, reference: Any, z: Tensor, seed: int = 0) -> None:
        """Move the parameters to samples of the posteriors, once these say something: after the first epoch.

        Args:
            reference: the factorised prior, batch shape (K,).
            z: a sample of the posterior for each of N observations, (N, K).
            seed: random seed.
        """

    @property
    def starts(self) -> bool:
        """Whether :meth:`start` does anything."""
        return type(self).start is not JointPrior.start

    def by_rate(self) -> Iterator[tuple[JointPrior, list[nn.Parameter]]]:
        """Iterate over the parts, this prior last, each with its own parameters."""
        inner = [part for part in self.children() if isinstance(part, JointPrior)]
        for part in inner:
            yield from part.by_rate()
        others = {id(p) for part in inner for p in part.parameters()}
        yield self, [p for p in self.parameters() if id(p) not in others]


class Mixture(JointPrior):
    """A mixture whose components shift the parameters of the factorised prior, or of an autoregressive one.

    Each component begins near the reference. :meth:`start` moves them half of the way to the clusters of posterior
    samples; without it they part slowly. They learn 5 times as fast as the networks.

    Args:
        components: number of components C.
        of: an :class:`Autoregressive` prior, of which the components shift every conditional distribution.

    Raises:
        ValueError: for fewer than one component.
        TypeError: for latents that are neither counts nor Gaussian.

    Example::

        >>> from pyro_nbvae.models import NegativeBinomialModel
        >>> model = NegativeBinomialModel((5,), latents=3, decoder="linear", prior=Mixture(10))
        >>> model.prior_distribution().sample(torch.Size([4])).shape
        torch.Size([4, 3])
    """

    lr_multiplier = MIXTURE_LR_MULTIPLIER

    def __init__(self, components: int = 100, *, of: Autoregressive | None = None) -> None:
        super().__init__()
        _check_number("components", components)
        if not isinstance(of, Autoregressive | None):
            raise TypeError(f"of must be an Autoregressive prior or None, got a {type(of).__name__}")
        self.components, self.of = components, of
        self.component_logits = nn.Parameter(torch.zeros(components))

    def setup(self, reference: Any) -> None:
        if self.of is not None:
            self.of.setup(reference)
        shape = (self.components, *reference.batch_shape)
        # with the same shift, all components would have the same gradient
        self.shift = nn.ParameterList(_SPREAD * torch.randn(shape) for _ in range(shift_of(reference).parts))

    def forward(self, reference: Any) -> TiltedMixture:
        inner = reference if self.of is None else self.of(reference)
        return TiltedMixture(inner, list(self.shift), self.component_logits)

    @torch.no_grad()
    def start(self, reference: Any, z: Tensor, seed: int = 0) -> None:
        if self.of is not None:  # what its network has learned would leave nothing to the components
            self.of.reset()
        components, weights = clusters(reference, z, self.components, seed)
        for parameter, values in zip(self.shift, components, strict=True):
            parameter.copy_(0.5 * values)  # the posteriors are still moving
        self.component_logits.copy_(weights.log())


def clusters(reference: Any, z: Tensor, number: int, seed: int = 0) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the shifts of components, (C, K) each, and their weights, (C,), from k-means of samples.

    Counts are clustered by their square roots, whose variance hardly depends on the mean; normals by their standardised
    values.

    Args:
        reference: a factorised distribution, batch shape (K,).
        z: samples (N, K).
        number: number of components C.
        seed: random seed.
    """
    from sklearn.cluster import MiniBatchKMeans

    by = shift_of(reference)
    points = by.coordinates(reference, z).double().cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct samples than clusters
        fitted = MiniBatchKMeans(min(number, len(z)), random_state=seed, n_init=1, batch_size=1024).fit(points)
    labels = torch.as_tensor(fitted.labels_, device=z.device).long()
    return maximised(reference, z, one_hot(labels, number).to(z))


def maximised(reference: Any, z: Tensor, share: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return shifts and weights of components from the shares that they have in samples: the M step of EM.

    Args:
        reference: a factorised distribution, batch shape (K,).
        z: samples (N, K).
        share: responsibilities (N, C).
    """
    size, centred = share.sum(0), z - reference.mean
    number = (size + _PRIOR_OBSERVATIONS)[:, None]
    mean = share.mT @ centred / number
    square = (share.mT @ centred.square() + _PRIOR_OBSERVATIONS * reference.variance) / number
    variance = (square - mean.square()).clamp_min(0)
    return shift_of(reference).between(reference, reference.mean + mean, variance), (size + 1) / (size + 1).sum()


class FittedMixture(JointPrior):
    """A mixture that was fitted to latents, with a reference of its own; the model's factorised prior is not used.

    Counts have negative binomials that share the dispersion of each unit, other latents normals.

    Args:
        counts: whether the latents are counts.
        reference: r and logits of the reference, or location and scale, (K,) each.
        shift: shifts of the components, as :class:`~pyro_nbvae.distributions.TiltedMixture`.
        component_logits: logarithms of the components' weights up to a constant, (C,).

    Example::

        >>> z = torch.poisson(torch.tensor([[1.0, 9.0], [9.0, 1.0]]).repeat(200, 1))
        >>> fitted = FittedMixture.fit(z, components=2)
        >>> [round(each, 1) for each in fitted.distribution.component_logits.softmax(-1).tolist()]
        [0.5, 0.5]
    """

    component_logits: Tensor

    def __init__(
        self, counts: bool, reference: Sequence[Tensor], shift: Sequence[Tensor], component_logits: Tensor
    ) -> None:
        super().__init__()
        self.counts, self.parts = counts, len(shift)
        for k, each in enumerate(reference):
            self.register_buffer(f"reference_{k}", each)
        for k, each in enumerate(shift):
            self.register_buffer(f"shift_{k}", each)
        self.register_buffer("component_logits", component_logits)

    def setup(self, reference: Any) -> None:
        """Check that the latents are as many as those of the fit."""
        if reference.batch_shape != self.distribution.event_shape:
            raise InputError(f"the mixture was fitted to latents of shape {tuple(self.distribution.event_shape)}")

    @property
    def distribution(self) -> TiltedMixture:
        """The mixture."""
        first, second = self.get_buffer("reference_0"), self.get_buffer("reference_1")
        reference: Any = _reference(self.counts, first, second)
        shift = [self.get_buffer(f"shift_{k}") for k in range(self.parts)]
        return TiltedMixture(reference, shift, self.component_logits, validate_args=False)

    def forward(self, reference: Any) -> TiltedMixture:
        return self.distribution

    @classmethod
    @torch.no_grad()
    def fit(
        cls, z: Tensor, components: int, *, counts: bool | None = None, steps: int = 30, seed: int = 0
    ) -> FittedMixture:
        """Fit a mixture by EM, from the clusters of k-means.

        The M step has the means in closed form, and a Newton step for the dispersion of each unit.

        Args:
            z: latents (N, K).
            components: number of components C, at most N are used.
            counts: whether the latents are counts. Default: whether all are non-negative integers.
            steps: number of EM steps.
            seed: random seed of k-means.

        Raises:
            InputError: for values that are not finite, or no values.
        """
        if not len(z) or not bool(z.isfinite().all()):
            raise InputError(f"a mixture needs at least one observation and finite latents, got {tuple(z.shape)}")
        counts = bool(((z >= 0) & (z == z.round())).all()) if counts is None else counts
        components = min(components, len(z))
        mean, variance = z.mean(0).clamp_min(_LEAST_MEAN if counts else -torch.inf), z.var(0, correction=0)
        if counts:
            r = (mean.square() / (variance - mean).clamp_min(1e-3 * mean)).clamp(*_DISPERSIONS)
            first, second = r, (mean / r).log()
        else:
            first, second = mean, variance.sqrt().clamp_min(1e-6)
        seen = random_subset(torch.arange(len(z), device=z.device), _SEEN)
        reference = _reference(counts, first, second)
        shift, weights = clusters(reference, z, components, seed)
        for _ in range(steps):
            share = TiltedMixture(reference, shift, weights.log()).responsibilities(z)
            shift, weights = maximised(reference, z, share)
            if counts:
                first = _newton(first, z[seen], share[seen])
                second = (mean / first).log()
                reference = _reference(counts, first, second)
        return cls(counts, (first, second), shift, weights.log())


# Range of fitted dispersions, least mean of a unit, and number of observations that a step of the dispersions reads.
_DISPERSIONS, _LEAST_MEAN, _SEEN = (1e-3, 1e4), 1e-6, 4000


def _reference(counts: bool, first: Tensor, second: Tensor) -> Any:
    if counts:
        return RelaxedNegativeBinomial(first, logits=second, validate_args=False)
    return Normal(first, second, validate_args=False)


def _newton(r: Tensor, z: Tensor, share: Tensor) -> Tensor:
    r"""Return dispersions (K,) after a Newton step in log r on the likelihood, with components' shares (N, C).

    .. math:: \frac{dL}{dr} = \sum_n \psi(z_n + r) - \psi(r) + \sum_c N_c \log\frac{r}{r + m_c}
    """
    sizes = share.sum(0)
    means = share.mT @ z / sizes.clamp_min(1e-6)[:, None]  # of the same latents, else the difference below is noise
    slope = (torch.digamma(z + r) - torch.digamma(r)).sum(0) - sizes @ torch.log1p(means / r)
    curvature = (torch.polygamma(1, z + r) - torch.polygamma(1, r)).sum(0) + sizes @ (1 / r - 1 / (r + means))
    gradient, second = r * slope, r * slope + r.square() * curvature
    step = torch.where(second < 0, -gradient / second, gradient.sign())
    return (r.log() + step.clamp(-1, 1)).exp().clamp(*_DISPERSIONS)


class MaskedLinear(nn.Linear):
    """A linear layer in which an output reads only inputs of lower degree, or of the same if ``same``.

    Args:
        inputs, outputs: degree of each input and of each output, whole numbers.
        same: whether an output reads inputs of its own degree.
        bias: whether there is a bias.
    """

    inputs: Tensor
    outputs: Tensor

    def __init__(self, inputs: Tensor, outputs: Tensor, *, same: bool, bias: bool = True) -> None:
        super().__init__(len(inputs), len(outputs), bias=bias)
        self.register_buffer("inputs", inputs.clone())
        self.register_buffer("outputs", outputs.clone())
        self.same = same
        self._mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        mask = self._mask
        if mask is None or mask.device != self.weight.device or mask.dtype != self.weight.dtype:
            reads = self.inputs <= self.outputs[:, None] if self.same else self.inputs < self.outputs[:, None]
            mask = reads.to(self.weight.dtype)
            self._mask = None if mask.is_inference() else mask
        return linear(x, self.weight * mask, self.bias)


class Autoregressive(JointPrior):
    """Each unit given those of earlier groups, by a masked network of two layers (MADE).

    The network changes mean and dispersion of a negative binomial, the rate of a Poisson, or location and scale of a
    normal. It begins at the factorised prior. Samples are drawn group by group.

    Args:
        groups: number of groups G; units of one group are independent given the earlier ones.
        width: number of hidden units of each layer.

    Raises:
        ValueError: for fewer than one group or hidden unit.
        TypeError: for latents that are neither counts nor Gaussian.

    Reference: Germain et al., 2015.

    Example::

        >>> from pyro_nbvae.models import NegativeBinomialModel
        >>> prior = Autoregressive(groups=3)
        >>> model = NegativeBinomialModel((5,), latents=3, decoder="linear", prior=prior)
        >>> model.prior_distribution().log_prob(torch.ones(4, 3)).shape
        torch.Size([4])
    """

    lr_multiplier = NETWORK_LR_MULTIPLIER
    lr_decays = True
    group: Tensor

    def __init__(self, groups: int = 16, *, width: int = 512) -> None:
        super().__init__()
        _check_number("groups", groups)
        _check_number("width", width)
        self.groups, self.width = groups, width

    def setup(self, reference: Any) -> None:
        (units,) = reference.batch_shape
        self.used = min(self.groups, units)
        self.register_buffer("group", torch.arange(units) * self.used // units)
        self.heads = shift_of(reference).heads(reference)
        hidden = torch.arange(self.width) % max(1, self.used - 1)
        written = self.group.repeat(self.heads)
        self.read = MaskedLinear(self.group, hidden, same=True)
        self.mix = MaskedLinear(hidden, hidden, same=True)
        self.write = MaskedLinear(hidden, written, same=False)
        self.direct = MaskedLinear(self.group, written, same=False, bias=False)
        self.reset()

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *others: Any) -> None:
        # the shapes of the parameters do not depend on the number of groups
        there = state.get(f"{prefix}group")
        groups = self.used if there is None or there.is_meta else int(there.max()) + 1
        if groups != self.used:
            others[-1].append(f"{prefix}group: the units are in {groups} groups there, {self.used} here")
        super()._load_from_state_dict(state, prefix, *others)

    def reset(self) -> None:
        """Make every conditional distribution that of the reference."""
        for zero in (self.write.weight, self.write.bias, self.direct.weight):
            nn.init.zeros_(zero)

    def outputs(self, x: Tensor) -> Sequence[Tensor]:
        """Return the network's outputs for standardised values (..., K), one tensor of this shape for each head."""
        h = torch.relu(self.read(x))
        h = h + torch.relu(self.mix(h))
        return bounded(self.write(h) + self.direct(x)).chunk(self.heads, -1)

    def conditional(self, reference: Any, z: Tensor) -> TorchDistribution:
        """Return the distribution of each unit of z (..., K) given those of earlier groups, of batch shape (..., K)."""
        by = shift_of(reference)
        x = by.standardised(reference, z).to(self.write.weight.dtype)
        return by.conditional(reference, self.outputs(x))

    def forward(self, reference: Any) -> TiltedAutoregressive:
        return TiltedAutoregressive(reference, partial(self.conditional, reference), self.group, self.used)
