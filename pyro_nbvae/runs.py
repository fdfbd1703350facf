"""A run: its configuration, and the folder that holds all that the other commands need.

    config.json    the configuration, every default resolved
    checkpoint.pt  parameters, optimiser, random states and log after the last whole epoch
    log.csv        one row an epoch
    metrics.json   what ``nbvae evaluate`` measured
    *.png          pictures

Files are written under a temporary name and renamed, so that a run that is killed loses at most an epoch.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pyro_nbvae.config import PRESETS, TrainConfig
from pyro_nbvae.data import SOURCES
from pyro_nbvae.distributed import local_rank
from pyro_nbvae.distributions.samplers import INDICATORS, RELAXATIONS
from pyro_nbvae.errors import InputError, check_member, check_seed
from pyro_nbvae.files import write_tensors, write_text
from pyro_nbvae.infer import MonteCarloKL_ELBO
from pyro_nbvae.infer.elbo import SiteKL_ELBO
from pyro_nbvae.networks import DECODERS, ENCODERS
from pyro_nbvae.vae import AmortizedGuide, ImageModel
from pyro_nbvae.variants import VARIANTS, variant


def validate(config: TrainConfig) -> TrainConfig:
    """The configuration, if it can be.

    Raises:
        InputError: for a name that does not exist or a number out of range.
    """
    variant(config.variant)
    check_member("data", config.data, SOURCES)
    check_member("encoder", config.encoder, ENCODERS)
    check_member("decoder", config.decoder, DECODERS)
    check_member("indicator", config.indicator, INDICATORS)
    check_member("preset", config.preset, PRESETS)
    if config.relaxation is not None:
        check_member("relaxation", config.relaxation, RELAXATIONS)
        if not variant(config.variant).any_relaxation:
            takers = ", ".join(name for name, parts in VARIANTS.items() if parts.any_relaxation)
            raise InputError(f"--relaxation is for {takers}, {config.variant} has its own: leave it out")
    positive = (
        "train_images latents beta temperature_start temperature anneal_epochs max_count epochs batch_size lr clip "
        "kl_samples"
    )
    for name in positive.split():
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"--{name.replace('_', '-')} must be positive, got {value}")
    check_seed(config.seed)
    if config.kl_warmup is not None and not config.kl_warmup >= 0:
        raise InputError(f"--kl-warmup must not be negative, got {config.kl_warmup}")
    return config


def _relaxation(config: TrainConfig) -> str:
    return config.relaxation or variant(config.variant).options.get("relaxation", "arrival")


def resolve(config: TrainConfig, image_shape: tuple[int, int, int]) -> TrainConfig:
    """The configuration with every value that was left open decided, by the preset and the image shape.

    Raises:
        InputError: as :func:`validate`.
    """
    validate(config)
    preset = dict(PRESETS[config.preset])
    preset["temperature"] = preset["temperature"][_relaxation(config)]
    # The paper's loss sums squared errors over the last axis of the decoder's output and averages the rest, and
    # averages the KL over latents (DESIGN 3.6); its units are this many squared errors per image.
    units = float(image_shape[0] * image_shape[1]) if config.decoder == "conv" else 1.0
    preset["clip"] = preset["clip"] or units
    preset["beta"] = units / config.latents
    preset["anneal_epochs"] = preset["anneal_epochs"] or (config.epochs or preset["epochs"]) / 2
    return dataclasses.replace(config, **{k: v for k, v in preset.items() if getattr(config, k) is None})


def build(config: TrainConfig, image_shape: tuple[int, int, int]) -> tuple[ImageModel, AmortizedGuide, SiteKL_ELBO]:
    """The model, guide and estimator of a resolved configuration."""
    parts = variant(config.variant)
    settings = {name: getattr(config, name) for name in parts.settings}
    model = parts.model(image_shape, config.latents, decoder=config.decoder, beta=config.beta, **settings)
    options = {**parts.options, "relaxation": _relaxation(config)}
    guide = parts.guide(
        model,
        encoder=config.encoder,
        temperature=config.temperature,
        indicator=config.indicator,
        max_count=config.max_count,
        straight_through=config.straight_through,
        **options,
    )
    model.mixed_precision = guide.mixed_precision = config.mixed_precision
    samples = {"num_samples": config.kl_samples} if parts.estimator is MonteCarloKL_ELBO else {}
    return model, guide, parts.estimator(**samples)


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where it is (under torchrun a GPU for each process), else the CPU.

    Raises:
        InputError: for a device that torch does not know or does not have.
    """
    if name == "auto":
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} is not to be had here: use auto, cpu or a GPU that torch sees") from error
    return device


class Run:
    """A run folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def config_path(self) -> Path:
        return self.folder / "config.json"

    def config(self) -> tuple[TrainConfig, tuple[int, int, int]]:
        """The resolved configuration and the image shape.

        Raises:
            InputError: where the folder holds no run.
        """
        try:
            stored = json.loads(self.config_path.read_text())
            channels, height, width = stored.pop("image_shape")
            return validate(TrainConfig(**stored)), (channels, height, width)
        except FileNotFoundError:
            raise InputError(
                f"{self.folder} holds no run (no config.json): name a folder that nbvae train wrote"
            ) from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{self.config_path} is no configuration of a run ({error}): train it anew") from None

    def write_config(self, config: TrainConfig, image_shape: tuple[int, int, int]) -> None:
        stored = {**dataclasses.asdict(config), "image_shape": list(image_shape)}
        self.write_json("config.json", stored)

    def write_json(self, name: str, content: Any) -> Path:
        write_text(self.folder / name, json.dumps(content, indent=2) + "\n")
        return self.folder / name

    def read_json(self, name: str) -> dict[str, Any]:
        """What :meth:`write_json` wrote; empty where there is no such file, or a damaged one."""
        try:
            return json.loads((self.folder / name).read_text())
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
            return {}

    def write_log(self, rows: list[dict[str, float]]) -> None:
        write_text(self.folder / "log.csv", pd.DataFrame(rows).to_csv(index=False))

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        write_tensors(self.checkpoint_path, state)

    def read_checkpoint(self) -> dict[str, Any]:
        """The checkpoint, on the CPU.

        Raises:
            InputError: where there is none, or none that can be read.
        """
        try:
            return torch.load(io.BytesIO(self.checkpoint_path.read_bytes()), map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise InputError(f"{self.folder} has no checkpoint yet: let nbvae train --resume finish an epoch") from None
        except Exception as error:
            raise InputError(
                f"{self.checkpoint_path} cannot be read ({type(error).__name__}): train it anew"
            ) from error

    def restore(self, model: ImageModel, guide: AmortizedGuide, state: dict[str, Any]) -> None:
        """Loads parameters from a checkpoint.

        Raises:
            InputError: where they are of another shape than config.json says.
        """
        try:
            model.load_state_dict(state["model"])
            guide.load_state_dict(state["guide"])
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split(":\n")[-1].split())
            raise InputError(
                f"{self.checkpoint_path} does not fit {self.config_path} ({reason[:200]}): they are of different runs"
            ) from None

    def load(self, device: str = "auto") -> tuple[TrainConfig, ImageModel, AmortizedGuide]:
        """Configuration, model and guide of a trained run, in evaluation mode, on the device."""
        config, image_shape = self.config()
        model, guide, _ = build(config, image_shape)
        self.restore(model, guide, self.read_checkpoint())
        where = choose_device(device)
        return config, model.to(where).eval(), guide.to(where).eval()
