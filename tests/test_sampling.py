"""After training: a fitted prior finds what its latents were drawn from; samplers draw from what they say."""

import json
import math

import pyro.distributions as dist
import pytest
import torch

import pyro_nbvae
from pyro_nbvae import sampling
from pyro_nbvae.batching import to_floats
from pyro_nbvae.distributions import MixtureOfNegativeBinomials, NegativeBinomial
from pyro_nbvae.errors import InputError
from pyro_nbvae.guides import GaussianGuide
from pyro_nbvae.metrics import held_out
from pyro_nbvae.models import GaussianModel
from pyro_nbvae.priors import FittedMixture
from pyro_nbvae.sampling import PosteriorSampler, PriorSampler, fit_prior, generated
from pyro_nbvae.study.build import build, resolve
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.data import load
from pyro_nbvae.study.evaluation import evaluate
from pyro_nbvae.study.generation import components, generate
from pyro_nbvae.study.generation import fit_prior as fit_prior_of_run
from pyro_nbvae.study.training import train
from pyro_nbvae.study.tree import replace

SMALL = {"data": "digits", "latents": 6, "encoder": "linear", "decoder": "linear", "epochs": 1, "batch_size": 500}


@pytest.mark.parametrize("order", ["in turn", "at random"])
def test_a_mixture_is_fitted_to_all_conditions_in_any_order(order):
    """Ten conditions in turn, many more latents than a step reads: mean and variance of the data within a tenth."""
    torch.manual_seed(0)
    means = 0.5 + torch.arange(40_000.0) % 10 * 2
    z = torch.poisson(means[:, None] * torch.ones(2))
    z = z if order == "in turn" else z[torch.randperm(len(z))]
    fitted = FittedMixture.fit(z, 10, counts=True).distribution
    torch.testing.assert_close(fitted.mean.float(), z.mean(0), rtol=0.1, atol=0)
    torch.testing.assert_close(fitted.variance.float(), z.var(0), rtol=0.15, atol=0)


def test_components_are_found():
    """Three groups of counts far apart: weights, means and dispersions return, and the likelihood is the truth's."""
    torch.manual_seed(0)
    r = torch.tensor([0.5, 3.0, 50.0])
    means = torch.tensor([[20.0, 0.1, 1.0], [0.1, 30.0, 1.0], [5.0, 5.0, 60.0]])
    true = MixtureOfNegativeBinomials(r, (means / r).log(), torch.tensor([0.5, 0.3, 0.2]).log())
    z, others = true.sample((20_000,)), true.sample((20_000,))
    fitted = FittedMixture.fit(z, 3).distribution
    order = fitted.component_logits.argsort(descending=True)
    weights = fitted.component_logits.softmax(-1)[order]
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.3, 0.2]), atol=0.015, rtol=0.0)
    deviation = (means * (1 + means / r)).sqrt() / (20_000 * weights[:, None]).sqrt()
    assert ((fitted.components.mean[order] - means).abs() < 5 * deviation + 0.02).all()
    # Anscombe's variance of the moment estimate, from the 4,000 observations that the dispersions are fitted to
    n, m = 4_000 * torch.tensor([0.5, 0.3, 0.2]), means.diagonal()
    error = (2 * r * (r + 1) * (1 + r / m).square() / n).sqrt()
    assert ((fitted.reference.total_count - r).abs() < 4 * error).all()
    lost = (true.log_prob(others) - fitted.log_prob(others)).double()
    assert float(lost.mean()) < 0.005 + 4 * float(lost.std()) / 20_000**0.5


@pytest.mark.parametrize("counts", [True, False])
def test_one_component_has_the_moments_of_its_latents(counts):
    torch.manual_seed(0)
    rate = torch.distributions.Gamma(2.0, 0.3).sample((40_000, 3))
    z = torch.poisson(rate) if counts else rate
    fitted = FittedMixture.fit(z, 1).distribution
    torch.testing.assert_close(fitted.mean, z.mean(0), rtol=0.01, atol=0.0)
    torch.testing.assert_close(fitted.variance, z.var(0), rtol=0.05, atol=0.0)


