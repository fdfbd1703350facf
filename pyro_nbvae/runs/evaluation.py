"""Evaluation of a run. Each metric is an entry of ``METRICS``: name, format in tables, and how to compute it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from pyro_nbvae.data import Data, to_bytes, to_floats
from pyro_nbvae.data.sources import is_pixels
from pyro_nbvae.errors import InputError, check_member, check_number, check_seed
from pyro_nbvae.metrics import (
    HeldOut,
    build_features,
    distances,
    gradient_moments,
    held_out,
    importance_weighted_bound,
    latent_classification,
)
from pyro_nbvae.metrics.features import Features, check_features, suffix_of
from pyro_nbvae.metrics.latents import LABELLED, SHOTS, Representation
from pyro_nbvae.runs.build import build
from pyro_nbvae.runs.config import SamplerName
from pyro_nbvae.runs.folder import Run, metrics_file, with_sampler
from pyro_nbvae.runs.generation import sampler_of
from pyro_nbvae.sampling import MOST_SAMPLES, decoded

# Batch size and number of draws for gradient_noise.
GRADIENT_BATCH, GRADIENT_DRAWS = 64, 50


@dataclass
class Evaluation:
    """A trained run, its data, and intermediate results that several metrics share; each is computed once, when needed.

    Args:
        run: a trained run.
        features: features for FID and KID, keys of :data:`~pyro_nbvae.metrics.FEATURES`; one of Inception's at most.
        inception_weights: torch-fidelity's weights file, if it is not in the data root.
        samples: number of generated observations.
        sampler: distribution of the latents of generated observations, ``prior``, ``mixture`` or ``posterior``.
        importance_samples: samples per observation for the importance-weighted bound; with 0 it is not computed.
        seed: random seed of the latents and of the subsets for KID.
        device: auto (CUDA if available) or a PyTorch device string.
        data_root: folder of the data sets, if it is not the one of the training.
        data_path: where the data of the training are now, if they have moved.
        progress: show progress bars.

    Raises:
        InputError: for a folder that contains no trained run, for data or weights that are not available, and for a
            number out of range.
    """

    run: Run
    features: Sequence[str] = ("classifier",)
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
        self.config, self.model, self.guide = self.run.load_from(state, self.device)
        self.log: list[dict[str, float]] = state["log"]
        self.made_by = state.get("made_by", {})
        self.data: Data = self.run.data_of(state, self.data_root, self.data_path)
        check_features(self.features)
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
    def train_set(self) -> Tensor:
        """The training data of the run."""
        return self.data.train[: self.config.train_size]

    @property
    def trained_on(self) -> int:
        """Number of training observations."""
        return len(self.train_set)

    @cached_property
    def test(self) -> Tensor:
        """The held-out data, on the device."""
        return self.data.test.to(self.model.device)

    @cached_property
    def held_out(self) -> HeldOut:
        """Results of one pass over the held-out data."""
        return held_out(self.model, self.guide, self.test, seed=self.seed, progress=self.progress)

    @cached_property
    def bound(self) -> float | None:
        """Importance-weighted bound in nats per observation; None if no importance samples are requested."""
        if not self.importance_samples:
            return None
        bounds = importance_weighted_bound(
            self.model, self.guide, self.test, self.importance_samples, seed=self.seed, progress=self.progress
        )
        return float(bounds.mean())

    @cached_property
    def distances(self) -> dict[str, float]:
        """FID and KID in each requested feature set; empty if the data are not images.

        Images whose values are not in [0, 1] are compared on the scale of the training data.
        """
        figures: dict[str, float] = {}
        if self.networks:
            sampler = sampler_of(self.sampler, self.model, self.guide, lambda: self.train_set)
            real, bytes_of = self.data.train, partial(to_bytes, limits=self.data.limits)
            if not is_pixels(real):
                real = bytes_of(real)
            for network in self.networks.values():  # drawn again for each network, to save memory
                generated = map(bytes_of, decoded(self.model, self.guide, sampler, self.samples, seed=self.seed))
                figures |= distances(network, real, generated, seed=self.seed, progress=self.progress)
        return figures

    @cached_property
    def classification(self) -> dict[Representation, dict[str, float]]:
        """Accuracies of classifiers on latents, by representation; filled by :meth:`accuracy`."""
        return {}

    def accuracy(self, representation: Representation, name: str) -> float | None:
        """Return the accuracy of a classifier on latents; None if the data have no labels.

        Args:
            representation: ``encoder``, ``means`` or ``counts`` (:func:`~pyro_nbvae.metrics.represent`).
            name: name of the classifier (:func:`~pyro_nbvae.metrics.classification`).
        """
        if self.data.train_labels is None or self.data.test_labels is None:
            return None
        if representation not in self.classification:
            figures = latent_classification(self.model, self.guide, self.data, representation, seed=self.seed)
            self.classification[representation] = figures
        return self.classification[representation].get(name)

    def gradient_noise(self) -> float | None:
        """Return the noise-to-signal ratio of the gradient on a batch of held-out data.

        Estimator and relaxation are those of the run. None for an ELBO of Pyro without ``differentiable_loss``
        (TraceGraph_ELBO, RenyiELBO), and if the noise is so large that this many draws do not show the signal.
        """
        _, _, elbo = build(self.config, tuple(self.model.event_shape))
        x = to_floats(self.test[:GRADIENT_BATCH])
        if not hasattr(elbo, "differentiable_loss"):
            return None
        moments = gradient_moments(elbo, self.model, self.guide, x, GRADIENT_DRAWS, seed=self.seed)
        seen = moments.signal > 2 * moments.noise / GRADIENT_DRAWS
        return moments.noise / moments.signal if seen else None

    def seconds_per_step(self) -> float:
        """Return the seconds per training step, the median over epochs."""
        steps = math.ceil(self.trained_on / self.config.batch_size)
        return median(row["seconds"] for row in self.log) / steps


class Metric(NamedTuple):
    """A metric of a run.

    Args:
        name: key in ``metrics.json``.
        heading: heading of its column in tables.
        digits: number of decimals in tables.
        best: whether low or high values are better; None if neither.
        compute: maps an :class:`Evaluation` to the value, or to None if the metric is not defined for the run.
        standard: whether ``nbvae evaluate`` computes it by default; if not, only tables that list it do.
        of: what it is measured on, for the caption of a table; speed has a mean only over runs on one machine.

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
    of: Literal["held-out data", "samples", "latents", "training", "speed"] = "held-out data"


