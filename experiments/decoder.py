"""Linear, MLP and convolutional decoders, at the same beta and at the effective beta of each in the paper's code.

The paper's loss sums squared errors over the image width for a convolutional decoder, and over all pixels for the
others. On MNIST beta = 1 is therefore effectively 28 times smaller for the others, which alone improves their
reconstruction (docs/mathematics.md, section 1.3).
"""

from pyro_nbvae.study.claims import Ahead, Claim
from pyro_nbvae.study.commandline import script
from pyro_nbvae.study.config import TrainConfig
from pyro_nbvae.study.grid import Table
from pyro_nbvae.study.report import command_of


def _decoders(base: TrainConfig) -> dict[str, dict[str, object]]:
    others = ("mlp", "linear")
    return {
        "conv": {},
        **{decoder: {"decoder": f"released_{decoder}", "beta": base.beta} for decoder in others},
        **{f"{decoder}, the paper's β": {"decoder": f"released_{decoder}"} for decoder in others},
    }


TABLE = Table(
    name="decoder",
    title="Decoders at the same beta, and at the paper's",
    variants=("EX-C", "DS-C"),
    data=("mnist",),
    metrics=(
        "mse",
        "ssim",
        "fid_c",
        "kid_c",
        "fid",
        "kid",
        "squared_error",
        "kl",
        "beta",
        "collapsed_units",
        "dead_units",
        "fano",
    ),
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
            "At the same β the conv decoder reconstructs better than the MLP: the paper's order is due to its loss.",
            [
                Ahead("mse", (f"{name} conv",), (f"{name} mlp", f"{name} linear"), ("mnist",))
                for name in ("EX-C", "DS-C")
            ],
        ),
    ),
)

if __name__ == "__main__":
    script(command_of(TABLE))
