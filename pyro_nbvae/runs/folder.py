"""A run folder: all that the other commands need.

    config.json    the configuration, every default resolved
    checkpoint.pt  parameters, optimiser, random states and log after the last whole epoch
    log.csv        one row per epoch
    metrics.json   what ``nbvae evaluate`` measured
    *.png          pictures

Files are written under a temporary name and renamed, so that a run that is killed loses at most an epoch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, cast, get_type_hints

import pandas as pd
from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from pyro_nbvae import plugins
from pyro_nbvae.errors import InputError, first_line
from pyro_nbvae.files import read_tensors, remove_parts, write_atomically, write_tensors, write_text
from pyro_nbvae.runs.build import build, choose_device, resolve, validate
from pyro_nbvae.runs.config import TrainConfig
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel
from pyro_nbvae.variants import VARIANTS

# Of config.json. 1 had no number, and other names for some fields.
SCHEMA = 2
# Its keys and their types: the configuration's, and the shape of an observation.
_HINTS: dict[str, Any] = {**get_type_hints(TrainConfig), "event_shape": list[Annotated[int, Field(ge=1, le=1 << 20)]]}
# Keys that older files of this schema lack.
_LATER = {"prior_lr", "prior_mean"}
_STORED: TypeAdapter[dict[str, Any]] = TypeAdapter(
    with_config(ConfigDict(extra="forbid"))(
        TypedDict(  # type: ignore[operator]
            "Stored", {k: NotRequired[v] if k in _LATER else v for k, v in _HINTS.items()}
        )
    )
)


def _from_schema_1(stored: dict[str, Any]) -> dict[str, Any]:
    """An older configuration under today's names."""
    names = {"image_shape": "event_shape", "train_images": "train_size"}
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    now = defaults | {names.get(k, k): v for k, v in stored.items()}
    for name, default in (("indicator", "sigmoid"), ("max_count", 100)):
        if now.get(name) == default:  # the relaxation's own default, where it has one
            now[name] = None
    name = now.get("variant", "")
    if not name.startswith("MC-"):
        now["kl_samples"] = None
    if name != "C-VAE":
        now["categories"] = None
    parts = VARIANTS.get(name)
    if parts is not None and parts.relaxation is None:
        now |= dict.fromkeys(("temperature_start", "temperature", "anneal_epochs"))
    return now


class LaterVersionError(InputError):
    """A file that a later version wrote."""


def parse_config(stored: object) -> tuple[TrainConfig, tuple[int, ...]]:
    """The configuration and the shape of an observation from what config.json holds.

    Raises:
        InputError: for a key that is missing or unknown, a value of another type or out of range, and for a file of a
            later version.
    """
    if not isinstance(stored, dict):
        raise InputError(f"it holds a {type(stored).__name__}, expected an object")
    stored = dict(stored)
    version = stored.pop("schema_version", 1)
    if version not in (1, SCHEMA):
        raise LaterVersionError(
            f"its schema_version is {version}, this pyro-nbvae reads up to {SCHEMA}: update pyro-nbvae"
        )
    if version == 1:
        stored = _from_schema_1(stored)
    try:
        checked = _STORED.validate_python(stored, strict=True)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise InputError(f"{'.'.join(map(str, wrong['loc'])) or 'it'}: {wrong['msg']}") from None
    given = dict(checked)
    event_shape = tuple(given.pop("event_shape"))
    config = validate(TrainConfig(**given))
    whole = resolve(config, event_shape)
    if version == 1:
        return whole, event_shape
    for name, value in dataclasses.asdict(whole).items():
        if name not in _LATER and value != getattr(config, name):
            raise InputError(f"{name} is {getattr(config, name)}, where a run has a value")
    return config, event_shape


def config_json(config: TrainConfig, event_shape: tuple[int, ...]) -> dict[str, object]:
    """What config.json holds of a configuration."""
    return {"schema_version": SCHEMA, **dataclasses.asdict(config), "event_shape": list(event_shape)}


