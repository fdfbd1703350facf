"""From a configuration to the objects that it names."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from pyro.infer import ELBO

from pyro_nbvae.data import full_name, source_of
from pyro_nbvae.distributions.relaxations import RELAXATIONS, Relaxation
from pyro_nbvae.errors import InputError, check_member, check_seed
from pyro_nbvae.infer import MonteCarloKL_ELBO, SiteKL_ELBO
from pyro_nbvae.likelihoods import LIKELIHOODS
from pyro_nbvae.runs.config import PRESETS, TrainConfig
from pyro_nbvae.runs.processes import local_rank
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel
from pyro_nbvae.variants import VARIANTS, Variant, estimator, variant

_POSITIVE = [
    "train_size",
    "latents",
    "beta",
    "temperature_start",
    "temperature",
    "anneal_epochs",
    "max_count",
    "epochs",
    "batch_size",
    "lr",
    "clip",
    "kl_samples",
]
_OF_THE_RELAXATION = ("indicator", "max_count", "straight_through", "temperature_start", "temperature", "anneal_epochs")


def check_choices(config: Any) -> None:
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
    for name in _POSITIVE:
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"--{name.replace('_', '-')} must be positive, got {value}")
    check_seed(config.seed)
    if config.kl_warmup is not None and not config.kl_warmup >= 0:
        raise InputError(f"--kl-warmup must not be negative, got {config.kl_warmup}")
    if config.relaxation is not None and not parts.any_relaxation:
        takers = ", ".join(name for name, each in VARIANTS.items() if each.any_relaxation)
        raise InputError(f"--relaxation is for {takers}, {config.variant} has its own: leave it out")
    if config.beta is not None and config.likelihood != "gaussian":
        raise InputError(f"--beta is for --likelihood gaussian: leave it out with {config.likelihood}")
    if config.kl_warmup and not is_estimator(config, SiteKL_ELBO):
        raise InputError(
            f"--kl-warmup: {config.estimator or 'the estimator'} does not weigh the KL; leave it out, or 0"
        )
    relaxation = parts.relaxation if config.relaxation is None else RELAXATIONS[config.relaxation]()
    known = set() if relaxation is None else {f.name for f in dataclasses.fields(relaxation)}  # type: ignore[arg-type]
    for name in _OF_THE_RELAXATION:
        needs = "temperature" if name in ("temperature_start", "anneal_epochs") else name
        if getattr(config, name) and needs not in known:
            what = "no relaxation" if relaxation is None else f"the relaxation {type(relaxation).__name__}"
            raise InputError(
                f"--{name.replace('_', '-')}: {config.variant} has {what}, which does not take it: leave it out"
            )
    return config


def _estimator(config: TrainConfig) -> Any:
    return variant(config.variant).estimator if config.estimator is None else estimator(config.estimator)


def is_estimator(config: TrainConfig, kind: type[ELBO]) -> bool:
    """Whether a configuration's estimator is of that class."""
    found = _estimator(config)
    while isinstance(found, functools.partial):
        found = found.func
    return isinstance(found, type) and issubclass(found, kind)


def _relaxation(config: TrainConfig, parts: Variant) -> Relaxation | None:
    """The variant's relaxation, or the one that the configuration names, with the configuration's options."""
    base = parts.relaxation if config.relaxation is None else RELAXATIONS[config.relaxation]()
    if base is None:
        return None
    fields = {f.name for f in dataclasses.fields(base)}  # type: ignore[arg-type]
    given = {name: getattr(config, name) for name in ("temperature", *_OF_THE_RELAXATION[:3])}
    return dataclasses.replace(base, **{k: v for k, v in given.items() if v is not None and k in fields})  # type: ignore[type-var]


def resolve(config: TrainConfig, event_shape: tuple[int, ...]) -> TrainConfig:
    """The configuration with every value that was left open decided, by the preset and the shape of an observation.

    Raises:
        InputError: as :func:`validate`.
    """
    validate(config)
    preset = dict(PRESETS[config.preset])
    relaxation = _relaxation(dataclasses.replace(config, temperature=None), variant(config.variant))
    name = next((name for name, kind in RELAXATIONS.items() if isinstance(relaxation, kind)), None)
    preset["temperature"] = preset["temperature"].get(name, relaxation.coldest if relaxation else None)
    preset["anneal_epochs"] = preset["anneal_epochs"] or (config.epochs or preset["epochs"]) / 2
    if preset["temperature"] is None:  # nothing to anneal
        preset["temperature_start"] = preset["anneal_epochs"] = None
    if not is_estimator(config, SiteKL_ELBO):
        preset["kl_warmup"] = 0.0
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
    settings = {name: getattr(config, name) for name in parts.settings}
    noise = {"beta": config.beta} if config.likelihood == "gaussian" else {}
    likelihood = LIKELIHOODS[config.likelihood](**noise)
    model = parts.model(event_shape, config.latents, decoder=config.decoder, likelihood=likelihood, **settings)
    relaxation = _relaxation(config, parts)
    options = dict(parts.options) if relaxation is None else {**parts.options, "relaxation": relaxation}
    guide = parts.guide(model, encoder=config.encoder, **options)
    model.mixed_precision = guide.mixed_precision = config.mixed_precision
    samples = {"num_samples": config.kl_samples} if is_estimator(config, MonteCarloKL_ELBO) else {}
    return model, guide, _estimator(config)(**samples)


def event_shape_of(data: str) -> tuple[int, ...]:
    """The shape of one observation of a data set, without reading all of it."""
    return tuple(source_of(data).event_shape)


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA if available (under torchrun a GPU for each process), else the CPU.

    Raises:
        InputError: for a device that torch does not know or does not have.
    """
    if name == "auto":
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} is not available: use auto, cpu or a GPU that torch sees") from error
    return device
