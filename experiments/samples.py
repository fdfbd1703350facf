"""Images that the default variant generates on the four data sets, in one picture: python -m experiments.samples

Two rows for each data set: training images, and images generated from the prior (integer counts), as they come. Its
runs are those of the table ``main``.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_nbvae.batching import to_floats
from pyro_nbvae.errors import InputError
from pyro_nbvae.experiments import main as of_main
from pyro_nbvae.study import generation
from pyro_nbvae.study.commandline import script
from pyro_nbvae.study.data import load
from pyro_nbvae.study.plots import plot_images
from pyro_nbvae.study.scales import Reproduction, ScaleName
from pyro_nbvae.study.tables import cells
from pyro_nbvae.study.variants import DEFAULT

NUMBER, SIZE = 16, 64


def enlarged(images: Tensor) -> Tensor:
    """Return images (N, C, H, W) as colour images of 64 x 64 pixels: pixels are repeated, and the rest is black."""
    factor = SIZE // images.shape[-1]
    images = to_floats(images).repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    left, top = ((SIZE - side) // 2 for side in (images.shape[-1], images.shape[-2]))
    whole = pad(images, (left, SIZE - left - images.shape[-1], top, SIZE - top - images.shape[-2]))
    return whole.expand(-1, 3, -1, -1)


def main(
    scale: ScaleName = "small", out: str = "runs/reproduce", path: Path = Path("docs/samples.png"), seed: int = 0
) -> None:
    """Plot training images and generated images of each data set.

    Args:
        scale: scale of the runs, as in nbvae reproduce.
        out: folder of the run folders, as in nbvae reproduce.
        path: the picture.
        seed: seed of the runs and of the samples.
    """
    rows: dict[str, Tensor] = {}
    for cell in cells(of_main.TABLE, Reproduction(scale=scale, variants=(DEFAULT,), seeds=(seed,), out=out)):
        if not (cell.folder / "metrics.json").exists():
            raise InputError(f"no run in {cell.folder}: nbvae reproduce main --scale {scale} --variants {DEFAULT}")
        name = cell.config.data
        rows[name] = enlarged(load(name).train[:NUMBER])
        rows[f"{name},\ngenerated"] = enlarged(generation.prior_samples(*cell.run.load()[1:], NUMBER, seed=seed))
    title = f"{DEFAULT}, scale {scale}, seed {seed}: training images, and images generated from its prior"
    plot_images(torch.cat([*rows.values()]), path, title=title, columns=NUMBER, rows=[*rows])
    print(path)


if __name__ == "__main__":
    script(main)
