"""Colour images as our tables had them before: CIFAR16 as averages of blocks, and four times the released beta.

Until 2026-11-30 ``cifar16`` was the mean of squares of 2x2 pixels, and beta did not allow for colours in [-1, 1].
"""

from typing import Any

from pyro_nbvae.experiments import IMAGES, UNITS, main, precision, relaxation
from pyro_nbvae.experiments.priors import JOINT
from pyro_nbvae.study.report import run_script
from pyro_nbvae.study.tables import Table, register_table
from pyro_nbvae.study.tree import options
from pyro_nbvae.study.variants import VARIANTS


def _before(base: Any) -> dict[str, dict[str, Any]]:
    beta, latents, clip = (options(base)[name] for name in ("beta", "latents", "clip"))
    before: dict[str, Any] = {"beta": 4 * beta}
    if clip == beta * latents:  # the unit of the released loss
        before["clip"] = 4 * clip
    others: dict[str, dict[str, Any]] = {"": {}}
    if base.variant in ("CMP", "GS-VAE"):
        others |= {kind: {"prior": kind} for kind in JOINT}
    if base.variant in precision.VARIANTS and not base.training.mixed_precision:
        others["bfloat16"] = {"mixed_precision": True}
    if base.variant in relaxation.ARRIVALS and base.relaxation.temperature_start != 1:
        others["annealed from 1"] = {"temperature_start": 1.0}
    return {name: {**before, **changes} for name, changes in others.items()}


DATA = {"cifar16": "cifar16-blocks", "celeba64": "celeba64"}
TABLE = Table(
    name="blocks",
    title="Colour images with block averages and four times the released beta",
    variants=tuple(VARIANTS),
    data=tuple(DATA.values()),
    metrics=(*IMAGES, *UNITS, "elbo"),
    shown=main.TABLE.shown,
    paper={(DATA[data], of, label): v for (data, of, label), v in main.TABLE.paper.items() if data in DATA},
    varied=_before,
)
register_table(TABLE)

if __name__ == "__main__":
    run_script(TABLE)
