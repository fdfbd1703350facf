"""The run folder, which contains everything that the other commands need.

    config.json    the configuration, with all defaults resolved
    checkpoint.pt  parameters, optimiser state, random states and log after the last complete epoch
    log.csv        one row per epoch
    metrics.json   results of ``nbvae evaluate``
    prior.pt       a mixture fitted to the posteriors by ``nbvae fit-prior``
    *.png          plots

Files are written under a temporary name and then renamed, so a run that is killed loses at most one epoch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import pandas as pd
from filelock import FileLock, Timeout
from torch import Tensor
from typing_extensions import TypedDict

from pyro_nbvae.errors import InputError
from pyro_nbvae.priors import FittedMixture
from pyro_nbvae.study import plugins
from pyro_nbvae.study.build import build, choose_device, load_data
from pyro_nbvae.study.config import from_json, to_json
from pyro_nbvae.study.data import Data
from pyro_nbvae.study.data.sources import SOURCES
from pyro_nbvae.study.errors import first_line
from pyro_nbvae.study.files import (
    check_out,
    expanded,
    read_tensors,
    remove_parts,
    write_atomically,
    write_tensors,
    write_text,
)
from pyro_nbvae.study.tree import SamplerName, TrainConfig, options, replace
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel

# Version of config.json; it grows when older runs would be read wrongly: another field, or another network or formula.
SCHEMA = 7
# The package that reads older runs.
OLDER = "0.1.0"
# Those of saved rows; "moments" was a mixture of the posteriors' moments, in the place of the fitted prior.
SAMPLERS: tuple[str, ...] = (*get_args(SamplerName), "moments")
# Options that may change when a run is resumed.
_MAY_CHANGE = {"epochs", "patience", "tensorboard", "deterministic", "device", "data_root"}
# Options that say what the data have, whose fingerprint is compared.
_MAY_CHANGE |= {"covariates", "conditions", "given"}


def identity(config: TrainConfig[Any]) -> dict[str, Any]:
    """Return the options that may not change when a run is resumed."""
    known = options(config) | {"validate": config.training.validated}
    return {name: value for name, value in known.items() if name not in _MAY_CHANGE}


def differences(before: TrainConfig[Any], now: TrainConfig[Any]) -> dict[str, tuple[object, object]]:
    """Return the options that differ between two configurations of one run but may not, as {name: (before, now)}."""
    there, here = identity(before), identity(now)
    return {k: (there.get(k), here.get(k)) for k in {**there, **here} if there.get(k) != here.get(k)}


class LaterVersionError(InputError):
    """A file that was written by a later version of this package."""


def parse_config(stored: object) -> tuple[TrainConfig[Any], tuple[int, ...]]:
    """Parse the content of config.json.

    Args:
        stored: the JSON object.

    Returns:
        ``(config, event_shape)``.

    Raises:
        InputError: for a missing or unknown key, a value of the wrong type or out of range, and for a file of another
            version.
    """
    if not isinstance(stored, dict):
        raise InputError(f"expected a JSON object, got a {type(stored).__name__}")
    version, shape = stored.get("schema_version"), stored.get("event_shape")
    if type(version) is not int or version < SCHEMA:
        raise InputError(f"schema_version is {version}: pyro-nbvae {OLDER} reads this run; or train it again")
    if version > SCHEMA:
        raise LaterVersionError(
            f"schema_version is {version}, but this pyro-nbvae reads version {SCHEMA}: update pyro-nbvae"
        )
    if not isinstance(shape, list) or not shape or not all(type(n) is int and 0 < n <= 1 << 20 for n in shape):
        raise InputError(f"event_shape must be a list of positive whole numbers, got {shape}")
    if unknown := stored.keys() - {"schema_version", "event_shape", "config"}:
        raise InputError(f"unknown key {', '.join(map(repr, sorted(unknown)))}")
    config = from_json(stored.get("config"))
    still_open = [name for name, value in options(config).items() if value is None and name in _RESOLVED]
    if still_open:
        raise InputError(f"{', '.join(still_open)}: a trained run has a value")
    return config, tuple(shape)


# Options that have a value after training.
_RESOLVED = {"epochs", "clip", "beta", "kl_warmup", "anneal_epochs", "prior_mean", "encoder", "decoder"}


def config_json(config: TrainConfig[Any], event_shape: tuple[int, ...]) -> dict[str, object]:
    """Return the content of config.json for a configuration."""
    return {"schema_version": SCHEMA, "event_shape": list(event_shape), "config": to_json(config)}


def _check_state(state: Mapping[str, object]) -> None:
    """Raise ValueError if a part of the checkpoint is missing."""
    parts: dict[str, type] = {"model": dict, "guide": dict, "optimizer": dict, "scheduler": dict, "log": list}
    parts |= {"rng": list, "never_observed": Tensor}
    for name, kind in parts.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"it has no entry {name}")
    if state.get("best") is not None and not isinstance(state["best"], dict):
        raise ValueError("its entry best is not a dictionary")


def _restore(model: GenerativeModel, guide: AmortizedGuide, state: Mapping[str, Any], of: str) -> None:
    try:
        model.load_state_dict(state["model"])
        guide.load_state_dict(state["guide"])
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split(":\n")[-1].split())
        raise InputError(f"{of} ({reason[:200]}): the files belong to different runs") from None


def load(path: str | Path, device: str = "auto", *, fitted: bool = False) -> tuple[GenerativeModel, AmortizedGuide]:
    """Load a trained pair: :func:`pyro_nbvae.load`, which documents it."""
    plugins.import_modules()
    path = Path(path)
    if path.is_file() or path.suffix == ".safetensors":
        if fitted:
            raise InputError(f"{path} holds no fitted prior: give the run folder")
        model, guide = _load_weights(path)
    else:
        run = Run(path)
        _, model, guide = run.load_from(run.read_checkpoint(), "cpu", fitted=fitted)
    chosen = choose_device(device)
    return model.to(chosen).eval(), guide.to(chosen).eval()


def _digest(config: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the checksum of exported weights: a safetensors file has none of its own."""
    found = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        found.update(f"\n{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        found.update(tensors[name].numpy().tobytes())
    return found.hexdigest()


def _load_weights(path: Path) -> tuple[GenerativeModel, AmortizedGuide]:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata["sha256"] != _digest(metadata["config"], tensors):
            raise ValueError("its checksum is wrong")
        config, event_shape = parse_config(json.loads(metadata["config"]))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        raise InputError(f"{path} holds no exported run ({error}): give a file written by nbvae export") from None
    model, guide, _ = build(config, event_shape)
    state: dict[str, dict[str, Tensor]] = {"model": {}, "guide": {}}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        state.setdefault(part, {})[key] = tensor
    _restore(model, guide, state, f"{path} does not match its own configuration")
    return model, guide


def _fingerprint(state: Checkpoint) -> str:
    """Return the checksum of the parameters that a checkpoint's evaluation uses."""
    best: Any = state["best"] or state
    return _digest("", {f"{part}.{k}": v for part in ("model", "guide") for k, v in best[part].items()})


def metrics_file(sampler: str = "prior") -> str:
    """Return the name of the metrics file in a run folder for this sampler."""
    return "metrics.json" if sampler == "prior" else f"metrics-{sampler}.json"


def with_sampler(name: str, sampler: str) -> str:
    """Return the name under which the results of a variant's samples stand."""
    return name if sampler == "prior" else f"{name} ({sampler})"


# Lock file of a folder in which a process trains, and suffix of a file that cannot be read.
LOCK = ".lock"
DAMAGED = ".damaged"
# Names of the plots of spike counts.
SPIKE_PLOTS = ("rasters", "psths", "dispersion", "latents", "trajectories", "pit", "stability")
# Files that the commands write.
WRITTEN = {
    *("config.json", "checkpoint.pt", "log.csv", "relaxation.json", "prior.pt", "tensorboard", LOCK),
    *("dispersion.png", *map(metrics_file, SAMPLERS)),
    *(f"{name}{end}" for name in ("samples", *(f"samples-{s}" for s in SAMPLERS)) for end in (".png", ".npz")),
    *("reconstructions.png", "weights.safetensors", "encoder.pt2", "decoder.pt2"),
    *("latents.npz", "predictions.npz", *(f"spikes-{name}.png" for name in SPIKE_PLOTS)),
    *(f"{name}{end}.png" for name in ("components", "paths") for end in ("", "-mixture")),
}


def ends_early(log: Sequence[Mapping[str, float]], patience: int | None) -> bool:
    """Return whether the last epochs of a log have brought no better ELBO on the validation data."""
    found = [row["validation_elbo"] for row in log if "validation_elbo" in row]
    return patience is not None and bool(found) and len(found) - 1 - found.index(max(found)) >= patience


class Checkpoint(TypedDict):
    """What ``checkpoint.pt`` holds."""

    model: dict[str, Tensor]
    guide: dict[str, Tensor]
    optimizer: dict[str, Any]
    log: list[dict[str, float]]
    rng: list[tuple[Tensor, Tensor | None]]
    best: dict[str, Any] | None  # parameters of the best epoch, if training is validated
    scheduler: dict[str, Any]
    made_by: Mapping[str, object]
    data: str
    limits: tuple[float, float]
    never_observed: Tensor  # which values the training data never have, bool (*event_shape)


class Run:
    """A run folder.

    Args:
        folder: path of the folder; it need not exist yet.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def checkpoint_path(self) -> Path:
        """Path of ``checkpoint.pt``."""
        return self.folder / "checkpoint.pt"

    @property
    def config_path(self) -> Path:
        """Path of ``config.json``."""
        return self.folder / "config.json"

    @property
    def metrics_paths(self) -> list[Path]:
        """Paths of the metrics of every sampler, whether they exist or not."""
        return [self.folder / name for name in map(metrics_file, SAMPLERS)]

    def config(self) -> tuple[TrainConfig[Any], tuple[int, ...]]:
        """Read the resolved configuration and the shape of an observation.

        Raises:
            InputError: if the folder contains no run.
        """
        try:
            return parse_config(json.loads(self.config_path.read_text()))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{self.folder} holds no run (no config.json): give a folder written by nbvae train"
            ) from None
        except InputError as error:
            raise type(error)(f"{self.config_path}: {error}") from None
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else first_line(error)
            raise InputError(f"{self.config_path} is not a valid configuration ({reason}): train again") from None

    def completed(self, config: TrainConfig[Any]) -> TrainConfig[Any]:
        """Return a configuration with what it leaves open taken from this run, and check that it is the same run.

        The data may have moved: their fingerprint is compared when they are loaded.

        Raises:
            InputError: as :meth:`config` and :meth:`check_same`.
        """
        before, _ = self.config()
        if getattr(config.relaxation, "kind", None) == "auto":
            config = replace(config, relaxation=before.relaxation)
        there = options(before)
        left_open = {k: there[k] for k, v in options(config).items() if v in (None, "auto", "released") and k in there}
        config = replace(config, **left_open)
        self.check_same(replace(config, data=before.data))
        return config

    def check_same(self, config: TrainConfig[Any]) -> None:
        """Raise InputError if the folder contains a run with another configuration."""
        changed = {k: both for k, both in differences(self.config()[0], config).items() if k != "data"}
        if changed:
            what = ", ".join(f"{k} {there} there, {here} here" for k, (there, here) in changed.items())
            raise InputError(f"{self.folder} holds another run ({what}): give the same flags, or choose another --out")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Context in which no other process can train in this folder. The lock of a killed process is released.

        Raises:
            InputError: if another process holds the lock.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK, blocking=False)
        try:
            with lock:
                remove_parts(self.folder)
                yield
        except Timeout:
            raise InputError(
                f"another process is training in {self.folder}: wait until it ends, or choose another --out"
            ) from None

    def holds_others(self) -> bool:
        """Whether the path is a file, or a folder that contains no run but files that training does not write."""
        if not self.folder.exists():
            return False
        if not self.folder.is_dir():
            return True
        return not self.checkpoint_path.exists() and any(
            path.name not in WRITTEN and path.suffix not in (".part", DAMAGED) for path in self.folder.iterdir()
        )

    def check_data(self, state: Checkpoint, data: Data) -> None:
        """Check that data are those of the training, whose hash is in the checkpoint.

        Raises:
            InputError: if they are others: observations held out now may have been trained on.
        """
        if state.get("data") not in (None, data.fingerprint):
            raise InputError(
                f"{data.name} does not hold the data that {self.folder} was trained on: restore them, give their place "
                "with --data, or train again with another --out"
            )

    def data_of(self, state: Checkpoint, data_root: str | None = None, data_path: str | None = None) -> Data:
        """Load the data of the training, from ``data_path``, ``data_root`` or from where they were then.

        Raises:
            InputError: as :func:`~pyro_nbvae.study.data.load` and :meth:`check_data`.
        """
        data = load_data(self.config()[0], data_path or self.data_place(), data_root)
        self.check_data(state, data)
        return data

    def data_place(self) -> str:
        """Return where the data were that the run was trained on.

        Raises:
            InputError: if nothing is there.
        """
        name = self.config()[0].data
        if name not in SOURCES and not expanded(name).exists():
            raise InputError(
                f"the data of {self.folder} are not at {name} any more: give their new place with --data (nbvae encode "
                "and predict: after the run), or --import the module that registers them"
            )
        return name

    def unfinished(self) -> str | None:
        """Return how to finish a run that trained fewer epochs than it was told to, else None."""
        training, log = self.config()[0].training, self.read_checkpoint()["log"]
        if training.epochs is None or len(log) >= training.epochs or ends_early(log, training.patience):
            return None
        return f"{len(log)} of {training.epochs} epochs are trained: nbvae train --resume continues"

    def set_aside(self) -> list[Path]:
        """Rename files that cannot be read, and the files that depend on them; return the new paths.

        Raises:
            InputError: for a run of a later version, which is not damaged.
        """
        damaged = []
        try:
            self.config()
        except LaterVersionError:
            raise
        except InputError:
            damaged = [self.config_path, self.checkpoint_path, *self.metrics_paths]
        else:
            try:
                self.read_checkpoint()
            except InputError:
                damaged = [self.checkpoint_path, *self.metrics_paths]
        return [path.replace(path.with_name(path.name + DAMAGED)) for path in damaged if path.is_file()]

    def remove_metrics(self) -> None:
        """Remove the metrics of every sampler."""
        for path in self.metrics_paths:
            path.unlink(missing_ok=True)

    def write_config(self, config: TrainConfig[Any], event_shape: tuple[int, ...]) -> None:
        """Write ``config.json``."""
        self.write_json("config.json", config_json(config, event_shape))

    def write_json(self, name: str, content: Mapping[str, object]) -> Path:
        """Write a JSON file to the folder and return its path."""
        # JSON has no NaN and no infinity: write null
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
        write_text(self.folder / name, json.dumps(finite, indent=2) + "\n")
        return self.folder / name

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a file of :meth:`write_json`; return an empty dictionary if it is missing or damaged."""
        try:
            content = json.loads((self.folder / name).read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def write_log(self, rows: list[dict[str, float]]) -> None:
        """Write ``log.csv``, one row per epoch."""
        write_text(self.folder / "log.csv", pd.DataFrame(rows).to_csv(index=False))

    def write_checkpoint(self, state: Checkpoint) -> None:
        """Write ``checkpoint.pt``."""
        write_tensors(self.checkpoint_path, state)

    def read_checkpoint(self) -> Checkpoint:
        """Read the checkpoint, on the CPU.

        Raises:
            InputError: if there is none, or it cannot be read.
        """
        try:
            state = read_tensors(self.checkpoint_path)
            _check_state(state)
            return cast(Checkpoint, state)
        except (FileNotFoundError, NotADirectoryError):
            self.config()  # if there is no run at all, report that instead
            raise InputError(f"{self.folder} has no checkpoint yet: finish an epoch with train --resume") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{self.checkpoint_path} cannot be read ({reason}): train the run again") from error

    @property
    def prior_path(self) -> Path:
        """Path of the prior that was fitted after training."""
        return self.folder / "prior.pt"

    def write_prior(self, prior: FittedMixture, state: Checkpoint) -> None:
        """Write a prior that was fitted to the posteriors of a checkpoint; what an earlier one gave is removed."""
        content = {"counts": prior.counts, "parts": prior.parts, "of": _fingerprint(state), **prior.state_dict()}
        for name in WRITTEN:
            if "-mixture." in name:
                (self.folder / name).unlink(missing_ok=True)
        write_tensors(self.prior_path, content)

    def read_prior(self, state: Checkpoint) -> FittedMixture:
        """Read the prior of :meth:`write_prior`.

        Raises:
            InputError: if there is none, it cannot be read, or it was fitted to another checkpoint.
        """
        again = f"nbvae fit-prior {self.folder}"
        try:
            content = read_tensors(self.prior_path)
            if content["of"] != _fingerprint(state):
                raise InputError(f"{self.prior_path} was fitted to an earlier checkpoint: fit it again with {again}")
            reference = [content[f"reference_{k}"] for k in range(2)]
            shift = [content[f"shift_{k}"] for k in range(content["parts"])]
            return FittedMixture(content["counts"], reference, shift, content["component_logits"])
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError(f"{self.folder} has no fitted prior: fit a mixture with {again}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.prior_path} cannot be read, it is damaged: fit it again with {again}") from error

    def restore(self, model: GenerativeModel, guide: AmortizedGuide, state: Mapping[str, Any]) -> None:
        """Load parameters from a checkpoint into a pair.

        Raises:
            InputError: if their shapes do not match config.json.
        """
        _restore(model, guide, state, f"{self.checkpoint_path} does not match {self.config_path}")

    def load(self, device: str = "auto") -> tuple[TrainConfig[Any], GenerativeModel, AmortizedGuide]:
        """Load configuration, model and guide of a trained run, in evaluation mode, on the device."""
        return self.load_from(self.read_checkpoint(), device)

    def load_from(
        self, state: Checkpoint, device: str = "auto", *, fitted: bool = False
    ) -> tuple[TrainConfig[Any], GenerativeModel, AmortizedGuide]:
        """Load configuration, model and guide as :meth:`load`, from a checkpoint that is already in memory.

        If training was validated they are those of the best epoch, else of the last.

        Args:
            state: the checkpoint.
            device: auto (CUDA if available) or a PyTorch device string.
            fitted: whether the model has the prior of :meth:`write_prior`.
        """
        config, event_shape = self.config()
        model, guide, _ = build(config, event_shape)
        self.restore(model, guide, state["best"] or state)
        if fitted:
            model.set_joint_prior(self.read_prior(state))
        chosen = choose_device(device)
        return config, model.to(chosen).eval(), guide.to(chosen).eval()

    def export(self, path: Path | None = None) -> Path:
        """Write the parameters and the configuration as one safetensors file, which :func:`load` reads.

        Args:
            path: path of the file. Default: ``weights.safetensors`` in the folder.

        Returns:
            Path of the file.

        Raises:
            InputError: if there is no trained run, the folder of the file does not exist, or the path is a folder.
        """
        from safetensors.torch import save

        config, event_shape = self.config()
        state = self.read_checkpoint()
        best: Any = state["best"] or state
        tensors = {f"{part}.{k}": v.clone().contiguous() for part in ("model", "guide") for k, v in best[part].items()}
        described = json.dumps(config_json(config, event_shape))
        content = save(tensors, metadata={"config": described, "sha256": _digest(described, tensors)})
        path = path or self.folder / "weights.safetensors"
        check_out(path)
        write_atomically(path, lambda file: file.write(content))
        return path
