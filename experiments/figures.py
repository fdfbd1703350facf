"""Figures from the runs of the tables: python -m experiments.figures --scale small --data mnist

Each figure is written to OUT/SCALE/figures/DATA. If its runs are missing, it is skipped and the command that makes them
is printed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from tyro.conf import OmitArgPrefixes

from pyro_nbvae.batching import to_floats
from pyro_nbvae.distributions import RelaxedNegativeBinomial
from pyro_nbvae.guides import NegativeBinomialGuide
from pyro_nbvae.metrics import HeldOut, held_out, represent
from pyro_nbvae.models import NegativeBinomialModel
from pyro_nbvae.study import generation, results
from pyro_nbvae.study.cli import table_of
from pyro_nbvae.study.commandline import script
from pyro_nbvae.study.data import load
from pyro_nbvae.study.folder import Run
from pyro_nbvae.study.formats import summarise
from pyro_nbvae.study.grid import Cell, cells
from pyro_nbvae.study.plots import Panel, plot_curves, plot_dispersion, plot_grid, plot_rows, plot_spikes
from pyro_nbvae.study.report import group
from pyro_nbvae.study.runner import number_of_samples
from pyro_nbvae.study.scales import Reproduction, ScaleName
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel

# Number of held-out images for the statistics of units.
IMAGES = 2_000
SPIKING = ("CMP", "P-VAE")
DISPERSIONS = tuple(10.0**k for k in range(6))


@dataclass
class Arguments:
    """Selection of the runs for the figures.

    Args:
        scale: scale of the runs, as in nbvae reproduce.
        data: name of the data set.
        out: folder of the run folders, as in nbvae reproduce.
        seed: seed of the runs.
        device: auto or a PyTorch device string.
        data_root: folder of the data sets, if it is not the one of the training.
    """

    scale: ScaleName = "small"
    data: str = "mnist"
    out: str = "runs/reproduce"
    seed: int = 0
    device: str = "auto"
    data_root: str | None = None

    @property
    def where(self) -> str:
        """Return the data, the scale and the seed, for titles."""
        return f"{self.data}, scale {self.scale}, seed {self.seed}"


class MissingRuns(Exception):
    """The runs for a figure are missing; the message is the name of their table."""


def finished(table: str, arguments: Arguments, file: str = "checkpoint.pt") -> list[Cell]:
    """Return the finished runs of a table that still have a file."""
    options = Reproduction(scale=arguments.scale, data=(arguments.data,), seeds=(arguments.seed,), out=arguments.out)
    found = [cell for cell in cells(table_of(table), options) if cell.metrics and (cell.folder / file).exists()]
    if not found:
        raise MissingRuns(table)
    return found


def variants(arguments: Arguments) -> dict[str, Run]:
    """Return the finished runs of the main table, by variant."""
    return {cell.label: cell.run for cell in finished("main", arguments)}


def spiking(arguments: Arguments) -> dict[str, tuple[GenerativeModel, AmortizedGuide]]:
    """Load the pairs for the figures of spike counts."""
    found = {name: run.load(arguments.device)[1:] for name, run in variants(arguments).items() if name in SPIKING}
    if not found:
        raise MissingRuns("main")
    return found


def samples(arguments: Arguments, path: Path) -> None:
    """Plot training images, and samples from the prior (integer counts), one row per variant."""
    rows = {"training data": to_floats(load(arguments.data, arguments.data_root).train[:16])}
    for name, run in variants(arguments).items():
        _, model, guide = run.load(arguments.device)
        rows[name] = to_floats(generation.prior_samples(model, guide, 16, seed=arguments.seed))
    plot_rows(rows, path, title=f"{arguments.where}: samples of the prior")


def reconstructions(arguments: Arguments, path: Path) -> None:
    """Plot held-out images and the reconstructions of each variant from one exact sample."""
    images = to_floats(load(arguments.data, arguments.data_root).test[:16])
    rows = {"held out": images}
    for name, run in variants(arguments).items():
        _, model, guide = run.load(arguments.device)
        rows[name] = generation.reconstructions(model, guide, images, seed=arguments.seed).cpu()
    plot_rows(rows, path, title=f"{arguments.where}: held-out images and their reconstructions")


def rate_distortion(arguments: Arguments, path: Path) -> None:
    """Plot squared error against KL (means over seeds), one curve over beta per variant; saved rows are sufficient."""
    table = table_of("beta")
    options = Reproduction(scale=arguments.scale, data=(arguments.data,), out=arguments.out)
    grid = cells(table, options)
    rows = results.read(results.RESULTS / f"{arguments.scale}.csv") | results.rows_of(grid, number_of_samples(options))
    points: dict[str, list[tuple[float, float]]] = {}
    betas: dict[str, None] = {}
    for groups in group(grid, rows).values():
        for label, each in groups.items():
            means = [summarise(each, metric) for metric in ("kl", "squared_error")]
            if means[0] and means[1]:
                variant, _, beta = label.partition(" ")
                points.setdefault(variant, []).append((means[0].mean, means[1].mean))
                betas[beta] = None
    several = {name: zip(*sorted(each), strict=True) for name, each in points.items() if len(each) > 1}
    curves = {name: (x, y) for name, (x, y) in several.items()}
    if not curves:
        raise MissingRuns("beta")
    panel = Panel(curves, "KL, nats per image", "squared error per image")
    first, *_, last = betas
    plot_curves([panel], path, title=f"{arguments.data}, scale {arguments.scale}: {first} (right) to {last} (left)")


def dispersion(arguments: Arguments, path: Path) -> None:
    """Plot variance against mean of every unit."""
    images = load(arguments.data, arguments.data_root).test[:IMAGES]
    units = {}
    for name, (model, guide) in spiking(arguments).items():
        seen = held_out(model, guide, images.to(model.device), seed=arguments.seed)
        units[name] = (seen.unit_mean, seen.unit_variance)
    plot_dispersion(units, path, title=f"{arguments.where}: units' spike counts")


def spikes(arguments: Arguments, path: Path) -> None:
    """Plot histograms of Fano factors and spike counts."""
    images = load(arguments.data, arguments.data_root).test[:IMAGES]
    counts = {
        name: torch.from_numpy(represent(model, guide, images, "counts", seed=arguments.seed))
        for name, (model, guide) in spiking(arguments).items()
    }
    plot_spikes(counts, path, title=f"{arguments.where}: units' spike counts")


def poisson_limit(arguments: Arguments, path: Path) -> None:
    """Plot metrics of a trained P-VAE whose Poissons are replaced by negative binomials of increasing r, same means.

    The negative binomials share their dispersion with the prior, and their logits are log(rate / r).
    """
    runs = variants(arguments)
    if "P-VAE" not in runs:
        raise MissingRuns("main")
    config, model, guide = runs["P-VAE"].load(arguments.device)
    device = model.device
    data = load(config.data, arguments.data_root)
    images = data.test[:IMAGES].to(device)
    limit = held_out(model, guide, images, seed=arguments.seed)
    overdispersed = NegativeBinomialModel(
        data.event_shape, model.latents, decoder=config.decoder, likelihood=model.likelihood
    )

    class SameMeans(NegativeBinomialGuide):
        def posterior(self, x: Tensor) -> RelaxedNegativeBinomial:
            r = self.prior.total_count
            return RelaxedNegativeBinomial(r, logits=(guide.posterior(x).rate / r).log(), relaxation=self.relaxation)

    posterior = SameMeans(overdispersed, encoder=guide.encoder, shared_dispersion=True)
    overdispersed.decoder.load_state_dict(model.decoder.state_dict())
    overdispersed.initial_stddev.copy_(model.initial_stddev)
    overdispersed.to(device)
    posterior.to(device)
    measured = []
    for r in DISPERSIONS:
        with torch.no_grad():
            overdispersed.prior.log_total_count.fill_(math.log(r))
            overdispersed.prior.logits.copy_(model.prior.log_rate - math.log(r))
        measured.append(held_out(overdispersed, posterior, images, seed=arguments.seed))

    def panel(ylabel: str, figure: Callable[[HeldOut], float | None]) -> Panel:
        ours, limits = ([figure(one) or 0.0 for one in each] for each in (measured, [limit] * len(DISPERSIONS)))
        curves = {"negative binomial": (DISPERSIONS, ours), "P-VAE": (DISPERSIONS, limits)}
        return Panel(curves, "dispersion parameter r", ylabel, "log")

    panels = [
        panel("Fano factor of the posterior", lambda one: one.fano),
        panel("KL, nats per image", lambda one: one.kl),
        panel("squared error per image", lambda one: one.squared_error),
    ]
    plot_curves(panels, path, title=f"{arguments.where}: the P-VAE as the limit of large r")


def features(arguments: Arguments, path: Path) -> None:
    """Plot the columns of the linear decoder, the effect of one spike on the image; units with the largest KL first."""
    found = [cell for cell in finished("decoder", arguments) if cell.config.decoder == "released_linear"]
    if not found:
        raise MissingRuns("decoder")
    _, model, _ = found[0].run.load(arguments.device)
    weight = model.get_parameter("decoder.layers.0.weight").detach().T.unflatten(1, model.event_shape)
    kl = torch.tensor(found[0].metrics["kl_per_unit"])
    best = weight[kl.argsort(descending=True)[:100].to(weight.device)]
    scale = best.abs().flatten(1).amax(1)[:, None, None, None]
    title = f"{found[0].label} on {arguments.where}: what a spike adds, by KL (grey: nothing)"
    plot_grid(0.5 + best / (2 * scale), path, title=title)


def training(arguments: Arguments, path: Path) -> None:
    """Plot held-out ELBO and squared error over epochs, one curve per variant."""
    logs = {cell.label: pd.read_csv(cell.folder / "log.csv") for cell in finished("main", arguments, "log.csv")}

    def panel(column: str, label: str) -> Panel:
        curves = {name: (list(rows["epoch"]), list(rows[column])) for name, rows in logs.items()}
        return Panel(curves, "epoch", label)

    panels = [
        panel("test_elbo", "held-out ELBO, nats per image"),
        panel("test_mse", "held-out squared error per pixel"),
    ]
    plot_curves(panels, path, title=f"{arguments.where}: training")


FIGURES: Mapping[str, Callable[[Arguments, Path], None]] = {
    figure.__name__: figure
    for figure in (samples, reconstructions, rate_distortion, dispersion, spikes, poisson_limit, features, training)
}


def main(arguments: OmitArgPrefixes[Arguments]) -> None:
    """Plot every figure whose runs are available."""
    folder = Path(arguments.out) / arguments.scale / "figures" / arguments.data
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in tqdm(FIGURES.items(), desc="figures"):
        path = folder / f"{name}.png"
        try:
            draw(arguments, path)
        except MissingRuns as missing:
            command = (
                f"nbvae reproduce {missing} --scale {arguments.scale} --data {arguments.data} --out {arguments.out}"
            )
            tqdm.write(f"{name}: no runs; make them with {command}")
        else:
            tqdm.write(str(path))


if __name__ == "__main__":
    script(main)
