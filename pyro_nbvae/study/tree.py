"""A run as a tree of frozen dataclasses: every part holds its own options and their defaults.

A default of None depends on the data or on another option; ``study/build.py`` replaces it. Parts build what they
describe. This module imports quickly, because the help of the command line is made from it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import Field
from tyro.conf import Suppress as Fixed
from tyro.conf import Suppress as Kind

from pyro_nbvae.errors import InputError
from pyro_nbvae.study.errors import check_member

if TYPE_CHECKING:
    from pyro.infer import ELBO

    from pyro_nbvae.distributions import GumbelSoftmax, Relaxation
    from pyro_nbvae.likelihoods import Likelihood
    from pyro_nbvae.priors import JointPrior
    from pyro_nbvae.vae import AmortizedGuide, GenerativeModel

# Fields of type Kind and Fixed are not flags: the name of a part's type in config.json, and what a variant decides.
Positive = Annotated[float, Field(gt=0, le=1e12)]
# In single precision; arrival times draw as many arrivals as it is high.
Temperature = Annotated[float, Field(ge=1e-30, le=100)]
Epochs = Annotated[float, Field(gt=0, le=1e6)]
Number = Annotated[int, Field(ge=1, le=1_000_000_000)]


# One of several dataclasses is told apart by its kind.
BY_KIND = Field(discriminator="kind")

# --- relaxations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Annealed:
    """A relaxation whose temperature falls linearly during training."""

    temperature_start: Temperature = 1.0
    """temperature at the start of training"""
    temperature: Temperature = 0.25
    """temperature at the end of the annealing, at most that at the start"""
    anneal_epochs: Epochs | None = None
    """number of epochs of annealing. Default: half of the epochs"""

    def __post_init__(self) -> None:
        if self.temperature > self.temperature_start:
            raise InputError(
                f"temperature must be at most temperature_start ({self.temperature_start:g}), got {self.temperature:g}"
            )

    def temperature_at(self, epoch: float) -> float:
        """Return the temperature at an epoch, not necessarily whole."""
        assert self.anneal_epochs is not None
        done = min(1.0, epoch / self.anneal_epochs)
        return self.temperature if done == 1 else (1 - done) * self.temperature_start + done * self.temperature


@dataclass(frozen=True, kw_only=True)
class AnnealedArrivalTimes(_Annealed):
    """Arrival times of a Poisson process, with a soft indicator of those before time 1."""

    kind: Kind[Literal["arrival"]] = "arrival"
    temperature_start: Temperature = 0.24  # at 1 arrival times count 31 % too many
    """temperature at the start of training"""
    temperature: Temperature = 0.05
    """temperature at the end of the annealing, at most that at the start"""
    indicator: Literal["sigmoid", "smoothstep"] = "sigmoid"
    """soft indicator"""
    straight_through: bool = False
    """use integer counts in the forward pass and relaxed gradients in the backward pass"""

    def build(self) -> Relaxation:
        """Return the relaxation at its final temperature."""
        from pyro_nbvae.distributions import ArrivalTimes

        return ArrivalTimes(self.temperature, indicator=self.indicator, straight_through=self.straight_through)


@dataclass(frozen=True, kw_only=True)
class AnnealedCategories(_Annealed):
    """Gumbel-softmax over categories."""

    kind: Kind[Literal["categories"]] = "categories"
    straight_through: bool = False
    """use one-hot samples in the forward pass and relaxed gradients in the backward pass"""

    def build(self) -> GumbelSoftmax:
        """Return the relaxation at its final temperature."""
        from pyro_nbvae.distributions import GumbelSoftmax

        return GumbelSoftmax(self.temperature, straight_through=self.straight_through)


@dataclass(frozen=True, kw_only=True)
class AnnealedGumbelSoftmax(_Annealed):
    """Gumbel-softmax over the counts 0, 1, 2, ..."""

    kind: Kind[Literal["gumbel"]] = "gumbel"
    max_count: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """largest count: the probability mass above it is cut off. Default: none"""
    straight_through: bool = False
    """use integer counts in the forward pass and relaxed gradients in the backward pass"""

    def build(self) -> Relaxation:
        """Return the relaxation at its final temperature."""
        from pyro_nbvae.distributions import GumbelSoftmax

        return GumbelSoftmax(self.temperature, max_count=self.max_count, straight_through=self.straight_through)


@dataclass(frozen=True, kw_only=True)
class IntegerCounts:
    """Integer counts, with the gradient of the Poisson's or negative binomial's own distribution function."""

    kind: Kind[Literal["integer"]] = "integer"

    def build(self) -> Relaxation:
        """Return the relaxation."""
        from pyro_nbvae.distributions import Integer

        return Integer()


@dataclass(frozen=True, kw_only=True)
class Automatic:
    """The relaxation and the temperature with the smallest gradient error at initialisation."""

    kind: Kind[Literal["auto"]] = "auto"

    def build(self) -> Relaxation:
        """Return the relaxation that every family has, until another is selected."""
        return IntegerCounts().build()


CountRelaxation = Annotated[AnnealedArrivalTimes | AnnealedGumbelSoftmax | IntegerCounts | Automatic, BY_KIND]

# --- ELBO estimators -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AnalyticKL:
    """Exact KL."""

    kind: Kind[Literal["AnalyticKL_ELBO"]] = "AnalyticKL_ELBO"
    kl_warmup: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """number of epochs over which the KL weight rises from 0 to 1. Default: a tenth of the epochs"""

    def build(self) -> ELBO:
        """Return the estimator."""
        from pyro_nbvae.infer import AnalyticKL_ELBO

        return AnalyticKL_ELBO()


@dataclass(frozen=True, kw_only=True)
class MonteCarloKL:
    """Monte Carlo KL."""

    kind: Kind[Literal["MonteCarloKL_ELBO"]] = "MonteCarloKL_ELBO"
    kl_warmup: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """number of epochs over which the KL weight rises from 0 to 1. Default: a tenth of the epochs"""
    kl_samples: Annotated[int, Field(ge=1, le=10_000)] = 5
    """number of samples of the KL"""

    def build(self) -> ELBO:
        """Return the estimator."""
        from pyro_nbvae.infer import MonteCarloKL_ELBO

        return MonteCarloKL_ELBO(self.kl_samples)


PyroName = Literal["Trace_ELBO", "TraceMeanField_ELBO", "TraceGraph_ELBO", "RenyiELBO"]


@dataclass(frozen=True, kw_only=True)
class PyroELBO:
    """An estimator of Pyro with its own defaults."""

    kind: Kind[PyroName] = "Trace_ELBO"

    def build(self) -> ELBO:
        """Return the estimator."""
        import pyro.infer

        return getattr(pyro.infer, self.kind)()


Estimator = Annotated[AnalyticKL | MonteCarloKL | PyroELBO, BY_KIND]

# --- priors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Factorised:
    """A prior of independent latents; a subclass may make it the reference of a joint one."""

    prior_lr_multiplier: Positive = 10.0
    """learning rate of the factorised prior's parameters relative to that of the networks"""

    def joint(self) -> JointPrior | None:
        """Return the joint prior."""
        return None


