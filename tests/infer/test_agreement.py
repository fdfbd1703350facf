"""Where Trace_ELBO is defined, ours agree with it in expectation: autoguides, guides out of order, scales and masks."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from pyro.optim import ClippedAdam
from torch.distributions import kl_divergence

from pyro_nbvae.distributions import ArrivalTimes, Integer, NegativeBinomial, RelaxedNegativeBinomial, RelaxedPoisson
from pyro_nbvae.infer import AnalyticKL_ELBO, MonteCarloKL_ELBO

OURS = [AnalyticKL_ELBO, MonteCarloKL_ELBO]
X = torch.tensor([2.0, 5.0])


def gamma_poisson():
    rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
    with pyro.plate("data", 2):
        pyro.sample("x", dist.Poisson(rate), obs=X)


def evidence():
    """log p(2, 5): the rate's posterior is a Gamma, so the two counts are a Dirichlet multinomial times an NB."""
    total = scipy.stats.nbinom.logpmf(7, 2, 0.5 / (0.5 + 2))
    return total + scipy.stats.binom.logpmf(2, 7, 0.5)


def regression():
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    dispersion = pyro.sample("dispersion", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", 4):
        inputs = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, -1.0]])
        log_mean = inputs @ slope.unsqueeze(-1)
        counts = torch.tensor([2.0, 4.0, 9.0, 0.0])
        logits = log_mean.squeeze(-1) - dispersion.log()
        pyro.sample("y", NegativeBinomial(dispersion, logits=logits), obs=counts)


def estimates(elbo, model, guide, times):
    with torch.no_grad():
        return torch.tensor([elbo.loss(model, guide) for _ in range(times)], dtype=torch.float64)


def agree(a, b):
    """Means within 4 standard errors of each other (and rounding)."""
    error = math.hypot(float(a.std()), float(b.std())) / math.sqrt(len(a))
    assert abs(float(a.mean() - b.mean())) < 4 * error + 1e-4, (a.mean(), b.mean(), error)


AUTOGUIDES = [
    AutoNormal,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
    lambda model: AutoStructured(model, conditionals="normal", dependencies="linear"),
    AutoDelta,
]
IDS = ["Normal", "DiagonalNormal", "MultivariateNormal", "LowRankMultivariateNormal", "Structured", "Delta"]


@pytest.mark.parametrize("program", [gamma_poisson, regression])
@pytest.mark.parametrize("autoguide", AUTOGUIDES, ids=IDS)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_autoguides_over_constrained_latents(program, autoguide):
    guide = autoguide(program)
    guide()
    reference = estimates(Trace_ELBO(), program, guide, 120)
    for estimator in OURS:
        agree(estimates(estimator(), program, guide, 120), reference)


@pytest.mark.parametrize("estimator", OURS)
def test_an_autoguide_reaches_the_evidence_and_the_posterior(estimator):
    """Gamma-Poisson: the best log-normal's bound is within 0.05 nats of log p(x), and its mean within 5 %."""
    together = {"vectorize_particles": True, "max_plate_nesting": 1}
    guide = AutoNormal(gamma_poisson)
    loss = estimator(num_particles=5, **together)
    svi = SVI(gamma_poisson, guide, ClippedAdam({"lr": 0.05, "lrd": 0.995}), loss=loss)
    for _ in range(600):
        svi.step()
    bound = -estimates(Trace_ELBO(num_particles=50, **together), gamma_poisson, guide, 40)
    assert evidence() - 0.05 < float(bound.mean()) < evidence() + 4 * float(bound.std()) / math.sqrt(40)
    with pyro.plate("draws", 1000, dim=-2):
        rates = guide()["rate"].detach()
    assert rates.numel() == 1000 and float(rates.mean()) == pytest.approx((2 + 7) / (0.5 + 2), rel=0.05)


# --- two layers ------------------------------------------------------------------------------------------------------


