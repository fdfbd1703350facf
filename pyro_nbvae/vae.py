"""What the model and guide of every family share: the batch plate, the observation, the encoder's bounds.

A family's model file defines a prior and :meth:`GenerativeModel.prior_distribution`; its guide file defines
:meth:`AmortizedGuide.posterior`. Everything else is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_nbvae.data.sources import is_image_shape
from pyro_nbvae.distributions import ArrivalTimes, Relaxation
from pyro_nbvae.errors import InputError, check_positive, check_seed
from pyro_nbvae.likelihoods import Gaussian, Likelihood
from pyro_nbvae.networks import build_decoder, build_encoder

BOUND = 5.0


def bounded(h: Tensor) -> Tensor:
    """The encoder's outputs, held smoothly within +-5; 0 stays 0 with slope 1."""
    return BOUND * torch.tanh(h / BOUND)


def check_batch(x: Tensor, event_shape: tuple[int, ...], unit_interval: bool) -> None:
    """Raises InputError, a ValueError, unless ``x`` is floating point of shape (B, *event_shape), and, where it must be
    and validation is on, in [0, 1]."""
    if x.dim() != 1 + len(event_shape) or tuple(x.shape[1:]) != tuple(event_shape):
        want = ", ".join(map(str, ("batch", *event_shape)))
        raise InputError(f"data have shape {tuple(x.shape)}: expected ({want})")
    if not x.is_floating_point():
        raise InputError(f"data have dtype {x.dtype}: expected floating point (pyro_nbvae.data.to_floats converts)")
    if unit_interval and Distribution._validate_args and len(x):
        low, high = float(x.min()), float(x.max())
        if not (low >= 0 and high <= 1):
            raise InputError(f"images lie in [{low:.3g}, {high:.3g}]: expected values in [0, 1]")


def network_precision(module: GenerativeModel | AmortizedGuide, x: Tensor) -> Any:
    """The context for a network: bfloat16 multiplications in training where the module asks for them."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=module.mixed_precision and module.training)


class StandardPrior(nn.Module):
    """A prior with nothing to learn: ``zeros`` of the latents' shape, on the model's device."""

    zeros: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(shape), persistent=False)


class CountPrior(nn.Module):
    """A learned prior over counts. Guides of several families move its mean to a posterior's."""

    @property
    def mean(self) -> Tensor:
        """The mean count of each unit, (K,)."""
        raise NotImplementedError

    def start(self, mean: float) -> None:
        """Gives every unit that mean count."""
        raise NotImplementedError


