"""Every family under PyTorch's transforms, tensor subclasses and precisions, against the plain call."""

import contextlib
import copy
import io
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import torch.utils.checkpoint
from pyro.ops.provenance import ProvenanceTensor, detach_provenance
from torch import func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import biject_to, constraints, kl_divergence, transform_to
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import softplus

from pyro_nbvae.distributions import (
    ArrivalTimes,
    ConwayMaxwellPoisson,
    CountDistribution,
    GumbelSoftmax,
    Integer,
    NegativeBinomial,
    RelaxedNegativeBinomial,
    RelaxedPoisson,
)
from pyro_nbvae.study.variants import VARIANTS
from tests.pairs import pair


class Geometric(CountDistribution):
    """A family as a user writes it."""

    arg_constraints = {"logits": constraints.real}
    log_weight = staticmethod(lambda k, logits: -k * softplus(-logits))
    scores = staticmethod(lambda k, logits: (k * torch.sigmoid(-logits),))
    window = staticmethod(lambda nats, logits: (0 * logits, nats / softplus(-logits)))


# from two vectors of real numbers
FAMILIES = {
    "negative binomial": lambda u, v, **o: RelaxedNegativeBinomial(u.exp(), logits=v, validate_args=False, **o),
    "negative binomial of probs": lambda u, v, **o: RelaxedNegativeBinomial(
        u.exp(), probs=torch.sigmoid(v), validate_args=False, **o
    ),
    "poisson": lambda u, v, **o: RelaxedPoisson((u + v).exp(), validate_args=False, **o),
    "com-poisson": lambda u, v, **o: ConwayMaxwellPoisson(u.exp(), v.exp(), validate_args=False, **o),
    "geometric": lambda u, v, **o: Geometric(u + v - 1, validate_args=False, **o),
}
U, V = torch.tensor([0.3, 1.0, -0.7]), torch.tensor([0.2, -0.6, 0.4])
COUNTS = torch.tensor([2.0, 0.0, 5.0])
PRIORS = {
    "negative binomial": lambda u: NegativeBinomial(u.exp(), logits=0.3 * u, validate_args=False),
    "poisson": lambda u: RelaxedPoisson(u.exp(), validate_args=False),
    "com-poisson": lambda u: ConwayMaxwellPoisson(u.exp(), (0.5 * u).exp(), validate_args=False),
}
QUANTITIES = {
    "log_prob": lambda d: d.log_prob(COUNTS),
    "mean": lambda d: d.mean,
    "variance": lambda d: d.variance,
    "entropy": lambda d: d.entropy(),
    "cdf": lambda d: d.cdf(COUNTS),
    **{f"KL to {name}": lambda d, p=p: kl_divergence(d, p(0.5 * U)) for name, p in PRIORS.items()},
    **{f"KL from {name}": lambda d, p=p: kl_divergence(p(0.5 * U), d) for name, p in PRIORS.items()},
}
CASES = [(f, q) for f in FAMILIES for q in QUANTITIES]
RELAXED = [
    *((f, Integer()) for f in FAMILIES),
    *((f, r) for f in ("negative binomial", "poisson") for r in (ArrivalTimes(0.3), GumbelSoftmax(0.5))),
]
families_and_quantities = pytest.mark.parametrize(("family", "quantity"), CASES)
families_and_relaxations = pytest.mark.parametrize(("family", "relaxation"), RELAXED, ids=str)


def of(family, quantity):
    return lambda u, v: QUANTITIES[quantity](FAMILIES[family](u, v))


def value_and_gradient(f, u, v):
    u, v = u.detach().clone().requires_grad_(), v.detach().clone().requires_grad_()
    value = f(u, v)
    weight = torch.linspace(1, 2, value.numel()).reshape(value.shape)
    return value.detach(), *torch.autograd.grad((weight * value).sum(), (u, v))


def close(got, wanted, tolerance=2e-5):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


# --- tensor subclasses ----------------------------------------------------------------------------------------------


class Named(torch.Tensor):
    """A subclass as PyTorch's documentation makes one."""


SUBCLASSES = {
    "provenance": lambda x: ProvenanceTensor(x, frozenset({"z"})),
    "named": lambda x: x.as_subclass(Named),
}


def through(subclass, f):
    """The same function, of tensors of a subclass; it must return one."""

    def wrapped(u, v):
        value = f(SUBCLASSES[subclass](u), SUBCLASSES[subclass](v))
        assert type(value) is not torch.Tensor
        return detach_provenance(value).as_subclass(torch.Tensor)

    return wrapped


