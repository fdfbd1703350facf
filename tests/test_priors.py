"""Models with joint priors: every family trains, and every reported number is that of the joint model."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch import Size
from torch.distributions import kl_divergence

from pyro_nbvae.batching import to_floats
from pyro_nbvae.distributions import Integer, RelaxedNegativeBinomial, RelaxedPoisson, Tilted, TiltedMixture
from pyro_nbvae.errors import InputError
from pyro_nbvae.infer import AnalyticKL_ELBO, learning_rates
from pyro_nbvae.metrics import held_out, importance_weighted_bound
from pyro_nbvae.models import CategoricalModel, GaussianModel, NegativeBinomialModel, PoissonModel
from pyro_nbvae.priors import Autoregressive, Mixture
from pyro_nbvae.sampling import posterior_samples, start_prior
from pyro_nbvae.study.variants import DEFAULT, VARIANTS
from pyro_nbvae.vae import evaluating
from tests.pairs import estimator, pair

KINDS = ("mixture", "autoregressive", "mixture_autoregressive")
FAMILIES = [name for name, vae in VARIANTS.items() if hasattr(vae, "prior") and name != DEFAULT]


def changed(model, spread=0.5):
    """The model with a joint prior at random."""
    torch.manual_seed(4)
    for parameter in model.joint_prior.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_with_every_prior(name, kind):
    """It begins near the factorised model; parameters of the joint prior learn; held-out ELBO and samples work."""
    torch.manual_seed(0)
    (model, guide), (plain, other) = pair(name, prior=kind), pair(name)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "joint" not in k})
    other.load_state_dict(guide.state_dict())
    images = torch.randint(0, 256, (30, 1, 16, 16), dtype=torch.uint8)
    joint, factorised = (held_out(m, g, images, seed=1) for m, g in ((model, guide), (plain, other)))
    assert joint.kl == pytest.approx(factorised.kl, rel=0.01, abs=0.1)
    torch.testing.assert_close(joint.unit_kl, factorised.unit_kl, rtol=1e-4, atol=1e-4)

    changed(model, 0.1)
    x = to_floats(images)
    loss = estimator(name).differentiable_loss(model, guide, x)
    loss.backward()
    gradients = [p.grad for p in model.joint_prior.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
    assert sum(float(g.abs().sum()) for g in gradients) > 0
    found = held_out(model, guide, images)
    assert found.unit_kl.shape == (4,) and math.isfinite(found.elbo)
    z, mean = model.generate(3)
    assert z.shape == (3, 4) and mean.shape == (3, 1, 16, 16)
    assert name == "GS-VAE" or torch.equal(z, z.round())


@pytest.mark.parametrize("name", ["CMP", "EX-C", "P-VAE"])
def test_bounds_are_those_of_the_joint_model(name):
    """With one unit p(x) is a sum over its counts: the ELBO is its mean over draws, the bound reaches the evidence."""
    model, guide = pair(name, latents=1, prior="mixture", components=3, prior_mean=5.0)
    changed(model)
    images = torch.randint(0, 256, (6, 1, 16, 16), dtype=torch.uint8)
    x = to_floats(images)
    counts = torch.arange(150.0)[:, None]
    with torch.no_grad(), guide.exact():
        log_prior = model.prior_distribution().log_prob(counts)
        assert float(log_prior.exp().sum()) == pytest.approx(1, abs=1e-5)
        log_likelihood = model.observation(counts[:, None]).log_prob(x)
        evidence = torch.logsumexp(log_likelihood + log_prior[:, None], 0)
        log_q = guide.posterior(x).log_prob(counts[:, None]).squeeze(-1)
        elbo = (log_q.exp() * (log_likelihood + log_prior[:, None] - log_q).clamp(-1e6)).sum(0)
    drawn = torch.tensor([held_out(model, guide, images, units=False, seed=s).elbo for s in range(80)])
    assert abs(float(drawn.mean() - elbo.mean())) < 4 * float(drawn.std()) / math.sqrt(80) + 1e-3
    bounds = torch.stack([importance_weighted_bound(model, guide, images, 200, seed=s) for s in range(20)])
    error = bounds.std(0) / math.sqrt(20)
    assert (bounds.mean(0) <= evidence + 4 * error + 1e-3).all()
    assert (evidence - bounds.mean(0) < 0.1 * (evidence - elbo) + 4 * error + 1e-3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_observations_as_units(kind):
    """Nothing broadcasts a joint log p of (B,) against (B, K): a batch of 4 with 4 units is as in a batch of 3."""
    model, guide = pair("CMP", prior=kind)
    changed(model)
    images = torch.randint(0, 256, (4, 1, 16, 16), dtype=torch.uint8)
    bounds = importance_weighted_bound(model, guide, images, 200)
    alone = torch.cat([importance_weighted_bound(model, guide, one[None], 200, seed=7) for one in images])
    assert bounds.shape == (4,) and ((bounds - alone).abs() < 0.05 * bounds.abs()).all()
    with evaluating(model, guide, 0):
        q, p = guide.posterior(to_floats(images)), model.prior_distribution()
        z = q.sample(Size([4000]))
        sampled = (q.log_prob(z).sum(-1) - p.log_prob(z)).double()
    draws = torch.tensor([held_out(model, guide, images, units=False, seed=s).kl for s in range(80)])
    error = math.hypot(float(draws.std()) / math.sqrt(80), float(sampled.mean(1).std()) / math.sqrt(4000))
    assert abs(float(draws.mean()) - float(sampled.mean())) < 4 * error


def test_training_as_a_pyro_program_prefers_the_joint_prior():
    """Two kinds of observations: a mixture of two tells them apart, and its ELBO is higher."""
    torch.manual_seed(0)
    kind = torch.arange(400) % 2
    x = torch.where(kind[:, None] == 1, 1.0, -1.0) * torch.ones(400, 6) + 0.1 * torch.randn(400, 6)
    elbos = {}
    for components in (None, 2):
        pyro.clear_param_store()
        torch.manual_seed(1)
        prior = None if components is None else Mixture(components)
        model, guide = pair("CMP", (6,), prior_mean=5.0)
        model = NegativeBinomialModel((6,), 4, decoder="linear", likelihood=model.likelihood, prior=prior)
        guide = type(guide)(model, encoder="linear")
        svi = SVI(model, guide, Adam(learning_rates(1e-2)), AnalyticKL_ELBO())
        for step in range(250):
            if step == 60:
                start_prior(model, guide, x)
            svi.step(x)
        elbos[components] = held_out(model, guide, x).elbo
        if prior is not None:
            with evaluating(model, guide, 0):
                shares = model.prior_distribution().responsibilities(guide(x))
            first = shares[:, 0] > 0.5
            assert bool((first == (kind == 1)).all()) or bool((first == (kind == 0)).all())
    pyro.clear_param_store()
    assert elbos[2] > elbos[None] + 0.3


def test_what_has_no_joint_prior_says_so():
    with pytest.raises(TypeError, match="a joint prior needs a reference of batch shape"):
        CategoricalModel((5,), latents=16, decoder="linear", prior=Mixture(3))

    class Own(PoissonModel):
        def prior_distribution(self):
            return RelaxedPoisson(self.prior.rate)

    with pytest.raises(TypeError, match="prior_distribution of its own and takes no joint prior"):
        Own((5,), latents=3, decoder="linear", prior=Mixture(3))
    for wrong in (
        lambda: Mixture(0),
        lambda: Mixture(2.5),
        lambda: Autoregressive(0),
        lambda: Autoregressive(3, width=0),
    ):
        with pytest.raises(InputError, match="a whole number of at least 1"):
            wrong()
    with pytest.raises(TypeError, match="of must be an Autoregressive prior"):
        Mixture(3, of=Mixture(3))
    with pytest.raises(TypeError, match="prior must be a JointPrior"):
        PoissonModel((5,), latents=3, decoder="linear", prior="mixture")
    prior = Mixture(3)
    PoissonModel((5,), latents=3, decoder="linear", prior=prior)
    with pytest.raises(InputError, match="is of a model with latents of shape"):
        PoissonModel((5,), latents=4, decoder="linear", prior=prior)


def test_parameters_of_another_number_of_groups_are_refused():
    """Their shapes are the same, and the units of the last groups would be independent."""
    there, here = (NegativeBinomialModel((5,), 4, decoder="linear", prior=Autoregressive(n, width=8)) for n in (4, 2))
    with pytest.raises(RuntimeError, match="the units are in 4 groups there, 2 here"):
        here.load_state_dict(there.state_dict())


def test_a_fixed_scale_takes_a_joint_prior_too():
    """A standard normal reference: with all components at it, the mixture is the reference."""
    model = GaussianModel((5,), latents=3, decoder="linear", prior=Mixture(4))
    with torch.no_grad():
        for shift in model.joint_prior.shift:
            shift.zero_()
    p = model.prior_distribution()
    z = torch.randn(10, 3)
    assert isinstance(p, Tilted)
    torch.testing.assert_close(p.log_prob(z), p.reference.log_prob(z).sum(-1))
    assert float(kl_divergence(p.reference, p.reference).sum()) == 0


def test_integers_are_sampled_by_integer_guides():
    model, guide = pair("EX-I", prior="mixture_autoregressive")
    assert isinstance(guide.relaxation, Integer)
    with evaluating(model, guide, 0):
        z = posterior_samples(model, guide, torch.rand(40, 1, 16, 16), 16)
    assert 0 < len(z) <= 16 and torch.equal(z, z.round())


def test_components_part_without_a_start():
    """With one shift for all they would have one gradient, and the mixture would be one component."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    model, guide = pair("CMP", (6,), prior="mixture", components=4, prior_mean=5.0)
    svi = SVI(model, guide, Adam(learning_rates(1e-2)), AnalyticKL_ELBO())
    x = torch.where(torch.arange(100)[:, None] % 2 == 1, 1.0, -1.0) * torch.ones(100, 6)
    for _ in range(100):
        svi.step(x)
    pyro.clear_param_store()
    assert float(torch.pdist(model.joint_prior.shift[0].detach()).min()) > 0.1


