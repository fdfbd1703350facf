"""The baselines: their KLs, the Poisson as the limit of the negative binomial, and a sixth family."""

import math
from dataclasses import dataclass
from typing import Literal

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence

from pyro_nbvae.distributions import ArrivalTimes, GumbelSoftmax, RelaxedOneHotCategorical, RelaxedPoisson
from pyro_nbvae.errors import InputError
from pyro_nbvae.guides import NegativeBinomialGuide, PoissonGuide
from pyro_nbvae.infer import AnalyticKL_ELBO
from pyro_nbvae.likelihoods import Gaussian
from pyro_nbvae.models import CategoricalModel, NegativeBinomialModel, PoissonModel
from pyro_nbvae.study import variants
from pyro_nbvae.study.build import build, resolve
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.data import SOURCES, Source
from pyro_nbvae.study.evaluation import evaluate
from pyro_nbvae.study.training import train
from pyro_nbvae.study.tree import VAE
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, StandardPrior
from tests import pairs

SHAPE = (1, 8, 8)
TINY = dict(data="digits", latents=8, encoder="linear", decoder="linear", batch_size=500, epochs=2, lr=0.01)


def pair(name, latents=16, **options):
    return pairs.pair(name, SHAPE, latents, likelihood=Gaussian(0.5), **options)


# Those whose prior is a product of units; tests/test_priors.py has the others.
FACTORISED = [
    name for name, vae in variants.VARIANTS.items() if getattr(vae, "prior", None) is None or vae.prior.joint() is None
]


@pytest.mark.parametrize("name", FACTORISED)
def test_kl_equals_sampling(name):
    """Mean of log q(z) - log p(z) over exact samples, within 4 standard errors."""
    model, guide = pair(name, relaxation=None)
    x = torch.rand(3, *SHAPE)
    with torch.no_grad():
        q = guide.posterior(x)
        p = model.prior_distribution().expand(q.batch_shape)
        z = q.sample(torch.Size([20_000]))
        difference = (q.log_prob(z) - p.log_prob(z)).double()
        kl = kl_divergence(q, p).double()
    error = difference.std(0) / math.sqrt(len(z))
    assert ((difference.mean(0) - kl).abs() < 4.5 * error + 1e-5).all()
    assert (kl > 0).all()


@pytest.mark.parametrize("name", FACTORISED)
def test_at_encoder_outputs_of_zero_the_posterior_is_the_prior(name):
    """Or, where it is of another family, the Poisson of the prior's mean."""
    model, guide = pair(name)
    with torch.no_grad():
        for parameter in guide.encoder.parameters():
            parameter.zero_()
    q = guide.posterior(torch.rand(2, *SHAPE))
    p = model.prior_distribution()
    center = dist.Poisson(p.mean) if name in ("CMP", "P-NB") else p
    kl = kl_divergence(q, center.expand(q.batch_shape))
    torch.testing.assert_close(kl, torch.zeros_like(kl), atol=1e-6, rtol=0)


class ExponentialGuide(PoissonGuide):
    """A Poisson whose rate is a factor e^h from the prior's, as the odds of a negative binomial."""

    def posterior_from(self, outputs):
        return RelaxedPoisson(self.prior.mean * outputs[0].exp(), relaxation=self.relaxation)


def limit_pair(r):
    """A Poisson VAE and an EX-C with dispersion r, the same networks and the same means."""
    poisson = PoissonModel(SHAPE, 6, decoder="linear", likelihood=Gaussian(0.5))
    poisson_guide = ExponentialGuide(poisson, encoder="linear", relaxation=None)
    nb = NegativeBinomialModel(SHAPE, 6, decoder="linear", likelihood=Gaussian(0.5))
    nb_guide = NegativeBinomialGuide(nb, encoder="linear", relaxation=None)
    with torch.no_grad():
        poisson.prior.log_rate.normal_()
        nb.decoder.load_state_dict(poisson.decoder.state_dict())
        nb.initial_stddev.copy_(poisson.initial_stddev)
        nb.prior.log_total_count.fill_(math.log(r))
        nb.prior.logits.copy_(poisson.prior.log_rate - math.log(r))
        (ours, ratio), (theirs,) = nb_guide.encoder.heads, poisson_guide.encoder.heads
        ours.load_state_dict(theirs.state_dict())
        for parameter in ratio.parameters():
            parameter.zero_()
    return (poisson, poisson_guide), (nb, nb_guide)


