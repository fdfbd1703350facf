"""The estimators: what they estimate, and that they can be swapped for Pyro's."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import ClippedAdam

from pyro_nbvae.distributions import ArrivalTimes, NegativeBinomial, RelaxedNegativeBinomial, kl_form
from pyro_nbvae.guides import NegativeBinomialGuide
from pyro_nbvae.infer import AnalyticKL_ELBO, MonteCarloKL_ELBO, SiteKL_ELBO
from pyro_nbvae.likelihoods import Gaussian
from pyro_nbvae.study.variants import VARIANTS
from tests import pairs

SHAPE = (1, 8, 8)


def pair(name="EX-C", latents=6, relaxed=True, **options):
    if name.endswith("-G"):  # fewer counts to draw noise for
        options = {"prior_mean": 2.0, **options}
    model, guide = pairs.pair(name, SHAPE, latents, likelihood=Gaussian(0.5), **options)
    guide.relaxation = guide.relaxation.at(0.3) if relaxed and guide.relaxation is not None else None
    return model, guide, pairs.estimator(name)


def images(number=16):
    return torch.rand(number, *SHAPE)


def repeated(elbo, model, guide, x, times):
    """Independent values of the loss: the KL's share and the whole, each (times,)."""
    values = [(elbo.loss(model, guide, x), float(elbo.terms[1])) for _ in range(times)]
    return torch.tensor(values, dtype=torch.float64).T


def test_monte_carlo_kl_averages_to_the_exact_one_on_integer_counts():
    model, guide, _ = pair()
    x = images()
    with guide.exact():
        exact = AnalyticKL_ELBO()
        exact.loss(model, guide, x)
        for samples in (1, 5):
            _, kl = repeated(MonteCarloKL_ELBO(num_samples=samples), model, guide, x, 400 // samples)
            error = float(kl.std()) / math.sqrt(len(kl))
            assert abs(float(kl.mean()) - float(exact.terms[1])) < 4 * error


def test_more_samples_less_noise_one_decode():
    model, guide, _ = pair()
    x, calls = images(), []
    model.decoder.register_forward_hook(lambda *_: calls.append(1))
    one, many = (repeated(MonteCarloKL_ELBO(n), model, guide, x, 150)[1].var() for n in (1, 25))
    assert len(calls) == 300
    assert one / many == pytest.approx(25, rel=0.6)


def test_bias_of_relaxed_counts_vanishes_with_the_temperature():
    """The Monte Carlo KL at relaxed counts is off by over 4 standard errors where warm, not where cold.

    On the way it may cross the exact KL, so that between the two it need not fall.
    """
    model, guide, _ = pair()
    x = images(64)
    exact = AnalyticKL_ELBO()
    exact.loss(model, guide, x)
    biases, errors = [], []
    for temperature in (1.0, 0.5, 0.01):
        guide.relaxation = guide.relaxation.at(temperature)
        _, kl = repeated(MonteCarloKL_ELBO(5), model, guide, x, 150)
        biases.append(abs(float(kl.mean() - exact.terms[1])))
        errors.append(float(kl.std()) / math.sqrt(len(kl)))
    assert any(bias > 4 * error for bias, error in zip(biases[:2], errors[:2], strict=True))
    assert biases[2] < 4 * errors[2]


def test_a_sampled_kl_through_integers_is_warned_of_where_it_has_a_gradient():
    model, guide, _ = pair("EX-I")
    x = images()
    with pytest.warns(UserWarning, match=r"'z': the gradient of a sampled KL through Integer\(\) is biased"):
        MonteCarloKL_ELBO().differentiable_loss(model, guide, x)
    MonteCarloKL_ELBO().loss(model, guide, x)  # its value is not biased
    AnalyticKL_ELBO().differentiable_loss(model, guide, x)


def test_a_scale_of_one_side_is_warned_of_through_integers():
    """E[log q] has another weight than E[log p] then, and is sampled."""
    model, guide, _ = pair("EX-I")
    scaled, x = poutine.scale(model, 0.3), images()
    with pytest.warns(UserWarning, match="with the same scale and mask in model and guide"):
        AnalyticKL_ELBO().differentiable_loss(scaled, guide, x)
    AnalyticKL_ELBO().differentiable_loss(scaled, poutine.scale(guide, 0.3), x)


def test_shared_dispersion_equals_exact_where_the_ratio_is_one():
    model, shared, _ = pair("DS-C", relaxed=False)
    free = NegativeBinomialGuide(model, encoder="linear", relaxation=None)
    with torch.no_grad():
        (first,), (copy, ratio) = shared.encoder.heads, free.encoder.heads
        copy.load_state_dict(first.state_dict())
        for parameter in ratio.parameters():
            parameter.zero_()
    x = images()
    prior = model.prior_distribution().expand(torch.Size([len(x), 6]))
    assert kl_form(shared.posterior(x), prior) == "shared" and kl_form(free.posterior(x), prior) == "exact"
    kls, gradients = [], []
    for guide in (shared, free):
        kl = torch.distributions.kl_divergence(guide.posterior(x), prior).sum()
        kls.append(kl.detach())
        prior = model.prior_distribution().expand(torch.Size([len(x), 6]))
        kl = torch.distributions.kl_divergence(guide.posterior(x), prior).sum()
        gradients.append(torch.autograd.grad(kl, [model.prior.log_total_count, model.prior.logits]))
    torch.testing.assert_close(kls[0], kls[1], rtol=1e-5, atol=1e-5)
    # the exact form's two partial derivatives in the one dispersion cancel in the integral, up to its quadrature
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=2e-3)
    torch.manual_seed(7)
    first = AnalyticKL_ELBO().loss(model, shared, x)
    torch.manual_seed(7)
    assert AnalyticKL_ELBO().loss(model, free, x) == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("estimator", [Trace_ELBO, TraceMeanField_ELBO, None])
