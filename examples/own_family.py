"""A family of your own, defined outside the package: geometric spike counts.

A geometric distribution is a negative binomial with dispersion 1; it has the largest entropy of all count distributions
with its mean. Model and guide are two classes with one method each, registered under a name:

    python -m examples.own_family
    nbvae --import examples.own_family train --variant GEOMETRIC --data digits --latents 32 --out runs/geometric
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import nn

import pyro_nbvae
from pyro_nbvae.distributions import ArrivalTimes, RelaxedNegativeBinomial
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.training import train
from pyro_nbvae.study.tree import VAE, Kind
from pyro_nbvae.study.variants import register_variant
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel


class GeometricPrior(nn.Module):
    """Learned logits of each latent; the mean is e^logits."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(latents))


class GeometricModel(GenerativeModel):
    prior_class = GeometricPrior

    def prior_distribution(self):
        return RelaxedNegativeBinomial(1.0, logits=self.prior.logits)


class GeometricGuide(AmortizedGuide):
    prior_class = GeometricPrior

    def posterior_from(self, outputs):
        (shift,) = outputs
        return RelaxedNegativeBinomial(1.0, logits=self.prior.logits + shift, relaxation=self.relaxation)


@dataclass(frozen=True, kw_only=True)
class GeometricVAE(VAE):
    """Geometric posterior and prior."""

    kind: Kind[Literal["geometric"]] = "geometric"

    def build(self, event_shape, latents, *, encoder, **options):
        model = GeometricModel(event_shape, latents, **options)
        return model, GeometricGuide(model, encoder=encoder, relaxation=ArrivalTimes(0.24))


register_variant("GEOMETRIC", GeometricVAE())


def main(epochs: int = 20, out: Path = Path("runs/examples/geometric")) -> None:
    """Train the variant as the command does, and load the run.

    Args:
        epochs: passes over the digits.
        out: the run folder.
    """
    config = configure("GEOMETRIC", data="digits", latents=32, encoder="mlp", decoder="mlp", epochs=epochs)
    run = train(config, out, resume=True)
    log = run.read_checkpoint()["log"]
    print(f"held-out ELBO: {log[0]['test_elbo']:.1f} nats after an epoch, {log[-1]['test_elbo']:.1f} at the end")
    model, _ = pyro_nbvae.load(out)
    z, images = model.generate(4)
    print(f"four samples of the prior: counts up to {int(z.max())}, images {tuple(images.shape)}")


if __name__ == "__main__":
    tyro.cli(main)
