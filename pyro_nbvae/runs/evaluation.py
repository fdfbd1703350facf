"""Evaluation of a run. A metric is one entry of ``METRICS``: its name, how tables show it, how it is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from pyro_nbvae.data import Data, load, to_bytes, to_floats
from pyro_nbvae.errors import check_member, check_number, check_seed
from pyro_nbvae.metrics import (
    HeldOut,
    build_features,
    distances,
    gradient_moments,
    held_out,
    importance_weighted_bound,
    latent_classification,
)
from pyro_nbvae.metrics.features import Features
from pyro_nbvae.metrics.latents import LABELLED, SHOTS, Representation
from pyro_nbvae.runs.build import build
from pyro_nbvae.runs.folder import Run
from pyro_nbvae.runs.generation import sampler_of
from pyro_nbvae.sampling import MOST_SAMPLES, SamplerName, decoded

# For gradient_noise: batch size and number of draws.
GRADIENT_BATCH, GRADIENT_DRAWS = 64, 50


@dataclass
class Evaluation:
    """A trained run and its data, and what several metrics need of them, each computed once and only when asked for.

    Args:
        run: a trained run.
        features: which features FID and KID use, of ``classifier`` and ``inception``.
        inception_weights: torch-fidelity's file, if it is not in the data root.
        samples: number of generated observations.
        sampler: what their latents are drawn from, ``prior`` or ``mixture``.
        importance_samples: latents per observation of the importance-weighted bound; 0 leaves it out.
        seed: of the latents that are drawn and of KID's subsets.
        device: auto (CUDA if available) or a PyTorch device string.
        data_root: folder of the data sets, if not where the run figures them.
        progress: show progress bars.

    Raises:
        InputError: for a folder that holds no trained run, for data or weights that are not available, and for a number
            out of range.
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
    progress: bool = True
    networks: dict[str, Features] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_number("--importance-samples", self.importance_samples, 0, 100_000)
        check_number("--samples", self.samples, 2, MOST_SAMPLES)
        check_seed(self.seed)
        state = self.run.read_checkpoint()  # once: a training beside this one may write the next
        self.config, self.model, self.guide = self.run.load_from(state, self.device)
        self.log: list[dict[str, float]] = state["log"]
        self.made_by = state.get("made_by", {})
        root = self.data_root or self.config.data_root
        self.data: Data = load(self.config.data, root)
        if self.data.images:
            for name in self.features:
                network = build_features(
                    name, self.config.data, data_root=root, inception_weights=self.inception_weights
                )
                self.networks[name] = network.to(self.model.device)

    @property
    def train_set(self) -> Tensor:
        """The data that the run was trained on."""
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
        """One pass over the held-out data."""
        return held_out(self.model, self.guide, self.test, seed=self.seed, progress=self.progress)

    @cached_property
    def bound(self) -> float | None:
        """The importance-weighted bound."""
        if not self.importance_samples:
            return None
        bounds = importance_weighted_bound(
            self.model, self.guide, self.test, self.importance_samples, seed=self.seed, progress=self.progress
        )
        return float(bounds.mean())

    @cached_property
    def distances(self) -> dict[str, float]:
        """FID and KID in every feature set that was asked for; of images only."""
        figures: dict[str, float] = {}
        if self.networks:
            sampler = sampler_of(self.sampler, self.model, self.guide, lambda: self.train_set)
            for network in self.networks.values():  # batches that are drawn again need no memory
                generated = map(to_bytes, decoded(self.model, self.guide, sampler, self.samples, seed=self.seed))
                figures |= distances(network, self.data.train, generated, seed=self.seed, progress=self.progress)
        return figures

    @cached_property
    def classification(self) -> dict[Representation, dict[str, float]]:
        """Accuracies of classifiers on latents, by representation; filled as they are asked for."""
        return {}

    def accuracy(self, representation: Representation, name: str) -> float | None:
        """An accuracy of a classifier on latents; None for data without labels."""
        if self.data.train_labels is None or self.data.test_labels is None:
            return None
        if representation not in self.classification:
            figures = latent_classification(self.model, self.guide, self.data, representation)
            self.classification[representation] = figures
        return self.classification[representation].get(name)

    def gradient_noise(self) -> float | None:
        """Noise to signal of the gradient by the run's own estimator and relaxation, on a batch of held-out data.

        None for an estimator of Pyro's that gives no loss to differentiate (TraceGraph_ELBO, RenyiELBO).
        """
        _, _, elbo = build(self.config, tuple(self.model.event_shape))
        x = to_floats(self.test[:GRADIENT_BATCH])
        if not hasattr(elbo, "differentiable_loss"):
            return None
        moments = gradient_moments(elbo, self.model, self.guide, x, GRADIENT_DRAWS, seed=self.seed)
        return moments.noise / moments.signal

    def seconds_per_step(self) -> float:
        """The median over the run's epochs, as it was trained."""
        steps = math.ceil(self.trained_on / self.config.batch_size)
        return median(row["seconds"] for row in self.log) / steps


class Metric(NamedTuple):
    """A figure of a run.

    Args:
        name: as ``metrics.json`` names it.
        heading: of its column.
        digits: decimals in tables.
        best: which end is best, if either is.
        compute: from an :class:`Evaluation`; None where the figure does not exist for the run.
        standard: whether ``nbvae evaluate`` computes it; otherwise only a table that lists it does.
        of: what it is measured on, for a table's caption.
    """

    name: str
    heading: str
    digits: int
    best: Literal["low", "high"] | None
    compute: Callable[[Evaluation], float | None]
    standard: bool = True
    of: Literal["held-out data", "samples", "latents", "training"] = "held-out data"


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
        Metric(f"{prefix}{name}", heading, 3, "high", partial(accuracy, name, kind), standard=False, of="latents")
        for kind in representations
        for prefix in ("" if kind == "encoder" else f"{kind}_",)
        for name, heading in columns
    ]


