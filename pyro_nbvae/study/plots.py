"""Plots. Each function writes one PNG file, atomically."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from pyro_nbvae.batching import value_range
from pyro_nbvae.study.files import write_atomically

_MARKERS = "osD^vPX*"
# Largest numbers of bins and of neurons in a plot of a recording.
_COLUMNS, _NEURONS = 1000, 80


def _logarithmic(axes: Axes) -> None:
    """Make both axes logarithmic, with plain numbers: as many in each decade as there is room for."""
    axes.set(xscale="log", yscale="log")
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        subs = (1,) if high > 300 * low else (1, 2, 5) if high > 5 * low else range(1, 10)
        axis.set_major_locator(LogLocator(subs=tuple(subs), numticks=7))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


# It reports fonts that matplotlib does without.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _literal(name: str) -> str:
    """Return a name as matplotlib shows it letter by letter: dollars enclose no formula."""
    return name.replace("$", r"\$")


def _legend(of: Axes | Figure, handles: Sequence[Artist], names: Sequence[str], **options: Any) -> None:
    """Add a legend of these names, also of those that matplotlib hides, which begin with an underscore."""
    of.legend(list(handles), list(map(_literal, names)), **options)


def plot_images(
    images: Tensor,
    path: Path,
    *,
    title: str,
    columns: int | None = None,
    rows: Sequence[str] = (),
    limits: tuple[float, float] | None = None,
) -> None:
    """Plot images in a grid, pixel by pixel.

    Args:
        images: (N, C, H, W).
        path: the PNG file.
        title: above the grid. If black and white are not 0 and 1, their values are added to it.
        columns: number of images in a row. Default: as many as make the grid nearly square.
        rows: labels of the rows.
        limits: the values that are drawn black and white; others are clamped. Default: 0 and 1, or the smallest and the
            largest value if some are outside.
    """
    from torchvision.utils import make_grid

    low, high = limits or value_range(images)
    if (low, high) != (0, 1):
        images, title = (images - low) / (high - low), f"{title}\nblack is {low:.3g}, white {high:.3g}"
    columns = columns or math.ceil(math.sqrt(len(images)))
    grid = make_grid(images, nrow=columns, padding=1, pad_value=0.5)
    figure = Figure(figsize=(8 + bool(rows), 8 * grid.shape[1] / grid.shape[2] + 0.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(grid.permute(1, 2, 0).clamp(0, 1).cpu().numpy(), interpolation="nearest")
    axes.set_title(_literal(title))
    height = images.shape[-2] + 1
    axes.set_yticks([height * (row + 0.5) for row in range(len(rows))], list(map(_literal, rows)))
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _save(figure, path)


def plot_pairs(
    originals: Tensor, reconstructions: Tensor, path: Path, *, title: str, limits: tuple[float, float] | None = None
) -> None:
    """Plot images in rows of up to 16, and their reconstructions below each row.

    Args:
        originals, reconstructions: (N, C, H, W).
        path: the PNG file.
        title, limits: as :func:`plot_images`.
    """
    limits = limits or value_range(torch.cat([originals.flatten(), reconstructions.flatten()]))
    columns = min(16, len(originals))
    missing = originals.new_full((-len(originals) % columns, *originals.shape[1:]), limits[1])
    rows = [torch.cat([x, missing]).unflatten(0, (-1, columns)) for x in (originals, reconstructions)]
    plot_images(torch.stack(rows, 1).flatten(0, 2), path, title=title, columns=columns, limits=limits)


def plot_lines(sets: Mapping[str, Tensor], path: Path, *, title: str, rows: Sequence[str] = ()) -> None:
    """Plot observations of any shape as heat maps on one colour scale, one panel per set, one row per observation.

    Args:
        sets: maps the name of a set to its observations (N, ...).
        path: the PNG file.
        title: above the panels.
        rows: labels of blocks of rows, all of one height. Default: the numbers of the observations.
    """
    figure = Figure(figsize=(5 * len(sets) + 0.8 + 2.5 * bool(rows), 4.5 + 1.5 * bool(rows)), layout="constrained")
    figure.suptitle(_literal(title))
    finite = torch.cat([x[x.isfinite()].flatten() for x in sets.values()])  # nan is drawn as a gap
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    panels = np.atleast_1d(figure.subplots(1, len(sets)))
    for axes, (name, x) in zip(panels, sets.items(), strict=True):
        shown = axes.imshow(x.flatten(1).cpu().numpy(), aspect="auto", interpolation="nearest", vmin=low, vmax=high)
        axes.set_title(_literal(name))
        axes.set_xlabel("element")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if rows:
            height = len(x) / len(rows)
            axes.set_yticks([height * (row + 0.5) - 0.5 for row in range(len(rows))], list(map(_literal, rows)))
            axes.hlines([height * row - 0.5 for row in range(1, len(rows))], *axes.get_xlim(), color="white", lw=1)
        else:
            axes.set_ylabel("observation")
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(shown, ax=list(panels), label="value")
    _save(figure, path)


def plot_recordings(sets: Mapping[str, Tensor], path: Path, *, title: str) -> None:
    """Plot counts as heat maps of neurons over trials, on one colour scale, one panel per set; nan is drawn as a gap.

    Args:
        sets: maps the name of a set to its counts, or means, (N, neurons) or (N, bins, neurons), of the same trials:
            the first 1,000 columns are shown, of the neurons that are most active in the first set.
        path: the PNG file.
        title: above the panels.
    """
    first = next(iter(sets.values()))
    bins, number = (first.shape[1] if first.dim() == 3 else 1), first.shape[-1]
    trials = max(1, _COLUMNS // bins)
    active = first.nan_to_num().flatten(0, -2).sum(0).argsort(descending=True)[:_NEURONS]
    figure = Figure(figsize=(10, 1.2 + 2.6 * len(sets)), layout="constrained")
    figure.suptitle(_literal(title))
    shown = {name: x[:trials].flatten(0, -2)[:, active].T.cpu().numpy() for name, x in sets.items()}
    finite = np.concatenate([x[np.isfinite(x)] for x in shown.values()])
    high = max(float(np.quantile(finite, 0.995)), 1e-9) if finite.size else 1.0
    panels = np.atleast_1d(figure.subplots(len(sets), 1, sharex=True))
    for axes, (name, x) in zip(panels, shown.items(), strict=True):
        extent = (0.0, x.shape[1] / bins, float(x.shape[0]), 0.0)
        image = axes.imshow(x, aspect="auto", interpolation="nearest", vmin=0, vmax=high, extent=extent)
        axes.set_title(_literal(name))
        axes.set_ylabel("neuron" if number <= _NEURONS else f"{len(active)} most active neurons")
        axes.set_yticks([])
    panels[-1].set_xlabel("trial")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=list(panels), label="spikes" if bins == 1 else "spikes a bin")
    _save(figure, path)


def plot_dispersion(units: Mapping[str, tuple[Tensor, Tensor]], path: Path, *, title: str) -> None:
    """Plot the variance of each unit's counts against their mean, with the Poisson line variance = mean.

    Args:
        units: maps the name of a population to its units' means and variances, (K,) each.
        path: the PNG file.
        title: above the plot.
    """
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    ends, shown = [], dict[str, Artist]()
    for name, (mean, variance) in units.items():
        m, v = (np.asarray(t.cpu(), dtype=float) for t in (mean, variance))
        seen = (m > 0) & (v > 0)
        if seen.any():
            shown[name] = axes.scatter(m[seen], v[seen], s=14, alpha=0.6)
            ends += [m[seen].min() * 0.8, m[seen].max() * 1.25]
    if ends:
        line = [min(ends), max(ends)]
        (shown["Poisson: variance = mean"],) = axes.plot(line, line, color="black", linewidth=1)
        _logarithmic(axes)
        _legend(axes, [*shown.values()], [*shown])
    axes.set_xlabel("mean count over held-out data")
    axes.set_ylabel("variance of the count")
    axes.set_title(_literal(title))
    _save(figure, path)


class Panel(NamedTuple):
    """One panel of curves.

    Args:
        curves: maps the name of a curve to its x and y values.
        xlabel, ylabel: labels of the axes.
        xscale: matplotlib's scale of the x axis.
    """

    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    xlabel: str
    ylabel: str
    xscale: str = "linear"


def plot_curves(panels: Sequence[Panel], path: Path, *, title: str) -> None:
    """Plot panels of curves side by side, with one legend for all.

    Args:
        panels: the panels, from left to right; the legend is that of the last one.
        path: the PNG file.
        title: above the panels.
    """
    figure = Figure(figsize=(5 * len(panels) + 1.3, 4.2), layout="constrained")
    figure.suptitle(_literal(title))
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        for number, (x, y) in enumerate(panel.curves.values()):
            every = math.ceil(len(x) / 8)
            style = {"color": f"C{number % 10}", "marker": _MARKERS[number % 8], "markevery": every, "markersize": 4}
            axes.plot(x, y, **style, linewidth=1, linestyle=("-", "--")[number // 10 % 2])
        axes.set_xscale(panel.xscale)
        axes.set_xlabel(panel.xlabel)
        axes.set_ylabel(panel.ylabel)
    _legend(figure, axes.lines, [*panel.curves], loc="outside right center")
    _save(figure, path)


def plot_spikes(counts: Mapping[str, Tensor], path: Path, *, title: str) -> None:
    """Plot histograms of the units' Fano factors (variance over mean across observations) and of their counts.

    Args:
        counts: maps the name of a population to its counts (N, K).
        path: the PNG file.
        title: above the histograms.
    """
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    figure.suptitle(_literal(title))
    left, right = figure.subplots(1, 2)
    factors = {}
    for name, spikes in counts.items():
        z = spikes.double()
        mean = z.mean(0)
        factors[name] = (z.var(0) / mean)[mean > 0].cpu().numpy()
        number = torch.bincount(spikes.flatten().long())
        right.plot(np.arange(len(number)), number.double().cpu().numpy() / spikes.numel(), drawstyle="steps-mid")
    edges = np.histogram_bin_edges(np.concatenate(list(factors.values())), bins=40)
    bars = [left.hist(values, bins=edges, alpha=0.6)[2][0] for values in factors.values()]
    line = left.axvline(1.0, color="black", linewidth=1)
    left.set_xlabel("Fano factor of a unit over held-out data")
    left.set_ylabel("units")
    right.set_yscale("log")
    right.set_xlabel("spike count")
    right.set_ylabel("fraction of counts")
    _legend(left, [*bars, line], [*factors, "Poisson"])
    _legend(right, right.lines, [*counts])
    _save(figure, path)


def plot_bias_and_noise(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot gradient estimators by squared bias and noise, both relative to the squared norm of the true gradient.

    A bias below its standard error is drawn at the standard error; a marker is hollow if the bias is less than twice
    its standard error. Of an estimator with several temperatures the first and the last are written beside its points.

    Args:
        rows: ``case``, ``posterior``, ``way``, ``temperature`` (or None), ``bias``, ``± bias`` (its standard error) and
            ``noise``.
        path: the PNG file.
    """
    panels = list(dict.fromkeys((row["case"], row["posterior"]) for row in rows))
    names = list(dict.fromkeys(row["way"] for row in rows))
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.9 * lines + 0.7), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (case, posterior) in zip(grid.flat, panels, strict=False):
        for number, name in enumerate(names):
            here = [r for r in rows if (r["case"], r["posterior"], r["way"]) == (case, posterior, name)]
            if not here:
                continue
            color, marker = f"C{number}", _MARKERS[number % 8]
            at = [(max(r["bias"], r["± bias"]), r["noise"], r["bias"] > 2 * r["± bias"]) for r in here]
            axes.plot([a[0] for a in at], [a[1] for a in at], color=color, lw=0.8, alpha=0.6)
            for (bias, noise, seen), row in zip(at, here, strict=True):
                axes.scatter(bias, noise, s=36, marker=marker, color=color, facecolor=color if seen else "white")
                if row["temperature"] is not None and row in (here[0], here[-1]):
                    axes.annotate(f"{row['temperature']:g}", (bias, noise), (3, 3), textcoords="offset points", size=6)
        axes.set_title(_literal(f"{posterior}\n{case}"))
        axes.set_xlabel("squared bias / squared norm of the gradient")
        axes.set_ylabel("noise: variance / squared norm")
        _logarithmic(axes)
    handles = [Line2D([], [], color=f"C{k}", marker=_MARKERS[k % 8], lw=0.8) for k in range(len(names))]
    _legend(figure, handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _save(figure, path)
