"""Decoders: linear, MLP and convolutional, at one beta and at the beta that the paper's code gives each.

The paper's loss sums squared errors over the image's width with a convolutional decoder and over all pixels with the
others, so that its beta of 1 is 28 times smaller for them on MNIST: they reconstruct better for that reason alone.
"""

from pyro_nbvae.commandline import script
from pyro_nbvae.runs.config import TrainConfig
from pyro_nbvae.tables.claims import Ahead, Claim
from pyro_nbvae.tables.grid import Table
from pyro_nbvae.tables.report import command_of


def _decoders(base: TrainConfig) -> dict[str, dict[str, object]]:
    others = ("mlp", "linear")
    return {
        "conv": {},
        **{decoder: {"decoder": decoder, "beta": base.beta} for decoder in others},
        **{f"{decoder}, the paper's β": {"decoder": decoder} for decoder in others},
    }


TABLE = Table(
    name="decoder",
    title="Decoders at the same beta, and at the paper's",
    variants=("EX-C", "DS-C"),
    data=("mnist",),
    metrics=("mse", "ssim", "fid_c", "kid_c", "fid", "kid", "squared_error", "kl", "beta", "dead_units", "fano"),
    varied=_decoders,
    claims=(
        Claim(
            "The MLP decoder reconstructs best (at the β that the paper's loss gives each decoder).",
            [
                Ahead(metric, ("EX-C mlp, the paper's β",), ("EX-C conv", "EX-C linear, the paper's β"), ("mnist",))
                for metric in ("mse", "ssim")
            ],
            "paper",
        ),
        Claim(
            "The convolutional decoder generates best.",
            [
                Ahead("fid_c", ("EX-C conv",), ("EX-C mlp, the paper's β", "EX-C linear, the paper's β"), ("mnist",)),
            ],
            "paper",
        ),
        Claim(
            "At one β the convolutional decoder reconstructs better than the MLP: the paper's order is its loss's.",
            [
                Ahead("mse", (f"{name} conv",), (f"{name} mlp", f"{name} linear"), ("mnist",))
                for name in ("EX-C", "DS-C")
            ],
        ),
    ),
)

if __name__ == "__main__":
    script(command_of(TABLE))
