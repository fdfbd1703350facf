"""Base classes of models and guides: the batch plate, the observation, and the bounds of the encoder's outputs.

A family's model file defines a prior and :meth:`GenerativeModel.factorised_prior`; its guide file defines
:meth:`AmortizedGuide.posterior_from`. This module contains everything else.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution, constraints, is_validation_enabled
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK, am_i_wrapped
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_nbvae.batching import (
    Batch,
    Observations,
    Recording,
    evaluation_batches,
    is_pixels,
    random_subset,
    to_floats,
)
from pyro_nbvae.distributions import Integer, Relaxation
from pyro_nbvae.distributions.bounds import bounded
from pyro_nbvae.distributions.relaxations.base import check_relaxation, followed
from pyro_nbvae.errors import InputError
from pyro_nbvae.infer.elbo import PARAMETER_PRIOR
from pyro_nbvae.likelihoods import Gaussian, Likelihood
from pyro_nbvae.networks import build_decoder, build_encoder
from pyro_nbvae.networks.initialization import evaluation_mode, initialize
from pyro_nbvae.networks.outputs import Decoder, per_exposure
from pyro_nbvae.priors import JointPrior
from pyro_nbvae.seeds import stream_seed


def _check_shape(x: Tensor, event_shape: torch.Size) -> None:
    """Raise InputError unless ``x`` has shape (N, *event_shape)."""
    if x.dim() != 1 + len(event_shape) or x.shape[1:] != event_shape:
        want = ", ".join(map(str, ("N", *event_shape)))
        raise InputError(f"data have shape {tuple(x.shape)}: expected ({want})")


def _check_batch(x: Tensor, event_shape: torch.Size, network: nn.Module) -> None:
    """Raise InputError unless ``x`` has shape (N, *event_shape) and the dtype of a network's parameters."""
    _check_shape(x, event_shape)
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), x.dtype)
    if x.dtype != dtype:
        raise InputError(f"data have dtype {x.dtype}: expected {dtype}, as the network; for pixels pass x / 255")


def _batch_plate(data_size: int | None, size: int, device: torch.device) -> pyro.plate:
    """Return the plate of a batch of ``size`` observations; with ``data_size`` the batch represents that many."""
    if not 0 < size <= (data_size or size):
        largest = "" if data_size is None else f" and at most data_size={data_size}"
        raise InputError(f"a batch must have at least one observation{largest}, got {size}")
    return pyro.plate("batch", data_size or size, subsample=torch.arange(size, device=device), dim=-1)


def _over_event(distribution: TorchDistribution, shape: torch.Size) -> TorchDistribution:
    """Return a distribution over events with as many dimensions as ``shape``; a joint one may have them already."""
    return distribution.to_event(max(0, len(shape) - len(distribution.event_shape)))


def _sample_parameters(module: nn.Module) -> None:
    """Sample the parameters with a fixed prior (PyroSample) outside of the batch plate, once for all observations.

    A prior that is a function may depend on the observation: it is sampled where it is read.
    """
    for part in module.modules():
        for name, prior in part._pyro_samples.items() if isinstance(part, PyroModule) else ():
            if isinstance(prior, Distribution):
                getattr(part, name)  # Pyro stores it until the model's call ends