def _check_state(state: Mapping[str, object]) -> None:
    """Raise ValueError for what is no checkpoint."""
    parts = {"model": dict, "guide": dict, "optimizer": dict, "log": list, "rng": list}
    for name, kind in parts.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"it has no {name}")


def _restore(model: GenerativeModel, guide: AmortizedGuide, state: Mapping[str, Any], of: str) -> None:
    try:
        model.load_state_dict(state["model"])
        guide.load_state_dict(state["guide"])
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split(":\n")[-1].split())
        raise InputError(f"{of} ({reason[:200]}): they are of different runs") from None


def load(path: str | Path, device: str = "auto") -> tuple[GenerativeModel, AmortizedGuide]:
    """Model and guide of a trained run, in evaluation mode (no dropout).

    The guide keeps the run's relaxation; within ``guide.exact()`` it draws integer counts.

    Args:
        path: a run folder, or a ``.safetensors`` file that ``nbvae export`` wrote.
        device: auto (CUDA if available) or a PyTorch device string.

    Raises:
        InputError: for a path that holds no trained run.
    """
    plugins.import_modules()
    path = Path(path)
    if path.is_file() or path.suffix == ".safetensors":
        model, guide = _load_weights(path)
    else:
        _, model, guide = Run(path).load("cpu")
    chosen = choose_device(device)
    return model.to(chosen).eval(), guide.to(chosen).eval()


