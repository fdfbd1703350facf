"""Gradients of every variant and example under every loss of Pyro's, against formulas written out here.

:func:`run` returns one line for a case, a loss and an option:

    ok              the loss and its gradient are those of the formula, on the same random numbers, or, marked
                    "(mean)", in expectation to within SIGMAS standard errors
    WRONG           they are not; the worst parameter, the numbers, and what was compared
    refused         an error of one line that says what is not possible (REFUSALS)
    ERROR           another error

The formulas use none of the package's densities, KLs or derivatives: masses are written with lgamma, KLs are sums over
counts, in double precision. From the package they take the draws and their pathwise derivatives.
"""

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.gp.kernels import RBF
from pyro.distributions.util import scale_and_mask
from pyro.infer import (
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
)
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Independent, kl_divergence

import pyro_nbvae
from examples import hierarchy, neurons, own_family, state_space
from pyro_nbvae.distributions import ArrivalTimes, ConwayMaxwellPoisson, Integer, IsotropicNormal
from pyro_nbvae.infer import AnalyticKL_ELBO, MonteCarloKL_ELBO, RelaxReparam
from pyro_nbvae.likelihoods import Bernoulli, NegativeBinomial
from pyro_nbvae.models import GaussianModel, LaplaceModel
from pyro_nbvae.study.tree import options
from pyro_nbvae.study.variants import VARIANTS
from tests.pairs import WARM, pair

SIZE, LATENTS, BATCH, DATA_SIZE = 5, 3, 6, 40
COUNTS = 1500  # in sums over counts
SIGMAS, DRAWS = 5.0, 100
TOLERANCE = 1e-4  # of a parameter's largest derivative
COMPILED_TOLERANCE = 5e-3  # TorchScript's own derivatives, as that of softplus, are less accurate in single precision
# First lines of errors that say what is not possible.
REFUSALS = [
    r"has no rsample",
    r"must be fully reparam",
    r"not reparameterizable",
    r"only implemented for vectorize_particles",
    r"draws '.*' before '.*'",
    r"^site '.*': ",
]


# --- The programs -----------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A model, a guide, their arguments, and the parameters of both."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    parameters: dict[str, Tensor]
    plate: bool = True  # whether all sites are in one plate of dim -1
    model_on: Callable[[Any], Callable[..., Any]] | None = None  # the model without its observations, for condition


def of_modules(model, guide, x, plate=True, free=None):
    named = {f"model.{n}": p for n, p in model.named_parameters()}
    known = {id(p) for p in named.values()}
    named |= {f"guide.{n}": p for n, p in guide.named_parameters() if id(p) not in known}
    return Case(model, guide, (x,), named, plate, free)


def vae(name, relaxed=True, likelihood=None, data_size=None, model_class=None, decoder="linear", encoder="linear"):
    torch.manual_seed(0)
    known = options(VARIANTS[name])
    latents, changes = (6, {"categories": 3}) if "categories" in known else (LATENTS, {})
    if "prior_mean" in known:
        changes["prior_mean"] = 2.0
    if not relaxed:
        changes["relaxation"] = None
    networks = {"encoder": encoder, "decoder": decoder, "likelihood": likelihood and likelihood()}
    model, guide = pair(name, (SIZE,), latents, **networks, **changes)
    model.data_size = guide.data_size = data_size
    if model_class is not None:
        model.__class__ = model_class
    x = torch.randn(BATCH, SIZE)
    if likelihood is NegativeBinomial:
        x = torch.poisson(torch.full_like(x, 2.0))
    if likelihood is Bernoulli:
        x = (x > 0).float()
    with torch.no_grad():
        for p in model.prior.parameters():  # not where it starts, so that nothing is equal by chance
            p += 0.1 * torch.randn_like(p)
    return of_modules(model, guide, x, free=lambda x: lambda *_: model(None, size=len(x)))


class SigmoidGaussian(GaussianModel):
    def decode(self, z):
        return super().decode(z.sigmoid())


class SigmoidLaplace(LaplaceModel):
    def decode(self, z):
        return super().decode(z.sigmoid())


