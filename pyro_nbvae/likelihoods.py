"""Likelihoods p(x | z), as distributions that are computed from a decoder's output.

A likelihood is a callable from the decoder's output, (..., *event_shape), to a distribution. Five are included; a model
accepts any other callable. The documentation of each states how it reads the output, and so what a decoder of your own
must return; the built-in decoders end in the layer that the likelihood chooses.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_nbvae import distributions
from pyro_nbvae.batching import Recording, is_image_shape, random_subset
from pyro_nbvae.distributions.elementwise import double
from pyro_nbvae.errors import InputError
from pyro_nbvae.networks.initialization import DataDependent
from pyro_nbvae.networks.outputs import CountOutput, ImageOutput, LogitOutput, Output, RealOutput, rates


class Likelihood(nn.Module, ABC):
    """Base class of likelihoods: from a decoder's output h to p(x | h), element by element.

    Attributes:
        loss_scale: factor of the ELBO in the loss of published runs; beta for the Gaussian likelihood, 1 for nats.
        discrete: whether observations are counts; built-in encoders read them as log(1 + x).
        observations: number of training observations, as far as it is known; a prior of parameters counts once for all.

    Example::

        >>> class Laplace(Likelihood):
        ...     def forward(self, h):
        ...         return dist.Laplace(h, 1.0)
        >>> Laplace()(torch.zeros(3)).batch_shape
        torch.Size([3])
    """

    loss_scale = 1.0
    discrete = False
    observations = 0

    def setup(self, event_shape: tuple[int, ...], covariates: int = 0) -> None:
        """Create parameters for observations of this shape; the model calls this before the likelihood is used.

        Args:
            event_shape: shape of one observation.
            covariates: number of covariates of the model; passed if there are some.
        """

    def log_prior(self) -> Tensor | None:
        """Return the log density of the prior of its parameters, up to a constant; None if they have none."""
        return None

    def decoded_shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of what a built-in decoder returns for one observation: that of h.

        Args:
            event_shape: shape of one observation.
        """
        return event_shape

    def output(self, event_shape: tuple[int, ...]) -> nn.Module:
        """Return the last layer of a built-in decoder: the identity, unless a subclass overrides this.

        Args:
            event_shape: shape of one observation.
        """
        return nn.Identity()

    @abstractmethod
    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return the distribution of x, of batch shape ``h.shape``.

        If the data have an exposure or covariates, they are passed by name, ``exposure=`` and ``covariates=``, to a
        likelihood whose ``forward`` has arguments of these names. A likelihood without ``exposure`` refuses such data.
        """


class Gaussian(Likelihood):
    r"""Gaussian likelihood, x ~ Normal(h, sqrt(beta / 2)): h is the mean.

    .. math:: -\beta \log p(x \mid h) = (x - h)^2 + \tfrac{\beta}{2} \log(\pi \beta)

    so that -beta * ELBO is the squared error + beta * KL + a constant: one nat of KL has the weight of a squared error
    of beta. For images, the built-in decoders end in a sigmoid, scaled to [0, 1] or to the range of the training data;
    otherwise they end in a linear layer.

    Args:
        beta: 2 sigma^2, positive, in squared units of the data.

    Raises:
        ValueError: for a beta that is not positive and finite.

    See also: docs/mathematics.md, section 1.3 (Likelihoods, beta and loss_scale).

    Example::

        >>> float(Gaussian(0.5)(torch.zeros(3)).variance[0])
        0.25
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        if not (beta > 0 and math.isfinite(beta)):
            raise InputError(f"beta must be positive, got {beta}")
        self.beta = float(beta)
        self.loss_scale = self.beta

    def output(self, event_shape: tuple[int, ...]) -> Output:
        return ImageOutput(event_shape) if is_image_shape(event_shape) else RealOutput(event_shape)

    def forward(self, h: Tensor, exposure: Tensor | None = None) -> distributions.IsotropicNormal:
        return distributions.IsotropicNormal(h if exposure is None else exposure * h, math.sqrt(self.beta / 2))

    def extra_repr(self) -> str:
        return f"beta={self.beta:g}"


