"""What every distribution of ours owes Pyro and torch; one table of cases that each property runs over."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_nbvae.distributions import NegativeBinomial, RelaxedNegativeBinomial, RelaxedPoisson

R, LOGITS = torch.tensor([[0.5], [3.0]]), torch.tensor([0.0, 1.0, -0.7])  # broadcast to (2, 3)

CASES = {
    "exact": lambda: NegativeBinomial(R, logits=LOGITS),
    "exact probs": lambda: NegativeBinomial(R, torch.sigmoid(LOGITS)),
    "temperature 0": lambda: RelaxedNegativeBinomial(R, LOGITS, temperature=0.0),
    "arrival": lambda: RelaxedNegativeBinomial(R, LOGITS, temperature=0.1),
    "smoothstep": lambda: RelaxedNegativeBinomial(R, LOGITS, temperature=0.1, indicator="smoothstep"),
    "gumbel": lambda: RelaxedNegativeBinomial(R, probs=torch.sigmoid(LOGITS), temperature=0.1, relaxation="gumbel"),
    "temperatures": lambda: RelaxedNegativeBinomial(1.5, LOGITS, temperature=torch.tensor([[0.1], [0.2]])),
    "gumbel temperatures": lambda: RelaxedPoisson(
        torch.ones(3), temperature=torch.tensor([[0.1], [0.2]]), relaxation="gumbel"
    ),
    "poisson": lambda: RelaxedPoisson(R * LOGITS.exp(), temperature=torch.tensor(0.1)),
    "poisson straight": lambda: RelaxedPoisson(R * LOGITS.exp(), temperature=0.1, straight_through=True),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def distribution(request):
    return request.param()


def test_shapes(distribution):
    assert distribution.batch_shape == (2, 3) and distribution.event_shape == ()
    assert distribution.sample().shape == (2, 3)
    assert distribution.sample(torch.Size([5, 4])).shape == (5, 4, 2, 3)
    assert distribution.log_prob(torch.ones(7, 1, 3)).shape == (7, 2, 3)
    assert distribution.mean.shape == distribution.variance.shape == (2, 3)
    if distribution.has_rsample:
        assert distribution.rsample(torch.Size([5])).shape == (5, 2, 3)
        assert distribution(torch.Size([5])).shape == (5, 2, 3)


def test_expand_keeps_the_law_and_the_class(distribution):
    expanded = distribution.expand(torch.Size([4, 2, 3]))
    assert type(expanded) is type(distribution) and expanded.batch_shape == (4, 2, 3)
    assert expanded.has_rsample == distribution.has_rsample
    z = torch.arange(6.0).reshape(2, 3)
    torch.testing.assert_close(expanded.log_prob(z), distribution.log_prob(z).expand(4, 2, 3))
    torch.testing.assert_close(expanded.mean, distribution.mean.expand(4, 2, 3))
    torch.testing.assert_close(expanded.variance, distribution.variance.expand(4, 2, 3))
    torch.manual_seed(0)
    assert expanded.sample().shape == (4, 2, 3)


def test_to_event_and_mask(distribution):
    event = distribution.to_event(1)
    assert event.batch_shape == (2,) and event.event_shape == (3,)
    z = torch.ones(2, 3)
    torch.testing.assert_close(event.log_prob(z), distribution.log_prob(z).sum(-1))
    assert event.has_rsample == distribution.has_rsample
    masked = distribution.mask(torch.tensor([True, False, True]))
    assert (masked.log_prob(z)[:, 1] == 0).all()


def test_mean_and_variance_are_those_of_the_samples(distribution):
    """At temperatures up to 0.2: 5 standard errors, 2 % for the mean and a quarter for the variance of what is left."""
    z = distribution.sample(torch.Size([40_000])).double()
    error = z.std(0) / 200
    assert ((z.mean(0) - distribution.mean).abs() < 5 * error + 0.02 * distribution.mean).all()
    squared = (z - distribution.mean) ** 2
    error = squared.std(0) / 200
    assert ((squared.mean(0) - distribution.variance).abs() < 5 * error + 0.25 * distribution.variance).all()


def test_under_plates_and_trace(distribution):
    def program():
        with pyro.plate("images", 4, dim=-2):
            return pyro.sample("z", distribution.to_event(2))

    def batched():
        with pyro.plate("outer", 5, dim=-3), pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            return pyro.sample("z", distribution)

    trace = poutine.trace(batched).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["z"]
    assert site["value"].shape == site["log_prob"].shape == (5, 2, 3)
    again = poutine.trace(poutine.replay(batched, trace=trace)).get_trace()
    assert again.nodes["z"]["value"] is site["value"]
    trace = poutine.trace(program).get_trace()
    assert trace.nodes["z"]["value"].shape == (4, 1, 2, 3)


def test_gradients_reach_the_parameters(distribution):
    if not distribution.has_rsample:
        with pytest.raises(NotImplementedError):
            distribution.rsample()
        return
    r, logits = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    RelaxedNegativeBinomial(r, logits, temperature=0.4).rsample(torch.Size([200])).sum().backward()
    assert (r.grad != 0).all() and (logits.grad != 0).all()


def test_moments_are_the_documented_ones():
    nb = NegativeBinomial(2.0, logits=math.log(3.0))
    assert nb.mean == pytest.approx(6.0) and nb.variance == pytest.approx(6.0 * 4.0)
    assert nb.variance == pytest.approx(float(nb.mean + nb.mean**2 / 2))
    same = NegativeBinomial(2.0, 0.75)
    torch.testing.assert_close(same.logits, nb.logits)
    theirs = dist.NegativeBinomial(2.0, probs=0.75)
    torch.testing.assert_close((same.mean, same.variance), (theirs.mean, theirs.variance))
    torch.testing.assert_close(same.log_prob(torch.tensor(4.0)), theirs.log_prob(torch.tensor(4.0)))


def test_a_tensor_temperature_is_one_temperature_per_latent():
    """Variance of a relaxed Poisson count falls with its temperature; each latent has its own."""
    d = RelaxedPoisson(torch.tensor(2.0), temperature=torch.tensor([0.01, 1.0]))
    assert d.batch_shape == (2,)
    cold, hot = d.sample(torch.Size([50_000])).var(0).tolist()
    assert cold == pytest.approx(2.0, rel=0.05) and hot == pytest.approx(2 * 0.583, rel=0.05)


@pytest.mark.parametrize(
    "make, argument, value",
    [
        (lambda: NegativeBinomial(torch.tensor([1.0, -2.0]), logits=0.0), "total_count", "-2"),
        (lambda: NegativeBinomial(1.0, probs=1.5), "probs", "1.5"),
        (lambda: RelaxedNegativeBinomial(1.0, float("nan"), temperature=0.1), "logits", "nan"),
        (lambda: RelaxedNegativeBinomial(1.0, 0.0, temperature=-0.5), "temperature", "-0.5"),
        (lambda: RelaxedNegativeBinomial(1.0, 0.0, temperature=torch.tensor([0.0, 1.0])), "temperature", "0., 1."),
        (lambda: RelaxedNegativeBinomial(1.0, 0.0, temperature=0.5, relaxation="poisson"), "relaxation", "poisson"),
        (lambda: RelaxedNegativeBinomial(1.0, 0.0, temperature=0.5, indicator="step"), "indicator", "step"),
        (lambda: RelaxedNegativeBinomial(1.0, 0.0, temperature=0.5, max_count=0), "max_count", "0"),
        (lambda: RelaxedPoisson(torch.tensor([1.0, 0.0]), temperature=0.1), "rate", "0"),
        (lambda: RelaxedPoisson(-3.0, temperature=0.1), "rate", "-3"),
        (lambda: NegativeBinomial(1.0), "logits and probs", ""),
        (lambda: NegativeBinomial(1.0, logits=0.0, probs=0.5), "logits and probs", ""),
        (lambda: NegativeBinomial(1.0, logits=0.0).log_prob(torch.tensor(1.5)), "value", "1.5"),
        (lambda: RelaxedNegativeBinomial(1.0, 0.0, temperature=0.1).log_prob(torch.tensor(-1.0)), "value", "-1"),
    ],
)
def test_bad_arguments_are_named_with_their_value(make, argument, value):
    with pytest.raises(ValueError) as error:
        make()
    assert argument in str(error.value) and value in str(error.value)


def test_relaxed_counts_are_in_the_support():
    d = RelaxedNegativeBinomial(1.0, 0.0, temperature=0.5)
    assert d.support.check(d.sample(torch.Size([100]))).all()
    assert d.log_prob(torch.tensor(1.5)).isfinite()