def test_poisson_is_the_limit_of_the_negative_binomial():
    """KL and its gradient in the encoder agree to 1e-3 at r = 1e7, and the whole loss within 4 standard errors."""
    torch.manual_seed(1)
    poisson, nb = limit_pair(1e7)
    x = torch.rand(12, *SHAPE)
    kls, gradients, losses, noisy = [], [], [], []
    for model, guide in (poisson, nb):
        q = guide.posterior(x)
        kl = kl_divergence(q, model.prior_distribution().expand(q.batch_shape)).sum()
        kls.append(kl.detach())
        gradients.append(torch.autograd.grad(kl, guide.encoder.heads[0].weight)[0])
        elbo = AnalyticKL_ELBO()
        losses.append(torch.tensor([elbo.loss(model, guide, x) for _ in range(300)]))
        guide.relaxation = ArrivalTimes(0.2)
        weight = guide.encoder.heads[0].weight
        draws = [torch.autograd.grad(elbo.differentiable_loss(model, guide, x), weight)[0] for _ in range(300)]
        noisy.append(torch.stack(draws))
    torch.testing.assert_close(kls[1], kls[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)
    error = math.hypot(*(float(v.std()) for v in losses)) / math.sqrt(300)
    assert abs(float(losses[0].mean() - losses[1].mean())) < 4 * error
    difference = noisy[0].mean(0) - noisy[1].mean(0)
    error = (noisy[0].var(0) + noisy[1].var(0)).div(300).sqrt()
    # 384 components: 5 standard errors
    assert (difference.abs() < 5 * error + 1e-3 * noisy[0].mean(0).abs()).all()


def test_a_relaxation_on_request():
    config = resolve(configure("P-VAE", relaxation="gumbel", **TINY), SHAPE)
    assert config.vae.relaxation.temperature == 0.25
    assert build(config, SHAPE)[1].relaxation == GumbelSoftmax(0.25)
    assert build(resolve(configure("P-VAE", **TINY), SHAPE), SHAPE)[1].relaxation == ArrivalTimes(0.05)
    with pytest.raises(InputError, match="unknown option relaxation: CMP has"):
        configure("CMP", relaxation="gumbel", **TINY)
    with pytest.raises(InputError, match="unknown relaxation 'poisson'"):
        configure("P-VAE", relaxation="poisson", **TINY)


def test_categories(tmp_path):
    model = CategoricalModel(SHAPE, 256, decoder="linear")
    assert model.prior_distribution().batch_shape == (32,) and model.prior_distribution().event_shape == (8,)
    one = CategoricalModel(SHAPE, 256, categories=256, decoder="linear")
    z, images = one.generate(5)
    assert z.shape == (5, 1, 256) and (z.sum(-1) == 1).all() and images.shape == (5, *SHAPE)
    for categories in (1, 0, 7):
        with pytest.raises(InputError, match=f"divide latents .256., got {categories}"):
            CategoricalModel(SHAPE, 256, categories=categories, decoder="linear")
    run = train(configure("C-VAE", categories=4, **TINY), tmp_path / "run", progress=False)
    assert evaluate(run, importance_samples=1, samples=40, progress=False)["units"] == 2


@pytest.mark.parametrize("straight_through", [False, True])
def test_relaxed_one_hot(straight_through):
    logits = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.0]])
    d = RelaxedOneHotCategorical(logits=logits, relaxation=GumbelSoftmax(0.3, straight_through=straight_through))
    exact = dist.OneHotCategorical(logits=logits)
    z = d.rsample(torch.Size([20_000]))
    torch.testing.assert_close(z.sum(-1), torch.ones(20_000, 2))
    corners = (z == 0) | (z == 1)
    assert bool(corners.all()) is straight_through
    # the arg max is the exact category
    frequency = nn.functional.one_hot(z.argmax(-1), 3).double().mean(0)
    assert ((frequency - exact.probs).abs() < 4 * (exact.probs * (1 - exact.probs) / 20_000).sqrt()).all()
    hard = exact.sample(torch.Size([50]))
    torch.testing.assert_close(d.log_prob(hard), exact.log_prob(hard))
    assert d.expand(torch.Size([4, 2])).rsample().shape == (4, 2, 3)
    one_hot = RelaxedOneHotCategorical(logits=logits)
    z = one_hot.sample()
    assert not one_hot.has_rsample and ((z == 0) | (z == 1)).all()
    with pytest.raises(NotImplementedError):
        one_hot.rsample()


def test_a_temperature_for_each_one_hot_vector():
    """A cold one is nearly one-hot, a hot one nearly uniform; the vectors, not the categories, differ."""
    for categories in (2, 5):
        relaxation = GumbelSoftmax(torch.tensor([0.01, 100.0]))
        largest = RelaxedOneHotCategorical(logits=torch.zeros(2, categories), relaxation=relaxation).rsample((2000,))
        cold, hot = largest.amax(-1).mean(0).tolist()
        assert cold > 0.97 and hot == pytest.approx(1 / categories, abs=0.02)


