"""Model and guide as Pyro programs."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam

from pyro_nbvae.distributions import ArrivalTimes
from pyro_nbvae.distributions.bounds import rate_multiplier
from pyro_nbvae.errors import InputError
from pyro_nbvae.guides import GaussianGuide, NegativeBinomialGuide, ScaledGaussianGuide
from pyro_nbvae.infer import AnalyticKL_ELBO
from pyro_nbvae.likelihoods import Gaussian
from pyro_nbvae.models import CategoricalModel, GaussianModel, NegativeBinomialModel, PoissonModel, ScaledGaussianModel

SHAPE = (1, 8, 8)


@pytest.fixture
def model():
    return NegativeBinomialModel(SHAPE, 5, decoder="linear", likelihood=Gaussian(0.5))


def test_sites_plates_and_shapes(model):
    guide = NegativeBinomialGuide(model, encoder="linear")
    x = torch.rand(7, *SHAPE)
    guide_trace = poutine.trace(guide).get_trace(x)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x)
    model_trace.compute_log_prob()
    assert model_trace.nodes["z"]["value"] is guide_trace.nodes["z"]["value"]
    assert model_trace.nodes["z"]["value"].shape == (7, 5)
    assert model_trace.nodes["z"]["log_prob"].shape == model_trace.nodes["x"]["log_prob"].shape == (7,)
    for trace in (guide_trace, model_trace):
        assert [frame.name for frame in trace.nodes["z"]["cond_indep_stack"]] == ["batch"]


def test_beta_is_the_decoders_noise(model):
    """log p(x | z) = -squared error / beta - D / 2 log(pi beta)."""
    z, x = torch.ones(3, 5), torch.rand(3, *SHAPE)
    error = (x - model.observation(z).mean).square().sum((1, 2, 3))
    expected = -error / 0.5 - 64 / 2 * math.log(math.pi * 0.5)
    torch.testing.assert_close(model.observation(z).log_prob(x), expected)


def test_at_encoder_outputs_of_zero_the_posterior_is_the_prior(model):
    guide = NegativeBinomialGuide(model, encoder="linear")
    with torch.no_grad():
        for p in guide.encoder.parameters():
            p.zero_()
        model.prior.logits.normal_()
        model.prior.log_total_count.normal_()
    x = torch.rand(2, *SHAPE)
    q, p = guide.posterior(x), model.prior_distribution()
    assert torch.equal(q.total_count, p.total_count.expand(2, 5)) and torch.equal(q.logits, p.logits.expand(2, 5))
    ratio_r, ratio_p = guide.modulation(x)
    assert (ratio_r == 1).all() and (ratio_p == 1).all()


def test_modulation_is_the_papers(model):
    guide = NegativeBinomialGuide(model, encoder="linear")
    x = torch.rand(4, *SHAPE)
    ratio_r, ratio_p = guide.modulation(x)
    q, p = guide.posterior(x), model.prior_distribution()
    torch.testing.assert_close(ratio_r * p.total_count, q.total_count)
    torch.testing.assert_close(ratio_p * (1 - p.probs), 1 - q.probs)
    assert ratio_r.shape == ratio_p.shape == (4, 5)
    shared = NegativeBinomialGuide(model, encoder="linear", shared_dispersion=True)
    assert (shared.modulation(x)[0] == 1).all()
    assert len(shared.encoder.heads) == 1 and len(guide.encoder.heads) == 2


def test_a_rate_multiplier_is_e_to_the_h_at_zero_and_linear_far_above_it():
    h = torch.tensor([-30.0, 0.0, 20.0], dtype=torch.float64, requires_grad=True)
    g = rate_multiplier(h)
    (slope,) = torch.autograd.grad(g.sum(), h)
    expected = torch.stack([4 ** h[0] / math.log(2), torch.ones_like(h[1]), 2 * h[2]])
    torch.testing.assert_close(g, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(slope[1:], torch.tensor([1.0, 2.0], dtype=torch.float64), rtol=1e-9, atol=0)


def test_encoder_outputs_are_bounded_at_five(model):
    guide = NegativeBinomialGuide(model, encoder="linear")
    with torch.no_grad():
        for head in guide.encoder.heads:
            head.bias.fill_(1e4)
    ratio, shift = guide.encode(torch.rand(1, *SHAPE))
    torch.testing.assert_close(ratio, torch.full((1, 5), 5.0))
    torch.testing.assert_close(shift, torch.full((1, 5), 5.0))


@pytest.mark.parametrize("mean", [0.1, 1.0, 20.0])
def test_prior_starts_at_the_given_mean_and_a_fano_factor_of_two(mean):
    prior = NegativeBinomialModel(SHAPE, 5, decoder="linear", prior_mean=mean).prior_distribution()
    torch.testing.assert_close(prior.mean, torch.full((5,), mean))
    torch.testing.assert_close(prior.variance / prior.mean, torch.full((5,), 2.0))


@pytest.mark.parametrize("counts", [NegativeBinomialModel, PoissonModel])
def test_the_decoder_reads_standardized_counts(counts):
    """The same model as one that reads counts, with other weights; at the start its input has mean 0 and variance 1."""

    class Raw(counts):
        def standardize(self, z):
            return z

    model, raw = (kind((6,), 5, decoder="linear", prior_mean=3.0) for kind in (counts, Raw))
    z = model.prior_distribution().sample((40_000,))
    start = model.standardize(z)
    assert (start.mean(0).abs() < 4 / 200).all()
    fourth = (start - start.mean(0)).pow(4).mean(0)
    assert ((start.var(0) - 1).abs() < 4 * (fourth - 1).sqrt() / 200).all()
    ours, theirs = model.decoder.layers[0], raw.decoder.layers[0]
    with torch.no_grad():
        for p in model.prior.parameters():
            p.add_(torch.randn(5))
        theirs.weight.copy_(ours.weight / model.initial_stddev)
        theirs.bias.copy_(ours.bias - theirs.weight @ model.prior.mean)
    torch.testing.assert_close(model.decode(z[:7]), raw.decode(z[:7]))
    torch.testing.assert_close(raw.decode(z[:7]), raw.decoder(z[:7]))


def test_generation_draws_integers_from_the_prior(model):
    z, images = model.generate(9)
    assert z.shape == (9, 5) and (z == z.round()).all()
    assert images.shape == (9, *SHAPE)
    torch.testing.assert_close(images, model.observation(z).mean.detach())


def test_exact_context_puts_the_temperature_back(model):
    guide = NegativeBinomialGuide(model, encoder="linear", relaxation=ArrivalTimes(0.4))
    x = torch.rand(3, *SHAPE)
    with pytest.raises(KeyError), guide.exact():
        z = guide(x)
        raise KeyError
    assert (z == z.round()).all() and guide.relaxation == ArrivalTimes(0.4)


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.rand(2, 1, 8, 9), r"shape \(2, 1, 8, 9\): expected \(N, 1, 8, 8\)"),
        (torch.rand(1, 8, 8), r"shape \(1, 8, 8\)"),
        (torch.rand(2, 1, 8, 8) * 255, r"images lie in .* and not in \[0, 1\]"),
        (torch.rand(2, 1, 8, 8) - 0.5, r"images lie in .* and not in \[0, 1\]"),
        (torch.full((2, 1, 8, 8), math.nan), r"images lie in .* and not in \[0, 1\]"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "dtype torch.uint8"),
    ],
)
def test_wrong_images_are_refused(model, x, message):
    guide = NegativeBinomialGuide(model, encoder="linear")
    for program in (model,) if "lie in" in message else (model, guide):  # the range is that of the decoder
        with pytest.raises(ValueError, match=message):
            program(x)


def test_impossible_sizes():
    with pytest.raises(ValueError, match="latents"):
        NegativeBinomialModel(SHAPE, 0, decoder="linear")
    for beta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="beta must be positive"):
            Gaussian(beta)


def test_works_with_module_local_parameters():
    """Pyro's own advice for ELBO modules."""
    with pyro.settings.context(module_local_params=True):
        model = NegativeBinomialModel(SHAPE, 4, decoder="linear")
        guide = NegativeBinomialGuide(model, encoder="linear")
        loss_of = pyro.infer.TraceMeanField_ELBO()(model, guide)
        loss_of(torch.rand(3, *SHAPE)).backward()
        assert all(p.grad is not None for p in loss_of.parameters())
        assert len(pyro.get_param_store()) == 0


