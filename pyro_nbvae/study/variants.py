"""The variants: a name to a frozen dataclass that builds model and guide and holds the variant's own options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pyro_nbvae.errors import InputError
from pyro_nbvae.study.errors import check_member
from pyro_nbvae.study.tree import (
    VAE,
    AnnealedArrivalTimes,
    AnnealedCategories,
    AnnealedGumbelSoftmax,
    CountPrior,
    CountRelaxation,
    Fixed,
    IntegerCounts,
    Kind,
    LearnedCounts,
    LearnedScale,
    MixtureOfAutoregressiveCounts,
    MonteCarloKL,
    NormalPrior,
)

if TYPE_CHECKING:
    from pyro_nbvae.vae import AmortizedGuide, GenerativeModel

Pair = tuple["GenerativeModel", "AmortizedGuide"]


def _prior(prior: LearnedCounts) -> dict[str, Any]:
    return {"prior_mean": prior.initial_mean, "prior": prior.joint()}


@dataclass(frozen=True, kw_only=True)
class NegativeBinomialVAE(VAE):
    """Negative binomial posterior and prior."""

    kind: Kind[Literal["negative_binomial"]] = "negative_binomial"
    shared_dispersion: Fixed[bool] = False
    relaxation: CountRelaxation = field(default_factory=AnnealedArrivalTimes)
    prior: CountPrior = field(default_factory=LearnedCounts)

    def build(self, event_shape: tuple[int, ...], latents: int, *, encoder: str, **options: Any) -> Pair:
        from pyro_nbvae.guides import NegativeBinomialGuide
        from pyro_nbvae.models import NegativeBinomialModel

        model = NegativeBinomialModel(event_shape, latents, **_prior(self.prior), **options)
        shared, relaxation = self.shared_dispersion, self.relaxation.build()
        return model, NegativeBinomialGuide(model, encoder=encoder, relaxation=relaxation, shared_dispersion=shared)


@dataclass(frozen=True, kw_only=True)
class ConwayMaxwellPoissonVAE(VAE):
    """COM-Poisson posterior, negative binomial prior."""

    kind: Kind[Literal["com_poisson"]] = "com_poisson"
    prior: CountPrior = field(default_factory=LearnedCounts)

    def build(self, event_shape: tuple[int, ...], latents: int, *, encoder: str, **options: Any) -> Pair:
        from pyro_nbvae.guides import ConwayMaxwellPoissonGuide
        from pyro_nbvae.models import NegativeBinomialModel

        model = NegativeBinomialModel(event_shape, latents, **_prior(self.prior), **options)
        return model, ConwayMaxwellPoissonGuide(model, encoder=encoder)


@dataclass(frozen=True, kw_only=True)
class PoissonVAE(VAE):
    """Poisson posterior and prior."""

    kind: Kind[Literal["poisson"]] = "poisson"
    relaxation: CountRelaxation = field(default_factory=AnnealedArrivalTimes)
    prior: CountPrior = field(default_factory=LearnedCounts)

    def build(self, event_shape: tuple[int, ...], latents: int, *, encoder: str, **options: Any) -> Pair:
        from pyro_nbvae.guides import PoissonGuide
        from pyro_nbvae.models import PoissonModel

        model = PoissonModel(event_shape, latents, **_prior(self.prior), **options)
        return model, PoissonGuide(model, encoder=encoder, relaxation=self.relaxation.build())


@dataclass(frozen=True, kw_only=True)
class OverdispersedPriorVAE(VAE):
    """Poisson posterior, negative binomial prior."""

    kind: Kind[Literal["poisson_negative_binomial"]] = "poisson_negative_binomial"
    relaxation: CountRelaxation = field(default_factory=IntegerCounts)
    prior: CountPrior = field(default_factory=LearnedCounts)

    def build(self, event_shape: tuple[int, ...], latents: int, *, encoder: str, **options: Any) -> Pair:
        from pyro_nbvae.guides import PoissonGuide
        from pyro_nbvae.models import NegativeBinomialModel

        model = NegativeBinomialModel(event_shape, latents, **_prior(self.prior), **options)
        return model, PoissonGuide(model, encoder=encoder, relaxation=self.relaxation.build(), initial_output_scale=0.5)


@dataclass(frozen=True, kw_only=True)
class GaussianVAE(VAE):
    """Gaussian posterior, standard normal prior."""

    kind: Kind[Literal["gaussian"]] = "gaussian"

    def build(self, event_shape: tuple[int, ...], latents: int, *, encoder: str, **options: Any) -> Pair:
        from pyro_nbvae.guides import GaussianGuide
        from pyro_nbvae.models import GaussianModel

        model = GaussianModel(event_shape, latents, **options)
        return model, GaussianGuide(model, encoder=encoder)


@dataclass(frozen=True, kw_only=True)
class ScaledGaussianVAE(VAE):
    """Gaussian posterior, normal prior with a learned scale for each latent."""

    kind: Kind[Literal["scaled_gaussian"]] = "scaled_gaussian"
    prior: NormalPrior = field(default_factory=LearnedScale)

    def build(self, event_shape: tuple[int, ...], latents: int, *, encoder: str, **options: Any) -> Pair:
        from pyro_nbvae.guides import ScaledGaussianGuide
        from pyro_nbvae.models import ScaledGaussianModel

        model = ScaledGaussianModel(event_shape, latents, prior=self.prior.joint(), **options)
        return model, ScaledGaussianGuide(model, encoder=encoder)


@dataclass(frozen=True, kw_only=True)
class LaplaceVAE(VAE):
    """Laplace posterior, standard Laplace prior."""

    kind: Kind[Literal["laplace"]] = "laplace"

    def build(self, event_shape: tuple[int, ...], latents: int, *, encoder: str, **options: Any) -> Pair:
        from pyro_nbvae.guides import LaplaceGuide
        from pyro_nbvae.models import LaplaceModel

        model = LaplaceModel(event_shape, latents, **options)
        return model, LaplaceGuide(model, encoder=encoder)


@dataclass(frozen=True, kw_only=True)
class CategoricalVAE(VAE):
    """Categorical posterior, uniform prior, Gumbel-softmax."""

    kind: Kind[Literal["categorical"]] = "categorical"
    categories: Annotated[int, Field(ge=2, le=10_000)] = 8
    """categories per variable; there are latents / categories variables"""
    relaxation: AnnealedCategories = field(default_factory=AnnealedCategories)

    def build(self, event_shape: tuple[int, ...], latents: int, *, encoder: str, **options: Any) -> Pair:
        from pyro_nbvae.guides import CategoricalGuide
        from pyro_nbvae.models import CategoricalModel

        model = CategoricalModel(event_shape, latents, categories=self.categories, **options)
        return model, CategoricalGuide(model, encoder=encoder, relaxation=self.relaxation.build())


_ARRIVALS, _GUMBEL, _INTEGER = AnnealedArrivalTimes(), AnnealedGumbelSoftmax(), IntegerCounts()
# The variant of whoever chooses none.
DEFAULT = "CMP-MAR"
VARIANTS: dict[str, VAE] = {}
# The types of all registered variants, by the kind that config.json names.
KINDS: dict[str, type[VAE]] = {}


def register_variant(name: str, vae: VAE) -> None:
    """Register a variant, for ``--variant`` and everywhere else.

    Args:
        name: its name; an existing variant of this name is replaced.
        vae: an instance of a frozen dataclass with keyword-only fields, derived from
            :class:`~pyro_nbvae.study.tree.VAE`. Its fields are the options of the variant, on the command line too.

    Raises:
        InputError: if another type has the same ``kind``.

    Example::

        >>> import dataclasses
        >>> register_variant("MC-25", dataclasses.replace(VARIANTS["MC-C"], estimator=MonteCarloKL(kl_samples=25)))
        >>> variant_of("MC-25").estimator.kl_samples
        25
        >>> del VARIANTS["MC-25"]
    """
    kind: str = vae.kind  # type: ignore[attr-defined]
    known = KINDS.setdefault(kind, type(vae))
    if (known.__module__, known.__qualname__) != (type(vae).__module__, type(vae).__qualname__):
        raise InputError(f"kind {kind!r} of {type(vae).__name__} is that of {known.__name__}: give it another")
    KINDS[kind] = type(vae)
    VARIANTS[name] = vae


for _name, _vae in {
    "MC-G": NegativeBinomialVAE(relaxation=_GUMBEL, estimator=MonteCarloKL()),
    "MC-C": NegativeBinomialVAE(relaxation=_ARRIVALS, estimator=MonteCarloKL()),
    "DS-G": NegativeBinomialVAE(relaxation=_GUMBEL, shared_dispersion=True),
    "DS-C": NegativeBinomialVAE(relaxation=_ARRIVALS, shared_dispersion=True),
    "EX-G": NegativeBinomialVAE(relaxation=_GUMBEL),
    "EX-C": NegativeBinomialVAE(relaxation=_ARRIVALS),
    "EX-I": NegativeBinomialVAE(relaxation=_INTEGER),
    "DS-I": NegativeBinomialVAE(relaxation=_INTEGER, shared_dispersion=True),
    "CMP-MAR": ConwayMaxwellPoissonVAE(prior=MixtureOfAutoregressiveCounts()),
    "CMP": ConwayMaxwellPoissonVAE(),
    "P-NB": OverdispersedPriorVAE(),
    "P-VAE": PoissonVAE(),
    "G-VAE": GaussianVAE(),
    "GS-VAE": ScaledGaussianVAE(),
    "L-VAE": LaplaceVAE(),
    "C-VAE": CategoricalVAE(),
}.items():
    register_variant(_name, _vae)


def variant_of(name: str) -> VAE:
    """Return the variant with this name.

    Raises:
        InputError: for an unknown name; the message lists the known ones.

    Example::

        >>> variant_of("CMP").kind
        'com_poisson'
    """
    check_member("variant", name, VARIANTS, "; for a variant of your own, import its module: nbvae --import MODULE ...")
    return VARIANTS[name]