def test_a_category_of_no_mass():
    d = RelaxedOneHotCategorical(logits=torch.tensor([0.0, 0.0, -math.inf]))
    assert float(d.log_prob(torch.tensor([1.0, 0.0, 0.0]))) == pytest.approx(math.log(0.5))


SHAPES = ((1, 16, 16), (1, 28, 28), (3, 16, 16), (3, 32, 32), (3, 64, 64))


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_every_variant_and_every_shape_with_several(name, tmp_path, monkeypatch):
    """Two steps with the convolutional networks on random images, and an evaluation."""
    shape = SHAPES[list(variants.VARIANTS).index(name) % len(SHAPES)]
    images = torch.randint(0, 256, (12, *shape), dtype=torch.uint8)
    monkeypatch.setitem(SOURCES, "random", Source(shape, lambda root: (images[:8], images[8:], None, None)))
    config = configure(name, data="random", latents=16, batch_size=4, epochs=1)
    run = train(config, tmp_path / "run", progress=False)
    metrics = evaluate(run, importance_samples=1, samples=40, progress=False)
    numbers = [metrics[key] for key in ("mse", "ssim", "elbo", "importance_weighted_bound", "kl", "bits_per_dim")]
    assert all(math.isfinite(v) for v in numbers)
    assert (metrics["fano"] is None) == (name in ("G-VAE", "GS-VAE", "L-VAE", "C-VAE"))


def test_a_sixth_family_is_a_model_a_guide_and_a_line(tmp_path, monkeypatch):
    """What CONTRIBUTING.md says it takes: log-normal latents, trained and evaluated like the others."""

    class LogNormalModel(GenerativeModel):
        def __init__(self, event_shape, latents=256, **options):
            super().__init__(event_shape, latents, **options)
            self.prior = StandardPrior(latents)

        def prior_distribution(self):
            return dist.LogNormal(self.prior.zeros, self.prior.zeros + 1)

    class LogNormalGuide(AmortizedGuide):
        heads = 2

        def posterior_from(self, outputs):
            location, log_scale = outputs
            return dist.LogNormal(location, log_scale.exp())

    @dataclass(frozen=True, kw_only=True)
    class LogNormalVAE(VAE):
        kind: Literal["log_normal"] = "log_normal"

        def build(self, event_shape, latents, *, encoder, **options):
            model = LogNormalModel(event_shape, latents, **options)
            return model, LogNormalGuide(model, encoder=encoder)

    monkeypatch.setitem(variants.VARIANTS, "N-VAE", None)  # restored afterwards
    monkeypatch.setitem(variants.KINDS, "log_normal", LogNormalVAE)
    variants.register_variant("N-VAE", LogNormalVAE())
    run = train(configure("N-VAE", **TINY), tmp_path / "run", progress=False)
    metrics = evaluate(run, importance_samples=2, samples=40, progress=False)
    assert metrics["variant"] == "N-VAE" and math.isfinite(metrics["elbo"]) and metrics["fano"] is None


@pytest.mark.parametrize("network", ["linear", "mlp", "conv"])
@pytest.mark.parametrize("name", list(variants.VARIANTS))
def test_models_and_guides_are_built_on_the_meta_device_and_loaded(name, network):
    """As those that were built where they are: the same prior, posterior and observation."""
    shape = (1, 16, 16)
    model, guide = pairs.pair(name, shape, 8, encoder=network, decoder=network)
    with torch.device("meta"):
        others = pairs.pair(name, shape, 8, encoder=network, decoder=network)
    assert all(p.is_meta for other in others for p in other.parameters())
    for other, original in zip(others, (model, guide), strict=True):
        other.to_empty(device="cpu")
        other.load_state_dict(original.state_dict())
    x = torch.rand(3, *shape)
    draws = []
    for one, its_guide in ((model, guide), others):
        torch.manual_seed(0)
        one.eval(), its_guide.eval()
        with torch.no_grad(), its_guide.exact():
            z = its_guide(x)
            draws.append([z, one.prior_distribution().sample(), one.observation(z).mean])
    torch.testing.assert_close(draws[0], draws[1])


@pytest.mark.parametrize("name", ["CMP", "EX-C", "G-VAE", "C-VAE"])
def test_autocast_stays_on_in_the_networks(name):
    """Multiplications are in bfloat16 there; densities and losses are finite and in float32."""
    model, guide = pairs.pair(name, (5,), 8)
    seen = []
    for network in (model.decoder, guide.encoder):
        for part in network.modules():
            if isinstance(part, nn.Linear):
                part.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = AnalyticKL_ELBO().differentiable_loss(model, guide, torch.rand(6, 5))
    loss.backward()
    assert seen and set(seen) == {torch.bfloat16} and loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in guide.encoder.parameters())
