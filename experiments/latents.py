"""Classification from the latents of all variants: few labels, shattering dimension, and few-shot.

There is a table for each representation: the outputs of the encoder, as in the paper; posterior means (latents-means);
and integer counts (latents-counts).
"""

from typing import get_args

from pyro_nbvae.metrics.latents import LABELLED, SHOTS, Representation
from pyro_nbvae.study.report import run_script
from pyro_nbvae.study.tables import Table, register_table
from pyro_nbvae.study.variants import VARIANTS

# Accuracies on MNIST in the paper: with 200 labels, over all balanced splits of the digits, with 20 labels per class.
PAPER = {"svm_200": 0.811, "shattering": 0.898, "few_shot_20": 0.865}
CLASSIFIERS = [f"{name}_{number}" for name in ("knn", "logistic", "svm") for number in LABELLED]


def table(representation: Representation) -> Table:
    """Return the table for one representation."""
    prefix = "" if representation == "encoder" else f"{representation}_"
    names = (*CLASSIFIERS, "shattering", *(f"few_shot_{number}" for number in SHOTS))
    return Table(
        name="latents" if representation == "encoder" else f"latents-{representation}",
        title=f"Accuracy of classifiers on latents ({representation})",
        variants=tuple(VARIANTS),
        data=("mnist",),
        metrics=tuple(f"{prefix}{name}" for name in names),
        shown=tuple(f"{prefix}{name}" for name in ("knn_200", "logistic_200", *PAPER)),
        paper={} if prefix else {("mnist", name, "MC-C"): value for name, value in PAPER.items()},
        compare={("MC-C", other): tuple(f"{prefix}{name}" for name in PAPER) for other in ("P-VAE", "L-VAE", "CMP")},
    )


TABLE, *_ = (register_table(table(representation)) for representation in get_args(Representation))

if __name__ == "__main__":
    run_script(TABLE)
