"""Latent families at the same number of latents and the same beta, for small and large numbers of latents."""

from pyro_nbvae.study.commandline import script
from pyro_nbvae.study.config import TrainConfig
from pyro_nbvae.study.grid import Table
from pyro_nbvae.study.report import command_of


def _sizes(base: TrainConfig) -> dict[str, dict[str, object]]:
    return {f"{size} latents": {"latents": size, "beta": base.beta} for size in (16, 64, 256)}


TABLE = Table(
    name="families",
    title="Latent families by number of latents, at the beta of 256 latents",
    variants=("EX-C", "P-VAE", "G-VAE", "L-VAE", "C-VAE"),
    data=("mnist",),
    metrics=(
        "mse",
        "ssim",
        "fid_c",
        "kid_c",
        "fid",
        "kid",
        "elbo",
        "squared_error",
        "kl",
        "collapsed_units",
        "dead_units",
        "fano",
    ),
    varied=_sizes,
)

if __name__ == "__main__":
    script(command_of(TABLE))
