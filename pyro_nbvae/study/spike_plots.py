"""Plots of spike counts beside what a run says of them: rasters, PSTHs, dispersions, latents and calibration."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyro_nbvae.distributions.elementwise import double
from pyro_nbvae.encoding import Latents, encode
from pyro_nbvae.errors import InputError
from pyro_nbvae.likelihoods import CountLikelihood
from pyro_nbvae.metrics import Calibration, calibration, fano_factors
from pyro_nbvae.metrics.spikes import absent, predictive
from pyro_nbvae.seeds import stream_seed
from pyro_nbvae.study.build import load_data
from pyro_nbvae.study.data import Data
from pyro_nbvae.study.errors import check_seed
from pyro_nbvae.study.folder import Run
from pyro_nbvae.study.plots import _legend, _literal, _save
from pyro_nbvae.vae import evaluating

# Numbers of neurons, of conditions and of units that are shown.
_ROWS, _PSTHS, _CONDITIONS, _UNITS = 80, 6, 8, 3
# Largest count of a bin for which likelihoods are compared: their cost grows with it.
_LARGEST = 2000


@dataclass(frozen=True)
class _Shown:
    """What the plots show.

    Args:
        title: of the run.
        counts: held-out counts, nan where none was observed, (N, bins or 1, neurons).
        drawn: one posterior predictive draw of each, of the same shape.
        rates: posterior predictive means, of the same shape, nan where no count was observed.
        labels: the condition of each held-out trial, (N,); 0 for all if there are none.
        names: names of the conditions.
        found: calibration of the held-out trials.
    """

    title: str
    counts: Tensor
    drawn: Tensor
    rates: Tensor
    labels: Tensor
    names: tuple[str, ...]
    found: Calibration

    @property
    def most_active(self) -> Tensor:
        """Indices of the neurons, those with the most spikes first."""
        return self.counts.nansum((0, 1)).argsort(descending=True)

    @property
    def conditions(self) -> list[int]:
        """The conditions that have a held-out trial; at most eight."""
        return self.labels.unique().tolist()[:_CONDITIONS]


def _rasters(shown: _Shown) -> Figure:
    """Counts of single trials, and draws: neurons x bins, or trials x neurons without bins."""
    neurons = shown.most_active[:_ROWS]
    parts = {"held-out counts": shown.counts, "posterior predictive draws": shown.drawn}
    if shown.counts.shape[1] == 1:
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        order = shown.labels.argsort(stable=True)
        images = [x[order, 0][:, neurons] for x in parts.values()]
        panels = figure.subplots(1, 2, sharey=True)
        for axes, name, image in zip(panels, parts, images, strict=True):
            last = axes.imshow(image, aspect="auto", interpolation="nearest", cmap="magma", vmax=_brightest(images))
            axes.set(title=name, xlabel=f"neuron, by activity (the {len(neurons)} most active)")
        panels[0].set_ylabel("trial, by condition")
    else:
        trials = [int((shown.labels == c).nonzero()[0]) for c in shown.conditions][:4]
        figure = Figure(figsize=(2.6 * len(trials) + 1.4, 6.4), layout="constrained")
        panels = figure.subplots(2, len(trials), sharex=True, sharey=True, squeeze=False)
        images = [x[trials][..., neurons] for x in parts.values()]
        for row, (name, image) in enumerate(zip(parts, images, strict=True)):
            for column, trial in enumerate(trials):
                axes = panels[row, column]
                last = axes.imshow(
                    image[column].T, aspect="auto", interpolation="nearest", cmap="magma", vmax=_brightest(images)
                )
                if row == 0:
                    axes.set_title(_literal(shown.names[int(shown.labels[trial])]), fontsize=10)
                else:
                    axes.set_xlabel("bin")
            panels[row, 0].set_ylabel(f"{name}\nneuron, by activity")
    figure.colorbar(last, ax=panels, label="spikes", shrink=0.7)
    return figure


def _brightest(images: Sequence[Tensor]) -> float:
    return max(1.0, float(torch.cat([i.flatten() for i in images]).nan_to_num().quantile(0.999)))


def _psths(shown: _Shown) -> Figure:
    """Mean counts by condition of the most active neurons, of held-out trials and of the model."""
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    panels = figure.subplots(2, _PSTHS // 2, sharex=True)
    bins = shown.counts.shape[1]
    for axes, neuron in zip(panels.flat, shown.most_active[:_PSTHS].tolist(), strict=False):
        for k, c in enumerate(shown.conditions):
            own = shown.labels == c
            observed, expected = (x[own][..., neuron].nanmean(0) for x in (shown.counts, shown.rates))
            if bins > 1:
                axes.plot(observed, color=f"C{k}", linewidth=1.6)
                axes.plot(expected, color=f"C{k}", linewidth=1.4, linestyle="--")
            else:
                axes.plot(k, observed, "o", color=f"C{k}")
                axes.plot(k, expected, "_", color=f"C{k}", markersize=18, markeredgewidth=2)
        axes.set_title(f"neuron {neuron}", fontsize=10)
        axes.set_ylim(bottom=0)
        if bins == 1:
            axes.set_xticks(range(len(shown.conditions)), [_literal(shown.names[c]) for c in shown.conditions])
    for axes in panels[-1]:
        axes.set_xlabel("bin" if bins > 1 else "condition")
    for row in panels:
        row[0].set_ylabel("mean count of held-out trials")
    marks = ("-", "--") if bins > 1 else ("o", "_")
    handles = [panels[0, 0].plot([], [], mark, color="black")[0] for mark in marks]
    names = ["held-out trials", "model"]
    if bins > 1:
        handles += [panels[0, 0].plot([], [], color=f"C{k}")[0] for k in range(len(shown.conditions))]
        names += [shown.names[c] for c in shown.conditions]
    _legend(figure, handles, names, loc="outside right upper", frameon=False)
    return figure


def _dispersion(shown: _Shown) -> Figure:
    """Variance against mean, and Fano factors by neuron, within condition and bin, of held-out counts and draws."""
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    mean = shown.counts.nanmean((0, 1))
    several = shown.counts.nansum((0, 1)) >= 5
    factors = {"held-out counts": shown.found.fano, "model": shown.found.predicted_fano}
    for (name, fano), color in zip(factors.items(), ("black", "C1"), strict=True):
        left.scatter(mean[several], (fano * mean)[several], s=9, color=color, alpha=0.6, linewidth=0, label=name)
    ends = [float(mean[several].min()), float(mean[several].max())] if bool(several.any()) else [0.1, 1.0]
    left.plot(ends, ends, color="gray", linewidth=1, label="Poisson")
    left.set(xscale="log", yscale="log", xlabel="mean count of a bin", ylabel="variance within condition")
    left.legend(frameon=False)
    high = float(torch.cat([f[several] for f in factors.values()]).nan_to_num().quantile(0.995)) if several.any() else 2
    right.scatter(shown.found.fano[several], shown.found.predicted_fano[several], s=9, alpha=0.6, linewidth=0)
    right.plot([0, high], [0, high], color="gray", linewidth=1)
    right.axhline(1, color="gray", linewidth=0.6, linestyle=":")
    right.axvline(1, color="gray", linewidth=0.6, linestyle=":")
    right.set(xlim=(0, high), ylim=(0, high), xlabel="Fano factor of held-out counts", ylabel="of a predictive draw")
    right.set_title(f"{int(several.sum())} neurons with 5 held-out spikes or more", fontsize=10)
    return figure


def _pit(shown: _Shown) -> Figure:
    """Histogram of the randomised PIT of held-out counts."""
    figure = Figure(figsize=(5.4, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.hist(shown.found.pit, bins=20, range=(0, 1), density=True, color="C0", alpha=0.7)
    axes.axhline(1, color="black", linewidth=1)
    axes.set(xlabel="randomised PIT of a held-out count", ylabel="density", xlim=(0, 1))
    axes.set_title(f"distance from uniform {shown.found.pit_distance:.3f}", fontsize=10)
    return figure


def _components(x: np.ndarray) -> np.ndarray:
    """Return the first two principal components, (n, 2)."""
    centred = x - x.mean(0)
    _, _, v = np.linalg.svd(centred, full_matrices=False)
    found = centred @ v[:2].T
    return np.pad(found, ((0, 0), (0, 2 - found.shape[1])))


def _of_latents(data: Data, latents: Latents, title: str) -> Figure:
    """Posterior means by condition, and of the most informative units over the trials in their order."""
    figure = Figure(figsize=(10.4, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    mean = latents.mean.flatten(1).numpy()
    labels = torch.zeros(len(mean)).long() if data.train_labels is None else data.train_labels
    points = _components(np.sqrt(mean) if (mean >= 0).all() else mean)
    shown = labels.unique().tolist()[:_CONDITIONS]
    handles = [left.scatter(*points[labels == c].T, s=12, alpha=0.7, color=f"C{k}") for k, c in enumerate(shown)]
    if data.classes is not None:
        _legend(left, handles, [data.classes[c] for c in shown], frameon=False, fontsize=8)
    left.set(xlabel="first component of posterior means", ylabel="second component")
    units = latents.information.flatten().argsort(descending=True)[:_UNITS].tolist()
    width = max(1, len(mean) // 40)
    for k, unit in enumerate(units):
        right.plot(mean[:, unit], ".", markersize=3, alpha=0.35, color=f"C{k}")
        smooth = np.convolve(mean[:, unit], np.ones(width) / width, "valid")
        at = np.arange(len(smooth)) + (width - 1) / 2
        right.plot(
            at, smooth, color=f"C{k}", label=f"unit {unit} ({float(latents.information.flatten()[unit]):.2f} nats)"
        )
    _mark_sessions(right, data)
    right.set(xlabel="trial, in the order of the file", ylabel="posterior mean (line: running mean)")
    right.legend(frameon=False, fontsize=8)
    return figure


def _mark_sessions(axes: Axes, data: Data) -> None:
    """Draw a line between sessions that follow each other; of sessions that alternate every trial would have one."""
    session = data.sessions[0]
    if session is None:
        return
    changes = (session[1:] != session[:-1]).nonzero().flatten().tolist()
    if len(changes) < len(session.unique()):
        for at in changes:
            axes.axvline(at + 0.5, color="gray", linewidth=0.6)


def _trajectories(data: Data, mean: Tensor) -> Figure:
    """Paths of the latents of bins, averaged over the trials of a condition, in their first two components."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    labels = torch.zeros(len(mean)).long() if data.train_labels is None else data.train_labels
    shown = labels.unique().tolist()[:_CONDITIONS]
    paths = torch.stack([mean[labels == c].mean(0) for c in shown])
    points = _components(paths.flatten(0, 1).numpy()).reshape(len(shown), -1, 2)
    handles = []
    for k, path in enumerate(points):
        handles += axes.plot(*path.T, color=f"C{k}", marker=".", markersize=4)
        axes.plot(*path[0], "o", color=f"C{k}", markersize=8)
    if data.classes is not None:
        _legend(axes, handles, [data.classes[c] for c in shown], frameon=False, fontsize=8)
    axes.set(xlabel="first component of posterior means", ylabel="second component (circle: first bin)")
    return figure


