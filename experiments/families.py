"""Latent families at the same number of latents and the same beta, for small and large numbers of latents."""

from pyro_nbvae.experiments import IMAGES, UNITS
from pyro_nbvae.study.report import run_script
from pyro_nbvae.study.tables import Table, register_table
from pyro_nbvae.study.tree import options

TABLE = Table(
    name="families",
    title="Latent families by number of latents, at the beta of 256 latents",
    variants=("EX-C", "P-VAE", "G-VAE", "L-VAE", "C-VAE"),
    data=("mnist",),
    metrics=(*IMAGES, *UNITS, "elbo", "squared_error"),
    varied=lambda base: {f"{size} latents": {"latents": size, "beta": options(base)["beta"]} for size in (16, 64, 256)},
)
register_table(TABLE)

if __name__ == "__main__":
    run_script(TABLE)
