"""ELBO estimators with the KL of each latent site written out: in closed form, or by Monte Carlo.

Both estimate  E_q[log p(x | z)] - kl_weight * sum over latent sites of KL(q(z) || p(z)),  with one decode a particle.
Like Pyro's TraceMeanField_ELBO they need a mean-field guide of reparametrised sites: at a latent site of the model no
parent may be a descendant of that site in the guide. Sites that only the guide has (``is_auxiliary``) enter by their
log density. With relaxed latents the reconstruction is the relaxed program's; the KL of AnalyticKL_ELBO is that of the
counts themselves. A bound on log p(x) of the count model is had at temperature 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.infer.util import is_validation_enabled, torch_item
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor
from torch.distributions import kl_divergence


def _family(distribution: Any) -> str:
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return type(distribution).__name__


def _check_reparametrised(guide_trace: Any) -> None:
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample" and not site["fn"].has_rsample:
            raise NotImplementedError(
                f"site {name!r}: {_family(site['fn'])} has no rsample, so there is no pathwise gradient (a count at "
                "temperature 0?); raise the temperature or use pyro.infer.Trace_ELBO"
            )


class SiteKL_ELBO(Trace_ELBO):
    """What the two estimators share; a subclass says what the KL of one latent site is.

    Args:
        kl_weight: factor of the KL, for warm-up; a plain attribute, to be changed between steps.
        **options: those of :class:`pyro.infer.ELBO` (``num_particles``, ``vectorize_particles``, ...).

    Attributes:
        terms: of the last particle, detached: the summed log likelihood and the summed KL without its weight, in nats.
    """

    terms: tuple[Tensor, Tensor]

    def __init__(self, *, kl_weight: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.kl_weight = kl_weight

    def _site_kl(self, name: str, guide_site: dict[str, Any], model_site: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def _get_trace(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> tuple[Any, Any]:
        # As Pyro does it, but the latent sites' log densities are not computed: the KL takes their place.
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
        model_trace.compute_log_prob(site_filter=lambda _, site: site["is_observed"])
        if is_validation_enabled():
            for site in model_trace.nodes.values():
                if site["type"] == "sample" and site["is_observed"]:
                    check_site_shape(site, self.max_plate_nesting)
        return model_trace, guide_trace

    def _negative_elbo(self, model_trace: Any, guide_trace: Any) -> Tensor:
        likelihood, divergence = torch.zeros(()), torch.zeros(())
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample":
                continue
            if site["is_observed"]:
                likelihood = likelihood + site["log_prob_sum"]
            else:
                latent = guide_trace.nodes[name]
                kl = self._site_kl(name, latent, site)
                divergence = divergence + scale_and_mask(kl, latent["scale"], latent["mask"]).sum()
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and name not in model_trace.nodes:
                log_prob = site["fn"].log_prob(site["value"])
                likelihood = likelihood - scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
        self.terms = likelihood.detach(), divergence.detach()
        return self.kl_weight * divergence - likelihood

    def _average(self, model: Callable, guide: Callable, args: Any, kwargs: Any, differentiable: bool) -> Tensor:
        loss: Any = 0.0
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            if differentiable:
                _check_reparametrised(guide_trace)
            loss = loss + self._negative_elbo(model_trace, guide_trace) / self.num_particles
        if is_validation_enabled():
            warn_if_nan(loss, "loss")
        return loss

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The negative ELBO in nats, summed over the batch, as a tensor to differentiate.

        Raises:
            NotImplementedError: where a site of the guide has no ``rsample`` (a count at temperature 0).
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


class AnalyticKL_ELBO(SiteKL_ELBO):
    """ELBO with the KL that is registered for each pair of latent distributions (DESIGN 3.3 and 3.4).

    Unlike Pyro's TraceMeanField_ELBO it never falls back on sampling: what it reports is what it says.

    Raises:
        NotImplementedError: where no KL is registered for the pair, naming both classes.
    """

    def _site_kl(self, name: str, guide_site: dict[str, Any], model_site: dict[str, Any]) -> Tensor:
        q, p = guide_site["fn"], model_site["fn"]
        try:
            return kl_divergence(q, p)
        except NotImplementedError:
            raise NotImplementedError(
                f"site {name!r}: no KL is registered for {_family(q)} (guide) and {_family(p)} (model); register one "
                "with torch.distributions.register_kl or use MonteCarloKL_ELBO"
            ) from None


class MonteCarloKL_ELBO(SiteKL_ELBO):
    """ELBO with the KL estimated as the mean of log q(z) - log p(z) over several samples of z, the paper's MC form.

    The first sample is the one that is decoded. On integer counts (temperature 0) it is unbiased for the KL; relaxed
    counts bias it, less so at lower temperatures.

    Args:
        num_samples: samples of each latent for the KL, the paper's 5 by default.
    """

    def __init__(self, num_samples: int = 5, *, kl_weight: float = 1.0, **options: Any) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        super().__init__(kl_weight=kl_weight, **options)
        self.num_samples = num_samples

    def _site_kl(self, name: str, guide_site: dict[str, Any], model_site: dict[str, Any]) -> Tensor:
        q, p, z = guide_site["fn"], model_site["fn"], guide_site["value"].unsqueeze(0)
        if self.num_samples > 1:
            z = torch.cat([z, q(torch.Size([self.num_samples - 1]))])
        return (q.log_prob(z) - p.log_prob(z)).mean(0)
