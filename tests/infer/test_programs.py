"""Programs of counts in Pyro: traced losses, messenger guides, enumeration, autoguides, Predictive, joint priors."""

import copy
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceMeanField_ELBO,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from pyro.infer.autoguide.effect import AutoMessenger
from torch.distributions import kl_divergence, register_kl

from pyro_nbvae.distributions import (
    ArrivalTimes,
    ConwayMaxwellPoisson,
    GumbelSoftmax,
    Integer,
    NegativeBinomial,
    RelaxedNegativeBinomial,
    RelaxedOneHotCategorical,
    RelaxedPoisson,
)
from pyro_nbvae.guides import NegativeBinomialGuide, PoissonGuide
from pyro_nbvae.infer import AnalyticKL_ELBO, MonteCarloKL_ELBO, RelaxReparam
from pyro_nbvae.metrics import held_out, importance_weighted_bound
from pyro_nbvae.models import NegativeBinomialModel, PoissonModel
from pyro_nbvae.study.variants import VARIANTS
from tests import pairs

RELAXED = [name for name, v in VARIANTS.items() if hasattr(getattr(v, "relaxation", None), "temperature")]


def pair(name):
    torch.manual_seed(0)
    return pairs.pair(name, (5,), 8)


def loss_and_gradient(loss, model, guide, *arguments):
    parameters = [*model.parameters(), *guide.parameters()]
    for p in parameters:
        p.grad = None
    torch.manual_seed(1)
    value = loss.loss_and_grads(model, guide, *arguments)
    return value, torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters])


# --- traced losses --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch.jit's
@pytest.mark.parametrize("name", RELAXED)
@pytest.mark.parametrize("jit", [JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceMeanField_ELBO])
def test_traced_losses_follow_an_annealed_temperature(jit, name):
    plain = {JitTraceEnum_ELBO: TraceEnum_ELBO}.get(jit, Trace_ELBO)
    model, guide = pair(name)
    x = torch.rand(6, 5)
    with pyro.get_param_store().scope():
        loss = jit(ignore_jit_warnings=True, max_plate_nesting=1)
        loss.loss_and_grads(model, guide, x)
        if jit is JitTraceMeanField_ELBO:  # it takes the registered KL, and is traced at each call
            plain = AnalyticKL_ELBO
        seen = []
        for temperature in (1.0, 0.1, 0.5):
            guide.relaxation = guide.relaxation.at(temperature)
            if jit is JitTraceMeanField_ELBO:
                torch.manual_seed(1)
                seen.append(loss.loss_and_grads(model, guide, x))
                continue
            value, gradient = loss_and_gradient(loss, model, guide, x)
            expected, its_gradient = loss_and_gradient(plain(max_plate_nesting=1), model, guide, x)
            assert value == pytest.approx(expected, rel=1e-5)
            torch.testing.assert_close(gradient, its_gradient, rtol=1e-3, atol=1e-3)
            seen.append(value)
        assert len(set(seen)) == 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["CMP", "EX-C", "C-VAE"])
