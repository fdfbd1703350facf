"""Variational autoencoders whose latents are overdispersed spike counts, as Pyro programs."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_nbvae.batching import Observations
    from pyro_nbvae.encoding import Latents, Prediction
    from pyro_nbvae.vae import AmortizedGuide, GenerativeModel

__version__ = version("pyro-nbvae")

# PyTorch's OpenMP threads soon go to sleep while they wait for each other. By default they spin for long, and beside
# other busy processes everything takes ten times as long. OpenMP reads this once, when PyTorch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def load(path: str | Path, device: str = "auto", *, fitted: bool = False) -> tuple[GenerativeModel, AmortizedGuide]:
    """Load the model and guide of a trained run, in evaluation mode (no dropout).

    The guide keeps the relaxation of the run; inside ``guide.exact()`` it draws integer counts.

    Args:
        path: a run folder, or a ``.safetensors`` file written by ``nbvae export``.
        device: auto (CUDA if available) or a PyTorch device string.
        fitted: whether the model's prior is the one that ``nbvae fit-prior`` wrote to the run folder.

    Returns:
        ``(model, guide)``.

    Raises:
        InputError: for a path that contains no trained run, or no fitted prior.

    Example::

        >>> import tempfile
        >>> from pyro_nbvae.study.config import configure
        >>> from pyro_nbvae.study.training import train
        >>> config = configure(train_size=50, latents=3, encoder="linear", decoder="linear", epochs=1, device="cpu")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = train(config, folder, progress=False)
        ...     model, guide = load(folder, "cpu")
        >>> z, mean = model.generate(2)
        >>> z.shape, mean.shape
        (torch.Size([2, 3]), torch.Size([2, 1, 16, 16]))
    """
    from pyro_nbvae.study.folder import load

    return load(path, device, fitted=fitted)


def encode(model: GenerativeModel, guide: AmortizedGuide, data: Observations, **options: Any) -> Latents:
    """Return the posteriors of observations: :func:`pyro_nbvae.encoding.encode`, which documents it."""
    from pyro_nbvae.encoding import encode

    return encode(model, guide, data, **options)


def predict(model: GenerativeModel, guide: AmortizedGuide, data: Observations, **options: Any) -> Prediction:
    """Return the predictive distribution of observations: :func:`pyro_nbvae.encoding.predict`, which documents it."""
    from pyro_nbvae.encoding import predict

    return predict(model, guide, data, **options)
