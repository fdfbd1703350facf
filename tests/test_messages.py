"""Mistakes in a program of a user's end with one line that says what would be right."""

import numpy as np
import pyro.infer
import pytest
import torch
from pyro.distributions import constraints

from pyro_nbvae import variants
from pyro_nbvae.data import to_floats
from pyro_nbvae.distributions import ConwayMaxwellPoisson, CountDistribution, GumbelSoftmax, Integer, poisson_window
from pyro_nbvae.distributions.relaxations import DivergedError
from pyro_nbvae.errors import InputError
from pyro_nbvae.guides import GaussianGuide
from pyro_nbvae.infer import AnalyticKL_ELBO
from pyro_nbvae.likelihoods import Bernoulli, NegativeBinomial
from pyro_nbvae.metrics import held_out, importance_weighted_bound
from pyro_nbvae.models import GaussianModel, NegativeBinomialModel


def pair(likelihood=None):
    model = GaussianModel((5,), latents=3, decoder="linear", likelihood=likelihood)
    return model, GaussianGuide(model, encoder="linear")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 5, dtype=torch.float64), "float64 and the network's parameters torch.float32"),
        (torch.zeros(4, 5, dtype=torch.int64), "expected floating point: x.float()"),
        (np.zeros((4, 5)), r"must be a tensor, got ndarray: torch.as_tensor"),
    ],
)
def test_data_of_another_type(x, message):
    model, guide = pair()
    for program in (model, guide):
        with pytest.raises(InputError, match=message):
            program(x)


@pytest.mark.parametrize("measure", [held_out, lambda *a: importance_weighted_bound(*a, 2)])
@pytest.mark.parametrize(
    ("likelihood", "x"),
    [
        (Bernoulli(), 255 * torch.rand(4, 5)),
        (NegativeBinomial(), torch.full((4, 5), -1.0)),
        (None, torch.full((4, 5), torch.nan)),
    ],
)
def test_no_metric_of_data_outside_the_support(measure, likelihood, x):
    with pytest.raises(InputError, match="data lie in"):
        measure(*pair(likelihood), x)


def test_arguments_of_a_model():
    with pytest.raises(InputError, match="event_shape must be a tuple"):
        NegativeBinomialModel(40, 16)
    with pytest.raises(InputError, match="likelihood must be a callable"):
        NegativeBinomialModel((40,), likelihood="bernoulli", decoder="linear")


def of_weights(weight, ends):
    class Mine(CountDistribution):
        arg_constraints = {"rate": constraints.positive}
        log_weight = staticmethod(weight)
        scores = staticmethod(lambda k, rate: (k / rate,))
        window = staticmethod(ends)

    return Mine(torch.tensor([2.0, 3.0]), relaxation=Integer())


def poisson(k, rate):
    return k * rate.log() - torch.lgamma(k + 1)


@pytest.mark.parametrize("use", ["sample", "rsample", "mean", "entropy"])
def test_weights_that_are_nan_and_windows_that_end_before_they_begin(use):
    for family, message in (
        (
            of_weights(lambda k, rate: poisson(k, rate) + 0 * k.log(), poisson_window),
            "log_weight is nan at a count of 0",
        ),
        (of_weights(poisson, lambda nats, rate: poisson_window(nats, rate)[::-1]), "window ends before it begins"),
    ):
        with pytest.raises(DivergedError, match=message):
            value = getattr(family, use)
            value() if callable(value) else value


def test_advice_about_relaxations_fits_the_family():
    d = ConwayMaxwellPoisson(2.0, 1.0)
    with pytest.raises(NotImplementedError, match=r"relaxation=Integer\(\)"):
        d.rsample()
    with pytest.raises(TypeError, match=r"use Integer\(\)"):
        ConwayMaxwellPoisson(2.0, 1.0, relaxation=GumbelSoftmax(1.0)).rsample()


def test_an_estimator_that_would_enumerate_nothing():
    with pytest.raises(InputError, match="unknown estimator 'TraceEnum_ELBO'"):
        variants.estimator("TraceEnum_ELBO")
    assert variants.estimator("AnalyticKL_ELBO") is AnalyticKL_ELBO
    assert variants.estimator("Trace_ELBO") is pyro.infer.Trace_ELBO


def test_pixels_and_zeros_and_ones_are_told_apart_by_their_type():
    """What the page on the command line says: bytes are pixels, everything else is taken unchanged."""
    ones = torch.ones(2, 1, 4, 4)
    assert torch.equal(to_floats(ones.to(torch.uint8)), ones / 255)
    assert torch.equal(to_floats(ones), ones)