@pytest.mark.parametrize("subclass", SUBCLASSES)
@families_and_quantities
def test_tensor_subclasses_keep_value_and_gradient(family, quantity, subclass):
    f = of(family, quantity)
    close(value_and_gradient(through(subclass, f), U, V), value_and_gradient(f, U, V))


@pytest.mark.parametrize("subclass", SUBCLASSES)
@families_and_relaxations
def test_tensor_subclasses_keep_the_gradient_of_samples(family, relaxation, subclass):
    def f(u, v):
        torch.manual_seed(0)
        return FAMILIES[family](u, v, relaxation=relaxation).rsample(torch.Size([2]))

    close(value_and_gradient(through(subclass, f), U, V), value_and_gradient(f, U, V))


def test_a_count_may_be_a_tensor_of_a_subclass():
    """The site below a sampled one, such as x ~ NB(z, ...), or its log mass at a sampled count."""
    for family in FAMILIES:
        plain, provenance = (
            FAMILIES[family](U, V).log_prob(make(COUNTS)) for make in (lambda x: x, SUBCLASSES["provenance"])
        )
        close(detach_provenance(provenance), plain)


@pytest.mark.parametrize("subclass", SUBCLASSES)
@pytest.mark.parametrize("validate", [True, False])
def test_families_of_a_subclass_are_made_with_validation(subclass, validate):
    """As below a site that TraceGraph_ELBO tracks: the batch shape is a torch.Size."""
    wrap, options = SUBCLASSES[subclass], {"validate_args": validate}
    for d in (
        RelaxedNegativeBinomial(wrap(U.exp()), logits=wrap(V), **options),
        NegativeBinomial(wrap(U.exp()), probs=wrap(torch.sigmoid(V)), **options),
        RelaxedPoisson(wrap(U.exp()), **options),
        ConwayMaxwellPoisson(wrap(U.exp()), wrap(V.exp()), **options),
        Geometric(wrap(U), **options),
    ):
        assert isinstance(d.batch_shape, torch.Size) and d.batch_shape.numel() == 3
        assert d.sample(torch.Size([2])).shape == (2, 3) and d.log_prob(wrap(COUNTS)).shape == (3,)


@families_and_quantities
def test_checkpoints_keep_the_gradient(family, quantity):
    f = of(family, quantity)

    def recomputed(u, v):
        return torch.utils.checkpoint.checkpoint(f, u, v, use_reentrant=False)

    close(value_and_gradient(recomputed, U, V), value_and_gradient(f, U, V))


@families_and_relaxations
def test_checkpoints_keep_the_sample(family, relaxation):
    def draw(u, v):
        return FAMILIES[family](u, v, relaxation=relaxation).rsample()

    def recomputed(u, v):
        return torch.utils.checkpoint.checkpoint(draw, u, v, use_reentrant=False)

    results = []
    for f in (draw, recomputed):
        torch.manual_seed(2)
        results.append(value_and_gradient(f, U, V))
    close(*results)


# --- torch.func -----------------------------------------------------------------------------------------------------

BATCH = torch.stack([U, 0.5 * U, U - 0.2])


@families_and_quantities
def test_func_transforms_equal_autograd(family, quantity):
    def f(u):
        return of(family, quantity)(u, V)

    expected = torch.autograd.functional.jacobian(f, U)
    for transform in (func.jacrev, func.jacfwd):
        close(transform(f)(U), expected)
    close(func.grad(lambda u: f(u).sum())(U), expected.sum(0))
    close(func.vmap(f)(BATCH), torch.stack([f(u) for u in BATCH]))
    of_one = func.grad(lambda u: f(u).sum())
    close(func.vmap(of_one)(BATCH), torch.stack([of_one(u) for u in BATCH]))
    close(func.vmap(of_one, in_dims=1)(BATCH.T), func.vmap(of_one)(BATCH))
    close(func.vmap(func.jacfwd(f))(BATCH), torch.stack([expected if u is U else func.jacrev(f)(u) for u in BATCH]))


