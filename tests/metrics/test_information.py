"""The information of units, against sums over counts, quadrature and joint probabilities that are written out."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from pyro_nbvae.batching import random_subset
from pyro_nbvae.guides import ConwayMaxwellPoissonGuide, GaussianGuide
from pyro_nbvae.metrics import held_out, unit_information
from pyro_nbvae.metrics import information as module
from pyro_nbvae.models import GaussianModel, NegativeBinomialModel
from pyro_nbvae.vae import evaluating
from tests import pairs

COUNTS = ["CMP", "P-NB", "EX-C", "P-VAE"]


def pair(name, latents=4, **options):
    torch.manual_seed(1)
    return pairs.pair(name, (5,), latents, **options)


def parts(name, x, points, weight=1.0, **options):
    """Per unit: the mean KL to the prior, KL(q(z) || p(z)) and the information, summed over points."""
    model, guide = pair(name, **options)
    with evaluating(model, guide, 0):
        q, p = guide.posterior(x), model.prior_distribution()
        log_q = q.log_prob(points[:, None, None]).double()
        log_p = p.log_prob(points[:, None]).double()
        log_mixture = log_q.logsumexp(1) - math.log(len(x))
        mass = log_q.exp() * weight
        kl = (mass * (log_q - log_p[:, None])).sum(0).mean(0)
        to_prior = (weight * log_mixture.exp() * (log_mixture - log_p)).sum(0)
        information = (mass * (log_q - log_mixture[:, None])).sum(0).mean(0)
        return kl, to_prior, information, unit_information(guide, x)


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    """KL = information + KL(q(z) || p(z)), over the same observations."""
    kl, to_prior, information, found = parts(name, torch.rand(60, 5) * 3, torch.arange(1500.0), prior_mean=5.0)
    torch.testing.assert_close(found, information, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kl, found + to_prior, rtol=1e-4, atol=1e-4)
    assert (found > 1e-3).all()


@pytest.mark.parametrize("name", ["G-VAE", "L-VAE"])
def test_real_latents(name):
    z = torch.linspace(-200, 200, 400_001, dtype=torch.float64)
    *_, information, found = parts(name, torch.rand(30, 5), z, weight=float(z[1] - z[0]))
    torch.testing.assert_close(found, information, rtol=0, atol=1e-3)


def test_categories():
    model, guide = pair("C-VAE", latents=24)
    x = torch.rand(50, 5) * 4
    with evaluating(model, guide, 0):
        q = guide.posterior(x).probs.double()
        mean = q.mean(0)
        expected = (q * (q.log() - mean.log())).sum(-1).mean(0)
        torch.testing.assert_close(unit_information(guide, x), expected, rtol=1e-5, atol=1e-7)


def test_two_observations_that_a_unit_tells_apart_have_a_bit():
    """Whatever the family: log 2 where the posteriors do not overlap, 0 where they are the same."""
    model = NegativeBinomialModel((2,), 2, decoder="linear")

    for family in (
        lambda c: dist.Poisson(1 + 500 * c),
        lambda c: dist.Binomial(10, 0.999 * c),
        lambda c: dist.Binomial(100 + 900 * c, torch.full_like(c, 0.5)),
        lambda c: dist.Bernoulli(c),
        lambda c: dist.Normal(50 * c, 1.0),
        lambda c: dist.LogNormal(20 * c, 1.0),
        lambda c: dist.ZeroInflatedPoisson(1 + 500 * c, gate=torch.zeros_like(c)),
    ):

        class Guide(ConwayMaxwellPoissonGuide):
            def posterior(self, x, family=family):
                return family(torch.stack([x[:, 0], 0.25 * torch.ones_like(x[:, 0])], 1))

        guide = Guide(model, encoder="linear")
        x = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).repeat(10, 1)
        with evaluating(model, guide, 0):
            found = unit_information(guide, x)
        assert float(found[0]) == pytest.approx(math.log(2), abs=2e-3)
        assert float(found[1]) == pytest.approx(0, abs=1e-5)


def test_windows_too_wide_for_a_sum_have_an_estimate(monkeypatch):
    """Within the sampling error, from 1,200 values whose standard deviation is about one nat."""
    model, guide = pair("P-VAE")
    x = torch.rand(300, 5) * 3
    with evaluating(model, guide, 0):
        exact = unit_information(guide, x)
        monkeypatch.setattr(module, "MOST_POINTS", 1)
        sampled = unit_information(guide, x)
    assert not torch.equal(sampled, exact)
    torch.testing.assert_close(sampled, exact, rtol=0.1, atol=0.1)


def test_a_joint_posterior_has_one_value():
    """Two perfectly correlated Gaussians: the information of one of them."""
    model = GaussianModel((2,), 2, decoder="linear")
    covariance = torch.tensor([[1.0, 0.999], [0.999, 1.0]])

    class Joint(GaussianGuide):
        def posterior(self, x):
            return dist.MultivariateNormal(20 * x[:, :1].expand(-1, 2), covariance)

    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).repeat(10, 1)
    found = held_out(model, Joint(model, encoder="linear"), x)
    assert found.unit_information.shape == () and found.information == pytest.approx(math.log(2), abs=1e-3)
    assert found.collapsed_units == 0


def test_a_posterior_that_ignores_the_observation_is_collapsed_whatever_its_kl():
    model, guide = pair("CMP", latents=3)
    with torch.no_grad():
        for parameter in guide.encoder.parameters():
            parameter.zero_()
        guide.encoder.heads[0].bias.fill_(1.0)
    found = held_out(model, guide, torch.rand(50, 5))
    assert (found.unit_kl > 1).all() and found.unit_information.max() < 1e-6 and found.collapsed_units == 3
    assert found.underdispersed_active_units is None


def test_the_information_of_all_observations_is_that_of_some():
    """1,000 of 4,000 observations; conditions that alternate are all among them."""
    model, guide = pair("P-VAE")
    x = torch.linspace(0, 3, 4000)[:, None].expand(4000, 5).contiguous()
    found = held_out(model, guide, x)
    with evaluating(model, guide, 0):
        torch.testing.assert_close(found.unit_information, unit_information(guide, random_subset(x, 1000)))
        kl = kl_divergence(guide.posterior(x), model.prior_distribution().expand(torch.Size([4000, 4])))
    torch.testing.assert_close(found.unit_kl, kl.double().mean(0), rtol=1e-5, atol=1e-7)
