"""The continuous baselines of the paper's released code, whose latents pass through a sigmoid before the decoder.

A model of your own may change a single method, here ``decode``. Its variant is a dataclass that builds model and guide;
registered under a name, it has a place in every table:

    python -m examples.sigmoid_latents
    nbvae --import examples.sigmoid_latents reproduce main --scale small --variants G-VAE G-VAE-sigmoid
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from pyro_nbvae.guides import GaussianGuide, LaplaceGuide
from pyro_nbvae.models import GaussianModel, LaplaceModel
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.training import train
from pyro_nbvae.study.tree import Kind
from pyro_nbvae.study.variants import GaussianVAE, LaplaceVAE, register_variant


class SigmoidGaussianModel(GaussianModel):
    """z ~ Normal(0, 1), x ~ likelihood(decoder(sigmoid(z)))."""

    def decode(self, z):
        return super().decode(z.sigmoid())


class SigmoidLaplaceModel(LaplaceModel):
    """z ~ Laplace(0, 1), x ~ likelihood(decoder(sigmoid(z)))."""

    def decode(self, z):
        return super().decode(z.sigmoid())


@dataclass(frozen=True, kw_only=True)
class SigmoidGaussianVAE(GaussianVAE):
    """Gaussian posterior, standard normal prior, sigmoid of the latents."""

    kind: Kind[Literal["sigmoid_gaussian"]] = "sigmoid_gaussian"

    def build(self, event_shape, latents, *, encoder, **options):
        model = SigmoidGaussianModel(event_shape, latents, **options)
        return model, GaussianGuide(model, encoder=encoder)


@dataclass(frozen=True, kw_only=True)
class SigmoidLaplaceVAE(LaplaceVAE):
    """Laplace posterior, standard Laplace prior, sigmoid of the latents."""

    kind: Kind[Literal["sigmoid_laplace"]] = "sigmoid_laplace"

    def build(self, event_shape, latents, *, encoder, **options):
        model = SigmoidLaplaceModel(event_shape, latents, **options)
        return model, LaplaceGuide(model, encoder=encoder)


register_variant("G-VAE-sigmoid", SigmoidGaussianVAE())
register_variant("L-VAE-sigmoid", SigmoidLaplaceVAE())


def main(epochs: int = 20, out: Path = Path("runs/examples/sigmoid")) -> None:
    """Train a Gaussian VAE on the digits with the sigmoid and without.

    Args:
        epochs: passes over the digits.
        out: the folder of the run folders.
    """
    for variant in ("G-VAE", "G-VAE-sigmoid"):
        config = configure(
            variant, data="digits", latents=32, encoder="mlp", decoder="mlp", batch_size=100, epochs=epochs
        )
        log = train(config, out / variant, resume=True).read_checkpoint()["log"]
        print(f"{variant}: held-out ELBO {log[-1]['test_elbo']:.1f} nats")


if __name__ == "__main__":
    tyro.cli(main)
