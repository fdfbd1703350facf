"""Joint distributions against enumeration and against the textbook formulas of mixtures and autoregressive products."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Size
from torch.distributions import kl_divergence

from pyro_nbvae.distributions import (
    ConwayMaxwellPoisson,
    Integer,
    MixtureOfNegativeBinomials,
    NegativeBinomial,
    RelaxedNegativeBinomial,
    RelaxedPoisson,
    TiltedMixture,
)
from pyro_nbvae.infer import AnalyticKL_ELBO, MonteCarloKL_ELBO
from pyro_nbvae.infer.elbo import kl_at
from pyro_nbvae.priors import Autoregressive, Mixture, clusters

R, LOGITS = torch.tensor([2.0, 5.0]), torch.tensor([-0.5, -1.0])
REFERENCES = {
    "negative binomial": RelaxedNegativeBinomial(R, logits=LOGITS),
    "Poisson": RelaxedPoisson(R * LOGITS.exp()),
    "normal": dist.Normal(torch.tensor([0.2, -0.5]), torch.tensor([0.7, 1.5])),
}
PRIORS = {
    "mixture": lambda: Mixture(3),
    "autoregressive": lambda: Autoregressive(2, width=8),
    "both": lambda: Mixture(3, of=Autoregressive(2, width=8)),
}


def tilted(prior, reference, spread=0.4):
    """A joint distribution with parameters at random."""
    torch.manual_seed(3)
    module = PRIORS[prior]()
    module.setup(reference)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    return module


def points(reference):
    """A grid of latents and the weight of each point."""
    if isinstance(reference, dist.Normal):
        axis = torch.linspace(-25, 25, 401, dtype=torch.float64)
        return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2
    return torch.cartesian_prod(*[torch.arange(120.0, dtype=torch.float64)] * 2), 1.0


def textbook(d, z):
    """log p(z) by the definition: a sum over components of products over units, each given those before."""
    if not isinstance(d, TiltedMixture):
        return d.conditional(z).log_prob(z).sum(-1)
    given = d.reference if d.inner is None else d.inner.conditional(z)
    parts = []
    for c in range(len(d.component_logits)):
        shift = [part[c] for part in d.shift]
        if isinstance(given, NegativeBinomial):
            component = torch.distributions.NegativeBinomial(
                given.total_count, logits=given.logits + shift[0], validate_args=False
            )
        elif isinstance(given, RelaxedPoisson):
            component = torch.distributions.Poisson(given.rate * shift[0].exp(), validate_args=False)
        else:
            component = dist.Normal(given.loc + given.scale * shift[0], given.scale * shift[1].exp())
        parts.append(component.log_prob(z).sum(-1) + d.component_logits.log_softmax(0)[c])
    return torch.stack(parts).logsumexp(0)


@pytest.mark.parametrize("family", REFERENCES)
@pytest.mark.parametrize("prior", PRIORS)
@torch.no_grad()
def test_masses_and_samples(prior, family):
    """The masses are those of the textbook and sum to 1; samples have their means and second moments."""
    reference = REFERENCES[family]
    d = tilted(prior, reference)(reference)
    grid, weight = points(reference)
    log_p = d.log_prob(grid)
    torch.testing.assert_close(log_p, textbook(d, grid), rtol=1e-4, atol=1e-3, check_dtype=False)
    mass = (log_p.double().exp() * weight)[:, None]
    assert abs(float(mass.sum()) - 1) < 1e-4
    z = d.sample(Size([100_000])).double()
    for statistic in (lambda z: z, lambda z: z.square(), lambda z: z[:, :1] * z[:, 1:], torch.sigmoid):
        exact, drawn = (mass * statistic(grid)).sum(0), statistic(z)
        assert ((drawn.mean(0) - exact).abs() < 4.5 * drawn.std(0) / math.sqrt(len(z)) + 1e-4).all()


@pytest.mark.parametrize("family", REFERENCES)
@pytest.mark.parametrize("prior", PRIORS)
def test_what_pyro_expects(prior, family):
    reference = REFERENCES[family]
    d = tilted(prior, reference)(reference)
    assert d.event_shape == (2,) and d.batch_shape == () and not d.has_rsample and d.support.event_dim == 1
    wide = d.expand(Size([4, 3]))
    z = wide.sample(Size([5]))
    assert z.shape == (5, 4, 3, 2) and wide.log_prob(z).shape == (5, 4, 3) and wide.log_prob(z[0, 0, 0]).shape == (4, 3)
    torch.testing.assert_close(wide.log_prob(z), d.log_prob(z))
    for other in ((4, 2), (3,), ()):
        with pytest.raises(RuntimeError):
            wide.expand(Size(other))
    assert d.support.is_discrete == (family != "normal")
    with pytest.raises(NotImplementedError):
        d.rsample()
    with pytest.raises(NotImplementedError):  # so that TraceMeanField_ELBO samples
        kl_divergence(reference.to_event(1), d)
    d._validate_args = True
    with pytest.raises(ValueError, match="support"):
        d.log_prob(torch.tensor([-1.0, 2.0]) if family != "normal" else torch.tensor([math.nan, 2.0]))


@pytest.mark.parametrize("family", REFERENCES)
def test_a_unit_depends_on_earlier_groups_alone(family):
    reference = {
        "negative binomial": RelaxedNegativeBinomial(torch.ones(7), logits=torch.zeros(7)),
        "Poisson": RelaxedPoisson(torch.ones(7)),
        "normal": dist.Normal(torch.zeros(7), torch.ones(7)),
    }[family]
    prior = Autoregressive(3, width=16)
    prior.setup(reference)
    d = prior(reference)
    z = torch.rand(7)
    torch.testing.assert_close(d.log_prob(z), reference.log_prob(z).sum())  # it begins at the reference
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter)
    depends = torch.autograd.functional.jacobian(lambda z: d.conditional(z).mean, z) != 0
    earlier = prior.group[None] < prior.group[:, None]
    assert torch.equal(depends, earlier)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_own_parameters_of_each_observation_give_the_same_tilt(shape):
    torch.manual_seed(0)
    r, logits, shift, weights = torch.rand(6) * 3, torch.randn(6), torch.randn(5, 6), torch.randn(5)
    z = torch.poisson(3 * torch.ones(*shape, 6))
    shared = TiltedMixture(RelaxedNegativeBinomial(r, logits=logits), (shift,), weights)
    own = RelaxedNegativeBinomial(r, logits=logits).expand(Size([*shape, 6]))
    own = RelaxedNegativeBinomial(own.total_count.clone(), logits=own.logits.clone())
    torch.testing.assert_close(TiltedMixture(own, (shift,), weights).log_prob(z), shared.log_prob(z))


@pytest.mark.parametrize("shared", [True, False])
def test_derivatives_of_the_tilt(shared):
    """First and second derivatives in all arguments, against finite differences."""
    torch.manual_seed(0)
    rows = () if shared else (3,)
    r, logits = torch.rand(*rows, 4) + 0.5, 2 * torch.randn(*rows, 4)
    z, shift, weights = torch.rand(3, 4) * 5, torch.randn(5, 4), torch.randn(5)
    arguments = [each.double().requires_grad_() for each in (r, logits, z, shift, weights)]

    def tilt(r, logits, z, shift, weights):
        reference = RelaxedNegativeBinomial(r, logits=logits, validate_args=False)
        return TiltedMixture(reference, (shift,), weights).factors(z)[1]

    assert torch.autograd.gradcheck(tilt, arguments) and torch.autograd.gradgradcheck(tilt, arguments)


def test_a_mixture_of_negative_binomials_is_one():
    torch.manual_seed(0)
    r, logits, weights = torch.rand(3) * 4, torch.randn(4, 3), torch.randn(4)
    d = MixtureOfNegativeBinomials(r, logits, weights)
    theirs = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=weights),
        torch.distributions.Independent(torch.distributions.NegativeBinomial(r.expand(4, 3), logits=logits), 1),
    )
    z = d.sample(Size([200]))
    assert torch.equal(z, z.round())
    torch.testing.assert_close(d.log_prob(z), theirs.log_prob(z), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(d.mean, theirs.mean)
    torch.testing.assert_close(d.variance, theirs.variance)
    torch.testing.assert_close(d.reference.mean, d.mean)
    shares = d.responsibilities(z)
    torch.testing.assert_close(shares.sum(-1), torch.ones(200))
    with pytest.raises(ValueError, match="component_logits"):
        MixtureOfNegativeBinomials(r, logits, weights[:2])
    with pytest.raises(ValueError, match=r"logits are up to 39.*30 is the most"):
        MixtureOfNegativeBinomials(torch.ones(2), torch.tensor([[0.0, -40.0], [-40.0, 0.0]]), torch.zeros(2))
    alone = MixtureOfNegativeBinomials(torch.ones(2), torch.tensor([[0.0, 0], [40, 40]]), torch.tensor([0, -math.inf]))
    torch.testing.assert_close(alone.mean, torch.ones(2))  # a component of weight 0 may be anywhere
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(d.mean, MixtureOfNegativeBinomials(r, logits, weights).mean)
        torch.testing.assert_close(d.mean, theirs.mean)
        torch.testing.assert_close(d.variance, theirs.variance)


POSTERIORS = {
    "COM-Poisson": lambda mean: ConwayMaxwellPoisson(mean, torch.full_like(mean, 1.4), relaxation=Integer()),
    "negative binomial": lambda mean: RelaxedNegativeBinomial(
        torch.full_like(mean, 5.0), logits=(mean / 5).log(), relaxation=Integer()
    ),
}


@pytest.mark.parametrize(("mean", "bias"), [(2.0, 0.02), (20.0, 0.006)])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_kl_and_its_gradient(prior, posterior, mean, bias):
    """By enumeration: unbiased in value; the gradient through integers has a small bias, less for large counts."""
    reference = RelaxedNegativeBinomial(torch.tensor([0.8, 1.2]) * mean, logits=torch.zeros(2))
    module = tilted(prior, reference)
    means = torch.tensor([1.3 * mean, 0.8 * mean], dtype=torch.float64, requires_grad=True)
    grid = torch.cartesian_prod(*[torch.arange(16 * mean**0.75, dtype=torch.float64)] * 2)
    p = module(reference)
    log_q = POSTERIORS[posterior](means).log_prob(grid).sum(-1)
    assert float(log_q.detach().exp().sum()) == pytest.approx(1, abs=1e-6)
    exact = (log_q.exp() * (log_q - p.log_prob(grid))).sum()
    (slope,) = torch.autograd.grad(exact, means)
    number = 40_000
    torch.manual_seed(1)
    many = means.detach().expand(number, 2).clone().requires_grad_()
    q = POSTERIORS[posterior](many)
    kls = kl_at(q.to_event(1), p, q.rsample())
    assert kls.shape == (number,)
    assert abs(float((kls.mean() - exact).detach())) < 4 * float(kls.detach().std()) / math.sqrt(number)
    (slopes,) = torch.autograd.grad(kls.sum(), many)
    error = slopes.std(0) / math.sqrt(number)
    assert ((slopes.mean(0) - slope).abs() < 4 * error + bias * slope.abs().max()).all()


def test_estimators_agree():
    """Pyro's estimators and ours have one expectation, TraceMeanField_ELBO by sampling the KL."""
    reference = REFERENCES["negative binomial"]
    p = tilted("both", reference)(reference)
    q = RelaxedNegativeBinomial(R + 1, logits=LOGITS + 0.3, relaxation=Integer())

    def model():
        with pyro.plate("batch", 3):
            pyro.sample("z", p)

    def guide():
        with pyro.plate("batch", 3):
            pyro.sample("z", q.to_event(1))

    grid, _ = points(reference)
    log_q = q.log_prob(grid).sum(-1)
    with torch.no_grad():
        exact = 3 * float((log_q.exp() * (log_q - p.log_prob(grid))).sum())
    torch.manual_seed(0)
    for elbo in (AnalyticKL_ELBO(), MonteCarloKL_ELBO(2), Trace_ELBO(), TraceMeanField_ELBO()):
        losses = torch.tensor([elbo.loss(model, guide) for _ in range(150)], dtype=torch.float64)
        assert abs(float(losses.mean()) - exact) < 4 * float(losses.std()) / math.sqrt(150), type(elbo).__name__


@pytest.mark.parametrize("family", REFERENCES)
def test_clusters_of_samples_become_components(family):
    """Two well separated groups: k-means finds their means and shares."""
    torch.manual_seed(0)
    reference = {
        "negative binomial": RelaxedNegativeBinomial(torch.full((2,), 20.0), logits=torch.zeros(2)),
        "Poisson": RelaxedPoisson(torch.full((2,), 20.0)),
        "normal": dist.Normal(torch.full((2,), 20.0), torch.ones(2)),
    }[family]
    means = torch.tensor([[5.0, 60.0], [60.0, 5.0]])
    which = (torch.arange(4000) % 4 == 0).long()
    z = torch.poisson(means[which])
    shift, weights = clusters(reference, z, 2)
    parts = TiltedMixture(reference, shift, weights.log()).components
    order = parts.mean[:, 0].argsort()
    torch.testing.assert_close(parts.mean[order], means, rtol=0.05, atol=0.0)
    torch.testing.assert_close(weights[order], torch.tensor([0.75, 0.25]), atol=0.02, rtol=0.0)
