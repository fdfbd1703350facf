"""What a lab does with a trained run: latents and predictions of its recordings, as files."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_nbvae.encoding import Prediction, encode, export_programs, predict
from pyro_nbvae.errors import InputError
from pyro_nbvae.study.build import load_data
from pyro_nbvae.study.data import Data
from pyro_nbvae.study.errors import check_number, check_seed
from pyro_nbvae.study.files import check_out, save_arrays
from pyro_nbvae.study.folder import Checkpoint, Run
from pyro_nbvae.study.tree import TrainConfig
from pyro_nbvae.vae import GenerativeModel


def _whole(run: Run, data: str | None, data_root: str | None) -> Data:
    """Return all observations of the data of a run, or of other data, in their order.

    Raises:
        InputError: for data with an exposure if those of the training had none, or without if they had one.
    """
    config, _ = run.config()
    found = load_data(config, data or run.data_place(), data_root, whole=True)
    there, here = "exposure" in config.given, "exposure" in found.train_given
    if there != here:
        which, other = ("no exposure", "have one") if there else ("an exposure", "have none")
        raise InputError(f"{found.name} has {which}, and the data of the training {other}: rates would be wrong")
    return found


def _held_out(run: Run, state: Checkpoint, data: str | None, data_root: str | None) -> np.ndarray | None:
    """Return which observations were held out of the training, bool (N,), in the order of the data; None of other data.

    Raises:
        InputError: if the data of the training have changed since.
    """
    try:
        found = load_data(run.config()[0], data, data_root)
    except InputError:  # of other data there may be too few to hold some out
        if data is None:
            raise
        return None
    if data is None:
        run.check_data(state, found)
    elif found.fingerprint != state.get("data"):
        return None
    if found.is_held_out is not None:
        return found.is_held_out.numpy()
    return np.arange(len(found.train) + len(found.test)) >= len(found.train)


def target(run: Run, out: str | Path | None, name: str, *suffixes: str) -> Path:
    """Return the path of a file to write: ``out``, or a name in the run folder.

    Raises:
        InputError: for a suffix that is neither ``.npz`` nor one of those given, and for a file that cannot be there.
    """
    path = Path(out) if out else run.folder / name
    if path.suffix not in (".npz", *suffixes):
        raise InputError(f"--out {path}: the file is {' or '.join(('a .npz', *suffixes))} file")
    check_out(path)
    return path


def encode_run(
    run: Run,
    *,
    data: str | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
) -> Path:
    """Write the posteriors of observations as a file.

    The arrays of a ``.npz`` file are ``mean``, ``variance`` and ``sample`` (integer counts), (N, units), in the order
    of the data, with ``temporal_bins`` networks (N, bins, units); ``information`` of each unit, in nats; ``labels``, if
    there are some; and of the training's data ``held_out``, bool (N,): a decoder that is tested on the others has seen
    them by way of the encoder. With data and ``out`` of suffix ``.h5ad``, the data are copied, with ``X_nbvae``,
    ``X_nbvae_variance`` and ``X_nbvae_sample`` in ``obsm`` and ``nbvae_held_out`` in ``obs``.

    Args:
        run: a trained run.
        data: data of the same kind. Default: those of the training.
        out: path of the file. Default: ``latents.npz`` in the run folder.
        seed: random seed of the sample.
        device: auto (CUDA if available) or a PyTorch device string.
        data_root: folder of the data sets, if it is not the one of the training.

    Returns:
        Path of the file.

    Raises:
        InputError: for a folder that contains no trained run, and for data that the run does not take.
    """
    check_seed(seed)
    state = run.read_checkpoint()
    path = target(run, out, "latents.npz", ".h5ad")
    config, model, guide = run.load_from(state, device)
    whole, held_out = _whole(run, data, data_root), _held_out(run, state, data, data_root)
    if path.suffix == ".h5ad" and Path(whole.name).suffix != ".h5ad":
        raise InputError(f"--out {path}: only data in .h5ad give .h5ad, got {whole.name}: choose a .npz file")
    found = encode(model, guide, whole.training, seed=seed, progress=True)
    parts = {name: by_bin(getattr(found, name), model, config).numpy() for name in ("mean", "variance", "sample")}
    if path.suffix == ".h5ad":
        import anndata

        annotated = anndata.read_h5ad(whole.name)
        for name, array in parts.items():
            annotated.obsm["X_nbvae" + ("" if name == "mean" else f"_{name}")] = array.reshape(len(array), -1)
        if held_out is not None:
            annotated.obs["nbvae_held_out"] = held_out
        part = path.with_name(path.name + ".part")
        annotated.write_h5ad(part)
        part.replace(path)
        return path
    parts["information"] = by_bin(found.information.cpu()[None], model, config)[0].numpy()
    return save_arrays(path, parts | _labels(whole) | ({} if held_out is None else {"held_out": held_out}))


def by_bin(z: Tensor, model: GenerativeModel, config: TrainConfig[Any]) -> Tensor:
    """Return latents (N, K) as they are written: with ``temporal_bins`` networks (N, bins, units)."""
    return z.unflatten(1, (model.event_shape[0], -1)) if config.decoder == "temporal_bins" else z


def names_of(classes: Sequence[str]) -> np.ndarray:
    """Return the names of classes; whole numbers as numbers."""
    names = np.array(classes)
    with contextlib.suppress(ValueError, OverflowError):
        numbers = names.astype(np.int64)
        return numbers if numbers.astype(str).tolist() == list(classes) else names
    return names


def _labels(data: Data) -> dict[str, np.ndarray]:
    if data.train_labels is None or data.classes is None:
        return {}
    return {"labels": names_of(data.classes)[data.train_labels.numpy()]}


def predict_run(
    run: Run,
    *,
    data: str | None = None,
    out: str | Path | None = None,
    samples: int = 100,
    level: float = 0.9,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
) -> Path:
    """Write posterior predictive rates and intervals of observations as a ``.npz`` file.

    Its arrays are ``rates`` (expected values, at the observation's exposure), ``low`` and ``high``, and ``filled``: the
    observations, with the rate where none was observed. All are (N, *event_shape), in the order of the data, and nan
    where nothing was ever observed in training. Of the training's data there is ``held_out``, bool (N,).

    Args:
        run: a trained run.
        data: data of the same kind. Default: those of the training.
        out: path of the file. Default: ``predictions.npz`` in the run folder.
        samples: number of samples of each posterior.
        level: probability of the interval.
        seed, device, data_root: as :func:`encode_run`.

    Returns:
        Path of the file.

    Raises:
        InputError: as :func:`encode_run`, and for a number out of range.
    """
    check_seed(seed)
    check_number("--samples", samples, 2, 100_000)
    state = run.read_checkpoint()
    path = target(run, out, "predictions.npz")
    _, model, guide = run.load_from(state, device)
    whole, held_out = _whole(run, data, data_root).training, _held_out(run, state, data, data_root)
    found = predict(model, guide, whole, samples=samples, level=level, seed=seed, progress=True)
    never = state["never_observed"]
    found = Prediction(*(part.masked_fill(never, math.nan) for part in (found.mean, found.low, found.high)))
    filled = found.filled(whole.floats())
    tensors = {"rates": found.mean, "low": found.low, "high": found.high, "filled": filled}
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return save_arrays(path, arrays | ({} if held_out is None else {"held_out": held_out}))


def export_run_programs(run: Run) -> list[Path]:
    """Write ``encoder.pt2`` and ``decoder.pt2`` into the run folder: programs of plain PyTorch.

    ``torch.export.load("encoder.pt2").module()`` maps observations (B, *event_shape) to the parameters of their
    posteriors, that of ``decoder.pt2`` latents to the mean of the observation. Further arguments are what the data of
    the training have: a mask, an exposure, covariates (:func:`~pyro_nbvae.encoding.export_programs`).

    Returns:
        Paths of the files.

    Raises:
        InputError: if there is no trained run.
    """
    config, model, guide = run.load("cpu")
    written = []
    for name, program in export_programs(model, guide, config.given).items():
        path = run.folder / f"{name}.pt2"
        part = path.with_name(f"{name}.part.pt2")
        torch.export.save(program, part)
        part.replace(path)
        written.append(path)
    return written
