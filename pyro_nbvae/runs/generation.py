"""Observations from a trained run: samples of the prior, and reconstructions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_nbvae.data import BATCH, load, to_bytes, to_floats
from pyro_nbvae.data.own import as_tensor, read_npy
from pyro_nbvae.data.sources import is_image_shape
from pyro_nbvae.errors import InputError
from pyro_nbvae.plotting import plot_grid, plot_lines, plot_pairs
from pyro_nbvae.runs.folder import Run
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, check_batch, check_support, evaluating


def prior_means(
    model: GenerativeModel, guide: AmortizedGuide, count: int, *, seed: int = 0, progress: bool = False
) -> Tensor:
    """Means of ``count`` observations (count, *event_shape) at exact samples of the prior (integer counts).

    Raises:
        InputError: for a count below 1.
    """
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    sizes = [min(BATCH, count - done) for done in range(0, count, BATCH)]
    with evaluating(model, guide, seed):
        bar = tqdm(sizes, desc="samples", disable=not progress, leave=False)
        return torch.cat([model.generate(n)[1].cpu() for n in bar])


def prior_samples(
    model: GenerativeModel, guide: AmortizedGuide, count: int, *, seed: int = 0, progress: bool = False
) -> Tensor:
    """The same as :func:`prior_means` of images, as uint8."""
    return to_bytes(prior_means(model, guide, count, seed=seed, progress=progress))


def reconstructions(model: GenerativeModel, guide: AmortizedGuide, x: Tensor, *, seed: int = 0) -> Tensor:
    """Observations (N, *event_shape) as floats encoded and decoded, through one exact sample each (integer counts)."""
    with evaluating(model, guide, seed):
        return model.observation(guide.posterior(x.to(model.device)).sample()).mean


def generate(run: Run, *, count: int = 100, seed: int = 0, device: str = "auto") -> Path:
    """Decodes ``count`` samples of the prior (integer counts) and writes them as the picture ``samples.png``."""
    config, model, guide = run.load(device)
    drawn = prior_means(model, guide, count, seed=seed)
    path = run.folder / "samples.png"
    title = f"{config.title}: prior samples"
    if is_image_shape(model.event_shape):
        plot_grid(drawn, path, title=title)
    else:
        plot_lines({"samples": drawn}, path, title=title)
    return path


def read_observations(path: str | Path) -> Tensor:
    """Observations from a .npy file: (N, *event_shape); images as floats in [0, 1] or uint8.

    Raises:
        InputError: for a file that is no such array.
    """
    return to_floats(as_tensor(Path(path), "array", read_npy(Path(path))))


def reconstruct(
    run: Run,
    *,
    data: str | Path | None = None,
    count: int = 16,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
) -> Path:
    """Writes ``reconstructions.png``: originals beside their reconstructions from one exact sample each.

    Args:
        data: a .npy file (see :func:`read_observations`); by default the first held-out data of the run's set.
        count: how many of them.

    Raises:
        InputError: for data of another shape or range than the run's.
    """
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    config, model, guide = run.load(device)
    if data is None:
        x = to_floats(load(config.data, data_root or config.data_root).test[:count])
    else:
        x = read_observations(data)[:count]
        check_batch(x, model.event_shape, model.unit_interval)
        check_support(model, [x], f"observations of {data}")
    again = reconstructions(model, guide, x, seed=seed).cpu()
    path = run.folder / "reconstructions.png"
    title = f"{config.title}: originals and reconstructions"
    if is_image_shape(model.event_shape):
        plot_pairs(x, again, path, title=title)
    else:
        plot_lines({"originals": x, "reconstructions": again}, path, title=title)
    return path