class GenerativeModel(PyroModule):
    """p(z) p(x | z): latents from the family's prior, observations from the likelihood of the decoder's output.

    Args:
        event_shape: of one observation; of an image (channels, height, width).
        latents: number of latents K.
        decoder: a module from latents (B, K) to the output that the likelihood reads, (B, *event_shape) for those of
            :mod:`pyro_nbvae.likelihoods`; or ``"conv"`` (images only), ``"mlp"`` or ``"linear"``.
        likelihood: a callable from the decoder's output to a distribution over observations. Default: Gaussian(1).
        data_size: number of observations that a batch is a subsample of; None where a batch is all there is.
        latent_shape: of z, (latents,) unless a family arranges its K numbers otherwise.

    Sites: latent ``z`` (B, *latent_shape), observation ``x`` (B, *event_shape), plate ``batch``. A family's
    ``prior_class`` is the module that holds the parameters of p(z); it is made from the latent shape. With
    ``mixed_precision`` set the decoder multiplies in bfloat16 while it is trained; densities stay in full precision.

    Raises:
        ValueError: for sizes or a decoder that do not exist, and, with validation on, for observations out of the
            likelihood's support or, where a built-in decoder ends in a sigmoid, out of [0, 1].
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
        likelihood: Callable[[Tensor], Any] | None = None,
        data_size: int | None = None,
        latent_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        if latents < 1:
            raise InputError(f"latents must be at least 1, got {latents}")
        self.event_shape = torch.Size(event_shape)
        self.latents = latents
        self.latent_shape = torch.Size(latent_shape or (latents,))
        self.data_size = data_size
        self.likelihood = Gaussian() if likelihood is None else likelihood
        output: nn.Module = nn.Identity()
        if isinstance(self.likelihood, Likelihood):
            self.likelihood.setup(tuple(event_shape))
            output = self.likelihood.output(is_image_shape(self.event_shape))
        self.unit_interval = isinstance(decoder, str) and isinstance(output, nn.Sigmoid)
        self.decoder = build_decoder(decoder, event_shape, latents, output) if isinstance(decoder, str) else decoder
        self.prior = self.prior_class(*self.latent_shape)

    @property
    def device(self) -> torch.device:
        """Where its parameters and buffers are; the CPU where it has none."""
        return next((t.device for t in chain(self.parameters(), self.buffers())), torch.device("cpu"))

    @property
    def loss_scale(self) -> float:
        """What training multiplies the ELBO with: beta under a Gaussian likelihood, else 1."""
        return float(getattr(self.likelihood, "loss_scale", 1.0))

    def prior_distribution(self) -> TorchDistribution:
        """p(z), batch shape (K,)."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Latents (..., *latent_shape) to the decoder's output, (..., *event_shape) or what the likelihood reads."""
        leading = z.shape[: z.dim() - len(self.latent_shape)]
        with network_precision(self, z):
            h = self.decoder(z.reshape(-1, self.latents))
        return h.to(z.dtype).reshape(*leading, *h.shape[1:])

    def observation(self, z: Tensor) -> Any:
        """p(x | z) for latents (..., *latent_shape): a distribution of event shape (*event_shape).

        Raises:
            InputError: where decoder and likelihood make observations of another shape.
        """
        observed = self.likelihood(self.decode(z))
        observed = observed.to_event(max(0, len(self.event_shape) - len(observed.event_shape)))
        if observed.event_shape != self.event_shape:
            raise InputError(
                f"decoder and likelihood make observations of shape {tuple(observed.event_shape)}: the model's "
                f"event_shape is {tuple(self.event_shape)}"
            )
        return observed

    def forward(self, x: Tensor | None = None, size: int = 1) -> Tensor:
        """The generative program on observations ``x`` (B, *event_shape); returns ``z``.

        Args:
            x: observed; None draws ``size`` observations from the prior predictive.
        """
        device = self.device
        if x is not None:
            check_batch(x, self.event_shape, self.unit_interval)
            size, device = len(x), x.device
        with pyro.plate("batch", self.data_size or size, subsample=torch.arange(size, device=device), dim=-1):
            z = pyro.sample("z", self.prior_distribution().to_event(1))
            pyro.sample("x", self.observation(z), obs=x)
        return z

    @torch.no_grad()
    def generate(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` latents from the prior, integers where they are counts, and the means of their observations."""
        z = self.prior_distribution().sample(torch.Size([count]))
        return z, self.observation(z).mean


class CountModel(GenerativeModel):
    """A model whose latents are counts under a learned prior.

    Args:
        prior_mean: mean count of each unit at the start.
        **options: as :class:`GenerativeModel`.

    Raises:
        ValueError: as :class:`GenerativeModel`, and for a mean that is not positive.
    """

    prior: CountPrior

    def __init__(
        self, event_shape: tuple[int, ...], latents: int = 256, *, prior_mean: float = 1.0, **options: Any
    ) -> None:
        check_positive("prior_mean", prior_mean)
        super().__init__(event_shape, latents, **options)
        self.prior.start(prior_mean)


class AmortizedGuide(PyroModule):
    """q(z | x): an encoder whose bounded outputs move the model's prior to the posterior.

    Args:
        model: the model that this is the guide of; its prior is shared, not copied.
        encoder: a module from observations (B, *event_shape) to (B, heads, K), unbounded, ``heads`` being the family's;
            or ``"conv"`` (images only), ``"mlp"`` or ``"linear"``.
        relaxation: how counts are differentiated; a plain attribute, to be annealed between steps
            (``guide.relaxation = guide.relaxation.at(0.1)``). None gives the exact latents, without a gradient.
        spread: factor of a built-in encoder's outputs before training: a small one starts near the prior's mean.

    A family whose prior must be of a class says so in ``prior_class``. With ``mixed_precision`` set the encoder
    multiplies in bfloat16 while it is trained.

    Raises:
        TypeError: for a model of another family.
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
        relaxation: Relaxation | None = ArrivalTimes(),
        spread: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(model.prior, self.prior_class):
            raise TypeError(
                f"{type(self).__name__} needs a model whose prior is a {self.prior_class.__name__}: "
                f"{type(model).__name__} has a {type(model.prior).__name__}"
            )
        self.event_shape = model.event_shape
        self.unit_interval = model.unit_interval
        self.latents = model.latents
        self.latent_shape = model.latent_shape
        self.data_size = model.data_size
        self.prior = model.prior
        self.relaxation = relaxation
        if isinstance(encoder, str):
            encoder = build_encoder(encoder, self.event_shape, self.latents, self.heads, spread)
        self.encoder = encoder

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Within this context the guide draws exact latents, integers where they are counts."""
        relaxation, self.relaxation = self.relaxation, None
        try:
            yield
        finally:
            self.relaxation = relaxation

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """The bounded outputs of the encoder, one (B, K) tensor a head.

        Raises:
            InputError: for observations of another shape, and for an encoder that gives another.
        """
        check_batch(x, self.event_shape, self.unit_interval)
        with network_precision(self, x):
            h = self.encoder(x)
        if h.shape != (len(x), self.heads, self.latents):
            raise InputError(
                f"the encoder's output has shape {tuple(h.shape)}: {type(self).__name__} needs (batch, "
                f"{self.heads}, {self.latents}), {self.heads} numbers for each latent"
            )
        return bounded(h.to(x.dtype)).unbind(1)

    def posterior(self, x: Tensor) -> TorchDistribution:
        """q(z | x), batch shape (B, K), under the guide's present relaxation."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The guide on observations ``x`` (B, *event_shape); returns ``z``."""
        posterior = self.posterior(x)
        subsample = torch.arange(len(x), device=x.device)
        with pyro.plate("batch", self.data_size or len(x), subsample=subsample, dim=-1):
            return pyro.sample("z", posterior.to_event(1))


@contextmanager
def evaluating(model: GenerativeModel, guide: AmortizedGuide, seed: int) -> Iterator[None]:
    """Evaluation mode, exact latents, no gradients, and a random stream of its own."""
    check_seed(seed)
    modes = [(m, m.training) for m in (model, guide)]
    devices = [model.device] if model.device.type == "cuda" else []
    for module in (model, guide):
        module.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), guide.exact(), pyro.validation_enabled(False):
            torch.manual_seed(seed)
            yield
    finally:
        for module, mode in modes:
            module.train(mode)


@torch.no_grad()
def check_support(model: GenerativeModel, batches: Iterable[Tensor], what: str) -> None:
    """Raises InputError for observations (B, *event_shape) that the model's likelihood cannot have made.

    Args:
        what: what they are, for the message.
    """
    if model.unit_interval:
        support: Any = constraints.unit_interval
        allowed = "[0, 1]"
    else:
        observed = model.observation(model.prior_distribution().sample(torch.Size([1])))
        support = getattr(observed, "support", None)
        allowed = f"the support of {type(model.likelihood).__name__}"
    for x in batches if support is not None else ():
        if not bool(support.check(x.to(model.device)).all()):
            raise InputError(
                f"{what} lie in [{float(x.min()):.3g}, {float(x.max()):.3g}] and not in {allowed}: take another "
                "--likelihood, or prepare the data (bernoulli needs 0 and 1, poisson and negative_binomial need counts)"
            )
