"""The prior's pace: how fast a learned prior moves beside the networks, and from which mean count it starts."""

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
    title="The prior's learning rate, in multiples of the networks', and the mean count that it starts from",
    variants=("CMP", "EX-C"),
    data=("mnist",),
    metrics=("elbo", "mse", "fid_c", "kl", "dead_units"),
    varied=_paces,
    claims=(
        Claim(
            "A prior that learns 30 times faster than the networks beats one that learns as they do.",
            [
                Ahead(metric, (f"{name} pace 30, mean 2",), (f"{name} pace 1, mean 2",), ("mnist",))
                for name in ("CMP", "EX-C")
                for metric in ("elbo", "fid_c")
            ],
        ),
        Claim(
            "CMP does best from a mean of 1, at 30 times the networks' rate.",
            [
                Ahead(metric, ("CMP pace 30, mean 1",), tuple(f"CMP {other}" for other in OTHERS), ("mnist",))
                for metric in ("elbo", "fid_c")
            ],
        ),
    ),
)

if __name__ == "__main__":
    script(command_of(TABLE))