def layers():
    """p(h) p(z | h) p(x | z): a continuous layer above a count."""
    h = pyro.sample("h", dist.Normal(0.0, 1.0))
    z = pyro.sample("z", RelaxedNegativeBinomial(2.0, logits=0.5 * h))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(3.0))


def top_down(relaxation=None):
    h = pyro.sample("h", dist.Normal(0.4, 0.8))
    pyro.sample("z", RelaxedNegativeBinomial(6.0, logits=-0.5 + 0.3 * h, relaxation=relaxation))


def bottom_up(relaxation=None):
    """q(z) q(h | z): the descendants of z in the guide are its parents in the model."""
    z = pyro.sample("z", RelaxedNegativeBinomial(6.0, logits=-0.5, relaxation=relaxation))
    pyro.sample("h", dist.Normal(0.4 * z - 1, 0.6))


def expected_kl(of_z=1.0):
    """KL of ``top_down`` against ``layers``: of h in closed form, of z by Gauss-Hermite quadrature over h.

    Args:
        of_z: factor of the KL of z.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    h = torch.from_numpy(0.4 + 0.8 * nodes)
    z = kl_divergence(RelaxedNegativeBinomial(6.0, logits=-0.5 + 0.3 * h), RelaxedNegativeBinomial(2.0, logits=0.5 * h))
    of_h = kl_divergence(dist.Normal(0.4, 0.8), dist.Normal(0.0, 1.0))
    return float(of_h) + of_z * float((torch.from_numpy(weights) * z).sum() / weights.sum())


def check_divergence(estimator, model, guide, expected):
    """The divergence alone, without the likelihood's noise: within 4 standard errors, which are below a tenth of it."""
    elbo = estimator(num_particles=500, vectorize_particles=True, max_plate_nesting=0)
    found = []
    for _ in range(24):
        elbo.loss(model, guide)
        found.append(float(elbo.terms[1]))
    found = torch.tensor(found, dtype=torch.float64)
    error = float(found.std()) / math.sqrt(len(found))
    assert abs(float(found.mean()) - expected) < 4 * error + 1e-4
    assert error < max(0.1 * abs(expected), 1e-3) / 4


@pytest.mark.parametrize("estimator", OURS)
def test_a_guide_in_the_models_order(estimator):
    check_divergence(estimator, layers, top_down, expected_kl())


def test_a_guide_out_of_order_is_refused_or_sampled_jointly():
    with pytest.raises(
        ValueError, match=r"AnalyticKL_ELBO: the guide draws 'z' before 'h' and the model 'h' before 'z'"
    ):
        AnalyticKL_ELBO().loss(layers, bottom_up)
    reference = estimates(Trace_ELBO(), layers, bottom_up, 120)
    for samples in (1, 5):
        agree(estimates(MonteCarloKL_ELBO(samples), layers, bottom_up, 120), reference)
    many = MonteCarloKL_ELBO(4, num_particles=50, vectorize_particles=True, max_plate_nesting=0)
    agree(estimates(many, layers, bottom_up, 40), reference[:40])
    # fresh samples take noise away
    kls = [[], []]
    for kl, elbo in zip(kls, (MonteCarloKL_ELBO(1), MonteCarloKL_ELBO(16)), strict=True):
        for _ in range(60):
            elbo.loss(layers, bottom_up)
            kl.append(float(elbo.terms[1]))
    assert torch.tensor(kls[1]).var() < torch.tensor(kls[0]).var() / 6


