"""Images from a trained run: samples of the prior, and reconstructions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_nbvae.data import BATCH, load, to_bytes, to_unit_interval
from pyro_nbvae.errors import InputError
from pyro_nbvae.plotting import plot_grid, plot_pairs
from pyro_nbvae.runs import Run
from pyro_nbvae.vae import AmortizedGuide, ImageModel, check_images, evaluating


def prior_samples(
    model: ImageModel, guide: AmortizedGuide, count: int, *, seed: int = 0, progress: bool = False
) -> Tensor:
    """``count`` images as uint8 (count, C, H, W): means of the decoder at exact samples of the prior (integer counts).

    Raises:
        InputError: for a count below 1.
    """
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    sizes = [min(BATCH, count - done) for done in range(0, count, BATCH)]
    with evaluating(model, guide, seed):
        drawn = [model.generate(n)[1] for n in tqdm(sizes, desc="samples", disable=not progress, leave=False)]
    return to_bytes(torch.cat(drawn))


def reconstructions(model: ImageModel, guide: AmortizedGuide, images: Tensor, *, seed: int = 0) -> Tensor:
    """Images (N, C, H, W) in [0, 1] encoded and decoded, through one exact sample each (integer counts)."""
    with evaluating(model, guide, seed):
        return model.decode(guide.posterior(images.to(next(model.parameters()).device)).sample())


def generate(run: Run, *, count: int = 100, seed: int = 0, device: str = "auto") -> Path:
    """Decodes ``count`` samples of the prior (integer counts) and writes them as the picture ``samples.png``."""
    config, model, guide = run.load(device)
    images = to_unit_interval(prior_samples(model, guide, count, seed=seed))
    path = run.folder / "samples.png"
    plot_grid(images, path, title=f"{config.title}: prior samples")
    return path


def read_images(path: str | Path) -> Tensor:
    """Images from a .npy file: (N, C, H, W), floats in [0, 1] or uint8.

    Raises:
        InputError: for a file that is no such array.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a .npy array: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fu":
        raise InputError(f"{path} holds no image array: expected (N, C, H, W), floats in [0, 1] or uint8")
    tensor = torch.from_numpy(array)
    return to_unit_interval(tensor) if tensor.dtype == torch.uint8 else tensor.float()


def reconstruct(
    run: Run,
    *,
    images: str | Path | None = None,
    count: int = 16,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
) -> Path:
    """Writes ``reconstructions.png``: originals above their reconstructions from one exact sample each.

    Args:
        images: a .npy file (see :func:`read_images`); by default the first held-out images of the run's data.
        count: how many of them.

    Raises:
        InputError: for images of another shape or range than the run's.
    """
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    config, model, guide = run.load(device)
    if images is None:
        x = to_unit_interval(load(config.data, data_root or config.data_root).test[:count])
    else:
        x = read_images(images)[:count]
        check_images(x, model.image_shape)  # type: ignore[arg-type]
    again = reconstructions(model, guide, x, seed=seed).cpu()
    path = run.folder / "reconstructions.png"
    plot_pairs(x, again, path, title=f"{config.title}: originals and reconstructions")
    return path
