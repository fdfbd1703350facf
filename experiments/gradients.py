"""Bias and noise of every gradient estimator for counts, as a table and a figure.

python -m experiments.gradients [RUN ...]    RUN: run folders of variants with integer counts, such as EX-I or P-NB

For a run, the true gradient is the mean of unbiased draws of the gradient of the objective with integer counts (Cong et
al., 2019; docs/mathematics.md, section 5.4). One more case has a gradient in closed form: a linear decoder W with
squared errors, E|x - W z|^2 = |x - W m|^2 + sum v_k |W_k|^2, where m and v are the means and variances of the counts.
The output files are ``gradients.csv`` and ``gradients.png``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_nbvae.batching import to_floats
from pyro_nbvae.distributions import ArrivalTimes, GumbelSoftmax, Integer, Relaxation
from pyro_nbvae.guides import ConwayMaxwellPoissonGuide, NegativeBinomialGuide, PoissonGuide
from pyro_nbvae.likelihoods import Gaussian
from pyro_nbvae.metrics.gradients import (
    GROUPS,
    encoder_outputs,
    gradient_error,
    mean_gradient,
    pathwise_gradient,
    score_gradient,
    unbiased_gradient,
)
from pyro_nbvae.models import NegativeBinomialModel
from pyro_nbvae.study.data import load
from pyro_nbvae.study.files import write_text
from pyro_nbvae.study.folder import Run
from pyro_nbvae.study.plots import plot_bias_and_noise
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, evaluating

WARM, COLD = (1.0, 0.5, 0.24, 0.1, 0.05), (1.0, 0.5, 0.25, 0.1)
RELAXED: dict[str, list[Relaxation]] = {
    "arrival, sigmoid": [ArrivalTimes(t) for t in WARM],
    "arrival, smoothstep": [ArrivalTimes(t, indicator="smoothstep") for t in WARM],
    "arrival, straight-through": [ArrivalTimes(t, straight_through=True) for t in WARM],
    "Gumbel-softmax": [GumbelSoftmax(t) for t in COLD],
    "integer": [Integer()],
}
SCORES = {"score function": 1, "VarGrad, 4 samples": 4}
GUIDES: dict[str, type[AmortizedGuide]] = {
    "negative binomial": NegativeBinomialGuide,
    "Poisson": PoissonGuide,
    "COM-Poisson": ConwayMaxwellPoissonGuide,
}
OBSERVED, LATENTS, OBSERVATIONS = 64, 16, 8
# Its name, its temperature, and a draw of the gradient.
Way = tuple[str, float | None, Callable[[], Tensor]]


@dataclass
class Arguments:
    """Bias and noise of every gradient estimator for counts.

    Args:
        runs: run folders of variants with counts.
        images: number of held-out observations of a run in the batch.
        draws: number of gradients per estimator.
        exact_draws: number of draws of the true gradient of a run; each decodes every observation once per latent.
        seed: random seed.
        out: folder of the table and the figure.
        device: auto or a PyTorch device string.
    """

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    images: int = 16
    draws: int = 400
    exact_draws: int = 100
    seed: int = 0
    out: str = "runs/gradients"
    device: str = "auto"


def ways(model: GenerativeModel, guide: AmortizedGuide, x: Tensor) -> Iterator[Way]:
    """Yield name, temperature and a function that draws the gradient, for each estimator that the guide supports."""
    for name, relaxations in RELAXED.items():
        if isinstance(guide, ConwayMaxwellPoissonGuide) and name != "integer":
            continue
        for one in relaxations:
            yield name, getattr(one, "temperature", None), partial(pathwise_gradient, model, guide, x, one)
    for name, samples in SCORES.items():
        yield name, None, partial(score_gradient, model, guide, x, samples)


def closed_form(model: Any, guide: AmortizedGuide, x: Tensor) -> Tensor:
    """Return the exact gradient for a linear decoder and a Gaussian likelihood."""
    outputs = encoder_outputs(guide, x)
    q, weight = guide.posterior_from(outputs), model.decoder.weight / model.initial_stddev
    error = (x - model.decode(q.mean)).square().sum(1) + (q.variance * weight.square().sum(0)).sum(1)
    return mean_gradient(error.sum() / model.likelihood.beta, outputs)


def rows_of(
    case: str, family: str, model: GenerativeModel, guide: AmortizedGuide, x: Tensor, exact: Tensor, draws: int
) -> list[dict]:
    """Return one row of the table per estimator."""
    rows = []
    for name, temperature, draw in tqdm(list(ways(model, guide, x)), desc=f"{case}, {family}", leave=False):
        error = gradient_error(torch.stack([draw() for _ in range(draws)]), exact)
        shown = {"bias": error.squared_bias, "± bias": error.squared_bias_error, "noise": error.variance}
        rows.append({"case": case, "posterior": family, "way": name, "temperature": temperature, **shown})
    return rows


def linear_case(family: str, draws: int, seed: int) -> list[dict]:
    """Return the rows for a random linear decoder and encoder."""
    torch.manual_seed(seed)
    decoder = nn.Linear(LATENTS, OBSERVED)
    model = NegativeBinomialModel((OBSERVED,), LATENTS, decoder=decoder, likelihood=Gaussian(1.0), prior_mean=2.0)
    guide = GUIDES[family](model, encoder="released_linear", initial_output_scale=1.0)
    x = torch.randn(OBSERVATIONS, OBSERVED)
    truth = closed_form(model, guide, x)
    with evaluating(model, guide, seed):
        return rows_of("linear decoder", family, model, guide, x, truth.expand(GROUPS, -1), draws)


def trained_case(folder: str, arguments: Arguments) -> list[dict]:
    """Return the rows for the checkpoint of a run."""
    config, model, guide = Run(folder).load(arguments.device)
    x = to_floats(load(config.data, config.data_root).test[: arguments.images].to(model.device))
    family = next(name for name, kind in GUIDES.items() if isinstance(guide, kind))
    with evaluating(model, guide, arguments.seed):
        exact = torch.stack([unbiased_gradient(model, guide, x) for _ in range(arguments.exact_draws)])
        return rows_of(f"trained, {config.title}", family, model, guide, x, exact, arguments.draws)


def main(arguments: Arguments) -> None:
    """Write the table and the figure."""
    rows: list[dict] = []
    for folder in arguments.runs:  # first, so that missing files are reported at once
        rows += trained_case(folder, arguments)
    for family in GUIDES:
        rows += linear_case(family, arguments.draws, arguments.seed)
    table = pd.DataFrame(rows)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "gradients.csv", table.to_csv(index=False, float_format="%.4g"))
    # the score function is too noisy for the scale of the others; a COM-Poisson has one relaxation, nothing to compare
    drawn = [row for row in rows if row["way"] != "score function" and row["posterior"] != "COM-Poisson"]
    plot_bias_and_noise(drawn, out / "gradients.png")
    print(table.round(4).to_markdown(index=False))
    print(out / "gradients.png")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