def _load_weights(path: Path) -> tuple[GenerativeModel, AmortizedGuide]:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            stored = json.loads(file.metadata()["config"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config, event_shape = parse_config(stored)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        raise InputError(f"{path} holds no exported run ({error}): name a file that nbvae export wrote") from None
    model, guide, _ = build(config, event_shape)
    state: dict[str, dict[str, Tensor]] = {"model": {}, "guide": {}}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        state.setdefault(part, {})[key] = tensor
    _restore(model, guide, state, f"{path} does not fit its own configuration")
    return model, guide


# The file that says that a process trains in a folder, and what is added to the name of a file that cannot be read.
LOCK = ".lock"
DAMAGED = ".damaged"
# What training and evaluation write.
WRITTEN = {
    *("config.json", "checkpoint.pt", "log.csv", "relaxation.json", LOCK),
    *("metrics.json", "metrics-mixture.json", "dispersion.png"),
}


class Checkpoint(TypedDict):
    """What ``checkpoint.pt`` holds."""

    model: dict[str, Tensor]
    guide: dict[str, Tensor]
    optimizer: dict[str, Any]
    log: list[dict[str, float]]
    rng: list[tuple[Tensor, Tensor | None]]
    made_by: NotRequired[Mapping[str, object]]


class Run:
    """A run folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def checkpoint_path(self) -> Path:
        """The file of the parameters."""
        return self.folder / "checkpoint.pt"

    @property
    def config_path(self) -> Path:
        """The file of the configuration."""
        return self.folder / "config.json"

    def config(self) -> tuple[TrainConfig, tuple[int, ...]]:
        """The resolved configuration and the shape of an observation.

        Raises:
            InputError: where the folder holds no run.
        """
        try:
            return parse_config(json.loads(self.config_path.read_text()))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{self.folder} holds no run (no config.json): name a folder that nbvae train wrote"
            ) from None
        except InputError as error:
            raise type(error)(f"{self.config_path}: {error}") from None
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else first_line(error)
            raise InputError(f"{self.config_path} is no configuration of a run ({reason}): train it anew") from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Context in which no other process may train into this folder; a killed process holds it no longer.

        Raises:
            InputError: where another process holds the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK, blocking=False)
        try:
            with lock:
                remove_parts(self.folder)
                yield
        except Timeout:
            raise InputError(
                f"another process is training in {self.folder}: wait for it, or name another --out"
            ) from None

    def holds_others(self) -> bool:
        """Whether the path is, or the folder holds, something that no training wrote; a run is no such thing."""
        if not self.folder.exists():
            return False
        if not self.folder.is_dir():
            return True
        return not self.checkpoint_path.exists() and any(
            path.name not in WRITTEN and path.suffix not in (".part", DAMAGED) for path in self.folder.iterdir()
        )

    def set_aside(self) -> list[Path]:
        """Rename files that cannot be read, and what depends on them; returns the new names.

        Raises:
            InputError: for a run of a later version, which is not damaged.
        """
        damaged = []
        try:
            self.config()
        except LaterVersionError:
            raise
        except InputError:
            damaged = [self.config_path, self.checkpoint_path, self.folder / "metrics.json"]
        else:
            try:
                self.read_checkpoint()
            except InputError:
                damaged = [self.checkpoint_path, self.folder / "metrics.json"]
        return [path.replace(path.with_name(path.name + DAMAGED)) for path in damaged if path.is_file()]

    def write_config(self, config: TrainConfig, event_shape: tuple[int, ...]) -> None:
        """Write ``config.json``."""
        self.write_json("config.json", config_json(config, event_shape))

    def write_json(self, name: str, content: Mapping[str, object]) -> Path:
        """Write a JSON file into the folder; returns its path."""
        # JSON has no NaN: what is no number is null
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
        write_text(self.folder / name, json.dumps(finite, indent=2) + "\n")
        return self.folder / name

    def read_json(self, name: str) -> dict[str, Any]:
        """What :meth:`write_json` wrote; empty where there is no such file, or a damaged one."""
        try:
            content = json.loads((self.folder / name).read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def write_log(self, rows: list[dict[str, float]]) -> None:
        """Write ``log.csv``, a row an epoch."""
        write_text(self.folder / "log.csv", pd.DataFrame(rows).to_csv(index=False))

    def write_checkpoint(self, state: Checkpoint) -> None:
        """Write ``checkpoint.pt``."""
        write_tensors(self.checkpoint_path, state)

    def read_checkpoint(self) -> Checkpoint:
        """The checkpoint, on the CPU.

        Raises:
            InputError: where there is none, or none that can be read.
        """
        try:
            state = read_tensors(self.checkpoint_path)
            _check_state(state)
            return cast(Checkpoint, state)
        except (FileNotFoundError, NotADirectoryError):
            self.config()  # where there is no run at all, that is what is wrong
            raise InputError(f"{self.folder} has no checkpoint yet: let nbvae train --resume finish an epoch") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{self.checkpoint_path} cannot be read ({reason}): train it anew") from error

    def restore(self, model: GenerativeModel, guide: AmortizedGuide, state: Checkpoint) -> None:
        """Loads parameters from a checkpoint.

        Raises:
            InputError: where they are of another shape than config.json says.
        """
        _restore(model, guide, state, f"{self.checkpoint_path} does not fit {self.config_path}")

    def load(self, device: str = "auto") -> tuple[TrainConfig, GenerativeModel, AmortizedGuide]:
        """Configuration, model and guide of a trained run, in evaluation mode, on the device."""
        return self.load_from(self.read_checkpoint(), device)

    def load_from(self, state: Checkpoint, device: str = "auto") -> tuple[TrainConfig, GenerativeModel, AmortizedGuide]:
        """The same as :meth:`load`, of a checkpoint that has been read already."""
        config, event_shape = self.config()
        model, guide, _ = build(config, event_shape)
        self.restore(model, guide, state)
        chosen = choose_device(device)
        return config, model.to(chosen).eval(), guide.to(chosen).eval()

    def export(self, path: Path | None = None) -> Path:
        """Writes the parameters as safetensors, the configuration with them; :func:`load` reads the file.

        Args:
            path: of the file. Default: ``weights.safetensors`` in the folder.
        """
        from safetensors.torch import save

        config, event_shape = self.config()
        state = self.read_checkpoint()
        tensors = {f"{part}.{k}": v.clone().contiguous() for part in ("model", "guide") for k, v in state[part].items()}
        content = save(tensors, metadata={"config": json.dumps(config_json(config, event_shape))})
        path = path or self.folder / "weights.safetensors"
        if not path.parent.is_dir():
            raise InputError(f"the folder {path.parent} does not exist: make it, or name another --out")
        write_atomically(path, lambda file: file.write(content))
        return path
