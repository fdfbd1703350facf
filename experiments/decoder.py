"""Linear, MLP and convolutional decoders, at the same beta and at the effective beta of each in the paper's code.

The released loss sums squared errors over the image width for a convolutional decoder, and over all pixels for the
others. On MNIST beta = 1 is therefore effectively 28 times smaller for the others (docs/mathematics.md, section 1.3).
"""

from pyro_nbvae.experiments import IMAGES, UNITS
from pyro_nbvae.study.report import run_script
from pyro_nbvae.study.tables import Table, register_table
from pyro_nbvae.study.tree import options

VARIANTS, OTHERS = ("EX-C", "DS-C", "MC-C", "P-VAE"), ("mlp", "linear")

TABLE = Table(
    name="decoder",
    title="Decoders at the same beta, and at the paper's",
    variants=VARIANTS,
    data=("mnist", "cifar16"),
    metrics=(*IMAGES, *UNITS, "squared_error", "beta"),
    varied=lambda base: {
        "conv": {},
        **{name: {"decoder": f"released_{name}", "beta": options(base)["beta"]} for name in OTHERS},
        **{f"{name}, the paper's β": {"decoder": f"released_{name}"} for name in OTHERS},
    },
    compare={
        (f"{one} conv", f"{one} {other}{beta}"): ("mse", "ssim", "fid_c")
        for one in VARIANTS
        for other in OTHERS
        for beta in ("", ", the paper's β")
    },
)
register_table(TABLE)

if __name__ == "__main__":
    run_script(TABLE)
