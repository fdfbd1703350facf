"""Number of samples for the Monte Carlo KL, compared with the exact KL."""

from pyro_nbvae.study.claims import Alike, Claim
from pyro_nbvae.study.commandline import script
from pyro_nbvae.study.config import TrainConfig
from pyro_nbvae.study.grid import Table
from pyro_nbvae.study.report import command_of

# Smallest differences that would be called visible.
VISIBLE = (("mse", 0.0003), ("elbo", 3.0))


def _samples(base: TrainConfig) -> dict[str, dict[str, object]]:
    return {f"{n} samples": {"kl_samples": n} for n in (1, 5, 15, 25)} if base.variant.startswith("MC") else {"": {}}


TABLE = Table(
    name="mc-samples",
    title="Samples of the Monte Carlo KL",
    variants=("MC-C", "EX-C"),
    data=("mnist",),
    metrics=("mse", "ssim", "fid_c", "kid_c", "fid", "kid", "elbo", "squared_error", "kl", "fano", "seconds_per_step"),
    varied=_samples,
    claims=(
        Claim(
            "More samples of the Monte Carlo KL make no visible difference (below 0.0003 of MSE and 3 nats).",
            [
                Alike(metric, [f"MC-C {n} samples" for n in (1, 5, 15, 25)], ("mnist",), within)
                for metric, within in VISIBLE
            ],
            "paper",
        ),
        Claim(
            "The exact KL, which needs no samples, trains like 25 samples (to 0.0003 of MSE and 3 nats).",
            [Alike(metric, ("MC-C 25 samples", "EX-C"), ("mnist",), within) for metric, within in VISIBLE],
        ),
    ),
)

if __name__ == "__main__":
    script(command_of(TABLE))
