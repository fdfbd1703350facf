"""What latents tell about labels: classification from few, shattering dimension, few-shot, for the ten variants.

--representation says of what: the encoder's outputs as in the paper, the posterior's means, or integer counts.
"""

from tyro.conf import OmitArgPrefixes

from pyro_nbvae.commandline import script
from pyro_nbvae.metrics.latents import LABELLED, SHOTS, Representation
from pyro_nbvae.tables.config import Reproduction
from pyro_nbvae.tables.grid import Table
from pyro_nbvae.tables.report import reproduce
from pyro_nbvae.variants import VARIANTS


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
