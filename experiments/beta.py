"""Rate-distortion trade-off: the effect of beta, the weight of the KL, on each variant."""

from pyro_nbvae.study.claims import Ahead, BelowCurve, Claim
from pyro_nbvae.study.commandline import script
from pyro_nbvae.study.config import TrainConfig
from pyro_nbvae.study.grid import Table
from pyro_nbvae.study.report import command_of

VARIANTS = ("CMP", "EX-C", "P-VAE", "G-VAE", "GS-VAE")
FACTORS = (0.2, 0.4, 0.6, 1.0, 2.0)


def _betas(base: TrainConfig) -> dict[str, dict[str, object]]:
    assert base.beta is not None
    return {f"β {factor}": {"beta": factor * base.beta} for factor in FACTORS}


TABLE = Table(
    name="beta",
    title="Reconstruction and generation over beta, in multiples of the equivalent of beta = 1 in the paper",
    variants=VARIANTS,
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
    varied=_betas,
    claims=(
        Claim(
            "A β of 0.2 or 0.4 reconstructs better than 1.",
            [Ahead("mse", (f"{name} β 0.2", f"{name} β 0.4"), (f"{name} β 1.0",), ("mnist",)) for name in VARIANTS],
            "paper",
        ),
        Claim(
            "A β of 1 generates better than 0.2 or 0.4.",
            [Ahead("fid_c", (f"{name} β 1.0",), (f"{name} β 0.2", f"{name} β 0.4"), ("mnist",)) for name in VARIANTS],
            "paper",
        ),
        Claim(
            "At equal β CMP has a smaller squared error and a larger ELBO than P-VAE.",
            [
                Ahead(metric, (f"CMP β {factor}",), (f"P-VAE β {factor}",), ("mnist",))
                for factor in FACTORS
                for metric in ("mse", "elbo")
            ],
        ),
        *(
            Claim(
                f"At equal KL, CMP has a smaller squared error than {other}.",
                [
                    BelowCurve(
                        tuple(f"CMP β {factor}" for factor in FACTORS),
                        tuple(f"{other} β {factor}" for factor in FACTORS),
                        "mnist",
                    )
                ],
            )
            for other in VARIANTS
            if other != "CMP"
        ),
    ),
)

if __name__ == "__main__":
    script(command_of(TABLE))