def _stability(latents: Sequence[Latents]) -> Figure:
    """How well the latents of one run predict those of another linearly, and how similar single units are."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    means = [each.mean.flatten(1).double().numpy() for each in latents]
    informed = [each.information.flatten().numpy() for each in latents]
    scores = np.array([[_linear_r2(a, b, w) for b, w in zip(means, informed, strict=True)] for a in means])
    image = left.imshow(scores, vmin=0, vmax=1, cmap="viridis")
    for (row, column), value in np.ndenumerate(scores):
        left.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    left.set(xlabel="latents of run", ylabel="predicted from run", title="$R^2$, weighted by information")
    left.set_xticks(range(len(means)))
    left.set_yticks(range(len(means)))
    figure.colorbar(image, ax=left, shrink=0.8)
    for k, other in enumerate(means[1:], 1):
        matched = np.sort(_matched(means[0], other))[::-1]
        right.plot(matched, marker=".", label=f"runs 0 and {k}")
    right.set(xlabel="unit, matched one to one", ylabel="|correlation| of posterior means", ylim=(0, 1))
    right.legend(frameon=False)
    return figure


def _linear_r2(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> float:
    """Return R^2 of a ridge regression of b on a, on a random half of the observations after a fit to the others."""
    a, b = ((x - x.mean(0)) / np.maximum(x.std(0), 1e-12) for x in (a, b))
    order = np.random.default_rng(0).permutation(len(a))
    fitted, tested = order[::2], order[1::2]
    gram = a[fitted].T @ a[fitted] + 0.05 * len(a) * np.eye(a.shape[1])
    error = b[tested] - a[tested] @ np.linalg.solve(gram, a[fitted].T @ b[fitted])
    each = 1 - (error**2).sum(0) / np.maximum(((b[tested] - b[fitted].mean(0)) ** 2).sum(0), 1e-12)
    return float(max(0.0, (each * weight).sum() / max(weight.sum(), 1e-12)))


def _matched(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment

    a, b = ((x - x.mean(0)) / np.maximum(x.std(0), 1e-12) for x in (a, b))
    correlation = np.abs(a.T @ b) / len(a)
    rows, columns = linear_sum_assignment(-correlation)
    return correlation[rows, columns]


def plot_spikes(
    runs: Sequence[Run],
    *,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
    data_path: str | None = None,
) -> list[Path]:
    """Write plots of a run of spike counts into its folder, and with several runs how stable their latents are.

    ``spikes-rasters.png``, ``spikes-psths.png``, ``spikes-dispersion.png`` and ``spikes-pit.png`` show held-out trials
    beside the model; ``spikes-latents.png`` the latents of all trials, by condition and over the recording;
    ``spikes-trajectories.png`` those of bins, for ``temporal_bins`` networks; ``spikes-stability.png``, in the folder
    of the first run, the latents of several runs on the same data.

    Args:
        runs: trained runs of data (neurons,) or (bins, neurons) with a likelihood of counts.
        seed, device, data_root, data_path: as :func:`~pyro_nbvae.study.generation.generate`.

    Returns:
        Paths of the plots.

    Raises:
        InputError: for a folder that contains no trained run, and for a run of other data.
    """
    check_seed(seed)
    written, of_runs, fingerprints = [], [], set()
    for run in runs:
        state = run.read_checkpoint()
        config, model, guide = run.load_from(state, device)
        if not isinstance(model.likelihood, CountLikelihood) or len(model.event_shape) > 2:
            raise InputError(
                f"{run.folder} is not of spike counts: train with data (trials, neurons) or (trials, bins, neurons) "
                "and --likelihood poisson, negative_binomial or com_poisson"
            )
        data = run.data_of(state, data_root, data_path)
        fingerprints.add(data.fingerprint)
        whole = load_data(config, data_path, data_root, whole=True)
        latents = encode(model, guide, whole.training, seed=seed)
        of_runs.append(latents)
        found = calibration(model, guide, data.held_out, data.test_labels, seed=seed, progress=True)
        with evaluating(model, guide, seed):
            drawn = [
                predictive(model, guide, batch, 1, lambda d: double(d.sample()))[0].cpu()
                for batch in model.input_batches(data.held_out)
            ]
        counts = double(data.test).masked_fill(absent(data.held_out), math.nan)
        counts, draws, rates = (
            x.cpu() if x.dim() == 3 else x.cpu()[:, None] for x in (counts, torch.cat(drawn), found.rates)
        )
        labels = torch.zeros(len(counts)).long() if data.test_labels is None else data.test_labels
        names = data.classes or ("all trials",)
        rates = rates.masked_fill(counts.isnan(), math.nan)  # or the two means would be over different trials
        shown = _Shown(config.title, counts, draws, rates, labels, names, found)
        figures = {"rasters": _rasters(shown), "psths": _psths(shown)}
        if int(shown.found.fano.isfinite().sum()) > 1:
            figures["dispersion"] = _dispersion(shown)
        else:
            warnings.warn(
                f"{run.folder}: no spikes-dispersion.png, which needs two neurons with spikes in two held-out trials "
                "of a condition: hold out more trials (fewer --folds)",
                stacklevel=2,
            )
        figures |= {"pit": _pit(shown), "latents": _of_latents(whole, latents, config.title)}
        if config.decoder == "temporal_bins":
            bins = model.event_shape[0]
            figures["trajectories"] = _trajectories(whole, latents.mean.reshape(len(latents.mean), bins, -1))
        for name, figure in figures.items():
            written.append(_written(figure, run, name, config.title))
    if len(runs) > 1:
        if len(fingerprints) > 1:
            raise InputError("the runs are of different data: their latents cannot be compared")
        written.append(_written(_stability(of_runs), runs[0], "stability", f"{len(runs)} runs"))
    return written


def _written(figure: Figure, run: Run, name: str, title: str) -> Path:
    figure.suptitle(_literal(title), fontsize=11)
    path = run.folder / f"spikes-{name}.png"
    _save(figure, path)
    return path


def describe_counts(data: Data, *, compare: bool = True) -> list[str]:
    """Describe counts: Fano factors beside those of Poissons, artefacts, and likelihoods by held-out score.

    Args:
        data: counts (N, neurons) or (N, bins, neurons), none of them held out.
        compare: whether to compare likelihoods, which may take a minute.

    Returns:
        Lines of text.
    """
    from pyro_nbvae.metrics import compare_likelihoods, condition_rates
    from pyro_nbvae.study.data.arrays import fold_of
    from pyro_nbvae.study.tree import Reading

    recording, labels = data.training, data.train_labels
    missing = absent(recording)
    x = double(recording.x).masked_fill(missing, math.nan)
    neurons = x.shape[-1]
    rates = condition_rates(recording, labels, labels).expand(x.shape)
    means = rates if recording.exposure is None else rates * double(recording.exposure)
    noise = torch.Generator().manual_seed(stream_seed(0, "simulation"))
    simulated = torch.poisson(means, generator=noise).masked_fill(missing, math.nan)
    often = x.nansum(tuple(range(x.dim() - 1))) >= 0.05 * (~missing).sum(tuple(range(x.dim() - 1)))
    within = f"within {'label and ' * (labels is not None)}{'bin' if x.dim() == 3 else 'recording'}"
    lines = []
    if bool(often.any()):
        own, other = (fano_factors(part, labels)[often] for part in (x, simulated))
        lines.append(
            f"Fano factors {within}, {int(often.sum())} of {neurons} neurons with .05 spikes a bin or more: median "
            f"{float(own.nanmedian()):.2f}, below 1 for {float((own < 1).double().mean()):.0%} (Poissons with the same "
            f"means: {float(other.nanmedian()):.2f}, {float((other < 1).double().mean()):.0%})"
        )
    most = x.nan_to_num().flatten(0, -2).amax(0)
    lines.append(
        f"{int((most < 2).sum())} of {neurons} neurons never have more than one spike in a bin: their dispersion is "
        "not identified"
    )
    lines += _artefacts(x, means)
    if not compare:
        return lines
    groups = None if data.groups[0] is None else data.groups[0].numpy()
    few = len(x) < 10 or (groups is not None and len(set(groups.tolist())) < 5)
    largest = float(x.nan_to_num().max())
    if few or largest > _LARGEST:
        why = "there are fewer than 10 trials or 5 groups" if few else f"counts up to {largest:g} are not of spikes"
        return [*lines, f"likelihoods are not compared: {why}"]
    folds = torch.from_numpy(fold_of(len(x), Reading(folds=5), None if labels is None else labels.numpy(), groups))
    each = [folds == k for k in range(5)]
    scores = compare_likelihoods(recording, labels, each, groups=data.groups[0], progress=True)
    shown = ", ".join(f"{name} {s.bits:+.4f} ± {s.over_trials:.4f}" for name, s in scores.items())
    lines.append(f"held-out bits/spike over a Poisson, without latents: {shown}")
    best = max(scores, key=lambda name: scores[name].bits)
    clear = scores[best].bits > 2 * scores[best].over_trials
    second = next(s for name, s in scores.items() if name != best)
    lead = scores[best] - second
    if clear and lead.bits > 2 * lead.over_trials:
        lines.append(f"suggested: --likelihood {best}")
    elif clear:
        lines.append(f"suggested: --likelihood {best} (the other is within two standard errors)")
    else:
        lines.append("suggested: --likelihood poisson (no other is better by two standard errors)")
    return lines


def _artefacts(x: Tensor, means: Tensor) -> list[str]:
    """Return lines about counts that no count distribution with this mean would give: a bin of 50 among zeros."""
    expected = means + 1
    outlying = (x > 20) & (x > 10 * expected)
    lines: list[str] = []
    if bool(outlying.any()):
        at: list[Any] = outlying.nonzero()[0].tolist()
        lines.append(
            f"{int(outlying.sum())} counts look like artefacts, the first at counts{at}: {float(x[tuple(at)]):g} where "
            f"{float(means[tuple(at)]):.2g} is expected: mask them if they are"
        )
    never, silent = int(x.isnan().flatten(0, -2).all(0).sum()), x.nansum(tuple(range(x.dim() - 1))) == 0
    if silent.sum() > never:
        lines.append(f"{int(silent.sum()) - never} of {x.shape[-1]} neurons have no spike")
    if never:
        lines.append(f"{never} of {x.shape[-1]} neurons are never observed: no model can learn their rates")
    return lines