def neuron_population(data_size=None):
    torch.manual_seed(0)
    decoder = torch.nn.Sequential(torch.nn.Linear(LATENTS, 8), torch.nn.SiLU(), torch.nn.Linear(8, SIZE))
    return vae(
        "EX-I",
        likelihood=NegativeBinomial,
        decoder=decoder,
        encoder=neurons.Encoder(SIZE, LATENTS),
        data_size=data_size,
    )


def two_layers(bottom_up, relaxed=True):
    torch.manual_seed(0)
    model, guide = hierarchy.Model(), hierarchy.Guide(bottom_up)
    if not relaxed:
        guide.relaxation = None
    return of_modules(model, guide, torch.randn(BATCH, hierarchy.SIZE))


def over_time(relaxed):
    torch.manual_seed(0)
    x = torch.poisson(torch.full((4,), 3.0)) + torch.randn(4)
    programs = [state_space.model, state_space.guide]
    if relaxed:
        config = {f"z_{t}": RelaxReparam(ArrivalTimes(0.24)) for t in range(4)}
        programs = [poutine.reparam(program, config=config) for program in programs]
    state_space.guide(x)  # makes the parameter
    return Case(*programs, (x,), {"rate": pyro.get_param_store()._params["rate"]}, plate=False)


def both_relaxed(name):
    """A variant whose prior is relaxed too, by RelaxReparam, as Trace_MMD needs."""
    case = vae(name)
    relax = RelaxReparam(WARM[VARIANTS[name].relaxation.kind] if name != "EX-I" else Integer())
    case.model = poutine.reparam(case.model, config={"z": relax})
    return case


CASES: dict[str, Callable[..., Case]] = {
    **{name: (lambda name=name, **o: vae(name, **o)) for name in tuple(VARIANTS) if name != "GEOMETRIC"},
    **{
        f"{name} exact": (lambda name=name, **o: vae(name, relaxed=False, **o))
        for name in ("EX-C", "DS-C", "CMP", "P-NB", "P-VAE", "C-VAE")
    },
    "EX-C counts": lambda **o: vae("EX-C", likelihood=NegativeBinomial, **o),
    "CMP counts exact": lambda **o: vae("CMP", relaxed=False, likelihood=NegativeBinomial, **o),
    "EX-C relaxed prior": lambda: both_relaxed("EX-C"),
    "EX-I relaxed prior": lambda: both_relaxed("EX-I"),
    "example own_family": lambda **o: vae("GEOMETRIC", **o),
    "example bernoulli_vae": lambda **o: vae("EX-I", likelihood=Bernoulli, **o),
    "example neurons": neuron_population,
    "example sigmoid_latents G": lambda **o: vae("G-VAE", model_class=SigmoidGaussian, **o),
    "example sigmoid_latents L": lambda **o: vae("L-VAE", model_class=SigmoidLaplace, **o),
    "example hierarchy top-down": lambda: two_layers(False),
    "example hierarchy bottom-up": lambda: two_layers(True),
    "example hierarchy top-down exact": lambda: two_layers(False, False),
    "example hierarchy bottom-up exact": lambda: two_layers(True, False),
    "example state_space relaxed": lambda: over_time(True),
    "example state_space exact": lambda: over_time(False),
}
assert own_family  # registers GEOMETRIC


# --- The options ------------------------------------------------------------------------------------------------------


def wrapped(case, wrap):
    return Case(wrap(case.model), wrap(case.guide), case.args, case.parameters, case.plate)


def masked(case):
    mask = torch.arange(BATCH) % 3 != 0 if case.plate else torch.tensor(True)
    return wrapped(case, lambda program: poutine.mask(program, mask=mask))


def conditioned(case):
    """The latents are given to the model; the guide has none."""
    torch.manual_seed(5)
    values = {name: site["value"].detach() for name, site in sampled(poutine.trace(case.guide).get_trace(*case.args))}
    model = poutine.condition(case.model, data=values)
    return Case(model, poutine.block(case.guide, hide=list(values)), case.args, case.parameters, case.plate)


