"""Rate-distortion trade-off: the effect of beta, the weight of the KL, on each variant."""

from pyro_nbvae.experiments import IMAGES, UNITS
from pyro_nbvae.study.report import run_script
from pyro_nbvae.study.tables import Table, register_table
from pyro_nbvae.study.tree import options

VARIANTS = ("CMP", "CMP-MAR", "EX-C", "P-VAE", "G-VAE", "GS-VAE")
FACTORS = (0.2, 0.4, 0.6, 1.0, 2.0)

TABLE = Table(
    name="beta",
    title="Reconstruction and generation over beta, in multiples of the equivalent of beta = 1 in the paper",
    variants=VARIANTS,
    data=("mnist",),
    metrics=(*IMAGES, *UNITS, "elbo", "squared_error"),
    varied=lambda base: {f"β {factor}": {"beta": factor * options(base)["beta"]} for factor in FACTORS},
    compare={
        **{(f"{one} β 1.0", f"{one} β {factor}"): ("mse", "fid_c") for one in VARIANTS for factor in (0.2, 0.4)},
        **{(f"CMP β {factor}", f"P-VAE β {factor}"): ("mse", "elbo") for factor in FACTORS},
    },
    curves=[("CMP", other) for other in VARIANTS[1:]],
)
register_table(TABLE)

if __name__ == "__main__":
    run_script(TABLE)
