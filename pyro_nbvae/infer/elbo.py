r"""ELBO estimators with a separate KL for each latent site: in closed form, or by Monte Carlo.

Both estimate

.. math:: E_q[\log p(x \mid z)] - w \sum_i KL(q(z_i) \,\|\, p(z_i)), \qquad w = \mathtt{kl\_weight},

with one run of the model per particle. They can be used wherever Pyro takes an ELBO. Where Trace_ELBO is defined they
agree with it in expectation, also with ``poutine.scale``, ``poutine.mask``, subsampling and auxiliary sites of the
guide (``infer={"is_auxiliary": True}``). A guide site that is a Delta (AutoDelta, and the latent sites of other
autoguides) contributes its log density.

With relaxed latents the reconstruction term is that of the relaxed program; the KL of AnalyticKL_ELBO is that of the
exact counts. For a bound on log p(x) of the count model use integers: ``Integer()``, or exact latents
(``relaxation=None``).

See also: docs/mathematics.md, section 6.2 (Which values are bounds).
"""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypedDict, cast

import torch
from pyro import poutine, validation_enabled
from pyro.distributions import Delta, TorchDistribution, ZeroInflatedDistribution
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.infer.util import is_validation_enabled, torch_item
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor
from torch.distributions import Distribution, HalfNormal, Independent, TransformedDistribution, kl_divergence
from torch.distributions.constraints import Constraint
from torch.distributions.kl import _KL_REGISTRY, _dispatch_kl

from pyro_nbvae.distributions.divergences import negative_binomial_log_q_over_p
from pyro_nbvae.distributions.negative_binomial import RelaxedNegativeBinomial
from pyro_nbvae.distributions.relaxations import Integer
from pyro_nbvae.distributions.tilted import Tilted

# Site of the prior of a likelihood's parameters, outside of the plate.
PARAMETER_PRIOR = "likelihood_prior"
# A model or a guide, and what both are called with.
_Program = Callable[..., object]
_Arguments = tuple[object, ...]
_Options = dict[str, object]
_Rerun = Callable[[], tuple[Trace, Trace]]


class Site(TypedDict):
    """What is read here of Pyro's record of a sample site."""

    name: str
    fn: TorchDistribution
    value: Tensor
    is_observed: bool
    scale: Tensor | float
    mask: Tensor | bool | None
    log_prob_sum: Tensor


def name_of(distribution: object) -> str:
    """Return the name of a distribution's class; a mask around it is named too, an Independent is not."""
    if isinstance(distribution, Independent):
        return name_of(distribution.base_dist)
    name = type(distribution).__name__
    base = getattr(distribution, "base_dist", None)
    return name if base is None or not isinstance(distribution, MaskedDistribution) else f"{name} of {name_of(base)}"


def _sampled(trace: Trace) -> dict[str, Site]:
    """Return the sample sites of a trace by name, observed ones included."""
    return {k: cast(Site, s) for k, s in trace.nodes.items() if s["type"] == "sample"}


def _latents(trace: Trace) -> dict[str, Site]:
    """Return the latent sites of a trace by name: sampled, but not observed."""
    return {k: s for k, s in _sampled(trace).items() if not s["is_observed"]}


def base_distribution(distribution: Distribution) -> Any:
    """Return the distribution inside Independent and MaskedDistribution."""
    while isinstance(distribution, (Independent, MaskedDistribution)):
        distribution = distribution.base_dist
    return distribution