def conditioned_on_x(case):
    """The model is run without data, and conditioned on them."""
    x = case.args[0]
    model = poutine.condition(case.model_on(x), data={"x": x})
    return Case(model, case.guide, case.args, case.parameters, case.plate)


@dataclass
class Option:
    change: Callable[[Case], Case] = lambda case: case
    make: dict[str, Any] = field(default_factory=dict)  # arguments of the case
    elbo: dict[str, Any] = field(default_factory=dict)  # arguments of the loss


VECTORISED = {"num_particles": 3, "vectorize_particles": True}
OPTIONS = {
    "plain": Option(),
    "particles": Option(elbo={"num_particles": 3}),
    "vectorised": Option(elbo=VECTORISED),
    "subsampled": Option(make={"data_size": DATA_SIZE}),
    "scale": Option(lambda case: wrapped(case, lambda program: poutine.scale(program, scale=0.3))),
    "mask": Option(masked),
    "condition z": Option(conditioned),
    "condition x": Option(conditioned_on_x),
    "vectorised, subsampled, mask": Option(masked, {"data_size": DATA_SIZE}, VECTORISED),
}


# --- Formulas ---------------------------------------------------------------------------------------------------------


def sampled(trace):
    return [(name, site) for name, site in prune_subsample_sites(trace).nodes.items() if site["type"] == "sample"]


def nb(z, r, logits):
    log = torch.nn.functional.logsigmoid
    return torch.lgamma(z + r) - torch.lgamma(r) - torch.lgamma(z + 1) + z * log(logits) + r * log(-logits)


def log_mass(d, z):
    """log density, by formulas of its own for the package's distributions, of the batch shape of ``d``."""
    if isinstance(d, Independent):
        inner = log_mass(d.base_dist, z)
        n = d.reinterpreted_batch_ndims
        return inner.sum(tuple(range(-n, 0))) if n else inner
    z = z.double() if isinstance(z, Tensor) else z
    if isinstance(d, (pyro_nbvae.distributions.NegativeBinomial, torch.distributions.NegativeBinomial)):
        return nb(z, d.total_count.double(), d.logits.double())
    if isinstance(d, torch.distributions.Poisson):
        rate = d.rate.double()
        return z * rate.log() - rate - torch.lgamma(z + 1)
    if isinstance(d, ConwayMaxwellPoisson):
        rate, nu = d.rate.double(), d.nu.double()
        k = torch.arange(COUNTS, dtype=torch.float64).reshape(-1, *(1 for _ in rate.shape))
        weight = lambda k: nu * (k * rate.log() - torch.lgamma(k + 1))  # noqa: E731
        return weight(z) - torch.logsumexp(weight(k), 0)
    if isinstance(d, dist.OneHotCategorical):
        return (z * d.logits.double().log_softmax(-1)).sum(-1)
    if isinstance(d, IsotropicNormal):
        return -0.5 * ((z - d.loc.double()) / d.deviation) ** 2 - math.log(d.deviation) - 0.5 * math.log(2 * math.pi)
    return d.log_prob(z)


def kl(q, p):
    """KL, by sums over all counts for counts."""
    if isinstance(q, Independent):
        inner = kl(q.base_dist, p.base_dist)
        n = q.reinterpreted_batch_ndims
        return inner.sum(tuple(range(-n, 0))) if n else inner
    if isinstance(q, dist.OneHotCategorical):
        a, b = (d.logits.double().log_softmax(-1) for d in (q, p))
        return (a.exp() * (a - b)).sum(-1)
    if not getattr(q.support, "is_discrete", False):
        return kl_divergence(q, p).double()
    k = torch.arange(COUNTS, dtype=torch.float64).reshape(-1, *(1 for _ in q.batch_shape))
    a, b = log_mass(q, k), log_mass(p, k)
    return (a.exp() * (a - b)).sum(0)