@pytest.mark.parametrize("quantity", ["log_prob", "mean", "variance", "KL to negative binomial", "KL from com-poisson"])
@pytest.mark.parametrize("family", FAMILIES)
def test_second_derivatives(family, quantity):
    """Of autograd, of torch.func both ways, and of each element of a batch, against differences of the first."""
    u, v = U.double(), V.double()

    def f(u):
        return of(family, quantity)(u, v.to(u.dtype)).sum()

    step = 1e-5
    slope = func.grad(f)
    columns = [(slope(u + step * e) - slope(u - step * e)) / (2 * step) for e in torch.eye(3, dtype=torch.float64)]
    expected = torch.stack(columns, 1)
    close(torch.autograd.functional.hessian(f, u), expected, 1e-6)
    close(func.hessian(f)(u), expected, 1e-6)
    close(func.jacrev(func.jacrev(f))(u), expected, 1e-6)
    batch = BATCH.double()
    close(func.vmap(func.hessian(f))(batch)[0], expected, 1e-6)


def test_a_third_derivative_is_refused_in_one_line():
    f = of("negative binomial", "log_prob")
    with pytest.raises(NotImplementedError, match="differentiable twice"):
        func.jacrev(func.jacrev(func.jacrev(lambda u: f(u, V).sum())))(U)


@families_and_relaxations
def test_samples_under_vmap_are_different_and_have_the_law(family, relaxation):
    """Mean and gradient of the mean within 5 standard errors of 20,000 plain draws."""
    n = 20_000
    torch.manual_seed(0)

    def one(u):
        return FAMILIES[family](u, V, relaxation=relaxation).rsample()

    def moments(z, slope):
        return torch.stack([z.mean(0), slope.mean(0)]), torch.stack([z.var(0), slope.var(0)])

    many = U.expand(n, 3)
    z = func.vmap(one, randomness="different")(many)
    slope = func.vmap(func.grad(lambda u: one(u).sum()), randomness="different")(many)
    plain = many.clone().requires_grad_()
    theirs = FAMILIES[family](plain, V, relaxation=relaxation).rsample()
    (mean, variance), (expected, of_it) = (
        moments(z, slope),
        moments(theirs.detach(), torch.autograd.grad(theirs.sum(), plain)[0]),
    )
    assert ((mean - expected).abs() <= 5 * ((variance + of_it) / n).sqrt() + 1e-6).all()
    # the same parameters for all elements are different draws too
    again = func.vmap(lambda x: x + one(U), randomness="different")(torch.zeros(200))
    assert (again.std(0) > 0).all()


@families_and_relaxations
def test_the_tangent_of_a_sample_is_its_derivative(family, relaxation):
    def f(u):
        torch.manual_seed(3)
        return FAMILIES[family](u, V, relaxation=relaxation).rsample()

    tangent = torch.tensor([1.0, -2.0, 0.5])
    value, along = func.jvp(f, (U,), (tangent,))
    u = U.clone().requires_grad_()
    torch.testing.assert_close(value, f(U))
    close(along, torch.autograd.grad(f(u).sum(), u)[0] * tangent)


def test_vmap_without_different_noise_is_refused_in_one_line():
    def f(u):
        return FAMILIES["poisson"](u, V, relaxation=Integer()).rsample()

    with pytest.raises(RuntimeError, match="randomness"):
        func.vmap(f)(BATCH)
    with pytest.raises(RuntimeError, match='randomness="different"'):
        func.vmap(f, randomness="same")(BATCH)


def test_a_temperature_for_each_latent_under_vmap():
    """Whether the temperature is mapped over or not."""
    temperatures = torch.tensor([0.01, 0.5, 1.0])
    rate = torch.full((4000, 3), 2.0)

    def draw(rate, temperature):
        return RelaxedPoisson(rate, relaxation=ArrivalTimes(temperature), validate_args=False).rsample()

    fixed = func.vmap(lambda rate: draw(rate, temperatures), randomness="different")(rate)
    plain = draw(rate, temperatures)
    variances = torch.stack([fixed.var(0), plain.var(0)])
    assert ((variances[0] - variances[1]).abs() < 0.25 * variances[1]).all() and variances[1, 0] > 1.5 * variances[1, 2]


# --- tracers --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@families_and_quantities
def test_what_a_tracer_records_is_the_function_or_an_error(family, quantity):
    """A sum over counts asks for values, which a tracer refuses; log masses of normalised families do not."""
    f = of(family, quantity)
    along = torch.tensor([0.5, -1.0, 2.0])
    traceable = quantity == "log_prob" and family not in ("com-poisson", "geometric")
    with contextlib.nullcontext() if traceable else contextlib.suppress(RuntimeError):
        close(make_fx(f)(U + 0, V + 0)(0.5 * U, V), f(0.5 * U, V))
        close(func.linearize(lambda u: f(u, V), U)[1](along), func.jvp(lambda u: f(u, V), (U,), (along,))[1])
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert f(mode.from_tensor(U), mode.from_tensor(V)).shape == U.shape


