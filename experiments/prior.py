"""Learning rate of a learned prior relative to the networks, and its initial mean count."""

from pyro_nbvae.study.claims import Ahead, Alike, Claim
from pyro_nbvae.study.commandline import script
from pyro_nbvae.study.config import TrainConfig
from pyro_nbvae.study.grid import Table
from pyro_nbvae.study.report import command_of

# Learning rates of the prior, in multiples of the networks', and its initial mean counts.
STARTS = ((1, 20), (10, 20), (30, 20), (100, 20), (30, 2), (30, 50))


def _starts(base: TrainConfig) -> dict[str, dict[str, object]]:
    assert base.lr is not None
    return {
        f"pace {pace}, mean {mean}": {"prior_lr": pace * base.lr, "prior_mean": float(mean)} for pace, mean in STARTS
    }


TABLE = Table(
    name="prior",
    title="Learning rate of the prior, in multiples of that of the networks, and initial mean count",
    variants=("CMP", "EX-C"),
    data=("mnist",),
    metrics=("elbo", "mse", "fid_c", "kl", "collapsed_units", "dead_units"),
    varied=_starts,
    claims=(
        Claim(
            "A prior with 30 times the learning rate of the networks is better than one with the same learning rate.",
            [
                Ahead(metric, (f"{name} pace 30, mean 20",), (f"{name} pace 1, mean 20",), ("mnist",))
                for name in ("CMP", "EX-C")
                for metric in ("elbo", "fid_c")
            ],
        ),
        Claim(
            "Fine-grained counts, of an initial mean of 20, are better than those of a mean of 2.",
            [
                Ahead(metric, (f"{name} pace 30, mean 20",), (f"{name} pace 30, mean 2",), ("mnist",))
                for name in ("CMP", "EX-C")
                for metric in ("elbo", "mse")
            ],
        ),
        Claim(
            "An initial mean of 50 instead of 20 changes CMP's ELBO by less than 3 nats.",
            [Alike("elbo", ("CMP pace 30, mean 20", "CMP pace 30, mean 50"), ("mnist",), within=3.0)],
        ),
    ),
)

if __name__ == "__main__":
    script(command_of(TABLE))