def test_traced_losses_refuse_another_relaxation(name):
    model, guide = pair(name)
    x = torch.rand(6, 5)
    with pyro.get_param_store().scope():
        loss = JitTrace_ELBO(ignore_jit_warnings=True)
        loss.loss_and_grads(model, guide, x)
        with guide.exact(), pytest.raises(RuntimeError, match="keeps its relaxation"):
            loss.loss_and_grads(model, guide, x)
        assert math.isfinite(loss.loss_and_grads(model, guide, x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("name", ["G-VAE", "P-VAE"])
def test_traced_losses_refuse_another_batch_size(name, size):
    """Also a single observation, which would broadcast to as many as were traced."""
    model, guide = pair(name)
    with pyro.get_param_store().scope():
        loss = JitTrace_ELBO(ignore_jit_warnings=True)
        loss.loss_and_grads(model, guide, torch.rand(6, 5))
        with pytest.raises(RuntimeError, match=r"shape '\[6, 5\]' is invalid"):
            loss.loss_and_grads(model, guide, torch.rand(size, 5))


@pytest.mark.filterwarnings("ignore")
def test_traced_losses_follow_a_reparametriser():
    def program():
        z = pyro.sample("z", dist.Poisson(torch.tensor(3.0)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.5))

    relax = RelaxReparam(ArrivalTimes(1.0))
    model, guide = (poutine.reparam(p, config={"z": relax}) for p in (program, poutine.block(program, hide=["x"])))
    jit = JitTrace_ELBO(ignore_jit_warnings=True)
    jit.loss(model, guide)
    for temperature in (0.05, 0.7):
        relax.relaxation = relax.relaxation.at(temperature)
        values = []
        for loss in (jit, Trace_ELBO()):
            torch.manual_seed(4)
            values.append(loss.loss(model, guide))
        assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_exact_counts_are_drawn_anew_in_a_traced_program():
    """Nothing of a compiled loop's memory is kept: means at other parameters than those it was traced with."""
    families = (
        lambda a: ConwayMaxwellPoisson(a, torch.full_like(a, 1.5)),
        lambda a: NegativeBinomial(a, logits=torch.zeros_like(a)),
        lambda a: RelaxedPoisson(a),
    )
    for make in families:
        traced = torch.jit.trace(lambda a, make=make: make(a).sample(), (torch.full((4000,), 3.0),), check_trace=False)
        d = make(torch.full((4000,), 50.0))
        z = traced(torch.full((4000,), 50.0))
        assert abs(float(z.mean() - d.mean[0])) < 5 * float(d.variance[0] / 4000) ** 0.5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("relaxation", [None, Integer(), ArrivalTimes(0.3)], ids=str)
def test_a_sample_in_a_traced_program_has_no_gradient(relaxation):
    """Tracing does not keep ``no_grad``."""

    def f(rate):
        d = RelaxedNegativeBinomial(rate, logits=rate / rate - 1, relaxation=relaxation)
        return d.log_prob(d.sample())

    slopes = []
    for g in (f, torch.jit.trace(f, (torch.full((50,), 3.0, requires_grad=True),), check_trace=False)):
        torch.manual_seed(0)
        rate = torch.full((50,), 7.0, requires_grad=True)
        slopes.append(torch.autograd.grad(g(rate).sum(), rate)[0])
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)


# --- guides that are messengers -------------------------------------------------------------------------------------


def counts_and_normal():
    z = pyro.sample("z", RelaxedPoisson(torch.tensor(2.0)))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(4.0))


class CountMessenger(AutoMessenger):
    def get_posterior(self, name, prior):
        return RelaxedPoisson(pyro.param("rate", torch.tensor(3.0)), relaxation=Integer())


@pytest.mark.parametrize("elbo", [AnalyticKL_ELBO, MonteCarloKL_ELBO])
def test_a_guide_that_is_a_messenger(elbo):
    """Such a guide runs the model itself: the likelihood is counted once."""
    guide = CountMessenger(counts_and_normal)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = torch.tensor([elbo().loss(counts_and_normal, guide) for _ in range(800)])
    k = torch.arange(60.0)
    mass = RelaxedPoisson(3.0).log_prob(k).exp()
    expected = (
        kl_divergence(RelaxedPoisson(3.0), RelaxedPoisson(2.0))
        - (mass * dist.Normal(k, 1.0).log_prob(torch.tensor(4.0))).sum()
    )
    assert abs(float(ours.mean() - expected)) < 5 * float(ours.std()) / 800**0.5


def test_an_autoguide_that_is_a_messenger():
    def model():
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 2.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(4.0))

    guide = AutoNormalMessenger(model)
    torch.manual_seed(0)
    ours, theirs = (
        torch.tensor([loss.loss(model, guide) for _ in range(400)]) for loss in (MonteCarloKL_ELBO(), Trace_ELBO())
    )
    assert abs(float(ours.mean() - theirs.mean())) < 5 * float((ours.var() + theirs.var()) / 400) ** 0.5


# --- enumeration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: RelaxedPoisson(2.0),
        lambda: RelaxedNegativeBinomial(2.0, logits=0.0),
        lambda: NegativeBinomial(2.0, logits=0.0),
        lambda: ConwayMaxwellPoisson(2.0, 1.5),
    ],
)
def test_counts_are_not_enumerated(make):
    def model():
        pyro.sample("z", make(), infer={"enumerate": "parallel"})

    with pytest.raises(NotImplementedError, match="infinitely many values") as error:
        TraceEnum_ELBO(max_plate_nesting=0).loss(config_enumerate(model), lambda: None)
    assert "TraceTMC_ELBO" in str(error.value).splitlines()[0] and not make().has_enumerate_support