@pytest.mark.parametrize("kind", ["mixture", "mixture_autoregressive"])
@pytest.mark.parametrize("mean", [1e-3, 20.0, 1e3, 1e5])
@torch.no_grad()
def test_the_tilt_is_accurate_at_all_means(kind, mean):
    """In single precision as in double, up to the rounding of the larger of 1 and the KL to the reference."""
    torch.manual_seed(0)
    reference = RelaxedNegativeBinomial(torch.ones(64), logits=torch.full((64,), math.log(mean)))
    prior = Mixture(20, of=Autoregressive(4, width=32) if kind != "mixture" else None)
    prior.setup(reference)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    z = reference.sample(Size([50]))
    single = prior(reference).log_prob(z)
    prior.double()
    reference = RelaxedNegativeBinomial(
        torch.ones(64, dtype=torch.float64), logits=torch.full((64,), math.log(mean), dtype=torch.float64)
    )
    exact = prior(reference).log_prob(z.double())
    assert bool(((single - exact).abs() < 2e-4 * exact.abs().clamp_min(1)).all())


@pytest.mark.parametrize("shift", [-200.0, 200.0, -math.inf, math.inf])
def test_extreme_shifts_are_limited(shift):
    for reference in (RelaxedNegativeBinomial(torch.ones(3), logits=torch.zeros(3)), RelaxedPoisson(torch.ones(3))):
        delta = torch.full((2, 3), shift, requires_grad=True)
        d = TiltedMixture(reference, [delta], torch.zeros(2))
        value = d.log_prob(torch.tensor([0.0, 1.0, 5.0]))
        value.backward()
        assert bool(value.isfinite()) and bool(delta.grad.isfinite().all())


