"""Base classes of models and guides: the batch plate, the observation, and the bounds of the encoder's outputs.

A family's model file defines a prior and :meth:`GenerativeModel.prior_distribution`; its guide file defines
:meth:`AmortizedGuide.posterior`. Everything else is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.nn import PyroModule
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_nbvae.batching import is_pixels, thinned, to_floats
from pyro_nbvae.distributions import Integer, Relaxation
from pyro_nbvae.distributions.relaxations.base import check_relaxation, followed
from pyro_nbvae.errors import InputError, check_positive, check_seed
from pyro_nbvae.likelihoods import Gaussian, Likelihood
from pyro_nbvae.networks import build_decoder, build_encoder
from pyro_nbvae.networks.initialization import evaluation_mode, initialize
from pyro_nbvae.networks.outputs import UnitSigmoid

BOUND = 5.0


def bounded(h: Tensor) -> Tensor:
    """Bound the encoder's outputs smoothly to the range from -5 to 5; 0 stays 0, with slope 1.

    See also: docs/mathematics.md, section 7.1 (Bounds of the encoder).
    """
    return BOUND * torch.tanh(h / BOUND)


def gain(h: Tensor) -> Tensor:
    r"""Gain of a rate for an encoder's output h: :math:`\log_2(1 + 4^h)`.

    At 0 it is 1 with slope 1, like :math:`e^h`. Below it falls exponentially; above it approaches 2h, so that large
    counts are as easy to learn as the location of a Gaussian.

    Args:
        h: an encoder's outputs, of any shape.

    Returns:
        Positive, of the same shape.

    See also: docs/mathematics.md, section 2.5 (From the prior to the posterior).

    Example::

        >>> [round(g, 3) for g in gain(torch.tensor([-3.0, 0.0, 3.0])).tolist()]
        [0.022, 1.0, 6.022]
    """
    return torch.nn.functional.softplus(2 * math.log(2) * h) / math.log(2)


def check_batch(
    x: Tensor, event_shape: tuple[int, ...], unit_interval: bool = False, module: nn.Module | None = None
) -> None:
    """Check that ``x`` is floating point, of shape (B, *event_shape), and, with validation on, in [0, 1] if it must be.

    With a ``module``, ``x`` must have the precision of its parameters.

    Raises:
        InputError: a ValueError, if it is not.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"data must be a tensor, got {type(x).__name__}: torch.as_tensor(x, dtype=torch.float32)")
    if x.dim() != 1 + len(event_shape) or tuple(x.shape[1:]) != tuple(event_shape):
        want = ", ".join(map(str, ("batch", *event_shape)))
        raise InputError(f"data have shape {tuple(x.shape)}: expected ({want})")
    if not x.is_floating_point():
        raise InputError(f"data have dtype {x.dtype}: expected floating point: x.float(), or for pixels x / 255")
    parameters = module.parameters() if module is not None else ()  # a compiled module has no truth value
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), x.dtype)
    if x.dtype != dtype:
        raise InputError(f"data have dtype {x.dtype} and the network's parameters {dtype}: convert one of them")
    if unit_interval and Distribution._validate_args and len(x):
        low, high = float(x.min()), float(x.max())
        if not (low >= 0 and high <= 1):
            raise InputError(
                f"images lie in [{low:.3g}, {high:.3g}]: expected values in [0, 1]; for images of another range call "
                "model.initialize(data) with the training data"
            )


def in_svi_step() -> bool:
    """Whether SVI.step runs: it records the parameters that it is about to train."""
    return any(getattr(messenger, "param_only", False) for messenger in _PYRO_STACK)


def check_param_store(module: PyroModule) -> None:
    """Raise InputError if SVI is about to train another model's parameters instead of a module's, by their names.

    Pyro's store keeps parameters by name: the module would silently not be trained. Outside of SVI.step, which records
    parameters, the module's own parameters are used.
    """
    if not in_svi_step():
        return
    store = pyro.get_param_store()._params
    parent = f"{module._pyro_name}." if module._pyro_name else ""
    for name, parameter in module.named_parameters():
        full = parent + name
        # where a plain Module is in a PyroModule, the store has "$$$" for the dot between them
        names = [full, *(f"{full[:k]}$$${full[k + 1 :]}" for k, letter in enumerate(full) if letter == ".")]
        held = next((store[each] for each in names if each in store), parameter)
        if held is not parameter and held.data_ptr() != parameter.data_ptr():
            if not parameter.is_contiguous():
                raise InputError(
                    f"the parameter {name} is not contiguous, so Pyro's store would train a copy of it: call "
                    ".contiguous() before the module is used"
                )
            raise InputError(
                f"Pyro's parameter store holds another {name}, of another model: call pyro.clear_param_store() before "
                "a second model is trained; to keep a trained pair, save its state_dict (docs/programs.md, Saving and "
                "loading); a guide and a model that are copied must be copied together"
            )


