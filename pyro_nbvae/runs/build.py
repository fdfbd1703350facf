"""From a configuration to the objects that it names."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from pyro.infer import ELBO

from pyro_nbvae.data import full_name, source_of
from pyro_nbvae.distributions.relaxations import RELAXATIONS, Relaxation
from pyro_nbvae.errors import InputError, check_member, check_positive, check_seed
from pyro_nbvae.infer import MonteCarloKL_ELBO, SiteKL_ELBO
from pyro_nbvae.likelihoods import LIKELIHOODS
from pyro_nbvae.runs.config import CATEGORIES, KL_SAMPLES, PRESETS, TrainConfig
from pyro_nbvae.runs.processes import local_rank
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, StandardPrior
from pyro_nbvae.variants import VARIANTS, Variant, estimator, variant

# Numbers that must be positive, and their largest value: beyond it a run ends in no time that anybody has.
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
    """Raises InputError for a field whose type is a choice of words and whose value is another."""
    for name, hint in get_type_hints(type(config)).items():
        literals = [one for one in (hint, *get_args(hint)) if get_origin(one) is Literal]
        value = getattr(config, name)
        for one in literals:
            for word in value if isinstance(value, tuple) else [] if value is None else [value]:
                check_member(name.replace("_", " "), word, get_args(one))


def validate(config: TrainConfig) -> TrainConfig:
    """Validates the configuration and returns it.

    Raises:
        InputError: for a name that does not exist, a number out of range, and flags that do not go together.
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
        raise InputError(f"--relaxation is for {takers}, {config.variant} has its own: leave it out")
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
    if config.prior_lr is not None and not learns_prior(parts):
        raise InputError(f"--prior-lr: the prior of {config.variant} is not learned: leave it out")
    if config.prior_mean is not None and "prior_mean" not in parts.settings:
        raise InputError(f"--prior-mean: the model of {config.variant} does not take it: leave it out")
    relaxation, known = _chosen_relaxation(config)
    if config.relaxation == "auto":
        known = set()  # it chooses them
    for name in (*_RELAXATION_OPTIONS, *_SCHEDULE):
        if getattr(config, name) and ("temperature" if name in _SCHEDULE else name) not in known:
            kind = "auto" if config.relaxation == "auto" else type(relaxation).__name__
            what = "no relaxation" if relaxation is None else f"the relaxation {kind}"
            raise InputError(
                f"--{name.replace('_', '-')}: {config.variant} has {what}, which does not take it: leave it out"
            )
    return config


def _pinned(factory: Callable[..., object]) -> set[str]:
    """The arguments that functools.partial has fixed: a variant's own choice, which a configuration does not change."""
    names: set[str] = set()
    while isinstance(factory, functools.partial):
        names |= set(factory.keywords)
        factory = factory.func
    return names


def learns_prior(parts: Variant) -> bool:
    """Whether a variant's prior has parameters: every model's but those of the standard prior."""
    factory: Callable[..., object] = parts.model
    while isinstance(factory, functools.partial):
        factory = factory.func
    return getattr(factory, "prior_class", None) is not StandardPrior


def _make(factory: Callable[..., Made], *arguments: object, **options: object) -> Made:
    """``factory(*arguments, **options)``, but for the options that it has fixed."""
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
    if isinstance(elbo, MonteCarloKL_ELBO) and config.kl_samples and "num_samples" not in _pinned(factory):
        elbo.num_samples = config.kl_samples
    return elbo


def is_estimator(config: TrainConfig, kind: type[ELBO]) -> bool:
    """Whether a configuration's estimator is of that class."""
    return isinstance(_build_estimator(config), kind)


def _chosen_relaxation(config: TrainConfig) -> tuple[Relaxation | None, set[str]]:
    """The variant's relaxation, or the one that the configuration names, and the names of its options."""
    name = None if config.relaxation == "auto" else config.relaxation
    chosen = variant(config.variant).relaxation if name is None else RELAXATIONS[name]()
    return chosen, set() if chosen is None else {f.name for f in dataclasses.fields(chosen)}


def _relaxation(config: TrainConfig) -> Relaxation | None:
    """The configuration's relaxation with its options."""
    chosen, known = _chosen_relaxation(config)
    if chosen is None:
        return None
    given = {name: getattr(config, name) for name in _RELAXATION_OPTIONS if name in known}
    return dataclasses.replace(chosen, **{k: v for k, v in given.items() if v is not None})


def resolve(config: TrainConfig, event_shape: tuple[int, ...]) -> TrainConfig:
    """The configuration with every value that was left open decided, by the preset and the shape of an observation.

    Raises:
        InputError: as :func:`validate`.
    """
    validate(config)
    preset = dict(PRESETS[config.preset])
    if config.preset == "default":
        preset |= variant(config.variant).defaults
    relaxation = _chosen_relaxation(config)[0]
    name = next((name for name, kind in RELAXATIONS.items() if isinstance(relaxation, kind)), None)
    preset["temperature"] = preset["temperature"].get(name, relaxation.coldest if relaxation else None)
    preset["anneal_epochs"] = preset["anneal_epochs"] or (config.epochs or preset["epochs"]) / 2
    if preset["temperature"] is None:  # nothing to anneal
        preset["temperature_start"] = preset["anneal_epochs"] = None
    if not is_estimator(config, SiteKL_ELBO):
        preset["kl_warmup"] = 0.0
    pace = preset.pop("prior_pace")
    preset["prior_lr"] = pace * config.lr
    if "prior_mean" not in variant(config.variant).settings:
        preset["prior_mean"] = None
    if not learns_prior(variant(config.variant)):
        preset["prior_lr"] = None
    preset["kl_samples"] = KL_SAMPLES if is_estimator(config, MonteCarloKL_ELBO) else None
    preset["categories"] = CATEGORIES if "categories" in variant(config.variant).settings else None
    # The paper's loss sums squared errors over the last axis of the decoder's output and averages the rest, and
    # averages the KL over latents; its units are this many squared errors per image.
    units = float(event_shape[0] * event_shape[1]) if config.decoder == "conv" and len(event_shape) == 3 else 1.0
    preset["clip"] = preset["clip"] or units
    if config.likelihood == "gaussian":
        preset["beta"] = units / config.latents
    else:
        preset["clip"] = 250.0
    decided = {k: v for k, v in preset.items() if getattr(config, k) is None}
    return dataclasses.replace(config, **decided, data=full_name(config.data))


def build(config: TrainConfig, event_shape: tuple[int, ...]) -> tuple[GenerativeModel, AmortizedGuide, ELBO]:
    """The model, guide and estimator of a resolved configuration."""
    parts = variant(config.variant)
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
    """The shape of one observation of a data set."""
    return tuple(source_of(data).event_shape)


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA if available (under torchrun a GPU for each process), else the CPU.

    Raises:
        InputError: for a device that torch does not know or does not have.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        if device.type == "cuda":
            device = torch.device("cuda", local_rank() if device.index is None else device.index)
            torch.cuda.set_device(device)  # what nccl and the fused kernels take for this process's
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, ImportError) as error:
        raise InputError(f"device {name!r} is not available: use auto, cpu or a GPU that torch sees") from error
    return device
