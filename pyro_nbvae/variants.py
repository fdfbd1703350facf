"""The registry of variants: a name to the model, the guide and the ELBO estimator that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyro_nbvae.errors import check_member
from pyro_nbvae.guides import CategoricalGuide, GaussianGuide, LaplaceGuide, NegativeBinomialGuide, PoissonGuide
from pyro_nbvae.infer import AnalyticKL_ELBO, MonteCarloKL_ELBO
from pyro_nbvae.infer.elbo import SiteKL_ELBO
from pyro_nbvae.models import CategoricalModel, GaussianModel, LaplaceModel, NegativeBinomialModel, PoissonModel
from pyro_nbvae.vae import AmortizedGuide, ImageModel


@dataclass(frozen=True)
class Variant:
    """What builds a variant. ``options`` go to the guide; ``settings`` are configuration fields for the model.

    ``any_relaxation``: the configuration may choose another relaxation than ``options`` say.
    """

    model: Callable[..., ImageModel]
    guide: Callable[..., AmortizedGuide]
    estimator: Callable[..., SiteKL_ELBO]
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    any_relaxation: bool = False


def _nb(estimator: Callable[..., SiteKL_ELBO], relaxation: str, **options: Any) -> Variant:
    return Variant(NegativeBinomialModel, NegativeBinomialGuide, estimator, {"relaxation": relaxation, **options})


VARIANTS: dict[str, Variant] = {
    "MC-G": _nb(MonteCarloKL_ELBO, "gumbel"),
    "MC-C": _nb(MonteCarloKL_ELBO, "arrival"),
    "DS-G": _nb(AnalyticKL_ELBO, "gumbel", shared_dispersion=True),
    "DS-C": _nb(AnalyticKL_ELBO, "arrival", shared_dispersion=True),
    "EX-G": _nb(AnalyticKL_ELBO, "gumbel"),
    "EX-C": _nb(AnalyticKL_ELBO, "arrival"),
    "P-VAE": Variant(PoissonModel, PoissonGuide, AnalyticKL_ELBO, any_relaxation=True),
    "G-VAE": Variant(GaussianModel, GaussianGuide, AnalyticKL_ELBO),
    "L-VAE": Variant(LaplaceModel, LaplaceGuide, AnalyticKL_ELBO),
    "C-VAE": Variant(CategoricalModel, CategoricalGuide, AnalyticKL_ELBO, {"relaxation": "gumbel"}, ("categories",)),
}


def variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    check_member("variant", name, VARIANTS)
    return VARIANTS[name]
