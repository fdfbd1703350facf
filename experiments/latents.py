"""What latents tell about labels: classification from few, shattering dimension, few-shot, for the ten variants.

--representation says of what: the encoder's outputs as in the paper, the posterior's means, or integer counts.
"""

from tyro.conf import OmitArgPrefixes

from pyro_nbvae.commandline import script
from pyro_nbvae.metrics.latents import LABELLED, SHOTS, Representation
from pyro_nbvae.tables.claims import Ahead, Claim, Reaches
from pyro_nbvae.tables.config import Reproduction
from pyro_nbvae.tables.grid import Table
from pyro_nbvae.tables.report import reproduce
from pyro_nbvae.variants import VARIANTS

# The paper's accuracies on MNIST: from 200 labels, over all splits of the ten digits in two, from 20 a class.
PAPER = {"svm_200": 0.811, "shattering": 0.898, "few_shot_20": 0.865}


def table(representation: Representation) -> Table:
    """The table of one representation."""
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
                "The negative binomial's latents tell more about the digit than those of the Poisson and the Laplace.",
                [Ahead(f"{prefix}{name}", ("MC-C",), ("P-VAE", "L-VAE"), ("mnist",)) for name in PAPER],
                "paper",
            ),
            Claim(
                "Accuracies from few labels: .811 from 200, .898 in shattering, .865 from 20 a class.",
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
    """Run what is missing of the table of the latents, and print and write the table.

    Args:
        representation: encoder (its outputs, as in the paper), means (of the posterior) or counts (integers).
    """
    print(reproduce(table(representation), options))


if __name__ == "__main__":
    script(main)