class Bernoulli(Likelihood):
    """Bernoulli likelihood, x ~ Bernoulli(sigma(h)): h is the logit, x is 0 or 1.

    Example::

        >>> float(Bernoulli()(torch.zeros(3)).mean[0])
        0.5
    """

    discrete = True

    def output(self, event_shape: tuple[int, ...]) -> Output:
        return LogitOutput(event_shape)

    def forward(self, h: Tensor) -> distributions.LogitBernoulli:
        return distributions.LogitBernoulli(h)


# How a parameter of a count likelihood varies: one number; one of each neuron; one of each neuron and covariate; or an
# output of the decoder, of each neuron and observation.
Varies = Literal["shared", "neuron", "condition", "decoder"]
# Bound of log nu; mean and standard deviation of the priors of the unbounded log nu and of log r: without spikes a
# neuron is nearly a Poisson.
_MAX_LOG_NU = 3.0
_LOG_NU_PRIOR, _LOG_R_PRIOR = (0.0, 1.0), (3.0, 2.0)
# Bound of a fitted dispersion parameter; number of training counts that the initial one is fitted to, and tolerance.
_MAX_DISPERSION = 8.0
_FITTED_ELEMENTS, _TOLERANCE = 1 << 18, 0.02
# Decoder outputs of other parameters than the mean are multiplied by this: they begin near their initial value.
_DECODED_SCALE = 0.1