def test_gradients_of_joint_samples():
    """The pathwise gradient of the joint Monte Carlo KL at smoothstep counts equals that of Trace_ELBO, on average."""
    shift = torch.zeros((), requires_grad=True)
    relaxation = ArrivalTimes(0.3, indicator="smoothstep")

    def guide():
        z = pyro.sample("z", RelaxedNegativeBinomial(6.0, logits=-0.5 + shift, relaxation=relaxation))
        pyro.sample("h", dist.Normal(0.4 * z - 1, 0.6))

    model = poutine.block(layers, hide=["x"])  # the KL alone

    def gradients(elbo):
        losses = (elbo.differentiable_loss(model, guide) for _ in range(300))
        return torch.tensor([torch.autograd.grad(loss, shift)[0] for loss in losses], dtype=torch.float64)

    ours, theirs = gradients(MonteCarloKL_ELBO(3)), gradients(Trace_ELBO())
    agree(ours, theirs)
    assert abs(float(ours.mean())) > 8 * float(ours.std()) / math.sqrt(300), "the case shows nothing"


# --- scale and mask --------------------------------------------------------------------------------------------------


def scaled(program, site, **options):
    """The program with poutine.scale or poutine.mask on one latent."""

    class Only(poutine.messenger.Messenger):
        def _pyro_sample(self, msg):
            if msg["name"] == site:
                if "scale" in options:
                    msg["scale"] = msg["scale"] * options["scale"]
                if "mask" in options:
                    msg["mask"] = options["mask"]

    return Only()(program)


@functools.cache
def plainly():
    pyro.set_rng_seed(1)
    return estimates(Trace_ELBO(), layers, top_down, 150)


@pytest.mark.parametrize(
    "options", [{"scale": 0.3}, {"scale": torch.tensor(4.0)}, {"mask": torch.tensor(False)}], ids=str
)
@pytest.mark.parametrize("where", ["model", "guide", "both"])
def test_scale_and_mask_of_one_latent(options, where):
    model = layers if where == "guide" else scaled(layers, "z", **options)
    guide = top_down if where == "model" else scaled(top_down, "z", **options)
    pyro.set_rng_seed(1)
    reference = estimates(Trace_ELBO(), model, guide, 150)
    for estimator in OURS:
        agree(estimates(estimator(), model, guide, 150), reference)
        if where == "both":
            check_divergence(estimator, model, guide, expected_kl(float(options.get("scale", 0.0))))
    if where != "both":  # on the same noise
        assert abs(float(reference.mean() - plainly().mean())) > 0.2, "the case shows nothing"


@pytest.mark.parametrize("estimator", OURS)
def test_masks_of_distributions(estimator):
    """.mask() of the model's distribution alone, of the guide's alone, and of both."""
    mask = torch.tensor([True, False, True])

    def program(masked):
        def model():
            prior = dist.Normal(torch.zeros(3), 1.0)
            with pyro.plate("data", 3):
                z = pyro.sample("z", prior.mask(mask) if masked else prior)
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(3))

        return model

    def guide_of(masked):
        def guide():
            q = dist.Normal(torch.full((3,), 0.5), 0.5)
            with pyro.plate("data", 3):
                pyro.sample("z", q.mask(mask) if masked else q)

        return guide

    for one, other in ((True, False), (False, True), (True, True)):
        pair = program(one), guide_of(other)
        agree(estimates(estimator(), *pair, 150), estimates(Trace_ELBO(), *pair, 350))


# --- an exact prior --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("estimator", OURS)
@pytest.mark.parametrize("prior", [NegativeBinomial, dist.NegativeBinomial])
def test_exact_counts_as_a_prior_of_relaxed_ones(prior, estimator, vectorize):
    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", prior(torch.tensor(2.0), logits=torch.tensor(0.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([1.0, 4.0]))

    r = torch.ones(2, requires_grad=True)

    def guide(relaxation):
        def program():
            with pyro.plate("data", 2):
                pyro.sample("z", RelaxedNegativeBinomial(r, logits=torch.tensor(0.3), relaxation=relaxation))

        return program

    elbo = estimator(num_particles=40, vectorize_particles=vectorize)
    loss = elbo.differentiable_loss(model, guide(ArrivalTimes(0.1)))
    assert loss.isfinite() and torch.autograd.grad(loss, r)[0].isfinite().all()
    many = estimator(num_particles=3000, vectorize_particles=True, max_plate_nesting=1)
    many.loss(model, guide(None))
    k = torch.arange(400.0)[:, None]
    q = RelaxedNegativeBinomial(r.detach(), logits=torch.tensor(0.3))
    p = dist.NegativeBinomial(2.0, logits=torch.zeros(2))
    ratio = q.log_prob(k) - p.log_prob(k)
    exact = (q.log_prob(k).exp() * ratio).sum(0)
    spread = (q.log_prob(k).exp() * (ratio - exact).square()).sum()
    assert abs(float(many.terms[1] - exact.sum())) < 5 * float(spread / 3000) ** 0.5 + 1e-4


