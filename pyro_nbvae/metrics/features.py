"""Image features for FID and KID.

:class:`ClassifierFeatures` are those of this package's small networks, which are trained on labels and fast on a CPU.
The metrics are then called FID-c and KID-c: they compare models with each other, and are not comparable with FID and
KID. :class:`InceptionFeatures` are those of the standard Inception network (2015-12-05), for FID and KID. With
``precision=torch.bfloat16`` they take half the time on a CPU with bfloat16 instructions, and FID changes by less than
1 %.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pyro_nbvae.batching import to_floats
from pyro_nbvae.metrics.classifier import WEIGHTS, ImageClassifier

# Batch size of the Inception network, by device type.
INCEPTION_BATCH = {"cpu": 8, "cuda": 256}


class Features(nn.Module):
    """Base class of image features: a fixed network from uint8 images (B, C, H, W) to features (B, num_features).

    Attributes:
        num_features: number of features.
        suffix: appended to the names of metrics in these features.
        network: name of the weights.
        digest: hash of the weights.

    Example::

        >>> features = ClassifierFeatures("digits")
        >>> features(torch.zeros(2, 1, 16, 16, dtype=torch.uint8)).shape
        torch.Size([2, 128])
    """

    num_features: int
    suffix: str
    network: str
    digest: str


class ClassifierFeatures(Features):
    """Features before the last layer of one of this package's classifiers.

    Images are resized to the size of its training images.

    Args:
        name: name of the weights, a file in ``pyro_nbvae/metrics/weights``.
    """

    suffix = "_c"

    def __init__(self, name: str) -> None:
        super().__init__()
        path = WEIGHTS / f"{name}.safetensors"
        self.network = name
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        self.classifier, self.facts = ImageClassifier.load(path)
        self.num_features = self.classifier.num_features

    def forward(self, images: Tensor) -> Tensor:
        channels, *sides = self.classifier.image_shape
        x = to_floats(images)
        if list(x.shape[2:]) != sides:
            x = nn.functional.interpolate(x, sides, mode="bilinear", align_corners=False, antialias=True)
        return self.classifier.features(x.expand(-1, channels, -1, -1))


class InceptionFeatures(Features):
    """The 2,048 pooled features of the Inception network; grey images are repeated in three channels.

    Layers and resizing are computed with torch-fidelity. Batch normalisations are folded into the convolutions, which
    changes the features by float32 rounding errors only.

    Args:
        weights: path of torch-fidelity's weights file.
        precision: dtype of the multiplications, float32 or bfloat16.

    Raises:
        ModuleNotFoundError: if torch-fidelity is not installed (``pip install 'pyro-nbvae[inception]'``).
        OSError, RuntimeError: for a file that cannot be read, or with other weights.
    """

    suffix = ""
    num_features = 2048

    def __init__(self, weights: str | Path, precision: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.precision = precision
        kind = "" if precision == torch.float32 else f"-{str(precision).removeprefix('torch.')}"
        self.network = f"inception-2015-12-05{kind}"
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        torch.load(weights, weights_only=True, mmap=True)  # raises an error for a file with anything but tensors
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self.inception = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))
        state = self.inception.state_dict()
        self.digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest()[:16] + kind
        _fold_normalisation(self.inception.eval())
        self.inception.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        # small batches on a CPU: the activations of a large one do not fit in its caches
        size = INCEPTION_BATCH.get(images.device.type, INCEPTION_BATCH["cuda"])
        return torch.cat([self._extract(batch) for batch in images.split(size)])

    def _extract(self, images: Tensor) -> Tensor:
        from torch_fidelity.feature_extractor_inceptionv3 import interpolate_bilinear_2d_like_tensorflow1x

        # a grey image is resized once and then repeated
        x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
        x = ((x - 128) / 128).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, self.precision, enabled=self.precision != torch.float32):
            for name in _INCEPTION_LAYERS:
                x = getattr(self.inception, name)(x)
        return x.flatten(1).float()


# From the resized image to the 2,048 features, in order.
_INCEPTION_LAYERS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"),
)


def _fold_normalisation(module: nn.Module) -> None:
    """Fold every batch normalisation into the convolution before it."""
    for child in module.children():
        if isinstance(getattr(child, "bn", None), nn.BatchNorm2d):
            child.conv = fuse_conv_bn_eval(cast(nn.Conv2d, child.conv), cast(nn.BatchNorm2d, child.bn))
            child.bn = nn.Identity()
        else:
            _fold_normalisation(child)
