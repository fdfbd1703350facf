"""The main table: reconstruction and generation of every variant on four image data sets."""

from pyro_nbvae.experiments import IMAGES, UNITS
from pyro_nbvae.study.report import run_script
from pyro_nbvae.study.tables import Table, register_table
from pyro_nbvae.study.variants import VARIANTS

DISTANCES, CLAIMED = ("fid", "fid_c"), ("elbo", "mse", "fid_c")
# Values in the paper, by data set and metric.
PAPER = {
    ("mnist", "fid"): {"MC-G": 78.4, "P-VAE": 104.1},
    ("mnist", "mse"): {"MC-C": 0.0123, "P-VAE": 0.0125},
    ("fashion_mnist", "fid"): {"MC-G": 125.9, "P-VAE": 146.0},
    ("cifar16", "fid"): {"MC-G": 39.8, "P-VAE": 59.1},
    ("cifar16", "ssim"): {"DS-C": 0.809, "P-VAE": 0.679},
    ("celeba64", "fid"): {"DS-G": 83.6, "P-VAE": 87.8},
}

TABLE = Table(
    name="main",
    title="Reconstruction and generation",
    variants=tuple(VARIANTS),
    data=("mnist", "fashion_mnist", "cifar16", "celeba64"),
    metrics=(*IMAGES, *UNITS, "elbo", "underdispersed_active_units", "underdispersed_units", "overdispersion"),
    shown=("mse", "ssim", "rfid", "fid", "kid", "fid_c", "elbo", "kl", "fano"),
    paper={(*where, label): value for where, values in PAPER.items() for label, value in values.items()},
    compare={
        # of the paper: negative binomial and Poisson; relaxations and KL forms; counts and continuous latents
        **{("MC-G", other): DISTANCES for other in ("P-VAE", "MC-C", "DS-G", "DS-C", "G-VAE", "L-VAE")},
        ("DS-G", "P-VAE"): DISTANCES,
        **{("MC-C", other): ("mse",) for other in ("MC-G", "DS-G", "G-VAE", "L-VAE")},
        **{("DS-C", other): ("mse",) for other in ("MC-G", "DS-G")},
        # ours: dispersion, gradient, prior, posterior
        **{("EX-C", "DS-C"): ("elbo",), ("EX-I", "DS-I"): ("elbo",), ("EX-I", "EX-C"): ("elbo", "mse")},
        **{("P-NB", "P-VAE"): ("elbo", "fid_c"), ("P-NB", "EX-I"): ("elbo",)},
        **{("CMP", other): CLAIMED for other in ("P-NB", "EX-I", "EX-C", "MC-G", "P-VAE", "G-VAE", "L-VAE")},
        **{(one, "GS-VAE"): CLAIMED for one in ("CMP", "P-NB", "G-VAE")},
    },
)
register_table(TABLE)

if __name__ == "__main__":
    run_script(TABLE)
