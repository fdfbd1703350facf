r"""ELBO estimators that write the KL of each latent site out: in closed form, or by Monte Carlo.

Both estimate

.. math:: E_q[\log p(x \mid z)] - w \sum_i KL(q(z_i) \,\|\, p(z_i)), \qquad w = \mathtt{kl\_weight},

with one run of the model a particle, and take the place of Pyro's ELBOs wherever Pyro takes a loss. Where Trace_ELBO is
defined they agree with it in expectation, ``poutine.scale``, ``poutine.mask``, subsampling and auxiliary sites of the
guide (``infer={"is_auxiliary": True}``) included. A guide site that is a Delta (AutoDelta, and what other autoguides
make of their latent) enters by its log density.

With relaxed latents the reconstruction is the relaxed program's; the KL of AnalyticKL_ELBO is that of the counts
themselves. Use exact latents (``relaxation=None``) for a bound on log p(x) of the count model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro import poutine, validation_enabled
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.infer.util import is_validation_enabled, torch_item
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor
from torch.distributions import HalfNormal, Independent, TransformedDistribution, kl_divergence

from pyro_nbvae.distributions.kl import negative_binomial_log_ratio
from pyro_nbvae.distributions.negative_binomial import RelaxedNegativeBinomial

Site = dict[str, Any]


def family(distribution: Any) -> str:
    """The name of a distribution's class; of a wrapped one, the wrapper's too, unless it only makes an event of it."""
    if isinstance(distribution, Independent):
        return family(distribution.base_dist)
    name = type(distribution).__name__
    base = getattr(distribution, "base_dist", None)
    return name if base is None or not isinstance(distribution, MaskedDistribution) else f"{name} of {family(base)}"


def _sampled(trace: Any) -> dict[str, Site]:
    """Name to site of what a trace samples or observes."""
    return {k: s for k, s in trace.nodes.items() if s["type"] == "sample"}


def _latents(trace: Any) -> dict[str, Site]:
    """Name to site of what a trace samples and does not observe."""
    return {k: s for k, s in _sampled(trace).items() if not s["is_observed"]}


def _base(distribution: Any) -> Any:
    while isinstance(distribution, (Independent, MaskedDistribution)):
        distribution = distribution.base_dist
    return distribution


def _unmasked(site: Site) -> Site:
    """The site with the mask of its distribution, if it has one, as a mask of the site."""
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


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and torch.equal(a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _total(value: Tensor, site: Site) -> Tensor:
    return scale_and_mask(value, site["scale"], site["mask"]).sum()


def _unchecked(distribution: Any) -> Any:
    """A copy that does not check its support."""
    d = copy.copy(distribution)
    d._validate_args = False
    for part in ("base_dist", "_component_distribution"):
        if hasattr(d, part):
            setattr(d, part, _unchecked(getattr(d, part)))
    return d


def log_mass(distribution: Any, value: Tensor) -> Tensor:
    """``log_prob``, at relaxed counts too: where the support is integers, the mass continued between its bounds.

    Raises:
        ValueError: with validation on, for values out of the support's bounds.
    """
    base = _base(distribution)
    support: Any = getattr(base, "support", None)
    if not (getattr(support, "is_discrete", False) and support.event_dim == 0):
        return distribution.log_prob(value)
    low, high = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    if base._validate_args and not bool(
        ((value >= (-torch.inf if low is None else low)) & (value <= (torch.inf if high is None else high))).all()
    ):
        raise ValueError(f"counts out of the support of {family(distribution)}, {low} to {high}: {value}")
    return _unchecked(distribution).log_prob(value)


def _log_mass_at(name: str, distribution: Any, value: Tensor) -> Tensor:
    try:
        return log_mass(distribution, value)
    except ValueError as error:
        raise ValueError(f"site {name!r}: {error}") from error


def _negative_binomial_log_ratio(name: str, q: Any, p: Any, samples: list[Tensor]) -> Tensor:
    """log q - log p, summed over samples."""
    a, b = _base(q), _base(p)
    for z in samples if a._validate_args or b._validate_args else ():
        if not bool((z >= 0).all()):
            raise ValueError(f"site {name!r}: counts out of the support of {family(q)}, 0 to inf: {z}")
    ratio = negative_binomial_log_ratio(samples, a.total_count, a.logits, b.total_count, b.logits)
    return ratio.flatten(ratio.dim() - len(q.event_shape)).sum(-1) if q.event_shape else ratio


def _check_sites(model_sites: dict[str, Site], guide_sites: dict[str, Site]) -> None:
    for name, site in model_sites.items():
        if name not in guide_sites:
            raise ValueError(
                f"site {name!r} is sampled by the model ({family(site['fn'])}) and missing in the guide: add it to the "
                "guide, observe it, or, if it is to be summed out, use pyro.infer.TraceEnum_ELBO"
            )
        ours, theirs = guide_sites[name]["fn"].event_shape, site["fn"].event_shape
        if ours != theirs:
            raise ValueError(
                f"site {name!r}: {family(guide_sites[name]['fn'])} of the guide has event shape {tuple(ours)} and "
                f"{family(site['fn'])} of the model has {tuple(theirs)}: make them equal, by .to_event or .expand"
            )


def _check_reparametrised(guide_sites: dict[str, Site]) -> None:
    for name, site in guide_sites.items():
        if not site["fn"].has_rsample:
            raise NotImplementedError(
                f"site {name!r}: {family(site['fn'])} has no rsample, so there is no pathwise gradient: give a count "
                "a relaxation, use pyro.infer.Trace_ELBO (score function) or, to enumerate, pyro.infer.TraceEnum_ELBO"
            )


def _out_of_order(model_sites: Iterable[str], guide_sites: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs (a, b) where the model samples a before b and the guide b before a: p(b) may depend on a, q(a) on b."""
    place = {name: k for k, name in enumerate(guide_sites)}
    names = [name for name in model_sites if name in place]
    return [(a, b) for k, b in enumerate(names) for a in names[:k] if place[a] > place[b]]