def test_a_second_model_under_the_same_names_is_not_left_untrained_silently():
    """Pyro's store keeps parameters by name: SVI would go on training the first model's."""
    x = torch.rand(5, 1, 8, 8)

    def pair():
        model = NegativeBinomialModel((1, 8, 8), 3, decoder="linear")
        return model, NegativeBinomialGuide(model, encoder="linear", relaxation=ArrivalTimes())

    def step(model, guide):
        before = [p.detach().clone() for p in guide.parameters()]
        SVI(model, guide, Adam({"lr": 1e-2}), AnalyticKL_ELBO()).step(x)
        return [not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True)]

    first = pair()
    assert all(step(*first)) and all(step(*first))
    with pytest.raises(InputError, match=r"call pyro.clear_param_store\(\) before a second model"):
        step(*pair())
    assert first[1](x).shape == (5, 3)
    pyro.clear_param_store()
    assert all(step(*pair()))
    assert first[1](x).shape == (5, 3)  # to use a model is no training
    with pyro.get_param_store().scope():
        assert all(step(*pair()))


class Outer(PyroModule):
    """A program that holds others."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("kind", ["within another program", "beside each other", "networks of Pyro's"])
def test_a_second_model_is_refused_wherever_its_parameters_are(kind):
    """The store's names differ with the modules that a program is in, and with those that are in it."""

    def step():
        decoder = PyroModule[torch.nn.Linear](3, 5) if kind == "networks of Pyro's" else "linear"
        model = NegativeBinomialModel((5,), 3, decoder=decoder)
        guide = NegativeBinomialGuide(model, encoder="linear")
        programs = model, guide
        if kind == "within another program":
            programs = Outer(inner=model), Outer(inner=guide)
        elif kind == "beside each other":
            Outer(model=model, guide=guide)
        SVI(*programs, Adam({"lr": 1e-2}), AnalyticKL_ELBO()).step(torch.rand(4, 5))

    step()
    with pytest.raises(InputError, match=r"call pyro.clear_param_store\(\) before a second model"):
        step()


