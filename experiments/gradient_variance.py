"""Gradient noise of each ELBO estimator at one checkpoint; the table is written to ``results/gradient_variance.md``.

python -m experiments.gradient_variance RUN    RUN: a run folder of variant EX-C, MC-C, EX-G or MC-G

The gradient of the loss in the guide's parameters is computed many times, on one batch of held-out images. The table
shows the noise-to-signal ratio: the trace of its covariance over the squared norm of its mean, where the mean is that
of the exact-KL estimator with the same relaxation and temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from pyro.infer import ELBO, Trace_ELBO
from tqdm.auto import tqdm

from pyro_nbvae.batching import to_floats
from pyro_nbvae.distributions import ArrivalTimes, GumbelSoftmax, Relaxation
from pyro_nbvae.infer import AnalyticKL_ELBO, MonteCarloKL_ELBO
from pyro_nbvae.metrics import gradient_moments
from pyro_nbvae.study.data import load
from pyro_nbvae.study.folder import Run
from pyro_nbvae.study.formats import write_page

ESTIMATORS: dict[str, ELBO] = {
    "AnalyticKL_ELBO": AnalyticKL_ELBO(),
    "MonteCarloKL_ELBO, 25 samples": MonteCarloKL_ELBO(25),
    "MonteCarloKL_ELBO, 5 samples": MonteCarloKL_ELBO(5),
    "MonteCarloKL_ELBO, 1 sample": MonteCarloKL_ELBO(1),
    "Pyro's Trace_ELBO": Trace_ELBO(),
}
RELAXATIONS: dict[str, Relaxation] = {
    "arrival, sigmoid": ArrivalTimes(),
    "arrival, smoothstep": ArrivalTimes(indicator="smoothstep"),
    "gumbel": GumbelSoftmax(),
}
TEMPERATURES = (0.05, 0.25)


@dataclass
class Arguments:
    """Gradient noise of each ELBO estimator at one checkpoint.

    Args:
        run: a run folder written by nbvae train, of a negative binomial variant without shared dispersion.
        images: number of held-out images in the batch.
        repeats: number of gradients per cell.
        seed: random seed.
        out: path of the table.
        device: auto or a PyTorch device string.
    """

    run: tyro.conf.Positional[str]
    images: int = 64
    repeats: int = 100
    seed: int = 0
    out: Path = Path("results/gradient_variance.md")
    device: str = "auto"


def table(arguments: Arguments) -> list[dict[str, str]]:
    """Return the noise-to-signal ratio of every estimator (rows) for every relaxation and temperature (columns)."""
    config, model, guide = Run(arguments.run).load(arguments.device)
    device = model.device
    x = to_floats(load(config.data, config.data_root).test[: arguments.images].to(device))
    rows: dict[str, dict[str, str]] = {label: {"estimator": label} for label in ESTIMATORS}
    cells = [(name, t) for name in RELAXATIONS for t in TEMPERATURES]
    for name, temperature in tqdm(cells, desc="relaxations"):
        guide.relaxation = RELAXATIONS[name].at(temperature)
        moments = {
            label: gradient_moments(elbo, model, guide, x, arguments.repeats, seed=arguments.seed)
            for label, elbo in ESTIMATORS.items()
        }
        signal = moments["AnalyticKL_ELBO"].squared_norm
        for label, one in moments.items():
            rows[label][f"{name}, {temperature}"] = f"{one.variance / signal:.2f}"
    return list(rows.values())


if __name__ == "__main__":
    given = tyro.cli(Arguments)
    caption = (
        "Trace of the covariance of the gradient in the guide's parameters over the squared norm of its mean under the "
        f"exact KL; {given.images} held-out images, {given.repeats} draws per cell; columns: relaxation, temperature."
    )
    print(write_page(given.out, table(given), caption, f"python -m experiments.gradient_variance {given.run}"))
