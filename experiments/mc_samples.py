"""Number of samples for the Monte Carlo KL, compared with the exact KL."""

from pyro_nbvae.experiments import IMAGES
from pyro_nbvae.study.report import run_script
from pyro_nbvae.study.tables import Table, register_table

SAMPLES = (1, 5, 15, 25)

TABLE = Table(
    name="mc-samples",
    title="Samples of the Monte Carlo KL",
    variants=("MC-C", "EX-C"),
    data=("mnist",),
    metrics=(*IMAGES, "elbo", "squared_error", "kl", "fano", "seconds_per_step"),
    varied=lambda base: (
        {f"{n} samples": {"kl_samples": n} for n in SAMPLES} if base.variant.startswith("MC") else {"": {}}
    ),
    compare={
        (f"MC-C {n} samples", other): ("mse", "elbo")
        for n, other in [*((1, f"MC-C {n} samples") for n in SAMPLES[1:]), (25, "EX-C")]
    },
    within={"mse": 0.0003, "elbo": 3.0},
)
register_table(TABLE)

if __name__ == "__main__":
    run_script(TABLE)
