"""Gradient variance of each ELBO estimator at one checkpoint; the table is written to ``results/gradient_variance.md``.

python -m experiments.gradient_variance RUN    RUN: a run folder of variant EX-C, MC-C, EX-G or MC-G

The gradient of the loss with respect to the guide's parameters is computed many times, on one batch of held-out images.
The table shows the noise-to-signal ratio: the trace of its covariance over the squared norm of its mean, where the mean
is that of the exact-KL estimator with the same relaxation and temperature.
"""

from pathlib import Path

import tyro
from pyro.infer import ELBO, Trace_ELBO
from tqdm.auto import tqdm

from pyro_nbvae.batching import random_subset
from pyro_nbvae.distributions import ArrivalTimes, GumbelSoftmax, Relaxation
from pyro_nbvae.infer import AnalyticKL_ELBO, MonteCarloKL_ELBO
from pyro_nbvae.metrics import gradient_moments
from pyro_nbvae.study.commandline import script
from pyro_nbvae.study.folder import Run
from pyro_nbvae.study.provenance import write_page

ESTIMATORS: dict[str, ELBO] = {
    "AnalyticKL_ELBO": AnalyticKL_ELBO(),
    **{f"MonteCarloKL_ELBO, {n} sample{'s' * (n > 1)}": MonteCarloKL_ELBO(n) for n in (25, 5, 1)},
    "Pyro's Trace_ELBO": Trace_ELBO(),
}
RELAXATIONS: dict[str, Relaxation] = {
    "arrival, sigmoid": ArrivalTimes(),
    "arrival, smoothstep": ArrivalTimes(indicator="smoothstep"),
    "gumbel": GumbelSoftmax(),
}
TEMPERATURES = (0.05, 0.25)


def main(
    run: tyro.conf.Positional[str],
    images: int = 64,
    repeats: int = 100,
    seed: int = 0,
    out: Path = Path("results/gradient_variance.md"),
    device: str = "auto",
) -> None:
    """Write the noise-to-signal ratio of every estimator (rows) for every relaxation and temperature (columns).

    Args:
        run: a run folder written by nbvae train, of a negative binomial variant without shared dispersion.
        images: number of held-out images in the batch.
        repeats: number of gradients per cell.
        seed: random seed.
        out: path of the table.
        device: auto or a PyTorch device string.
    """
    folder = Run(run)
    state = folder.read_checkpoint()
    _, model, guide = folder.load_from(state, device)
    x = model.to_input(random_subset(folder.data_of(state).held_out, images))
    rows: dict[str, dict[str, object]] = {label: {"estimator": label} for label in ESTIMATORS}
    for name, temperature in tqdm([(name, t) for name in RELAXATIONS for t in TEMPERATURES], desc="relaxations"):
        guide.relaxation = RELAXATIONS[name].at(temperature)
        moments = {label: gradient_moments(e, model, guide, x, repeats, seed=seed) for label, e in ESTIMATORS.items()}
        for label, one in moments.items():
            rows[label][f"{name}, {temperature}"] = f"{one.variance / moments['AnalyticKL_ELBO'].squared_norm:.2f}"
    caption = (
        "Trace of the covariance of the gradient with respect to the guide's parameters over the squared norm of its "
        f"mean under the exact KL; {images} held-out images, {repeats} samples per cell; columns: relaxation, "
        "temperature."
    )
    print(write_page(out, list(rows.values()), caption, f"python -m experiments.gradient_variance {run}"))


if __name__ == "__main__":
    script(main)
