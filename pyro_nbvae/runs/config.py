"""What a run is. Light to import: the command's help comes from here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# What a preset decides where a flag is not given. Schedules are linear: the KL weight rises from 0 to 1 over
# `kl_warmup` epochs, the temperature falls from `temperature_start` to `temperature` over `anneal_epochs`.
# A temperature that is None is the relaxation's `coldest`; the prior's learning rate is `prior_pace` times `lr`.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "epochs": 20,
        "kl_warmup": 2.0,
        "temperature_start": 1.0,
        "temperature": {},
        "anneal_epochs": None,  # half of all
        "clip": 25.0,
        "prior_pace": 30.0,
        "prior_mean": 2.0,
    },
    # The released code's: epochs out of 250, of which 200 are run; its clip of 1.0 is in units of its own loss.
    "paper": {
        "epochs": 200,
        "kl_warmup": 50.0,
        "temperature_start": 1.0,
        "temperature": {"arrival": 0.05, "gumbel": 1.0},
        "anneal_epochs": 250.0,
        "clip": None,
        "prior_pace": 1.0,
        "prior_mean": 1.0,
    },
}

# Where a flag is not given, for the estimator and the variant that have one.
KL_SAMPLES, CATEGORIES = 5, 8

Network = Literal["conv", "mlp", "linear"]


@dataclass
class TrainConfig:
    """What a run is. Flags that are not given are decided by the preset.

    Args:
        variant: which VAE: CMP (COM-Poisson posterior, negative binomial prior); P-NB (Poisson posterior, the same
            prior); a KL form (MC, DS, EX) and a relaxation (C: arrival times, G: Gumbel-softmax, I: integers) of the
            negative binomial, as in EX-I; a baseline, P-VAE, G-VAE, L-VAE or C-VAE; or a registered one.
        data: digits, mnist, fashion_mnist, cifar16, cifar32, celeba64 or a registered set; or a folder of images, a
            .npy or a .npz file.
        train_size: train on only the first so many observations. Default: all.
        latents: number of latent units.
        encoder: conv (images only), mlp or linear.
        decoder: conv (images only), mlp or linear.
        likelihood: gaussian; bernoulli (data 0 or 1); poisson or negative_binomial (data are counts).
        beta: squared error that a nat of KL is worth, 2 sigma^2 of a Gaussian likelihood. Default: what the paper's
            beta of 1 amounts to, channels * height / latents with a conv decoder and 1 / latents otherwise.
        estimator: an ELBO of this package or of Pyro, by the name of its class. Default: the variant's.
        kl_warmup: epochs over which the KL's weight rises from 0 to 1.
        temperature_start: temperature of the relaxation at the start.
        temperature: temperature of the relaxation at the end. Default: 0.05 for arrival times, 0.25 for Gumbel-softmax.
        anneal_epochs: epochs of temperature annealing. Default: half of all.
        relaxation: how counts are differentiated: arrival, gumbel, integer, or auto: the one, and the temperature,
            whose gradient is nearest the truth as training begins. Default: the variant's.
        categories: of each variable of C-VAE; latents / categories variables. Default: 8.
        indicator: of the arrival times, sigmoid or smoothstep. Default: sigmoid.
        max_count: largest count of the Gumbel-softmax. Default: 100.
        straight_through: integer counts forward, relaxed gradients backward.
        epochs: passes over the training data.
        batch_size: observations per step.
        lr: learning rate of Adam.
        prior_lr: learning rate of the prior's parameters, where it has any. Default: 30 * lr.
        prior_mean: mean count of the prior at the start, where it is learned. Default: 2, of CMP 1.
        clip: largest gradient norm of the loss of an observation. Default: 25 squared errors, or 250 nats under another
            likelihood than the Gaussian.
        kl_samples: samples of the Monte Carlo KL. Default: 5.
        seed: random seed.
        device: auto (CUDA if available) or a PyTorch device string.
        mixed_precision: multiply in bfloat16 in the networks during training, faster where the hardware supports it;
            densities and all of evaluation stay in single precision.
        data_root: folder of the data sets. Default: the variable NBVAE_DATA, else the platform's user data folder.
        preset: default, or paper (the paper's schedules and 200 epochs).
    """

    variant: str = "CMP"
    data: str = "digits"
    train_size: int | None = None
    latents: int = 256
    encoder: Network = "conv"
    decoder: Network = "conv"
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
    batch_size: int = 512
    lr: float = 1e-3
    prior_lr: float | None = None
    prior_mean: float | None = None
    clip: float | None = None
    kl_samples: int | None = None
    seed: int = 0
    device: str = "auto"
    mixed_precision: bool = False
    data_root: str | None = None
    preset: Literal["default", "paper"] = "default"

    @property
    def title(self) -> str:
        """What a picture of the run is headed by."""
        return f"{self.variant} on {Path(self.data).name}"