def _objective(e: Evaluation) -> float | None:
    beta, error = getattr(e.model.likelihood, "beta", None), e.held_out.squared_error
    return None if beta is None or error is None else error + beta * e.held_out.kl


_SHIPPED = (
    _held("mse", "MSE", 4, "low"),
    _held("ssim", "SSIM", 3, "high"),
    # FID-c and KID-c are in our classifiers' features, FID and KID in Inception's
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
    Metric("seconds_per_step", "s/step", 3, None, Evaluation.seconds_per_step, of="training"),
    Metric("gradient_noise", "gradient noise", 2, "low", Evaluation.gradient_noise, standard=False),
    *_accuracies(),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _SHIPPED}


def register_metric(metric: Metric) -> None:
    """Makes a metric known: to ``nbvae evaluate``, and to tables that list it."""
    METRICS[metric.name] = metric


def settings(epochs: int, seed: int, samples: int, features: Sequence[str]) -> dict[str, object]:
    """What figures depend on beside the run, as ``metrics.json`` names it: figures of other settings are not kept."""
    return {"epochs": epochs, "seed": seed, "generated_samples": samples, "feature_sets": list(features)}


def metrics_file(sampler: SamplerName = "prior") -> str:
    """The file of a run folder for figures of samples of that kind."""
    return "metrics.json" if sampler == "prior" else f"metrics-{sampler}.json"


def _evaluate_sampler(run: Run, options: Mapping[str, Any]) -> dict[str, object]:
    """Measures samples that are not the prior's, and nothing else; in a file of their own."""
    this = Evaluation(run, **options)
    figures = {
        "variant": f"{this.config.variant} ({this.sampler})",
        "data": this.config.data,
        **settings(len(this.log), this.seed, this.samples, this.features),
        "train_size": this.trained_on,
        **this.made_by,
        **{name: one.compute(this) for name, one in METRICS.items() if one.standard and one.of == "samples"},
    }
    run.write_json(metrics_file(this.sampler), figures)
    return figures


def evaluate(run: Run, metrics: Sequence[str] | None = None, **options: Any) -> dict[str, object]:
    """Measures a run on its held-out data; writes ``metrics.json`` and, of counts, ``dispersion.png``.

    Everything is from exact latents (integer counts). ``mse`` (per element) and ``ssim`` are of reconstructions from
    one sample; ``fid_c``, ``kid_c`` and ``kid_std_c`` (with Inception features ``fid``, ``kid``, ``kid_std``)
    compare samples of the prior with the training images; ``elbo`` and ``importance_weighted_bound`` are nats per
    observation, ``bits_per_dim`` is -elbo / (elements * ln 2) (of images add 8 for 8-bit pixels); ``kl`` is nats per
    observation; ``dead_units`` have a mean KL below 0.01 nats; ``fano`` is the posterior's mean variance over mean,
    ``underdispersed_units`` the share of the other units whose posterior varies less than a Poisson;
    ``overdispersion`` is the mean over units of the variance over the mean of their counts across observations. What
    does not exist for a run (SSIM without images, say) is None. Beside the figures stands what trained the run:
    ``commit``, ``version``, ``torch_version``, ``machine``, ``threads`` and ``date``.

    With another sampler than the prior only the samples are measured, into ``metrics-mixture.json``.

    Args:
        run: a trained run.
        metrics: names in ``METRICS``. Default: the standard ones. Figures that the folder holds of the same checkpoint
            and settings stay beside them.
        **options: as :class:`Evaluation`.

    Raises:
        InputError: as :class:`Evaluation`, and for a metric that does not exist.
    """
    from pyro_nbvae.plotting import plot_dispersion

    names = [name for name, one in METRICS.items() if one.standard] if metrics is None else list(metrics)
    for name in names:
        check_member("metric", name, METRICS)
    sampler = options.get("sampler", "prior")
    check_member("sampler", sampler, get_args(SamplerName))
    if sampler != "prior":
        return _evaluate_sampler(run, options)
    this = Evaluation(run, **options)
    config, data = this.config, this.data
    about = {
        "variant": config.variant,
        "data": config.data,
        **settings(len(this.log), this.seed, this.samples, this.features),
        "importance_samples": this.importance_samples,
        "train_size": this.trained_on,
        "test_size": len(data.test),
        "feature_networks": [network.network for network in this.networks.values()],
        **this.made_by,
        "units": this.held_out.unit_kl.numel(),
        "kl_per_unit": this.held_out.unit_kl.tolist(),
    }
    before = run.read_json("metrics.json")
    same = before.items() >= settings(len(this.log), this.seed, this.samples, this.features).items()
    kept = {name: value for name, value in before.items() if same and name in METRICS and name not in names}
    if "importance_weighted_bound" in kept:
        about["importance_samples"] = before["importance_samples"]
    figures = about | kept | {name: METRICS[name].compute(this) for name in names}
    if this.held_out.fano is not None:
        units = {"across observations": (this.held_out.unit_mean, this.held_out.unit_variance)}
        if this.held_out.posterior_mean is not None and this.held_out.posterior_variance is not None:
            units["given one: the posterior"] = this.held_out.posterior_mean, this.held_out.posterior_variance
        plot_dispersion(units, run.folder / "dispersion.png", title=config.title)
    run.write_json("metrics.json", figures)
    return figures
