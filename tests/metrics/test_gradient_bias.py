"""Bias and noise of gradients where both are known, and the exact gradient against a closed form."""

import math

import pytest
import torch
from torch import nn

from pyro_nbvae.distributions import ArrivalTimes, Integer
from pyro_nbvae.errors import InputError
from pyro_nbvae.guides import ConwayMaxwellPoissonGuide, NegativeBinomialGuide, PoissonGuide
from pyro_nbvae.likelihoods import Gaussian
from pyro_nbvae.metrics.gradient_bias import (
    compare,
    draw_many,
    exact_draw,
    gradient_errors,
    outputs,
    pathwise_draw,
    score_draw,
)
from pyro_nbvae.models import NegativeBinomialModel

SHAPE, LATENTS = (6,), 4


def pair(guide, **options):
    """A linear decoder and squared errors: the gradient is known."""
    model = NegativeBinomialModel(SHAPE, LATENTS, decoder=nn.Linear(LATENTS, 6), likelihood=Gaussian(2.0))
    return model, guide(model, encoder="linear", **options)


def closed_form(model, guide, x):
    """The gradient of |x - W m - b|^2 + sum v_k |W_k|^2 over 2 sigma^2, in the encoder's outputs, averaged."""
    with outputs(guide, x) as leaves:
        q = guide.posterior(x)
        weight = model.decoder.weight / model.initial_stddev
        error = (x - model.decode(q.mean)).square().sum(1) + (q.variance * weight.square().sum(0)).sum(1)
        loss = error.sum() / model.likelihood.beta
        return torch.cat([g.double().mean(0) for g in torch.autograd.grad(loss, leaves)])


@pytest.mark.parametrize("guide", [NegativeBinomialGuide, PoissonGuide, ConwayMaxwellPoissonGuide])
@pytest.mark.parametrize("way", ["exact", "integer", "score", "VarGrad"])
def test_unbiased_ways_meet_the_closed_form(guide, way):
    """Means of 600 draws within 4.5 standard errors in every coordinate."""
    model, guide = pair(guide)
    x = torch.rand(5, *SHAPE)
    draw = {
        "exact": lambda: exact_draw(model, guide, x),
        "integer": lambda: pathwise_draw(model, guide, x, Integer()),
        "score": lambda: score_draw(model, guide, x, 1),
        "VarGrad": lambda: score_draw(model, guide, x, 4),
    }[way]
    drawn = draw_many(draw, 600)
    difference = (drawn.mean(0) - closed_form(model, guide, x)).abs()
    assert (difference < 4.5 * drawn.std(0) / math.sqrt(600) + 1e-6).all()


def test_bias_and_noise_are_unbiased():
    """Of gradients of known moments: means over 300 estimates within 4 standard errors."""
    truth, shift, sigma = torch.full((30,), 0.5).double(), 0.2, 3.0
    found = []
    for _ in range(300):
        exact = truth + 0.1 * torch.randn(20, 30, dtype=torch.float64)
        found.append(compare(truth + shift + sigma * torch.randn(25, 30, dtype=torch.float64), exact, batches=4.0))
    norm = float(truth.square().sum())
    for values, true in (
        ([f.bias for f in found], 30 * shift**2 / norm),
        ([f.noise for f in found], 30 * 9 / 4 / norm),
    ):
        values = torch.tensor(values, dtype=torch.float64)
        assert abs(float(values.mean()) - true) < 4 * float(values.std()) / math.sqrt(300)
    spread = torch.tensor([f.bias for f in found]).std()
    claimed = torch.tensor([f.bias_error for f in found]).mean()
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
        draws=1500,
        exact_draws=1000,
    )
    integer, arrival = errors
    assert abs(integer.bias) < 4 * integer.bias_error
    assert arrival.bias > 4 * arrival.bias_error
    assert torch.equal(torch.get_rng_state(), state) and guide.relaxation is before


def test_dropout_is_off_while_gradients_are_compared():
    """The errors of a decoder with dropout are those of the same decoder without, and its mode is left as it was."""
    model, guide = pair(PoissonGuide)
    x = torch.rand(5, *SHAPE)
    ways = [Integer(), ArrivalTimes(0.5)]
    without = gradient_errors(model, guide, x, ways, draws=20, exact_draws=20)
    frozen = nn.Dropout(0.5).eval()
    model.decoder = nn.Sequential(nn.Dropout(0.5), model.decoder, frozen)
    assert gradient_errors(model, guide, x, ways, draws=20, exact_draws=20) == without
    assert model.training and model.decoder[0].training and not frozen.training


def test_errors_relative_to_nothing_are_refused():
    torch.manual_seed(0)
    with pytest.raises(InputError, match="20 exact draws of the gradient cannot be told from 0"):
        for _ in range(20):
            compare(torch.zeros(20, 3), torch.randn(20, 3))
