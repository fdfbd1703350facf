"""Configuration of a run. This module imports quickly because the command line's help is built from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pyro_nbvae.rates import PRIOR_LR_MULTIPLIER

# Defaults of each preset for flags that are not given. Schedules are linear: the KL weight rises from 0 to 1 over
# `kl_warmup` epochs, and the temperature falls from `temperature_start` to `temperature` over `anneal_epochs`. The
# default of a relaxation is under its name, else under None; a temperature of None is the relaxation's `coldest`. The
# prior's learning rate is `prior_rate` * `lr`.
PRESETS: dict[str, dict[str, Any]] = {
    # For data of a user's own: 20 epochs, or as many as 600 steps need, and gradients in nats.
    "default": {
        "encoder": {True: "conv", False: "mlp"},  # on images, and on other data
        "decoder": {True: "conv", False: "mlp"},
        "latents": 64,
        "batch_size": 128,
        "lr": 3e-3,
        "lr_schedule": "cosine",
        "epochs": 20,
        "steps": 600,
        "kl_warmup": None,  # a tenth of the epochs
        "temperature_start": {None: 1.0, "arrival": 0.24},  # at 1 arrival times count 31 % too many
        "temperature": {None: None},
        "anneal_epochs": None,  # half of the epochs
        "beta": 0.1,  # of the squared range of images, or of the mean variance of other data
        "clip": 250.0,
        "prior_rate": PRIOR_LR_MULTIPLIER,
        "prior_mean": {None: 20.0, "gumbel": 2.0},  # Gumbel-softmax draws noise for every count of a window
    },
    # The settings of our tables.
    "published": {
        "encoder": {True: "released_conv", False: "released_mlp"},
        "decoder": {True: "released_conv", False: "released_mlp"},
        "latents": 256,
        "batch_size": 512,
        "lr": 1e-3,
        "lr_schedule": "constant",
        "epochs": 20,
        "steps": 0,
        "kl_warmup": 2.0,
        "temperature_start": {None: 1.0, "arrival": 0.24},
        "temperature": {None: None},
        "anneal_epochs": None,
        "beta": None,  # the paper's: channels * height / latents, or 1 / latents
        "clip": 25.0,
        "prior_rate": 30.0,
        "prior_mean": {None: 20.0, "gumbel": 2.0},
    },
}
# As in the paper's code: schedules over 250 epochs, of which 200 are run; its clip of 1.0 is in units of its loss.
PRESETS["paper"] = {
    **PRESETS["published"],
    "epochs": 200,
    "kl_warmup": 50.0,
    "temperature_start": {None: 1.0},
    "temperature": {None: None, "arrival": 0.05, "gumbel": 1.0},
    "anneal_epochs": 250.0,
    "clip": None,
    "prior_rate": 1.0,
    "prior_mean": {None: 1.0},
}

# Defaults of --kl-samples and --categories, for estimators and variants that use them.
KL_SAMPLES, CATEGORIES = 5, 8

Network = Literal["conv", "mlp", "linear", "released_conv", "released_mlp", "released_linear"]
# Distribution of the latents of generated observations.
SamplerName = Literal["prior", "mixture", "posterior"]
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)


@dataclass
class TrainConfig:
    """Configuration of a run. The preset sets the default of every flag that is not given.

    Args:
        variant: name of the VAE. CMP: COM-Poisson posterior, negative binomial prior. P-NB: Poisson posterior, the same
            prior. Negative binomial posterior and prior: a KL form (MC, DS, EX) and a relaxation (C: arrival times, G:
            Gumbel-softmax, I: integers), such as EX-I. Baselines: P-VAE, G-VAE, GS-VAE, L-VAE, C-VAE. Or a registered
            variant.
        data: digits, mnist, fashion_mnist, cifar16, cifar32, celeba64 or a registered data set; or the path of a folder
            of images, or of a .npy, .npz, .csv or .tsv file.
        train_size: number of training observations to use, from the beginning of the data set. Default: all.
        latents: number of latent variables. Default: 64, with the other presets 256.
        encoder: conv (images only), mlp or linear; or one of the paper's networks as released: released_conv,
            released_mlp, released_linear. Default: conv for images, else mlp; with the other presets the released ones.
        decoder: as the encoder.
        likelihood: gaussian; bernoulli (data 0 or 1); poisson or negative_binomial (data are counts).
        beta: weight of the KL relative to the squared error; 2 sigma^2 of the Gaussian likelihood. Default: 0.1 of the
            squared range of images, or of the mean variance of other data; with the other presets the equivalent of
            beta = 1 in the paper, channels * height / latents with a conv decoder, else 1 / latents.
        estimator: class name of an ELBO of this package or of Pyro. Default: the variant's.
        kl_warmup: number of epochs over which the KL weight rises from 0 to 1. Default: a tenth of the epochs; with the
            published preset 2, with the paper preset 50.
        temperature_start: temperature of the relaxation at the start. Default: 0.24 for arrival times (the last in the
            paper), 1 for Gumbel-softmax and with the paper preset, but never below the temperature at the end.
        temperature: temperature of the relaxation at the end. Default: 0.05 for arrival times, 0.25 for Gumbel-softmax.
        anneal_epochs: number of epochs of temperature annealing. Default: half of the epochs.
        relaxation: how counts are differentiated: arrival, gumbel or integer; auto selects the relaxation and the
            temperature with the smallest gradient error at initialisation. Default: the variant's.
        categories: categories per variable of C-VAE, which has latents / categories variables. Default: 8.
        indicator: soft indicator of the arrival times, sigmoid or smoothstep. Default: sigmoid.
        max_count: largest count of Gumbel-softmax, which cuts off the mass above it. Default: none.
        straight_through: use integer counts in the forward pass and relaxed gradients in the backward pass.
        epochs: number of passes over the training data. Default: 20, or as many as 600 steps need; with the published
            preset 20, with the paper preset 200. Resuming for more epochs changes the lr_schedule from there on.
        batch_size: observations per step. Default: 128, with the other presets 512.
        lr: learning rate of Adam. Default: 0.003, with the other presets 0.001.
        lr_schedule: cosine (learning rates fall to 0 over the epochs) or constant. Default: cosine, with the other
            presets constant.
        prior_lr: learning rate of the prior's parameters, if it has any. Default: 10 * lr; with the published preset
            30 * lr, with the paper preset lr.
        prior_mean: initial mean count of a learned prior. Default: 20; with Gumbel-softmax 2; with the paper preset 1.
        clip: maximum gradient norm of the loss per observation. Default: 250, in nats; with the other presets, and the
            Gaussian likelihood, in squared errors: 25, or the paper's.
        kl_samples: number of samples of the Monte Carlo KL. Default: 5.
        seed: random seed.
        device: auto (CUDA if available) or a PyTorch device string.
        mixed_precision: use bfloat16 multiplications in the networks during training, which is faster on hardware that
            supports it; densities and evaluation stay in single precision.
        data_root: folder of the data sets. Default: the environment variable NBVAE_DATA, else the user data folder.
        preset: sets the defaults: default, published (the settings and networks of the tables in docs/results.md, with
            losses in squared errors) or paper (the paper's schedules and 200 epochs).

    Example::

        >>> TrainConfig(variant="EX-I", data="mnist").title
        'EX-I on mnist'
    """

    variant: str = "CMP"
    data: str = "digits"
    train_size: int | None = None
    latents: int | None = None
    encoder: Network | None = None
    decoder: Network | None = None
    likelihood: Literal["gaussian", "bernoulli", "poisson", "negative_binomial"] = "gaussian"
    beta: float | None = None
    estimator: str | None = None
    kl_warmup: float | None = None
    temperature_start: float | None = None
    temperature: float | None = None
    anneal_epochs: float | None = None
    relaxation: Literal["arrival", "gumbel", "integer", "auto"] | None = None
    categories: int | None = None
    indicator: Literal["sigmoid", "smoothstep"] | None = None
    max_count: int | None = None
    straight_through: bool = False
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    lr_schedule: Literal["cosine", "constant"] | None = None
    prior_lr: float | None = None
    prior_mean: float | None = None
    clip: float | None = None
    kl_samples: int | None = None
    seed: int = 0
    device: str = "auto"
    mixed_precision: bool = False
    data_root: str | None = None
    preset: Literal["default", "published", "paper"] | None = None

    @property
    def title(self) -> str:
        """Title of the figures of this run."""
        return f"{self.variant} on {Path(self.data).name}"
