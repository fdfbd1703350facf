"""Small image classifiers, whose features are fast on a CPU and need no download.

Their weights are part of the package, one safetensors file per classifier. Each file records the test accuracy.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("weights")


class _Block(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class _Residual(_Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ImageClassifier(nn.Module):
    """Residual network of six 3x3 convolutions; its last 128 features are averaged over the image.

    It maps images (B, C, H, W) in [0, 1] to logits (B, classes). Images with a side above 16 are pooled once more.

    Args:
        image_shape: (C, H, W).
        classes: number of labels.
    """

    num_features = 128

    def __init__(self, image_shape: tuple[int, int, int], classes: int = 10) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.body = nn.Sequential(
            # standardises the pixels
            nn.BatchNorm2d(image_shape[0], affine=False),
            _Block(image_shape[0], 32),
            nn.MaxPool2d(2) if max(image_shape[1:]) > 16 else nn.Identity(),
            _Block(32, 64),
            _Residual(64, 64),
            nn.MaxPool2d(2),
            _Block(64, 128),
            _Residual(128, 128),
            nn.MaxPool2d(2),
            _Residual(128, 128),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ).to(memory_format=torch.channels_last)
        self.head = nn.Linear(self.num_features, classes)

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [0, 1] to features (B, 128)."""
        return self.body(x.contiguous(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def save(self, file: BinaryIO, facts: dict[str, str]) -> None:
        """Write the weights in float16 and ``facts`` about them, as safetensors."""
        state = {k: v.half().contiguous() for k, v in self.state_dict().items() if v.is_floating_point()}
        channels, height, width = self.image_shape
        shape = f"{channels} {height} {width}"
        file.write(save(state, metadata={**facts, "image_shape": shape, "classes": str(self.head.out_features)}))

    @classmethod
    def load(cls, path: Path) -> tuple[ImageClassifier, dict[str, str]]:
        """Load a classifier that :meth:`save` wrote, in evaluation mode, and the facts about it."""
        with safe_open(path, "pt") as file:
            facts = file.metadata()
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        channels, height, width = map(int, facts["image_shape"].split())
        classifier = cls((channels, height, width), int(facts["classes"]))
        # only the batch counters of the normalisation layers may be missing: evaluation does not use them
        missing, unexpected = classifier.load_state_dict(state, strict=False)
        assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
        return classifier.eval(), facts
