"""Bias and variance of gradients where both are known, and the unbiased gradient against a closed form."""

import math

import pytest
import torch
from torch import nn

from pyro_nbvae.distributions import ArrivalTimes, Integer
from pyro_nbvae.errors import InputError
from pyro_nbvae.guides import ConwayMaxwellPoissonGuide, NegativeBinomialGuide, PoissonGuide
from pyro_nbvae.infer import AnalyticKL_ELBO
from pyro_nbvae.likelihoods import Gaussian
from pyro_nbvae.metrics import gradient_moments
from pyro_nbvae.metrics.gradients import (
    encoder_outputs,
    gradient_error,
    gradient_errors,
    mean_gradient,
    pathwise_gradient,
    score_gradient,
    unbiased_gradient,
)
from pyro_nbvae.models import NegativeBinomialModel

SHAPE, LATENTS = (6,), 4


def pair(guide, **options):
    """A linear decoder and squared errors: the gradient is known."""
    model = NegativeBinomialModel(SHAPE, LATENTS, decoder=nn.Linear(LATENTS, 6), likelihood=Gaussian(2.0))
    return model, guide(model, encoder="linear", **options)


def closed_form(model, guide, x):
    """The gradient of |x - W m - b|^2 + sum v_k |W_k|^2 over 2 sigma^2, in the encoder's outputs, averaged."""
    outputs = encoder_outputs(guide, x)
    q = guide.posterior_from(outputs)
    weight = model.decoder.weight / model.initial_stddev
    error = (x - model.decode(q.mean)).square().sum(1) + (q.variance * weight.square().sum(0)).sum(1)
    return mean_gradient(error.sum() / model.likelihood.beta, outputs)


@pytest.mark.parametrize("guide", [NegativeBinomialGuide, PoissonGuide, ConwayMaxwellPoissonGuide])
@pytest.mark.parametrize("way", ["exact", "integer", "score", "VarGrad"])
def test_unbiased_ways_meet_the_closed_form(guide, way):
    """Means of 300 draws within 4.5 standard errors in every coordinate."""
    model, guide = pair(guide)
    x = torch.rand(5, *SHAPE)
    draw = {
        "exact": lambda: unbiased_gradient(model, guide, x),
        "integer": lambda: pathwise_gradient(model, guide, x, Integer()),
        "score": lambda: score_gradient(model, guide, x, 1),
        "VarGrad": lambda: score_gradient(model, guide, x, 4),
    }[way]
    drawn = torch.stack([draw() for _ in range(300)])
    difference = (drawn.mean(0) - closed_form(model, guide, x)).abs()
    assert (difference < 4.5 * drawn.std(0) / math.sqrt(300) + 1e-6).all()


def test_moments_of_a_batch_do_not_depend_on_the_size_of_the_data():
    found = []
    for size in (None, 1000):
        torch.manual_seed(0)
        model = NegativeBinomialModel(SHAPE, LATENTS, decoder="linear", likelihood=Gaussian(2.0), data_size=size)
        guide = PoissonGuide(model, encoder="linear")
        found.append(gradient_moments(AnalyticKL_ELBO(), model, guide, torch.ones(10, *SHAPE), 5))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_estimates_of_bias_and_variance_are_unbiased():
    """Of gradients of known moments: means over 300 estimates within 4 standard errors."""
    truth, shift, sigma = torch.full((30,), 0.5).double(), 0.2, 3.0
    found = []
    for _ in range(300):
        exact = truth + 0.1 * torch.randn(20, 30, dtype=torch.float64)
        found.append(
            gradient_error(truth + shift + sigma * torch.randn(25, 30, dtype=torch.float64), exact, batches=4.0)
        )
    norm = float(truth.square().sum())
    for values, true in (
        ([f.squared_bias for f in found], 30 * shift**2 / norm),
        ([f.variance for f in found], 30 * 9 / 4 / norm),
    ):
        values = torch.tensor(values, dtype=torch.float64)
        assert abs(float(values.mean()) - true) < 4 * float(values.std()) / math.sqrt(300)
    spread = torch.tensor([f.squared_bias for f in found]).std()
    claimed = torch.tensor([f.squared_bias_error for f in found]).mean()
    assert 0.7 < float(claimed / spread) < 1.5


def test_warm_relaxations_are_found_biased():
    model, guide = pair(NegativeBinomialGuide)
    before = guide.relaxation
    x = torch.rand(5, *SHAPE)
    state = torch.get_rng_state()
    errors = gradient_errors(
        model,
        guide,
        x,
        [Integer(), ArrivalTimes(1.0)],
        samples=1500,
        unbiased_samples=1000,
    )
    integer, arrival = errors
    assert abs(integer.squared_bias) < 4 * integer.squared_bias_error
    assert arrival.squared_bias > 4 * arrival.squared_bias_error
    assert torch.equal(torch.get_rng_state(), state) and guide.relaxation is before


def test_dropout_is_off_while_gradients_are_compared():
    """The errors of a decoder with dropout are those of the same decoder without, and its mode is left as it was."""
    model, guide = pair(PoissonGuide)
    x = torch.rand(5, *SHAPE)
    ways = [Integer(), ArrivalTimes(0.5)]
    without = gradient_errors(model, guide, x, ways, samples=20, unbiased_samples=20)
    frozen = nn.Dropout(0.5).eval()
    model.decoder = nn.Sequential(nn.Dropout(0.5), model.decoder, frozen)
    assert gradient_errors(model, guide, x, ways, samples=20, unbiased_samples=20) == without
    assert model.training and model.decoder[0].training and not frozen.training


def test_errors_relative_to_nothing_are_refused():
    torch.manual_seed(0)
    with pytest.raises(InputError, match="not distinguishable from 0 with 20 unbiased samples"):
        for _ in range(20):
            gradient_error(torch.zeros(20, 3), torch.randn(20, 3))


# --- moments of the gradient of an ELBO estimator ------------------------------------------------------------------

MEAN, DEVIATION, PARAMETERS, SAMPLES = 0.3, 2.0, 40, 50


class KnownGradient:
    """A loss whose gradient is normal, of mean ``MEAN`` and deviation ``DEVIATION`` in every parameter."""

    def differentiable_loss(self, model, guide, x):
        gradient = MEAN + DEVIATION * torch.randn(PARAMETERS)
        return (guide.weight.flatten() * gradient).sum() * len(x)


def test_squared_norm_and_variance_are_unbiased():
    """Means over 200 estimates, each of 50 gradients, within 4 standard errors."""
    guide = nn.Linear(PARAMETERS, 1, bias=False)
    found = [gradient_moments(KnownGradient(), None, guide, torch.zeros(7, 1), SAMPLES, seed=k) for k in range(200)]
    truth = (PARAMETERS * MEAN**2, PARAMETERS * DEVIATION**2)
    for values, true in zip(torch.tensor(found, dtype=torch.float64).T, truth, strict=True):
        assert abs(float(values.mean()) - true) < 4 * float(values.std()) / math.sqrt(len(values))
