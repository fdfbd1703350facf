"""Plots of the runs of the tables: python -m experiments.figures --scale small --data mnist

Each plot is written to OUT/SCALE/figures/DATA. If its runs are missing, it is skipped and the command that makes them
is printed.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm
from tyro.conf import OmitArgPrefixes

from pyro_nbvae.batching import to_floats
from pyro_nbvae.distributions import RelaxedNegativeBinomial
from pyro_nbvae.experiments import beta, decoder, main
from pyro_nbvae.experiments import priors as priors_of
from pyro_nbvae.guides import NegativeBinomialGuide
from pyro_nbvae.metrics import HeldOut, held_out, represent
from pyro_nbvae.models import NegativeBinomialModel
from pyro_nbvae.study import generation, results
from pyro_nbvae.study.commandline import script
from pyro_nbvae.study.data import load
from pyro_nbvae.study.plots import Panel, plot_curves, plot_dispersion, plot_images, plot_spikes
from pyro_nbvae.study.scales import Reproduction, ScaleName
from pyro_nbvae.study.tables import Cell, Table, cells
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel

# Number of held-out images for the statistics of units.
IMAGES = 2_000
SPIKING = ("CMP", "P-VAE")
DISPERSIONS = tuple(10.0**k for k in range(6))


class MissingRuns(Exception):
    """The runs for a plot are missing; the message is the name of their table."""


@dataclass
class Arguments:
    """Selection of the runs for the plots.

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
        """The data, the scale and the seed, for titles."""
        return f"{self.data}, scale {self.scale}, seed {self.seed}"

    def finished(self, table: Table, file: str = "checkpoint.pt", decoder: str = "") -> list[Cell]:
        """Return the evaluated runs of a table that still have a file, and a decoder of this name."""
        grid = cells(table, Reproduction(scale=self.scale, data=(self.data,), seeds=(self.seed,), out=self.out))
        grid = [cell for cell in grid if decoder in ("", cell.config.decoder) and cell.run.read_json("metrics.json")]
        if not (found := [cell for cell in grid if (cell.folder / file).exists()]):
            raise MissingRuns(table.name)
        return found

    def pairs(self, names: tuple[str, ...] = ()) -> Iterator[tuple[str, GenerativeModel, AmortizedGuide]]:
        """Yield the names of the trained variants of the main table (of those named, or all), models and guides."""
        found = [cell for cell in self.finished(main.TABLE) if not names or cell.label in names]
        if not found:
            raise MissingRuns(main.TABLE.name)
        for cell in found:
            yield (cell.label, *cell.run.load(self.device)[1:])

    def images(self, part: str = "test", number: int = IMAGES) -> torch.Tensor:
        """Return images of the data set."""
        return getattr(load(self.data, self.data_root), part)[:number]


def _plot_rows(rows: dict[str, torch.Tensor], path: Path, title: str) -> None:
    plot_images(torch.cat([*rows.values()]), path, title=title, columns=16, rows=[*rows])


def samples(given: Arguments, path: Path) -> None:
    """Plot training images, and images generated from the prior (integer counts), one row per variant."""
    rows = {"training data": to_floats(given.images("train", 16))}
    for name, model, guide in given.pairs():
        rows[name] = to_floats(generation.prior_samples(model, guide, 16, seed=given.seed))
    _plot_rows(rows, path, f"{given.where}: images generated from the prior")


def priors(given: Arguments, path: Path) -> None:
    """Plot training images, and images generated from each prior (integer counts), two rows per prior."""
    rows = {"training data": to_floats(given.images("train", 16))}
    found = [cell for cell in given.finished(priors_of.TABLE) if cell.label.split()[0] == SPIKING[0]]
    if not found:
        raise MissingRuns(priors_of.TABLE.name)
    for cell in found:
        drawn = generation.prior_samples(*cell.run.load(given.device)[1:], 32, seed=given.seed)
        kind = cell.label.partition(" ")[2].replace("_", ",\n") or "independent"
        rows |= dict(zip((kind, " " * len(rows)), to_floats(drawn).split(16), strict=True))
    _plot_rows(rows, path, f"{given.where}: images generated from the priors of {SPIKING[0]}")


def reconstructions(given: Arguments, path: Path) -> None:
    """Plot held-out images and the reconstructions of each variant from one integer sample."""
    rows = {"held out": to_floats(given.images(number=16))}
    for name, model, guide in given.pairs():
        rows[name] = generation.reconstructions(model, guide, rows["held out"], seed=given.seed).cpu()
    _plot_rows(rows, path, f"{given.where}: held-out images and their reconstructions")


def rate_distortion(given: Arguments, path: Path) -> None:
    """Plot squared error against KL (means over seeds), one curve over beta per variant; saved rows are sufficient."""
    chosen = Reproduction(scale=given.scale, data=(given.data,), out=given.out)
    grid = cells(beta.TABLE, chosen)
    found = pd.concat(
        [results.read(results.RESULTS / f"{given.scale}.csv"), results.finished(grid, chosen.number_of_samples)]
    )
    rows = results.select(found.drop_duplicates(["data", "run", "seed"], keep="last"), grid)
    rows = rows[rows["sampler"] == "prior"].reindex(columns=["label", "kl", "squared_error"]).dropna()
    means = rows.groupby("label", sort=False).mean()
    by_variant = means.groupby(means.index.map(lambda label: label.partition(" ")[0]), sort=False)
    points = {name: each.sort_values("kl") for name, each in by_variant if len(each) > 1}
    curves = {name: (list(each["kl"]), list(each["squared_error"])) for name, each in points.items()}
    if not curves:
        raise MissingRuns(beta.TABLE.name)
    title = f"{given.data}, scale {given.scale}: β {beta.FACTORS[0]} (right) to {beta.FACTORS[-1]} (left)"
    plot_curves([Panel(curves, "KL, nats per image", "squared error per image")], path, title=title)


