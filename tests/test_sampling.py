"""Samplers after training: a mixture has the moments that it was fitted to, and finds what it was drawn from."""

import json

import pyro.distributions as dist
import pytest
import torch

from pyro_nbvae import sampling
from pyro_nbvae.batching import to_floats
from pyro_nbvae.distributions import NegativeBinomial
from pyro_nbvae.errors import InputError
from pyro_nbvae.guides import GaussianGuide
from pyro_nbvae.models import GaussianModel
from pyro_nbvae.sampling import CountMixture, GaussianMixture, PosteriorSampler, PriorSampler, decoded, fit_mixture
from pyro_nbvae.study.build import build, resolve
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.data import load
from pyro_nbvae.study.evaluation import evaluate
from pyro_nbvae.study.generation import generate
from pyro_nbvae.study.training import train

SMALL = {"data": "digits", "latents": 6, "encoder": "linear", "decoder": "linear", "epochs": 1, "batch_size": 500}


@pytest.mark.parametrize("kind", [CountMixture, GaussianMixture])
def test_samples_have_the_fitted_moments(kind):
    """Whatever the components are, the mixture's mean and variance are those of all posteriors together."""
    mean = torch.distributions.Gamma(0.7, 0.3).sample((2000, 3))
    variance = mean * torch.tensor([1.0, 1.5, 3.0])
    mixture = kind.fit(mean, variance, components=8)
    drawn = mixture.sample(200_000).double()
    total = variance.mean(0) + mean.var(0, correction=0)
    error = (total / len(drawn)).sqrt()
    assert (abs(drawn.mean(0) - mean.mean(0)) < 4 * error).all()
    spread = (drawn - drawn.mean(0)).square()
    assert (abs(spread.mean(0) - total) < 4 * spread.std(0) / len(drawn) ** 0.5 + 1e-3 * total).all()
    if kind is CountMixture:
        assert torch.equal(drawn, drawn.round()) and (drawn >= 0).all()


def test_components_are_found():
    """Three groups of counts far apart: weights and means come back."""
    centres = torch.tensor([[20.0, 0.0, 1.0], [0.0, 30.0, 1.0], [5.0, 5.0, 60.0]])
    sizes = [500, 300, 200]
    counts = torch.cat([torch.poisson(c.expand(n, -1)) for c, n in zip(centres, sizes, strict=True)])
    mixture = CountMixture.fit(counts, torch.zeros_like(counts), components=3)
    order = mixture.weights.argsort(descending=True)
    torch.testing.assert_close(mixture.weights[order], torch.tensor([0.5, 0.3, 0.2]))
    error = (centres / torch.tensor(sizes)[:, None]).sqrt()
    assert (abs(mixture.mean[order] - centres) <= 4 * error).all()


def test_means_that_are_no_counts():
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"contains (NaN|infinity)"):
            CountMixture.fit(torch.full((5, 2), bad), torch.ones(5, 2))


@pytest.mark.parametrize("name", ["CMP", "EX-C", "P-VAE", "G-VAE", "GS-VAE", "L-VAE"])
def test_a_mixture_of_a_trained_pair(name):
    data = load("digits")
    config = resolve(configure(name, **SMALL), data.event_shape)
    model, guide, _ = build(config, data.event_shape)
    sampler = fit_mixture(model, guide, data.train[:200], components=5)
    z = sampler.sample(50)
    assert z.shape == (50, 6) and (name in ("G-VAE", "GS-VAE", "L-VAE") or torch.equal(z, z.round()))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    batches = list(decoded(model, guide, sampler, 1003, seed=2))
    again = torch.cat(list(decoded(model, guide, sampler, 1003, seed=2)))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.cat(batches), again) and again.shape == (1003, *data.event_shape)
    assert not torch.equal(batches[0][:3], batches[1][:3])
    assert not torch.equal(again, torch.cat(list(decoded(model, guide, PriorSampler(model), 1003, seed=2))))


def test_a_mixture_is_fitted_to_all_parts_of_sorted_data(monkeypatch):
    """More data than are used, one picture first and another after it: the mean is that of both, within 5 errors."""
    monkeypatch.setattr(sampling, "_MAX_FITTED", 20)
    data = load("digits")
    config = resolve(configure("CMP", **SMALL), data.event_shape)
    model, guide, _ = build(config, data.event_shape)
    first, second = data.train[:1], data.train[1:2]
    torch.manual_seed(0)
    z = fit_mixture(model, guide, torch.cat([first] * 40 + [second] * 40), components=2).sample(4000).double()
    means = guide.posterior(to_floats(torch.cat([first, second]))).mean.double()
    error = z.std(0) / 4000**0.5
    assert ((z.mean(0) - means.mean(0)).abs() <= 5 * error + 1e-6).all()
    assert ((z.mean(0) - means[0]).abs() > 5 * error).any()