def _held(name: str, heading: str, digits: int, best: Literal["low", "high"] | None = None) -> Metric:
    return Metric(name, heading, digits, best, lambda e: getattr(e.held_out, name))


def _distance(name: str, heading: str, digits: int, best: Literal["low", "high"] | None = "low") -> Metric:
    return Metric(name, heading, digits, best, lambda e: e.distances.get(name), of="samples")


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
            f"{prefix}{name}", heading + suffix, 3, "high", partial(accuracy, name, kind), standard=False, of="latents"
        )
        for kind in representations
        for prefix, suffix in (("", "") if kind == "encoder" else (f"{kind}_", f", {kind}"),)
        for name, heading in columns
    ]


def _objective(e: Evaluation) -> float | None:
    beta, error = getattr(e.model.likelihood, "beta", None), e.held_out.squared_error
    return None if beta is None or error is None else error + beta * e.held_out.kl


_SHIPPED = (
    _held("mse", "MSE", 4, "low"),
    _held("ssim", "SSIM", 3, "high"),
    # FID-c and KID-c use features of our classifiers, FID and KID those of Inception
    _distance("fid_c", "FID-c", 2),
    _distance("kid_c", "KID-c", 4),
    _distance("kid_std_c", "± KID-c", 4, None),
    _distance("fid", "FID", 1),
    _distance("kid", "KID", 4),
    _distance("kid_std", "± KID", 4, None),
    _held("elbo", "ELBO", 1, "high"),
    Metric(
        "bits_per_dim",
        "bits/dim",
        3,
        "low",
        lambda e: -e.held_out.elbo / (math.prod(e.model.event_shape) * math.log(2)),
    ),
    Metric("importance_weighted_bound", "IW bound", 1, "high", lambda e: e.bound),
    _held("log_likelihood", "log p(x|z)", 1, "high"),
    _held("squared_error", "SSE", 2, "low"),
    _held("kl", "KL", 2),
    _held("kl_error", "± KL", 3),
    Metric("beta", "β", 3, None, lambda e: getattr(e.model.likelihood, "beta", None), of="training"),
    Metric("objective", "SSE+βKL", 2, "low", _objective),
    _held("dead_units", "dead", 0),
    _held("fano", "Fano", 2),
    _held("underdispersed_units", "Fano < 1", 2),
    _held("overdispersion", "var/mean", 2),
    Metric("seconds_per_step", "s/step", 3, None, Evaluation.seconds_per_step, of="speed"),
    Metric("gradient_noise", "gradient noise", 2, "low", Evaluation.gradient_noise, standard=False),
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
    figures = {one: METRICS[one].compute(this) for one in names}
    for one, figure in figures.items():
        if not isinstance(figure, int | float | None):
            raise InputError(f"metric {one} gave a {type(figure).__name__}: its function must return a float, or None")
    # read afterwards: another process may have added metrics meanwhile
    before = this.run.read_json(metrics_file(this.sampler))
    now = settings(len(this.log), this.seed, this.samples)
    same = before.items() >= now.items()
    networks: dict[str, str | None] = {}
    if any(METRICS[one].of == "samples" for one in names) or not same:
        networks |= {kind: this.networks[kind].network if kind in this.networks else None for kind in this.features}
    if same:
        taken = {suffix_of(kind) for kind in networks}
        others = zip_longest(before.get("feature_sets", []), before.get("feature_networks", []))
        networks |= {kind: network for kind, network in others if suffix_of(kind) not in taken}
    kept = {one: v for one, v in before.items() if same and one in METRICS and figures.get(one) is None}
    if kept.get("importance_weighted_bound") is not None:
        kept["importance_samples"] = before["importance_samples"]
    content = {
        "variant": with_sampler(this.config.variant, this.sampler),
        "data": this.config.data,
        **now,
        "feature_sets": list(networks),
        "feature_networks": [network for network in networks.values() if network is not None],
        "train_size": this.trained_on,
        **about,
        **this.made_by,
        **figures,
        **kept,
    }
    this.run.write_json(metrics_file(this.sampler), content)
    return content


def evaluate(run: Run, metrics: Sequence[str] | None = None, **options: Any) -> dict[str, object]:
    """Evaluate a run on its held-out data; write ``metrics.json`` and, if latents are counts, ``dispersion.png``.

    All metrics use exact latents (integer counts):

    - ``mse`` (per element) and ``ssim``: reconstructions from one posterior sample;
    - ``fid_c``, ``kid_c``, ``kid_std_c`` (with Inception features ``fid``, ``kid``, ``kid_std``): samples from the
      prior against all training images of the data set;
    - ``elbo``, ``kl``, ``importance_weighted_bound``: nats per observation;
    - ``bits_per_dim``: -elbo / (elements * ln 2); for 8-bit images add 8;
    - ``dead_units``: number of units whose mean KL is below 0.01 nats;
    - ``fano``: Fano factor of the posterior, averaged;
    - ``underdispersed_units``: fraction of the other units whose posterior has less variance than a Poisson;
    - ``overdispersion``: variance over mean of a unit's counts across observations, averaged over units.

    A metric that is not defined for the run (SSIM without images, for example) is None. The file also contains the
    provenance of the run: ``commit``, ``version``, ``torch_version``, ``machine``, ``threads`` and ``date``.

    With a sampler other than the prior, only the samples are evaluated; the file is ``metrics-SAMPLER.json``.

    Args:
        run: a trained run.
        metrics: names in ``METRICS``. Default: the standard ones. Other metrics in the file are kept if they belong to
            the same checkpoint and settings, also FID and KID in features that are not asked for now.
        **options: as :class:`Evaluation`.

    Returns:
        The content of the file.

    Raises:
        InputError: as :class:`Evaluation`, for an unknown metric, and for metrics together with another sampler than
            the prior.

    Example::

        >>> import tempfile
        >>> from pyro_nbvae.runs.config import TrainConfig
        >>> from pyro_nbvae.runs.training import train
        >>> config = TrainConfig(train_size=50, latents=3, encoder="linear", decoder="linear", epochs=1, device="cpu")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = train(config, folder, progress=False)
        ...     metrics = evaluate(run, ["elbo", "kl"], features=(), importance_samples=0, device="cpu", progress=False)
        >>> metrics["elbo"] < 0 < metrics["kl"]
        True
    """
    from pyro_nbvae.plotting import plot_dispersion

    names = [name for name, one in METRICS.items() if one.standard] if metrics is None else list(metrics)
    for name in names:
        check_member("metric", name, METRICS)
    sampler = options.get("sampler", "prior")
    check_member("sampler", sampler, get_args(SamplerName))
    if sampler != "prior" and metrics is not None:
        raise InputError(f"samples of the {sampler} have their own metrics: leave out metrics, or sampler")
    this = Evaluation(run, **options)
    if sampler != "prior":
        if not this.data.images:
            raise InputError(f"--sampler {sampler} measures FID and KID, which need images; use the prior")
        return _write(this, [name for name in names if METRICS[name].of == "samples"], {})
    about = {
        "importance_samples": this.importance_samples,
        "test_size": len(this.data.test),
        "units": this.held_out.unit_kl.numel(),
        "kl_per_unit": this.held_out.unit_kl.tolist(),
    }
    figures = _write(this, names, about)
    if this.held_out.fano is not None:
        units = {"across observations": (this.held_out.unit_mean, this.held_out.unit_variance)}
        if this.held_out.posterior_mean is not None and this.held_out.posterior_variance is not None:
            units["given one: the posterior"] = this.held_out.posterior_mean, this.held_out.posterior_variance
        plot_dispersion(units, run.folder / "dispersion.png", title=this.config.title)
    return figures