@dataclass
class Particle:
    """log p of latents and observations and log q, of the shape of the plates (particles first, if vectorised)."""

    observed: Any = 0.0
    prior: Any = 0.0
    pathwise: Any = 0.0  # log q of the sites with rsample
    score: Any = 0.0  # log q of those without
    score_function: Any = 0.0  # the same, masked but not scaled
    kl: Any = 0.0
    sites_with_score: int = 0
    latents: dict[str, Tensor] = field(default_factory=dict)

    @property
    def log_weight(self):
        return self.observed + self.prior - self.pathwise - self.score


def particle(case, with_kl, plate=None, detach=False):
    model, guide = (program if plate is None else plate(program) for program in (case.model, case.guide))
    of_guide = poutine.trace(guide).get_trace(*case.args)
    if detach:
        of_guide.detach_()
    of_model = poutine.trace(poutine.replay(model, trace=of_guide)).get_trace(*case.args)
    guide_sites, found = dict(sampled(of_guide)), Particle()
    total = lambda value, site: scale_and_mask(value, site["scale"], site["mask"])  # noqa: E731
    for name, site in sampled(of_model):
        log_p = total(log_mass(site["fn"], site["value"]), site)
        if site["is_observed"]:
            found.observed = found.observed + log_p
            continue
        of_q = guide_sites[name]
        found.latents[name] = of_q["value"]
        found.prior = found.prior + log_p
        log_q = total(log_mass(of_q["fn"], of_q["value"]), of_q)
        if of_q["fn"].has_rsample:
            found.pathwise = found.pathwise + log_q
        else:
            found.score = found.score + log_q
            found.score_function = found.score_function + scale_and_mask(
                log_mass(of_q["fn"], of_q["value"]), 1.0, of_q["mask"]
            )
            found.sites_with_score += 1
        if with_kl:
            found.kl = found.kl + total(kl(of_q["fn"], site["fn"]), of_q)
    return found


def particles(case, number, vectorised, with_kl=False, detach=False):
    """All particles in one list; vectorised ones as one with a dimension for them on the left."""
    if not vectorised or number == 1:
        return [particle(case, with_kl, detach=detach) for _ in range(number)]
    dim = -2 if case.plate else -1
    plate = pyro.plate("num_particles_vectorized", number, dim=dim)
    return [particle(case, with_kl, plate, detach)]


def stacked(found, name):
    """An attribute of all particles, (particles, ...)."""
    values = [getattr(each, name) + torch.zeros_like(each.log_weight) for each in found]
    return torch.stack(values) if len(values) > 1 else values[0]


def by_trace(case, number=1, vectorised=False):
    """E_q[log q - log p] at the draw, with the score function of each observation's cost where there is no rsample."""
    found = particles(case, number, vectorised)
    loss = -sum(each.log_weight.sum() for each in found) / number
    surrogate = 0.0
    for each in found:
        score = each.score_function * torch.as_tensor(each.log_weight).detach()
        surrogate = surrogate + (each.observed + each.prior - each.pathwise + score).sum()
    return loss, -surrogate / number


def by_kl(case, number=1, vectorised=False):
    """-log p(x | z) + KL."""
    found = particles(case, number, vectorised, with_kl=True)
    loss = sum((each.kl - each.observed).sum() for each in found) / number
    return loss, loss


def by_tmc(case, number=1, vectorised=False):
    """Of one sample of each site: log(w * q / stop(q)), so no gradient of log q where there is no rsample."""
    found = particles(case, number, vectorised)
    loss = -sum(each.log_weight.sum() for each in found) / number
    return loss, -sum((each.observed + each.prior - each.pathwise).sum() for each in found) / number


def by_renyi(alpha):
    """log mean w^(1 - alpha) / (1 - alpha) of each observation; the gradient of the bound that this estimates."""

    def formula(case, number=1, vectorised=False):
        found = particles(case, number, vectorised)
        if number == 1:
            weight, inner = found[0].log_weight[None], found[0]
            pieces = [torch.as_tensor(getattr(inner, n))[None] for n in ("observed", "prior", "pathwise", "score")]
        else:
            weight = stacked(found, "log_weight")
            pieces = [stacked(found, n) for n in ("observed", "prior", "pathwise", "score")]
        powers = (1 - alpha) * weight.detach()
        mean = torch.logsumexp(powers, 0) - math.log(number)
        log_p, q, score = pieces[0] + pieces[1], pieces[2], pieces[3]
        surrogate = log_p - q + alpha / (1 - alpha) * score
        return -mean.sum() / (1 - alpha), -((powers - mean).exp() * surrogate).sum() / number

    return formula