def test_a_relaxed_category_is_not_enumerated():
    logits = torch.tensor([0.3, 0.0, -0.3])

    def model():
        z = pyro.sample("z", RelaxedOneHotCategorical(logits=torch.zeros(3)))
        pyro.sample("x", dist.Normal(z @ torch.tensor([0.0, 1.0, 2.0]), 1.0), obs=torch.tensor(2.0))

    def guide(relaxation):
        return lambda: pyro.sample("z", RelaxedOneHotCategorical(logits=logits, relaxation=relaxation))

    relaxed = RelaxedOneHotCategorical(logits=logits, relaxation=GumbelSoftmax(0.5))
    assert not relaxed.has_enumerate_support
    with pytest.raises(NotImplementedError, match="relaxed"):
        relaxed.enumerate_support()
    elbo = TraceEnum_ELBO(max_plate_nesting=0)
    log_q, log_x = logits.log_softmax(0), dist.Normal(torch.arange(3.0), 1.0).log_prob(torch.tensor(2.0))
    expected = (log_q.exp() * (log_q + math.log(3) - log_x)).sum()
    assert elbo.loss(model, config_enumerate(guide(None))) == pytest.approx(float(expected), rel=1e-5)


# --- autoguides and Predictive --------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoIAFNormal])
@pytest.mark.parametrize(
    "make",
    [
        lambda: RelaxedPoisson(2.0, relaxation=Integer()),
        lambda: RelaxedNegativeBinomial(2.0, logits=0.0, relaxation=ArrivalTimes(0.3)),
        lambda: ConwayMaxwellPoisson(2.0, 1.5),
    ],
)
def test_autoguides_refuse_counts_in_one_line(make, guide):
    with pytest.raises(ValueError, match="Continuous inference cannot handle discrete sample site 'z'"):
        guide(lambda: pyro.sample("z", make()))()


@pytest.mark.parametrize("name", ["CMP", "EX-C", "DS-G", "P-NB", "P-VAE", "G-VAE", "C-VAE"])
@pytest.mark.parametrize("parallel", [True, False])
def test_predictive(name, parallel):
    """Samples of the guide, and what the model makes of them: shapes, and the mean of z within 5 standard errors."""
    model, guide = pair(name)
    x, n = torch.rand(4, 5), 400 if parallel else 60
    with guide.exact(), torch.no_grad():
        drawn = Predictive(guide, num_samples=n, parallel=parallel)(x)
        z = drawn["z"].reshape(n, 4, *model.latent_shape)
        q = guide.posterior(x)
        assert ((z.mean(0) - q.mean).abs() <= 5 * (q.variance / n).sqrt() + 1e-5).all()
        made = Predictive(model, posterior_samples=drawn, parallel=parallel)(None, 4)["x"].reshape(n, 4, 5)
        expected = model.observation(z).mean
        spread = model.observation(z).variance
    assert ((made - expected).mean(0).abs() <= 6 * (spread.mean(0) / n).sqrt()).all()


# --- joint priors ---------------------------------------------------------------------------------------------------


class Joint(dist.TorchDistribution):
    """The product of a distribution's last batch dimension, with a log density of the batch shape alone."""

    arg_constraints = {}

    def __init__(self, base):
        self.base = base
        super().__init__(base.batch_shape[:-1], base.batch_shape[-1:], validate_args=False)

    support = RelaxedPoisson.support
    mean = property(lambda self: self.base.mean)
    variance = property(lambda self: self.base.variance)

    def sample(self, sample_shape=torch.Size()):
        return self.base.sample(sample_shape)

    def log_prob(self, value):
        return self.base.log_prob(value).sum(-1)

    def expand(self, batch_shape, _instance=None):
        return Joint(self.base.expand(torch.Size(batch_shape) + self.event_shape))


class JointModel(PoissonModel):
    def prior_distribution(self):
        return Joint(super().prior_distribution())