@pytest.mark.parametrize("z", [torch.full((5, 2), math.nan), torch.full((5, 2), math.inf), torch.zeros(0, 2)])
def test_latents_without_a_mixture(z):
    with pytest.raises(InputError, match="at least one observation and finite latents"):
        FittedMixture.fit(z, 2)


@pytest.mark.parametrize("z", [torch.zeros(30, 2), torch.ones(3, 2), torch.full((30, 2), 1e6)])
def test_constant_latents_have_a_mixture(z):
    """More components than different latents: what is fitted is finite, and draws are close."""
    fitted = FittedMixture.fit(z, 20).distribution
    assert bool(fitted.log_prob(z).isfinite().all())
    torch.manual_seed(0)
    drawn = fitted.sample((1000,))
    error = drawn.std(0) / 1000**0.5
    assert ((drawn.mean(0) - z.mean(0)).abs() <= 5 * error + 0.01 * z.mean(0)).all()


@pytest.mark.parametrize("name", ["CMP", "EX-C", "P-VAE", "G-VAE", "GS-VAE", "L-VAE"])
def test_a_prior_fitted_to_a_trained_pair(name):
    """The ELBO with it is higher than with the model's own prior; samples come in batches of their own."""
    data = load("digits")
    config = resolve(configure(name, **SMALL), data.event_shape)
    model, guide, _ = build(config, data.event_shape)
    before = held_out(model, guide, data.test)
    fitted, scores = fit_prior(model, guide, data.train, components=16)
    assert {2, 4, 8, 16} <= set(scores) <= {1, 2, 4, 8, 16} and all(math.isfinite(score) for score in scores.values())
    model.set_joint_prior(fitted)
    after = held_out(model, guide, data.test)
    assert after.log_likelihood == before.log_likelihood and after.kl < before.kl
    sampler = PriorSampler(model)
    z = sampler.sample(50)
    assert z.shape == (50, 6) and (name in ("G-VAE", "GS-VAE", "L-VAE") or torch.equal(z, z.round()))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    batches = list(generated(model, guide, sampler, 1003, seed=2))
    again = list(generated(model, guide, sampler, 1003, seed=2))
    assert torch.equal(torch.get_rng_state(), state)
    for part, same in zip(batches, again, strict=True):
        assert torch.equal(part.z, same.z) and torch.equal(part.mean, same.mean) and torch.equal(part.x, same.x)
    assert torch.cat([part.x for part in batches]).shape == (1003, *data.event_shape)
    assert not torch.equal(batches[0].mean[:3], batches[1].mean[:3])


def test_an_evaluation_has_another_noise_than_the_fit():
    """With the seed of the fit, held-out latents have no noise that the mixture has seen: the KL is as with others."""
    torch.manual_seed(0)
    model = GaussianModel((5,), 16, decoder="linear")
    guide = GaussianGuide(model, encoder="linear", initial_output_scale=0.1)
    train, test = torch.randn(300, 5), torch.randn(300, 5)
    fitted, _ = fit_prior(model, guide, train, components=100, seed=0)
    model.set_joint_prior(fitted)
    with_seed, *others = (held_out(model, guide, test, units=False, seed=seed).kl for seed in range(6))
    others = torch.tensor(others)
    assert abs(with_seed - float(others.mean())) < 5 * float(others.std()) + 0.02


def test_a_prior_is_fitted_to_all_parts_of_sorted_data(monkeypatch):
    """More data than are used, one picture first and another after it: the mean is that of both, within 5 errors."""
    monkeypatch.setattr(sampling, "_MAX_FITTED", 200)
    data = load("digits")
    config = resolve(configure("CMP", **SMALL), data.event_shape)
    model, guide, _ = build(config, data.event_shape)
    first, second = data.train[:1], data.train[1:2]
    fitted, _ = fit_prior(model, guide, torch.cat([first] * 200 + [second] * 200), components=1)
    q = guide.posterior(to_floats(torch.cat([first, second])))
    spread = (q.variance.mean(0) + q.mean.var(0)).sqrt()
    assert ((fitted.distribution.mean - q.mean.mean(0)).abs() <= 5 * spread / 100**0.5 + 1e-6).all()


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
    with pytest.raises(InputError, match="a mixture needs latents that are counts or real numbers"):
        fit_prior(model, guide, data.train[:50])


