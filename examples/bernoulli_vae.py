"""A Bernoulli likelihood: binary digits, negative binomial latents, Pyro's own SVI.

    python -m examples.bernoulli_vae

Writes a picture of held-out digits, and below them the probabilities that the model gives to their pixels.
"""

from pathlib import Path

import pyro
import torch
import tyro
from pyro.infer import SVI
from pyro.optim import ClippedAdam
from tqdm.auto import trange

from pyro_nbvae.batching import to_floats
from pyro_nbvae.guides import NegativeBinomialGuide
from pyro_nbvae.infer import AnalyticKL_ELBO
from pyro_nbvae.likelihoods import Bernoulli
from pyro_nbvae.models import NegativeBinomialModel
from pyro_nbvae.study.data import load
from pyro_nbvae.study.plots import plot_pairs


def binary(images: torch.Tensor) -> torch.Tensor:
    """Return 1 for pixels brighter than half, else 0."""
    return (to_floats(images) > 0.5).float()


def main(epochs: int = 30, out: Path = Path("runs/examples")) -> None:
    """Train the model and plot reconstructions.

    Args:
        epochs: passes over the digits.
        out: folder of the picture.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    digits = load("digits")
    x, held_out = binary(digits.train), binary(digits.test)
    model = NegativeBinomialModel((1, 16, 16), latents=32, decoder="mlp", likelihood=Bernoulli())
    guide = NegativeBinomialGuide(model, encoder="mlp")
    elbo = AnalyticKL_ELBO()
    svi = SVI(model, guide, ClippedAdam({"lr": 1e-3}), loss=elbo)

    def bound() -> float:
        """Held-out ELBO with integer counts, in nats per image."""
        model.eval()
        guide.eval()
        with guide.exact():
            value = -elbo.loss(model, guide, held_out) / len(held_out)
        model.train()
        guide.train()
        return value

    print(f"before training: {bound():.1f} nats per image")
    for _ in trange(epochs, desc="epochs"):
        for batch in x[torch.randperm(len(x))].split(100):
            svi.step(batch)
    print(f"after training: {bound():.1f} nats per image")

    model.eval()
    guide.eval()
    with guide.exact(), torch.no_grad():
        means = model.observation(guide(held_out[:16])).mean
    out.mkdir(parents=True, exist_ok=True)
    path = out / "bernoulli_vae.png"
    plot_pairs(held_out[:16], means, path, title="Binary digits, and the probabilities of their pixels")
    print(path)


if __name__ == "__main__":
    tyro.cli(main)