def by_tail(case, number=3, vectorised=True):
    """The particles' log weights, summed over everything, by rank as Pyro ranks them; Pyro divides by their number."""
    found = particles(case, number, True)
    weight = stacked(found, "log_weight").reshape(number, -1).sum(-1)
    gamma = 1 / (weight.argsort() + 1.0).detach()
    return None, -(weight * gamma).sum() / gamma.sum() / number


def by_wake_sleep(case, number=3, vectorised=True):
    """Minus the log mean weight for the model, and minus log q at the draws by normalised weight for the guide."""
    found = particles(case, number, vectorised, detach=True)
    log_p = stacked(found, "observed") + stacked(found, "prior")
    log_q = stacked(found, "pathwise") + stacked(found, "score")
    log_p, log_q = (v.reshape(number, -1).sum(-1) for v in (log_p, log_q))
    weight = log_p - log_q.detach()
    theta = -(torch.logsumexp(weight, 0) - math.log(number))
    loss = theta - (weight.softmax(0).detach() * log_q).sum()
    return loss, loss


def by_mmd(case, number=3, vectorised=True):
    """-log p(x | z) and the MMD of the sites' draws with draws of the prior, each particle one point."""
    likelihood, ours, theirs = 0.0, {}, {}
    together, dim = vectorised and number > 1, -2 if case.plate else -1
    plate = pyro.plate("num_particles_vectorized", number, dim=dim) if together else None
    for _ in range(1 if vectorised else number):
        one = particle(case, False, plate)
        prior = dict(sampled(poutine.trace(plate(case.model) if plate else case.model).get_trace(*case.args)))
        likelihood = likelihood + one.observed.sum() / number
        for name, value in one.latents.items():
            ours.setdefault(name, []).append(value.reshape(number if plate else 1, -1))
            theirs.setdefault(name, []).append(prior[name]["value"].reshape(number if plate else 1, -1))
    loss = -likelihood
    kernel = lambda a, b: torch.exp(-0.5 * (a[:, None] - b).square().sum(-1) / SCALE**2).mean()  # noqa: E731
    for name in ours:
        z, y = torch.cat(ours[name]), torch.cat(theirs[name])
        loss = loss + 10.0 * (kernel(y, y) + kernel(z, z) - 2 * kernel(y, z))
    return loss, loss


SCALE = 5.0


# --- The losses -------------------------------------------------------------------------------------------------------


def mmd(**options):
    kernel = RBF(1, lengthscale=torch.tensor(SCALE))
    kernel.active_dims = slice(None)  # all numbers of a site together
    return Trace_MMD(kernel, mmd_scale=10.0, **{"vectorize_particles": False, **options})


@dataclass
class Loss:
    make: Callable[..., Any]
    formula: Callable[..., tuple[Tensor | None, Tensor]]
    least: dict[str, Any] = field(default_factory=dict)  # options that it needs
    compiled: bool = False
    runs_before: int = 0  # runs of both programs at every call, before those of the estimate
    # the most score-function sites for which its estimator is the formula's, on the same numbers
    exact_to: int = 99
    mean_only: bool = False
    in_mean_else: bool = False  # where it draws more numbers than the formula, the means are compared