@dataclass(frozen=True, kw_only=True)
class _Mixture(_Factorised):
    kind: Kind[Literal["mixture"]] = "mixture"
    components: Annotated[int, Field(ge=1, le=100_000)] = 100
    """number of components of the mixture"""

    def joint(self) -> JointPrior | None:
        from pyro_nbvae.priors import Mixture

        return Mixture(self.components)


@dataclass(frozen=True, kw_only=True)
class _Autoregressive(_Factorised):
    kind: Kind[Literal["autoregressive"]] = "autoregressive"
    groups: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    """number of groups of latents; those of one group are independent given the earlier groups"""

    def joint(self) -> JointPrior | None:
        from pyro_nbvae.priors import Autoregressive

        return Autoregressive(self.groups)


@dataclass(frozen=True, kw_only=True)
class _MixtureOfAutoregressive(_Mixture, _Autoregressive):
    kind: Kind[Literal["mixture_autoregressive"]] = "mixture_autoregressive"  # type: ignore[assignment]

    def joint(self) -> JointPrior | None:
        from pyro_nbvae.priors import Autoregressive, Mixture

        return Mixture(self.components, of=Autoregressive(self.groups))


@dataclass(frozen=True, kw_only=True)
class LearnedScale(_Factorised):
    """Independent normals whose scales are learned."""

    kind: Kind[Literal["scale"]] = "scale"


@dataclass(frozen=True, kw_only=True)
class MixtureOfNormals(_Mixture, LearnedScale):
    """A mixture of independent normals."""


@dataclass(frozen=True, kw_only=True)
class AutoregressiveNormals(_Autoregressive, LearnedScale):
    """Normals, each given those of earlier groups."""