def dispersion(given: Arguments, path: Path) -> None:
    """Plot variance against mean of every unit."""
    units = {}
    for name, model, guide in given.pairs(SPIKING):
        seen = held_out(model, guide, given.images().to(model.device), seed=given.seed)
        units[name] = (seen.unit_mean, seen.unit_variance)
    plot_dispersion(units, path, title=f"{given.where}: units' spike counts")


def spikes(given: Arguments, path: Path) -> None:
    """Plot histograms of Fano factors and spike counts."""
    counts = {
        name: torch.from_numpy(represent(model, guide, given.images(), "counts", seed=given.seed))
        for name, model, guide in given.pairs(SPIKING)
    }
    plot_spikes(counts, path, title=f"{given.where}: units' spike counts")


def poisson_limit(given: Arguments, path: Path) -> None:
    """Plot metrics of a trained P-VAE whose Poissons are replaced by negative binomials of increasing r, same means.

    The negative binomials share their dispersion with the prior, and their logits are log(rate / r).
    """
    ((_, model, guide),) = given.pairs(("P-VAE",))
    images = given.images().to(model.device)
    other = NegativeBinomialModel(
        tuple(model.event_shape), model.latents, decoder=model.decoder, likelihood=model.likelihood
    )

    class SameMeans(NegativeBinomialGuide):
        def posterior(self, x: torch.Tensor, **known: torch.Tensor | None) -> RelaxedNegativeBinomial:
            r = self.prior.total_count
            rate = guide.posterior(x, **known).rate
            return RelaxedNegativeBinomial(r, logits=(rate / r).log(), relaxation=self.relaxation)

    posterior = SameMeans(other, encoder=guide.encoder, shared_dispersion=True)
    other.initial_stddev.copy_(model.initial_stddev)
    other.to(model.device), posterior.to(model.device)
    measured = []
    for r in DISPERSIONS:
        with torch.no_grad():
            other.prior.log_total_count.fill_(math.log(r))
            other.prior.logits.copy_(model.prior.log_rate - math.log(r))
        measured.append(held_out(other, posterior, images, seed=given.seed))
    limit = [held_out(model, guide, images, seed=given.seed)] * len(DISPERSIONS)

    def panel(ylabel: str, value: Callable[[HeldOut], float | None]) -> Panel:
        of = {"negative binomial": measured, "P-VAE": limit}
        curves = {name: (DISPERSIONS, [value(one) or 0.0 for one in each]) for name, each in of.items()}
        return Panel(curves, "dispersion parameter r", ylabel, "log")

    panels = [
        panel("Fano factor of the posterior", lambda one: one.fano),
        panel("KL, nats per image", lambda one: one.kl),
        panel("squared error per image", lambda one: one.squared_error),
    ]
    plot_curves(panels, path, title=f"{given.where}: the P-VAE as the limit of large r")


def features(given: Arguments, path: Path) -> None:
    """Plot the columns of the linear decoder, the effect of one spike on the image; units with the largest KL first."""
    cell = given.finished(decoder.TABLE, decoder="released_linear")[0]
    _, model, _ = cell.run.load(given.device)
    weight = model.get_parameter("decoder.layers.0.weight").detach().T.unflatten(1, model.event_shape)
    order = torch.tensor(cell.run.read_json("metrics.json")["kl_per_unit"]).argsort(descending=True)
    best = weight[order[:100].to(weight.device)]
    scale = best.abs().flatten(1).amax(1)[:, None, None, None]
    title = f"{cell.label} on {given.where}: what a spike adds, by KL (grey: nothing)"
    plot_images(0.5 + best / (2 * scale), path, title=title)


def training(given: Arguments, path: Path) -> None:
    """Plot held-out ELBO and squared error over epochs, one curve per variant."""
    logs = {cell.label: pd.read_csv(cell.folder / "log.csv") for cell in given.finished(main.TABLE, "log.csv")}
    labels = {"test_elbo": "held-out ELBO, nats per image", "test_mse": "held-out squared error per pixel"}
    panels = [
        Panel({name: (list(rows["epoch"]), list(rows[column])) for name, rows in logs.items()}, "epoch", label)
        for column, label in labels.items()
    ]
    plot_curves(panels, path, title=f"{given.where}: training")


PLOTS = (samples, priors, reconstructions, rate_distortion, dispersion, spikes, poisson_limit, features, training)


def run(arguments: OmitArgPrefixes[Arguments]) -> None:
    """Plot everything whose runs are available."""
    folder = Path(arguments.out) / arguments.scale / "figures" / arguments.data
    folder.mkdir(parents=True, exist_ok=True)
    where = f"--scale {arguments.scale} --data {arguments.data} --out {arguments.out}"
    for plot in tqdm(PLOTS, desc="plots"):
        path = folder / f"{plot.__name__}.png"
        try:
            plot(arguments, path)
            tqdm.write(str(path))
        except MissingRuns as missing:
            tqdm.write(f"{plot.__name__}: no runs; make them with nbvae reproduce {missing} {where}")


if __name__ == "__main__":
    script(run)