def batch_plate(data_size: int | None, size: int, device: torch.device) -> pyro.plate:
    """Return the plate of a batch of ``size`` observations; with ``data_size`` the batch stands for that many.

    Raises:
        InputError: for a batch that is empty or larger than the data set.
    """
    if size < 1:
        raise InputError("a batch must have at least one observation")
    if data_size is not None and size > data_size:
        raise InputError(f"a batch of {size} observations is larger than the data set, data_size={data_size}")
    return pyro.plate("batch", data_size or size, subsample=torch.arange(size, device=device), dim=-1)


def over_event(distribution: TorchDistribution, shape: torch.Size) -> TorchDistribution:
    """Return a distribution over events with as many dimensions as ``shape``; a joint one may have them already."""
    return distribution.to_event(max(0, len(shape) - len(distribution.event_shape)))


def draw_parameters(module: nn.Module) -> None:
    """Draw the parameters with a fixed prior (PyroSample) outside of the batch, once for all its observations.

    A prior that is a function may depend on the observation: it is drawn where it is read.
    """
    for part in module.modules():
        for name, prior in part._pyro_samples.items() if isinstance(part, PyroModule) else ():
            if isinstance(prior, Distribution):
                getattr(part, name)  # Pyro keeps it until the model's call ends


def network_precision(module: GenerativeModel | AmortizedGuide, x: Tensor) -> AbstractContextManager[object]:
    """Context for a network: bfloat16 multiplications in training if the module has ``mixed_precision`` set.

    Otherwise an autocast that the caller has turned on stays on.
    """
    mixed = module.mixed_precision and module.training
    return torch.autocast(x.device.type, torch.bfloat16) if mixed else nullcontext()