MANY = {"num_particles": 3}
LOSSES = {
    "Trace_ELBO": Loss(Trace_ELBO, by_trace),
    "TraceGraph_ELBO": Loss(TraceGraph_ELBO, by_trace, exact_to=1),
    "TraceEnum_ELBO": Loss(TraceEnum_ELBO, by_trace, exact_to=0),
    "TraceTMC_ELBO": Loss(TraceTMC_ELBO, by_tmc, exact_to=0),
    "TraceMeanField_ELBO": Loss(TraceMeanField_ELBO, by_kl),
    "AnalyticKL_ELBO": Loss(AnalyticKL_ELBO, by_kl),
    "MonteCarloKL_ELBO(1)": Loss(lambda **o: MonteCarloKL_ELBO(1, **o), by_trace, in_mean_else=True),
    "MonteCarloKL_ELBO(5)": Loss(lambda **o: MonteCarloKL_ELBO(5, **o), by_trace, mean_only=True),
    "RenyiELBO(0)": Loss(lambda **o: RenyiELBO(0, **{"num_particles": 1, **o}), by_renyi(0)),
    "RenyiELBO(0.5)": Loss(lambda **o: RenyiELBO(0.5, **{"num_particles": 1, **o}), by_renyi(0.5)),
    "RenyiELBO(0, 3)": Loss(lambda **o: RenyiELBO(0, **o), by_renyi(0), MANY),
    "RenyiELBO(0.5, 3)": Loss(lambda **o: RenyiELBO(0.5, **o), by_renyi(0.5), MANY),
    "TraceTailAdaptive_ELBO": Loss(TraceTailAdaptive_ELBO, by_tail, VECTORISED),
    "ReweightedWakeSleep": Loss(
        lambda **o: ReweightedWakeSleep(**{"vectorize_particles": False, **o}), by_wake_sleep, MANY
    ),
    "Trace_MMD": Loss(mmd, by_mmd, MANY),
    "JitTrace_ELBO": Loss(JitTrace_ELBO, by_trace, compiled=True),
    "JitTraceGraph_ELBO": Loss(JitTraceGraph_ELBO, by_trace, compiled=True, exact_to=1),
    "JitTraceMeanField_ELBO": Loss(JitTraceMeanField_ELBO, by_kl, compiled=True, runs_before=2),
    "JitTraceEnum_ELBO": Loss(JitTraceEnum_ELBO, by_trace, compiled=True, exact_to=0),
}
# slow, or the same as another
SKIPPED = {("MonteCarloKL_ELBO(5)", option) for option in OPTIONS if option not in ("plain", "mask")}
SKIPPED |= {(f"RenyiELBO({a}, 3)", "particles") for a in ("0", "0.5")}
SKIPPED |= {(loss, option) for loss in ("RenyiELBO(0)", "RenyiELBO(0.5)") for option in OPTIONS if OPTIONS[option].elbo}
SKIPPED |= {(loss, "particles") for loss in ("TraceTailAdaptive_ELBO", "ReweightedWakeSleep", "Trace_MMD")}
SKIPPED |= {("TraceTailAdaptive_ELBO", "vectorised"), ("ReweightedWakeSleep", "condition z")}  # without q it raises
SKIPPED |= {(loss, option) for loss in LOSSES for option in ("particles", "condition x") if loss.startswith("Jit")}


def gradient(parameters, value=None):
    """The gradients that ``value`` has, or that the parameters hold, as one flat tensor for each parameter."""
    if value is not None:
        for p in parameters.values():
            p.grad = None
        if torch.as_tensor(value).requires_grad:
            value.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for n, p in parameters.items()}


def of_loss(elbo, case, seed):
    """Pyro's loss and gradient."""
    for p in case.parameters.values():
        p.grad = None
    torch.manual_seed(seed)
    value = elbo.loss_and_grads(case.model, case.guide, *case.args)
    value = sum(value) if isinstance(value, tuple) else value
    return float(value), gradient(case.parameters)


def of_formula(loss, case, options, seed):
    torch.manual_seed(seed)
    for _ in range(1 + loss.runs_before):
        value, surrogate = loss.formula(
            case, options.get("num_particles", 1), options.get("vectorize_particles", False)
        )
    return None if value is None else float(value), gradient(case.parameters, surrogate)


def differences(got, want):
    """The worst relative difference of a gradient, and where; relative to the largest derivative of the parameter."""
    most = max(float(g.abs().max()) for g in want.values())
    worst, where = 0.0, ""
    for name, w in want.items():
        scale = float(w.abs().max()) + 1e-3 * most + 1e-12
        off = float((got[name].double() - w.double()).abs().max()) / scale
        if not off <= worst:
            worst, where = off, f"{name}: {pick(got[name], w)}"
    return worst, where


