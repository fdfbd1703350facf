"""Learning rate of a learned prior relative to the networks, and its initial mean count."""

from pyro_nbvae.commandline import script
from pyro_nbvae.runs.config import TrainConfig
from pyro_nbvae.tables.claims import Ahead, Claim
from pyro_nbvae.tables.grid import Table
from pyro_nbvae.tables.report import command_of

OTHERS = ("pace 1, mean 2", "pace 10, mean 2", "pace 30, mean 2", "pace 100, mean 2", "pace 30, mean 4")
PACES = (1, 10, 30, 100)
MEANS = (1.0, 2.0, 4.0)


def _paces(base: TrainConfig) -> dict[str, dict[str, object]]:
    paces: dict[str, dict[str, object]] = {
        f"pace {pace}, mean 2": {"prior_lr": pace * base.lr, "prior_mean": 2.0} for pace in PACES
    }
    return paces | {f"pace 30, mean {mean:g}": {"prior_lr": 30 * base.lr, "prior_mean": mean} for mean in MEANS}


TABLE = Table(
    name="prior",
    title="Learning rate of the prior, in multiples of that of the networks, and initial mean count",
    variants=("CMP", "EX-C"),
    data=("mnist",),
    metrics=("elbo", "mse", "fid_c", "kl", "dead_units"),
    varied=_paces,
    claims=(
        Claim(
            "A prior with 30 times the learning rate of the networks is better than one with the same learning rate.",
            [
                Ahead(metric, (f"{name} pace 30, mean 2",), (f"{name} pace 1, mean 2",), ("mnist",))
                for name in ("CMP", "EX-C")
                for metric in ("elbo", "fid_c")
            ],
        ),
        Claim(
            "CMP is best with an initial mean of 1, at 30 times the learning rate of the networks.",
            [
                Ahead(metric, ("CMP pace 30, mean 1",), tuple(f"CMP {other}" for other in OTHERS), ("mnist",))
                for metric in ("elbo", "fid_c")
            ],
        ),
    ),
)

if __name__ == "__main__":
    script(command_of(TABLE))
