"""The features that FID and KID compare images in.

``classifier``: of small networks of ours, trained on the labels of such images; shipped with the package, quick on a
CPU. Figures in them are called FID-c and KID-c: they compare models here with each other and are not Inception's.
``inception``: of the standard Inception network (2015-12-05), as torch-fidelity has it. Its figures are FID and KID.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pyro_nbvae.data import data_root, source_of, to_floats
from pyro_nbvae.errors import InputError, check_member, first_line
from pyro_nbvae.metrics.classifier import WEIGHTS, ImageClassifier

# Where the weights are looked for in the data root.
INCEPTION = Path("inception") / "weights-inception-2015-12-05.pth"


class Features(nn.Module):
    """A fixed network: uint8 images (B, C, H, W) to features (B, num_features).

    ``suffix`` marks figures in these features; ``network`` names the weights and ``digest`` tells them from others.
    """

    num_features: int
    suffix: str
    network: str
    digest: str


class ClassifierFeatures(Features):
    """The last features before the labels of one of our classifiers; images are resized to those it was trained on."""

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

    Args:
        weights: torch-fidelity's weights file; None downloads it.

    Raises:
        InputError: without torch-fidelity, for a file that is not these weights, and where they are not available.
    """

    suffix = ""
    network = "inception-2015-12-05"
    num_features = 2048

    def __init__(self, weights: Path | None) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ModuleNotFoundError:
            raise InputError(
                "Inception features need torch-fidelity: pip install 'pyro-nbvae[inception]', or take --features "
                "classifier"
            ) from None
        try:
            # torch-fidelity and torch.hub report the download
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                if weights is not None:
                    torch.load(weights, weights_only=True, mmap=True)  # nothing but tensors is in it
                path = None if weights is None else str(weights)
                self.inception = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], path)
        except Exception as error:
            reason = first_line(error)
            problem = f"{weights} does not hold them" if weights is not None else "they could not be downloaded"
            raise InputError(
                f"no Inception weights ({problem}: {reason}): name torch-fidelity's file with --inception-weights, put "
                f"it at {INCEPTION} in the data root, or take --features classifier"
            ) from error
        state = self.inception.state_dict()
        self.digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest()[:16]

    def forward(self, images: Tensor) -> Tensor:
        return self.inception(images.expand(-1, 3, -1, -1))[0]


def _classifier(data: str, root: str | Path | None, weights: str | Path | None) -> Features:
    return ClassifierFeatures(source_of(data).classifier)


def _inception(data: str, root: str | Path | None, weights: str | Path | None) -> Features:
    found = data_root(root) / INCEPTION
    return InceptionFeatures(Path(weights) if weights else found if found.is_file() else None)


FEATURES: dict[str, Callable[[str, str | Path | None, str | Path | None], Features]] = {
    "classifier": _classifier,
    "inception": _inception,
}


def build_features(
    name: str, data: str, *, data_root: str | Path | None = None, inception_weights: str | Path | None = None
) -> Features:
    """The features of that name for images of that data set, in evaluation mode on the CPU.

    Args:
        name: a key of ``FEATURES``.
        data: its name; says which classifier.
        data_root: where the Inception weights may be (``inception/weights-inception-2015-12-05.pth``).
        inception_weights: their file, if it is elsewhere. Where there is none they are downloaded.

    Raises:
        InputError: for an unknown name, and for weights that are not available.
    """
    check_member("features", name, FEATURES)
    return FEATURES[name](data, data_root, inception_weights).eval().requires_grad_(False)
