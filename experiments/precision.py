"""Networks that multiply in bfloat16 in training, as at scales full and paper, compared with single precision."""

from pyro_nbvae.study.report import run_script
from pyro_nbvae.study.tables import Table, register_table

VARIANTS = ("CMP", "EX-I", "G-VAE")
WITHIN = {"elbo": 1.0, "mse": 0.0003, "fid_c": 0.4}

TABLE = Table(
    name="precision",
    title="Precision of the networks' multiplications in training",
    variants=VARIANTS,
    data=("cifar16",),
    metrics=("elbo", "mse", "fid_c", "kl", "collapsed_units", "dead_units", "seconds_per_step"),
    varied=lambda base: {name: {"mixed_precision": name == "bfloat16"} for name in ("float32", "bfloat16")},
    compare={(f"{one} bfloat16", f"{one} float32"): tuple(WITHIN) for one in VARIANTS},
    within=WITHIN,
)
register_table(TABLE)

if __name__ == "__main__":
    run_script(TABLE)
