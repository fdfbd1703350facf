"""Build a model, a guide and an estimator from a configuration."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from pyro.infer import ELBO

from pyro_nbvae.batching import is_image_shape
from pyro_nbvae.distributions.relaxations import RELAXATIONS, Relaxation
from pyro_nbvae.errors import InputError
from pyro_nbvae.infer import MonteCarloKL_ELBO, SiteKL_ELBO
from pyro_nbvae.likelihoods import LIKELIHOODS
from pyro_nbvae.study.config import CATEGORIES, KL_SAMPLES, PRESETS, TrainConfig
from pyro_nbvae.study.data import Data, full_name, source_of
from pyro_nbvae.study.errors import check_member, check_positive, check_seed
from pyro_nbvae.study.files import expanded
from pyro_nbvae.study.processes import local_rank
from pyro_nbvae.study.variants import VARIANTS, Variant, check_estimator, estimator, variant
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, StandardPrior

# Options that must be positive, with their largest accepted value. A run with a larger value would never finish.
_MOST: dict[str, float] = {
    "train_size": 1_000_000_000,
    "latents": 1_000_000,
    "beta": 1e12,
    "temperature_start": 100.0,
    "temperature": 100.0,
    "anneal_epochs": 1_000_000,
    "max_count": 100_000,
    "epochs": 1_000_000,
    "batch_size": 10_000_000,
    "lr": 1e3,
    "prior_lr": 1e5,
    "prior_mean": 1e6,
    "clip": 1e30,
    "kl_samples": 10_000,
    "categories": 10_000,
}
_RELAXATION_OPTIONS = ("temperature", "indicator", "max_count", "straight_through")
_SCHEDULE = ("temperature_start", "anneal_epochs")
Made = TypeVar("Made")


def check_choices(config: object) -> None:
    """Raise InputError if a field with a fixed set of choices has another value."""
    for name, hint in get_type_hints(type(config)).items():
        literals = [one for one in (hint, *get_args(hint)) if get_origin(one) is Literal]
        value = getattr(config, name)
        for one in literals:
            for word in value if isinstance(value, tuple) else [] if value is None else [value]:
                check_member(name.replace("_", " "), word, get_args(one))


def validate(config: TrainConfig) -> TrainConfig:
    """Validate a configuration and return it.

    Raises:
        InputError: for an unknown name, a number out of range, and options that cannot be combined.
    """
    parts = variant(config.variant)
    check_choices(config)
    for name, most in _MOST.items():
        value = getattr(config, name)
        if value is not None:
            check_positive(f"--{name.replace('_', '-')}", value, most)
    check_seed(config.seed)
    if config.kl_warmup is not None and not 0 <= config.kl_warmup <= _MOST["epochs"]:
        raise InputError(f"--kl-warmup must be 0 to {_MOST['epochs']:,} epochs, got {config.kl_warmup}")
    if config.relaxation is not None and not parts.any_relaxation:
        takers = ", ".join(name for name, each in VARIANTS.items() if each.any_relaxation)
        raise InputError(f"--relaxation is for {takers}; {config.variant} has a relaxation of its own: leave it out")
    if config.beta is not None and config.likelihood != "gaussian":
        raise InputError(f"--beta is for --likelihood gaussian: leave it out with {config.likelihood}")
    if config.kl_warmup and not is_estimator(config, SiteKL_ELBO):
        raise InputError(
            f"--kl-warmup: {config.estimator or 'the estimator'} does not weigh the KL; leave it out, or 0"
        )
    if config.kl_samples is not None and not is_estimator(config, MonteCarloKL_ELBO):
        raise InputError("--kl-samples is for MonteCarloKL_ELBO: leave it out")
    if config.categories is not None and "categories" not in parts.settings:
        raise InputError(f"--categories is for C-VAE, {config.variant} has none: leave it out")
    if config.max_count is not None and "categories" in parts.settings:
        raise InputError(f"--max-count is for counts, {config.variant} has categories: leave it out")
    if config.prior_lr is not None and not learns_prior(parts):
        raise InputError(f"--prior-lr: the prior of {config.variant} is not learned: leave it out")
    if config.prior_mean is not None and "prior_mean" not in parts.settings:
        raise InputError(f"--prior-mean: the model of {config.variant} does not take it: leave it out")
    relaxation, known = _chosen_relaxation(config)
    if config.relaxation == "auto":
        known = set()  # auto chooses these options itself
    for name in (*_RELAXATION_OPTIONS, *_SCHEDULE):
        if getattr(config, name) and ("temperature" if name in _SCHEDULE else name) not in known:
            kind = "auto" if config.relaxation == "auto" else type(relaxation).__name__
            what = "no relaxation" if relaxation is None else f"the relaxation {kind}"
            raise InputError(
                f"--{name.replace('_', '-')}: {config.variant} has {what}, which does not take it: leave it out"
            )
    return config


def _pinned(factory: Callable[..., object]) -> set[str]:
    """Return the names of the arguments that functools.partial fixes; a configuration does not change them."""
    names: set[str] = set()
    while isinstance(factory, functools.partial):
        names |= set(factory.keywords)
        factory = factory.func
    return names


def learns_prior(parts: Variant) -> bool:
    """Whether a variant has a learned prior. Only the standard prior has no parameters."""
    factory: Callable[..., object] = parts.model
    while isinstance(factory, functools.partial):
        factory = factory.func
    return getattr(factory, "prior_class", None) is not StandardPrior


def _make(factory: Callable[..., Made], *arguments: object, **options: object) -> Made:
    """Call ``factory`` without the options that functools.partial has already fixed."""
    return factory(*arguments, **{k: v for k, v in options.items() if k not in _pinned(factory)})


def _build_estimator(config: TrainConfig) -> ELBO:
    factory = variant(config.variant).estimator if config.estimator is None else estimator(config.estimator)
    try:
        elbo = factory()
    except TypeError as error:
        raise InputError(
            f"estimator {config.estimator or factory}: {error}; fix its arguments in a variant of your own, "
            "estimator=functools.partial(...)"
        ) from None
    check_estimator(type(elbo))
    if isinstance(elbo, MonteCarloKL_ELBO) and config.kl_samples and "num_samples" not in _pinned(factory):
        elbo.num_samples = config.kl_samples
    return elbo


def is_estimator(config: TrainConfig, kind: type[ELBO]) -> bool:
    """Whether the estimator of a configuration is an instance of this class."""
    return isinstance(_build_estimator(config), kind)


def _chosen_relaxation(config: TrainConfig) -> tuple[Relaxation | None, set[str]]:
    """Return the relaxation (the configuration's, else the variant's) and the names of its options."""
    name = None if config.relaxation == "auto" else config.relaxation
    chosen = variant(config.variant).relaxation if name is None else RELAXATIONS[name]()
    return chosen, set() if chosen is None else {f.name for f in dataclasses.fields(chosen)}


def _relaxation(config: TrainConfig) -> Relaxation | None:
    """Return the relaxation with the options of the configuration."""
    chosen, known = _chosen_relaxation(config)
    if chosen is None:
        return None
    given = {name: getattr(config, name) for name in _RELAXATION_OPTIONS if name in known}
    return dataclasses.replace(chosen, **{k: v for k, v in given.items() if v is not None})


def _with_defaults(config: TrainConfig) -> TrainConfig:
    """Return the configuration with the variant's own defaults in the place of None; the preset ``paper`` has none.

    Raises:
        InputError: for a default of a field that is never None, and for a setting that is not a field.
    """
    parts = variant(config.variant)
    for name in parts.settings:
        check_member(f"setting of variant {config.variant}", name, [f.name for f in dataclasses.fields(TrainConfig)])
    given = {} if config.preset == "paper" else parts.defaults
    open_fields = [f.name for f in dataclasses.fields(TrainConfig) if f.default is None]
    for name in given:
        check_member(f"default of variant {config.variant}", name, open_fields)
    decided = {name: value for name, value in given.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **decided)


def steps_per_epoch(observations: int, batch_size: int) -> int:
    """Return the number of steps. A single observation joins the batch before it: batch normalisation needs two."""
    full, rest = divmod(observations, batch_size)
    return max(1, full + (rest > 1))


def resolve(config: TrainConfig, event_shape: tuple[int, ...], data: Data | None = None) -> TrainConfig:
    """Return the configuration with every None replaced by its default, from the preset and the data.

    Args:
        config: the configuration.
        event_shape: shape of an observation.
        data: the data, whose number and scale some defaults of the preset ``default`` depend on. Without it they are
            those of few images in [0, 1].

    Raises:
        InputError: as :func:`validate`.
    """
    config = validate(_with_defaults(config))
    preset = {"preset": config.preset or "default", **PRESETS[config.preset or "default"]}
    pace, steps = preset.pop("prior_rate"), preset.pop("steps")
    relaxation = _chosen_relaxation(config)[0]
    name = next((name for name, kind in RELAXATIONS.items() if isinstance(relaxation, kind)), None)
    for field in ("temperature_start", "temperature", "prior_mean"):
        preset[field] = preset[field].get(name, preset[field][None])
    for field in ("encoder", "decoder"):
        preset[field] = preset[field][is_image_shape(event_shape)]

    def chosen(field: str) -> Any:
        value = getattr(config, field)
        return preset[field] if value is None else value

    if data is not None:
        observations = len(data.train[: config.train_size])
        each = steps_per_epoch(observations, chosen("batch_size"))
        preset["epochs"] = max(preset["epochs"], math.ceil(steps / each))
    if preset["kl_warmup"] is None:
        preset["kl_warmup"] = chosen("epochs") / 10
    preset["temperature"] = preset["temperature"] or (relaxation.coldest if relaxation else None)
    preset["anneal_epochs"] = preset["anneal_epochs"] or chosen("epochs") / 2
    if preset["temperature"] is None:  # nothing to anneal
        preset["temperature_start"] = preset["anneal_epochs"] = None
    else:
        preset["temperature_start"] = max(preset["temperature_start"], config.temperature or preset["temperature"])
    if not is_estimator(config, SiteKL_ELBO):
        preset["kl_warmup"] = 0.0
    preset["prior_lr"] = pace * chosen("lr")
    settings = variant(config.variant).settings
    if "prior_mean" not in settings:
        preset["prior_mean"] = None
    if not learns_prior(variant(config.variant)):
        preset["prior_lr"] = None
    preset["kl_samples"] = KL_SAMPLES if is_estimator(config, MonteCarloKL_ELBO) else None
    preset["categories"] = CATEGORIES if "categories" in settings else None
    # The paper's loss sums the squared errors over the last axis of the decoder's output and averages over the other
    # axes, and averages the KL over latents. One unit of it is this many squared errors per image
    # (docs/mathematics.md, section 1.3).
    conv = chosen("decoder").endswith("conv") and len(event_shape) == 3
    units = float(event_shape[0] * event_shape[1]) if conv else 1.0
    preset["clip"] = preset["clip"] or units
    if config.likelihood != "gaussian":
        preset["beta"], preset["clip"] = None, 250.0
    elif preset["beta"] is None:
        preset["beta"] = units / chosen("latents")
    elif data is not None:
        preset["beta"] *= data.scale**2
    decided = {k: v for k, v in preset.items() if getattr(config, k) is None}
    # as absolute paths, which are valid in every folder
    root = None if config.data_root is None else str(expanded(config.data_root).resolve())
    return dataclasses.replace(config, **decided, data=full_name(config.data), data_root=root)


def build(config: TrainConfig, event_shape: tuple[int, ...]) -> tuple[GenerativeModel, AmortizedGuide, ELBO]:
    """Build the model, guide and estimator of a resolved configuration."""
    parts = variant(config.variant)
    assert config.latents is not None
    settings = {name: getattr(config, name) for name in parts.settings if getattr(config, name) is not None}
    noise = {"beta": config.beta} if config.likelihood == "gaussian" else {}
    likelihood = LIKELIHOODS[config.likelihood](**noise)
    networks = {"decoder": config.decoder, "likelihood": likelihood}
    model = _make(parts.model, event_shape, config.latents, **networks, **settings)
    relaxation = _relaxation(config)
    options = dict(parts.options) if relaxation is None else {**parts.options, "relaxation": relaxation}
    guide = _make(parts.guide, model, encoder=config.encoder, **options)
    model.mixed_precision = guide.mixed_precision = config.mixed_precision
    return model, guide, _build_estimator(config)


def event_shape_of(data: str) -> tuple[int, ...]:
    """Return the shape of one observation of a data set."""
    return tuple(source_of(data).event_shape)


def choose_device(name: str) -> torch.device:
    """Return the PyTorch device with this name.

    ``auto`` selects CUDA if it is available (under torchrun one GPU per process), else the CPU.

    Raises:
        InputError: for a device that is unknown or not available.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "meta":
            raise RuntimeError("it stores no values")
        if device.type == "cuda":
            device = torch.device("cuda", local_rank() if device.index is None else device.index)
            torch.cuda.set_device(device)  # NCCL and the fused kernels use the current device
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, ImportError) as error:
        raise InputError(f"device {name!r} is not available: use auto, cpu or a GPU that torch sees") from error
    return device
