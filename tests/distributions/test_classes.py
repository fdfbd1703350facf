"""What every distribution of ours owes Pyro and torch; one table of cases that each property runs over."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_nbvae.distributions import (
    ArrivalTimes,
    GumbelSoftmax,
    NegativeBinomial,
    RelaxedNegativeBinomial,
    RelaxedOneHotCategorical,
    RelaxedPoisson,
)
from pyro_nbvae.distributions.elementwise import promote

R, LOGITS = torch.tensor([[0.5], [3.0]]), torch.tensor([0.0, 1.0, -0.7])  # broadcast to (2, 3)

CASES = {
    "exact": lambda: NegativeBinomial(R, logits=LOGITS),
    "exact probs": lambda: NegativeBinomial(R, torch.sigmoid(LOGITS)),
    "no relaxation": lambda: RelaxedNegativeBinomial(R, logits=LOGITS),
    "arrival": lambda: RelaxedNegativeBinomial(R, logits=LOGITS, relaxation=ArrivalTimes(0.1)),
    "smoothstep": lambda: RelaxedNegativeBinomial(
        R, logits=LOGITS, relaxation=ArrivalTimes(0.1, indicator="smoothstep")
    ),
    "gumbel": lambda: RelaxedNegativeBinomial(R, probs=torch.sigmoid(LOGITS), relaxation=GumbelSoftmax(0.1)),
    "temperatures": lambda: RelaxedNegativeBinomial(
        1.5, logits=LOGITS, relaxation=ArrivalTimes(torch.tensor([[0.1], [0.2]]))
    ),
    "gumbel temperatures": lambda: RelaxedPoisson(
        torch.ones(3), relaxation=GumbelSoftmax(torch.tensor([[0.1], [0.2]]))
    ),
    "poisson": lambda: RelaxedPoisson(R * LOGITS.exp(), relaxation=ArrivalTimes(torch.tensor(0.1))),
    "poisson straight": lambda: RelaxedPoisson(R * LOGITS.exp(), relaxation=ArrivalTimes(0.1, straight_through=True)),
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
    """Of what the distribution was made with, through a clone of it whose parameters ask for a gradient."""
    if not distribution.has_rsample:
        with pytest.raises(NotImplementedError, match="rsample"):
            distribution.rsample()
        return
    kind = type(distribution)
    names = ["rate"] if kind is RelaxedPoisson else ["total_count", "logits"]
    parameters = {name: getattr(distribution, name).detach().clone().requires_grad_() for name in names}
    z = kind(**parameters, relaxation=distribution.relaxation).rsample(torch.Size([300]))
    for gradient in torch.autograd.grad(z.sum(), list(parameters.values())):
        assert (gradient != 0).all() and gradient.isfinite().all()


def test_a_second_derivative_of_a_sample_is_refused_not_zero(distribution):
    """In the parameters; what comes after the sample may be differentiated as often as one likes."""
    if not distribution.has_rsample:
        return
    kind = type(distribution)
    names = ["rate"] if kind is RelaxedPoisson else ["total_count", "logits"]
    parameters = [getattr(distribution, name).detach().clone().requires_grad_() for name in names]
    weight = torch.tensor(3.0, requires_grad=True)
    z = kind(**dict(zip(names, parameters, strict=True)), relaxation=distribution.relaxation).rsample()
    first = torch.autograd.grad((weight * z.square()).sum(), parameters, create_graph=True)
    (mixed,) = torch.autograd.grad(first[0].sum(), weight, retain_graph=True)
    torch.testing.assert_close(mixed, first[0].sum().detach() / 3)
    for parameter in parameters:
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(first[0].sum(), parameter, retain_graph=True)


def test_repr_shows_the_relaxation(distribution):
    text = repr(distribution)
    assert text.startswith(type(distribution).__name__)
    assert type(distribution) is NegativeBinomial or f"relaxation: {distribution.relaxation}" in text


def test_the_mode_has_the_largest_mass(distribution):
    mass = distribution.log_prob(torch.arange(30.0)[:, None, None])
    torch.testing.assert_close(mass.gather(0, distribution.mode.long()[None])[0], mass.amax(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Computed in single precision: to the spacing of the half."""
    r, logits, z = torch.tensor([0.5, 3.0]), torch.tensor([0.0, -0.75]), torch.tensor([2.0, 5.0])
    half = RelaxedNegativeBinomial(r.to(dtype), logits=logits.to(dtype), relaxation=ArrivalTimes(0.3))
    exact = NegativeBinomial(r, logits=logits).log_prob(z)
    assert half.log_prob(z.to(dtype)).dtype == half.rsample().dtype == dtype
    torch.testing.assert_close(half.log_prob(z.to(dtype)).float(), exact, rtol=torch.finfo(dtype).eps, atol=0)
    kl = torch.distributions.kl_divergence(half, NegativeBinomial(r.to(dtype) + 1, logits=logits.to(dtype)))
    expected = torch.distributions.kl_divergence(
        NegativeBinomial(r, logits=logits), NegativeBinomial(r + 1, logits=logits)
    )
    torch.testing.assert_close(kl.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
    poisson = RelaxedPoisson(r.to(dtype), relaxation=GumbelSoftmax(0.3))
    assert poisson.rsample().dtype == RelaxedPoisson(r.to(dtype)).sample().dtype == dtype


def test_integers_as_arguments():
    expected = NegativeBinomial(3.0, logits=1.0).log_prob(torch.tensor(2.0))
    for d in (NegativeBinomial(3, logits=1), NegativeBinomial(torch.tensor(3), logits=torch.tensor(1))):
        torch.testing.assert_close(d.log_prob(torch.tensor(2)), expected)
        assert d.sample().dtype == torch.float32
    torch.testing.assert_close(RelaxedPoisson(2).log_prob(torch.tensor(1)), torch.tensor(2.0).log() - 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RelaxedPoisson(1.0, relaxation="arrival"),
        lambda: RelaxedNegativeBinomial(1.0, logits=0.0, relaxation=0.3),
        lambda: RelaxedOneHotCategorical(logits=torch.zeros(3), relaxation=ArrivalTimes()),
    ],
)
def test_what_is_no_relaxation_is_refused(make):
    with pytest.raises(TypeError, match="must be"):
        make()


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
    d = RelaxedPoisson(torch.tensor(2.0), relaxation=ArrivalTimes(torch.tensor([0.01, 1.0])))
    assert d.batch_shape == (2,)
    cold, hot = d.sample(torch.Size([50_000])).var(0).tolist()
    assert cold == pytest.approx(2.0, rel=0.05) and hot == pytest.approx(2 * 0.583, rel=0.05)


