"""Evaluation of a run. Each metric is an entry of ``METRICS``: name, format in tables, and how to compute it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, get_args

import torch
from pyro.infer import ELBO
from torch import Tensor
from torch.distributions import Distribution

from pyro_nbvae.batching import Recording, is_pixels, random_subset, to_bytes
from pyro_nbvae.errors import InputError
from pyro_nbvae.likelihoods import CountLikelihood
from pyro_nbvae.metrics import (
    Calibration,
    HeldOut,
    Score,
    calibration,
    co_smoothing,
    fano_factor,
    gradient_moments,
    held_out,
    importance_weighted_bound,
    latent_classification,
    latent_clusters,
    nlb_bits,
    null_rates,
    psth_r2,
)
from pyro_nbvae.metrics.distances import KID_SUBSET_SIZE
from pyro_nbvae.metrics.errors import standard_error
from pyro_nbvae.metrics.features import Features
from pyro_nbvae.metrics.held_out import SSIM_MARGIN, mean_or_none
from pyro_nbvae.metrics.latents import LABELLED, SHOTS, Representation
from pyro_nbvae.metrics.spikes import absent, relative_to_null
from pyro_nbvae.sampling import generated, reconstructed
from pyro_nbvae.study.build import build, steps_per_epoch, validation_rows
from pyro_nbvae.study.data import Data
from pyro_nbvae.study.errors import check_member, check_number, check_seed
from pyro_nbvae.study.features import build_features, check_features, distances, suffix_of
from pyro_nbvae.study.folder import Run, SamplerName, metrics_file, with_sampler
from pyro_nbvae.study.generation import MOST_SAMPLES, sampler_of
from pyro_nbvae.study.tree import options
from pyro_nbvae.vae import evaluating

# Number of held-out images whose reconstructions FID compares with them, as in the released code.
RECONSTRUCTED = 5_000
# Batch size and number of draws for gradient_noise.
GRADIENT_BATCH, GRADIENT_DRAWS = 64, 50


@dataclass
class Evaluation:
    """A trained run, its data, and intermediate results that several metrics share; each is computed once, when needed.

    Args:
        run: a trained run.
        features: features for FID and KID, keys of :data:`~pyro_nbvae.metrics.FEATURES`; one of Inception's at most.
            Default: ``classifier`` for images, none for other data.
        inception_weights: torch-fidelity's weights file, if it is not in the data root.
        samples: number of generated observations.
        sampler: distribution of the latents of generated observations: ``prior``; ``mixture``, the prior that was
            fitted after training (:func:`~pyro_nbvae.study.generation.fit_prior`), which is then the model's in all
            metrics; or ``posterior``.
        importance_samples: samples per observation for the importance-weighted bound; with 0 it is not computed.
        seed: random seed of the latents and of the subsets for KID.
        device: auto (CUDA if available) or a PyTorch device string.
        data_root: folder of the data sets, if it is not the one of the training.
        data_path: where the data of the training are now, if they have moved.
        progress: show progress bars.

    Raises:
        InputError: for a folder that contains no trained run, for data or weights that are not available, for features
            of data that are not images, and for a number out of range.
    """

    run: Run
    features: Sequence[str] | None = None
    inception_weights: str | Path | None = None
    samples: int = 10_000
    sampler: SamplerName = "prior"
    importance_samples: int = 5
    seed: int = 0
    device: str = "auto"
    data_root: str | None = None
    data_path: str | None = None
    progress: bool = True
    networks: dict[str, Features] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_number("--importance-samples", self.importance_samples, 0, 100_000)
        check_number("--samples", self.samples, 2, MOST_SAMPLES)
        check_seed(self.seed)
        state = self.run.read_checkpoint()  # read once: a training process may replace it meanwhile
        fitted = self.sampler == "mixture"
        self.config, self.model, self.guide = self.run.load_from(state, self.device, fitted=fitted)
        self.log: list[dict[str, float]] = state["log"]
        self.made_by = state.get("made_by", {})
        self.data: Data = self.run.data_of(state, self.data_root, self.data_path)
        if self.features is None:
            self.features = ("classifier",) if self.data.images else ()
        check_features(self.features)
        if self.features and not self.data.images:
            raise InputError(f"--features {self.features[0]} of {self.run.folder}: {self._no_images}")
        if self.data.images:
            for name in self.features:
                network = build_features(
                    name,
                    self.data.name,
                    data_root=self.data_root or self.config.data_root,
                    inception_weights=self.inception_weights,
                )
                self.networks[name] = network.to(self.model.device)

    @property
    def train_set(self) -> Recording:
        """The training data of the run."""
        return self.data.training[: self.config.train_size]

    @property
    def trained_on(self) -> int:
        """Number of training observations."""
        return len(self.train_set)

    @property
    def _no_images(self) -> str | None:
        shape = tuple(self.data.event_shape)
        return None if self.data.images else f"needs images, {self.config.data} holds observations of shape {shape}"

    @cached_property
    def _observed(self) -> Distribution:
        """One distribution of observations, which shows whether the likelihood has a mean."""
        with evaluating(self.model, self.guide, self.seed):
            z = self.model.prior_distribution().sample(torch.Size([1]))
            return self.model.observation(z, covariates=self.test[:1].covariates)

    @cached_property
    def _counts(self) -> bool:
        with evaluating(self.model, self.guide, self.seed):
            first = self.model.to_input(self.test[:1])
            return fano_factor(self.guide.posterior(first.x, **first.given)) is not None

    @cached_property
    def test(self) -> Recording:
        """The held-out data, on the device."""
        return self.data.held_out.to(self.model.device)

    @cached_property
    def held_out(self) -> HeldOut:
        """Results of one pass over the held-out data."""
        return held_out(
            self.model,
            self.guide,
            self.test,
            groups=self.data.groups[1],
            limits=self.data.limits,
            seed=self.seed,
            progress=self.progress,
        )

    @cached_property
    def bounds(self) -> Tensor:
        """Importance-weighted bound of each held-out observation, in nats."""
        return importance_weighted_bound(
            self.model, self.guide, self.test, self.importance_samples, seed=self.seed, progress=self.progress
        )

    @cached_property
    def bound(self) -> tuple[float, float | None]:
        """Importance-weighted bound in nats per observation, and its standard error."""
        return float(self.bounds.mean()), standard_error(self.bounds, groups=self.data.groups[1])

    @cached_property
    def null(self) -> Tensor:
        """Rates of the null of scores in bits per spike."""
        return null_rates(self.train_set)

    @cached_property
    def bits(self) -> Score:
        """Score of whole trials in bits per spike; trials of a group have one value."""
        score = relative_to_null(self.bounds, self.model.input_batches(self.test), self.null)
        return score.grouped(self.data.groups[1])

    @cached_property
    def co_smoothing(self) -> tuple[Score, Tensor]:
        """Score of the neurons that the encoder does not read, and posterior means of the rates of all neurons."""
        data = self.test, self.null
        score, rates = co_smoothing(self.model, self.guide, *data, seed=self.seed, progress=self.progress)
        return score.grouped(self.data.groups[1]), rates

    @cached_property
    def calibration(self) -> Calibration:
        """Held-out counts beside their posterior predictive distribution."""
        return calibration(self.model, self.guide, self.test, self.data.test_labels, seed=self.seed)

    @cached_property
    def distances(self) -> dict[str, float]:
        """FID and KID in each requested feature set.

        Images whose values are not in [0, 1] are compared on the scale of the training data.
        """
        sampler = sampler_of(self.sampler, self.model, self.guide, lambda: self.train_set)
        given = self.train_set.conditions
        parts = partial(generated, self.model, self.guide, sampler, self.samples, seed=self.seed, given=given)
        return self._distances(self.data.train, lambda: (part.mean for part in parts()))

    @cached_property
    def reconstruction_distances(self) -> dict[str, float]:
        """FID between up to 5,000 held-out images and their reconstructions, in each requested feature set."""
        data = random_subset(self.data.held_out, RECONSTRUCTED)
        return self._distances(
            data.x, lambda: reconstructed(self.model, self.guide, data, seed=self.seed), kid_subsets=0
        )

    def _distances(self, real: Tensor, generate: Callable[[], Iterable[Tensor]], **options: int) -> dict[str, float]:
        bytes_of = partial(to_bytes, limits=self.data.limits)
        real = real if is_pixels(real) else bytes_of(real)
        values: dict[str, float] = {}
        for network in self.networks.values():  # generated again for each network, to save memory
            images = map(bytes_of, generate())
            values |= distances(network, real, images, seed=self.seed, progress=self.progress, **options)
        return values

    @cached_property
    def classification(self) -> dict[Representation, dict[str, float]]:
        """Accuracies of classifiers on latents, by representation; filled by :meth:`accuracy`."""
        return {}

    def accuracy(self, representation: Representation, name: str) -> float | None:
        """Return the accuracy of a classifier on latents.

        Args:
            representation: ``encoder``, ``means`` or ``counts`` (:func:`~pyro_nbvae.metrics.represent`).
            name: name of the classifier (:func:`~pyro_nbvae.metrics.classification`).
        """
        if representation not in self.classification:
            data = self.data
            if data.train_labels is None or data.test_labels is None:
                raise InputError(f"{data.name} has no labels: choose data with labels, such as mnist or cifar16")
            train, test = (data.training, data.train_labels), (data.held_out, data.test_labels)
            values = latent_classification(self.model, self.guide, train, test, representation, seed=self.seed)
            self.classification[representation] = values
        return self.classification[representation].get(name)

    @cached_property
    def clusters(self) -> dict[str, dict[str, float]]:
        """Components of a mixture prior, k-means and Gaussian mixture as clusters."""
        data: Any = self.data
        train = self.train_set, data.train_labels[: len(self.train_set)]
        return latent_clusters(self.model, self.guide, train, (data.held_out, data.test_labels), seed=self.seed)

    @cached_property
    def elbo(self) -> ELBO:
        """The ELBO estimator of the run."""
        return build(self.config, tuple(self.model.event_shape))[2]

    def gradient_noise(self) -> float | None:
        """Return the noise-to-signal ratio of the gradient on a batch of held-out data.

        Estimator and relaxation are those of the run. None if the noise is so large that this many draws do not show
        the signal.
        """
        x = self.model.to_input(random_subset(self.test, GRADIENT_BATCH))
        moments = gradient_moments(self.elbo, self.model, self.guide, x, GRADIENT_DRAWS, seed=self.seed)
        seen = moments.squared_norm > 2 * moments.variance / GRADIENT_DRAWS
        return moments.variance / moments.squared_norm if seen else None

    def seconds_per_step(self) -> float:
        """Return the seconds per training step, the median over epochs."""
        observations = int((~validation_rows(self.config, self.data)).sum())
        steps = steps_per_epoch(observations, self.config.training.batch_size)
        return median(row["seconds"] for row in self.log) / steps


class Metric(NamedTuple):
    """A metric of a run.

    Args:
        name: key in ``metrics.json``.
        heading: heading of its column in tables.
        digits: number of decimals in tables.
        best: whether low or high values are better; None if neither.
        compute: maps an :class:`Evaluation` to the value, or to None if the value is not defined.
        standard: whether ``nbvae evaluate`` computes it by default; if not, only tables that list it do.
        of: what it is measured on, for the caption of a table; speed has a mean only over runs on one machine.
        lacks: maps an :class:`Evaluation` to the reason why the metric cannot be computed for the run, or to None. It
            is called before anything is computed.

    Example::

        >>> METRICS["mse"].heading, METRICS["mse"].best
        ('MSE', 'low')
    """

    name: str
    heading: str
    digits: int
    best: Literal["low", "high"] | None
    compute: Callable[[Evaluation], float | None]
    standard: bool = True
    of: Literal["held-out data", "samples", "reconstructions", "latents", "training", "speed"] = "held-out data"
    lacks: Callable[[Evaluation], str | None] = lambda e: None

    @property
    def in_features(self) -> bool:
        """Whether it compares images in features."""
        return self.of in ("samples", "reconstructions")


def _no_mean(e: Evaluation) -> str | None:
    return None if mean_or_none(e._observed) is not None else f"{type(e.model.likelihood).__name__} has no mean"


def _no_ssim(e: Evaluation) -> str | None:
    if not e.data.images or min(e.data.event_shape[1:]) > SSIM_MARGIN:
        return e._no_images or _no_mean(e)
    return f"needs images of more than {SSIM_MARGIN} pixels a side, got {tuple(e.data.event_shape)}"


def _no_counts(e: Evaluation) -> str | None:
    return None if e._counts else f"needs latents that are counts, {e.config.variant} has none"


def _no_spikes(e: Evaluation) -> str | None:
    if isinstance(e.model.likelihood, CountLikelihood):
        return None
    return f"needs a likelihood of counts, {type(e.model.likelihood).__name__} is none"


def _no_held_out_neurons(e: Evaluation) -> str | None:
    if not e.config.held_out_neurons:
        return "needs neurons that the encoder does not read: train with --held-out-neurons"
    return _no_spikes(e)


def _no_conditions(e: Evaluation) -> str | None:
    return _no_spikes(e) or (None if e.data.test_labels is not None else f"needs labels, {e.config.data} has none")


def _nlb(e: Evaluation) -> float | None:
    out = ~e.guide.reads  # type: ignore[operator]
    out = out.reshape(-1, out.shape[-1])[0]
    counts = e.test.floats().x.masked_fill(absent(e.test), math.nan)
    null = None
    if e.test.exposure is not None:  # the mean rate of the evaluated counts, at the exposure of each
        exposed = e.test.exposure.double().expand(counts.shape).masked_fill(absent(e.test), math.nan)
        rate = counts.double().flatten(0, -2).nansum(0) / exposed.flatten(0, -2).nansum(0)
        null = (rate * exposed)[..., out]
    return _or_none(nlb_bits(e.co_smoothing[1][..., out], counts[..., out], null))


def _psth(e: Evaluation) -> float | None:
    assert e.data.test_labels is not None
    counts = e.test.floats().x.masked_fill(absent(e.test), math.nan)
    return _or_none(psth_r2(e.calibration.rates, counts, e.data.test_labels.to(counts.device)))


def _no_beta(e: Evaluation) -> str | None:
    return None if hasattr(e.model.likelihood, "beta") else "needs a Gaussian likelihood, which has a beta"


def _no_bound(e: Evaluation) -> str | None:
    return None if e.importance_samples else "needs --importance-samples of at least 1, got 0"


def _no_loss(e: Evaluation) -> str | None:
    known = hasattr(e.elbo, "differentiable_loss")
    return None if known else f"needs an ELBO with a differentiable_loss, {type(e.elbo).__name__} has none"


def _no_features(suffix: str, e: Evaluation) -> str | None:
    if e._no_images or suffix not in map(suffix_of, e.networks):
        return e._no_images or f"needs --features {'classifier' if suffix else 'inception'}"
    return None


def _no_samples(suffix: str, least: int, e: Evaluation) -> str | None:
    fewest = min(e.samples, len(e.data.train))
    too_few = None if fewest >= least else f"needs {least:,} samples and training images, got {fewest:,}"
    return _no_features(suffix, e) or too_few


def _no_reconstructions(suffix: str, e: Evaluation) -> str | None:
    images = e.data.held_out
    whole = None if len(images) > 1 and images.mask is None else "needs 2 held-out images, observed completely"
    return _no_features(suffix, e) or _no_mean(e) or whole


def _no_labels(name: str, e: Evaluation) -> str | None:
    labels = e.data.train_labels
    if labels is None or e.data.test_labels is None:
        return f"needs labels, {e.config.data} has none"
    if e.config.condition == "labels":
        return "needs an encoder that does not read the labels: this run is conditional on them"
    sizes = labels.unique(return_counts=True)[1]
    kind, _, number = name.rpartition("_")
    per_class = kind == "few_shot"
    least, most = int(number) if kind else LABELLED[0], int(sizes.min()) if per_class else len(labels)
    if len(sizes) < 2:
        return "needs labels of at least 2 classes, got 1"
    return None if most >= least else f"needs {least} training observations{' per class' * per_class}, got {most}"


def _held(
    name: str,
    heading: str,
    digits: int,
    best: Literal["low", "high"] | None = None,
    lacks: Callable[[Evaluation], str | None] = lambda e: None,
) -> Metric:
    return Metric(name, heading, digits, best, lambda e: getattr(e.held_out, name), lacks=lacks)


def _mean(*arguments: Any, **options: Any) -> list[Metric]:
    """Return a mean over held-out observations, and its standard error."""
    metric = _held(*arguments, **options)
    return [metric, _held(f"{metric.name}_error", f"± {metric.heading}", metric.digits, lacks=metric.lacks)]


def _distance(
    name: str, heading: str, digits: int, best: Literal["low", "high"] | None = "low", least: int = 2
) -> Metric:
    lacks = partial(_no_samples, "_c" if name.endswith("_c") else "", least)
    return Metric(name, heading, digits, best, lambda e: e.distances.get(name), of="samples", lacks=lacks)


def _reconstruction_distance(suffix: str, heading: str, digits: int) -> Metric:
    def compute(e: Evaluation) -> float | None:
        return e.reconstruction_distances.get(f"fid{suffix}")

    lacks = partial(_no_reconstructions, suffix)
    return Metric(f"rfid{suffix}", heading, digits, "low", compute, of="reconstructions", lacks=lacks)


def _past(name: str, heading: str, digits: int, now: str) -> Metric:
    """Return a metric of saved results that is computed no longer, because its definition has changed."""
    return Metric(name, heading, digits, None, lambda e: None, False, lacks=lambda e: f"is computed as {now} now")


def _no_clusters(method: str, e: Evaluation) -> str | None:
    if e.data.train_labels is None or e.data.test_labels is None:
        return f"needs labels, {e.config.data} has none"
    mixture = hasattr(e.config.vae, "prior") and "components" in options(e.config.vae.prior)
    if method == "components" and not (mixture or e.sampler == "mixture"):
        return "needs a mixture as prior: train with prior=mixture, or fit one (nbvae fit-prior)"
    return None


def _clusters() -> list[Metric]:
    def score(method: str, name: str, evaluation: Evaluation) -> float | None:
        return evaluation.clusters.get(method, {}).get(name)

    return [
        Metric(
            f"{method}_{name}",
            f"{heading}, {method}",
            3,
            "high",
            partial(score, method, name),
            standard=False,
            of="latents",
            lacks=partial(_no_clusters, method),
        )
        for method in ("components", "kmeans", "gaussians")
        for name, heading in (("accuracy", "accuracy"), ("nmi", "NMI"))
    ]


def _accuracies() -> list[Metric]:
    columns = [
        (f"{key}_{number}", f"{heading} {number}")
        for key, heading in (("knn", "kNN"), ("logistic", "logistic"), ("svm", "SVM"))
        for number in LABELLED
    ]
    columns += [("shattering", "shattering"), *((f"few_shot_{number}", f"{number}-shot") for number in SHOTS)]

    def accuracy(name: str, representation: Representation, evaluation: Evaluation) -> float | None:
        return evaluation.accuracy(representation, name)

    representations: tuple[Representation, ...] = ("encoder", "means", "counts")
    return [
        Metric(
            f"{prefix}{name}",
            heading + suffix,
            3,
            "high",
            partial(accuracy, name, kind),
            standard=False,
            of="latents",
            lacks=partial(_no_labels, name),
        )
        for kind in representations
        for prefix, suffix in (("", "") if kind == "encoder" else (f"{kind}_", f", {kind}"),)
        for name, heading in columns
    ]


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _score(
    name: str, heading: str, of: Callable[[Evaluation], Score], lacks: Callable[[Evaluation], str | None]
) -> list[Metric]:
    """Return bits per spike, and their standard error over trials."""
    return [
        Metric(name, heading, 4, "high", lambda e: _or_none(of(e).bits), lacks=lacks),
        Metric(f"{name}_error", f"± {heading}", 4, None, lambda e: _or_none(of(e).over_trials), lacks=lacks),
    ]


def _bits(e: Evaluation) -> float:
    """Return the bits per observed value of a nat per observation."""
    return 1 / (float(e.test.number.double().mean()) * math.log(2))


_SHIPPED = (
    *_mean("mse", "MSE", 4, "low", lacks=_no_mean),
    _held("ssim", "SSIM", 3, "high", lacks=_no_ssim),
    # FID-c and KID-c use features of our classifiers, FID and KID those of Inception
    _reconstruction_distance("_c", "rFID-c", 2),
    _distance("fid_c", "FID-c", 2),
    _distance("kid_c", "KID-c", 4),
    _distance("kid_std_c", "± KID-c", 4, None, 2 * KID_SUBSET_SIZE),
    _reconstruction_distance("", "rFID", 1),
    _distance("fid", "FID", 1),
    _distance("kid", "KID", 4),
    _distance("kid_std", "± KID", 4, None, 2 * KID_SUBSET_SIZE),
    *_mean("elbo", "ELBO", 1, "high"),
    Metric("bits_per_dim", "bits/dim", 3, "low", lambda e: -e.held_out.elbo * _bits(e)),
    Metric(
        "bits_per_dim_error",
        "± bits/dim",
        3,
        None,
        lambda e: None if e.held_out.elbo_error is None else e.held_out.elbo_error * _bits(e),
    ),
    Metric("importance_weighted_bound", "IW bound", 1, "high", lambda e: e.bound[0], lacks=_no_bound),
    Metric("importance_weighted_bound_error", "± IW bound", 1, None, lambda e: e.bound[1], lacks=_no_bound),
    *_score("bits_per_spike", "bits/spike", lambda e: e.bits, lambda e: _no_spikes(e) or _no_bound(e)),
    *_score("co_bits_per_spike", "co-bits/spike", lambda e: e.co_smoothing[0], _no_held_out_neurons),
    Metric("nlb_co_bits", "NLB co-bps", 4, "high", _nlb, lacks=_no_held_out_neurons),
    Metric("psth_r2", "PSTH R²", 3, "high", _psth, lacks=_no_conditions),
    Metric("pit_distance", "PIT distance", 3, "low", lambda e: e.calibration.pit_distance, lacks=_no_spikes),
    *_mean("log_likelihood", "log p(x|z)", 1, "high"),
    *_mean("squared_error", "SSE", 2, "low", lacks=_no_mean),
    *_mean("kl", "KL", 2),
    _held("information", "information", 2),
    Metric("beta", "β", 3, None, lambda e: getattr(e.model.likelihood, "beta", None), of="training", lacks=_no_beta),
    Metric(
        "objective",
        "SSE+βKL",
        2,
        "low",
        lambda e: (e.held_out.squared_error or 0.0) + e.model.loss_scale * e.held_out.kl,
        lacks=lambda e: _no_beta(e) or _no_mean(e),
    ),
    _held("collapsed_units", "collapsed", 0),
    _past("dead_units", "dead", 0, "collapsed_units"),
    _held("fano", "Fano", 2, lacks=_no_counts),
    _held("underdispersed_active_units", "Fano < 1, active", 2, lacks=_no_counts),
    _past("underdispersed_units", "Fano < 1", 2, "underdispersed_active_units"),
    _held("overdispersion", "var/mean", 2, lacks=_no_counts),
    Metric("seconds_per_step", "s/step", 3, None, Evaluation.seconds_per_step, of="speed"),
    Metric("gradient_noise", "gradient noise", 2, "low", Evaluation.gradient_noise, standard=False, lacks=_no_loss),
    *_clusters(),
    *_accuracies(),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _SHIPPED}


def register_metric(metric: Metric) -> None:
    """Register a metric, for ``nbvae evaluate`` and for tables that list it.

    Args:
        metric: the metric; an existing metric of the same name is replaced.

    Raises:
        ValueError: if another metric has the same heading; tables could not tell them apart.

    Example::

        >>> latents = Metric("latents", "latents", 0, None, lambda e: float(e.model.latents), standard=False)
        >>> register_metric(latents)
        >>> METRICS["latents"].heading
        'latents'
        >>> del METRICS["latents"]
    """
    other = next((one.name for one in METRICS.values() if one.heading == metric.heading), metric.name)
    if other != metric.name:
        raise InputError(f"heading {metric.heading!r} of metric {metric.name} is that of {other}: give it another")
    METRICS[metric.name] = metric


def settings(epochs: int, seed: int, samples: int) -> dict[str, object]:
    """Return the settings that metrics depend on, as in ``metrics.json``; metrics with other settings are discarded."""
    return {"epochs": epochs, "seed": seed, "generated_samples": samples}


def _write(this: Evaluation, names: Sequence[str], about: Mapping[str, object]) -> dict[str, object]:
    """Compute metrics and write them to the file of the sampler; other metrics of the same settings stay in it.

    So do FID and KID in features that are not asked for now.
    """
    values = {one: None if METRICS[one].lacks(this) else METRICS[one].compute(this) for one in names}
    for one, value in values.items():
        if not isinstance(value, int | float | None):
            raise InputError(f"metric {one} gave a {type(value).__name__}: its function must return a float, or None")
    # read afterwards: another process may have added metrics meanwhile
    before = this.run.read_json(metrics_file(this.sampler))
    now = settings(len(this.log), this.seed, this.samples)
    same = before.items() >= now.items()
    networks: dict[str, str | None] = {}
    if any(METRICS[one].in_features for one in names) or not same:
        networks |= {kind: network.network for kind, network in this.networks.items()}
    if same:
        taken = {suffix_of(kind) for kind in networks}
        others = zip_longest(before.get("feature_sets", []), before.get("feature_networks", []))
        networks |= {kind: network for kind, network in others if suffix_of(kind) not in taken}
    own = getattr(getattr(this.config.vae, "prior", None), "kind", None)
    prior = "fitted mixture" if this.sampler == "mixture" else own
    measured_by = [network for network in networks.values() if network is not None]
    # beside a new value not the error of an earlier one, where now there is none: a single group has none
    settled = {f"{one}_error" for one, value in values.items() if value is not None} & set(values)
    open_still = {one for one in METRICS if values.get(one) is None} - settled
    kept = {one: before[one] for one in METRICS if one in open_still and one in before and same}
    if kept.get("importance_weighted_bound") is not None:
        kept["importance_samples"] = before["importance_samples"]
    content = {
        "variant": with_sampler(this.config.variant, this.sampler),
        "data": this.config.data,
        **({} if prior is None else {"prior": prior}),
        **now,
        **({"feature_sets": list(networks), "feature_networks": measured_by} if this.data.images else {}),
        "train_size": this.trained_on,
        **about,
        **this.made_by,
        **values,
        **kept,
    }
    this.run.write_json(metrics_file(this.sampler), content)
    return content


def evaluate(run: Run, metrics: Sequence[str] | None = None, **options: Any) -> dict[str, object]:
    """Evaluate a run on its held-out data; write ``metrics.json`` and, if latents are counts, ``dispersion.png``.

    All metrics use exact latents (integer counts):

    - ``mse`` (per element) and ``ssim``: reconstructions from one posterior sample;
    - ``rfid_c`` (with Inception features ``rfid``): FID between up to 5,000 held-out images and their reconstructions;
    - ``fid_c``, ``kid_c``, ``kid_std_c`` (with Inception features ``fid``, ``kid``, ``kid_std``): samples from the
      prior against all training images of the data set;
    - ``elbo``, ``kl``, ``importance_weighted_bound``: nats per observation;
    - ``bits_per_dim``: -elbo / (observed values * ln 2); for 8-bit images add 8;
    - ``information``: sum over units of the information about an observation, in nats
      (:func:`~pyro_nbvae.metrics.unit_information`);
    - ``collapsed_units``: number of units whose information is below 0.01 nats;
    - ``fano``: Fano factor of the posterior, averaged;
    - ``underdispersed_active_units``: fraction of the other units whose posterior has less variance than a Poisson;
    - ``overdispersion``: variance over mean of a unit's counts across observations, averaged over units;
    - ``NAME_error``: standard error of a mean over held-out observations.

    A standard metric that is not defined for the run (SSIM without images, for example) is None. The file also contains
    the provenance of the run: ``commit``, ``version``, ``torch_version``, ``machine``, ``threads`` and ``date``.

    With the sampler ``mixture`` the fitted prior is the model's in all metrics, with ``posterior`` only the samples are
    evaluated; the file is ``metrics-SAMPLER.json``.

    Args:
        run: a trained run.
        metrics: names in ``METRICS``, which must be defined for the run. Default: the standard ones. Other metrics in
            the file are kept if they belong to the same checkpoint and settings, also FID and KID in features that are
            not asked for now.
        **options: as :class:`Evaluation`.

    Returns:
        The content of the file.

    Raises:
        InputError: as :class:`Evaluation`, for a metric that is unknown or cannot be computed for the run, and for
            metrics together with the sampler ``posterior``.

    Example::

        >>> import tempfile
        >>> from pyro_nbvae.study.config import configure
        >>> from pyro_nbvae.study.training import train
        >>> config = configure(train_size=50, latents=3, encoder="linear", decoder="linear", epochs=1, device="cpu")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = train(config, folder, progress=False)
        ...     metrics = evaluate(run, ["elbo", "kl"], features=(), importance_samples=0, device="cpu", progress=False)
        >>> metrics["elbo"] < 0 < metrics["kl"]
        True
    """
    names = [name for name, one in METRICS.items() if one.standard] if metrics is None else list(metrics)
    for name in names:
        check_member("metric", name, METRICS)
    sampler = options.get("sampler", "prior")
    check_member("sampler", sampler, get_args(SamplerName))
    if sampler == "posterior" and metrics is not None:
        raise InputError("samples of the posterior have their own metrics: leave out metrics, or sampler")
    this = Evaluation(run, **options)
    for name in names if metrics is not None else ():
        reason = METRICS[name].lacks(this)
        if reason:
            raise InputError(f"metric {name} of {run.folder}: {reason}")
    return measure(this, names)


def measure(this: Evaluation, names: Sequence[str]) -> dict[str, object]:
    """Compute metrics, None where they are not defined for the run, and write the files of :func:`evaluate`."""
    from pyro_nbvae.study.plots import plot_dispersion

    if this.sampler == "posterior":
        if not this.data.images:
            raise InputError("--sampler posterior measures FID and KID, which need images; use the prior")
        return _write(this, [name for name in names if METRICS[name].of == "samples"], {})
    found = this.held_out
    about: dict[str, object] = {
        "importance_samples": this.importance_samples,
        "test_size": len(this.data.test),
        "kl_per_unit": found.unit_kl.tolist(),
    }
    if found.unit_information is not None:
        about |= {"units": found.unit_information.numel(), "information_per_unit": found.unit_information.tolist()}
    values = _write(this, names, about)
    if found.fano is not None and this.sampler == "prior":
        units = {"across observations": (found.unit_mean, found.unit_variance)}
        if found.posterior_mean is not None and found.posterior_variance is not None:
            units["given one: the posterior"] = found.posterior_mean, found.posterior_variance
        plot_dispersion(units, this.run.folder / "dispersion.png", title=this.config.title)
    return values


def columns_of(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str] | None = None) -> list[Metric]:
    """Return the metrics (of those named, or of all) that have a value in at least one row."""
    return [
        one
        for one in METRICS.values()
        if (metrics is None or one.name in metrics) and any(row.get(one.name) is not None for row in rows)
    ]


def _with_error(row: Mapping[str, Any], metric: Metric) -> str:
    """Return a value with its standard error, both to two significant digits of the error; "-" without a value."""
    value, error = row.get(metric.name), row.get(f"{metric.name}_error")
    if value is None:
        return "-"
    if error is None or not (0 < error < math.inf and math.isfinite(value)):
        return f"{value:.{metric.digits}f}"
    digits = 1 - math.floor(math.log10(float(f"{error:.1e}")))
    return f"{round(value, digits):.{max(0, digits)}f} ± {round(error, digits):.{max(0, digits)}f}"


def plain(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Format the metrics of several runs for a terminal: one column per run, one line per metric.

    Args:
        rows: the content of the runs' ``metrics.json``.
        names: headings of the columns, such as the run folders.
    """
    lines = [["run", *names]]
    for about in ("variant", "prior", "data", "epochs"):
        lines += [[about, *(str(row.get(about, "fixed")) for row in rows)]]
    columns = columns_of(rows)
    errors = {f"{one.name}_error" for one in columns}
    lines += [[one.heading, *(_with_error(row, one) for row in rows)] for one in columns if one.name not in errors]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def overfitted(run: Run) -> str | None:
    """Return what to do if the ELBO of the log on held-out data has fallen by 1 % since its best epoch, else None."""
    config, state = run.config()[0], run.read_checkpoint()
    elbos = [row["test_elbo"] for row in state["log"] if "test_elbo" in row]
    if config.training.validated or len(elbos) < 2:
        return None
    best = max(range(len(elbos)), key=lambda epoch: elbos[epoch])
    if elbos[best] - elbos[-1] < 0.01 * abs(elbos[best]):
        return None
    return (
        f"the ELBO on held-out data was {elbos[best]:.5g} nats after epoch {best + 1} and is {elbos[-1]:.5g} "
        f"after epoch {len(elbos)}: train with --patience 10, which keeps the epoch that is best on a tenth of the "
        "training data"
    )


def collapsed(values: Mapping[str, Any]) -> str | None:
    """Return what to do if nearly all units of an evaluated run are collapsed, else None."""
    units, lost = values.get("units"), values.get("collapsed_units")
    if units is None or lost is None or values["test_size"] < 2:  # of one observation, no unit has information
        return None
    if units - lost > units // 100:
        return None
    which = f"all {units}" if lost == units else f"{lost:.0f} of {units}"
    beta = ", a smaller --beta" if values.get("beta") is not None else ""
    return (
        f"{which} units are collapsed (information below 0.01 nats), so the latents carry almost no information about "
        f"the data: train longer, or with a lower --prior-lr-multiplier{beta} or a smaller --batch-size"
    )
