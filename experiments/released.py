r"""CIFAR16 under the losses of an early version of the paper's released code, which are no bounds on log p(x).

python -m experiments.released --scale paper    200 epochs for each row, about 12 seconds an epoch on one core

In that version the encoder returns logits l of q = sigma(l), within +-5, and the posterior has the prior's r. Rates are
Gamma(r) with (1 - q) / q as their *rate*, so that counts are NB(r, l) with mean r e^l, q being the probability of
another count. What takes the place of the KL is of other distributions:

- ``DS-C-early``, with arrival times: the KL of success probability p q from p,

  .. math:: r \left[\log q + \frac{1 - p q}{p q} \log \frac{1 - p q}{1 - p}\right],

  which vanishes as q -> 1, where the mean count is largest: nothing limits the code length;
- ``MC-G-early``, with Gumbel-softmax over the counts 0 to 4, of which evaluations draw one: a term without a gradient
  in the encoder, here 0;
- ``MC-C-early``, with arrival times: the KL between the Gammas of the rates, in closed form here, *summed* over
  latents where the KLs of the others are averaged.

The columns ``KL`` and ``ELBO`` are the true ones, of the distributions that the counts are drawn from; with them a
code length can be compared. A later version of the code has ``DS-C``, ``MC-C`` and ``MC-G`` of this package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Size, Tensor
from torch.distributions import Gamma, kl_divergence, register_kl
from torch.nn.functional import logsigmoid

from pyro_nbvae.distributions import NegativeBinomial, RelaxedNegativeBinomial
from pyro_nbvae.distributions.relaxations.gamma import log_standard_gamma
from pyro_nbvae.experiments import IMAGES, main
from pyro_nbvae.guides import NegativeBinomialGuide
from pyro_nbvae.infer import SiteKL_ELBO
from pyro_nbvae.models import NegativeBinomialModel
from pyro_nbvae.study.evaluation import Metric, register_metric
from pyro_nbvae.study.report import run_script
from pyro_nbvae.study.tables import Table, register_table
from pyro_nbvae.study.tree import (
    VAE,
    AnnealedArrivalTimes,
    AnnealedGumbelSoftmax,
    CountRelaxation,
    Fixed,
    Kind,
    LearnedCounts,
)
from pyro_nbvae.study.variants import register_variant

# The encoder's logits are within these bounds; largest count of Gumbel-softmax; number of log rates in a sum.
LOGIT, MAX_COUNT, NODES = 5.0, 4, 160


def shared_dispersion_term(r: Tensor, logits: Tensor, prior_logits: Tensor) -> Tensor:
    """Return what is called the KL of shared dispersion: of success probability p q from p, for each latent.

    Args:
        r: dispersion.
        logits: logits of q.
        prior_logits: logits of p.
    """
    log_q, log_p, log_other = logsigmoid(logits), logsigmoid(prior_logits), logsigmoid(-prior_logits)
    both = (log_q + log_p).exp()
    # 1 - p q = 1 - q + q (1 - p), which does not round to 0
    log_neither = torch.logaddexp(logsigmoid(-logits), log_q + log_other)
    return r * (log_q + (1 - both) / both * (log_neither - log_other))


def rates_term(r: Tensor, logits: Tensor, prior_logits: Tensor) -> Tensor:
    """Return the KL between the Gammas of the rates, times the number of latents; arguments as above."""
    posterior, prior = (Gamma(r, torch.exp(-each)) for each in (logits, prior_logits))
    return logits.shape[-1] * kl_divergence(posterior, prior)


def no_term(r: Tensor, logits: Tensor, prior_logits: Tensor) -> Tensor:
    """Return 0 for each latent: the encoder has no gradient from this term; arguments as above."""
    return torch.zeros_like(logits)


TERMS = {"shared dispersion": shared_dispersion_term, "rates": rates_term, "none": no_term}
Term = Literal["shared dispersion", "rates", "none"]


class EarlyELBO(SiteKL_ELBO):
    """A loss with one of these terms in place of the KL."""

    def __init__(self, term: Term) -> None:
        super().__init__()
        self.term = term

    def site_kl(self, name: str, guide_site: Any, model_site: Any) -> Tensor:
        q, p = (site["fn"].base_dist for site in (guide_site, model_site))
        return TERMS[self.term](p.total_count, q.logits, p.logits.expand_as(q.logits)).sum(-1)


def _counts(like: Tensor) -> Tensor:
    return torch.arange(MAX_COUNT + 1, device=like.device, dtype=like.dtype)


class CutOffNegativeBinomial(RelaxedNegativeBinomial):
    """Counts from 0 to 4: a Poisson conditional on them, with a Gamma-distributed rate.

    A sample is that of a Gumbel race between their log masses. Masses are sums over 160 values of the log rate.
    """

    def _exact(self, shape: Size) -> Tensor:
        r, logits = self.gamma_poisson(shape)
        log_rate, counts = log_standard_gamma(r) + logits, _counts(r)
        race = counts * log_rate[..., None] - torch.lgamma(counts + 1)
        return torch.distributions.Categorical(logits=race).sample().to(self.dtype)

    @cached_property
    def masses(self) -> Tensor:
        """Masses, of the batch shape and 5 counts."""
        r, logits = self._parameters
        if r.dim() > 1 and r.stride(0) == logits.stride(0) == 0:  # a prior, expanded to a batch
            return CutOffNegativeBinomial(r[0], logits=logits[0], validate_args=False).masses.expand(*r.shape, -1)
        start = torch.maximum(r.log() - 20 / r.sqrt(), torch.full_like(r, -20.0))
        end = torch.log(r + 10 * r.sqrt() + 30).minimum(r.log() + 20 / r.sqrt())
        step, log_gamma = (end - start) / NODES, torch.lgamma(r)
        found = [torch.zeros_like(r) for _ in range(MAX_COUNT + 1)]
        for node in range(NODES):
            log_g = start + (node + 0.5) * step
            rate = torch.exp(log_g + logits)
            powers = [torch.ones_like(rate)]
            for count in range(1, MAX_COUNT + 1):
                powers.append(powers[-1] * rate / count)
            weight = step * torch.exp(r * log_g - log_g.exp() - log_gamma) / sum(powers)
            for total, power in zip(found, powers, strict=True):
                total.addcmul_(weight, power)
        found[0] += torch.special.gammainc(r, start.exp())  # of smaller rates
        masses = torch.stack(found, -1)
        return (masses / masses.sum(-1, keepdim=True)).double().clamp(min=1e-300)

    has_enumerate_support = True

    def enumerate_support(self, expand: bool = True) -> Tensor:
        values = _counts(self.total_count).reshape(-1, *(1 for _ in self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values

    def log_prob(self, value: Tensor) -> Tensor:
        value, _ = torch.broadcast_tensors(value, self.total_count)
        masses = self.masses.expand(*value.shape, -1)
        return masses.gather(-1, value[..., None].long()).squeeze(-1).log().to(self.dtype)

    def cdf(self, value: Tensor) -> Tensor:
        value, _ = torch.broadcast_tensors(value, self.total_count)
        below = self.masses.cumsum(-1).expand(*value.shape, -1)
        return below.gather(-1, value[..., None].long().clamp(0, MAX_COUNT)).squeeze(-1).to(self.dtype)

    def entropy(self) -> Tensor:
        return -torch.xlogy(self.masses, self.masses).sum(-1).to(self.dtype)

    @property
    def mode(self) -> Tensor:
        return self.masses.argmax(-1).to(self.dtype)

    def _moment(self, power: int) -> Tensor:
        return (self.masses * _counts(self.total_count) ** power).sum(-1)

    @property
    def mean(self) -> Tensor:
        return self._moment(1).to(self.dtype)

    @property
    def variance(self) -> Tensor:
        return (self._moment(2) - self._moment(1).square()).to(self.dtype)


@register_kl(CutOffNegativeBinomial, CutOffNegativeBinomial)
@register_kl(CutOffNegativeBinomial, NegativeBinomial)
def _kl(q: CutOffNegativeBinomial, p: NegativeBinomial) -> Tensor:
    counts = _counts(p.total_count).reshape(-1, *(1 for _ in p.batch_shape))
    log_p = p.masses.log() if isinstance(p, CutOffNegativeBinomial) else p.log_prob(counts).movedim(0, -1)
    return (q.masses * (q.masses.log() - log_p)).sum(-1)


class EarlyModel(NegativeBinomialModel):
    """z ~ NB(r, p) or, cut off, the same with counts from 0 to 4."""

    def __init__(self, *arguments: Any, cut_off: bool, **options: Any) -> None:
        self.family = CutOffNegativeBinomial if cut_off else RelaxedNegativeBinomial
        super().__init__(*arguments, **options)

    def factorised_prior(self) -> RelaxedNegativeBinomial:
        return self.family(self.prior.total_count, logits=self.prior.logits)


class EarlyGuide(NegativeBinomialGuide):
    """q(z | x) = NB(r, l(x)) with the prior's r and l within +-5, not relative to the prior's."""

    def __init__(self, model: EarlyModel, **options: Any) -> None:
        self.family = model.family
        super().__init__(model, shared_dispersion=True, **options)

    def posterior_from(self, outputs: tuple[Tensor, ...]) -> RelaxedNegativeBinomial:
        logits = outputs[0].clamp(-LOGIT, LOGIT)
        return self.family(self.prior.total_count, logits=logits, relaxation=self.relaxation)


@dataclass(frozen=True, kw_only=True)
class EarlyEstimator:
    """One of the terms."""

    kind: Kind[Literal["early"]] = "early"
    kl_warmup: float | None = None
    """number of epochs over which the weight of the term rises from 0 to 1. Default: a tenth of the epochs"""
    term: Fixed[Term] = "none"

    def build(self) -> EarlyELBO:
        """Return the estimator."""
        return EarlyELBO(self.term)


@dataclass(frozen=True, kw_only=True)
class EarlyVAE(VAE):
    """Negative binomial VAE of the early version."""

    kind: Kind[Literal["early"]] = "early"
    estimator: EarlyEstimator = field(default_factory=EarlyEstimator)  # type: ignore[assignment]
    relaxation: CountRelaxation = field(default_factory=AnnealedArrivalTimes)
    prior: LearnedCounts = field(default_factory=LearnedCounts)

    def build(self, event_shape: tuple[int, ...], latents: int, *, encoder: str, **options: Any) -> Any:
        cut_off = self.relaxation.kind == "gumbel"
        model = EarlyModel(event_shape, latents, cut_off=cut_off, prior_mean=self.prior.initial_mean, **options)
        return model, EarlyGuide(model, encoder=encoder, relaxation=self.relaxation.build())


_GUMBEL = AnnealedGumbelSoftmax(max_count=MAX_COUNT)
VARIANTS = {
    "DS-C-early": EarlyVAE(estimator=EarlyEstimator(term="shared dispersion")),
    "MC-G-early": EarlyVAE(estimator=EarlyEstimator(term="none"), relaxation=_GUMBEL),
    "MC-C-early": EarlyVAE(estimator=EarlyEstimator(term="rates")),
}
for _name, _vae in VARIANTS.items():
    register_variant(_name, _vae)
register_metric(
    Metric(
        "mean_count",
        "mean count",
        2,
        None,
        lambda e: None if math.isnan(found := float(e.held_out.unit_mean.mean())) else found,
        standard=False,
    )
)

TABLE = Table(
    name="released",
    title="Losses of an early version of the released code, which are no bounds; KL and ELBO are the true ones",
    variants=(*VARIANTS, "P-VAE", "DS-C", "MC-G", "CMP"),
    data=("cifar16",),
    metrics=(*IMAGES, "kl", "elbo", "mean_count", "overdispersion"),
    paper={where: value for where, value in main.TABLE.paper.items() if where[0] == "cifar16"},
)
register_table(TABLE)

if __name__ == "__main__":
    run_script(TABLE)