# --- what only the guide has ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", OURS)
@pytest.mark.parametrize("kind", ["factor", "observed", "auxiliary"])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_sites_that_only_the_guide_has(estimator, kind):
    weight = torch.tensor(0.7, requires_grad=True)

    def guide():
        h = pyro.sample("h", dist.Normal(0.4, 0.8))
        pyro.sample("z", RelaxedNegativeBinomial(6.0, logits=-0.5 + 0.3 * h))
        if kind == "factor":
            pyro.factor("extra", weight * h, has_rsample=True)
        elif kind == "observed":
            pyro.sample("extra", dist.Normal(h, weight), obs=torch.tensor(3.0), infer={"is_auxiliary": True})
        else:
            pyro.sample("extra", dist.Normal(2 * h, weight), infer={"is_auxiliary": True})

    extra = {
        "factor": 0.7 * 0.4,
        "observed": -math.log(0.7) - 0.5 * math.log(2 * math.pi) - ((3 - 0.4) ** 2 + 0.64) / (2 * 0.49),
        "auxiliary": -0.5 * math.log(2 * math.pi * math.e * 0.49),
    }
    check_divergence(estimator, layers, guide, expected_kl() + extra[kind])


def test_the_terms_are_of_one_particle():
    one, many = AnalyticKL_ELBO(), AnalyticKL_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=0)
    terms = []
    for _ in range(400):
        one.loss(layers, top_down)
        terms.append(torch.stack(one.terms))
    many.loss(layers, top_down)
    terms = torch.stack(terms).double()
    error = terms.std(0) * math.sqrt(1 / 400 + 1 / 200)
    assert ((torch.stack(many.terms) - terms.mean(0)).abs() < 4 * error).all()


@pytest.mark.parametrize(
    "prior, q",
    [
        (dist.Exponential(1.0), dist.Normal(-1.0, 0.5)),
        (dist.Poisson(2.0), dist.Normal(-3.0, 0.1)),
        (dist.NegativeBinomial(torch.tensor(2.0), logits=torch.tensor(0.0)), dist.Normal(-3.0, 0.1)),
        (dist.Binomial(3, torch.tensor(0.5)), RelaxedPoisson(torch.tensor(50.0), relaxation=ArrivalTimes(0.1))),
        (dist.Exponential(1.0), dist.Delta(torch.tensor(-5.0))),
    ],
    ids=["Exponential", "Poisson", "NegativeBinomial", "Binomial", "Delta"],
)
def test_values_out_of_the_priors_support_are_refused(prior, q):
    with pytest.raises(ValueError, match="site 'z': "):
        MonteCarloKL_ELBO(3).loss(lambda: pyro.sample("z", prior), lambda: pyro.sample("z", q))


