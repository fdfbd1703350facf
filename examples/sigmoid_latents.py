"""The continuous baselines of the paper's released code, whose latents pass through a sigmoid before the decoder.

A model of your own may change a single method, here ``decode``. Registered under a name, its variant has a place in
every table:

    python -m examples.sigmoid_latents
    nbvae --import examples.sigmoid_latents reproduce main --scale small --variants G-VAE G-VAE-sigmoid
"""

from dataclasses import replace
from pathlib import Path

import tyro

from pyro_nbvae.models import GaussianModel, LaplaceModel
from pyro_nbvae.study.config import TrainConfig
from pyro_nbvae.study.training import train
from pyro_nbvae.study.variants import VARIANTS, register_variant


class SigmoidGaussianModel(GaussianModel):
    """z ~ Normal(0, 1), x ~ likelihood(decoder(sigmoid(z)))."""

    def decode(self, z):
        return super().decode(z.sigmoid())


class SigmoidLaplaceModel(LaplaceModel):
    """z ~ Laplace(0, 1), x ~ likelihood(decoder(sigmoid(z)))."""

    def decode(self, z):
        return super().decode(z.sigmoid())


register_variant("G-VAE-sigmoid", replace(VARIANTS["G-VAE"], model=SigmoidGaussianModel))
register_variant("L-VAE-sigmoid", replace(VARIANTS["L-VAE"], model=SigmoidLaplaceModel))


def main(epochs: int = 20, out: Path = Path("runs/examples/sigmoid")) -> None:
    """Train a Gaussian VAE on the digits with the sigmoid and without.

    Args:
        epochs: passes over the digits.
        out: the folder of the run folders.
    """
    for variant in ("G-VAE", "G-VAE-sigmoid"):
        config = TrainConfig(
            variant=variant, data="digits", latents=32, encoder="mlp", decoder="mlp", batch_size=100, epochs=epochs
        )
        log = train(config, out / variant, resume=True).read_checkpoint()["log"]
        print(f"{variant}: held-out ELBO {log[-1]['test_elbo']:.1f} nats")


if __name__ == "__main__":
    tyro.cli(main)
