"""Classification from the latents of all variants: few labels, shattering dimension, and few-shot.

--representation selects the features: the encoder's outputs as in the paper, the posterior means, or integer counts.
"""

from tyro.conf import OmitArgPrefixes

from pyro_nbvae.metrics.latents import LABELLED, SHOTS, Representation
from pyro_nbvae.study.claims import Ahead, Claim, Reaches
from pyro_nbvae.study.commandline import script
from pyro_nbvae.study.grid import Table
from pyro_nbvae.study.report import reproduce
from pyro_nbvae.study.scales import Reproduction
from pyro_nbvae.study.variants import VARIANTS

# Accuracies on MNIST in the paper: with 200 labels, over all balanced splits of the digits, with 20 labels per class.
PAPER = {"svm_200": 0.811, "shattering": 0.898, "few_shot_20": 0.865}


def table(representation: Representation) -> Table:
    """Return the table for one representation."""
    prefix = "" if representation == "encoder" else f"{representation}_"
    names = [
        *(f"{name}_{number}" for name in ("knn", "logistic", "svm") for number in LABELLED),
        "shattering",
        *(f"few_shot_{number}" for number in SHOTS),
    ]
    return Table(
        name="latents" if representation == "encoder" else f"latents-{representation}",
        title=f"Accuracy of classifiers on latents ({representation})",
        variants=tuple(VARIANTS),
        data=("mnist",),
        metrics=tuple(f"{prefix}{name}" for name in names),
        claims=[
            Claim(
                "Negative binomial latents classify digits better than Poisson and Laplace latents.",
                [Ahead(f"{prefix}{name}", ("MC-C",), ("P-VAE", "L-VAE"), ("mnist",)) for name in PAPER],
                "paper",
            ),
            Claim(
                "Accuracies with few labels: .811 with 200, .898 in shattering, .865 with 20 per class.",
                [Reaches(f"{prefix}{name}", "MC-C", "mnist", figure) for name, figure in PAPER.items()],
                "paper",
            ),
            Claim(
                "CMP's latents reach the same accuracies.",
                [Reaches(f"{prefix}{name}", "CMP", "mnist", figure) for name, figure in PAPER.items()],
            ),
        ],
        command=f"python -m experiments.latents --representation {representation}",
    )


TABLE = table("encoder")


def main(options: OmitArgPrefixes[Reproduction], representation: Representation = "encoder") -> None:
    """Run the missing cells of the table of latents, then print and write the table.

    Args:
        representation: encoder (encoder outputs, as in the paper), means (posterior means) or counts (integers).
    """
    print(reproduce(table(representation), options))


if __name__ == "__main__":
    script(main)