def test_every_pair_trains_under_svi_with_every_estimator(name, estimator):
    model, guide, own = pair(name, latents=8)
    x = images(8) * 0.2
    svi = SVI(model, guide, ClippedAdam({"lr": 0.04}), loss=estimator() if estimator else own)
    before = svi.evaluate_loss(x)
    losses = [svi.step(x) for _ in range(30)]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-10:]) / 10 < before
    trained = set(pyro.get_param_store().keys())
    assert {f"prior$$${name}" for name, _ in model.prior.named_parameters()} <= trained
    assert any("encoder" in key for key in trained) and any("decoder" in key for key in trained)


def test_analytic_estimator_agrees_with_pyros_own():
    """On the same noise TraceMeanField_ELBO takes the same registered KL."""
    model, guide, elbo = pair("DS-C")
    x = images()
    guide.initialize(x), model.initialize(x)
    values = []
    for estimator in (elbo, TraceMeanField_ELBO()):
        torch.manual_seed(3)
        values.append(estimator.loss(model, guide, x))
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_estimators_agree_in_expectation_with_trace_elbo():
    """On integer counts all three estimate one ELBO."""
    model, guide, _ = pair()
    x = images(4)
    with guide.exact(), torch.no_grad():
        samples = [
            torch.tensor([e.loss(model, guide, x) for _ in range(300)], dtype=torch.float64)
            for e in (Trace_ELBO(), AnalyticKL_ELBO(), MonteCarloKL_ELBO(3))
        ]
    means = [s.mean() for s in samples]
    errors = [s.std() / math.sqrt(len(s)) for s in samples]
    for k in (0, 2):
        assert abs(means[k] - means[1]) < 4 * math.hypot(errors[k], errors[1])


def test_a_subsample_of_a_larger_data_set_scales():
    model, guide, elbo = pair(latents=3)
    x = images(5)
    torch.manual_seed(1)
    alone = elbo.loss(model, guide, x)
    model.data_size = guide.data_size = 50
    for estimator in (elbo, Trace_ELBO(), TraceMeanField_ELBO()):
        torch.manual_seed(1)
        scaled = estimator.loss(model, guide, x)
        if estimator is elbo:
            assert scaled == pytest.approx(10 * alone, rel=1e-5)
        else:
            assert math.isfinite(scaled) and scaled == pytest.approx(10 * alone, rel=0.5)


def test_kl_weight_weighs_the_kl_alone():
    model, guide, elbo = pair()
    x = images()
    losses = []
    for weight in (0.0, 0.5, 1.0):
        elbo.kl_weight = weight
        torch.manual_seed(2)
        losses.append(elbo.loss(model, guide, x))
    likelihood, kl = (float(t) for t in elbo.terms)
    assert losses == pytest.approx([-likelihood + w * kl for w in (0.0, 0.5, 1.0)], rel=1e-5)


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("estimator", [AnalyticKL_ELBO, MonteCarloKL_ELBO])
def test_several_particles(estimator, vectorize):
    model, guide, _ = pair()
    x = images(6)
    one = torch.tensor([estimator().loss(model, guide, x) for _ in range(200)])
    many = estimator(num_particles=20, vectorize_particles=vectorize, max_plate_nesting=1)
    several = torch.tensor([many.loss(model, guide, x) for _ in range(20)])
    error = math.hypot(float(one.std()) / math.sqrt(200), float(several.std()) / math.sqrt(20))
    assert abs(float(one.mean() - several.mean())) < 4 * error
    assert several.std() < one.std() / 2