def test_a_transform_that_folds_has_no_analytic_kl():
    p, q = (dist.FoldedDistribution(dist.Normal(m, 1.0)) for m in (1.0, -1.0))
    with pytest.raises(NotImplementedError, match="there is no KL for FoldedDistribution"):
        AnalyticKL_ELBO().loss(lambda: pyro.sample("z", p), lambda: pyro.sample("z", q))
    assert abs(MonteCarloKL_ELBO().loss(lambda: pyro.sample("z", p), lambda: pyro.sample("z", q))) < 1e-6
    half = [dist.HalfNormal(torch.tensor(s)) for s in (1.0, 2.0)]
    exact = torch.distributions.kl_divergence(*half)
    assert AnalyticKL_ELBO().loss(lambda: pyro.sample("z", half[1]), lambda: pyro.sample("z", half[0])) == float(exact)


def test_a_family_with_a_log_mass_of_its_own_is_asked_for_it():
    class Lighter(RelaxedNegativeBinomial):
        def log_prob(self, value):
            return super().log_prob(value) - 3

    plain, lighter = (
        family(torch.tensor(2.0), logits=torch.tensor(0.5)) for family in (RelaxedNegativeBinomial, Lighter)
    )
    for q, p, kl in ((lighter, plain, -3.0), (plain, lighter, 3.0)):
        loss = MonteCarloKL_ELBO(3).loss(lambda p=p: pyro.sample("z", p), lambda q=q: pyro.sample("z", q))
        assert loss == pytest.approx(kl, abs=1e-4)


def test_an_exact_kl_is_not_that_of_a_class_above():
    """A subclass with a log mass of its own has the KL that is registered for it, or none."""

    class Lightest(RelaxedNegativeBinomial):
        def log_prob(self, value):
            return super().log_prob(value) - 3

    class Named(RelaxedNegativeBinomial):
        pass

    own, named, plain = (
        family(torch.tensor(2.0), logits=torch.tensor(0.5)) for family in (Lightest, Named, RelaxedNegativeBinomial)
    )
    for q, p in ((own, plain), (plain, own)):
        with pytest.raises(NotImplementedError, match=r"there is no KL for .*Lightest"):
            AnalyticKL_ELBO().loss(lambda p=p: pyro.sample("z", p), lambda q=q: pyro.sample("z", q))
    assert AnalyticKL_ELBO().loss(lambda: pyro.sample("z", plain), lambda: pyro.sample("z", named)) == 0
    torch.distributions.register_kl(Lightest, RelaxedNegativeBinomial)(lambda q, p: torch.tensor(7.0))
    assert AnalyticKL_ELBO().loss(lambda: pyro.sample("z", plain), lambda: pyro.sample("z", own)) == 7

    class Below(Lightest):
        def log_prob(self, value):
            return super().log_prob(value) + 1

    below = Below(torch.tensor(2.0), logits=torch.tensor(0.5))
    for q, p in ((plain, own), (own, own), (below, plain)):  # not the pair that was registered
        with pytest.raises(NotImplementedError, match="there is no KL for"):
            AnalyticKL_ELBO().loss(lambda p=p: pyro.sample("z", p), lambda q=q: pyro.sample("z", q))


def test_a_zero_inflated_prior_is_of_integers():
    """Its mass jumps at 0, where relaxed counts seldom are; integers give the KL of direct summation."""
    prior = dist.ZeroInflatedNegativeBinomial(torch.tensor(2.0), logits=torch.tensor(0.0), gate=torch.tensor(0.5))
    k = torch.arange(60.0)
    poisson = RelaxedPoisson(torch.tensor(1.5))
    exact = (poisson.log_prob(k).exp() * (poisson.log_prob(k) - prior.log_prob(k))).sum()
    relaxed = RelaxedPoisson(torch.tensor(1.5), relaxation=ArrivalTimes(0.1))
    with pytest.raises(NotImplementedError, match="'z': ZeroInflatedNegativeBinomial jumps at 0"):
        MonteCarloKL_ELBO().loss(lambda: pyro.sample("z", prior), lambda: pyro.sample("z", relaxed))
    integers = RelaxedPoisson(torch.tensor(1.5), relaxation=Integer())
    found = estimates(MonteCarloKL_ELBO(200), lambda: pyro.sample("z", prior), lambda: pyro.sample("z", integers), 100)
    assert abs(float(found.mean() - exact)) < 4 * float(found.std()) / 10