def _unmasked(site: Site) -> Site:
    """Return the site with the mask of its distribution, if it has one, moved to the site."""
    fn, mask = site["fn"], site["mask"]
    while isinstance(fn, MaskedDistribution):
        mask = fn._mask if mask is None else mask & torch.as_tensor(fn._mask)
        fn = fn.base_dist
    inner = fn
    while isinstance(inner, Independent):
        inner = inner.base_dist
    if isinstance(inner, MaskedDistribution):
        raise NotImplementedError(f"site {site['name']!r}: its mask lies inside .to_event(); call .mask() after it")
    return {**site, "fn": fn, "mask": mask}


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and torch.equal(a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _total(value: Tensor, site: Site) -> Tensor:
    return scale_and_mask(value, site["scale"], site["mask"]).sum()


def _unchecked(distribution: Distribution) -> Distribution:
    """Return a copy that does not check its support."""
    d = copy.copy(distribution)
    d._validate_args = False
    for part in ("base_dist", "_component_distribution", "reference"):
        if hasattr(d, part):
            setattr(d, part, _unchecked(getattr(d, part)))
    return d


@contextmanager
def _named(site: str, *errors: type[Exception]) -> Iterator[None]:
    """Context that puts the name of a site before the message of these errors."""
    try:
        yield
    except errors as error:
        raise type(error)(f"site {site!r}: {error}") from error


def _check_bounds(distribution: Distribution, value: Tensor) -> None:
    """With validation on, check that values are within the bounds of a support, integers or not."""
    base = base_distribution(distribution)
    support: Any = base.support
    support = support.base_constraint if isinstance(base, Tilted) else support
    low, high = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    least, most = -torch.inf if low is None else low, torch.inf if high is None else high
    if base._validate_args and not bool(((value >= least) & (value <= most)).all()):
        raise ValueError(f"counts outside the support of {name_of(distribution)}, {low} to {high}: {value}")


def log_mass(distribution: Distribution, value: Tensor) -> Tensor:
    """Return ``log_prob``, also at relaxed counts.

    A mass function on integers is extended to all reals between the bounds of its support.

    Raises:
        ValueError: with validation on, for values outside the bounds of the support.
        NotImplementedError: for a zero-inflated family at values that are not integers.
    """
    base = base_distribution(distribution)
    support: Constraint | None = getattr(base, "support", None)
    joint = isinstance(base, Tilted)
    if support is None or not (support.is_discrete and (joint or support.event_dim == 0)):
        return distribution.log_prob(value)
    if isinstance(base, ZeroInflatedDistribution) and not bool((value == value.round()).all()):
        raise NotImplementedError(
            f"{name_of(distribution)} jumps at 0 and has no mass at relaxed counts: use Integer(), or straight_through"
        )
    _check_bounds(distribution, value)
    return _unchecked(distribution).log_prob(value)


def _negative_binomial_log_q_over_p(q: Distribution, p: Distribution, samples: list[Tensor]) -> Tensor:
    """log q - log p, summed over samples."""
    for distribution, z in itertools.product((q, p), samples):
        _check_bounds(distribution, z)
    a, b = base_distribution(q), base_distribution(p)
    total = negative_binomial_log_q_over_p(samples, a.total_count, a.logits, b.total_count, b.logits)
    return total.flatten(total.dim() - len(q.event_shape)).sum(-1) if q.event_shape else total


def _warn_of_integers(name: str, q: Distribution) -> None:
    if torch.is_grad_enabled() and isinstance(getattr(base_distribution(q), "relaxation", None), Integer):
        warnings.warn(
            f"site {name!r}: the gradient of a sampled KL through Integer() is biased; use AnalyticKL_ELBO, with the "
            "same scale and mask in model and guide, or ArrivalTimes or GumbelSoftmax at a low temperature",
            stacklevel=3,
        )


def _check_sites(model_sites: dict[str, Site], guide_sites: dict[str, Site]) -> None:
    for name, site in model_sites.items():
        if name not in guide_sites:
            enumerable = getattr(site["fn"], "has_enumerate_support", False)
            raise ValueError(
                f"site {name!r} is sampled by the model ({name_of(site['fn'])}) and missing in the guide: add it to "
                f"the guide or observe it{', or use pyro.infer.TraceEnum_ELBO to sum it out' * enumerable}"
            )
        q, p = guide_sites[name]["fn"], site["fn"]
        event_shapes = ("event", tuple(q.event_shape), tuple(p.event_shape))
        for kind, ours, theirs in (event_shapes, ("batch", _leading(q), _leading(p))):
            if ours != theirs:  # one draw would count for several
                raise ValueError(
                    f"site {name!r}: {name_of(q)} of the guide has {kind} shape {ours} and {name_of(p)} of the model "
                    f"has {theirs}: sample both in the same plates, with .to_event or .expand where they differ"
                )


def _check_reparametrised(guide_sites: dict[str, Site]) -> None:
    for name, site in guide_sites.items():
        # without a gradient in its parameters there is none to miss
        if not site["fn"].has_rsample and site["fn"].log_prob(site["value"]).requires_grad:
            enumerable = getattr(site["fn"], "has_enumerate_support", False)
            raise NotImplementedError(
                f"site {name!r}: {name_of(site['fn'])} has no rsample, so there is no pathwise gradient: give a count "
                "a relaxation, or use pyro.infer.Trace_ELBO (score function)"
                f"{' or pyro.infer.TraceEnum_ELBO (enumeration)' * enumerable}"
            )


def _leading(distribution: Distribution) -> tuple[int, ...]:
    """Return the batch shape without its first dimensions of size 1."""
    return tuple(itertools.dropwhile(lambda size: size == 1, distribution.batch_shape))


def _out_of_order(model_sites: Iterable[str], guide_sites: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs (a, b) where the model samples a before b and the guide b before a: p(b) may depend on a, q(a) on b."""
    place = {name: k for k, name in enumerate(guide_sites)}
    names = [name for name in model_sites if name in place]
    return [(a, b) for k, b in enumerate(names) for a in names[:k] if place[a] > place[b]]


class SiteKL_ELBO(Trace_ELBO):
    """Base class of ELBO estimators whose KL is a sum over latent sites; a subclass defines :meth:`site_kl`.

    Args:
        kl_weight: factor of the KL, for warm-up; a plain attribute that may be changed between steps.
        **options: those of :class:`pyro.infer.ELBO` (``num_particles``, ``vectorize_particles``, ...).

    Attributes:
        terms: the log likelihood and the KL without its weight, of the last particle (the mean over vectorised
            particles), in nats, detached, and summed and scaled as in the loss: with a subsampled plate (a model's
            ``data_size``) they stand for all data.

    Raises:
        ValueError: for a latent site of the model that the guide lacks, or that has another event or batch shape there,
            and for a KL that is not of the batch shape. Also if the guide draws b before a and the model a before b:
            the KL at b may then be that of p(b | a) at an a that depends on b. (:class:`MonteCarloKL_ELBO` accepts this
            order.)
        NotImplementedError: for a gradient through a site of the guide without ``rsample``, and for the mass of a
            zero-inflated family at relaxed counts.

    Example::

        >>> import pyro
        >>> class Exact_ELBO(SiteKL_ELBO):
        ...     def site_kl(self, name, guide_site, model_site):
        ...         return kl_divergence(guide_site["fn"], model_site["fn"])
        >>> p, q = pyro.distributions.Normal(0.0, 1.0), pyro.distributions.Normal(1.0, 1.0)
        >>> Exact_ELBO().loss(lambda: pyro.sample("z", p), lambda: pyro.sample("z", q))
        0.5
    """

    terms: tuple[Tensor, Tensor]

    def __init__(self, *, kl_weight: float = 1.0, **options: object) -> None:
        super().__init__(**options)
        self.kl_weight = kl_weight

    def site_kl(self, name: str, guide_site: Site, model_site: Site) -> Tensor:
        """Return KL(q || p) of one latent site in nats, of the site's batch shape, without scale and mask.

        Args:
            name: name of the site.
            guide_site, model_site: Pyro's records of it; ``["fn"]`` is the distribution, ``["value"]`` the sample.
        """
        raise NotImplementedError

    def _guess_max_plate_nesting(self, model: _Program, guide: _Program, args: _Arguments, kwargs: _Options) -> None:
        # Relaxed counts may lie outside the support of an exact prior, which Pyro's validation would reject here.
        with validation_enabled(False):
            super()._guess_max_plate_nesting(model, guide, args, kwargs)

    def _get_trace(self, model: _Program, guide: _Program, args: _Arguments, kwargs: _Options) -> tuple[Trace, Trace]:
        # As in Pyro, but without the log densities of the latent sites: the KL replaces them.
        unwrapped = poutine.unwrap(guide)
        if isinstance(unwrapped, GuideMessenger):  # runs the model itself
            guide(*args, **kwargs)
            model_trace, guide_trace = unwrapped.get_traces()
        else:
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        pruned = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
        _check_sites(_latents(pruned[1]), _latents(pruned[0]))
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        guide_trace, model_trace = pruned
        model_trace.compute_log_prob(site_filter=lambda _, site: site["is_observed"])
        if is_validation_enabled():
            for site in model_trace.nodes.values():
                if site["type"] == "sample" and site["is_observed"]:
                    check_site_shape(site, self.max_plate_nesting)
        return model_trace, guide_trace

    def _site_term(self, name: str, guide_site: Site, model_site: Site) -> Tensor:
        """Return a site's part of the negative bound: E[s_q log q - s_p log p], with scales and masks s_q and s_p."""
        guide_site, model_site = _unmasked(guide_site), _unmasked(model_site)
        if isinstance(base_distribution(guide_site["fn"]), Delta):
            return self._sampled_term(name, guide_site, model_site)
        kl = self.site_kl(name, guide_site, model_site)
        batch_shape = torch.broadcast_shapes(guide_site["fn"].batch_shape, model_site["fn"].batch_shape)
        if kl.shape != batch_shape:
            raise ValueError(
                f"site {name!r}: the KL has shape {tuple(kl.shape)} and the site the batch shape {tuple(batch_shape)}: "
                "site_kl, or the KL that is registered, must return one KL for each of these"
            )
        term = _total(kl, model_site)
        if not all(_same(guide_site[key], model_site[key]) for key in ("scale", "mask")):
            _warn_of_integers(name, guide_site["fn"])
            with _named(name, ValueError, NotImplementedError):
                log_q = log_mass(guide_site["fn"], guide_site["value"])
            term = term + _total(log_q, guide_site) - _total(log_q, model_site)
        return term

    def _sampled_term(self, name: str, guide_site: Site, model_site: Site) -> Tensor:
        value = guide_site["value"]
        with _named(name, ValueError, NotImplementedError):
            log_q, log_p = (log_mass(site["fn"], value) for site in (guide_site, model_site))
        return _total(log_q, guide_site) - _total(log_p, model_site)

    def _divergence(self, model_trace: Trace, guide_trace: Trace, rerun: _Rerun) -> Tensor:
        """Return the KL of all latent sites plus the log density of the sites that only the guide has.

        Args:
            model_trace, guide_trace: of one run of both programs.
            rerun: runs them again, independently, and returns both traces.
        """
        model_sites, guide_sites = _latents(model_trace), _latents(guide_trace)
        for a, b in _out_of_order(model_sites, guide_sites):
            if not isinstance(base_distribution(guide_sites[b]["fn"]), Delta):
                raise ValueError(
                    f"{type(self).__name__}: the guide draws {b!r} before {a!r} and the model {a!r} before {b!r}, so "
                    f"q({a}) may depend on {b} and the KL of {b!r} may be wrong: draw them in the model's order, or "
                    "use MonteCarloKL_ELBO"
                )
        terms = [self._site_term(name, guide_sites[name], site) for name, site in model_sites.items()]
        return sum(terms, self._guide_alone(model_sites, guide_trace))

    def _guide_alone(self, model_sites: dict[str, Site], guide_trace: Trace) -> Tensor:
        """Return the log density of the sites that only the guide has: auxiliary ones, observed ones, factors."""
        sites = [site for name, site in _sampled(guide_trace).items() if name not in model_sites]
        return sum((_total(site["fn"].log_prob(site["value"]), site) for site in sites), torch.zeros(()))

    def _negative_elbo(self, model_trace: Trace, guide_trace: Trace, rerun: _Rerun) -> Tensor:
        observed = [site for site in _sampled(model_trace).values() if site["is_observed"]]
        likelihood = sum((site["log_prob_sum"] for site in observed), torch.zeros(()))
        divergence = self._divergence(model_trace, guide_trace, rerun)
        together = self.num_particles if self.vectorize_particles else 1
        # the prior of a likelihood's parameters is a part of the loss, and of no observation
        prior = sum((site["log_prob_sum"] for site in observed if site["name"] == PARAMETER_PRIOR), torch.zeros(()))
        self.terms = (likelihood - prior).detach() / together, divergence.detach() / together
        return self.kl_weight * divergence - likelihood

    def _particles(
        self, model: _Program, guide: _Program, args: _Arguments, kwargs: _Options, differentiable: bool
    ) -> Iterator[Tensor]:
        """Iterate over the particles' parts of the negative ELBO."""
        run = self._get_vectorized_trace if self.vectorize_particles else self._get_trace
        rerun = functools.partial(run, model, guide, args, kwargs)
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            if differentiable and torch.is_grad_enabled():
                _check_reparametrised(_latents(guide_trace))
            loss = self._negative_elbo(model_trace, guide_trace, rerun) / self.num_particles
            if is_validation_enabled():
                warn_if_nan(loss, "loss")
            yield loss

    def differentiable_loss(self, model: _Program, guide: _Program, *args: object, **kwargs: object) -> Tensor:
        """Return the negative ELBO in nats, summed over the batch, as a tensor to differentiate.

        Args:
            model, guide: Pyro programs.
            *args, **kwargs: arguments of both programs.

        Raises:
            NotImplementedError: if a site of the guide has no ``rsample`` (a count without a relaxation).
            ValueError: as the class.
        """
        total: Any = sum(self._particles(model, guide, args, kwargs, differentiable=True))
        return total

    def loss(self, model: _Program, guide: _Program, *args: object, **kwargs: object) -> float:
        """Return the negative ELBO in nats as a number, for any latents, including integer counts.

        _Arguments and errors as :meth:`differentiable_loss`, but no site needs ``rsample``.
        """
        with torch.no_grad():
            return sum(map(torch_item, self._particles(model, guide, args, kwargs, differentiable=False)))

    def loss_and_grads(self, model: _Program, guide: _Program, *args: object, **kwargs: object) -> float:
        """Return the negative ELBO in nats as a number, and add its gradient to every parameter's ``grad``.

        _Arguments and errors as :meth:`differentiable_loss`.
        """
        total = 0.0
        for loss in self._particles(model, guide, args, kwargs, differentiable=True):
            if loss.requires_grad:  # at once, so that only one particle's graph is kept
                loss.backward(retain_graph=self.retain_graph)
            total += torch_item(loss)
        return total


def _folds(distribution: Distribution) -> bool:
    """Whether torch's KL of transformed distributions would be wrong, because the transform is not one-to-one."""
    distribution = base_distribution(distribution)
    if not isinstance(distribution, TransformedDistribution) or isinstance(distribution, HalfNormal):
        return False
    return any(not transform.bijective for transform in distribution.transforms)


def _is_of_a_package(thing: object) -> bool:
    """Whether a class or function is of torch, Pyro or this library, and not of a user or of an experiment."""
    package, *inside = getattr(thing, "__module__", "torch").split(".")
    return package in ("torch", "pyro", "pyro_nbvae") and inside[:1] != ["experiments"]


def _log_prob_owner(family: Any) -> Any:
    """The class that a user's family has its ``log_prob`` from; for a family of a package's, Distribution."""
    owner = next(c for c in family.__mro__ if "log_prob" in vars(c))
    return Distribution if _is_of_a_package(owner) else owner


def has_own_log_prob(distribution: Distribution) -> bool:
    """Whether a distribution has a ``log_prob`` of a user's."""
    return _log_prob_owner(type(base_distribution(distribution))) is not Distribution


def _has_another_log_prob(q: Distribution, p: Distribution) -> bool:
    """Whether the KL of the pair is registered only for classes above, whose ``log_prob`` a subclass has replaced."""
    of_q, of_p = (type(base_distribution(d)) for d in (q, p))
    a, b = _log_prob_owner(of_q), _log_prob_owner(of_p)
    return not (a is b is Distribution) and not any(
        issubclass(of_q, x) and issubclass(of_p, y) and issubclass(x, a) and issubclass(y, b) for x, y in _KL_REGISTRY
    )


class NoKLError(NotImplementedError):
    """There is no KL for a pair of distributions."""


def registered_kl(q: Distribution, p: Distribution) -> Tensor:
    """Return the KL that is registered for the pair, KL(q || p), of their batch shape.

    Raises:
        NoKLError: if there is none, or if it would be that of folded distributions before they are folded, or of a
            family whose ``log_prob`` a subclass has replaced. An error of a KL that a user registered is not changed.
    """
    if not (_folds(q) or _folds(p) or _has_another_log_prob(q, p)):
        try:
            return kl_divergence(q, p)
        except NotImplementedError:
            # rules of packages are for classes of families, and call other KLs, of which some do not exist
            rule = _dispatch_kl(type(base_distribution(q)), type(base_distribution(p)))
            if not _is_of_a_package(rule):
                raise
    raise NoKLError(
        f"there is no KL for {name_of(q)} (guide) and {name_of(p)} (model); register one with "
        "torch.distributions.register_kl or use MonteCarloKL_ELBO"
    )


def _each(q: Distribution) -> Distribution:
    """Return a distribution of vectors with their elements in the batch shape.

    Raises:
        NoKLError: if they are not independent.
    """
    if not isinstance(q, Independent):
        raise NoKLError(f"the KL from {name_of(q)} to a joint prior needs a posterior of independent latents")
    return q.base_dist


def kl_at(q: Distribution, p: Distribution, z: Tensor) -> Tensor:
    r"""Return KL(q || p) in nats, of the batch shape; of a joint prior, its tilt is taken at a sample.

    .. math:: KL(q \,\|\, p) = \sum_i KL(q_i \,\|\, g_i) - \mathrm{E}_q[\mathrm{tilt}(z)]

    The terms of the sum are exact (:class:`~pyro_nbvae.distributions.Tilted`). With a sample z of q it is unbiased.

    Args:
        q, p: the posterior and the prior.
        z: a sample of q.

    Raises:
        NoKLError: as :func:`registered_kl`.
    """
    joint = base_distribution(p)
    if not isinstance(joint, Tilted):
        return registered_kl(q, p)
    each = _each(q)
    given, tilt = joint.factors(z)
    return registered_kl(each, given.expand(each.batch_shape)).sum(-1) - tilt


class AnalyticKL_ELBO(SiteKL_ELBO):
    """ELBO with the KL that is registered for each pair of latent distributions.

    Unlike Pyro's TraceMeanField_ELBO it never falls back on sampling: the reported KL is always the registered one. Of
    a joint prior (:class:`~pyro_nbvae.distributions.Tilted`) the KLs of the units are exact, and the tilt is taken at
    the sample that is decoded: with integer counts the value is unbiased, and the bias of the gradient through
    :class:`~pyro_nbvae.distributions.Integer` is small (docs/mathematics.md, section 3.6).

    Args:
        kl_weight, **options: as :class:`SiteKL_ELBO`.

    Raises:
        ValueError: as :class:`SiteKL_ELBO`.
        NotImplementedError: if no KL is registered for a pair of distributions, and as :class:`SiteKL_ELBO`.

    See also: docs/mathematics.md, section 6.1 (What each estimates).

    Example::

        >>> import pyro
        >>> from pyro_nbvae.distributions import ArrivalTimes, NegativeBinomial, RelaxedNegativeBinomial
        >>> p = NegativeBinomial(2.0, logits=0.0)
        >>> q = RelaxedNegativeBinomial(2.0, logits=0.5, relaxation=ArrivalTimes(0.24))
        >>> loss = AnalyticKL_ELBO().loss(lambda: pyro.sample("z", p), lambda: pyro.sample("z", q))
        >>> loss == float(kl_divergence(q, p))
        True
    """

    def site_kl(self, name: str, guide_site: Site, model_site: Site) -> Tensor:
        with _named(name, NoKLError):
            return kl_at(guide_site["fn"], model_site["fn"], guide_site["value"])


class MonteCarloKL_ELBO(SiteKL_ELBO):
    r"""ELBO with a Monte Carlo KL, the mean of log q(z) - log p(z) over several samples of z (the paper's MC form).

    .. math:: KL(q \,\|\, p) \approx \frac{1}{S} \sum_{s=1}^{S} \log\frac{q(z_s)}{p(z_s)}, \qquad z_s \sim q

    The first sample is the one that is decoded. With integer counts the estimate is unbiased, but its gradient through
    :class:`~pyro_nbvae.distributions.Integer` is not, which a warning says; relaxed counts bias both, less at lower
    temperatures. If the guide does not draw its sites in the model's order (for example q(z | x) q(h | z) for
    p(h) p(z | h)), each sample is of all sites together, from a separate run of guide and model.

    Args:
        num_samples: number of samples S of each latent for the KL; the default is the paper's.
        kl_weight, **options: as :class:`SiteKL_ELBO`.

    Raises:
        ValueError: for ``num_samples`` below 1, and as :class:`SiteKL_ELBO`, but the order of the sites is free.
        NotImplementedError: as :class:`SiteKL_ELBO`.

    See also: docs/mathematics.md, section 3.5 (Monte Carlo).

    Example::

        >>> import pyro
        >>> p = pyro.distributions.Poisson(3.0)
        >>> MonteCarloKL_ELBO(num_samples=5).loss(lambda: pyro.sample("z", p), lambda: pyro.sample("z", p))
        0.0
    """

    def __init__(self, num_samples: int = 5, *, kl_weight: float = 1.0, **options: object) -> None:
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples must be a whole number of at least 1, got {num_samples}")
        super().__init__(kl_weight=kl_weight, **options)
        self.num_samples = num_samples

    def site_kl(self, name: str, guide_site: Site, model_site: Site) -> Tensor:
        q, p, z = guide_site["fn"], model_site["fn"], guide_site["value"]
        _warn_of_integers(name, q)
        more = torch.Size([self.num_samples - 1])
        with _named(name, ValueError, NotImplementedError):
            # a subclass may have a log_prob of its own
            if all(type(base_distribution(d)) is RelaxedNegativeBinomial for d in (q, p)):
                others = q(more).unbind(0) if self.num_samples > 1 else ()
                return _negative_binomial_log_q_over_p(q, p, [z, *others]) / self.num_samples
            # use the same tensor that was drawn: a flow without an inverse knows the density only there
            log_q_over_p = log_mass(q, z) - log_mass(p, z)
            if self.num_samples > 1:
                z = q(more)
                log_q_over_p = log_q_over_p + (log_mass(q, z) - log_mass(p, z)).sum(0)
            return log_q_over_p / self.num_samples

    def _divergence(self, model_trace: Trace, guide_trace: Trace, rerun: _Rerun) -> Tensor:
        if not _out_of_order(_latents(model_trace), _latents(guide_trace)):
            return super()._divergence(model_trace, guide_trace, rerun)
        total = torch.zeros(())
        for k in range(self.num_samples):
            if k:
                model_trace, guide_trace = rerun()
            model_sites, guide_sites = _latents(model_trace), _latents(guide_trace)
            for name, site in model_sites.items():
                total = total + self._sampled_term(name, _unmasked(guide_sites[name]), _unmasked(site))
            total = total + self._guide_alone(model_sites, guide_trace)
        return total / self.num_samples