@dataclass(frozen=True, kw_only=True)
class MixtureOfAutoregressiveNormals(_MixtureOfAutoregressive, LearnedScale):
    """A mixture on top of autoregressive normals."""


NormalPrior = Annotated[
    LearnedScale | MixtureOfNormals | AutoregressiveNormals | MixtureOfAutoregressiveNormals, BY_KIND
]


@dataclass(frozen=True, kw_only=True)
class LearnedCounts(_Factorised):
    """Independent counts whose parameters are learned."""

    kind: Kind[Literal["factorised"]] = "factorised"
    prior_mean: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """initial mean count. Default: 20; 2 with Gumbel-softmax, which draws noise for every count that is likely"""

    @property
    def initial_mean(self) -> float:
        """The initial mean count, once it is decided."""
        assert self.prior_mean is not None
        return self.prior_mean


@dataclass(frozen=True, kw_only=True)
class MixtureOfCounts(_Mixture, LearnedCounts):
    """A mixture of independent counts."""


@dataclass(frozen=True, kw_only=True)
class AutoregressiveCounts(_Autoregressive, LearnedCounts):
    """Counts, each given those of earlier groups."""


@dataclass(frozen=True, kw_only=True)
class MixtureOfAutoregressiveCounts(_MixtureOfAutoregressive, LearnedCounts):
    """A mixture on top of autoregressive counts."""


CountPrior = Annotated[LearnedCounts | MixtureOfCounts | AutoregressiveCounts | MixtureOfAutoregressiveCounts, BY_KIND]

# --- likelihoods -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GaussianLikelihood:
    """Gaussian with one variance for all elements."""

    kind: Kind[Literal["gaussian"]] = "gaussian"
    beta: Positive | None = None
    """weight of the KL relative to the squared error, 2 sigma^2. Default: 0.1 of the squared range of images, or of the
    mean variance of other data; with losses in squared errors the equivalent of beta = 1 in the released code, channels
    * height / latents with a conv decoder, else 1 / latents, and a quarter of that for colour images"""

    def build(self) -> Likelihood:
        """Return the likelihood."""
        from pyro_nbvae.likelihoods import Gaussian

        return Gaussian() if self.beta is None else Gaussian(self.beta)


@dataclass(frozen=True, kw_only=True)
class BernoulliLikelihood:
    """A likelihood of data that are 0 or 1."""

    kind: Kind[Literal["bernoulli"]] = "bernoulli"

    def build(self) -> Likelihood:
        """Return the likelihood."""
        from pyro_nbvae.likelihoods import Bernoulli

        return Bernoulli()


Varies = Literal["shared", "neuron", "condition", "decoder"]


@dataclass(frozen=True, kw_only=True)
class PoissonLikelihood:
    """Poisson likelihood of counts."""

    kind: Kind[Literal["poisson"]] = "poisson"
    zero_inflation: Varies | None = None
    """probability of further zeros: none, or as --dispersion. Default: none"""

    def build(self) -> Likelihood:
        """Return the likelihood."""
        from pyro_nbvae.likelihoods import Poisson

        return Poisson(zero_inflation=self.zero_inflation)


@dataclass(frozen=True, kw_only=True)
class DispersedLikelihood:
    """Negative binomial (overdispersed) or COM-Poisson (any dispersion) likelihood of counts."""

    kind: Kind[Literal["negative_binomial", "com_poisson"]] = "negative_binomial"
    dispersion: Varies = "neuron"
    """dispersion parameter: one shared by all, one of each neuron (last axis; pixel of an image), one of each neuron
    and condition (--condition), or from the decoder"""
    zero_inflation: Varies | None = None
    """probability of further zeros: none, or as --dispersion. Default: none"""

    def build(self) -> Likelihood:
        """Return the likelihood."""
        from pyro_nbvae.likelihoods import LIKELIHOODS

        return LIKELIHOODS[self.kind](self.dispersion, zero_inflation=self.zero_inflation)


# --- a file of the user's own ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a file of the user's own is read."""

    labels: str = "labels"
    """array of a .npz file, or column of a .h5ad, .csv or .tsv file, that has the labels"""
    group: str | None = None
    """array, or column, whose groups are never divided between training and held-out data, such as session. Default:
    trial, if the data have it"""
    folds: Annotated[int, Field(ge=2, le=1_000_000)] = 10
    """one of so many parts of the data is held out; each has about as many observations of each label"""
    fold: Annotated[int, Field(ge=0)] = 0
    """which part is held out, from 0"""
    split: Literal["random", "blocks"] = "random"
    """whether parts are drawn at random with a fixed seed, or are blocks in time (the order of the data) within each
    label; the last block shows drift"""
    whole: Fixed[bool] = False

    def __post_init__(self) -> None:
        if self.fold >= self.folds:
            raise InputError(f"fold must be at most folds - 1 = {self.folds - 1}, got {self.fold}")


