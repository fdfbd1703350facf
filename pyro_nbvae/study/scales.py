"""Options of ``nbvae reproduce``. This module imports quickly because the command line's help is built from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

ScaleName = Literal["smoke", "small", "medium", "full", "paper"]
ClusterName = Literal["slurm", "local"]
FeaturesName = Literal["classifier", "inception", "inception_bfloat16"]


@dataclass(frozen=True)
class Scale:
    """Size of a table: configuration of every run, number of seeds, and number of samples for FID and KID."""

    config: dict[str, Any]
    seeds: int
    samples: int


def _published(seeds: int, samples: int = 10_000, **config: Any) -> Scale:
    return Scale({"preset": "published", **config}, seeds, samples)


SCALES: dict[ScaleName, Scale] = {
    "smoke": _published(1, 1_000, epochs=1, train_size=2_000, batch_size=100),
    # Small batches, for more steps.
    "small": _published(3, epochs=8, train_size=10_000, batch_size=100),
    "medium": _published(1, epochs=15, batch_size=256),
    # Long runs multiply in bfloat16; the table precision compares it with float32.
    "full": _published(3, epochs=50, batch_size=256, mixed_precision=True),
    "paper": Scale({"preset": "paper", "mixed_precision": True}, seeds=5, samples=10_000),
}


@dataclass
class Reproduction:
    """Options for reproducing a table.

    Args:
        scale: smoke (one epoch of 2,000 images, one seed: minutes), small (8 epochs of 10,000 images, three seeds:
            hours on two cores), medium (15 epochs of all images, one seed), full (50 epochs of all images, three seeds)
            or paper (200 epochs of all images with the paper's schedules, five seeds). The networks are the same; at
            full and paper they multiply in bfloat16 in training.
        variants: variants to run. Default: those of the table.
        data: data sets to run. Default: those of the table.
        seeds: seeds to run. Default: as many as the scale has, from 0.
        out: folder of all run folders and tables; finished runs in it are not repeated.
        features: features for FID and KID: classifier (FID-c, KID-c); inception, or inception_bfloat16 (half the
            time on a CPU); or classifier and one of these.
        inception_weights: torch-fidelity's weights file. Default: the file in the data root, else it is downloaded.
        samples: number of generated images for FID and KID. Default: 10,000; at scale smoke, 1,000.
        jobs: number of parallel runs on this machine; they share its CPU cores or GPUs.
        cluster: submit the runs through submitit (extra "cluster") instead: slurm, or local for a test.
        cluster_options: options of submitit, for example timeout_min=600 slurm_partition=gpu gpus_per_node=1.
        device: auto (CUDA if available) or a PyTorch device string.
        data_root: folder of the data sets. Default: the environment variable NBVAE_DATA, else the user data folder.
    """

    scale: ScaleName = "smoke"
    variants: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    out: str = "runs/reproduce"
    features: tuple[FeaturesName, ...] = ("classifier",)
    inception_weights: str | None = None
    samples: int | None = None
    jobs: int = 1
    cluster: ClusterName | None = None
    cluster_options: tuple[str, ...] = ()
    device: str = "auto"
    data_root: str | None = None

    @property
    def number_of_samples(self) -> int:
        """Number of generated images for FID and KID."""
        return SCALES[self.scale].samples if self.samples is None else self.samples
