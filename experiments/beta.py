"""The rate-distortion trade-off: what beta, the squared error that a nat of KL is worth, does to each variant."""

from pyro_nbvae.commandline import script
from pyro_nbvae.runs.config import TrainConfig
from pyro_nbvae.tables.grid import Table
from pyro_nbvae.tables.report import command_of


def _betas(base: TrainConfig) -> dict[str, dict[str, object]]:
    assert base.beta is not None
    return {f"β {factor}": {"beta": factor * base.beta} for factor in (0.2, 0.4, 0.6, 0.8, 1.0)}


TABLE = Table(
    name="beta",
    title="Reconstruction and generation over beta, in multiples of what the paper's beta of 1 amounts to",
    variants=("EX-C", "DS-C", "P-VAE", "G-VAE"),
    data=("mnist",),
    metrics=("mse", "ssim", "fid_c", "kid_c", "fid", "kid", "squared_error", "kl", "dead_units", "fano"),
    varied=_betas,
    reading="""
As in the paper, small β reconstructs best and β near 1 generates best, for every family. At the same β the negative
binomial has the smaller squared error and the smaller KL of the two spiking families.
""",
)

if __name__ == "__main__":
    script(command_of(TABLE))