class SiteKL_ELBO(Trace_ELBO):
    """An ELBO whose KL is a sum over latent sites. A subclass says what the KL of one site is: :meth:`site_kl`.

    Args:
        kl_weight: factor of the KL, for warm-up; a plain attribute, to be changed between steps.
        **options: those of :class:`pyro.infer.ELBO` (``num_particles``, ``vectorize_particles``, ...).

    Attributes:
        terms: of the last particle (the mean of vectorised ones), detached: the summed log likelihood and the summed
            KL without its weight, in nats.

    Raises:
        ValueError: for a latent site of the model that the guide lacks, or that has another event dimension there; and
            where the premise fails: the guide draws b before a, the model a before b, so that the KL at b may be of a
            p(b | a) whose a depends on b. (:class:`MonteCarloKL_ELBO` has no such premise.)
        NotImplementedError: for a gradient through a site of the guide without ``rsample``.
    """

    terms: tuple[Tensor, Tensor]

    def __init__(self, *, kl_weight: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.kl_weight = kl_weight

    def site_kl(self, name: str, guide_site: Site, model_site: Site) -> Tensor:
        """KL(q || p) of one latent site in nats, of the site's batch shape, without scale and mask.

        Args:
            name: of the site.
            guide_site, model_site: Pyro's records of it; ``["fn"]`` is the distribution, ``["value"]`` the sample.
        """
        raise NotImplementedError

    def _guess_max_plate_nesting(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> None:
        # Relaxed counts may lie outside the support of an exact prior, which Pyro would refuse while it looks.
        with validation_enabled(False):
            super()._guess_max_plate_nesting(model, guide, args, kwargs)

    def _get_trace(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> tuple[Any, Any]:
        # As Pyro does it, but the latent sites' log densities are not computed: the KL takes their place.
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
        """What a site adds to the negative bound: E[s_q log q - s_p log p], s_q and s_p the scales and masks."""
        guide_site, model_site = _unmasked(guide_site), _unmasked(model_site)
        if isinstance(_base(guide_site["fn"]), Delta):
            return self._sampled_term(name, guide_site, model_site)
        term = _total(self.site_kl(name, guide_site, model_site), model_site)
        if not all(_same(guide_site[key], model_site[key]) for key in ("scale", "mask")):
            log_q = _log_mass_at(name, guide_site["fn"], guide_site["value"])
            term = term + _total(log_q, guide_site) - _total(log_q, model_site)
        return term

    def _sampled_term(self, name: str, guide_site: Site, model_site: Site) -> Tensor:
        value = guide_site["value"]
        log_q, log_p = (_log_mass_at(name, site["fn"], value) for site in (guide_site, model_site))
        return _total(log_q, guide_site) - _total(log_p, model_site)

    def _divergence(self, model_trace: Any, guide_trace: Any) -> Tensor:
        """The KL of all latent sites, and the log density of the sites that only the guide has."""
        model_sites, guide_sites = _latents(model_trace), _latents(guide_trace)
        for a, b in _out_of_order(model_sites, guide_sites):
            if not isinstance(_base(guide_sites[b]["fn"]), Delta):
                raise ValueError(
                    f"{type(self).__name__}: the guide draws {b!r} before {a!r} and the model {a!r} before {b!r}, so "
                    f"q({a}) may depend on {b} and the KL of {b!r} be wrong: draw them in the model's order, or use "
                    "MonteCarloKL_ELBO"
                )
        terms = [self._site_term(name, guide_sites[name], site) for name, site in model_sites.items()]
        return sum(terms, self._guide_alone(model_sites, guide_trace))

    def _guide_alone(self, model_sites: dict[str, Site], guide_trace: Any) -> Tensor:
        """The log density of the sites that only the guide has: auxiliary ones, observed ones, factors."""
        sites = [site for name, site in _sampled(guide_trace).items() if name not in model_sites]
        return sum((_total(site["fn"].log_prob(site["value"]), site) for site in sites), torch.zeros(()))

    def _negative_elbo(self, model_trace: Any, guide_trace: Any) -> Tensor:
        observed = [site for site in _sampled(model_trace).values() if site["is_observed"]]
        likelihood = sum((site["log_prob_sum"] for site in observed), torch.zeros(()))
        divergence = self._divergence(model_trace, guide_trace)
        together = self.num_particles if self.vectorize_particles else 1
        self.terms = likelihood.detach() / together, divergence.detach() / together
        return self.kl_weight * divergence - likelihood

    def _average(self, model: Callable, guide: Callable, args: Any, kwargs: Any, differentiable: bool) -> Tensor:
        loss: Any = 0.0
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            if differentiable:
                _check_reparametrised(_latents(guide_trace))
            loss = loss + self._negative_elbo(model_trace, guide_trace) / self.num_particles
        if is_validation_enabled():
            warn_if_nan(loss, "loss")
        return loss

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The negative ELBO in nats, summed over the batch, as a tensor to differentiate.

        Raises:
            NotImplementedError: where a site of the guide has no ``rsample`` (a count without a relaxation).
        """
        return self._average(model, guide, args, kwargs, differentiable=True)

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The negative ELBO in nats as a number; any latents will do, integer counts among them."""
        with torch.no_grad():
            return torch_item(self._average(model, guide, args, kwargs, differentiable=False))

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The negative ELBO in nats; adds its gradient to every parameter's ``grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return torch_item(loss)


def _folds(distribution: Any) -> bool:
    """Whether torch's KL of transformed distributions is wrong for one: its transform is not one to one."""
    if not isinstance(distribution, TransformedDistribution) or isinstance(distribution, HalfNormal):
        return False
    return any(not transform.bijective for transform in distribution.transforms)


class AnalyticKL_ELBO(SiteKL_ELBO):
    """ELBO with the KL that is registered for each pair of latent distributions.

    Unlike Pyro's TraceMeanField_ELBO it never falls back on sampling: what it reports is what it says.

    Raises:
        NotImplementedError: where no KL is registered for the pair, naming both classes.

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
        q, p = guide_site["fn"], model_site["fn"]
        if not any(_folds(_base(d)) for d in (q, p)):
            with contextlib.suppress(NotImplementedError):
                return kl_divergence(q, p)
        raise NotImplementedError(
            f"site {name!r}: there is no KL for {family(q)} (guide) and {family(p)} (model); register one with "
            "torch.distributions.register_kl or use MonteCarloKL_ELBO"
        )


class MonteCarloKL_ELBO(SiteKL_ELBO):
    """ELBO with the KL estimated as the mean of log q(z) - log p(z) over several samples of z, the paper's MC form.

    The first sample is the one that is decoded. On integer counts it is unbiased for the KL; relaxed counts bias it,
    less so at lower temperatures. Where the guide does not draw its sites in the model's order (q(z | x) q(h | z) for
    p(h) p(z | h), say), the samples are of all sites together, each a run of guide and model of its own.

    Args:
        num_samples: samples of each latent for the KL, the paper's 5 by default.

    Raises:
        ValueError: for ``num_samples`` below 1.
    """

    def __init__(self, num_samples: int = 5, *, kl_weight: float = 1.0, **options: Any) -> None:
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples must be a whole number of at least 1, got {num_samples}")
        super().__init__(kl_weight=kl_weight, **options)
        self.num_samples = num_samples

    def site_kl(self, name: str, guide_site: Site, model_site: Site) -> Tensor:
        q, p, z = guide_site["fn"], model_site["fn"], guide_site["value"]
        more = torch.Size([self.num_samples - 1])
        if all(isinstance(_base(d), RelaxedNegativeBinomial) for d in (q, p)):
            return _negative_binomial_log_ratio(name, q, p, [z, *q(more).unbind(0)]) / self.num_samples
        # at the very tensors that were drawn: a flow without an inverse knows their density only
        ratio = _log_mass_at(name, q, z) - _log_mass_at(name, p, z)
        if self.num_samples > 1:
            z = q(more)
            ratio = ratio + (_log_mass_at(name, q, z) - _log_mass_at(name, p, z)).sum(0)
        return ratio / self.num_samples

    def _get_trace(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> tuple[Any, Any]:
        pair = super()._get_trace(model, guide, args, kwargs)
        if _out_of_order(*map(_latents, pair)):
            fresh = [
                super(MonteCarloKL_ELBO, self)._get_trace(model, guide, args, kwargs)
                for _ in range(self.num_samples - 1)
            ]
            pair[0].joint_samples = [pair, *fresh]
        return pair

    def _divergence(self, model_trace: Any, guide_trace: Any) -> Tensor:
        pairs = getattr(model_trace, "joint_samples", None)
        if pairs is None:
            return super()._divergence(model_trace, guide_trace)
        total = torch.zeros(())
        for one_model, one_guide in pairs:
            model_sites, guide_sites = _latents(one_model), _latents(one_guide)
            for name, site in model_sites.items():
                total = total + self._sampled_term(name, _unmasked(guide_sites[name]), _unmasked(site))
            total = total + self._guide_alone(model_sites, one_guide)
        return total / len(pairs)
