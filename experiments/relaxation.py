"""Relaxation, temperature and KL form, which the paper leaves to the user.

The gradient noise is that of the run's estimator and relaxation at the final temperature, at the checkpoint of the run.
"""

from pyro_nbvae.study.claims import Ahead, Claim
from pyro_nbvae.study.commandline import script
from pyro_nbvae.study.config import TrainConfig
from pyro_nbvae.study.grid import Table
from pyro_nbvae.study.report import command_of

TEMPERATURES = (1.0, 0.24, 0.05)
ARRIVALS, GUMBEL = ("EX-C", "DS-C", "MC-C", "P-VAE"), ("EX-G", "DS-G", "MC-G")


def _relaxations(base: TrainConfig) -> dict[str, dict[str, object]]:
    default = (base.temperature_start, base.temperature)
    ends: dict[str, tuple[float | None, float | None]] = {f"τ {t}": (t, t) for t in TEMPERATURES}
    if base.variant in ARRIVALS:
        ends["annealed from 1"] = (1.0, base.temperature)
    schedules: dict[str, dict[str, object]] = {"default": {}}
    schedules |= {
        name: {"temperature_start": start, "temperature": end}
        for name, (start, end) in ends.items()
        if (start, end) != default
    }
    if base.variant not in ARRIVALS:
        return schedules
    arrivals = {
        f"{indicator} {name}": {**({"indicator": indicator} if indicator != "sigmoid" else {}), **temperatures}
        for indicator in ("sigmoid", "smoothstep")
        for name, temperatures in schedules.items()
    }
    return {"integer": {"relaxation": "integer"}, **arrivals}


TABLE = Table(
    name="relaxation",
    title="Temperature, indicator and KL form; default: arrivals annealed from 0.24 to 0.05, Gumbel-softmax from 1 to "
    "0.25; at scale paper as in the paper",
    variants=(*ARRIVALS, *GUMBEL),
    data=("mnist", "cifar16"),
    metrics=("elbo", "mse", "fid_c", "fid", "kl", "fano", "gradient_noise", "seconds_per_step"),
    varied=_relaxations,
    claims=(
        Claim(
            "Arrival times annealed from 0.24 train better than from 1.",
            [
                Ahead("elbo", (f"{name} sigmoid default",), (f"{name} sigmoid annealed from 1",), ("mnist", "cifar16"))
                for name in ARRIVALS
            ],
        ),
        Claim(
            "Integers train better than arrival times, in P-VAE.",
            [Ahead("elbo", ("P-VAE integer",), ("P-VAE sigmoid default",), ("mnist", "cifar16"))],
        ),
        Claim(
            "Arrival times at a constant temperature of 0.24 train better than annealed to 0.05.",
            [Ahead("elbo", ("EX-C sigmoid τ 0.24",), ("EX-C sigmoid default",), ("mnist", "cifar16"))],
        ),
        Claim(
            "Gumbel-softmax generates better at a constant temperature of 1 than annealed.",
            [
                Ahead("fid_c", (f"{name} τ 1.0",), (f"{name} default",), ("mnist", "cifar16"))
                for name in ("EX-G", "MC-G")
            ],
        ),
    ),
)

if __name__ == "__main__":
    script(command_of(TABLE))