def pick(got, want):
    i = int((got - want).abs().flatten().nan_to_num(torch.inf).argmax())
    return f"{float(got.flatten()[i]):.5g} for {float(want.flatten()[i]):.5g}"


def in_mean(elbo, loss, case, options, draws):
    """The largest difference of mean gradients, in standard errors, and where."""
    flat = lambda g: torch.cat([v.flatten().double() for v in g.values()])  # noqa: E731
    ours = torch.stack([flat(of_loss(elbo, case, 1000 + s)[1]) for s in range(draws)])
    want = torch.stack([flat(of_formula(loss, case, options, 500_000 + s)[1]) for s in range(draws)])
    error = ((ours.var(0) + want.var(0)) / draws).sqrt() + 1e-7 * (1 + want.abs().max())
    off = (ours.mean(0) - want.mean(0)) / error
    i = int(off.abs().argmax())
    return float(off[i].abs()), f"{float(ours.mean(0)[i]):.5g} for {float(want.mean(0)[i]):.5g}"


def plan(case_name, loss_name, option_name):
    """Whether a combination exists."""
    option = OPTIONS[option_name]
    if (loss_name, option_name) in SKIPPED:
        return False
    programs = case_name.startswith(("example hierarchy", "example state")) or "relaxed prior" in case_name
    if case_name.startswith("example state") and option_name == "condition z":
        return False  # its model has no parameters
    return not (programs and (option.make or option_name == "condition x"))


def run(case_name, loss_name, option_name):
    """Return one line that begins with ok, WRONG, refused or ERROR."""
    loss, option = LOSSES[loss_name], OPTIONS[option_name]
    pyro.clear_param_store()
    case = option.change(CASES[case_name](**option.make))
    options = {**loss.least, **option.elbo}
    elbo_options = dict(options)
    if (
        options.get("vectorize_particles")
        or loss.make in (TraceEnum_ELBO, JitTraceEnum_ELBO, TraceTMC_ELBO)
        or loss_name == "Trace_MMD"
    ):
        elbo_options["max_plate_nesting"] = 1 if case.plate else 0
    elbo = loss.make(**elbo_options)
    torch.manual_seed(1)
    one = particle(case, False) if not options.get("vectorize_particles") else particles(case, 3, True)[0]
    # TraceGraph_ELBO leaves out what does not depend on a site, if there is another
    sites = one.sites_with_score * (1 + 9 * (len(one.latents) > 1))
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        try:
            if loss.compiled:
                elbo.ignore_jit_warnings = True
                of_loss(elbo, case, 3)  # compiles
                with torch.no_grad():  # other parameters than those it was compiled with
                    for p in case.parameters.values():
                        p += 0.05 * torch.randn_like(p)
            value, got = of_loss(elbo, case, 7)
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            known = isinstance(error, (ValueError, TypeError, NotImplementedError)) and any(
                re.search(r, line) for r in REFUSALS
            )
            return f"refused: {line}" if known else f"ERROR: {type(error).__name__}: {line}"
        if sites <= loss.exact_to and not loss.mean_only:
            wanted, want = of_formula(loss, case, options, 7)
            off, where = differences(got, want)
            tolerance = COMPILED_TOLERANCE if loss.compiled else TOLERANCE
            same = wanted is None or abs(value - wanted) <= 2e-4 * max(1.0, abs(wanted))
            if not loss.in_mean_else or (same and off <= tolerance):
                if not same:
                    return f"WRONG: loss {value:.6g} for {wanted:.6g}; gradient off by {off:.2g}, {where}"
                return "ok" if off <= tolerance else f"WRONG: gradient off by {off:.2g}, {where}"
        off, where = in_mean(elbo, loss, case, options, DRAWS)
        if off > SIGMAS:  # again, with more
            off, where = in_mean(elbo, loss, case, options, 4 * DRAWS)
        return f"ok (mean, {off:.1f} s.e.)" if off <= SIGMAS else f"WRONG: mean off by {off:.1f} s.e., {where}"
