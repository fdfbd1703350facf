"""What every distribution of ours owes Pyro and torch: one table of cases, and every property runs over every case.

The properties are those of the generic tests of Pyro and of torch.distributions.
"""

import math
import pickle
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Size
from torch.distributions import kl_divergence

from pyro_nbvae.distributions import (
    ArrivalTimes,
    ConwayMaxwellPoisson,
    CountDistribution,
    GumbelSoftmax,
    Integer,
    IsotropicNormal,
    NegativeBinomial,
    RelaxedNegativeBinomial,
    RelaxedOneHotCategorical,
    RelaxedPoisson,
)
from pyro_nbvae.distributions.elementwise import promote


class Geometric(CountDistribution):
    """A family of a user's."""

    arg_constraints = {"logits": constraints.real}
    log_weight = staticmethod(lambda k, logits: k * torch.nn.functional.logsigmoid(logits))
    scores = staticmethod(lambda k, logits: (k * torch.sigmoid(-logits),))
    window = staticmethod(lambda nats, logits: (0 * logits, nats / torch.nn.functional.softplus(-logits)))


R, LOGITS = torch.tensor([[0.5], [3.0]]), torch.tensor([0.0, 1.0, -0.7])  # broadcast to (2, 3)
RATE = R * LOGITS.exp()
CATEGORIES = (
    torch.tensor([0.3, -0.2, 0.0, 1.1]) * torch.tensor([[[1.0]], [[-2.0]]]) * torch.tensor([[1.0], [2.0], [0.0]])
)
PER_LATENT = torch.tensor([[0.1], [0.2]])


@dataclass
class Case:
    """A class and its arguments: those with a gradient, and the others; batch shape (2, 3)."""

    kind: Any
    parameters: dict[str, torch.Tensor]
    relaxation: Any = None

    def make(self, **changed: Any) -> Any:
        relaxed = {} if self.kind is NegativeBinomial else {"relaxation": self.relaxation}
        return self.kind(**(self.parameters | relaxed | changed))

    def leaves(self) -> dict[str, torch.Tensor]:
        return {name: value.clone().requires_grad_() for name, value in self.parameters.items()}

    def values(self) -> torch.Tensor:
        """Some values in the support, of shape (5, 2, 3) + event_shape."""
        if self.kind is RelaxedOneHotCategorical:
            return torch.eye(4)[torch.arange(30).reshape(5, 2, 3) % 4]
        return torch.arange(30.0).reshape(5, 2, 3) % 7


