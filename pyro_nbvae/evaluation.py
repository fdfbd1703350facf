"""Evaluation of a trained pair, always with exact latents: integer counts, temperature 0.

The ELBO is that of the count model, in nats, with its constant; its KL is in closed form or by quadrature for every
variant, however it was trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import kl_divergence
from tqdm.auto import tqdm

from pyro_nbvae.data import batches, load
from pyro_nbvae.distributions.relaxed import RelaxedCount
from pyro_nbvae.runs import Run, check_seed
from pyro_nbvae.vae import AmortizedGuide, ImageModel

BATCH = 500
# A unit that tells less than this about an image, on average, is dead.
DEAD_NATS = 0.01


@contextmanager
def evaluating(model: ImageModel, guide: AmortizedGuide, seed: int) -> Iterator[None]:
    """Evaluation mode, exact latents, no gradients, and a random stream of its own."""
    check_seed(seed)
    modes = [(m, m.training) for m in (model, guide)]
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    model.eval(), guide.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), guide.exact(), pyro.validation_enabled(False):
            torch.manual_seed(seed)
            yield
    finally:
        for module, mode in modes:
            module.train(mode)


def _shown(images: Tensor, what: str, progress: bool) -> Iterable[Tensor]:
    """Batches of uint8 images as floats, under a progress bar."""
    count = -(-len(images) // BATCH)
    return tqdm(batches(images, BATCH), total=count, desc=what, disable=not progress, leave=False)


def _unit_kl(model: ImageModel, q: Any) -> Tensor:
    return kl_divergence(q, model.prior_distribution().expand(q.batch_shape))


def fano_factor(q: TorchDistribution) -> Tensor | None:
    """Variance over mean of a posterior over counts, averaged over units; None where the latents are not counts."""
    if not isinstance(q, RelaxedCount):
        return None
    return (q.variance / q.mean).mean(-1)


def _log_likelihood(model: ImageModel, error: Tensor) -> Tensor:
    """log p(x | z) in nats from the squared error per image."""
    return -error / model.beta - math.prod(model.image_shape) / 2 * math.log(math.pi * model.beta)


def _squared_error(x: Tensor, mean: Tensor) -> Tensor:
    return (x - mean).square().sum((-3, -2, -1))


def held_out(model: ImageModel, guide: AmortizedGuide, images: Tensor, *, seed: int = 0) -> dict[str, float]:
    """Quick figures on uint8 images (N, C, H, W) from one exact sample each.

    Returns:
        ``squared_error`` and ``kl`` (nats) per image, ``elbo`` (nats per image), ``mse`` per pixel and, where the
        latents are counts, ``fano``, the posterior's mean variance over mean.
    """
    totals = torch.zeros(3, device=images.device, dtype=torch.float64)
    with evaluating(model, guide, seed):
        for x in batches(images, BATCH):
            q = guide.posterior(x)
            error = _squared_error(x, model.decode(q.sample()))
            kl = _unit_kl(model, q).sum()
            fano = fano_factor(q)
            totals += torch.stack([error.sum(), kl, torch.zeros_like(kl) if fano is None else fano.sum()])
    error, kl, mean_fano = (totals / len(images)).tolist()
    elbo = float(_log_likelihood(model, torch.tensor(error, dtype=torch.float64))) - kl
    mse = error / math.prod(model.image_shape)
    figures = {"squared_error": error, "kl": kl, "elbo": elbo, "mse": mse}
    return figures if fano is None else figures | {"fano": mean_fano}


def importance_weighted_bound(
    model: ImageModel, guide: AmortizedGuide, images: Tensor, samples: int, *, seed: int = 0, progress: bool = False
) -> Tensor:
    """log mean_s p(x, z_s) / q(z_s | x), in nats, per image: a lower bound on log p(x) that tightens with ``samples``.

    Args:
        images: uint8 (N, C, H, W).
        samples: exact latents per image.

    Returns:
        (N,).
    """
    bounds = []
    with evaluating(model, guide, seed):
        for x in _shown(images, "bound", progress):
            q = guide.posterior(x)
            p = model.prior_distribution()
            log_weights = []
            for _ in range(samples):
                z = q.sample()
                likelihood = _log_likelihood(model, _squared_error(x, model.decode(z)))
                log_weights.append(likelihood + (p.log_prob(z) - q.log_prob(z)).sum(-1))
            bounds.append(torch.logsumexp(torch.stack(log_weights), 0) - math.log(samples))
    return torch.cat(bounds)


def latent_moments(model: ImageModel, guide: AmortizedGuide, images: Tensor, *, seed: int = 0) -> dict[str, Tensor]:
    """Over uint8 images: mean and variance of the exact samples, (*latent_shape), and mean KL in nats, a unit each."""
    samples, kls = [], []
    with evaluating(model, guide, seed):
        for x in batches(images, BATCH):
            q = guide.posterior(x)
            samples.append(q.sample())
            kls.append(_unit_kl(model, q))
    z = torch.cat(samples)
    return {"mean": z.mean(0), "variance": z.var(0), "kl": torch.cat(kls).mean(0)}


def evaluate(
    run: Run,
    *,
    importance_samples: int = 10,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures a run on its held-out images; writes ``metrics.json`` and, of counts, ``dispersion.png``.

    Everything is from exact latents (integer counts). ``mse`` (per pixel) and ``ssim`` are of reconstructions from one
    sample, on [0, 1]; ``elbo`` and ``importance_weighted_bound`` are nats per image, ``bits_per_dim`` is
    -elbo / (pixels * channels * ln 2) of densities on [0, 1] (add 8 for 8-bit pixels); ``kl`` is nats per image;
    ``dead_units`` have a mean KL below 0.01 nats; ``fano`` is the posterior's mean variance over mean;
    ``overdispersion`` is the mean over units of the variance over the mean of their counts across images (both None
    where the latents are not counts).
    """
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    from pyro_nbvae.plotting import plot_dispersion

    config, model, guide = run.load(device)
    images = load(config.data, data_root or config.data_root).test.to(next(model.parameters()).device)
    figures = held_out(model, guide, images, seed=seed)
    ssim = StructuralSimilarityIndexMeasure(data_range=1.0).to(images.device)
    with evaluating(model, guide, seed):
        for x in _shown(images, "SSIM", progress):
            ssim.update(model.decode(guide.posterior(x).sample()), x)
    units = latent_moments(model, guide, images, seed=seed)
    bound = importance_weighted_bound(model, guide, images, importance_samples, seed=seed, progress=progress)
    metrics = {
        "variant": config.variant,
        "data": config.data,
        "epochs": len(run.read_checkpoint()["log"]),
        "mse": figures["mse"],
        "ssim": float(torch.as_tensor(ssim.compute())),
        "elbo": figures["elbo"],
        "bits_per_dim": -figures["elbo"] / (math.prod(model.image_shape) * math.log(2)),
        "importance_weighted_bound": float(bound.mean()),
        "importance_samples": importance_samples,
        "squared_error": figures["squared_error"],
        "kl": figures["kl"],
        "beta": model.beta,
        "objective": figures["squared_error"] + model.beta * figures["kl"],
        "dead_units": int((units["kl"] < DEAD_NATS).sum()),
        "units": len(units["kl"]),
        "fano": figures.get("fano"),
        "overdispersion": None,
        "test_images": len(images),
        "seed": seed,
        "kl_per_unit": units["kl"].tolist(),
    }
    if "fano" in figures:
        fired = units["mean"] > 0
        if bool(fired.any()):
            metrics["overdispersion"] = float((units["variance"] / units["mean"])[fired].mean())
        plot_dispersion(units["mean"], units["variance"], run.folder / "dispersion.png", title=run_title(config))
    run.write_json("metrics.json", metrics)
    return metrics


def run_title(config: Any) -> str:
    return f"{config.variant} on {config.data}"