def test_a_mixture_has_figures_of_its_own(tmp_path):
    run = train(configure("CMP", **SMALL), tmp_path / "run", progress=False)
    prior = evaluate(run, samples=40, importance_samples=0, progress=False)
    file = (run.folder / "metrics.json").read_bytes()
    with pytest.raises(InputError, match="has no fitted prior: fit a mixture with nbvae fit-prior"):
        evaluate(run, samples=40, sampler="mixture", progress=False)
    fit_prior_of_run(run, components=8)
    mixture = evaluate(run, samples=40, importance_samples=2, sampler="mixture", progress=False)
    assert (run.folder / "metrics.json").read_bytes() == file
    assert json.loads((run.folder / "metrics-mixture.json").read_text()) == mixture
    assert mixture["variant"] == "CMP (mixture)" and mixture["mse"] == prior["mse"] and mixture["elbo"] > prior["elbo"]
    assert mixture["fid_c"] != prior["fid_c"] and mixture["commit"] == prior["commit"]
    assert [path.name for path in generate(run, count=5, sampler="mixture")] == [
        "samples-mixture.png",
        "samples-mixture.npz",
    ]
    posterior = evaluate(run, samples=40, sampler="posterior", progress=False)
    assert json.loads((run.folder / "metrics-posterior.json").read_text()) == posterior != mixture
    assert generate(run, count=5, sampler="posterior")[0].name == "samples-posterior.png"
    fit_prior_of_run(run, components=8)
    assert not list(run.folder.glob("*-mixture.*"))
    written = components(run, count=3, sampler="mixture")
    assert [path.name for path in written] == ["components-mixture.png", "paths-mixture.png"]
    with pytest.raises(InputError, match="is no mixture"):
        components(run)
    with pytest.raises(InputError, match="unknown sampler 'flow': choose from prior, mixture, posterior"):
        evaluate(run, samples=40, sampler="flow")


def test_a_fitted_prior_is_that_of_its_checkpoint(tmp_path):
    """After more training, or if it is damaged, it is an error, and the next fit replaces it."""
    config = configure("EX-I", **SMALL)
    run = train(config, tmp_path / "run", progress=False)
    fit_prior_of_run(run, components=4)
    generate(run, count=4, sampler="mixture")
    model, _ = pyro_nbvae.load(run.folder, fitted=True)
    assert isinstance(model.joint_prior, FittedMixture)
    with pytest.raises(InputError, match="holds no fitted prior: give the run folder"):
        pyro_nbvae.load(run.export(), fitted=True)
    train(replace(config, epochs=2), run.folder, resume=True, progress=False)
    with pytest.raises(InputError, match="was fitted to an earlier checkpoint: fit it again with nbvae fit-prior"):
        generate(run, count=4, sampler="mixture")
    fit_prior_of_run(run, components=4)
    generate(run, count=4, sampler="mixture")
    run.prior_path.write_bytes(run.prior_path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read, it is damaged: fit it again with nbvae fit-prior"):
        generate(run, count=4, sampler="mixture")


@pytest.mark.parametrize("law", [dist.Poisson, lambda m: NegativeBinomial(2.0, logits=(m / 2).log())])
def test_counts_of_any_class_have_a_mixture_of_counts(law):
    class Rates(GaussianGuide):
        def posterior(self, x):
            return law(super().posterior(x).mean.exp())

    model = GaussianModel((5,), 3, decoder="linear")
    fitted, _ = fit_prior(model, Rates(model, encoder="linear"), torch.rand(50, 5), components=2)
    drawn = fitted.distribution.sample((200,))
    assert torch.equal(drawn, drawn.round()) and (drawn >= 0).all()


def test_the_aggregate_posterior_has_no_dropout():
    model = GaussianModel((5,), 3, decoder="linear")
    guide = GaussianGuide(model, encoder="linear")
    guide.encoder = torch.nn.Sequential(torch.nn.Dropout(0.99), guide.encoder)
    sampler = PosteriorSampler(model, guide, torch.ones(1, 5))
    scale = guide.eval().posterior(torch.ones(1, 5)).stddev.max()
    guide.train()
    assert (sampler.sample(4000).std(0) < 1.2 * scale).all() and guide.training