# --- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo's, where a graph breaks
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_quantities(family):
    def f(u, v):
        return torch.stack([of(family, quantity)(u, v) for quantity in QUANTITIES])

    torch.compiler.reset()
    compiled = torch.compile(f, backend="aot_eager")
    close(value_and_gradient(compiled, U, V), value_and_gradient(f, U, V))
    close(value_and_gradient(compiled, 0.5 * U, V), value_and_gradient(f, 0.5 * U, V))


@families_and_relaxations
def test_compiled_samples_are_new_at_each_call(family, relaxation):
    """And two draws from equal parameters within a graph are two; nothing is compiled again."""
    graphs = []

    def counting(graph, example):
        graphs.append(graph)
        return graph.forward

    def f(u, v):
        d = FAMILIES[family](u, v, relaxation=relaxation)
        return torch.stack([d.rsample(), d.rsample()])

    torch.compiler.reset()
    u, v = (x.repeat(100) for x in (U, V))
    compiled = torch.compile(f, backend=counting)
    drawn = [compiled(u, v) for _ in range(4)]
    before = len(graphs)
    torch.manual_seed(8)
    drawn.append(compiled(u, v))
    assert len(graphs) == before
    assert len({tuple(z.tolist()) for pair in drawn for z in pair}) == 10
    torch.compiler.reset()
    aot = torch.compile(f, backend="aot_eager")
    z, of_u, of_v = value_and_gradient(aot, u, v)
    assert not torch.equal(*z) and of_u.isfinite().all() and of_v.any()


FRESH = """
import torch
from pyro_nbvae.distributions import ConwayMaxwellPoisson, Integer, NegativeBinomial, RelaxedNegativeBinomial
from torch.distributions import kl_divergence
p = NegativeBinomial(2.0, logits=torch.zeros(3))
def f(x):
    q = ConwayMaxwellPoisson(x.exp(), 1.5, relaxation=Integer())
    z = RelaxedNegativeBinomial(2.0, logits=x, relaxation=Integer()).rsample() + q.rsample()
    return z.sum() + q.log_prob(torch.ones(3)).sum() + kl_divergence(q, p).sum()
x = torch.zeros(3, requires_grad=True)
torch.compile(f, backend="BACKEND")(x).backward()
assert x.grad.isfinite().all() and x.grad.any()
print("ok")
"""


