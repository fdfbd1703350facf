"""What a table is reproduced with. Light to import: the command's help comes from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

ScaleName = Literal["smoke", "small", "medium", "full", "paper"]


@dataclass(frozen=True)
class Scale:
    """How much of a table is run: fields of every run's configuration, how many seeds, and samples for FID and KID."""

    config: dict[str, Any]
    seeds: int
    samples: int


SCALES: dict[ScaleName, Scale] = {
    "smoke": Scale({"epochs": 1, "train_size": 2_000, "batch_size": 100}, seeds=1, samples=1_000),
    # Small batches: many steps for few images.
    "small": Scale({"epochs": 8, "train_size": 10_000, "batch_size": 100}, seeds=3, samples=10_000),
    "medium": Scale({"epochs": 15, "batch_size": 256}, seeds=1, samples=10_000),
    "full": Scale({"epochs": 50, "batch_size": 256}, seeds=3, samples=10_000),
    "paper": Scale({"preset": "paper"}, seeds=5, samples=10_000),
}

# The scripts in experiments/ that state a table.
TABLES = ("main", "prior", "latents", "decoder", "beta", "mc-samples", "relaxation", "families")


@dataclass
class Reproduction:
    """How a table is reproduced.

    Args:
        scale: smoke (one epoch of 2,000 images, one seed: minutes), small (8 epochs of 10,000 images, three seeds:
            hours on two cores), medium (15 epochs of all images, one seed), full (50 epochs of all images, three seeds)
            or paper (200 epochs of all images with the paper's schedules, five seeds). The networks are the same.
        variants: only these. Default: the table's.
        data: only these. Default: the table's.
        seeds: only these. Default: the scale's, 0 and up.
        out: the folder of all run folders and tables; what is finished there is kept.
        features: which features FID and KID use: classifier (FID-c, KID-c), inception, or both.
        inception_weights: torch-fidelity's weights file. Default: the data root's, else it is downloaded.
        samples: images to generate for FID and KID. Default: 10,000, at scale smoke 1,000.
        jobs: runs side by side on this machine; its cores, or its GPUs, are shared out among them.
        cluster: send the runs through submitit (extra "cluster") instead: slurm, or local to try that out.
        cluster_options: submitit's own, as in timeout_min=600 slurm_partition=gpu gpus_per_node=1.
        device: auto (CUDA if available) or a PyTorch device string.
        data_root: folder of the data sets. Default: the variable NBVAE_DATA, else the platform's user data folder.
    """

    scale: ScaleName = "smoke"
    variants: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    out: str = "runs/reproduce"
    features: tuple[Literal["classifier", "inception"], ...] = ("classifier",)
    inception_weights: str | None = None
    samples: int | None = None
    jobs: int = 1
    cluster: Literal["slurm", "local"] | None = None
    cluster_options: tuple[str, ...] = ()
    device: str = "auto"
    data_root: str | None = None
