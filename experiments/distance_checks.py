"""Do FID-c and KID-c rank what they should? Held-out images, spoilt more and more, and an untrained model's samples.

python -m experiments.distance_checks --data mnist fashion_mnist cifar16 celeba64    a few minutes on two cores

The table is written to ``results/distance_checks.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tqdm.auto import tqdm

from pyro_nbvae.data import Data, load, to_bytes, to_floats
from pyro_nbvae.metrics import build_features, distances
from pyro_nbvae.runs.build import build, resolve
from pyro_nbvae.runs.config import TrainConfig
from pyro_nbvae.runs.generation import prior_samples
from pyro_nbvae.tables.formats import write_page


def spoilt(images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """uint8 images as they are, blurred (sigma in pixels) and noised (deviation on [0, 1])."""
    from torchvision.transforms.functional import gaussian_blur

    yield "as they are", images
    for sigma in (0.5, 1.0, 2.0):
        yield f"blurred by {sigma} pixels", gaussian_blur(images, [13, 13], [sigma, sigma])
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for deviation in (0.05, 0.1, 0.2):
        yield f"noise of {deviation}", to_bytes((to_floats(images) + deviation * noise).clamp(0, 1))


def untrained(data: Data) -> Tensor:
    """As many prior samples of an EX-C that was never trained as there are held-out images."""
    torch.manual_seed(0)
    model, guide, _ = build(resolve(TrainConfig(data=data.name), data.event_shape), data.event_shape)
    return prior_samples(model, guide, len(data.test))


def main(
    data: tuple[str, ...] = ("digits",), features: str = "classifier", out: Path = Path("results/distance_checks.md")
) -> None:
    """FID and KID between the training images and others.

    Args:
        data: which sets.
        features: classifier or inception.
        out: the file of the table.
    """
    rows: dict[str, dict[str, str]] = {}
    for name in data:
        images = load(name)
        network = build_features(features, name)
        others = [*spoilt(images.test), ("an untrained model's samples", untrained(images))]
        found = {what: distances(network, images.train, x) for what, x in tqdm(others, desc=name)}
        for what, figures in found.items():
            row = rows.setdefault(what, {"images": what})
            for metric in ("fid", "kid"):
                heading = f"{name} {metric.upper()}{network.suffix.replace('_', '-')}"
                row[heading] = f"{figures[metric + network.suffix]:.3f}"
    command = f"python -m experiments.distance_checks --data {' '.join(data)} --features {features}"
    caption = "Distance from training images: of held-out images, as they are and spoilt, and of an untrained model."
    print(write_page(out, list(rows.values()), caption, command))


if __name__ == "__main__":
    tyro.cli(main)