def test_a_pair_without_a_registered_kl_is_named():
    def model():
        pyro.sample("z", dist.Gamma(1.0, 1.0))

    def guide():
        pyro.sample("z", RelaxedNegativeBinomial(1.0, logits=0.0, relaxation=ArrivalTimes(0.5)))

    with pytest.raises(NotImplementedError, match=r"RelaxedNegativeBinomial \(guide\) and Gamma \(model\)"):
        AnalyticKL_ELBO().differentiable_loss(model, guide)


def test_counts_without_a_gradient_are_refused_where_one_is_needed():
    model, guide, elbo = pair(relaxed=False)
    with pytest.raises(NotImplementedError, match="RelaxedNegativeBinomial has no rsample"):
        elbo.differentiable_loss(model, guide, images())
    assert math.isfinite(elbo.loss(model, guide, images()))


def test_no_gradient_needs_no_rsample():
    """Under no_grad, and for a site of the guide whose distribution has no parameter."""
    model, guide, elbo = pair(relaxed=False)
    with torch.no_grad():
        assert elbo.differentiable_loss(model, guide, images()).isfinite()

    def one():
        side = pyro.sample("side", dist.Bernoulli(0.5), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(1.0)) * (1 + side), 1.0))

    elbo.loss_and_grads(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), one)
    assert float(pyro.param("m").grad) in (1.0, 4.0)  # of m^2 / 2, and of (2 m)^2 / 2


def test_particles_in_turn_keep_one_graph():
    """Tensors that are saved for backward at one time: as many for 20 particles as for one."""
    model, guide, _ = pair()
    x, counts = images(), []

    class Saved:
        alive = most = 0

        def __init__(self, tensor):
            self.tensor = tensor
            Saved.alive += 1
            Saved.most = max(Saved.most, Saved.alive)

        def __del__(self):
            Saved.alive -= 1

    for particles in (1, 20):
        Saved.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            AnalyticKL_ELBO(num_particles=particles).loss_and_grads(model, guide, x)
        counts.append(Saved.most)
    assert counts[0] > 10 and counts[1] < 2 * counts[0]


def test_a_kl_of_the_wrong_shape_is_named():
    class Summed_ELBO(SiteKL_ELBO):
        def site_kl(self, name, guide_site, model_site):
            return torch.distributions.kl_divergence(guide_site["fn"], model_site["fn"]).sum()

    def program(location):
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(location, 1.0))

    with pytest.raises(ValueError, match=r"site 'z': the KL has shape \(\) and the site the batch shape \(4,\)"):
        Summed_ELBO().loss(lambda: program(0.0), lambda: program(1.0))


def test_a_program_that_is_no_vae():
    """A dozen lines of Pyro: the dispersion of counts behind noisy measurements, and an auxiliary guide site."""
    truth = NegativeBinomial(2.0, logits=math.log(3.0)).sample(torch.Size([400]))
    data = truth + 0.05 * torch.randn(400)

    def model(data):
        r = pyro.param("r", torch.tensor(1.0), constraint=dist.constraints.positive)
        logits = pyro.param("logits", torch.tensor(0.0))
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", RelaxedNegativeBinomial(r, logits=logits))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    def guide(data):
        pyro.sample("side", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        with pyro.plate("data", len(data)):
            a = pyro.param("a", torch.tensor(0.0)) + 0.05 * data.clamp(min=0)
            mean = data.clamp(min=0.3)
            pyro.sample("z", RelaxedNegativeBinomial(mean * a.exp(), logits=-a, relaxation=ArrivalTimes(0.1)))

    svi = SVI(model, guide, ClippedAdam({"lr": 0.06}), loss=AnalyticKL_ELBO())
    for _ in range(200):
        svi.step(data)
    r, logits = pyro.param("r").detach(), pyro.param("logits").detach()
    assert float(r * logits.exp()) == pytest.approx(float(data.mean()), rel=0.25)
    assert float(logits.exp()) > 1  # the counts' Fano factor is 4


def test_bad_number_of_samples():
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 1, got 0"):
        MonteCarloKL_ELBO(0)
