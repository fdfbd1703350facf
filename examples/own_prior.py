"""A joint prior of your own: latents that share a gain, as cortical neurons do.

Each observation has one of several gains, which multiplies the mean counts of all units, to a power that is learned
for each unit. A joint prior is a module from the model's independent prior to a joint distribution; training, bounds
and samples are as with any other.

    python -m examples.own_prior
"""

import pyro
import torch
import tyro
from pyro.infer import SVI
from pyro.optim import ClippedAdam
from torch import nn

from pyro_nbvae.batching import to_floats
from pyro_nbvae.distributions import TiltedMixture
from pyro_nbvae.guides import ConwayMaxwellPoissonGuide
from pyro_nbvae.infer import AnalyticKL_ELBO, learning_rates
from pyro_nbvae.likelihoods import Gaussian
from pyro_nbvae.metrics import held_out
from pyro_nbvae.models import NegativeBinomialModel
from pyro_nbvae.priors import JointPrior, Mixture
from pyro_nbvae.sampling import start_prior
from pyro_nbvae.study.data import load


class SharedGain(JointPrior):
    """A mixture in which a component multiplies the odds of unit i by e^(g a_i), with one g for all units."""

    lr_multiplier = 5.0  # relative to the networks, for nbvae train

    def __init__(self, gains: int = 15) -> None:
        super().__init__()
        self.log_gain = nn.Parameter(torch.linspace(-1, 1, gains))
        self.component_logits = nn.Parameter(torch.zeros(gains))

    def setup(self, reference):
        self.loading = nn.Parameter(0.1 * torch.randn(reference.batch_shape))

    def forward(self, reference):
        return TiltedMixture(reference, [self.log_gain[:, None] * self.loading], self.component_logits)


def main(epochs: int = 20) -> None:
    """Train with independent latents, with a shared gain, and with a mixture.

    Args:
        epochs: passes over the digits, for each prior.
    """
    digits = load("digits")
    images = to_floats(digits.train)
    for name, prior in (("independent", None), ("shared gain", SharedGain()), ("mixture", Mixture(30))):
        torch.manual_seed(0)
        pyro.clear_param_store()
        model = NegativeBinomialModel((1, 16, 16), latents=32, likelihood=Gaussian(beta=0.2), prior=prior)
        guide = ConwayMaxwellPoissonGuide(model)
        svi = SVI(model, guide, ClippedAdam(learning_rates(3e-3)), loss=AnalyticKL_ELBO())
        for epoch in range(epochs):
            if epoch == 1:
                start_prior(model, guide, images)
            for batch in images[torch.randperm(len(images))].split(100):
                svi.step(batch)
        print(f"{name}: held-out ELBO {held_out(model, guide, digits.test).elbo:.1f} nats")


if __name__ == "__main__":
    tyro.cli(main)