@pytest.mark.parametrize("batch", [3, 6])
def test_a_joint_prior_is_summed_over_units_once(batch):
    """Also where the batch has as many observations as there are units: as with the same prior, unit by unit."""
    torch.manual_seed(0)
    plain, joint = (kind((5,), latents=3, decoder="linear", prior_mean=2.0) for kind in (PoissonModel, JointModel))
    joint.load_state_dict(plain.state_dict())
    guides = [PoissonGuide(plain, encoder="linear"), PoissonGuide(joint, encoder="linear")]
    guides[1].encoder.load_state_dict(guides[0].encoder.state_dict())
    x = torch.rand(batch, 5)
    bounds = [importance_weighted_bound(m, g, x, samples=6) for m, g in zip((plain, joint), guides, strict=True)]
    torch.testing.assert_close(*bounds)
    exact, sampled = (held_out(m, g, x) for m, g in zip((plain, joint), guides, strict=True))
    assert sampled.kl_error is not None and abs(sampled.kl - exact.kl) < 5 * sampled.kl_error + 1e-6
    assert sampled.unit_kl.shape == () and sampled.log_likelihood == pytest.approx(exact.log_likelihood)
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = [
            torch.tensor([MonteCarloKL_ELBO(1).loss(m, g, x) for _ in range(300)])
            for m, g in zip((plain, joint), guides, strict=True)
        ]
    difference = float(losses[0].mean() - losses[1].mean())
    assert abs(difference) < 5 * float((losses[0].var() + losses[1].var()) / 300) ** 0.5


class Loud(RelaxedPoisson):
    """A family whose KL, which exists, raises an error of its own."""

    def log_prob(self, value):
        return super().log_prob(value)


@register_kl(Loud, Loud)
def _kl(q, p):
    raise NotImplementedError("Loud has no KL for these rates")


def test_the_error_of_a_kl_that_exists_is_not_swallowed():
    class LoudModel(PoissonModel):
        def prior_distribution(self):
            return Loud(self.prior.rate)

    class LoudGuide(PoissonGuide):
        def posterior(self, x):
            return Loud(super().posterior(x).rate, relaxation=self.relaxation)

    model = LoudModel((5,), latents=3, decoder="linear")
    guide = LoudGuide(model, encoder="linear")
    for call in (
        lambda: AnalyticKL_ELBO().loss(model, guide, torch.rand(4, 5)),
        lambda: held_out(model, guide, torch.rand(4, 5)),
    ):
        with pytest.raises(NotImplementedError, match="no KL for these rates"):
            call()


# --- compiled programs ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # Dynamo's, where a graph breaks
@pytest.mark.parametrize("name", ["CMP", "EX-C"])
def test_a_compiled_loss_is_the_plain_one_in_the_mean(name):
    """Loss and gradient within 5 standard errors of 40 draws each."""
    model, guide = pair(name)
    x = torch.rand(16, 5)
    torch.compiler.reset()
    with pyro.validation_enabled(False):
        losses = [lambda: AnalyticKL_ELBO().differentiable_loss(model, guide, x)]
        losses.append(torch.compile(losses[0], backend="aot_eager"))
        draws = []
        for loss in losses:
            found = []
            for _ in range(40):
                value = loss()
                slope = torch.autograd.grad(value, list(guide.encoder.parameters()))
                found.append(torch.stack([value.detach(), *(g.sum() for g in slope)]))
            draws.append(torch.stack(found))
    error = ((draws[0].var(0) + draws[1].var(0)) / 40).sqrt()
    assert ((draws[0].mean(0) - draws[1].mean(0)).abs() <= 5 * error + 1e-4).all()


@pytest.mark.filterwarnings("ignore")
def test_compiled_networks_train():
    torch.manual_seed(0)
    torch.compiler.reset()
    plain = NegativeBinomialModel((5,), latents=3, decoder="linear")
    decoder = torch.compile(copy.deepcopy(plain.decoder), backend="aot_eager")
    model = NegativeBinomialModel((5,), latents=3, decoder=decoder)
    encoder = torch.compile(NegativeBinomialGuide(plain, encoder="linear").encoder, backend="aot_eager")
    guide = NegativeBinomialGuide(model, encoder=encoder)
    x = torch.rand(8, 5)
    with pyro.get_param_store().scope():
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), AnalyticKL_ELBO())
        losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
