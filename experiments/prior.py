"""Learning rate of a learned prior relative to the networks, and its initial mean count."""

from pyro_nbvae.study.report import run_script
from pyro_nbvae.study.tables import Table, register_table

VARIANTS = ("CMP", "EX-C")
# Learning-rate multipliers of the prior, and its initial mean counts.
STARTS = ((1, 20), (10, 20), (30, 20), (100, 20), (30, 2), (30, 50))


def _label(multiplier: int, mean: int) -> str:
    return f"multiplier {multiplier}, mean {mean}"


TABLE = Table(
    name="prior",
    title="Learning-rate multiplier of the prior, and its initial mean count",
    variants=VARIANTS,
    data=("mnist",),
    metrics=("elbo", "mse", "fid_c", "kl", "collapsed_units", "dead_units"),
    varied=lambda base: {
        _label(each, mean): {"prior_lr_multiplier": float(each), "prior_mean": float(mean)} for each, mean in STARTS
    },
    compare={
        (f"{one} {_label(30, 20)}", f"{one} {_label(*other)}"): ("elbo", "mse", "fid_c")
        for one in VARIANTS
        for other in ((1, 20), (30, 2), (30, 50))
    },
    within={"elbo": 3.0},
)
register_table(TABLE)

if __name__ == "__main__":
    run_script(TABLE)