class Weights(PyroModule):
    """A decoder with random weights."""

    def __init__(self):
        super().__init__()
        self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([5, 3]).to_event(2))

    def forward(self, z):
        return z @ self.weight.mT


class Noisy(PyroModule):
    """A decoder with a random layer."""

    def __init__(self):
        super().__init__()
        self.h = PyroSample(lambda self: dist.Normal(self.location, 1.0).to_event(1))

    def forward(self, z):
        self.location = z.sum(-1, keepdim=True).expand(-1, 5)
        return self.h


def test_random_weights_of_a_decoder_are_one_draw_for_a_batch():
    x = torch.rand(6, 5)
    model = NegativeBinomialModel((5,), 3, decoder=Weights())
    guide = NegativeBinomialGuide(model, encoder="linear")

    def both(x):
        location = pyro.param("location", torch.zeros(5, 3))
        pyro.sample("decoder.weight", dist.Normal(location, 0.1).to_event(2))
        return guide(x)

    trace = pyro.poutine.trace(model).get_trace(x)
    assert trace.nodes["decoder.weight"]["value"].shape == (5, 3)
    layer = NegativeBinomialModel((5,), 3, decoder=Noisy())  # its prior depends on the observation
    trace = pyro.poutine.trace(layer).get_trace(x)
    assert trace.nodes["decoder.h"]["value"].shape == (6, 5)
    guide.initialize(x)
    estimates = []
    for elbo in (AnalyticKL_ELBO(), pyro.infer.TraceMeanField_ELBO()):
        torch.manual_seed(4)
        estimates.append(elbo.loss(model, both, x))
    assert estimates[0] == pytest.approx(estimates[1], rel=1e-5)
    SVI(model, both, Adam({"lr": 1e-2}), AnalyticKL_ELBO()).step(x)
    assert bool((pyro.param("location") != 0).any())


