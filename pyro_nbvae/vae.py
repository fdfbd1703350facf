"""What the model and guide of every family share: the batch plate, the observation, the encoder's bounds.

A family's model file defines a prior and :meth:`ImageModel.prior_distribution`; its guide file defines
:meth:`AmortizedGuide.posterior`. Everything else is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_nbvae.distributions.samplers import Indicator, Relaxation
from pyro_nbvae.errors import InputError, check_seed
from pyro_nbvae.networks import build_decoder, build_encoder

BOUND = 5.0


def bounded(h: Tensor) -> Tensor:
    """The encoder's outputs, held smoothly within +-5 (DESIGN 3.2); 0 stays 0 with slope 1."""
    return BOUND * torch.tanh(h / BOUND)


def check_images(x: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Raises InputError, a ValueError, unless ``x`` is (B, C, H, W) of that shape, with validation on in [0, 1]."""
    if x.dim() != 4 or tuple(x.shape[1:]) != tuple(image_shape):
        want = ", ".join(map(str, image_shape))
        raise InputError(f"images have shape {tuple(x.shape)}: expected (batch, {want})")
    if not x.is_floating_point():
        raise InputError(f"images have dtype {x.dtype}: expected floating point values in [0, 1]")
    if Distribution._validate_args and len(x):
        low, high = float(x.min()), float(x.max())
        if not (low >= 0 and high <= 1):
            raise InputError(f"images lie in [{low:.3g}, {high:.3g}]: expected values in [0, 1]")


def batch_plate(x: Tensor, data_size: int | None) -> Any:
    """The plate over the batch; with ``data_size`` the batch is a subsample of that many images and scaled so."""
    return pyro.plate("batch", data_size or len(x), subsample=torch.arange(len(x), device=x.device), dim=-1)


def network_precision(module: ImageModel | AmortizedGuide, x: Tensor) -> Any:
    """The context for a network: bfloat16 multiplications in training where the module asks for them."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=module.mixed_precision and module.training)


class StandardPrior(nn.Module):
    """A prior with nothing to learn: ``zeros`` of the latents' shape, on the model's device."""

    zeros: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(shape), persistent=False)


