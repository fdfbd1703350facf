"""Priors over latents: factorised, a mixture, an autoregressive one, and a mixture on top of it."""

from pyro_nbvae.study.report import run_script
from pyro_nbvae.study.tables import Table, register_table

VARIANTS = ("CMP", "EX-C", "P-VAE", "GS-VAE")
JOINT = ("mixture", "autoregressive", "mixture_autoregressive")
BOUNDS = ("elbo", "mse", "fid_c")

TABLE = Table(
    name="priors",
    title="Priors over latents",
    variants=VARIANTS,
    data=("mnist", "fashion_mnist", "cifar16"),
    metrics=(
        *("elbo", "mse", "fid_c", "fid", "kl", "information", "collapsed_units"),
        *("components_accuracy", "components_nmi", "kmeans_accuracy", "kmeans_nmi", "seconds_per_step"),
    ),
    varied=lambda base: {"": {}, **{kind: {"prior": kind} for kind in JOINT}},
    compare={
        **{(f"{one} {kind}", one): BOUNDS for one in VARIANTS for kind in JOINT},
        **{(f"CMP {kind}", f"GS-VAE {kind}"): BOUNDS for kind in JOINT},
    },
)
register_table(TABLE)

if __name__ == "__main__":
    run_script(TABLE)
