"""Pictures. Each function writes one PNG, under a temporary name first."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from pyro_nbvae.files import write_atomically


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _show(figure: Figure, grid: Tensor, title: str) -> None:
    axes = figure.subplots()
    axes.imshow(grid.permute(1, 2, 0).clamp(0, 1).cpu().numpy(), interpolation="nearest")
    axes.set_title(title)
    axes.set_axis_off()


def plot_grid(images: Tensor, path: Path, *, title: str) -> None:
    """Images (N, C, H, W) in [0, 1] as one nearly square grid."""
    from torchvision.utils import make_grid

    columns = math.ceil(math.sqrt(len(images)))
    grid = make_grid(images, nrow=columns, padding=1, pad_value=0.5)
    figure = Figure(figsize=(8, 8 * grid.shape[1] / grid.shape[2] + 0.4), layout="constrained")
    _show(figure, grid, title)
    _save(figure, path)


def plot_pairs(originals: Tensor, reconstructions: Tensor, path: Path, *, title: str) -> None:
    """Two sets of images (N, C, H, W) in rows of up to 16: originals, and below them their reconstructions."""
    from torchvision.utils import make_grid

    columns = min(16, len(originals))
    strips = [
        half
        for start in range(0, len(originals), columns)
        for half in (originals[start : start + columns], reconstructions[start : start + columns])
    ]
    padded = [torch.cat([s, s.new_ones(columns - len(s), *s.shape[1:])]) if len(s) < columns else s for s in strips]
    grid = make_grid(torch.cat(padded), nrow=columns, padding=1, pad_value=0.5)
    figure = Figure(figsize=(8, 8 * grid.shape[1] / grid.shape[2] + 0.4), layout="constrained")
    _show(figure, grid, title)
    _save(figure, path)


def plot_dispersion(mean: Tensor, variance: Tensor, path: Path, *, title: str) -> None:
    """The variance of each unit's counts against their mean, both (K,), with the Poisson line variance = mean."""
    m, v = (np.asarray(t.cpu(), dtype=float) for t in (mean, variance))
    seen = (m > 0) & (v > 0)
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    if seen.any():
        axes.scatter(m[seen], v[seen], s=14, alpha=0.6, label="units")
        ends = np.array([m[seen].min(), m[seen].max()]) * np.array([0.8, 1.25])
        axes.plot(ends, ends, color="black", linewidth=1, label="Poisson: variance = mean")
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.legend()
    axes.set_xlabel("mean count over held-out images")
    axes.set_ylabel("variance of the count")
    axes.set_title(title)
    _save(figure, path)
