"""A simulated population: which neurons are more regular than a Poisson, and what do the latents know?

    python -m examples.neurons

Four gratings are shown to a population of neurons; a gain that all neurons share fluctuates from trial to trial. A
third of the neurons are more regular than a Poisson, as after a refractory period; a third are Poisson; a third fire in
bursts. Some neurons are lost during a part of the session. The model does not see the gratings: its count latents have
to find them, and the COM-Poisson likelihood learns the dispersion of each neuron. A quarter of the neurons is hidden
from the encoder and predicted from the others (co-smoothing).
"""

from pathlib import Path

import numpy as np
import pyro
import torch
import tyro
from matplotlib.figure import Figure
from pyro.infer import SVI
from pyro.optim import ClippedAdam
from torch import Tensor
from tqdm.auto import trange

from pyro_nbvae.batching import Recording
from pyro_nbvae.distributions import MeanConwayMaxwellPoisson
from pyro_nbvae.guides import ConwayMaxwellPoissonGuide
from pyro_nbvae.infer import AnalyticKL_ELBO, learning_rates
from pyro_nbvae.likelihoods import ConwayMaxwellPoisson, Poisson
from pyro_nbvae.metrics import co_smoothing, fano_factors, null_rates
from pyro_nbvae.models import NegativeBinomialModel

# log nu of the three kinds of neurons.
KINDS = {"regular": 1.2, "Poisson": 0.0, "bursting": -1.5}


def population(trials: int, neurons: int, seed: int = 0) -> tuple[Recording, Tensor, Tensor]:
    """Counts with a mask, the grating of each trial, and the true log nu of each neuron."""
    random = np.random.default_rng(seed)
    grating = np.arange(trials) % 4
    preferred, width = random.uniform(0, np.pi, neurons), random.uniform(1.0, 2.5, neurons)
    angles = np.pi / 4 * np.arange(4)[:, None]
    tuning = 0.5 + random.uniform(1, 4, neurons) * np.exp(width * (np.cos(2 * (angles - preferred)) - 1))
    gain = random.gamma(20.0, 1 / 20, (trials, 1))
    log_nu = torch.tensor(list(KINDS.values()))[torch.arange(neurons) % 3]
    means = torch.tensor(tuning[grating] * gain, dtype=torch.float32)
    counts = MeanConwayMaxwellPoisson(means.log(), log_nu).sample()
    mask = torch.ones(trials, neurons, dtype=torch.bool)
    mask[trials // 2 : 3 * trials // 4, :: neurons // 5] = False  # neurons that are lost for a while
    return Recording(counts.masked_fill(~mask, float("nan")), mask=mask), torch.tensor(grating), log_nu


def main(steps: int = 1500, trials: int = 800, neurons: int = 60, out: Path = Path("runs/examples")) -> None:
    """Fit the population and draw the plot.

    Args:
        steps: training steps, with batches of 100 trials.
        trials: number of simulated trials.
        neurons: number of simulated neurons.
        out: folder of the plot.
    """
    pyro.set_rng_seed(0)
    data, grating, log_nu = population(trials, neurons)
    held_out = torch.arange(trials) % 5 == 0
    train, test = data[~held_out], data[held_out]
    reads = torch.arange(neurons) % 4 != 0
    for likelihood in (Poisson(), ConwayMaxwellPoisson()):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = NegativeBinomialModel((neurons,), 8, decoder="linear", likelihood=likelihood)
        guide = ConwayMaxwellPoissonGuide(model, encoder="linear", reads=reads)
        model.initialize(train)
        guide.initialize(train)
        svi = SVI(model, guide, ClippedAdam(learning_rates(3e-3, lrd=0.1 ** (1 / steps))), loss=AnalyticKL_ELBO())
        for _ in trange(steps, desc=type(likelihood).__name__):
            batch = train[torch.randint(len(train), (100,))]
            svi.step(batch.x, **batch.given)
        score, _ = co_smoothing(model, guide, test, null_rates(train))
        print(f"{type(likelihood).__name__}: {score.bits:.3f} ± {score.over_trials:.3f} bits per held-out spike")

    assert isinstance(likelihood, ConwayMaxwellPoisson)
    learned = likelihood.dispersions().log()
    agreement = float(np.corrcoef(learned, log_nu)[0, 1])
    print(f"correlation of learned and true log nu: {agreement:.2f}")
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    fano = fano_factors(data.x, grating)
    for k, kind in enumerate(KINDS):
        own = torch.arange(neurons) % 3 == k
        left.scatter(fano[own], learned[own], s=18, label=f"{kind}, log nu = {KINDS[kind]:g}", color=f"C{k}")
        left.axhline(KINDS[kind], color=f"C{k}", linewidth=0.8)
    left.axvline(1, color="gray", linewidth=0.6, linestyle=":")
    left.set(xlabel="Fano factor of the counts of a grating", ylabel="learned log nu")
    left.legend()
    with torch.no_grad(), guide.exact():
        mean = guide.posterior(test.x, **test.given).mean
    _, _, axes = torch.pca_lowrank(mean.sqrt(), 2)
    points = (mean.sqrt() - mean.sqrt().mean(0)) @ axes
    right.scatter(*points.T, c=grating[held_out], cmap="hsv", vmin=0, vmax=4, s=14)
    right.set(xlabel="first component of the latents", ylabel="second component", title="held-out trials, by grating")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "neurons.png", dpi=150)
    print(out / "neurons.png")


if __name__ == "__main__":
    tyro.cli(main)