DEFAULT_READING = Reading()


# --- the run ---------------------------------------------------------------------------------------------------------

# Distribution of the latents of generated observations.
SamplerName = Literal["prior", "mixture", "posterior"]
Network = Literal[
    "conv", "mlp", "linear", "temporal", "temporal_bins", "released", "released_conv", "released_mlp", "released_linear"
]


@dataclass(frozen=True, kw_only=True)
class VAE:
    """Base class of variants: a frozen dataclass whose fields are the variant's options.

    A subclass has a field ``kind``, by which config.json names it, and defines :meth:`build`. It may have a field
    ``relaxation`` and a field ``prior``.
    """

    estimator: Estimator = field(default_factory=AnalyticKL)

    def build(
        self,
        event_shape: tuple[int, ...],
        latents: int,
        *,
        encoder: str,
        decoder: str,
        likelihood: Likelihood,
        **options: Any,
    ) -> tuple[GenerativeModel, AmortizedGuide]:
        """Return the model and the guide.

        Args:
            event_shape: shape of one observation.
            latents: number of latents.
            encoder, decoder: names of the networks.
            likelihood: distribution of an observation given the decoder's output.
            **options: ``covariates``, the number of covariates of the model, if there are some.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Training:
    """Optimisation."""

    epochs: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """number of passes over the training data. Default: 20, or as many as 600 steps need"""
    batch_size: Number = 128
    """observations per step"""
    lr: Annotated[float, Field(gt=0, le=1e3)] = 3e-3
    """learning rate of Adam"""
    lr_schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """constant, or a cosine or a line from the learning rate to 0 over the epochs"""
    loss: Fixed[Literal["nats", "squared_error"]] = "nats"
    """unit of the loss. With squared_error, that of a Gaussian likelihood is the squared error + beta * KL."""
    clip: Annotated[float, Field(gt=0, le=1e30)] | None = None
    """maximum gradient norm of the loss per observation. Default: 250 nats, or the paper's in squared errors"""
    validate: bool = False
    """hold out a tenth of the training data (of fewer than ten groups, one): the checkpoint is then that of the epoch
    with the best objective on it"""
    patience: Number | None = None
    """stop after this number of epochs without a better objective on the held-out tenth; implies validate"""
    mixed_precision: bool = False
    """use bfloat16 multiplications in the networks during training, which is faster on hardware that supports it;
    densities and evaluation stay in single precision"""
    deterministic: bool = False
    """use only operations that give the same numbers each time, which may be slower on a GPU; one that has no such
    version is an error"""
    tensorboard: bool = False
    """also write the log for TensorBoard (pip install tensorboard)"""

    @property
    def validated(self) -> bool:
        """Whether a part of the training data is held out."""
        return self.validate or self.patience is not None