def _training_data(data: Batch, event_shape: torch.Size) -> Recording:
    """Return data for the initialisation, as a model takes them: a random subset that fits into memory.

    The observations with the smallest and the largest observed value, per exposure, are among them.

    Raises:
        InputError: for data of another shape, without an observation, or with observed values that are not finite.
    """
    data = Recording.of(data)
    _check_shape(data.x, event_shape)
    used = random_subset(data, max(1000, 2**25 // max(1, math.prod(event_shape))))
    if len(used) < len(data):
        low = high = per_exposure(data)
        if data.mask is not None:
            low, high = (low.float().masked_fill(~data.mask, end) for end in (math.inf, -math.inf))
        extremes = [int(low.flatten(1).amin(1).argmin()), int(high.flatten(1).amax(1).argmax())]
        used = Recording.cat([used, data[extremes]])
    if not len(used) or not bool(used.filled().isfinite().all()):
        raise InputError(f"training data need at least one observation and finite values, got {len(data)} observations")
    # a network takes them in its own dtype
    return Recording(to_floats(used.x), **used.given) if is_pixels(used.x) else used


def _in_svi_step() -> bool:
    """Whether ``SVI.step`` runs: it records the parameters of the program, which it is about to train."""
    return any(isinstance(handler, TraceMessenger) and handler.param_only for handler in _PYRO_STACK)


class _OwnParameters(Messenger):
    """Raises InputError if Pyro's store holds another tensor under the name of a module's parameter.

    ``SVI.step`` would train that tensor, and silently leave the module unchanged.
    """

    def _pyro_post_param(self, msg: Any) -> None:
        own = msg["args"][1] if len(msg["args"]) > 1 else None
        held = msg["value"]
        if isinstance(own, nn.Parameter) and held is not own and held.data_ptr() != own.data_ptr():
            name = msg["name"].replace("$$$", ".")
            raise InputError(
                f"Pyro's parameter store holds another {name}, of another model: call pyro.clear_param_store() before "
                "a second model is trained; to store a trained pair, save its state_dict (docs/programs.md, Saving and "
                "loading); copy a guide together with its model"
                if own.is_contiguous()
                else f"the parameter {name} is not contiguous, so Pyro's store would train a copy of it: call "
                ".contiguous() before the module is used"
            )


class _Program(PyroModule):
    """Base class of models and guides."""

    mixed_precision = False

    def _trains(self) -> bool:
        """Whether a call is part of training: in training mode, with gradients."""
        return self.training and torch.is_grad_enabled()

    def _network_precision(self, x: Tensor) -> AbstractContextManager[object]:
        """Context for a network: bfloat16 multiplications in training if ``mixed_precision`` is set.

        Otherwise the caller's autocast remains in effect.
        """
        mixed = self.mixed_precision and self.training
        return torch.autocast(x.device.type, torch.bfloat16) if mixed else nullcontext()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _OwnParameters() if _in_svi_step() else nullcontext():
            return super().__call__(*args, **kwargs)


class StandardPrior(nn.Module):
    """A prior without learned parameters: ``zeros`` of the latents' shape, on the model's device."""

    _place: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("_place", torch.empty(0), persistent=False)

    @property
    def zeros(self) -> Tensor:
        return self._place.new_zeros(self.shape)


class CountPrior(nn.Module, ABC):
    """Base class of learned priors over counts. Guides of several families scale its mean to that of the posterior.

    See also: docs/mathematics.md, section 2.5 (From the prior to the posterior).

    Example::

        >>> from pyro_nbvae.models import PoissonModel
        >>> prior = PoissonModel((5,), latents=3, decoder="linear").prior
        >>> prior.initialize(2.0)
        >>> [round(mean, 4) for mean in prior.mean.tolist()]
        [2.0, 2.0, 2.0]
    """

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """The mean count of each unit, (K,)."""

    @abstractmethod
    def initialize(self, mean: float) -> None:
        """Set the mean count of every unit; the model calls this when it is constructed."""


class GenerativeModel(_Program):
    r"""Base class of generative models: latents from the family's prior, observations from the likelihood.

    .. math:: z \sim p(z), \qquad x \sim p(x \mid z) = \mathrm{likelihood}(\mathrm{decoder}(z))

    Sites: latent ``z`` (B, *latent_shape), observation ``x`` (B, *event_shape), plate ``batch``. A family's
    ``prior_class`` is the module that holds the parameters of the factorised prior; it is constructed from the latent
    shape. A joint prior tilts the factorised one, which guides and decoders go on reading. If ``mixed_precision`` is
    set, the decoder multiplies in bfloat16 during training; densities remain in full precision.

    The arguments ``mask``, ``exposure`` and ``covariates`` of a call are those of
    :class:`~pyro_nbvae.batching.Recording`. With covariates c, both programs are conditional on them: the decoder reads
    (z, c), the encoder (x, c), and the prior does not depend on c.

    Args:
        event_shape: shape of one observation; for an image (channels, height, width), for recordings (neurons,) or
            (bins, neurons).
        latents: number of latents K.
        decoder: a module from latents (B, K + covariates) to the output that the likelihood reads, (B, *event_shape)
            for those of :mod:`pyro_nbvae.likelihoods`; or ``"conv"`` (images only), ``"mlp"``, ``"linear"``, or
            ``"temporal"`` or ``"temporal_bins"`` for observations (bins, neurons).
        likelihood: a callable from the decoder's output to a distribution over observations. Default: Gaussian(1).
        data_size: number of observations in the data set of which a batch is a subsample; None if a batch is all data.
        latent_shape: shape of z. Default: (latents,); a family may arrange its K numbers in another way.
        prior: a :class:`~pyro_nbvae.priors.JointPrior`, such as :class:`~pyro_nbvae.priors.Mixture`, of this model
            alone. Default: the latents are independent.
        covariates: number of covariates C. Default: 0.

    Raises:
        ValueError: for fewer than one latent or 0 covariates, an unknown decoder, or ``"conv"`` for data that are not
            images.
        TypeError: for a likelihood that is no callable, and for a joint prior of a family that has none, or whose class
            overrides :meth:`prior_distribution`.

    See also: docs/mathematics.md, section 1.1 (The objective).

    Example::

        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> z, mean = model.generate(4)
        >>> z.shape, mean.shape
        (torch.Size([4, 3]), torch.Size([4, 5]))
    """

    prior_class: Callable[..., nn.Module] = StandardPrior
    prior: Any

    def __init__(
        self,
        event_shape: tuple[int, ...],
        latents: int = 256,
        *,
        decoder: str | nn.Module = "conv",
        likelihood: Callable[[Tensor], TorchDistribution] | None = None,
        data_size: int | None = None,
        latent_shape: tuple[int, ...] | None = None,
        prior: JointPrior | None = None,
        covariates: int = 0,
    ) -> None:
        super().__init__()
        if latents < 1:
            raise InputError(f"latents must be at least 1, got {latents}")
        if covariates < 0:
            raise InputError(f"covariates must be at least 0, got {covariates}")
        if likelihood is not None and not callable(likelihood):
            raise TypeError(f"likelihood must be callable, such as likelihoods.Poisson(), got {likelihood!r}")
        self.covariates = covariates
        self.event_shape = torch.Size(event_shape)
        self.latents = latents
        self.latent_shape = torch.Size(latent_shape or (latents,))
        self.data_size = data_size
        self.likelihood = Gaussian() if likelihood is None else likelihood
        output: nn.Module = nn.Identity()
        decoded_shape = tuple(event_shape)
        if isinstance(self.likelihood, Likelihood):
            self.likelihood.setup(tuple(event_shape), *([covariates] if covariates else []))
            output = self.likelihood.output(tuple(event_shape))
            decoded_shape = self.likelihood.decoded_shape(tuple(event_shape))
        if isinstance(decoder, str):
            decoder = build_decoder(decoder, decoded_shape, latents, output, covariates)
        self.decoder = decoder
        self.prior = self.prior_class(*self.latent_shape)
        self.set_joint_prior(prior)

    def set_joint_prior(self, prior: JointPrior | None) -> None:
        """Replace the joint prior, or make the latents independent with None.

        Args:
            prior: a joint prior, as in the constructor, or one that was fitted
                (:func:`~pyro_nbvae.sampling.fit_prior`).

        Raises:
            TypeError: as the class.
        """
        if prior is not None:
            if not isinstance(prior, JointPrior):
                raise TypeError(f"prior must be a JointPrior, such as Mixture(100), got a {type(prior).__name__}")
            if type(self).prior_distribution is not GenerativeModel.prior_distribution:
                raise TypeError(
                    f"{type(self).__name__} has a prior_distribution of its own and takes no joint prior: rename it "
                    "factorised_prior if its latents are independent"
                )
            with pyro.validation_enabled(False):  # on the meta device there are no values to check
                prior.setup_once(self.factorised_prior())
        self.joint_prior = prior

    @property
    def unit_interval(self) -> bool:
        """Whether observations must be in [0, 1], because a built-in decoder ends in a sigmoid with this range."""
        return any(part.unit_interval for part in self.decoder.modules() if isinstance(part, Decoder))

    def initialize(self, data: Batch) -> None:
        """Initialise a built-in decoder at the mean of training data, in the likelihood's own terms.

        Without this call, the first batch of training initialises it: the first call in training mode with gradients
        enabled. Other decoders are not changed. A likelihood with a prior of its parameters counts it once for as many
        observations as these are.

        Args:
            data: (N, *event_shape), as a data set holds them, or a :class:`~pyro_nbvae.batching.Recording`.

        Raises:
            InputError: for data of another shape, without an observation, or with values that are not finite.

        Example::

            >>> from pyro_nbvae.likelihoods import Poisson
            >>> from pyro_nbvae.models import PoissonModel
            >>> model = PoissonModel((2,), latents=3, decoder="linear", likelihood=Poisson())
            >>> model.initialize(torch.tensor([[0, 1000], [4, 3000]]))
            >>> with torch.no_grad():
            ...     means = model.observation(model.prior.mean).mean
            >>> bool((means / torch.tensor([2, 2000]) - 1 < 3).all())
            True
        """
        self._initialize(_training_data(data, self.event_shape), again=True)
        if isinstance(self.likelihood, Likelihood):
            self.likelihood.observations = len(data)

    def _initialize(self, data: Recording, again: bool) -> None:
        likelihood = self.likelihood
        initialize(self.decoder, data, again=again)
        if isinstance(likelihood, nn.Module):
            initialize(likelihood, data, again=again)

    @property
    def device(self) -> torch.device:
        """Device of its parameters and buffers; the CPU if it has none."""
        return next((t.device for t in chain(self.parameters(), self.buffers())), torch.device("cpu"))

    @property
    def loss_scale(self) -> float:
        """Factor of the ELBO in the loss of published runs: beta for a Gaussian likelihood, else 1."""
        return float(getattr(self.likelihood, "loss_scale", 1.0))

    def to_input(self, data: Batch) -> Recording:
        """Return a batch as the model takes it: on its device and in its dtype, pixels scaled to [0, 1].

        Args:
            data: (B, *event_shape), as a data set holds them, or a recording. Values that were not observed become 1.
        """
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())
        data = Recording.of(data).to(self.device)
        x = to_floats(data.x) if is_pixels(data.x) else data.x
        given = {name: part if name == "mask" else part.to(dtype) for name, part in data.given.items()}
        return Recording(Recording(x.to(dtype), data.mask).filled(), **given)

    def input_batches(self, data: Observations, what: str = "data", progress: bool = False) -> Iterator[Recording]:
        """Iterate over data in batches of one size, converted by :meth:`to_input` and checked by :meth:`check_support`.

        Args:
            data: (N, *event_shape), as a data set holds them, a :class:`~pyro_nbvae.batching.Recording`, or a
                DataLoader, of which a batch is such a tensor or recording, or a tuple whose first element is one.
            what: name of the data for the progress bar and for errors.
            progress: show a progress bar.

        Raises:
            InputError: as :meth:`check_support`, and for data without an observation.
        """
        for batch in evaluation_batches(data, what, progress):
            converted = self.to_input(batch)
            self.check_support(converted)
            yield converted

    @torch.no_grad()
    def check_support(self, data: Batch, what: str = "data") -> None:
        """Check that observations have the model's event shape and are in the support of its likelihood.

        Args:
            data: (B, *event_shape), floating point.
            what: name of the observations for the error.

        Raises:
            InputError: if they do not, or are not; and for exposures that are not positive, and covariates that are
                missing, not finite or of another number than the model's.
        """
        data = Recording.of(data).to(self.device)
        _check_shape(data.x, self.event_shape)
        data.check(what)
        covariates = self._checked_covariates(data.covariates)
        x = Recording(per_exposure(data) if self.unit_interval else data.x, data.mask).filled()
        if self.unit_interval:
            support: Any = constraints.unit_interval
            advice = "[0, 1]: scale them, or call model.initialize(data) with the training data if their range is wider"
        else:
            # any latents will do; in evaluation mode, because batch normalisation in training mode needs several
            with (
                torch.random.fork_rng([self.device] if self.device.type == "cuda" else []),
                evaluation_mode(self),
                pyro.validation_enabled(False),
            ):
                z = self.prior_distribution().sample(torch.Size([1]))
                observed = self.observation(z, covariates=None if covariates is None else covariates[:1])
            support = getattr(observed, "support", None)
            advice = (
                f"the support of {type(self.likelihood).__name__}: choose another likelihood or prepare the data "
                "(Bernoulli needs 0 and 1, such as pixels > 127; the likelihoods of counts need counts)"
            )
        if support is not None and not bool(support.check(x).all()):
            seen = x if data.mask is None else x[data.mask.expand(x.shape)]
            what += " per exposure" if self.unit_interval and data.exposure is not None else ""
            raise InputError(f"{what} lie in [{float(seen.min()):.3g}, {float(seen.max()):.3g}] and not in {advice}")

    def _checked_covariates(self, covariates: Tensor | None) -> Tensor | None:
        """Raise InputError unless there are as many covariates as the model has."""
        number = 0 if covariates is None else covariates.shape[-1]
        if number != self.covariates:
            raise InputError(
                f"the model has {self.covariates} covariates, got {number}: "
                + ("pass covariates=, (batch, covariates)" if self.covariates else "leave covariates out")
            )
        return covariates

    def factorised_prior(self) -> TorchDistribution:
        """Return the prior of independent latents, batch shape (K,), to which the posterior is relative.

        It is p(z), or the reference of a joint prior.
        """
        raise NotImplementedError

    def prior_distribution(self) -> TorchDistribution:
        """Return p(z): batch shape (K,), or event shape (K,) with a joint prior."""
        reference = self.factorised_prior()
        return reference if self.joint_prior is None else self.joint_prior(reference)

    def decode(self, z: Tensor, covariates: Tensor | None = None) -> Tensor:
        """Decode latents (..., *latent_shape) to (..., *event_shape), or to the shape that the likelihood reads.

        Args:
            z: latents.
            covariates: (B, C), if the model has covariates; they broadcast with the leading dimensions of z.
        """
        leading = z.shape[: z.dim() - len(self.latent_shape)]
        flat = z.reshape(-1, self.latents)
        if self._checked_covariates(covariates) is not None:
            assert covariates is not None
            c = covariates.to(flat).expand(*leading, self.covariates).reshape(-1, self.covariates)
            flat = torch.cat([flat, c], -1)
        with self._network_precision(z):
            h = self.decoder(flat)
        return h.to(z.dtype).reshape(*leading, *h.shape[1:])

    def observation(
        self,
        z: Tensor,
        *,
        mask: Tensor | None = None,
        exposure: Tensor | float | None = None,
        covariates: Tensor | None = None,
    ) -> TorchDistribution:
        """Return p(x | z) for latents (..., *latent_shape): a distribution of event shape (*event_shape).

        Args:
            z: latents.
            mask: True where a value was observed, as of :class:`~pyro_nbvae.batching.Recording`; ``log_prob`` is that
                of these values.
            exposure: positive factor of the mean, as there.
            covariates: (B, C), if the model has covariates.

        Raises:
            InputError: if observations of decoder and likelihood have another shape, for a mask of a likelihood whose
                elements are not independent, and for an exposure of a likelihood that takes none.
        """
        if isinstance(exposure, int | float):
            exposure = torch.as_tensor(float(exposure)).to(z)
        mask, exposure = (self._of_observations(part) for part in (mask, exposure))
        known = {"exposure": exposure, "covariates": covariates}
        known = {name: part for name, part in known.items() if part is not None}
        if known:
            taken = inspect.signature(getattr(self.likelihood, "forward", self.likelihood)).parameters
            if exposure is not None and "exposure" not in taken:
                raise InputError(f"{type(self.likelihood).__name__} takes no exposure: use a likelihood of counts")
            known = {name: part for name, part in known.items() if name in taken}
        decoded = self.decode(z) if covariates is None else self.decode(z, covariates)
        observed = self.likelihood(decoded, **known)
        if mask is not None:
            if observed.event_shape:
                raise InputError(
                    f"{type(self.likelihood).__name__} has no mask of elements, because they are not independent"
                )
            observed = observed.mask(mask)
        observed = _over_event(observed, self.event_shape)
        if observed.event_shape != self.event_shape:
            raise InputError(
                f"decoder and likelihood make observations of shape {tuple(observed.event_shape)}: the model's "
                f"event_shape is {tuple(self.event_shape)}"
            )
        return observed

    def _of_observations(self, part: Tensor | None) -> Tensor | None:
        """Return a mask or an exposure; one of each observation, (B,), as (B, 1, ...)."""
        return part if part is None or part.dim() != 1 else part.reshape(-1, *(1 for _ in self.event_shape))

    def forward(
        self,
        x: Tensor | None = None,
        size: int = 1,
        *,
        mask: Tensor | None = None,
        exposure: Tensor | None = None,
        covariates: Tensor | None = None,
    ) -> Tensor:
        """Run the generative program on a batch and return ``z``, (B, *latent_shape).

        Args:
            x: observations (B, *event_shape); with None, ``size`` observations are sampled from the prior predictive.
            size: number of observations if ``x`` is None.
            mask, exposure, covariates: as :class:`~pyro_nbvae.batching.Recording`.

        Raises:
            InputError: for observations of another shape or dtype, more than ``data_size``, and, with validation on,
                outside [0, 1] if they must be inside; in ``SVI.step``, if Pyro's store holds other parameters; and as
                :meth:`observation`.
        """
        device = self.device
        if x is not None:
            data = Recording(x, mask, exposure, covariates)
            x, mask, exposure = data.filled(), data.mask, data.exposure
            _check_batch(x, self.event_shape, self.decoder)
            if is_validation_enabled():
                data.check()
                if self.unit_interval and len(x):
                    self.check_support(data, "images")
                if not bool(x.isfinite().all()):
                    raise InputError("data hold NaN or infinite values: give mask=, True where a value was observed")
            if self._trains():
                self._initialize(data, again=False)
            size, device = len(x), x.device
        _sample_parameters(self)
        with _batch_plate(self.data_size, size, device):
            z = pyro.sample("z", _over_event(self.prior_distribution(), self.latent_shape))
            observed = self.observation(z, mask=mask, exposure=exposure, covariates=covariates)
            pyro.sample("x", observed, obs=x)
        if x is not None and am_i_wrapped():  # inference takes it; elsewhere Pyro would warn of an observation
            self._parameter_prior(size)
        return z

    def _parameter_prior(self, size: int) -> None:
        """Add the likelihood's prior of its parameters, once for all data, of which a batch is a part."""
        likelihood = self.likelihood
        if not isinstance(likelihood, Likelihood):
            return
        log_prior = likelihood.log_prior()
        if log_prior is not None:
            share = 1.0 if self.data_size else size / max(size, likelihood.observations)
            pyro.factor(PARAMETER_PRIOR, share * log_prior)

    @torch.no_grad()
    def generate(
        self, count: int, *, exposure: Tensor | float | None = None, covariates: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sample latents from the prior and return them with the means of their observations.

        Args:
            count: number of samples N.
            exposure: as :class:`~pyro_nbvae.batching.Recording`. Default: 1.
            covariates: (N, C), or (1, C) for one condition, if the model has covariates.

        Returns:
            ``(z, mean)``: latents (N, *latent_shape), integers for count families, and means (N, *event_shape).
        """
        if covariates is not None and len(covariates) not in (1, count):
            raise InputError(f"covariates have {len(covariates)} rows: expected {count}, or one for all samples")
        z = self.prior_distribution().sample(torch.Size([count]))
        return z, self.observation(z, exposure=exposure, covariates=covariates).mean


class CountModel(GenerativeModel):
    r"""Base class of models whose latents are counts with a learned prior.

    The decoder reads standardized counts (:meth:`standardize`):

    .. math:: x \sim \mathrm{likelihood}(\mathrm{decoder}((z - \mathrm{E}_p[z]) / s))

    Args:
        prior_mean: initial mean count of each unit, positive. The larger it is, the finer is the resolution of counts.
        event_shape, latents, prior, **options: as :class:`GenerativeModel`.

    Raises:
        ValueError: as :class:`GenerativeModel`, and for a mean that is not positive and finite.

    See also: docs/mathematics.md, sections 7.3 (Standardized counts) and 8 (The prior's start and pace).

    Example::

        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear", prior_mean=2.0)
        >>> [round(mean, 4) for mean in model.prior.mean.tolist()]
        [2.0, 2.0, 2.0]
    """

    prior: CountPrior
    initial_stddev: Tensor

    def __init__(
        self,
        event_shape: tuple[int, ...],
        latents: int = 256,
        *,
        prior_mean: float = 20.0,
        prior: JointPrior | None = None,
        **options: Any,
    ) -> None:
        if not torch.finfo(torch.float32).tiny <= prior_mean < math.inf:
            raise InputError(f"prior_mean must be positive and finite, got {prior_mean}")
        super().__init__(event_shape, latents, **options)
        self.prior.initialize(prior_mean)
        self.set_joint_prior(prior)  # relative to the initial mean
        meta = self.prior.mean.is_meta  # no values: they are loaded later
        stddev = torch.empty(self.latent_shape) if meta else self.factorised_prior().variance.detach().sqrt()
        self.register_buffer("initial_stddev", stddev)

    def standardize(self, z: Tensor) -> Tensor:
        r"""Return what the decoder reads, :math:`(z - \mathrm{E}_p[z]) / s`, for counts z (..., *latent_shape).

        s is the prior's standard deviation at initialisation. The decoder's input is therefore distributed like that of
        a Gaussian VAE at first, and its mean remains 0 while the prior learns. For a decoder that reads the counts
        themselves, override this method: ``return z``.
        """
        return (z - self.prior.mean) / self.initial_stddev

    def decode(self, z: Tensor, covariates: Tensor | None = None) -> Tensor:
        """Decode counts (..., *latent_shape), standardized, to (..., *event_shape) or what the likelihood reads."""
        return super().decode(self.standardize(z), covariates)


class AmortizedGuide(_Program):
    """Base class of amortised guides q(z | x): an encoder's bounded outputs shift the model's prior to the posterior.

    A family defines :meth:`posterior_from`; ``heads`` is its number of encoder outputs per latent, and ``prior_class``
    the class of priors that it needs. If ``mixed_precision`` is set, the encoder multiplies in bfloat16 during
    training.

    Args:
        model: the generative model; its prior is shared, not copied.
        encoder: a module from observations (B, *event_shape) to unbounded outputs (B, heads, K), which takes what is
            given besides the observations by name (``mask``, ``exposure``, ``covariates``); or the name of a built-in
            one, as the decoder's.
        relaxation: how gradients pass through counts; a plain attribute that may be changed between steps, for
            annealing (``guide.relaxation = guide.relaxation.at(0.1)``). With None the latents are integer counts
            without a gradient. A traced loss, such as JitTrace_ELBO, follows the temperature; it raises an error if
            the relaxation changes.
        initial_output_scale: scale of a built-in encoder's outputs at initialisation; with a small value, such as 0.5,
            the initial posterior is close to the prior's mean.
        reads: the elements of an observation that the encoder reads, bool, (*event_shape); the others are absent, as
            those that a mask leaves out, but the model has them. For co-smoothing: the latents come from held-in
            neurons. Default: all.

    Raises:
        TypeError: for a model whose prior is not a ``prior_class``, and for a relaxation that is not a
            :class:`~pyro_nbvae.distributions.Relaxation`.
        ValueError: for an unknown encoder, or ``"conv"`` for data that are not images.

    See also: docs/mathematics.md, section 7.2 (Spread and output layers).

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> guide = PoissonGuide(PoissonModel((5,), latents=3, decoder="linear"), encoder="linear")
        >>> guide.posterior(torch.zeros(4, 5)).batch_shape
        torch.Size([4, 3])
    """

    heads = 1
    prior_class: type[nn.Module] = nn.Module
    prior: Any
    reads: Tensor | None

    def __init__(
        self,
        model: GenerativeModel,
        *,
        encoder: str | nn.Module = "conv",
        relaxation: Relaxation | None = Integer(),
        initial_output_scale: float = 1.0,
        reads: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model.prior, self.prior_class):
            raise TypeError(
                f"{type(self).__name__} needs a model whose prior is a {self.prior_class.__name__}, got "
                f"{type(model).__name__} with a {type(model.prior).__name__}"
            )
        self.event_shape = model.event_shape
        self.latents = model.latents
        self.latent_shape = model.latent_shape
        self.data_size = model.data_size
        self.prior = model.prior
        self.covariates = model.covariates
        self.relaxation = check_relaxation(relaxation)
        if reads is not None and (reads.dtype != torch.bool or reads.shape != self.event_shape):
            raise InputError(
                f"reads must be bool of shape {tuple(self.event_shape)}, got {reads.dtype} of {tuple(reads.shape)}"
            )
        self.register_buffer("reads", reads)
        if isinstance(encoder, str):
            encoder = build_encoder(
                encoder,
                self.event_shape,
                self.latents,
                self.heads,
                initial_output_scale,
                getattr(model.likelihood, "discrete", False),
                model.covariates,
            )
        self.encoder = encoder

    @contextmanager
    def relaxed(self, relaxation: Relaxation | None) -> Iterator[None]:
        """Context in which the guide has another relaxation, or none."""
        before, self.relaxation = self.relaxation, relaxation
        try:
            yield
        finally:
            self.relaxation = before

    def exact(self) -> AbstractContextManager[None]:
        """Context in which the guide has no relaxation: latents are integer counts for count families."""
        return self.relaxed(None)

    def initialize(self, data: Batch) -> None:
        """Initialise a built-in encoder: standardise its input by training data, and set the scale of its outputs.

        Without this call, the first batch of training initialises it: the first call in training mode with gradients
        enabled. Other encoders are not changed.

        Args:
            data: (N, *event_shape), as a data set holds them, or a :class:`~pyro_nbvae.batching.Recording`.
        """
        initialize(self.encoder, self._read(_training_data(data, self.event_shape)))

    def _check_covariates(self, covariates: Tensor | None) -> None:
        if (0 if covariates is None else covariates.shape[-1]) != self.covariates:
            raise InputError(f"the guide needs covariates (batch, {self.covariates}), as its model")

    def _read(self, data: Recording) -> Recording:
        """Return what the encoder reads of a batch: without the elements that it does not."""
        if self.reads is None:
            return data
        reads = self.reads.to(data.x.device)[None]
        mask = reads if data.mask is None else reads & data.mask
        return Recording(data.x, mask, data.exposure, data.covariates)

    def encode(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        exposure: Tensor | None = None,
        covariates: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the bounded outputs of the encoder for ``x`` (B, *event_shape), one (B, K) tensor per head.

        Args:
            x: observations (B, *event_shape).
            mask, exposure, covariates: as :class:`~pyro_nbvae.batching.Recording`.

        Raises:
            InputError: for observations of another shape or dtype, for covariates of another number than the model's,
                and for an encoder whose output has another shape.
        """
        encoder = self.encoder  # once, because Pyro records it each time
        _check_batch(x, self.event_shape, encoder)
        self._check_covariates(covariates)
        data = self._read(Recording(x, mask, exposure, covariates))
        with self._network_precision(x):
            h = encoder(data.filled(), **data.given)
        if h.shape != (x.shape[0], self.heads, self.latents):
            raise InputError(
                f"the encoder's output has shape {tuple(h.shape)}: {type(self).__name__} needs (batch, {self.heads}, "
                f"{self.latents}), {self.heads} numbers per latent"
            )
        return bounded(h.to(x.dtype)).unbind(1)

    def posterior_from(self, outputs: tuple[Tensor, ...]) -> TorchDistribution:
        """Return q(z | x) for the encoder's bounded outputs, with the guide's current relaxation.

        Args:
            outputs: one (B, K) tensor per head, as :meth:`encode` returns them. With all of them 0, the posterior
                should be the prior, or close to it.

        Returns:
            The posterior, batch shape (B, K).
        """
        raise NotImplementedError

    def posterior(self, x: Tensor, **given: Tensor | None) -> TorchDistribution:
        """Return q(z | x) for ``x`` (B, *event_shape), with the guide's current relaxation; batch shape (B, K).

        Args:
            x: observations.
            **given: ``mask``, ``exposure`` and ``covariates``, as :meth:`encode`.
        """
        return self.posterior_from(self.encode(x, **given))

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        exposure: Tensor | None = None,
        covariates: Tensor | None = None,
    ) -> Tensor:
        """Run the guide on a batch and return ``z``, (B, *latent_shape).

        Args:
            x: observations (B, *event_shape).
            mask, exposure, covariates: as :class:`~pyro_nbvae.batching.Recording`.
        """
        if torch.jit.is_tracing():  # a trace holds for one batch size: a batch of one would broadcast to it
            x = x.reshape(len(x), *self.event_shape)
        data = Recording(x, mask, exposure, covariates)
        self._check_covariates(covariates)
        if self._trains():
            encoder = self.encoder
            _check_batch(x, self.event_shape, encoder)
            initialize(encoder, self._read(data), again=False)
        with self.relaxed(followed(self, x)) if torch.jit.is_tracing() else nullcontext():
            posterior = self.posterior(x, **data.given)
        with _batch_plate(self.data_size, len(x), x.device):
            return pyro.sample("z", _over_event(posterior, self.latent_shape))


@contextmanager
def evaluating(model: GenerativeModel, guide: AmortizedGuide, seed: int) -> Iterator[None]:
    """Context for evaluation: evaluation mode, integer counts, no gradients, and a separate random stream.

    Args:
        model, guide: set to evaluation mode; their modes are restored afterwards.
        seed: random seed.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> with evaluating(model, guide, seed=0):
        ...     z = guide(torch.zeros(4, 5))
        >>> z.shape, torch.equal(z, z.round()), guide.training
        (torch.Size([4, 3]), True, True)
    """
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        evaluation_mode(model, guide),
        torch.random.fork_rng(devices),
        torch.no_grad(),
        guide.exact(),
        pyro.validation_enabled(False),
    ):
        torch.manual_seed(stream_seed(seed, "evaluation"))
        yield