def test_compiled_before_any_plain_call():
    """By the default backend, if there is the C++ compiler that it needs."""
    backend = "inductor" if shutil.which("g++") else "aot_eager"
    done = subprocess.run([sys.executable, "-c", FRESH.replace("BACKEND", backend)], capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr[-2000:]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_derivatives_that_an_operator_has_not_are_never_silent(backend):
    """Forward mode is right or refused, and so is a second derivative."""
    f = of("negative binomial", "log_prob")

    def g(u):
        return f(u, V).sum()

    torch.compiler.reset()
    with contextlib.suppress(NotImplementedError):
        close(torch.compile(func.jacfwd(g), backend=backend)(U), func.grad(g)(U))
    u = U.clone().requires_grad_()
    (slope,) = torch.autograd.grad(torch.compile(g, backend=backend)(u), u, create_graph=True)
    with contextlib.suppress(NotImplementedError, RuntimeError):
        close(torch.autograd.grad(slope.sum(), u)[0], func.grad(lambda u: func.grad(g)(u).sum())(U))


def test_nested_forward_modes_of_a_sample_are_refused():
    def f(u):
        return RelaxedPoisson(u.exp(), relaxation=Integer(), validate_args=False).rsample().square()

    def along(u):
        return func.jvp(f, (u,), (torch.ones(3),))[1]

    with pytest.raises(NotImplementedError, match="differentiable once"):
        func.jvp(along, (U,), (torch.ones(3),))


# --- precisions -----------------------------------------------------------------------------------------------------

HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("quantity", ["log_prob", "mean", "variance", "entropy", "KL to negative binomial"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_single_precision_rounded_once(family, quantity, dtype):
    """Of the parameters that were given, whatever they are; the gradient too."""
    made = FAMILIES[family](U.to(dtype), V.to(dtype))
    names = [name for name in made.arg_constraints if name in made.__dict__]
    results = []
    p = NegativeBinomial(torch.ones(3, dtype=dtype), logits=torch.zeros(3, dtype=dtype), validate_args=False)
    read = {
        "log_prob": lambda d: d.log_prob(COUNTS.to(d.mean.dtype)),
        "entropy": lambda d: d.entropy(),
        "KL to negative binomial": lambda d: kl_divergence(d, p),
    }.get(quantity, lambda d: getattr(d, quantity))
    for convert in (lambda x: x, torch.Tensor.float):
        given = {n: convert(getattr(made, n).detach()).requires_grad_() for n in names}
        value = read(type(made)(**given, validate_args=False))
        results.append([value, *torch.autograd.grad(value.float().sum(), list(given.values()))])
    for half, single in zip(*results, strict=True):
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), single.to(dtype).float(), rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rate", [0.02, 3.0, 250.0, 3104.0])
@families_and_relaxations
def test_half_precision_draws_have_the_law(family, relaxation, rate, dtype):
    """Mean of the draws, which are rounded once, beside draws in double precision, within 5 standard errors."""
    if family in ("geometric", "negative binomial of probs"):
        pytest.skip("has no parameter for every mean")
    n = 4000
    torch.manual_seed(0)
    one = torch.ones(n, dtype=dtype)
    r, logits = 4 * one, (rate / 4 * one).log()
    d = {
        "poisson": lambda: RelaxedPoisson(rate * one, relaxation=relaxation),
        "negative binomial": lambda: RelaxedNegativeBinomial(r, logits=logits, relaxation=relaxation),
        "com-poisson": lambda: ConwayMaxwellPoisson(rate * one, 2 * one, relaxation=relaxation),
    }[family]()
    given = {k: getattr(d, k).double() for k in d.arg_constraints if k in d.__dict__}
    z, exact = d.rsample(), type(d)(**given, relaxation=relaxation).rsample()
    assert z.dtype == dtype
    error = ((z.double().var() + exact.var()) / n).sqrt()
    assert (z.double().mean() - exact.mean()).abs() <= 5 * error + 1e-9


# --- one object, used again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_object_whose_parameters_change_is_as_a_fresh_one(family):
    made = FAMILIES[family](U, V)
    names = [name for name in made.arg_constraints if name in made.__dict__]
    leaves = {n: getattr(made, n).detach().clone().requires_grad_() for n in names}
    d = type(made)(**leaves, validate_args=False)
    for turn in range(2):
        fresh = type(made)(**{n: p.detach().clone() for n, p in leaves.items()}, validate_args=False)
        for quantity in QUANTITIES:
            value = QUANTITIES[quantity](d)
            torch.testing.assert_close(value.detach(), QUANTITIES[quantity](fresh))
            value.sum().backward()  # a second time too
        copied, pickled = copy.deepcopy(d), pickle.loads(pickle.dumps(d)) if turn else d
        for other in (copied, pickled):
            torch.testing.assert_close(other.mean, d.mean)
        with torch.no_grad():
            for p in leaves.values():
                p.mul_(0.9)


@pytest.mark.parametrize("name", VARIANTS)
def test_priors_and_posteriors_are_pickled(name):
    model, guide = pair(name, (5,), 8)
    with torch.no_grad():
        for d in (model.prior_distribution(), guide.posterior(torch.rand(3, 5))):
            z = d.sample()
            assert torch.equal(pickle.loads(pickle.dumps(d)).log_prob(z), d.log_prob(z))
    assert pickle.loads(pickle.dumps(model)).latents == 8
    p = model.prior_distribution()  # with gradients
    z = p.sample()
    assert torch.equal(pickle.loads(pickle.dumps(p)).log_prob(z), p.log_prob(z))


def test_pickled_families_are_read_by_torch():
    buffer = io.BytesIO()
    torch.save(RelaxedNegativeBinomial(U.exp(), logits=V, relaxation=ArrivalTimes(0.3)), buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(read.mean, U.exp() * V.exp())
    assert read.relaxation == ArrivalTimes(0.3)


# --- constraints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [NegativeBinomial, RelaxedNegativeBinomial, RelaxedPoisson, ConwayMaxwellPoisson])
@pytest.mark.parametrize("registry", [transform_to, biject_to])
def test_constraints_have_torchs_transforms(family, registry):
    torchs = {"total_count": 1.0, "rate": 1.0, "nu": 1.0, "logits": 0.0, "probs": 0.5}
    for name, constraint in family.arg_constraints.items():
        transform = registry(constraint)
        assert float(transform(torch.tensor(0.0))) == torchs[name]
        x = torch.linspace(-3, 3, 7)
        assert constraint.check(transform(x)).all()
        close(transform.inv(transform(x)), x)