def _neurons(event_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of what is one for each neuron: the last axis of a recording, each element of an image."""
    return tuple(event_shape) if len(event_shape) == 3 else tuple(event_shape[-1:])


class _Varying(nn.Module):
    """A parameter of a count likelihood, a real number for each element of an observation.

    Args:
        by: how it varies (``Varies``).
        event_shape: shape of an observation.
        covariates: number of covariates.
        initial: its initial value.
    """

    def __init__(self, by: Varies, event_shape: tuple[int, ...], covariates: int, initial: float) -> None:
        super().__init__()
        self.by, self.initial = by, initial
        if by == "condition" and not covariates:
            raise InputError("a parameter of each condition needs a model with covariates: give covariates=")
        shape = () if by == "shared" else _neurons(event_shape)
        if by == "condition":
            shape = (covariates, *shape)
        if by != "decoder":
            self.value = nn.Parameter(torch.full(shape, initial))
        self.dims = len(event_shape)

    def forward(self, decoded: Tensor | None, covariates: Tensor | None) -> Tensor:
        """Return the parameter, which broadcasts with (..., *event_shape)."""
        if decoded is not None:
            return self.initial + _DECODED_SCALE * decoded
        if self.by != "condition":
            return self.value
        if covariates is None:
            raise InputError("this likelihood has a parameter of each condition: pass covariates=")
        found = torch.tensordot(covariates, self.value, 1)
        return found[:, None] if self.dims == 2 else found


class CountLikelihood(Likelihood, DataDependent):
    """Base class of likelihoods of counts x with mean m = e * softplus(h), where e is the exposure.

    Zero inflation: with probability pi a count is 0, else it is from the count distribution with mean m / (1 - pi), so
    that m is the mean of the mixture.

    ``model.initialize(data)``, or the first batch, sets the dispersion parameters to those of counts with the mean of
    each element, so that the latents only have to explain variability away.

    Args:
        dispersion: how the dispersion parameter varies: ``"shared"``, one number; ``"neuron"``, one for each neuron;
            ``"condition"``, one for each neuron and covariate, weighted by the covariates (one-hot labels); or
            ``"decoder"``, an output of the decoder. A neuron is an index of the last axis of recordings (neurons,) and
            (bins, neurons), or an element of an image.
        zero_inflation: the same for the logit of pi; None for no zero inflation.

    Raises:
        ValueError: for another word, and if it is called before :meth:`setup`.

    See also: docs/mathematics.md, section 1.4 (Likelihoods of counts).

    Example::

        >>> likelihood = NegativeBinomial(zero_inflation="neuron")
        >>> likelihood.setup((3,))
        >>> x = likelihood(torch.zeros(3), exposure=torch.tensor(2.0))
        >>> [round(m, 3) for m in x.mean.tolist()]
        [1.386, 1.386, 1.386]
    """

    discrete = True
    dispersed = True
    # Mean and standard deviation of the prior of dispersion parameters.
    dispersion_prior = (0.0, 1.0)
    # Probability of a zero of the mixture at first, as a logit.
    initial_gate = -2.0

    def __init__(self, dispersion: Varies = "neuron", *, zero_inflation: Varies | None = None) -> None:
        super().__init__()
        known = get_args(Varies)
        for name, by in (("dispersion", dispersion), ("zero_inflation", zero_inflation)):
            if by not in known and not (by is None and name == "zero_inflation"):
                raise InputError(f"{name} must be one of {', '.join(known)}, got {by!r}")
        self.varies = {"dispersion": dispersion} if self.dispersed else {}
        if zero_inflation is not None:
            self.varies["gate"] = zero_inflation
        self.event_shape: tuple[int, ...] | None = None
        self.conditions = 0

    @torch.no_grad()
    def initialize(self, data: Recording) -> None:
        self.observations = len(data)
        varying = getattr(self, "dispersion", None)
        if varying is None or varying.by == "decoder":
            return
        means = rates(data).clamp_min(0.5 / ((len(data) + 1) * data.mean_exposure))
        used = random_subset(data, max(50, _FITTED_ELEMENTS // math.prod(data.event_shape)))
        exposed = means if used.exposure is None else means * double(used.exposure)
        x, exposed = used.filled(0), exposed.expand(used.x.shape)
        mask = None if used.mask is None else used.mask.expand(x.shape)
        if data.x.dim() == 4:  # of an image each element is a neuron
            x, exposed = x.flatten(1), exposed.flatten(1)
            mask = None if mask is None else mask.flatten(1)
        fitted = fit_dispersion(self, x, exposed, shared=varying.by == "shared", mask=mask, tolerance=_TOLERANCE)
        if varying.by != "shared":
            fitted = fitted.reshape(_neurons(tuple(data.event_shape)))
        varying.value.copy_(fitted.expand(varying.value.shape))

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.initialized, self.observations], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        if not state.is_meta:
            self.initialized, self.observations = bool(state[0]), int(state[1])

    def of_mean(self, means: Tensor, dispersion: Tensor | None) -> dist.TorchDistribution:
        """Return the count distribution with these means, positive, and this dispersion parameter."""
        # h is 0, softplus(h) log 2
        return self.counts(torch.zeros_like(means), dispersion, means.log() - math.log(math.log(2)))

    def log_prior_of(self, a: Tensor) -> Tensor:
        """Return the log density of the prior of dispersion parameters, up to a constant, summed."""
        mean, stddev = self.dispersion_prior
        return -0.5 * ((a - mean) / stddev).square().sum()

    def log_prior(self) -> Tensor | None:
        varying = getattr(self, "dispersion", None)
        return None if varying is None or varying.by == "decoder" else self.log_prior_of(varying.value)

    @property
    def axis(self) -> int:
        """The axis along which a decoder's outputs of several parameters stand one after the other."""
        return -3 if self.event_shape is not None and len(self.event_shape) == 3 else -1

    def setup(self, event_shape: tuple[int, ...], covariates: int = 0) -> None:
        event_shape = tuple(event_shape)
        if self.event_shape is None:
            self.event_shape, self.conditions = event_shape, covariates
            initial = {"dispersion": 0.0, "gate": self.initial_gate}
            for name, by in self.varies.items():
                setattr(self, name, _Varying(by, event_shape, covariates, initial[name]))
            return
        known, given = (self.event_shape, self.conditions), (event_shape, covariates)
        for what, before, now in zip(("observations of shape", "a number of covariates of"), known, given, strict=True):
            if before != now:
                raise InputError(f"this likelihood is set up for {what} {before}, got {now}: use another one")

    def decoded_shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        number = 1 + sum(by == "decoder" for by in self.varies.values())
        shape = list(event_shape)
        shape[-3 if len(shape) == 3 else -1] *= number
        return tuple(shape)

    def output(self, event_shape: tuple[int, ...]) -> nn.Module:
        return CountOutput(event_shape, self.axis)

    @abstractmethod
    def counts(self, h: Tensor, dispersion: Tensor | None, log_factor: Tensor | None) -> dist.TorchDistribution:
        """Return the count distribution with mean e^log_factor softplus(h)."""

    def forward(
        self, h: Tensor, exposure: Tensor | None = None, covariates: Tensor | None = None
    ) -> dist.TorchDistribution:
        """Return the distribution of x.

        Args:
            h: the decoder's output, (..., *event_shape), with further parameters behind it along the last axis
                (channels of images) if they are from the decoder.
            exposure: positive factor of the mean; broadcasts with an observation. Default: 1.
            covariates: (B, C), for parameters of each condition.
        """
        if self.event_shape is None:
            if self.varies:
                raise InputError("this likelihood has no parameters yet: call setup(event_shape), as a new model does")
            parts = [h]
        else:
            parts = list(h.split(self.event_shape[self.axis], self.axis))
        h, decoded = parts[0], iter(parts[1:])
        own = {
            name: getattr(self, name)(next(decoded) if by == "decoder" else None, covariates)
            for name, by in self.varies.items()
        }
        log_factor = None if exposure is None else exposure.log()
        gate = own.get("gate")
        if gate is not None:  # log(1 / (1 - pi))
            log_factor = softplus(gate) if log_factor is None else log_factor + softplus(gate)
        counts = self.counts(h, own.get("dispersion"), log_factor)
        return counts if gate is None else dist.ZeroInflatedDistribution(counts, gate_logits=gate.expand(h.shape))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={by}" for name, by in self.varies.items())


class Poisson(CountLikelihood):
    """Poisson likelihood for counts x, x ~ Poisson(e softplus(h)), with exposure e.

    The rate approaches e^h for very negative h and h for large h: it grows linearly, whereas e^h would overflow for
    large latents.

    Args:
        zero_inflation: as :class:`CountLikelihood`.

    Example::

        >>> round(float(Poisson()(torch.zeros(3)).mean[0]), 3)
        0.693
    """

    dispersed = False

    def __init__(self, *, zero_inflation: Varies | None = None) -> None:
        super().__init__(zero_inflation=zero_inflation)

    def counts(self, h: Tensor, dispersion: Tensor | None, log_factor: Tensor | None) -> distributions.SoftplusPoisson:
        return distributions.SoftplusPoisson(h, log_factor)


class NegativeBinomial(CountLikelihood):
    """Negative binomial likelihood for counts x, with mean m = e softplus(h), exposure e and variance m + m^2 / r.

    ``dispersion.value`` is log r, with the weak prior log r ~ Normal(3, 2) for each number, which counts once for the
    whole training set: a neuron without spikes is nearly a Poisson. Before it is initialised from data, r is 1. An
    exposure leaves r unchanged.

    Args:
        dispersion, zero_inflation: as :class:`CountLikelihood`.

    Raises:
        ValueError: as :class:`CountLikelihood`.

    Example::

        >>> likelihood = NegativeBinomial()
        >>> likelihood.setup((3,))
        >>> x = likelihood(torch.zeros(3))
        >>> torch.allclose(x.variance, x.mean + x.mean**2)
        True
    """

    dispersion_prior = _LOG_R_PRIOR

    def counts(
        self, h: Tensor, dispersion: Tensor | None, log_factor: Tensor | None
    ) -> distributions.SoftplusNegativeBinomial:
        assert dispersion is not None
        return distributions.SoftplusNegativeBinomial(h, dispersion, log_factor)

    def dispersions(self) -> Tensor:
        """Return r, without a gradient: (), (neurons,) or (covariates, neurons)."""
        return self.dispersion.value.detach().exp()  # type: ignore[union-attr, operator]


class ConwayMaxwellPoisson(CountLikelihood):
    r"""COM-Poisson likelihood for counts x of any dispersion, with mean m = e softplus(h) and exposure e.

    The dispersion parameter :math:`\nu` is above 1 for underdispersed counts. It is :math:`\log \nu = 3 \tanh(a / 3)`,
    between -3 and 3, and has a weak prior, a ~ Normal(0, 1) for each number: without it, :math:`\nu` of a neuron that
    never has more than one spike in a bin is not identified by the data (:attr:`identified`), and would grow to the
    bound. The prior counts once for the whole training set. A :math:`\nu` from the decoder has no prior.

    Args:
        dispersion, zero_inflation: as :class:`CountLikelihood`.

    Raises:
        ValueError: as :class:`CountLikelihood`.

    Reference: Huang, 2017 (the mean as a parameter).

    Example::

        >>> likelihood = ConwayMaxwellPoisson()
        >>> likelihood.setup((2,))
        >>> likelihood.dispersion.value.data = torch.tensor([-1.0, 1.0])
        >>> x = likelihood(torch.zeros(2))
        >>> [round(v, 3) for v in (x.variance / x.mean).tolist()]
        [1.312, 0.633]
    """

    identified: Tensor
    dispersion_prior = _LOG_NU_PRIOR

    def setup(self, event_shape: tuple[int, ...], covariates: int = 0) -> None:
        new = self.event_shape is None
        super().setup(event_shape, covariates)
        if new:
            # whether a neuron has two spikes in a bin of the training data
            self.register_buffer("identified", torch.ones(_neurons(event_shape), dtype=torch.bool))

    @torch.no_grad()
    def initialize(self, data: Recording) -> None:
        super().initialize(data)
        x = data.filled(0)
        most = x.amax(0) if self.identified.dim() == x.dim() - 1 else x.flatten(0, -2).amax(0)
        self.identified.copy_(most >= 2)

    def counts(
        self, h: Tensor, dispersion: Tensor | None, log_factor: Tensor | None
    ) -> distributions.SoftplusConwayMaxwellPoisson:
        assert dispersion is not None
        return distributions.SoftplusConwayMaxwellPoisson(h, _bounded_log_nu(dispersion), log_factor)

    def dispersions(self) -> Tensor:
        """Return nu, without a gradient: (), (neurons,) or (covariates, neurons)."""
        return _bounded_log_nu(self.dispersion.value.detach()).exp()  # type: ignore[union-attr, operator]


def _bounded_log_nu(a: Tensor) -> Tensor:
    return _MAX_LOG_NU * torch.tanh(a / _MAX_LOG_NU)


def fit_dispersion(
    likelihood: CountLikelihood,
    counts: Tensor,
    means: Tensor,
    *,
    shared: bool = False,
    mask: Tensor | None = None,
    tolerance: float = 1e-4,
) -> Tensor:
    """Fit the dispersion parameter of a count likelihood to counts with known means, by maximum a posteriori.

    Args:
        likelihood: a :class:`NegativeBinomial` or :class:`ConwayMaxwellPoisson`, which defines the parameter and its
            prior.
        counts: (N, ..., neurons).
        means: positive, of the same shape.
        shared: whether all neurons have one parameter.
        mask: True where a count was observed.
        tolerance: of the parameter.

    Returns:
        The parameter on the likelihood's own scale, (neurons,) or (), in float64: log r, or the unbounded log nu.

    Raises:
        InputError: for means and counts at which the likelihood has no finite derivative.

    Example::

        >>> x = torch.distributions.Binomial(4, torch.full((4000, 1), 0.5)).sample()
        >>> fitted = fit_dispersion(ConwayMaxwellPoisson(), x, torch.full_like(x, 2.0))
        >>> bool(fitted > 0.3)  # underdispersed
        True
    """
    x, m = double(counts), double(means)
    if mask is not None:  # a mean without a count may be anything
        x, m = x.masked_fill(~mask, 0), m.masked_fill(~mask, 1)
    low = x.new_full(() if shared else x.shape[-1:], -_MAX_DISPERSION)
    high = -low
    while float((high - low).max()) > tolerance:
        a = (0.5 * (low + high)).requires_grad_()
        with torch.enable_grad(), pyro.validation_enabled(False):
            log_mass = likelihood.of_mean(m, a).log_prob(x)
            if mask is not None:
                log_mass = log_mass.masked_fill(~mask, 0)
            (slope,) = torch.autograd.grad(log_mass.sum() + likelihood.log_prior_of(a), a)
        if not bool(slope.isfinite().all()):
            raise InputError("no dispersion fits: counts must be finite, and means positive and below 2^20")
        a = a.detach()
        low, high = torch.where(slope > 0, a, low), torch.where(slope > 0, high, a)
    return 0.5 * (low + high)


# Names in configurations and on the command line.
LIKELIHOODS: dict[str, type[Likelihood]] = {
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
    "com_poisson": ConwayMaxwellPoisson,
}
