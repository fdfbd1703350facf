"""Check that FID-c and KID-c increase for held-out images with more and more blur or noise, and for an untrained model.

python -m experiments.distance_checks --data mnist fashion_mnist cifar16-blocks celeba64    a few minutes on two cores

The table is written to ``results/distance_checks.md``.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_nbvae.batching import to_bytes, to_floats
from pyro_nbvae.study.build import build, resolve
from pyro_nbvae.study.commandline import script
from pyro_nbvae.study.config import configure
from pyro_nbvae.study.data import Data, load
from pyro_nbvae.study.evaluation import METRICS
from pyro_nbvae.study.features import build_features, distances
from pyro_nbvae.study.generation import prior_samples
from pyro_nbvae.study.provenance import write_page


def spoilt(images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield uint8 images: unchanged, blurred (sigma in pixels), and with noise (deviation for values in [0, 1])."""
    from torchvision.transforms.functional import gaussian_blur

    yield "unchanged", images
    for sigma in (0.5, 1.0, 2.0):
        yield f"blurred by {sigma} pixels", gaussian_blur(images, [13, 13], [sigma, sigma])
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for deviation in (0.05, 0.1, 0.2):
        yield f"noise of {deviation}", to_bytes((to_floats(images) + deviation * noise).clamp(0, 1))


def untrained(data: Data) -> Tensor:
    """Return samples from the prior of an untrained model of default configuration, as many as held-out images."""
    torch.manual_seed(0)
    config = resolve(configure(data=data.name, preset="published"), data.event_shape)
    return prior_samples(*build(config, data.event_shape)[:2], len(data.test))


def main(
    data: tuple[str, ...] = ("digits",), features: str = "classifier", out: Path = Path("results/distance_checks.md")
) -> None:
    """Compute FID and KID between the training images and other images.

    Args:
        data: names of the data sets.
        features: classifier or inception.
        out: path of the table.
    """
    rows: dict[str, dict[str, str]] = {}
    for name in data:
        images = load(name)
        network = build_features(features, name)
        others = [*spoilt(images.test), ("an untrained model's samples", untrained(images))]
        for what, x in tqdm(others, desc=name):
            found = distances(network, images.train, x)
            row = rows.setdefault(what, {"images": what})
            for metric in (f"fid{network.suffix}", f"kid{network.suffix}"):
                row[f"{name} {METRICS[metric].heading}"] = f"{found[metric]:.3f}"
    command = f"python -m experiments.distance_checks --data {' '.join(data)} --features {features}"
    caption = "Distance to the training images of held-out images (unchanged, degraded) and of an untrained model."
    print(write_page(out, list(rows.values()), caption, command))


if __name__ == "__main__":
    script(main)
