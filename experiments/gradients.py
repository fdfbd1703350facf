"""Bias and variance of every gradient estimator for counts, as a table and a plot.

python -m experiments.gradients [RUN ...]    RUN: run folders of variants with integer counts, such as EX-I or P-NB

For a run, the true gradient is the mean of unbiased draws of the gradient of the objective with integer counts (Cong et
al., 2019; docs/mathematics.md, section 5.4). One more case has a gradient in closed form: a linear decoder W with
squared errors, E|x - W z|^2 = |x - W m|^2 + sum v_k |W_k|^2, where m and v are the means and variances of the counts.
The output files are ``gradients.csv`` and ``gradients.png``.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import tyro
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_nbvae.batching import Batch, random_subset
from pyro_nbvae.distributions import ArrivalTimes, GumbelSoftmax, Integer, Relaxation
from pyro_nbvae.guides import ConwayMaxwellPoissonGuide, NegativeBinomialGuide, PoissonGuide
from pyro_nbvae.likelihoods import Gaussian
from pyro_nbvae.metrics import gradients
from pyro_nbvae.models import NegativeBinomialModel
from pyro_nbvae.study.commandline import script
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
GUIDES: dict[str, type[AmortizedGuide]]
GUIDES = {"negative binomial": NegativeBinomialGuide, "Poisson": PoissonGuide, "COM-Poisson": ConwayMaxwellPoissonGuide}
OBSERVED, LATENTS, OBSERVATIONS = 64, 16, 8


def rows_of(case: str, model: GenerativeModel, guide: AmortizedGuide, x: Batch, exact: Tensor, draws: int) -> list:
    """Return one row of the table for each gradient estimator that the guide supports."""
    family = next(name for name, kind in GUIDES.items() if isinstance(guide, kind))
    samples: list[tuple[str, float | None, Callable[[], Tensor]]] = [
        (name, getattr(one, "temperature", None), partial(gradients.pathwise_gradient, model, guide, x, one))
        for name, relaxations in RELAXED.items()
        if family != "COM-Poisson" or name == "integer"
        for one in relaxations
    ]
    samples += [(name, None, partial(gradients.score_gradient, model, guide, x, n)) for name, n in SCORES.items()]
    rows = []
    for name, temperature, draw in tqdm(samples, desc=f"{case}, {family}", leave=False):
        error = gradients.gradient_error(torch.stack([draw() for _ in range(draws)]), exact)
        shown = {"bias": error.squared_bias, "± bias": error.squared_bias_error, "noise": error.variance}
        rows.append({"case": case, "posterior": family, "way": name, "temperature": temperature, **shown})
    return rows


def linear_case(family: str, draws: int, seed: int) -> list:
    """Return the rows for a random linear decoder and encoder, whose gradient is known in closed form."""
    torch.manual_seed(seed)
    decoder, likelihood = nn.Linear(LATENTS, OBSERVED), Gaussian(1.0)
    model = NegativeBinomialModel((OBSERVED,), LATENTS, decoder=decoder, likelihood=likelihood, prior_mean=2.0)
    guide = GUIDES[family](model, encoder="released_linear", initial_output_scale=1.0)
    x = torch.randn(OBSERVATIONS, OBSERVED)
    outputs = gradients.encoder_outputs(guide, x)
    q, weight = guide.posterior_from(outputs), decoder.weight / model.initial_stddev
    error = (x - model.decode(q.mean)).square().sum(1) + (q.variance * weight.square().sum(0)).sum(1)
    exact = gradients.mean_gradient(error.sum() / likelihood.beta, outputs).expand(gradients.GROUPS, -1)
    with evaluating(model, guide, seed):
        return rows_of("linear decoder", model, guide, x, exact, draws)


def trained_case(folder: str, images: int, draws: int, exact_draws: int, seed: int, device: str) -> list:
    """Return the rows for the checkpoint of a run."""
    run = Run(folder)
    state = run.read_checkpoint()
    config, model, guide = run.load_from(state, device)
    x = model.to_input(random_subset(run.data_of(state).held_out, images))
    with evaluating(model, guide, seed):
        exact = torch.stack([gradients.unbiased_gradient(model, guide, x) for _ in range(exact_draws)])
        return rows_of(f"trained, {config.title}", model, guide, x, exact, draws)


def main(
    runs: tyro.conf.Positional[tuple[str, ...]] = (),
    images: int = 16,
    draws: int = 400,
    exact_draws: int = 100,
    seed: int = 0,
    out: Path = Path("runs/gradients"),
    device: str = "auto",
) -> None:
    """Write a table and a plot of the bias and variance of every gradient estimator for counts.

    Args:
        runs: run folders of variants with counts.
        images: number of held-out observations of a run in the batch.
        draws: number of gradients per estimator.
        exact_draws: number of samples of the true gradient of a run; each decodes every observation once per latent.
        seed: random seed.
        out: folder of the table and the plot.
        device: auto or a PyTorch device string.
    """
    rows = [row for run in runs for row in trained_case(run, images, draws, exact_draws, seed, device)]
    rows += [row for family in GUIDES for row in linear_case(family, draws, seed)]
    table = pd.DataFrame(rows)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "gradients.csv", table.to_csv(index=False, float_format="%.4g"))
    # the score function is too noisy for the scale of the others; a COM-Poisson has one relaxation, nothing to compare
    drawn = [row for row in rows if row["way"] != "score function" and row["posterior"] != "COM-Poisson"]
    plot_bias_and_noise(drawn, out / "gradients.png")
    print(table.round(4).to_markdown(index=False), out / "gradients.png", sep="\n")


if __name__ == "__main__":
    script(main)