def test_a_guides_site_that_is_not_in_the_models_plate_is_named():
    """Without validation too, as in training by the command line: one draw would count for four."""

    def model():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    for validate in (True, False):
        with pyro.validation_enabled(validate), pytest.raises(ValueError, match=r"batch shape \(\) .* has \(4,\)"):
            AnalyticKL_ELBO().loss(model, lambda: pyro.sample("z", dist.Normal(1.0, 1.0)))

    def sideways():
        with pyro.plate("data", 4, dim=-2):
            pyro.sample("z", dist.Normal(1.0, 1.0))

    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"batch shape \(4, 1\) .* has \(4,\)"):
        AnalyticKL_ELBO().loss(model, sideways)


def test_a_flow_without_an_inverse():
    """On the same noise: the density is known at the sample that was drawn, and only there."""
    planar = dist.transforms.planar(3)
    for parameter in planar.parameters():
        torch.nn.init.constant_(parameter, 1.5)
    flow = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [planar])

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(3), 2.0).to_event(1))

    def guide():
        pyro.sample("z", flow)

    ours, theirs = [], []
    for losses, elbo in ((ours, MonteCarloKL_ELBO(1)), (theirs, Trace_ELBO())):
        for seed in range(20):
            pyro.set_rng_seed(seed)
            losses.append(elbo.loss(model, guide))
    assert ours == pytest.approx(theirs, rel=1e-5) and max(map(abs, ours)) > 1
    agree(estimates(MonteCarloKL_ELBO(3), model, guide, 500), estimates(Trace_ELBO(), model, guide, 500))


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_site_that_the_guide_lacks_is_named():
    def guide():
        pyro.sample("h", dist.Normal(0.0, 1.0))

    for estimator in OURS:
        with pytest.raises(
            ValueError, match=r"site 'z' is sampled by the model \(RelaxedNegativeBinomial\) and missing"
        ):
            estimator().loss(layers, guide)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_the_wrong_event_dimension_is_named():
    def model():
        pyro.sample("z", NegativeBinomial(torch.ones(3), logits=0.0).to_event(1))

    def guide():
        pyro.sample("z", RelaxedNegativeBinomial(torch.ones(3), logits=0.0))

    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match=r"event shape \(\) and .* has \(3,\)"),
    ):
        AnalyticKL_ELBO().loss(model, guide)


def test_the_true_classes_are_named():
    class Mine(dist.Gamma):
        pass

    def model():
        pyro.sample("z", Mine(torch.ones(2), 1.0).mask(torch.tensor([True, False])).to_event(1))

    def other():
        pyro.sample("z", Mine(torch.ones(2), 1.0).to_event(1))

    def guide():
        pyro.sample("z", RelaxedNegativeBinomial(torch.ones(2), logits=0.0).to_event(1))

    with pytest.raises(NotImplementedError, match="site 'z': its mask lies inside"):
        AnalyticKL_ELBO().loss(model, guide)
    with pytest.raises(NotImplementedError, match=r"RelaxedNegativeBinomial \(guide\) and Mine \(model\)"):
        AnalyticKL_ELBO().loss(other, guide)


def test_a_site_to_be_enumerated_is_refused_with_the_remedy():
    def model():
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(k.float(), 1.0), obs=torch.tensor(0.3))

    half = torch.tensor([0.5, 0.5], requires_grad=True)

    def guide():
        pyro.sample("k", dist.Categorical(half), infer={"enumerate": "parallel"})

    with pytest.raises(ValueError, match="TraceEnum_ELBO"):
        AnalyticKL_ELBO().loss(model, lambda: None)
    with pytest.raises(NotImplementedError, match="TraceEnum_ELBO"):
        AnalyticKL_ELBO().differentiable_loss(model, guide)