def training_data(data: Tensor, event_shape: torch.Size) -> Tensor:
    """Return training data for a start, as a model takes them: at most a number that fits into memory, evenly spaced.

    The observations of the smallest and of the largest value are among them.

    Raises:
        InputError: for data of another shape, without an observation, or with values that are not finite.
    """
    if not isinstance(data, Tensor):
        raise InputError(f"data must be a tensor, got {type(data).__name__}: torch.as_tensor(x)")
    if tuple(data.shape[1:]) != tuple(event_shape) or not len(data):
        raise InputError(f"data have shape {tuple(data.shape)}: expected (N, {', '.join(map(str, event_shape))})")
    x = thinned(data, max(1000, 2**25 // max(1, math.prod(event_shape))))
    if len(x) < len(data):
        flat = data.flatten(1)
        x = torch.cat([x, data[[int(flat.amax(1).argmax()), int(flat.amin(1).argmin())]]])
    if not bool(x.isfinite().all()):
        raise InputError("data hold values that are NaN or infinite: remove or replace them")
    return to_floats(x) if is_pixels(x) else x  # a network takes them in its own precision


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


class CountPrior(nn.Module):
    """Base class of learned priors over counts. Guides of several families scale its mean to that of the posterior.

    See also: docs/mathematics.md, section 2.5 (From the prior to the posterior).

    Example::

        >>> from pyro_nbvae.models import PoissonModel
        >>> prior = PoissonModel((5,), latents=3, decoder="linear").prior
        >>> prior.start(2.0)
        >>> [round(mean, 4) for mean in prior.mean.tolist()]
        [2.0, 2.0, 2.0]
    """

    @property
    def mean(self) -> Tensor:
        """The mean count of each unit, (K,)."""
        raise NotImplementedError

    def start(self, mean: float) -> None:
        """Set the mean count of every unit; called when the model is made."""
        raise NotImplementedError


class GenerativeModel(PyroModule):
    r"""Base class of generative models: latents from the family's prior, observations from the likelihood.

    .. math:: z \sim p(z), \qquad x \sim p(x \mid z) = \mathrm{likelihood}(\mathrm{decoder}(z))

    Sites: latent ``z`` (B, *latent_shape), observation ``x`` (B, *event_shape), plate ``batch``. A family's
    ``prior_class`` is the module that holds the parameters of p(z); it is made from the latent shape. With
    ``mixed_precision`` set, the decoder multiplies in bfloat16 in training; densities stay in full precision.

    Args:
        event_shape: shape of one observation; for an image (channels, height, width).
        latents: number of latents K.
        decoder: a module from latents (B, K) to the output that the likelihood reads, (B, *event_shape) for those of
            :mod:`pyro_nbvae.likelihoods`; or ``"conv"`` (images only), ``"mlp"`` or ``"linear"``.
        likelihood: a callable from the decoder's output to a distribution over observations. Default: Gaussian(1).
        data_size: number of observations in the data set of which a batch is a subsample; None if a batch is all data.
        latent_shape: shape of z. Default: (latents,); a family may arrange its K numbers in another way.

    Raises:
        ValueError: for fewer than one latent, an unknown decoder, or ``"conv"`` for data that are not images; and, with
            validation on, for observations outside the likelihood's support or, if a built-in decoder ends in a
            sigmoid, outside [0, 1].

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
    mixed_precision = False

    def __init__(
        self,
        event_shape: tuple[int, ...],
        latents: int = 256,
        *,
        decoder: str | nn.Module = "conv",
        likelihood: Callable[[Tensor], TorchDistribution] | None = None,
        data_size: int | None = None,
        latent_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        if latents < 1:
            raise InputError(f"latents must be at least 1, got {latents}")
        if not isinstance(event_shape, (tuple, list)):
            raise InputError(f"event_shape must be a tuple such as (1, 28, 28) or (40,), got {event_shape!r}")
        if likelihood is not None and not callable(likelihood):
            raise InputError(f"likelihood must be a callable such as likelihoods.Bernoulli(), got {likelihood!r}")
        self.event_shape = torch.Size(event_shape)
        self.latents = latents
        self.latent_shape = torch.Size(latent_shape or (latents,))
        self.data_size = data_size
        self.likelihood = Gaussian() if likelihood is None else likelihood
        output: nn.Module = nn.Identity()
        if isinstance(self.likelihood, Likelihood):
            self.likelihood.setup(tuple(event_shape))
            output = self.likelihood.output(tuple(event_shape))
            if type(output) is nn.Sigmoid:  # of a user's likelihood
                output = UnitSigmoid()
        self.decoder = build_decoder(decoder, event_shape, latents, output) if isinstance(decoder, str) else decoder
        self.prior = self.prior_class(*self.latent_shape)

    @property
    def unit_interval(self) -> bool:
        """Whether observations must be in [0, 1], because a built-in decoder ends in a sigmoid of that range."""
        return any(getattr(part, "unit_interval", False) for part in self.decoder.modules())

    def initialize(self, data: Tensor) -> None:
        """Start a built-in decoder at the mean of training data, in the likelihood's own terms.

        Without this call the first batch of ``SVI.step`` starts it. A decoder of your own is not changed.

        Args:
            data: (N, *event_shape), as a data set holds them.

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
        initialize(self.decoder, training_data(data, self.event_shape))

    @property
    def device(self) -> torch.device:
        """Device of its parameters and buffers; the CPU if it has none."""
        return next((t.device for t in chain(self.parameters(), self.buffers())), torch.device("cpu"))

    @property
    def loss_scale(self) -> float:
        """Factor of the ELBO in the loss of published runs: beta for a Gaussian likelihood, else 1."""
        return float(getattr(self.likelihood, "loss_scale", 1.0))

    def prior_distribution(self) -> TorchDistribution:
        """Return p(z), batch shape (K,)."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (..., *latent_shape) to (..., *event_shape), or to the shape that the likelihood reads."""
        leading = z.shape[: z.dim() - len(self.latent_shape)]
        with network_precision(self, z):
            h = self.decoder(z.reshape(-1, self.latents))
        return h.to(z.dtype).reshape(*leading, *h.shape[1:])

    def observation(self, z: Tensor) -> TorchDistribution:
        """Return p(x | z) for latents (..., *latent_shape): a distribution of event shape (*event_shape).

        Raises:
            InputError: if decoder and likelihood make observations of another shape.
        """
        observed = self.likelihood(self.decode(z))
        observed = over_event(observed, self.event_shape)
        if observed.event_shape != self.event_shape:
            raise InputError(
                f"decoder and likelihood make observations of shape {tuple(observed.event_shape)}: the model's "
                f"event_shape is {tuple(self.event_shape)}"
            )
        return observed

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """Run the generative program on a batch and return ``z``, (B, *latent_shape).

        Args:
            x: observations (B, *event_shape); None draws ``size`` observations from the prior predictive.
            size: number of observations if ``x`` is None.

        Raises:
            InputError: for observations of another shape or type, more than ``data_size``, and, with validation on,
                outside [0, 1] if they must be inside.
        """
        check_param_store(self)
        device = self.device
        if x is not None:
            check_batch(x, self.event_shape, self.unit_interval, self.decoder)
            if in_svi_step():
                initialize(self.decoder, x, again=False)
            size, device = len(x), x.device
        draw_parameters(self)
        with batch_plate(self.data_size, size, device):
            z = pyro.sample("z", over_event(self.prior_distribution(), self.latent_shape))
            pyro.sample("x", self.observation(z), obs=x)
        return z

    @torch.no_grad()
    def generate(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw latents from the prior and return them with the means of their observations.

        Args:
            count: number of draws N.

        Returns:
            ``(z, mean)``: latents (N, *latent_shape), integers for count families, and means (N, *event_shape).
        """
        z = self.prior_distribution().sample(torch.Size([count]))
        return z, self.observation(z).mean


class CountModel(GenerativeModel):
    r"""Base class of models whose latents are counts with a learned prior.

    The decoder reads standardized counts (:meth:`standardize`):

    .. math:: x \sim \mathrm{likelihood}(\mathrm{decoder}((z - \mathrm{E}_p[z]) / s))

    Args:
        prior_mean: initial mean count of each unit, positive. Large counts are fine grained.
        event_shape, latents, **options: as :class:`GenerativeModel`.

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
        self, event_shape: tuple[int, ...], latents: int = 256, *, prior_mean: float = 20.0, **options: Any
    ) -> None:
        check_positive("prior_mean", prior_mean)
        super().__init__(event_shape, latents, **options)
        self.prior.start(prior_mean)
        if self.prior.mean.is_meta:  # no values: they are loaded later
            self.register_buffer("initial_stddev", torch.empty(self.latent_shape))
            return
        self.register_buffer("initial_stddev", self.prior_distribution().variance.detach().sqrt())
        if not bool((self.initial_stddev > 0).all()):
            raise InputError(f"prior_mean is too small: a standard deviation of 0, got {prior_mean}")

    def standardize(self, z: Tensor) -> Tensor:
        r"""Return what the decoder reads, :math:`(z - \mathrm{E}_p[z]) / s`, for counts z (..., *latent_shape).

        s is the prior's standard deviation at the start. So the decoder's input starts like that of a Gaussian VAE, and
        its mean stays at 0 while the prior learns. For a decoder that reads the counts themselves, override this
        method: ``return z``.
        """
        return (z - self.prior.mean) / self.initial_stddev

    def decode(self, z: Tensor) -> Tensor:
        """Decode counts (..., *latent_shape), standardized, to (..., *event_shape) or what the likelihood reads."""
        return super().decode(self.standardize(z))


class AmortizedGuide(PyroModule):
    """Base class of amortised guides q(z | x): an encoder's bounded outputs shift the model's prior to the posterior.

    A family that needs a prior of a certain class sets ``prior_class``. With ``mixed_precision`` set, the encoder
    multiplies in bfloat16 in training.

    Args:
        model: the generative model; its prior is shared, not copied.
        encoder: a module from observations (B, *event_shape) to unbounded outputs (B, heads, K), where ``heads`` is the
            family's number of outputs for each latent; or ``"conv"`` (images only), ``"mlp"`` or ``"linear"``.
        relaxation: how counts are differentiated; a plain attribute that may be changed between steps, for annealing
            (``guide.relaxation = guide.relaxation.at(0.1)``). With None the latents are exact, without a gradient.
            A traced loss, such as JitTrace_ELBO, follows the temperature, and refuses another relaxation.
        spread: initial factor of a built-in encoder's outputs; with a small one, such as 0.5, the posterior starts
            near the prior's mean.

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
    mixed_precision = False

    def __init__(
        self,
        model: GenerativeModel,
        *,
        encoder: str | nn.Module = "conv",
        relaxation: Relaxation | None = Integer(),
        spread: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(model.prior, self.prior_class):
            raise TypeError(
                f"{type(self).__name__} needs a model whose prior is a {self.prior_class.__name__}: "
                f"{type(model).__name__} has a {type(model.prior).__name__}"
            )
        self.event_shape = model.event_shape
        self.latents = model.latents
        self.latent_shape = model.latent_shape
        self.data_size = model.data_size
        self.prior = model.prior
        self.relaxation = check_relaxation(relaxation)
        if isinstance(encoder, str):
            discrete = getattr(model.likelihood, "discrete", False)
            encoder = build_encoder(encoder, self.event_shape, self.latents, self.heads, spread, discrete)
        self.encoder = encoder

    @contextmanager
    def _relaxed(self, relaxation: Relaxation | None) -> Iterator[None]:
        before, self.relaxation = self.relaxation, relaxation
        try:
            yield
        finally:
            self.relaxation = before

    def initialize(self, data: Tensor) -> None:
        """Start a built-in encoder: standardise its input by training data, and set the spread of its outputs.

        Without this call the first batch of ``SVI.step`` starts it. An encoder of your own is not changed.

        Args:
            data: (N, *event_shape), as a data set holds them.
        """
        initialize(self.encoder, training_data(data, self.event_shape))

    def exact(self) -> AbstractContextManager[None]:
        """Context in which the guide draws exact latents, integers for count families."""
        return self._relaxed(None)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the bounded outputs of the encoder for ``x`` (B, *event_shape), one (B, K) tensor per head.

        Raises:
            InputError: for observations of another shape or type, and for an encoder whose output has another shape.
        """
        encoder = self.encoder  # once, because Pyro records it each time
        check_batch(x, self.event_shape, module=encoder)
        with network_precision(self, x):
            h = encoder(x)
        if h.shape != (len(x), self.heads, self.latents):
            raise InputError(
                f"the encoder's output has shape {tuple(h.shape)}: {type(self).__name__} needs (batch, "
                f"{self.heads}, {self.latents}), {self.heads} numbers for each latent"
            )
        return bounded(h.to(x.dtype)).unbind(1)

    def posterior(self, x: Tensor) -> TorchDistribution:
        """Return q(z | x) for ``x`` (B, *event_shape), with the guide's current relaxation; batch shape (B, K)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Run the guide on observations ``x`` (B, *event_shape) and return ``z``, (B, *latent_shape)."""
        check_param_store(self)
        if in_svi_step():
            check_batch(x, self.event_shape, module=self.encoder)
            initialize(self.encoder, x, again=False)
        with self._relaxed(followed(self, x)) if torch.jit.is_tracing() else nullcontext():
            posterior = self.posterior(x)
        with batch_plate(self.data_size, len(x), x.device):
            return pyro.sample("z", over_event(posterior, self.latent_shape))


@contextmanager
def evaluating(model: GenerativeModel, guide: AmortizedGuide, seed: int) -> Iterator[None]:
    """Context for evaluation: evaluation mode, exact latents, no gradients, and a separate random stream.

    Args:
        model, guide: set to evaluation mode; their modes are restored afterwards.
        seed: random seed, 0 to 2^32 - 1.

    Raises:
        InputError: for a seed outside this range.

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
    check_seed(seed)
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        evaluation_mode(model, guide),
        torch.random.fork_rng(devices),
        torch.no_grad(),
        guide.exact(),
        pyro.validation_enabled(False),
    ):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def in_support(model: GenerativeModel, batches: Iterable[Tensor], what: str) -> Iterator[Tensor]:
    """Iterate over observations, and check that each batch lies in the support of the model's likelihood.

    Args:
        model: the model.
        batches: observations (B, *event_shape) each.
        what: name of the observations in the message.

    Raises:
        InputError: for observations outside the support.
    """
    if model.unit_interval:
        support: Any = constraints.unit_interval
        allowed = "[0, 1]"
    else:
        # any latents will do; batch normalisation in training mode needs more than one
        with (
            torch.random.fork_rng([model.device] if model.device.type == "cuda" else []),
            evaluation_mode(model),
            pyro.validation_enabled(False),
        ):
            observed = model.observation(model.prior_distribution().sample(torch.Size([1])))
        support = getattr(observed, "support", None)
        allowed = f"the support of {type(model.likelihood).__name__}"
    for x in batches:
        if support is not None and not bool(support.check(x.to(model.device)).all()):
            raise InputError(
                f"{what} lie in [{float(x.min()):.3g}, {float(x.max()):.3g}] and not in {allowed}: choose another "
                "--likelihood, or prepare the data (bernoulli needs 0 and 1: of pixels save (pixels > 127) as a bool "
                ".npy file; poisson and negative_binomial need counts)"
            )
        yield x


def check_support(model: GenerativeModel, batches: Iterable[Tensor], what: str) -> None:
    """Check that observations lie in the likelihood's support; arguments and errors as :func:`in_support`."""
    for _ in in_support(model, batches, what):
        pass
