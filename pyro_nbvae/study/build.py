"""From a configuration to a model, a guide and an estimator: what depends on the data is decided here."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from pyro.infer import ELBO

from pyro_nbvae.batching import is_image_shape
from pyro_nbvae.errors import InputError
from pyro_nbvae.study.data import Data, full_name, load
from pyro_nbvae.study.data.arrays import fold_of
from pyro_nbvae.study.files import expanded
from pyro_nbvae.study.processes import local_rank
from pyro_nbvae.study.tree import Network, Reading, TrainConfig, options, replace
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel

# Least number of passes over the training data and of steps, if the number of epochs is open.
EPOCHS, STEPS = 20, 600
# One of so many training observations is held out if training is validated.
VALIDATED = 10


def steps_per_epoch(observations: int, batch_size: int) -> int:
    """Return the number of steps. A single observation joins the batch before it: batch normalisation needs two."""
    full, rest = divmod(observations, batch_size)
    return max(1, full + (rest > 1))


def validation_rows(config: TrainConfig[Any], data: Data) -> torch.Tensor:
    """Return which of the training observations validate, bool (N,): none, or a tenth with the labels of the others.

    Of groups, a tenth; of fewer than ten, one.

    Raises:
        InputError: for a single observation, or group.
    """
    number = len(data.train[: config.train_size])
    if not config.training.validated:
        return torch.zeros(number, dtype=torch.bool)
    labels, groups = (None if part is None else part[:number].numpy() for part in (data.train_labels, data.groups[0]))
    there = number if groups is None else len(np.unique(groups))
    if there < 2:
        what = "observations" if groups is None else "groups"
        raise InputError(f"--validate and --patience need at least two training {what}, got {there}: leave them out")
    return torch.from_numpy(fold_of(number, Reading(folds=min(VALIDATED, there)), labels, groups) == 0)


def load_data(
    config: TrainConfig[Any], name: str | None = None, root: str | None = None, *, whole: bool = False
) -> Data:
    """Load the data of a run, with the covariates that it is conditioned on.

    Args:
        config: the configuration.
        name: the data set, if it is not that of the configuration.
        root: the data root, if it is not that of the configuration.
        whole: hold nothing out: all observations of a file, in their order; those of a registered data set, with the
            held-out ones last.

    Raises:
        InputError: as :func:`~pyro_nbvae.study.data.load` and :meth:`~pyro_nbvae.study.data.Data.conditioned`.
    """
    reading = dataclasses.replace(config.reading, whole=whole)
    data = load(name or config.data, root or config.data_root, reading=reading)
    return data.conditioned(config.condition, config.conditions, config.reading.labels)


def _network(name: Network | None, default: str, image: bool) -> str:
    if name == "released":
        return "released_conv" if image else "released_mlp"
    return name or default


def resolve(config: TrainConfig[Any], event_shape: tuple[int, ...], data: Data | None = None) -> TrainConfig[Any]:
    """Return the configuration with every default that depends on the data, or on another option, in its place.

    Args:
        config: the configuration.
        event_shape: shape of an observation.
        data: the data, whose number and scale some defaults depend on. Without it they are those of few images in
            [0, 1].
    """
    training, image = config.training, is_image_shape(event_shape)
    epochs = training.epochs or EPOCHS
    if training.epochs is None and data is not None:
        steps = steps_per_epoch(int((~validation_rows(config, data)).sum()), training.batch_size)
        epochs = max(EPOCHS, math.ceil(STEPS / steps))
    counts = config.likelihood.kind in ("poisson", "negative_binomial", "com_poisson")
    network = "conv" if image else "temporal" if counts and len(event_shape) == 2 else "mlp"
    decoder = _network(config.decoder, network, image)
    # The released loss sums the squared errors over the last axis of the decoder's output and averages over the other
    # axes, and averages the KL over latents; colours are scaled to [-1, 1], which quadruples their squared errors. One
    # unit of it is this many squared errors per observation (docs/mathematics.md, section 1.3).
    axes = float(event_shape[0] * event_shape[1]) if decoder.endswith("conv") and len(event_shape) == 3 else 1.0
    units = axes / 4 if image and event_shape[0] == 3 else axes
    squared = training.loss == "squared_error"
    gumbel = getattr(config.relaxation, "kind", None) == "gumbel"
    decided = {
        "epochs": epochs,
        "clip": units if squared else 250.0,
        "beta": units / config.latents if squared else 0.1 * (data.scale**2 if data is not None else 1.0),
        "kl_warmup": epochs / 10,
        "anneal_epochs": epochs / 2,
        "prior_mean": 2.0 if gumbel else 20.0,
    }
    there = options(config)
    still_open = {name: value for name, value in decided.items() if name in there and there[name] is None}
    return replace(
        config,
        **still_open,
        encoder=_network(config.encoder, network, image),
        decoder=decoder,
        **({} if data is None else _of_data(config, data)),
        # as absolute paths, which are valid in every folder
        data=full_name(config.data),
        data_root=None if config.data_root is None else str(expanded(config.data_root).resolve()),
    )


def _of_data(config: TrainConfig[Any], data: Data) -> dict[str, Any]:
    """Return what a run records of its data: covariates, the names of labels that they stand for, and what is given."""
    conditions = data.classes if config.condition == "labels" else None
    return {"covariates": data.covariates, "conditions": conditions, "given": tuple(data.training.given)}


def build(config: TrainConfig[Any], event_shape: tuple[int, ...]) -> tuple[GenerativeModel, AmortizedGuide, ELBO]:
    """Build the model, guide and estimator of a resolved configuration."""
    assert config.encoder is not None and config.decoder is not None
    likelihood = config.likelihood.build()
    networks = {"encoder": config.encoder, "decoder": config.decoder}
    options: dict[str, Any] = {"covariates": config.covariates} if config.covariates else {}
    model, guide = config.vae.build(event_shape, config.latents, likelihood=likelihood, **networks, **options)
    if config.held_out_neurons:
        guide.reads = held_in(config, event_shape).expand(event_shape).clone()
    model.mixed_precision = guide.mixed_precision = config.training.mixed_precision
    return model, guide, config.vae.estimator.build()


def held_in(config: TrainConfig[Any], event_shape: tuple[int, ...]) -> torch.Tensor:
    """Return which neurons the encoder reads, bool, (neurons,); the others are drawn with the seed of the run.

    Raises:
        InputError: if it would read all or none.
    """
    neurons = event_shape[-1]
    number = round(config.held_out_neurons * neurons)
    if not 0 < number < neurons:
        raise InputError(
            f"--held-out-neurons {config.held_out_neurons:g} of {neurons} neurons are {number}: hold out at least one "
            "and not all"
        )
    order = torch.randperm(neurons, generator=torch.Generator().manual_seed(config.seed))
    read = torch.ones(neurons, dtype=torch.bool)
    read[order[:number]] = False
    return read


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