NB = {"total_count": R, "logits": LOGITS}
CASES = {
    "exact": Case(NegativeBinomial, NB),
    "exact, probs": Case(NegativeBinomial, {"total_count": R, "probs": torch.sigmoid(LOGITS)}),
    "no relaxation": Case(RelaxedNegativeBinomial, NB),
    "arrival": Case(RelaxedNegativeBinomial, NB, ArrivalTimes(0.1)),
    "smoothstep": Case(RelaxedNegativeBinomial, NB, ArrivalTimes(0.1, indicator="smoothstep")),
    "gumbel, probs": Case(
        RelaxedNegativeBinomial, {"total_count": R, "probs": torch.sigmoid(LOGITS)}, GumbelSoftmax(0.1)
    ),
    "integer": Case(RelaxedNegativeBinomial, NB, Integer()),
    "temperatures": Case(
        RelaxedNegativeBinomial, {"total_count": torch.tensor(1.5), "logits": LOGITS}, ArrivalTimes(PER_LATENT)
    ),
    "gumbel, temperatures": Case(RelaxedPoisson, {"rate": torch.ones(3)}, GumbelSoftmax(PER_LATENT)),
    "poisson": Case(RelaxedPoisson, {"rate": RATE}, ArrivalTimes(torch.tensor(0.1))),
    "poisson, straight": Case(RelaxedPoisson, {"rate": RATE}, ArrivalTimes(0.1, straight_through=True)),
    "poisson, integer": Case(RelaxedPoisson, {"rate": RATE}, Integer()),
    "com-poisson": Case(ConwayMaxwellPoisson, {"rate": RATE, "nu": torch.tensor([0.4, 1.0, 5.0])}, Integer()),
    "com-poisson, exact": Case(ConwayMaxwellPoisson, {"rate": RATE, "nu": torch.tensor([0.4, 1.0, 5.0])}),
    "own family": Case(Geometric, {"logits": LOGITS.expand(2, 3)}, Integer()),
    "categorical": Case(RelaxedOneHotCategorical, {"logits": CATEGORIES}, GumbelSoftmax(0.1)),
    "categorical, probs": Case(RelaxedOneHotCategorical, {"probs": CATEGORIES.softmax(-1)}),
    "categorical, straight": Case(
        RelaxedOneHotCategorical, {"logits": CATEGORIES}, GumbelSoftmax(0.1, straight_through=True)
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


@pytest.fixture
def distribution(case):
    return case.make()


def test_shapes(distribution, case):
    event = distribution.event_shape
    assert distribution.batch_shape == (2, 3) and event == ((4,) if case.kind is RelaxedOneHotCategorical else ())
    assert distribution.sample().shape == distribution.shape() == (2, 3, *event)
    assert distribution.sample(Size([5, 4])).shape == distribution.shape(Size([5, 4])) == (5, 4, 2, 3, *event)
    if distribution.has_rsample or not event:  # torch's one-hot categorical cannot draw nothing
        assert distribution.sample(Size([0])).shape == (0, 2, 3, *event)
    assert distribution.log_prob(case.values()).shape == (5, 2, 3)
    assert distribution.log_prob(case.values()[:, :1, :]).shape == (5, 2, 3)
    assert distribution.mean.shape == distribution.variance.shape == (2, 3, *event)
    assert distribution.event_dim == len(event) <= distribution.support.event_dim
    if distribution.has_rsample:
        assert distribution.rsample(Size([5])).shape == distribution(Size([5])).shape == (5, 2, 3, *event)


def test_samples_are_in_the_support_and_have_no_gradient(case):
    d = case.make(**case.leaves())
    z = d.sample(Size([50]))
    assert d.support.check(z).all() and not z.requires_grad
    assert d.log_prob(z).isfinite().all()
    if not d.has_rsample:
        assert torch.equal(z, z.round())


def test_a_sample_depends_on_the_seed_alone(distribution):
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(distribution.sample(Size([20])))
    assert torch.equal(*draws) and not torch.equal(draws[0], distribution.sample(Size([20])))


def test_expand_keeps_the_law_and_the_class(distribution, case):
    expanded = distribution.expand([4, 2, 3])
    assert type(expanded) is type(distribution) and expanded.batch_shape == (4, 2, 3)
    assert expanded.has_rsample == distribution.has_rsample
    z = case.values()[0]
    event = distribution.event_shape
    torch.testing.assert_close(expanded.log_prob(z), distribution.log_prob(z).expand(4, 2, 3))
    torch.testing.assert_close(expanded.mean, distribution.mean.expand(4, 2, 3, *event))
    torch.testing.assert_close(expanded.variance, distribution.variance.expand(4, 2, 3, *event))
    assert expanded.sample().shape == (4, 2, 3, *event)
    twice = expanded.expand(Size([5, 4, 2, 3]))
    torch.testing.assert_close(twice.log_prob(z), distribution.log_prob(z).expand(5, 4, 2, 3))
    assert distribution.expand_by([6]).batch_shape == (6, 2, 3)
    with pytest.raises(RuntimeError):
        distribution.expand([4, 3])


def test_to_event_and_mask(distribution, case):
    event = distribution.to_event(1)
    assert event.batch_shape == (2,) and event.event_shape == (3, *distribution.event_shape)
    z = case.values()[0]
    torch.testing.assert_close(event.log_prob(z), distribution.log_prob(z).sum(-1))
    assert event.has_rsample == distribution.has_rsample
    masked = distribution.mask(torch.tensor([True, False, True]))
    assert (masked.log_prob(z)[:, 1] == 0).all()
    assert torch.equal(masked.log_prob(z)[:, 0], distribution.log_prob(z)[:, 0])


def test_a_batch_is_its_elements(case):
    """log_prob, mean and variance of each element are those of the distribution with its parameters alone."""
    whole, z = case.make(), case.values()
    tail = whole.event_shape
    full = {k: v.expand(2, 3, *tail) for k, v in case.parameters.items()}
    relaxation = getattr(case.relaxation, "temperature", None)
    changed = {"relaxation": case.relaxation.at(0.1)} if isinstance(relaxation, torch.Tensor) else {}
    for i, j in ((0, 0), (1, 2)):
        one = case.make(**{k: v[i, j] for k, v in full.items()}, **changed)
        assert one.batch_shape == ()
        torch.testing.assert_close(one.log_prob(z[:, i, j]), whole.log_prob(z)[:, i, j])
        torch.testing.assert_close((one.mean, one.variance), (whole.mean[i, j], whole.variance[i, j]))


def test_masses_sum_to_one(distribution, case):
    if case.kind is RelaxedOneHotCategorical:
        mass = distribution.log_prob(torch.eye(4)[:, None, None]).exp()
    else:
        mass = distribution.log_prob(torch.arange(600.0)[:, None, None]).exp()
    torch.testing.assert_close(mass.sum(0), torch.ones(2, 3), rtol=0, atol=2e-5)


def test_mean_and_variance_are_those_of_the_samples(distribution):
    """At temperatures up to 0.2: 5 standard errors, 2 % for the mean and a quarter for the variance of what is left."""
    z = distribution.sample(Size([40_000])).double()
    error = z.std(0) / 200
    assert ((z.mean(0) - distribution.mean).abs() < 5 * error + 0.02 * distribution.mean).all()
    squared = (z - distribution.mean) ** 2
    error = squared.std(0) / 200
    assert ((squared.mean(0) - distribution.variance).abs() < 5 * error + 0.25 * distribution.variance).all()


def test_under_plates_and_trace(distribution):
    event = distribution.event_shape

    def program():
        with pyro.plate("images", 4, dim=-2):
            return pyro.sample("z", distribution.to_event(2))

    def batched():
        with pyro.plate("outer", 5, dim=-3), pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            return pyro.sample("z", distribution)

    trace = poutine.trace(batched).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["z"]
    assert site["value"].shape == (5, 2, 3, *event) and site["log_prob"].shape == (5, 2, 3)
    again = poutine.trace(poutine.replay(batched, trace=trace)).get_trace()
    assert again.nodes["z"]["value"] is site["value"]
    trace = poutine.trace(program).get_trace()
    assert trace.nodes["z"]["value"].shape == (4, 1, 2, 3, *event)


def test_gradients_of_samples_reach_the_parameters(case):
    leaves = case.leaves()
    d = case.make(**leaves)
    if not d.has_rsample:
        with pytest.raises(NotImplementedError, match="rsample"):
            d.rsample()
        return
    z = d.rsample(Size([300]))
    weight = torch.linspace(0.5, 2.0, 4) if d.event_shape else torch.tensor(1.0)  # a one-hot vector's sum is constant
    for gradient in torch.autograd.grad((weight * z).sum(), list(leaves.values())):
        assert (gradient != 0).all() and gradient.isfinite().all()


def test_gradients_of_log_prob_are_finite_differences(case):
    """In double precision, in every parameter."""
    z = case.values()[0].double()

    def total(*values):
        return case.make(**dict(zip(case.parameters, values, strict=True))).log_prob(z).sum()

    leaves = [v.double().requires_grad_() for v in case.parameters.values()]
    assert torch.autograd.gradcheck(total, leaves, eps=1e-6, atol=1e-5, rtol=1e-4)


def test_a_second_derivative_of_a_sample_is_refused_not_zero(case):
    """In the parameters; what comes after the sample may be differentiated as often as one likes."""
    if case.relaxation is None or case.kind is RelaxedOneHotCategorical:
        return
    leaves = case.leaves()
    weight = torch.tensor(3.0, requires_grad=True)
    z = case.make(**leaves).rsample()
    first = torch.autograd.grad((weight * z.square()).sum(), list(leaves.values()), create_graph=True)
    (mixed,) = torch.autograd.grad(first[0].sum(), weight, retain_graph=True)
    torch.testing.assert_close(mixed, first[0].sum().detach() / 3)
    for parameter in leaves.values():
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(first[0].sum(), parameter, retain_graph=True)


def test_parameters_that_are_not_finite_or_not_allowed_are_named(case):
    """Each parameter in turn is nan; with validation off it is taken (torch's categorical always validates)."""
    for name, value in case.parameters.items():
        bad = {name: torch.full_like(value, math.nan)}
        with pytest.raises(ValueError, match=name):
            case.make(**bad, validate_args=True)
        if case.kind is not RelaxedOneHotCategorical:
            case.make(**bad, validate_args=False)


@pytest.mark.parametrize("outside", [-1.0, math.inf])
def test_values_outside_the_support_are_refused(case, outside):
    value = torch.full_like(case.values(), outside)
    with pytest.raises(ValueError, match=r"support|value"):
        case.make(validate_args=True).log_prob(value)


def test_parameters_that_do_not_broadcast_are_refused(case):
    if len(case.parameters) < 2:
        return
    first, last = case.parameters
    with pytest.raises((RuntimeError, ValueError)):
        case.make(**{first: torch.ones(2, 3), last: torch.full((2, 5), 0.5)})


def test_precision_is_the_parameters(case):
    for dtype in (torch.float32, torch.float64):
        d = case.make(**{name: value.to(dtype) for name, value in case.parameters.items()})
        assert d.sample().dtype == d.mean.dtype == d.log_prob(case.values().to(dtype)).dtype == dtype


def test_the_kl_from_itself_is_zero(case):
    d = case.make()
    kl = kl_divergence(d, case.make())
    assert kl.shape == (2, 3)
    torch.testing.assert_close(kl, torch.zeros(2, 3), rtol=0, atol=2e-6)


def test_it_can_be_pickled(distribution, case):
    again = pickle.loads(pickle.dumps(distribution))
    assert torch.equal(again.log_prob(case.values()), distribution.log_prob(case.values()))
    assert again.has_rsample == distribution.has_rsample


def test_repr_shows_the_relaxation(distribution):
    text = repr(distribution)
    assert text.startswith(type(distribution).__name__) and "(," not in text
    assert type(distribution) is NegativeBinomial or f"relaxation: {distribution.relaxation}" in text


def test_the_mode_has_the_largest_mass(distribution, case):
    if not hasattr(type(distribution), "mode") or isinstance(distribution, CountDistribution):
        return
    counts = torch.eye(4)[:, None, None] if distribution.event_shape else torch.arange(30.0)[:, None, None]
    most = distribution.log_prob(counts).amax(0)
    torch.testing.assert_close(distribution.log_prob(distribution.mode), most, rtol=0, atol=1e-5)


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
        (lambda: RelaxedPoisson(torch.tensor([1.0, -0.5]), relaxation=ArrivalTimes(0.1)), "rate", "-0.5"),
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


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_the_isotropic_normal_is_the_normal(scale):
    loc, x = torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True), torch.randn(5, 1, 4, 3, dtype=torch.float64)
    ours, theirs = IsotropicNormal(loc, scale), dist.Normal(loc, scale)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    gradients = [torch.autograd.grad(d.log_prob(x).sum(), loc)[0] for d in (ours, theirs)]
    torch.testing.assert_close(*gradients)
    wider = ours.expand([4, 2, 4, 3])
    assert type(wider) is IsotropicNormal and wider.rsample().shape == (4, 2, 4, 3)
    torch.testing.assert_close(wider.log_prob(x[0]), theirs.log_prob(x[0]).expand(4, 2, 4, 3))
    torch.testing.assert_close(kl_divergence(ours, dist.Normal(0.0, 1.0)), kl_divergence(theirs, dist.Normal(0.0, 1.0)))
    with pytest.raises(ValueError, match="value"):
        IsotropicNormal(loc, scale, validate_args=True).log_prob(torch.tensor(math.nan))
    with pytest.raises(ValueError, match="scale"):
        IsotropicNormal(loc, -scale, validate_args=True)


def test_a_temperature_on_a_gpu_is_not_read():
    """Its value would be an error on the meta device; on a GPU the host would wait for it."""
    assert GumbelSoftmax(torch.ones((), device="meta")).at(torch.ones(3, device="meta")).temperature.is_meta


@pytest.mark.parametrize("order", [1, -1])
def test_mixed_precisions_promote_as_torchs_do(order):
    """Whatever the order of the arguments."""
    for dtypes in ((torch.float16, torch.bfloat16), (torch.float16, torch.float64), (torch.int64, torch.bfloat16)):
        tensors = [torch.ones(2, dtype=dtype) for dtype in dtypes[::order]]
        assert promote(*tensors)[1] == torch.promote_types(*dtypes)


def test_the_isotropic_normal_has_a_constant_scale():
    with pytest.raises(TypeError, match="scale must be a number"):
        IsotropicNormal(torch.zeros(3), torch.tensor(0.5, requires_grad=True))


@pytest.mark.parametrize("relaxation", [ArrivalTimes, GumbelSoftmax])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_temperature_that_would_get_no_gradient_is_refused(relaxation, shape):
    temperature = torch.full(shape, 0.5, requires_grad=True)
    with pytest.raises(TypeError, match="temperature of counts gets no gradient"):
        RelaxedPoisson(torch.ones(3), relaxation=relaxation(temperature)).rsample()
    assert RelaxedPoisson(torch.ones(3), relaxation=relaxation(temperature.detach())).rsample().shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("probs", [0.0, 1e-12, 1e-9, 1e-3, 0.5, 0.999])
def test_small_probabilities_are_not_rounded_up(probs, dtype):
    r = min(1.0 / max(probs, 1e-12), 1e9)
    d = NegativeBinomial(torch.tensor(r, dtype=dtype), probs=torch.tensor(probs, dtype=dtype))
    p = float(d.probs)
    assert float(d.mean) == pytest.approx(float(d.total_count) * p / (1 - p), rel=1e-5, abs=1e-12)
    if probs:
        expected = scipy.stats.nbinom.logpmf(1, float(d.total_count), 1 - p)
        assert float(d.log_prob(torch.tensor(1.0, dtype=dtype))) == pytest.approx(expected, abs=2e-4)
