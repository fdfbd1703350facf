"""What latents tell about labels: classification from few, shattering dimension, few-shot, for the ten variants.

--representation says of what: the encoder's outputs as in the paper, the posterior's means, or integer counts.
"""

from functools import partial

from tyro.conf import OmitArgPrefixes

from pyro_nbvae.cli import script
from pyro_nbvae.config import Reproduction
from pyro_nbvae.data import load
from pyro_nbvae.metrics.latents import LABELLED, SHOTS, Representation, latent_classification
from pyro_nbvae.reproduction import Table, reproduce
from pyro_nbvae.runs import Run
from pyro_nbvae.variants import VARIANTS


def classify(run: Run, fellows: list[Run], device: str, *, representation: Representation) -> dict[str, float]:
    """The figures of one run."""
    config, model, guide = run.load(device)
    return latent_classification(model, guide, load(config.data, config.data_root), representation)


def table(representation: Representation) -> Table:
    """The table of one representation."""
    return Table(
        name="latents" if representation == "encoder" else f"latents-{representation}",
        title=f"Accuracy of classifiers on latents ({representation})",
        variants=tuple(VARIANTS),
        data=("mnist",),
        metrics=(
            *(f"{name}_{number}" for name in ("knn", "logistic", "svm") for number in LABELLED),
            "shattering",
            *(f"few_shot_{number}" for number in SHOTS),
        ),
        measure=partial(classify, representation=representation),
        command=f"python experiments/latents.py --representation {representation}",
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