@pytest.mark.parametrize("name", ["CMP", "EX-C", "EX-G", "P-VAE", "G-VAE", "C-VAE"])
def test_the_aggregate_posterior_is_the_mean_of_the_posteriors(name):
    """Of three observations, one of them twice: the mean of many draws is that of the posteriors, within 5 errors."""
    data = load("digits")
    config = resolve(configure(name, **{**SMALL, "latents": 8}), data.event_shape)
    model, guide, _ = build(config, data.event_shape)
    x = data.train[[0, 1, 1, 2]]
    torch.manual_seed(0)
    z = PosteriorSampler(model, guide, x).sample(4000).double()
    assert name == "G-VAE" or torch.equal(z, z.round())  # exact counts, whatever the guide's relaxation
    expected = guide.posterior(to_floats(x)).mean.double().mean(0)
    assert ((z.mean(0) - expected).abs() <= 5 * z.std(0) / 4000**0.5 + 1e-6).all()
    with pytest.raises(RuntimeError):
        PosteriorSampler(model, guide, x[:0]).sample(4)


def test_categories_have_no_mixture():
    data = load("digits")
    config = resolve(configure("C-VAE", **{**SMALL, "latents": 8}), data.event_shape)
    model, guide, _ = build(config, data.event_shape)
    with pytest.raises(InputError, match="a mixture needs counts or real latents"):
        fit_mixture(model, guide, data.train[:50])


def test_a_posterior_without_a_mean_has_no_mixture():
    flow = dist.transforms.TanhTransform()
    model = GaussianModel((5,), latents=3, decoder="linear")

    class Guide(GaussianGuide):
        def posterior(self, x):
            return dist.TransformedDistribution(super().posterior(x), [flow])

    with pytest.raises(InputError, match="a mixture needs counts or real latents"):
        fit_mixture(model, Guide(model, encoder="linear"), torch.rand(4, 5))


def test_a_mixture_has_figures_of_its_own(tmp_path):
    run = train(configure("CMP", **SMALL), tmp_path / "run", progress=False)
    prior = evaluate(run, samples=40, importance_samples=0, progress=False)
    file = (run.folder / "metrics.json").read_bytes()
    mixture = evaluate(run, samples=40, sampler="mixture", progress=False)
    assert (run.folder / "metrics.json").read_bytes() == file
    assert json.loads((run.folder / "metrics-mixture.json").read_text()) == mixture
    assert mixture["variant"] == "CMP (mixture)" and "mse" not in mixture
    assert mixture["fid_c"] != prior["fid_c"] and mixture["commit"] == prior["commit"]
    assert generate(run, count=5, sampler="mixture").name == "samples-mixture.png"
    posterior = evaluate(run, samples=40, sampler="posterior", progress=False)
    assert json.loads((run.folder / "metrics-posterior.json").read_text()) == posterior != mixture
    assert generate(run, count=5, sampler="posterior").name == "samples-posterior.png"
    with pytest.raises(InputError, match="unknown sampler 'flow': choose from prior, mixture, posterior"):
        evaluate(run, samples=40, sampler="flow")


@pytest.mark.parametrize("law", [dist.Poisson, lambda m: NegativeBinomial(2.0, logits=(m / 2).log())])
def test_counts_of_any_class_have_a_mixture_of_counts(law):
    class Rates(GaussianGuide):
        def posterior(self, x):
            return law(super().posterior(x).mean.exp())

    model = GaussianModel((5,), 3, decoder="linear")
    drawn = fit_mixture(model, Rates(model, encoder="linear"), torch.rand(50, 5), components=2).sample(200)
    assert torch.equal(drawn, drawn.round()) and (drawn >= 0).all()


def test_the_aggregate_posterior_has_no_dropout():
    model = GaussianModel((5,), 3, decoder="linear")
    guide = GaussianGuide(model, encoder="linear")
    guide.encoder = torch.nn.Sequential(torch.nn.Dropout(0.99), guide.encoder)
    sampler = PosteriorSampler(model, guide, torch.ones(1, 5))
    scale = guide.eval().posterior(torch.ones(1, 5)).stddev.max()
    guide.train()
    assert (sampler.sample(4000).std(0) < 1.2 * scale).all() and guide.training
