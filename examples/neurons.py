"""A population of neurons with a fluctuating gain: how much does the gain of each neuron fluctuate?

    python -m examples.neurons

The counts are simulated, trials x neurons, by the modulated Poisson model of R. Goris, J. Movshon and E. Simoncelli,
"Partitioning neuronal variability", Nature Neuroscience 17 (2014): on each trial a neuron's tuned rate is multiplied by
a Gamma-distributed gain of mean 1 and variance s^2, so that given the stimulus its count is negative binomial with
dispersion r = 1 / s^2. The model does not see the stimuli: its count latents must find them, and the dispersion that
the likelihood learns for each neuron describes the remaining variability. The picture shows it against the true one.
"""

from pathlib import Path

import numpy as np
import pyro
import torch
import tyro
from matplotlib.figure import Figure
from pyro.infer import SVI
from pyro.optim import ClippedAdam
from torch import Tensor, nn
from tqdm.auto import trange

from pyro_nbvae.guides import NegativeBinomialGuide
from pyro_nbvae.infer import AnalyticKL_ELBO
from pyro_nbvae.likelihoods import NegativeBinomial
from pyro_nbvae.models import NegativeBinomialModel


def population(trials: int, neurons: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Counts (trials, neurons) and the true dispersions (neurons,)."""
    random = np.random.default_rng(seed)
    orientation = random.uniform(0, np.pi, trials)
    preferred, width = np.linspace(0, np.pi, neurons, endpoint=False), random.uniform(1.0, 2.5, neurons)
    tuning = 2 + random.uniform(10, 30, neurons) * np.exp(width * (np.cos(2 * (orientation[:, None] - preferred)) - 1))
    dispersion = np.exp(random.uniform(np.log(1.5), np.log(30), neurons))
    gain = random.gamma(dispersion, 1 / dispersion, (trials, neurons))
    counts = random.poisson(tuning * gain)
    return torch.tensor(counts, dtype=torch.float32), torch.tensor(dispersion, dtype=torch.float32)


class Encoder(nn.Module):
    """A small network from counts (B, neurons) to (B, 2, latents)."""

    def __init__(self, neurons: int, latents: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(neurons, 128), nn.ReLU(), nn.Linear(128, 2 * latents), nn.Unflatten(1, (2, latents))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(torch.log1p(x))


def main(steps: int = 3000, trials: int = 4000, neurons: int = 50, out: Path = Path("runs/examples")) -> None:
    """Fit the population and draw the picture.

    Args:
        steps: training steps, with batches of 200 trials.
        trials: number of simulated trials.
        neurons: number of simulated neurons.
        out: folder of the picture.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x, dispersion = population(trials, neurons)
    latents = 12
    decoder = nn.Sequential(nn.Linear(latents, 128), nn.SiLU(), nn.Linear(128, neurons))
    model = NegativeBinomialModel((neurons,), latents, decoder=decoder, likelihood=NegativeBinomial())
    guide = NegativeBinomialGuide(model, encoder=Encoder(neurons, latents))
    schedule = {"lr": 5e-3, "lrd": 0.1 ** (1 / steps)}
    svi = SVI(model, guide, ClippedAdam(schedule), loss=AnalyticKL_ELBO())
    for step in trange(steps, desc="steps"):
        loss = svi.step(x[torch.randint(trials, (200,))]) / 200
        if step == 0:
            print(f"loss: {loss:.1f} nats per trial at first, ", end="")
    print(f"{loss:.1f} at the end")

    learned = model.likelihood.log_total_count.detach().exp()
    agreement = float(np.corrcoef(learned.log(), dispersion.log())[0, 1])
    print(f"correlation of the logarithms of learned and true dispersions: {agreement:.2f}")
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.scatter(dispersion, learned, s=18)
    axes.plot([1, 40], [1, 40], color="black", linewidth=1, label="equal")
    axes.set(xscale="log", yscale="log", xlabel="true dispersion r of a neuron", ylabel="learned dispersion r")
    axes.set_title(f"{neurons} neurons, {trials} trials: correlation of log r {agreement:.2f}")
    axes.legend()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "neurons.png", dpi=150)
    print(out / "neurons.png")


if __name__ == "__main__":
    tyro.cli(main)
