"""Observations from a trained run: samples of the prior, and reconstructions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from pyro_nbvae.data import load, to_bytes, to_floats
from pyro_nbvae.data.own import as_tensor, read_npy
from pyro_nbvae.data.sources import is_image_shape
from pyro_nbvae.errors import check_member, check_number
from pyro_nbvae.plotting import plot_grid, plot_lines, plot_pairs
from pyro_nbvae.runs.folder import Run
from pyro_nbvae.sampling import PriorSampler, Sampler, SamplerName, decoded, fit_mixture
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, check_batch, check_support, evaluating

# Observations in a picture.
MOST_SHOWN = 10_000


def prior_samples(model: GenerativeModel, guide: AmortizedGuide, count: int, *, seed: int = 0) -> Tensor:
    """``count`` images (count, C, H, W), uint8, at exact samples of the prior (integer counts).

    Raises:
        InputError: for a count below 1.
    """
    return torch.cat([to_bytes(means) for means in decoded(model, guide, PriorSampler(model), count, seed=seed)])


def sampler_of(
    name: SamplerName, model: GenerativeModel, guide: AmortizedGuide, train: Callable[[], Tensor]
) -> Sampler:
    """The sampler of that name for a trained pair.

    Args:
        train: returns the data that it was trained on; called only where they are needed.

    Raises:
        InputError: for an unknown name, and for latents that have no mixture.
    """
    check_member("sampler", name, get_args(SamplerName))
    if name == "prior":
        return PriorSampler(model)
    return fit_mixture(model, guide, train())


def reconstructions(model: GenerativeModel, guide: AmortizedGuide, x: Tensor, *, seed: int = 0) -> Tensor:
    """Observations (N, *event_shape) as floats encoded and decoded, through one exact sample each (integer counts)."""
    with evaluating(model, guide, seed):
        return model.observation(guide.posterior(x.to(model.device)).sample()).mean


def generate(
    run: Run,
    *,
    count: int = 100,
    sampler: SamplerName = "prior",
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
) -> Path:
    """Decodes ``count`` exact samples (integer counts) and writes them as a picture.

    Args:
        sampler: ``prior`` writes ``samples.png``, ``mixture`` (fitted to the training data) ``samples-mixture.png``.
    """
    check_member("sampler", sampler, get_args(SamplerName))
    check_number("--count", count, 1, MOST_SHOWN)
    config, model, guide = run.load(device)

    def train() -> Tensor:
        return load(config.data, data_root or config.data_root).train[: config.train_size]

    drawer = sampler_of(sampler, model, guide, train)
    drawn = torch.cat(list(decoded(model, guide, drawer, count, seed=seed)))
    path = run.folder / ("samples.png" if sampler == "prior" else f"samples-{sampler}.png")
    title = f"{config.title}: {sampler} samples"
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
    check_number("--count", count, 1, MOST_SHOWN)
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
