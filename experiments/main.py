"""The main table: reconstruction and generation of every variant on the four image sets."""

from pyro_nbvae.commandline import script
from pyro_nbvae.tables.grid import Table
from pyro_nbvae.tables.report import command_of
from pyro_nbvae.variants import VARIANTS

TABLE = Table(
    name="main",
    title="Reconstruction and generation",
    variants=tuple(VARIANTS),
    data=("mnist", "fashion_mnist", "cifar16", "celeba64"),
    metrics=(
        "mse",
        "ssim",
        "fid_c",
        "kid_c",
        "fid",
        "fid_paper",
        "kid",
        "elbo",
        "kl",
        "dead_units",
        "fano",
        "overdispersion",
    ),
    paper={
        ("mnist", "MC-G"): 78.4,
        ("mnist", "P-VAE"): 104.1,
        ("fashion_mnist", "MC-G"): 125.9,
        ("fashion_mnist", "P-VAE"): 146.0,
        ("cifar16", "MC-G"): 39.8,
        ("cifar16", "P-VAE"): 59.1,
        ("celeba64", "DS-G"): 83.6,
        ("celeba64", "P-VAE"): 87.8,
    },
)

if __name__ == "__main__":
    script(command_of(TABLE))
