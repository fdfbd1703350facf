"""What the package draws has no noise in common with data that were drawn with the same seed."""

import pytest
import torch

from pyro_nbvae.batching import random_subset
from pyro_nbvae.vae import evaluating
from tests.pairs import pair

DRAWS = {
    "uniform": lambda shape: torch.rand(shape),
    "uniform, float64": lambda shape: torch.rand(shape, dtype=torch.float64),
    "normal": lambda shape: torch.randn(shape),
    "normal, float64": lambda shape: torch.randn(shape, dtype=torch.float64),
    "exponential, float64": lambda shape: torch.empty(shape, dtype=torch.float64).exponential_(),
    "Poisson": lambda shape: torch.poisson(torch.full(shape, 5.0)),
    "permutation": lambda shape: torch.randperm(shape[0]).double(),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_a_random_subset_of_drawn_data_has_their_mean(draw):
    """Twenty seeds, each mean within 4.5 standard errors of a sample of 1,000 without replacement from 10,000."""
    for seed in range(20):
        torch.manual_seed(seed)
        x = DRAWS[draw]((10_000,)).double()
        error = float(x.std()) * (0.9 / 1000) ** 0.5
        assert abs(float(random_subset(x, 1000).mean() - x.mean())) < 4.5 * error, seed


@pytest.mark.parametrize("seed", range(3))
def test_an_evaluation_does_not_share_the_noise_of_its_data(seed):
    """The noise of posteriors and of generated latents is not that of data drawn with the same seed: 4.5 errors."""
    model, guide = pair("G-VAE", (4,), latents=4)
    torch.manual_seed(seed)
    x = torch.randn(500, 4)
    with evaluating(model, guide, seed):
        posterior = guide.posterior(x)
        noise = (posterior.sample() - posterior.mean) / posterior.stddev
    with evaluating(model, guide, seed):
        latents = model.prior_distribution().sample((500,))
    for drawn in (noise, latents):
        correlation = torch.corrcoef(torch.stack([x.flatten(), drawn.flatten()]))[0, 1]
        assert abs(float(correlation)) < 4.5 / 2000**0.5