@pytest.mark.parametrize("model", [NegativeBinomialModel, PoissonModel, CategoricalModel])
def test_inference_for_continuous_variables_refuses_counts(model):
    """The extended mass function of relaxed counts is no density."""
    program, x = model((5,), 8, decoder="linear"), torch.rand(4, 5)
    with pytest.raises((ValueError, NotImplementedError), match="discrete"):
        pyro.infer.MCMC(pyro.infer.NUTS(program), num_samples=1, warmup_steps=1, disable_progbar=True).run(x)
    with pytest.raises((ValueError, NotImplementedError), match="discrete"):
        AutoNormal(program)(x)


def test_an_empty_batch_is_named():
    model = NegativeBinomialModel((5,), 3, decoder="linear")
    with pytest.raises(InputError, match="at least one observation"):
        model(torch.rand(0, 5))


@pytest.mark.parametrize("network", ["conv", "mlp", "linear"])
def test_svi_trains_every_parameter(network):
    """Pyro's store keeps a copy of a tensor that is not contiguous, and trains that instead of the module's."""
    model = NegativeBinomialModel((1, 28, 28), 6, decoder=network)
    guide = NegativeBinomialGuide(model, encoder=network, relaxation=ArrivalTimes())
    before = {name: p.detach().clone() for module in (model, guide) for name, p in module.named_parameters()}
    svi = SVI(model, guide, Adam({"lr": 1e-2}), AnalyticKL_ELBO())
    for _ in range(3):
        svi.step(torch.rand(8, 1, 28, 28))
    after = {name: p for module in (model, guide) for name, p in module.named_parameters()}
    assert not [name for name, p in after.items() if torch.equal(p, before[name])]


def test_a_parameter_that_pyro_would_copy_is_refused():
    decoder = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.Unflatten(1, SHAPE))
    decoder[0].weight = torch.nn.Parameter(torch.randn(6, 64).T)
    model = NegativeBinomialModel(SHAPE, 6, decoder=decoder)
    guide = NegativeBinomialGuide(model, encoder="linear", relaxation=ArrivalTimes())
    with pytest.raises(InputError, match=r"the parameter decoder.0.weight is not contiguous"):
        for _ in range(2):
            SVI(model, guide, Adam({"lr": 1e-2}), AnalyticKL_ELBO()).step(torch.rand(8, *SHAPE))


def test_a_learned_scale_is_a_scale_of_the_decoders_weights():
    """On the same noise the ELBO is that of a standard normal prior and a decoder of scaled weights; so is the KL."""
    plain = GaussianModel(SHAPE, 5, decoder="linear", likelihood=Gaussian(0.5))
    scaled = ScaledGaussianModel(SHAPE, 5, decoder="linear", likelihood=Gaussian(0.5))
    guides = GaussianGuide(plain, encoder="linear"), ScaledGaussianGuide(scaled, encoder="linear")
    guides[1].encoder.load_state_dict(guides[0].encoder.state_dict())
    scaled.decoder.load_state_dict(plain.decoder.state_dict())
    weight = next(p for p in plain.decoder.parameters() if p.shape[-1] == 5)
    with torch.no_grad():
        scaled.prior.log_scale.normal_()
        weight.mul_(scaled.prior.scale)
    x = torch.rand(7, *SHAPE)
    elbo, terms = AnalyticKL_ELBO(), []
    for model, guide in zip((plain, scaled), guides, strict=True):
        pyro.set_rng_seed(3)
        elbo.loss(model, guide, x)
        terms.append(elbo.terms)
    torch.testing.assert_close(terms[0], terms[1])