def test_a_density_is_not_autocast():
    """A mixture's tilt is a matrix product, which autocast would do in half precision."""
    torch.manual_seed(0)
    model, guide = pair("CMP", prior="mixture_autoregressive", components=5, groups=2)
    changed(model, 0.2)
    x = torch.rand(8, 1, 16, 16)
    losses = []
    for on in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = AnalyticKL_ELBO().differentiable_loss(model, guide, x)
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_prior_that_was_there_before_comes_back():
    """set_joint_prior keeps the parameters of a prior; a new one has the model's precision."""
    model, _ = pair("CMP", prior="mixture", components=3)
    changed(model)
    own, z = model.joint_prior, torch.ones(2, 4)
    before = model.prior_distribution().log_prob(z)
    model.set_joint_prior(None)
    assert model.prior_distribution().event_shape == ()
    model.set_joint_prior(own)
    assert torch.equal(model.prior_distribution().log_prob(z), before)
    model.double().set_joint_prior(Mixture(2))
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_sampling_in_inference_mode_leaves_the_model_trainable():
    model, guide = pair("CMP", prior="autoregressive", groups=2)
    with torch.inference_mode():
        model.prior_distribution().sample(Size([3]))
    AnalyticKL_ELBO().differentiable_loss(model, guide, torch.rand(3, 1, 16, 16)).backward()


def test_setup_sees_the_initial_prior():
    class Sees(Mixture):
        def setup(self, reference):
            super().setup(reference)
            self.seen = reference.mean.detach()

    model = PoissonModel((5,), latents=3, decoder="linear", prior_mean=7.0, prior=Sees(2))
    torch.testing.assert_close(model.joint_prior.seen, torch.full((3,), 7.0))


def test_shapes_that_do_not_fit():
    reference = RelaxedPoisson(torch.ones(2))
    for shift, weights in (((5, 2), (1,)), ((1, 2), (5,)), ((5, 3), (5,)), ((2,), (5,))):
        with pytest.raises(ValueError, match="must be"):
            TiltedMixture(reference, [torch.zeros(shift)], torch.zeros(weights))
    with pytest.raises(ValueError, match="must be"):
        TiltedMixture(reference, [torch.zeros(5, 2)] * 2, torch.zeros(5))

    class Other(RelaxedPoisson):
        def log_prob(self, value):
            return super().log_prob(value) - 1

    with pytest.raises(TypeError, match="a joint prior needs a reference"):
        TiltedMixture(Other(torch.ones(2)), [torch.zeros(5, 2)], torch.zeros(5))
