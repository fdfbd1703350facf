"""The main table: reconstruction and generation of every variant on four image data sets."""

from pyro_nbvae.study.claims import Ahead, Claim
from pyro_nbvae.study.commandline import script
from pyro_nbvae.study.evaluation import METRICS
from pyro_nbvae.study.grid import Table
from pyro_nbvae.study.report import command_of
from pyro_nbvae.study.variants import VARIANTS

SETS = ("mnist", "fashion_mnist", "cifar16", "celeba64")
COUNTS = ("P-NB", "EX-I", "EX-C", "MC-G", "P-VAE")
CONTINUOUS = ("G-VAE", "L-VAE")
CLAIMED = ("elbo", "mse", "fid_c")


def _of_the_paper(distance: str) -> list[Claim]:
    heading = METRICS[distance].heading
    return [
        Claim(
            f"The negative binomial generates better than the Poisson on every data set, in {heading}.",
            [
                Ahead(distance, ("MC-G",), ("P-VAE",), ("mnist", "fashion_mnist", "cifar16")),
                Ahead(distance, ("DS-G",), ("P-VAE",), ("celeba64",)),
            ],
            "paper",
        ),
        Claim(
            f"MC-G generates best of the paper's four, in {heading}.",
            [Ahead(distance, ("MC-G",), ("MC-C", "DS-G", "DS-C"), ("mnist", "fashion_mnist", "cifar16"))],
            "paper",
        ),
        Claim(
            f"Continuous latents generate worse than MC-G, in {heading}.",
            [Ahead(distance, ("MC-G",), CONTINUOUS, SETS)],
            "paper",
        ),
    ]


CLAIMS = (
    *_of_the_paper("fid"),
    *_of_the_paper("fid_c"),
    Claim(
        "MC-C and DS-C reconstruct better than MC-G and DS-G.",
        [Ahead("mse", ("MC-C", "DS-C"), ("MC-G", "DS-G"), ("mnist", "fashion_mnist", "cifar16"))],
        "paper",
    ),
    Claim(
        "Continuous latents reconstruct worse than MC-C.",
        [Ahead("mse", ("MC-C",), CONTINUOUS, ("mnist", "fashion_mnist", "cifar16"))],
        "paper",
    ),
    Claim(
        "A dispersion for each observation (EX) trains better than one shared with the prior (DS).",
        [Ahead("elbo", ("EX-C",), ("DS-C",), SETS), Ahead("elbo", ("EX-I",), ("DS-I",), SETS)],
    ),
    Claim(
        "The integer gradient trains better than arrival times.",
        [Ahead("elbo", ("EX-I",), ("EX-C",), SETS), Ahead("mse", ("EX-I",), ("EX-C",), SETS)],
    ),
    Claim(
        "P-NB, with a negative binomial prior, is better than P-VAE, with a Poisson prior.",
        [Ahead("elbo", ("P-NB",), ("P-VAE",), SETS), Ahead("fid_c", ("P-NB",), ("P-VAE",), SETS)],
    ),
    Claim(
        "P-NB, with a Poisson posterior, is better than EX-I, with a negative binomial one.",
        [Ahead("elbo", ("P-NB",), ("EX-I",), SETS)],
    ),
    Claim(
        f"CMP is better than {', '.join(COUNTS[:-1])} and {COUNTS[-1]} in ELBO, MSE and FID-c.",
        [Ahead(metric, ("CMP",), COUNTS, SETS) for metric in CLAIMED],
    ),
    *(
        Claim(
            f"CMP is better than {' and '.join(CONTINUOUS)}, whose priors are fixed, in {METRICS[metric].heading}.",
            [Ahead(metric, ("CMP",), CONTINUOUS, SETS)],
        )
        for metric in CLAIMED
    ),
    Claim(
        "GS-VAE, with a learned scale of each latent, is better than G-VAE, whose prior is fixed.",
        [Ahead(metric, ("GS-VAE",), ("G-VAE",), SETS) for metric in CLAIMED],
    ),
    *(
        Claim(
            f"{name} is better than GS-VAE in {METRICS[metric].heading}.", [Ahead(metric, (name,), ("GS-VAE",), SETS)]
        )
        for name in ("CMP", "P-NB")
        for metric in CLAIMED
    ),
)

TABLE = Table(
    name="main",
    title="Reconstruction and generation",
    variants=tuple(VARIANTS),
    data=SETS,
    metrics=(
        "mse",
        "ssim",
        "fid_c",
        "kid_c",
        "fid",
        "kid",
        "elbo",
        "kl",
        "collapsed_units",
        "dead_units",
        "fano",
        "underdispersed_active_units",
        "underdispersed_units",
        "overdispersion",
    ),
    claims=CLAIMS,
    paper={
        ("mnist", "fid", "MC-G"): 78.4,
        ("mnist", "fid", "P-VAE"): 104.1,
        ("mnist", "mse", "MC-C"): 0.0123,
        ("mnist", "mse", "P-VAE"): 0.0125,
        ("fashion_mnist", "fid", "MC-G"): 125.9,
        ("fashion_mnist", "fid", "P-VAE"): 146.0,
        ("cifar16", "fid", "MC-G"): 39.8,
        ("cifar16", "fid", "P-VAE"): 59.1,
        ("cifar16", "ssim", "DS-C"): 0.809,
        ("cifar16", "ssim", "P-VAE"): 0.679,
        ("celeba64", "fid", "DS-G"): 83.6,
        ("celeba64", "fid", "P-VAE"): 87.8,
    },
)

if __name__ == "__main__":
    script(command_of(TABLE))
