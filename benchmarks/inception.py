"""Inception's features: ours, also in bfloat16, beside torch-fidelity's network as it is, and the FID of each.

python -m benchmarks.inception [--images 2000] [--weights FILE]    needs torch-fidelity's weights; minutes on two cores
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import tyro
from torch import Tensor

from benchmarks.measure import device, report, seconds
from pyro_nbvae.metrics.features import Features, InceptionFeatures
from pyro_nbvae.study.data import data_root, load
from pyro_nbvae.study.features import INCEPTION, distances


class Theirs(Features):
    """torch-fidelity's network as it is."""

    num_features, suffix, network, digest = 2048, "", "torch-fidelity", "as it is"

    def __init__(self, weights: Path) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.inner = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images.expand(-1, 3, -1, -1))[0]


def main(images: int = 2000, data: str = "mnist", weights: str | None = None) -> None:
    """Time all, and compare the FID of the first training images against held-out ones.

    Args:
        images: of each kind, for the FID; 0 leaves it out.
        data: whose.
        weights: torch-fidelity's file. Default: the data root's.
    """
    file = Path(weights) if weights else data_root() / INCEPTION
    loaded = load(data)
    networks = {
        "torch-fidelity": Theirs(file),
        "inception": InceptionFeatures(file),
        "inception_bfloat16": InceptionFeatures(file, torch.bfloat16),
    }
    batch = loaded.train[:64].to(device())
    with torch.inference_mode():
        for network in networks.values():
            network.eval().to(device())
        taken = seconds({name: partial(network, batch) for name, network in networks.items()}, 5, 1)
        rows = []
        for name, network in networks.items():
            row = {
                "network": name,
                "ms an image": round(1e3 * taken[name] / len(batch), 1),
                "torch-fidelity's / this": round(taken["torch-fidelity"] / taken[name], 2),
            }
            if images:
                found = distances(network, loaded.train[:images], loaded.test[:images], progress=True)
                row["FID"] = f"{found['fid']:.5f}"
            rows.append(row)
    report("inception", rows, f"Inception's features of {data}, batches of {len(batch)}; FID of {images} images")


if __name__ == "__main__":
    tyro.cli(main)
