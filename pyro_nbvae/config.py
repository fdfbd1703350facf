"""What a run is. Light to import: the command's help comes from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What a preset decides where a flag is not given. Schedules are linear: the KL weight rises from 0 to 1 over
# `kl_warmup` epochs, the temperature falls from `temperature_start` to `temperature` over `anneal_epochs`.
# The end temperature depends on the relaxation: a cold Gumbel-softmax has noisy gradients.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "epochs": 20,
        "kl_warmup": 2.0,
        "temperature_start": 1.0,
        "temperature": {"arrival": 0.05, "gumbel": 0.25},
        "anneal_epochs": None,  # half of all
        "clip": 25.0,
    },
    # The released code's: epochs out of 250, of which 200 are run; its clip of 1.0 is in units of its own loss.
    "paper": {
        "epochs": 200,
        "kl_warmup": 50.0,
        "temperature_start": 1.0,
        "temperature": {"arrival": 0.05, "gumbel": 1.0},
        "anneal_epochs": 250.0,
        "clip": None,
    },
}


@dataclass
class TrainConfig:
    """What a run is. Flags that are not given are decided by the preset.

    Args:
        variant: which VAE: a KL form (MC, DS, EX) and a relaxation (C: arrival times, G: Gumbel-softmax) of the
            negative binomial, as in EX-C; or a baseline, P-VAE, G-VAE, L-VAE or C-VAE.
        data: which images: digits, mnist, fashion_mnist, cifar16, cifar32 or celeba64.
        train_images: train on only the first so many. Default: all.
        latents: number of latent units.
        encoder: conv, mlp or linear.
        decoder: conv, mlp or linear.
        beta: squared error that a nat of KL is worth, 2 sigma^2 of the decoder. Default: what the paper's beta of 1
            amounts to, channels * height / latents with a conv decoder and 1 / latents otherwise.
        kl_warmup: epochs over which the KL's weight rises from 0 to 1.
        temperature_start: temperature of the relaxation at the start.
        temperature: temperature of the relaxation at the end. Default: 0.05 for arrival times, 0.25 for Gumbel-softmax.
        anneal_epochs: epochs from the one to the other. Default: half of all.
        relaxation: of P-VAE, arrival or gumbel; the other variants' is in their name.
        categories: of each variable of C-VAE; latents / categories variables.
        indicator: of the arrival times, sigmoid or smoothstep.
        max_count: largest count of the Gumbel-softmax.
        straight_through: integer counts forward, relaxed gradients backward.
        epochs: passes over the training images.
        batch_size: images a step.
        lr: learning rate of Adam.
        clip: largest gradient norm, in units of squared error per image.
        kl_samples: samples of the Monte Carlo KL.
        seed: of everything random.
        device: auto (CUDA where it is), or a device of torch's.
        mixed_precision: networks multiply in bfloat16 in training, quicker where the hardware can; densities and all
            of evaluation stay in single precision.
        data_root: where the data are. Default: the variable NBVAE_DATA, else the platform's user data folder.
        preset: default, or paper (the paper's schedules and 200 epochs).
    """

    variant: str = "EX-C"
    data: str = "digits"
    train_images: int | None = None
    latents: int = 256
    encoder: str = "conv"
    decoder: str = "conv"
    beta: float | None = None
    kl_warmup: float | None = None
    temperature_start: float | None = None
    temperature: float | None = None
    anneal_epochs: float | None = None
    relaxation: str | None = None
    categories: int = 8
    indicator: str = "sigmoid"
    max_count: int = 100
    straight_through: bool = False
    epochs: int | None = None
    batch_size: int = 512
    lr: float = 1e-3
    clip: float | None = None
    kl_samples: int = 5
    seed: int = 0
    device: str = "auto"
    mixed_precision: bool = False
    data_root: str | None = None
    preset: str = "default"

    @property
    def title(self) -> str:
        """What a picture of the run is headed by."""
        return f"{self.variant} on {self.data}"


@dataclass(frozen=True)
class Scale:
    """How much of a table is run: fields of every run's configuration, how many seeds, and samples for FID and KID."""

    config: dict[str, Any]
    seeds: int
    samples: int


SCALES = {
    "smoke": Scale({"epochs": 1, "train_images": 2_000, "batch_size": 100}, seeds=1, samples=1_000),
    # Small batches: many steps for few images.
    "small": Scale({"epochs": 8, "train_images": 10_000, "batch_size": 100}, seeds=3, samples=10_000),
    "paper": Scale({"preset": "paper"}, seeds=5, samples=10_000),
}

# The scripts in experiments/ that state a table.
TABLES = ("main", "latents", "decoder", "beta", "mc-samples", "relaxation", "families")


@dataclass
class Reproduction:
    """How a table is reproduced.

    Args:
        scale: smoke (one epoch of 2,000 images, one seed: minutes), small (8 epochs of 10,000 images, three seeds:
            hours on two cores) or paper (200 epochs of all images, five seeds). The networks are the same.
        variants: only these. Default: the table's.
        data: only these. Default: the table's.
        seeds: only these. Default: the scale's, 0 and up.
        out: the folder of all run folders and tables; what is finished there is not done again.
        features: what FID and KID compare images in: classifier (FID-c, KID-c), inception, or both.
        inception_weights: torch-fidelity's weights file. Default: the data root's, else it is downloaded.
        samples: images to generate for FID and KID. Default: 10,000, at scale smoke 1,000.
        jobs: runs side by side on this machine; its cores, or its GPUs, are shared out among them.
        cluster: send the runs through submitit (extra "cluster") instead: slurm, or local to try that out.
        cluster_options: submitit's own, as in timeout_min=600 slurm_partition=gpu gpus_per_node=1.
        device: auto (CUDA where it is), or a device of torch's.
        data_root: where the data are. Default: the variable NBVAE_DATA, else the platform's user data folder.
    """

    scale: str = "smoke"
    variants: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    out: str = "runs/reproduce"
    features: tuple[str, ...] = ("classifier",)
    inception_weights: str | None = None
    samples: int | None = None
    jobs: int = 1
    cluster: str | None = None
    cluster_options: tuple[str, ...] = ()
    device: str = "auto"
    data_root: str | None = None
