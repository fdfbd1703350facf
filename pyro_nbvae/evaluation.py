"""Evaluation of a run: every metric, into its folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pyro_nbvae.data import load
from pyro_nbvae.errors import InputError
from pyro_nbvae.generation import prior_samples
from pyro_nbvae.metrics import build_features, distances, held_out, importance_weighted_bound
from pyro_nbvae.runs import Run


def evaluate(
    run: Run,
    *,
    features: Sequence[str] = ("classifier",),
    inception_weights: str | Path | None = None,
    samples: int = 10_000,
    importance_samples: int = 5,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures a run on its held-out images; writes ``metrics.json`` and, of counts, ``dispersion.png``.

    Everything is from exact latents (integer counts). ``mse`` (per pixel) and ``ssim`` are of reconstructions from one
    sample, on [0, 1]; ``fid_c``, ``kid_c`` and ``kid_std_c`` (with Inception features ``fid``, ``kid``, ``kid_std``)
    compare ``generated_images`` samples of the prior with the training images; ``elbo`` and
    ``importance_weighted_bound`` are nats per image, ``bits_per_dim`` is -elbo / (pixels * channels * ln 2) of
    densities on [0, 1] (add 8 for 8-bit pixels); ``kl`` is nats per image; ``dead_units`` have a mean KL below
    0.01 nats; ``fano`` is the posterior's mean variance over mean; ``overdispersion`` is the mean over units of the
    variance over the mean of their counts across images (both None where the latents are not counts);
    ``seconds_per_step`` is the median over the run's epochs, as it was trained.

    Args:
        features: what FID and KID compare images in, of ``classifier`` and ``inception``.
        inception_weights: torch-fidelity's file, if it is not in the data root.
        samples: number of generated images.
        importance_samples: latents per image of the importance-weighted bound; 0 leaves it out.
        seed: of the latents that are drawn and of KID's subsets.

    Raises:
        InputError: for a folder that holds no trained run, for data or weights that are not to be had, and for a
            number out of range.
    """
    from pyro_nbvae.plotting import plot_dispersion

    if importance_samples < 0:
        raise InputError(f"--importance-samples must not be negative, got {importance_samples}")
    if samples < 2:
        raise InputError(f"--samples must be at least 2, got {samples}")
    config, model, guide = run.load(device)
    where = next(model.parameters()).device
    root = data_root or config.data_root
    networks = [
        build_features(name, config.data, data_root=root, inception_weights=inception_weights).to(where)
        for name in features
    ]
    data = load(config.data, root)
    images = data.test.to(where)
    seen = held_out(model, guide, images, seed=seed, progress=progress)
    bound = None
    if importance_samples:
        each = importance_weighted_bound(model, guide, images, importance_samples, seed=seed, progress=progress)
        bound = float(each.mean())
    generated = prior_samples(model, guide, samples, seed=seed, progress=progress)
    figures: dict[str, float] = {}
    for network in networks:
        figures |= distances(network, data.train, generated, seed=seed, progress=progress)
    log = run.read_checkpoint()["log"]
    trained_on = len(data.train[: config.train_images])
    metrics = {
        "variant": config.variant,
        "data": config.data,
        "epochs": len(log),
        "train_images": trained_on,
        "seconds_per_step": median(row["seconds"] for row in log) / math.ceil(trained_on / config.batch_size),
        "mse": seen.mse,
        "ssim": seen.ssim,
        **figures,
        "elbo": seen.elbo,
        "bits_per_dim": -seen.elbo / (math.prod(model.image_shape) * math.log(2)),
        "importance_weighted_bound": bound,
        "importance_samples": importance_samples,
        "squared_error": seen.squared_error,
        "kl": seen.kl,
        "beta": model.beta,
        "objective": seen.squared_error + model.beta * seen.kl,
        "dead_units": seen.dead_units,
        "units": seen.unit_kl.numel(),
        "fano": seen.fano,
        "overdispersion": seen.overdispersion,
        "feature_sets": list(features),
        "feature_networks": [network.network for network in networks],
        "generated_images": samples,
        "test_images": len(images),
        "seed": seed,
        "kl_per_unit": seen.unit_kl.tolist(),
    }
    if seen.fano is not None:
        units = {"units": (seen.unit_mean, seen.unit_variance)}
        plot_dispersion(units, run.folder / "dispersion.png", title=config.title)
    run.write_json("metrics.json", metrics)
    return metrics