@pytest.mark.parametrize(
    "make, argument, value",
    [
        (lambda: NegativeBinomial(torch.tensor([1.0, -2.0]), logits=0.0), "total_count", "-2"),
        (lambda: NegativeBinomial(1.0, probs=1.5), "probs", "1.5"),
        (lambda: RelaxedNegativeBinomial(1.0, logits=float("nan"), relaxation=ArrivalTimes(0.1)), "logits", "nan"),
        (lambda: ArrivalTimes(-0.5), "temperature", "-0.5"),
        (lambda: GumbelSoftmax(0.0), "temperature", "relaxation=None draws exact integers"),
        (lambda: ArrivalTimes(torch.tensor([0.0, 1.0])), "temperature", "0., 1."),
        (lambda: ArrivalTimes(0.5, indicator="step"), "indicator", "step"),
        (lambda: GumbelSoftmax(0.5, max_count=0), "max_count", "0"),
        (lambda: RelaxedPoisson(torch.tensor([1.0, 0.0]), relaxation=ArrivalTimes(0.1)), "rate", "0"),
        (lambda: RelaxedPoisson(-3.0, relaxation=ArrivalTimes(0.1)), "rate", "-3"),
        (lambda: NegativeBinomial(1.0), "logits and probs", ""),
        (lambda: NegativeBinomial(1.0, logits=0.0, probs=0.5), "logits and probs", ""),
        (lambda: NegativeBinomial(1.0, logits=0.0).log_prob(torch.tensor(1.5)), "value", "1.5"),
        (
            lambda: RelaxedNegativeBinomial(1.0, logits=0.0, relaxation=ArrivalTimes(0.1)).log_prob(torch.tensor(-1.0)),
            "value",
            "-1",
        ),
    ],
)
def test_bad_arguments_are_named_with_their_value(make, argument, value):
    with pytest.raises(ValueError) as error:
        make()
    assert argument in str(error.value) and value in str(error.value)


def test_relaxed_counts_are_in_the_support():
    d = RelaxedNegativeBinomial(1.0, logits=0.0, relaxation=ArrivalTimes(0.5))
    assert d.support.check(d.sample(torch.Size([100]))).all()
    assert d.log_prob(torch.tensor(1.5)).isfinite()


@pytest.mark.parametrize("order", [1, -1])
def test_mixed_precisions_promote_as_torchs_do(order):
    """Whatever the order of the arguments."""
    for dtypes in ((torch.float16, torch.bfloat16), (torch.float16, torch.float64), (torch.int64, torch.bfloat16)):
        tensors = [torch.ones(2, dtype=dtype) for dtype in dtypes[::order]]
        assert promote(*tensors)[1] == torch.promote_types(*dtypes)
