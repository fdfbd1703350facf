"""The registry of variants: from a name to its model, guide and ELBO estimator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro.infer
from pyro.infer import ELBO

from pyro_nbvae import infer
from pyro_nbvae.distributions import ArrivalTimes, GumbelSoftmax, Integer, Relaxation
from pyro_nbvae.distributions.relaxations.base import check_relaxation
from pyro_nbvae.errors import InputError
from pyro_nbvae.guides import (
    CategoricalGuide,
    ConwayMaxwellPoissonGuide,
    GaussianGuide,
    LaplaceGuide,
    NegativeBinomialGuide,
    PoissonGuide,
    ScaledGaussianGuide,
)
from pyro_nbvae.infer import AnalyticKL_ELBO, MonteCarloKL_ELBO
from pyro_nbvae.models import (
    CategoricalModel,
    GaussianModel,
    LaplaceModel,
    NegativeBinomialModel,
    PoissonModel,
    ScaledGaussianModel,
)
from pyro_nbvae.study.errors import check_member
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel


@dataclass(frozen=True)
class Variant:
    """The parts of a variant.

    An argument that ``functools.partial`` fixes in ``model``, ``guide`` or ``estimator`` is the variant's own choice:
    the configuration does not change it.

    Args:
        model: makes a :class:`~pyro_nbvae.vae.GenerativeModel`; called with the event shape, the number of latents, and
            ``decoder`` and ``likelihood`` by keyword.
        guide: makes an :class:`~pyro_nbvae.vae.AmortizedGuide`; called with the model, and with ``encoder`` and
            ``relaxation`` by keyword.
        estimator: a class of ELBO, Pyro's or this package's; ``--estimator`` selects another.
        relaxation: the default relaxation, whose options a run's configuration sets; None leaves it to the guide.
        any_relaxation: whether the configuration may choose another relaxation.
        options: more arguments of the guide.
        settings: fields of the configuration that are passed to the model.
        defaults: configuration fields, of those whose default is None, that the variant decides if no flag does,
            except under the preset ``paper``.

    Raises:
        TypeError: for a relaxation that is not a :class:`~pyro_nbvae.distributions.Relaxation`.

    Example::

        >>> VARIANTS["CMP"].guide.__name__
        'ConwayMaxwellPoissonGuide'
    """

    model: Callable[..., GenerativeModel]
    guide: Callable[..., AmortizedGuide]
    estimator: Callable[..., ELBO] = AnalyticKL_ELBO
    relaxation: Relaxation | None = None
    any_relaxation: bool = False
    options: Mapping[str, object] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_relaxation(self.relaxation)


LEARNED_PRIOR = ("prior_mean",)


def _nb(estimator: Callable[..., ELBO], relaxation: Relaxation, **options: object) -> Variant:
    return Variant(
        NegativeBinomialModel, NegativeBinomialGuide, estimator, relaxation, True, options, settings=LEARNED_PRIOR
    )


VARIANTS: dict[str, Variant] = {
    "MC-G": _nb(MonteCarloKL_ELBO, GumbelSoftmax()),
    "MC-C": _nb(MonteCarloKL_ELBO, ArrivalTimes()),
    "DS-G": _nb(AnalyticKL_ELBO, GumbelSoftmax(), shared_dispersion=True),
    "DS-C": _nb(AnalyticKL_ELBO, ArrivalTimes(), shared_dispersion=True),
    "EX-G": _nb(AnalyticKL_ELBO, GumbelSoftmax()),
    "EX-C": _nb(AnalyticKL_ELBO, ArrivalTimes()),
    "EX-I": _nb(AnalyticKL_ELBO, Integer()),
    "DS-I": _nb(AnalyticKL_ELBO, Integer(), shared_dispersion=True),
    "CMP": Variant(NegativeBinomialModel, ConwayMaxwellPoissonGuide, relaxation=Integer(), settings=LEARNED_PRIOR),
    "P-NB": Variant(
        NegativeBinomialModel,
        PoissonGuide,
        relaxation=Integer(),
        any_relaxation=True,
        options={"initial_output_scale": 0.5},
        settings=LEARNED_PRIOR,
    ),
    "P-VAE": Variant(
        PoissonModel, PoissonGuide, relaxation=ArrivalTimes(), any_relaxation=True, settings=LEARNED_PRIOR
    ),
    "G-VAE": Variant(GaussianModel, GaussianGuide),
    "GS-VAE": Variant(ScaledGaussianModel, ScaledGaussianGuide),
    "L-VAE": Variant(LaplaceModel, LaplaceGuide),
    "C-VAE": Variant(CategoricalModel, CategoricalGuide, relaxation=GumbelSoftmax(), settings=("categories",)),
}


def register_variant(name: str, variant: Variant) -> None:
    """Register a variant under a name, for ``--variant`` and everywhere else.

    Args:
        name: its name; an existing variant of this name is replaced.
        variant: its parts.

    Example::

        >>> import dataclasses
        >>> sampled = dataclasses.replace(VARIANTS["P-VAE"], estimator=pyro.infer.Trace_ELBO)
        >>> register_variant("P-VAE, sampled KL", sampled)
        >>> variant("P-VAE, sampled KL").estimator.__name__
        'Trace_ELBO'
    """
    VARIANTS[name] = variant


def variant(name: str) -> Variant:
    """Return the variant with this name.

    Args:
        name: a key of ``VARIANTS``.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.

    Example::

        >>> variant("CMP").estimator.__name__
        'AnalyticKL_ELBO'
    """
    check_member("variant", name, VARIANTS, "; for a variant of your own, import its module: nbvae --import MODULE ...")
    return VARIANTS[name]


_ESTIMATORS = (
    "choose AnalyticKL_ELBO, MonteCarloKL_ELBO or one of Pyro's, such as Trace_ELBO, TraceMeanField_ELBO, "
    "TraceGraph_ELBO or RenyiELBO"
)
# Pyro's losses that a run cannot have, and why.
_REFUSED = {
    pyro.infer.ReweightedWakeSleep: "it has two losses, one for the model and one for the guide",
    pyro.infer.JitTrace_ELBO: "a traced loss is for batches of one size",
    pyro.infer.JitTraceGraph_ELBO: "a traced loss is for batches of one size",
    pyro.infer.JitTraceMeanField_ELBO: "a traced loss is for batches of one size",
    pyro.infer.JitTraceEnum_ELBO: "a traced loss is for batches of one size",
}


def estimator(name: str) -> Callable[..., ELBO]:
    """Return the ELBO class with this name, this package's or Pyro's.

    Args:
        name: name of the class, such as ``"AnalyticKL_ELBO"`` or ``"Trace_ELBO"``.

    Raises:
        ValueError: for an unknown name.

    Example::

        >>> estimator("Trace_ELBO").__name__
        'Trace_ELBO'
    """
    found: Any = getattr(infer, name, None) or getattr(pyro.infer, name, None)
    if not (isinstance(found, type) and issubclass(found, ELBO)) or found in (ELBO, infer.SiteKL_ELBO):
        raise InputError(f"unknown estimator {name!r}: {_ESTIMATORS}")
    check_estimator(found)
    if found is pyro.infer.TraceEnum_ELBO:  # a variant of a user's own may have it, for latents that can be
        raise InputError(f"{name} cannot train a run, no latent of the built-in variants is enumerated: {_ESTIMATORS}")
    return found


def check_estimator(kind: type) -> None:
    """Raise InputError for one of Pyro's losses that ``nbvae train`` cannot minimise."""
    for refused, reason in _REFUSED.items():
        if issubclass(kind, refused):
            raise InputError(f"{kind.__name__} cannot train a run, {reason}: {_ESTIMATORS}")
