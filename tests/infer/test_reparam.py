"""Programs over exact counts, relaxed from outside."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch.distributions import constraints

from pyro_nbvae.distributions import (
    ArrivalTimes,
    GumbelSoftmax,
    NegativeBinomial,
    RelaxedNegativeBinomial,
    RelaxedPoisson,
)
from pyro_nbvae.infer import AnalyticKL_ELBO, MonteCarloKL_ELBO, RelaxReparam

X = torch.tensor([3.0, 14.0, 35.0])
# far more than x, so that the optimiser cannot gain by moving mass out of the sum
COUNTS = torch.arange(5000.0)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", NegativeBinomial(torch.tensor(1.5), logits=torch.tensor(2.0)))
        pyro.sample("x", dist.Normal(z, 8.0), obs=x)


def guide(x):
    r = pyro.param("r", torch.ones(len(x)), constraint=constraints.positive)
    logits = pyro.param("logits", torch.zeros(len(x)))
    with pyro.plate("data", len(x)):
        pyro.sample("z", NegativeBinomial(r, logits=logits))


def summed_elbo(r, logits):
    """The exact ELBO of the count model, by summing over the counts."""
    q = NegativeBinomial(r, logits=logits).log_prob(COUNTS[:, None])
    p = NegativeBinomial(torch.tensor(1.5), logits=torch.tensor(2.0)).log_prob(COUNTS[:, None])
    return (q.exp() * (dist.Normal(COUNTS[:, None], 8.0).log_prob(X) + p - q)).sum()


@pytest.mark.parametrize(
    "elbo, relaxation",
    [
        (AnalyticKL_ELBO(num_particles=10, vectorize_particles=True), ArrivalTimes(0.05)),
        (MonteCarloKL_ELBO(5, num_particles=4, vectorize_particles=True), ArrivalTimes(0.05, indicator="smoothstep")),
        (AnalyticKL_ELBO(num_particles=10, vectorize_particles=True), GumbelSoftmax(0.3)),
        (Trace_ELBO(num_particles=10, vectorize_particles=True), ArrivalTimes(0.05)),
    ],
    ids=["analytic", "monte carlo", "gumbel", "Pyro's"],
)
def test_a_program_of_exact_counts_is_fitted(elbo, relaxation):
    """It gains all but 0.3 nats of what its guide can gain (more than 10), the best being found by summation."""
    r, logits = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([r, logits], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -summed_elbo(r.exp(), logits)
        loss.backward()
        return loss

    optimizer.step(closure)
    best = float(summed_elbo(r.exp(), logits).detach())
    start = float(summed_elbo(torch.ones(3), torch.zeros(3)))

    relax = RelaxReparam(relaxation)
    programs = [poutine.reparam(program, config={"z": relax}) for program in (model, guide)]
    svi = SVI(*programs, ClippedAdam({"lr": 0.1, "lrd": 0.99}), loss=elbo)
    for _ in range(400):
        svi.step(X)
    with torch.no_grad():
        reached = float(summed_elbo(pyro.param("r"), pyro.param("logits")))
    assert start < best - 10
    assert best - 0.3 < reached <= best + 1e-3


def test_without_it_the_program_is_exact():
    with pytest.raises(NotImplementedError, match="no rsample"):
        AnalyticKL_ELBO().differentiable_loss(model, guide, X)
    trace = poutine.trace(guide).get_trace(X)
    assert torch.equal(trace.nodes["z"]["value"], trace.nodes["z"]["value"].round())


@pytest.mark.parametrize(
    "site, relaxed",
    [
        (dist.NegativeBinomial(torch.tensor([2.0, 3.0]), probs=torch.tensor(0.3)), RelaxedNegativeBinomial),
        (NegativeBinomial(torch.tensor([2.0, 3.0]), probs=torch.tensor(0.3)), RelaxedNegativeBinomial),
        (
            torch.distributions.NegativeBinomial(torch.tensor([2.0, 3.0]), logits=torch.tensor(0.1)),
            RelaxedNegativeBinomial,
        ),
        (dist.Poisson(torch.tensor([2.0, 3.0])), RelaxedPoisson),
        (dist.Poisson(torch.tensor([2.0, 3.0])).to_event(1), RelaxedPoisson),
    ],
    ids=lambda value: f"{type(value).__module__}.{type(value).__name__}" if not isinstance(value, type) else "",
)
def test_whose_classes_it_takes(site, relaxed):
    relax = RelaxReparam(ArrivalTimes(0.2, straight_through=True))
    message = relax.apply({"name": "z", "fn": site, "value": None, "is_observed": False})
    fn = message["fn"]
    assert fn.batch_shape == site.batch_shape and fn.event_shape == site.event_shape
    base = getattr(fn, "base_dist", fn)
    assert isinstance(base, relaxed) and base.relaxation is relax.relaxation
    torch.testing.assert_close(fn.mean, site.mean)
    torch.testing.assert_close(fn.variance, site.variance)


def test_observed_sites_stay_and_others_are_refused():
    relax = RelaxReparam(ArrivalTimes(0.2))
    seen = dist.Poisson(torch.tensor(3.0))
    kept = relax.apply({"name": "x", "fn": seen, "value": torch.tensor(2.0), "is_observed": True})
    assert kept["fn"] is seen and kept["is_observed"]
    with pytest.raises(TypeError, match="site 'z': RelaxReparam relaxes NegativeBinomial and Poisson, not Normal"):
        relax.apply({"name": "z", "fn": dist.Normal(0.0, 1.0), "value": None, "is_observed": False})


def test_subclasses_may_have_another_law_and_are_refused():
    class Shifted(dist.Poisson):
        pass

    with pytest.raises(TypeError, match="not Shifted"):
        RelaxReparam(ArrivalTimes(0.2)).apply(
            {"name": "z", "fn": Shifted(torch.tensor(3.0)), "value": None, "is_observed": False}
        )
    with pytest.raises(TypeError, match="relaxation must be a Relaxation"):
        RelaxReparam(0.2)