Chosen = TypeVar("Chosen", bound=VAE)
Tree = TypeVar("Tree")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Generic[Chosen]):
    """A run: what is trained, on which data, and how."""

    variant: Fixed[str]
    vae: Chosen
    likelihood: Annotated[
        GaussianLikelihood | BernoulliLikelihood | PoissonLikelihood | DispersedLikelihood, BY_KIND
    ] = field(default_factory=GaussianLikelihood)
    training: Training = field(default_factory=Training)
    data: str = "digits"
    """digits, mnist, fashion_mnist, cifar16, cifar16-blocks, cifar32, celeba64 or a registered data set; or the path of
    a folder of images, or of a .npy, .npz, .h5ad, .csv or .tsv file"""
    reading: Reading = field(default_factory=Reading)
    condition: Literal["covariates", "labels"] | None = None
    """what model and guide are conditional on: the array covariates of the data, or their labels. Default: nothing"""
    covariates: Fixed[int] = 0
    conditions: Fixed[tuple[str, ...] | None] = None
    given: Fixed[tuple[str, ...]] = ()
    held_out_neurons: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """fraction of neurons (last axis) that the encoder does not read, drawn with the seed: nbvae evaluate scores them
    (co-smoothing)"""
    train_size: Number | None = None
    """number of training observations to use, from the beginning of the data set. Default: all"""
    latents: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """number of latent variables"""
    encoder: Network | None = None
    """conv (images only), mlp or linear; for observations (bins, neurons) also temporal, convolutions over bins with
    latents of a trial, or temporal_bins, with latents of each bin (--latents is a multiple of the bins); or one of the
    paper's networks as released: released_conv, released_mlp, released_linear, or released (released_conv for images,
    else released_mlp). Default: conv for images, temporal for counts (bins, neurons), else mlp"""
    decoder: Network | None = None
    """as the encoder"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """random seed"""
    device: str = "auto"
    """auto (CUDA if available) or a PyTorch device string"""
    data_root: str | None = None
    """folder of the data sets. Default: the environment variable NBVAE_DATA, else the user data folder"""

    @property
    def title(self) -> str:
        """Title of the plots of this run."""
        return f"{self.variant} on {Path(self.data).name}"

    @property
    def relaxation(self) -> Any:
        """The part that defines the relaxation of counts, or None if the variant has none."""
        return getattr(self.vae, "relaxation", None)


@functools.cache
def _choices(owner: Any, name: str) -> dict[str, Any]:
    """Return the parts that a field may hold, by kind; empty unless its type is one of several."""
    hint = get_type_hints(owner)[name]
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else ()
    parts: list[Any] = [each for each in kinds if dataclasses.is_dataclass(each)]
    return {str(kind): each(kind=kind) for each in parts for kind in get_args(get_type_hints(each)["kind"])}


def choices(tree: Any) -> dict[str, dict[str, Any]]:
    """Return the parts of a tree that can be chosen, as {name: {kind: part}}.

    Example::

        >>> sorted(choices(TrainConfig(variant="", vae=VAE())))
        ['estimator', 'likelihood']
    """
    found: dict[str, dict[str, Any]] = {}
    for each in dataclasses.fields(tree):
        if parts := _choices(type(tree), each.name):  # type: ignore[arg-type]
            found[each.name] = parts
        if dataclasses.is_dataclass(value := getattr(tree, each.name)):
            found |= choices(value)
    return found


def options(tree: Any) -> dict[str, Any]:
    """Return all options of a tree by name, whatever part has them; the name of a part stands for its kind."""
    found: dict[str, Any] = {}
    for each in dataclasses.fields(tree):
        value = getattr(tree, each.name)
        if dataclasses.is_dataclass(value):
            kind = getattr(value, "kind", None)
            found |= ({} if kind is None else {each.name: kind}) | options(value)
        elif each.name != "kind":
            found[each.name] = value
    return found


# Fields that name a type, which is not changed without its options.
_NAMES = ("kind", "variant")


def with_options(tree: Tree, changes: Mapping[str, Any]) -> tuple[Tree, set[str]]:
    """Return a tree with other options and parts, wherever they are in it, and the names that were found.

    Args:
        tree: a configuration, or a part.
        changes: options by name, or as KIND.OPTION for one kind of part; parts by their kind.

    Raises:
        InputError: for a part of an unknown kind.
    """
    found: set[str] = set()
    own: dict[str, Any] = {}
    for each in dataclasses.fields(tree):  # type: ignore[arg-type]
        value = getattr(tree, each.name)
        names = [name for name in (each.name, f"{getattr(tree, 'kind', '')}.{each.name}") if name in changes]
        names = names if each.name not in _NAMES else []
        parts = _choices(type(tree), each.name)  # type: ignore[arg-type]
        for name in names if parts or not dataclasses.is_dataclass(value) else ():
            found.add(name)
            value = changes[name]
            if parts and isinstance(value, str):
                check_member(name, value, parts)
                value = parts[value]
        if dataclasses.is_dataclass(value):
            value, inner = with_options(value, changes)
            found |= inner
        own[each.name] = value
    return dataclasses.replace(tree, **own), found  # type: ignore[type-var]


def replace(tree: Tree, **changes: Any) -> Tree:
    """Return a tree with other options and parts; see :func:`with_options`.

    Raises:
        InputError: for a name that no part of the tree has, and for a part of an unknown kind.
    """
    # parts first: they have the options
    tree, parts = with_options(tree, {name: changes[name] for name in choices(tree) if name in changes})
    tree, found = with_options(tree, {name: value for name, value in changes.items() if name not in parts})
    unknown = sorted(set(changes) - found - parts)
    if unknown:
        known = ", ".join(sorted(set(options(tree)) - {"variant", "vae"}))
        raise InputError(f"unknown option {', '.join(unknown)}: {getattr(tree, 'variant', 'this')} has {known}")
    return tree