class ImageModel(PyroModule):
    """p(z) p(x | z): latents from the family's prior, images Normal(decoder(z), sqrt(beta / 2)).

    Args:
        image_shape: (channels, height, width).
        latents: number of latents K.
        decoder: ``"conv"``, ``"mlp"`` or ``"linear"``.
        beta: 2 sigma^2, so that -beta * ELBO is the squared error + beta * KL + a constant (DESIGN 3.6).
        data_size: number of images that a batch is a subsample of; None where a batch is all there is.

        latent_shape: of z, (latents,) unless a family arranges its K numbers otherwise.

    Sites: latent ``z`` (B, K), observation ``x`` (B, C, H, W), plate ``batch``. A family's ``prior_class`` is the
    module that holds the parameters of p(z); it is made from the latent shape. With ``mixed_precision``
    set the decoder multiplies in bfloat16 while it is trained; densities stay in full precision.

    Raises:
        ValueError: for sizes, a decoder or a beta that cannot be.
    """

    prior_class: Callable[..., nn.Module] = StandardPrior
    prior: Any
    mixed_precision = False

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        latents: int = 256,
        *,
        decoder: str = "conv",
        beta: float = 1.0,
        data_size: int | None = None,
        latent_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        if latents < 1:
            raise InputError(f"latents must be at least 1, got {latents}")
        if not (beta > 0 and math.isfinite(beta)):
            raise InputError(f"beta must be positive, got {beta}")
        self.image_shape = tuple(image_shape)
        self.latents = latents
        self.latent_shape = torch.Size(latent_shape or (latents,))
        self.beta = float(beta)
        self.data_size = data_size
        self.decoder = build_decoder(decoder, image_shape, latents)
        self.prior = self.prior_class(*self.latent_shape)

    def prior_distribution(self) -> TorchDistribution:
        """p(z), batch shape (K,)."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Latents (..., *latent_shape) to the means of the images (..., C, H, W)."""
        leading = z.shape[: z.dim() - len(self.latent_shape)]
        with network_precision(self, z):
            images = self.decoder(z.reshape(-1, self.latents))
        return images.to(z.dtype).reshape(*leading, *self.image_shape)

    def observation(self, z: Tensor) -> TorchDistribution:
        """p(x | z) for latents (..., *latent_shape): event shape (C, H, W)."""
        return dist.Normal(self.decode(z), math.sqrt(self.beta / 2)).to_event(3)

    def forward(self, x: Tensor) -> Tensor:
        """The generative program on images ``x`` (B, C, H, W) in [0, 1]; returns ``z``."""
        check_images(x, self.image_shape)  # type: ignore[arg-type]
        with batch_plate(x, self.data_size):
            z = pyro.sample("z", self.prior_distribution().to_event(1))
            pyro.sample("x", self.observation(z), obs=x)
        return z

    @torch.no_grad()
    def generate(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` latents from the prior, integers where they are counts, and the means of their images."""
        z = self.prior_distribution().sample(torch.Size([count]))
        return z, self.decode(z)


class AmortizedGuide(PyroModule):
    """q(z | x): an encoder whose bounded outputs move the model's prior to the posterior.

    Args:
        model: the model that this is the guide of; its prior is shared, not copied.
        encoder: ``"conv"``, ``"mlp"`` or ``"linear"``.
        temperature: of the relaxed samples; a plain attribute, to be annealed between steps. 0 gives the exact latents.
        relaxation, indicator, max_count, straight_through: how counts are relaxed
            (:class:`~pyro_nbvae.distributions.relaxed.RelaxedCount`).

    With ``mixed_precision`` set the encoder multiplies in bfloat16 while it is trained.
    """

    heads = 1
    prior: Any
    mixed_precision = False

    def __init__(
        self,
        model: ImageModel,
        *,
        encoder: str = "conv",
        temperature: float = 1.0,
        relaxation: Relaxation = "arrival",
        indicator: Indicator = "sigmoid",
        max_count: int = 100,
        straight_through: bool = False,
    ) -> None:
        super().__init__()
        self.image_shape = model.image_shape
        self.latent_shape = model.latent_shape
        self.data_size = model.data_size
        self.prior = model.prior
        self.temperature = temperature
        self.relaxation: dict[str, Any] = dict(
            relaxation=relaxation, indicator=indicator, max_count=max_count, straight_through=straight_through
        )
        self.encoder = build_encoder(encoder, model.image_shape, model.latents, self.heads)  # type: ignore[arg-type]

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Within this context the guide draws exact latents: temperature 0, integers where they are counts."""
        temperature, self.temperature = self.temperature, 0.0
        try:
            yield
        finally:
            self.temperature = temperature

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """The bounded outputs of the encoder, one (B, K) tensor a head."""
        check_images(x, self.image_shape)  # type: ignore[arg-type]
        with network_precision(self, x):
            h = self.encoder(x)
        return bounded(h.to(x.dtype)).unbind(1)

    def posterior(self, x: Tensor) -> TorchDistribution:
        """q(z | x), batch shape (B, K), at the guide's present temperature."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The guide on images ``x`` (B, C, H, W) in [0, 1]; returns ``z``."""
        with batch_plate(x, self.data_size):
            return pyro.sample("z", self.posterior(x).to_event(1))


@contextmanager
def evaluating(model: ImageModel, guide: AmortizedGuide, seed: int) -> Iterator[None]:
    """Evaluation mode, exact latents, no gradients, and a random stream of its own."""
    check_seed(seed)
    modes = [(m, m.training) for m in (model, guide)]
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    model.eval(), guide.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), guide.exact(), pyro.validation_enabled(False):
            torch.manual_seed(seed)
            yield
    finally:
        for module, mode in modes:
            module.train(mode)
