"""Features and distances of images as the study uses them: by name, with weights found or downloaded, and cached."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from pyro_nbvae import metrics
from pyro_nbvae.errors import InputError
from pyro_nbvae.metrics.distances import KID_REAL
from pyro_nbvae.metrics.features import ClassifierFeatures, Features, InceptionFeatures
from pyro_nbvae.study.data import data_root, source_of
from pyro_nbvae.study.errors import check_member, first_line
from pyro_nbvae.study.files import cached

# Path of the weights inside the data root.
INCEPTION = Path("inception") / "weights-inception-2015-12-05.pth"


def _classifier(data: str, root: str | Path | None, weights: str | Path | None) -> Features:
    return ClassifierFeatures(source_of(data).classifier)


def _downloaded(path: Path) -> Path:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), progress=False)
    return path


def _inception(
    data: str, root: str | Path | None, weights: str | Path | None, precision: torch.dtype = torch.float32
) -> Features:
    path = Path(weights) if weights else data_root(root) / INCEPTION
    advice = (
        f"give torch-fidelity's file with --inception-weights, put it at {INCEPTION} in the data root, or use "
        "--features classifier"
    )
    try:
        import torch_fidelity.feature_extractor_inceptionv3  # noqa: F401
    except ModuleNotFoundError:
        raise InputError(
            "Inception features need torch-fidelity: pip install 'pyro-nbvae[inception]', or use --features classifier"
        ) from None
    if not weights and not path.is_file():
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                _downloaded(path)
        except Exception as error:
            raise InputError(
                f"no Inception weights (they could not be downloaded: {first_line(error)}): {advice}"
            ) from None
    try:
        return InceptionFeatures(path, precision)
    except Exception as error:
        reason = f"{path} does not hold Inception's weights ({first_line(error)})"
        raise InputError(f"no Inception weights ({reason}): {advice}") from error


FEATURES: dict[str, Callable[[str, str | Path | None, str | Path | None], Features]] = {
    "classifier": _classifier,
    "inception": _inception,
    "inception_bfloat16": functools.partial(_inception, precision=torch.bfloat16),
}


def suffix_of(name: str) -> str:
    """Return "" for Inception's features (FID, KID) and "_c" for the classifier's (FID-c, KID-c)."""
    return "" if name.startswith("inception") else "_c"


def check_features(names: Iterable[str]) -> None:
    """Raise InputError for unknown features, and for two that give metrics of the same name."""
    names = list(names)
    for name in names:
        check_member("features", name, FEATURES)
    if len({suffix_of(name) for name in names}) < len(names):
        raise InputError("--features: name each once, and of Inception's, which both give FID and KID, only one")


def build_features(
    name: str, data: str, *, data_root: str | Path | None = None, inception_weights: str | Path | None = None
) -> Features:
    """Build the features with this name for the images of a data set, in evaluation mode on the CPU.

    Args:
        name: a key of ``FEATURES``.
        data: name of the data set, which selects the classifier.
        data_root: where the Inception weights may be (``inception/weights-inception-2015-12-05.pth``).
        inception_weights: their file, if it is elsewhere. If there is none, the weights are downloaded.

    Raises:
        InputError: for an unknown name, and for weights that are not available.

    Example::

        >>> build_features("classifier", "digits").num_features
        128
    """
    check_member("features", name, FEATURES)
    return FEATURES[name](data, data_root, inception_weights).eval().requires_grad_(False)


def distances(
    features: Features, real: Tensor, generated: Tensor | Iterable[Tensor], *, progress: bool = False, **options: int
) -> dict[str, float]:
    """Compute FID and KID as :func:`pyro_nbvae.metrics.distances`, with the statistics of the real images cached.

    The options are the same. The cache is keyed by the pixels and by the weights of the features.
    """
    pixels = hashlib.sha256(real.cpu().contiguous().numpy().tobytes())
    key = hashlib.sha256(f"{pixels.hexdigest()} {tuple(real.shape)} {features.digest} {KID_REAL}".encode())
    name = f"features-{features.network}-{key.hexdigest()[:16]}.pt"
    reference = cached(name, lambda: metrics.reference_statistics(features, real, progress=progress))
    return metrics.distances(features, reference, generated, progress=progress, **options)
