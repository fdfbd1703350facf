"""A family of your own, defined outside the package: geometric spike counts.

A geometric distribution has the largest entropy of all count distributions with its mean. A family is one class with
three functions of the counts and its parameters, which give it samples with a gradient, moments and KLs, and a KL in
closed form if there is one. Model and guide are two classes with one method each, registered under a name:

    python -m examples.own_family
    nbvae --import examples.own_family train --variant GEOMETRIC --data digits --latents 32 --out runs/geometric
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from pyro.distributions import constraints
from torch import nn
from torch.distributions import register_kl
from torch.nn.functional import logsigmoid, softplus

import pyro_nbvae
from pyro_nbvae.distributions import CountDistribution, Integer
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.training import train
from pyro_nbvae.study.tree import VAE, Kind
from pyro_nbvae.study.variants import register_variant
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel


class Geometric(CountDistribution):
    """The mass of the count k is sigma(-l) sigma(l)^k; its mean is e^l."""

    arg_constraints = {"logits": constraints.real}

    @staticmethod
    def log_weight(k, logits):
        return k * logsigmoid(logits)

    @staticmethod
    def scores(k, logits):
        return (k * torch.sigmoid(-logits),)

    @staticmethod
    def window(nats, logits):
        return 0 * logits, nats / softplus(-logits)  # the mass above k is sigma(l)^(k + 1)


@register_kl(Geometric, Geometric)
def geometric_kl(q, p):
    return softplus(p.logits) - softplus(q.logits) + q.logits.exp() * (softplus(-p.logits) - softplus(-q.logits))


class GeometricPrior(nn.Module):
    """Learned logits of each latent; the mean is e^logits."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(latents))


class GeometricModel(GenerativeModel):
    prior_class = GeometricPrior

    def factorised_prior(self):
        return Geometric(self.prior.logits)


class GeometricGuide(AmortizedGuide):
    prior_class = GeometricPrior

    def posterior_from(self, outputs):
        (shift,) = outputs
        return Geometric(self.prior.logits + shift, relaxation=self.relaxation)


@dataclass(frozen=True, kw_only=True)
class GeometricVAE(VAE):
    """Geometric posterior and prior."""

    kind: Kind[Literal["geometric"]] = "geometric"

    def build(self, event_shape, latents, *, encoder, **options):
        model = GeometricModel(event_shape, latents, **options)
        return model, GeometricGuide(model, encoder=encoder, relaxation=Integer())


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
