"""Which relaxation, at which temperature, under which KL: what the paper leaves to the user.

The gradient's noise is that of the run's estimator and relaxation at its end temperature, taken at one checkpoint for
all: the grid's first run whose encoder has the same outputs (DS guides have one a unit, the others two).
"""

import pyro
import torch

from pyro_nbvae.cli import script
from pyro_nbvae.config import TrainConfig
from pyro_nbvae.data import load, to_unit_interval
from pyro_nbvae.metrics import gradient_moments
from pyro_nbvae.reproduction import Table
from pyro_nbvae.runs import Run, build
from pyro_nbvae.variants import VARIANTS

TEMPERATURES = (1.0, 0.24, 0.05)
IMAGES, REPEATS = 64, 50


def _relaxations(base: TrainConfig) -> dict[str, dict[str, object]]:
    indicators = ("sigmoid", "smoothstep") if base.variant.endswith("C") else ("sigmoid",)
    schedules: dict[str, dict[str, object]] = {"annealed": {}}
    schedules |= {f"τ {t}": {"temperature_start": t, "temperature": t} for t in TEMPERATURES}
    return {
        f"{indicator if len(indicators) > 1 else ''} {name}".strip(): {"indicator": indicator, **temperatures}
        for indicator in indicators
        for name, temperatures in schedules.items()
    }


def gradient_noise(run: Run, fellows: list[Run], device: str) -> dict[str, float]:
    """Noise to signal of the run's gradient, at a checkpoint that it shares with its fellows."""
    config, shape = run.config()
    shared = VARIANTS[config.variant].options.get("shared_dispersion")
    at = next(f for f in fellows if VARIANTS[f.config()[0].variant].options.get("shared_dispersion") == shared)
    model, guide, elbo = build(config, shape)
    at.restore(model, guide, at.read_checkpoint())
    model, guide = model.to(device).eval(), guide.to(device).eval()
    x = to_unit_interval(load(config.data, config.data_root).test[:IMAGES].to(device))
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        torch.manual_seed(0)
        moments = gradient_moments(elbo, model, guide, x, REPEATS)
    return {"gradient_noise": moments.noise / moments.signal}


TABLE = Table(
    name="relaxation",
    title="Temperature, indicator and KL form; annealed: from 1 to 0.05, with Gumbel-softmax to 0.25",
    variants=("EX-C", "EX-G", "DS-C", "DS-G", "MC-C", "MC-G"),
    data=("mnist", "cifar16"),
    metrics=("elbo", "mse", "fid_c", "fid", "kl", "fano", "gradient_noise", "seconds_per_step"),
    varied=_relaxations,
    measure=gradient_noise,
)

if __name__ == "__main__":
    script(TABLE)
