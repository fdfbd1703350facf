"""Generate observations from a trained run: samples and reconstructions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pyro_nbvae import sampling
from pyro_nbvae.batching import BATCH, Batch, Recording, is_image_shape, to_bytes, to_floats, value_range
from pyro_nbvae.distributions import TiltedMixture
from pyro_nbvae.errors import InputError
from pyro_nbvae.likelihoods import CountLikelihood
from pyro_nbvae.sampling import PosteriorSampler, PriorSampler, Sampler, drawn_rows, generated
from pyro_nbvae.study.data.arrays import as_tensors, read_npy
from pyro_nbvae.study.errors import check_member, check_number, check_seed
from pyro_nbvae.study.files import save_arrays
from pyro_nbvae.study.folder import Run, SamplerName
from pyro_nbvae.study.plots import plot_images, plot_lines, plot_pairs, plot_recordings
from pyro_nbvae.study.recordings import by_bin, names_of, target
from pyro_nbvae.study.tree import TrainConfig
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, evaluating

# Maximum number of observations in one plot.
MOST_SHOWN = 10_000
# Maximum number of generated observations.
MOST_SAMPLES = 10_000_000


def prior_samples(model: GenerativeModel, guide: AmortizedGuide, count: int, *, seed: int = 0) -> Tensor:
    """Generate images: the means of the likelihood at exact samples from the prior (integer counts).

    Args:
        model, guide: the pair.
        count: number of images N.
        seed: random seed.

    Returns:
        Images (N, C, H, W), uint8.

    Raises:
        InputError: for a count below 1, or a seed out of range.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((1, 8, 8), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> prior_samples(model, guide, 2).shape
        torch.Size([2, 1, 8, 8])
    """
    check_number("the number of samples", count, 1, MOST_SAMPLES)
    return torch.cat([to_bytes(part.mean) for part in generated(model, guide, PriorSampler(model), count, seed=seed)])


def sampler_of(
    name: SamplerName, model: GenerativeModel, guide: AmortizedGuide, train: Callable[[], Recording]
) -> Sampler:
    """Return the sampler with this name for a trained pair.

    Args:
        name: ``prior``; ``mixture``, which is the prior of a model with a fitted one; or ``posterior``
            (:class:`PosteriorSampler`).
        model, guide: the trained pair.
        train: returns the training data; called only if the sampler needs them.

    Raises:
        InputError: for an unknown name.
    """
    check_member("sampler", name, get_args(SamplerName))
    return PosteriorSampler(model, guide, train()) if name == "posterior" else PriorSampler(model)


def reconstructions(model: GenerativeModel, guide: AmortizedGuide, x: Batch, *, seed: int = 0) -> Tensor:
    """Reconstruct observations from one exact posterior sample each (integer counts).

    Args:
        model, guide: the pair.
        x: observations (N, *event_shape), or a :class:`~pyro_nbvae.batching.Recording`.
        seed: random seed.

    Returns:
        Means of the likelihood, (N, *event_shape), on the CPU.

    Raises:
        InputError: for observations of the wrong shape or type, or none, or a seed out of range.

    Example::

        >>> from pyro_nbvae.guides import PoissonGuide
        >>> from pyro_nbvae.models import PoissonModel
        >>> model = PoissonModel((5,), latents=3, decoder="linear")
        >>> guide = PoissonGuide(model, encoder="linear")
        >>> reconstructions(model, guide, torch.zeros(4, 5)).shape
        torch.Size([4, 5])
    """
    check_seed(seed)
    return torch.cat([*sampling.reconstructed(model, guide, x, seed=seed)])


def fit_prior(
    run: Run,
    *,
    components: int = 200,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
    data_path: str | None = None,
) -> dict[int, float]:
    """Fit a mixture to the posteriors of a run's training data and write it to ``prior.pt``.

    Samplers and evaluations with ``mixture`` use it as the model's prior.

    Args:
        run: a trained run.
        components: largest number of components (:func:`pyro_nbvae.sampling.fit_prior`).
        seed: random seed.
        device: auto (CUDA if available) or a PyTorch device string.
        data_root: folder of the data sets, if it is not the one of the training.
        data_path: where the data of the training are now, if they have moved.

    Returns:
        log p(z) of held-out samples of the posteriors, in nats, by number of components.

    Raises:
        InputError: for a folder that contains no trained run, for latents that are neither counts nor real numbers, a
            number of components below 1 or a seed out of range, and for data that have changed since the training.
    """
    check_number("--components", components, 1, 100_000)
    check_seed(seed)
    state = run.read_checkpoint()
    config, model, guide = run.load_from(state, device)
    train = run.data_of(state, data_root, data_path).training[: config.train_size]
    fitted, scores = sampling.fit_prior(model, guide, train, components, seed=seed, progress=True)
    try:
        model.set_joint_prior(fitted)
    except TypeError as error:
        raise InputError(str(error)) from None
    run.write_prior(fitted.cpu(), state)
    return scores


def generate(
    run: Run,
    *,
    count: int = 100,
    sampler: SamplerName = "prior",
    condition: str | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
    data_path: str | None = None,
) -> list[Path]:
    """Generate observations from exact samples (integer counts), and write and plot them.

    Args:
        run: a trained run.
        count: number of samples.
        sampler: ``prior``, ``mixture`` (the prior of :func:`fit_prior`) or ``posterior``.
        condition: the label that the samples are given, for a run that is conditional on labels. Default: those of
            training observations.
        out: path of the arrays, a ``.npz`` file; the plot is beside it, with the suffix ``.png``. Default:
            ``samples.npz``, or ``samples-SAMPLER.npz``, in the run folder.
        seed: random seed.
        device: auto (CUDA if available) or a PyTorch device string.
        data_root: folder of the data sets, if it is not the one of the training.
        data_path: where the data of the training are now, if they have moved.

    Returns:
        Paths of the plot and of the arrays. These are ``z``, latents; ``mean``, means of the likelihood; and
        ``counts`` (of data that are no recording ``x``), one draw from it each, in the shape of the data. Exposures,
        and labels or covariates of a conditional run, are arrays too: those of training observations drawn at random.
        With ``counts`` the file is a recording, which ``nbvae train --data`` takes: what a model makes of its own data
        tells what it would find in real ones.

    Raises:
        InputError: for a folder that contains no trained run, an unknown sampler, a count or a seed out of range, and
            for data that a sampler needs and that have changed since the training.
    """
    check_member("sampler", sampler, get_args(SamplerName))
    check_number("--count", count, 1, MOST_SHOWN)
    check_seed(seed)
    state = run.read_checkpoint()
    path = target(run, out, "samples.npz" if sampler == "prior" else f"samples-{sampler}.npz")
    config, model, guide = run.load_from(state, device, fitted=sampler == "mixture")

    def train() -> Recording:
        return run.data_of(state, data_root, data_path).training[: config.train_size]

    if condition is not None and sampler == "posterior":
        raise InputError("samples of the posterior have the conditions of the training data: leave out --given")
    drawer = sampler_of(sampler, model, guide, train)
    given = {} if sampler == "posterior" else _conditions(config, condition, train)
    batches = list(generated(model, guide, drawer, count, seed=seed, given=given))
    z, mean, x = (torch.cat([getattr(part, name) for part in batches]) for name in ("z", "mean", "x"))
    arrays = {"z": by_bin(z, model, config).numpy()}
    if _is_recording(model):
        arrays["counts"] = x.numpy().astype(np.int64)
        never = state["never_observed"]
        if never.any():  # no model can learn their rates
            arrays["mask"] = np.broadcast_to(~never.numpy(), x.shape)
            mean, x = (part.masked_fill(never, math.nan) for part in (mean, x))
    else:
        arrays["x"] = x.numpy()
    arrays["mean"] = mean.numpy()
    own = {name: torch.cat([part.given[name] for part in batches]).numpy() for name in batches[0].given}
    if config.conditions is not None:
        free = config.reading.labels not in arrays
        arrays[config.reading.labels if free else "labels"] = names_of(config.conditions)[
            own.pop("covariates").argmax(1)
        ]
    if "exposure" in own:
        own["exposure"] = np.broadcast_to(own["exposure"], x.shape)
    arrays |= own
    plot = path.with_suffix(".png")
    title = f"{config.title}: {sampler} samples{'' if condition is None else f' given {condition}'}"
    if is_image_shape(model.event_shape):
        plot_images(mean, plot, title=title, limits=state.get("limits"))
    else:
        _plot_values(model, {"means": mean, "draws": x}, plot, title)
    return [plot, save_arrays(path, arrays)]


def _is_recording(model: GenerativeModel) -> bool:
    return isinstance(model.likelihood, CountLikelihood) and len(model.event_shape) <= 2


def _plot_values(model: GenerativeModel, parts: dict[str, Tensor], path: Path, title: str) -> None:
    """Plot observations that are no images, of each name beside each other."""
    plot = plot_recordings if _is_recording(model) else plot_lines
    plot(parts, path, title=title)


def _conditions(config: TrainConfig[Any], label: str | None, train: Callable[[], Recording]) -> dict[str, Tensor]:
    """Return exposures and covariates that generated observations have: those of training data, of one label or all."""
    if label is None:
        return train().conditions if {"exposure", "covariates"} & set(config.given) else {}
    if config.conditions is None:
        raise InputError("--given needs a run that is conditional on labels: train with --condition labels")
    check_member("--given", label, config.conditions)
    covariates = torch.eye(len(config.conditions))[config.conditions.index(label)][None]
    if "exposure" not in config.given:
        return {"covariates": covariates}
    data = train()
    own = data[(data.conditions["covariates"] == covariates).all(1)]
    if not len(own):
        raise InputError(f"no training observation has the label {label}, whose exposures the samples would have")
    return own.conditions


def components(
    run: Run,
    *,
    count: int = 10,
    sampler: Literal["prior", "mixture"] = "prior",
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
    data_path: str | None = None,
) -> list[Path]:
    """Plot a mixture prior: ``components.png``, samples of each component, and ``paths.png``, ways between components.

    Args:
        run: a trained run.
        count: number of components, those with the largest weights, and of samples of each; 2 to 20.
        sampler: ``prior``, or ``mixture`` for the prior of :func:`fit_prior`, whose files end in ``-mixture.png``.
        seed: random seed.
        device: auto (CUDA if available) or a PyTorch device string.
        data_root, data_path: of the data, whose covariates a conditional run needs.

    Returns:
        Paths of the plots. A row of ``paths.png`` leads from a component to the next one in ``components.png``; with
        one component there is none.

    Raises:
        InputError: for a folder that contains no trained run, a run whose prior is no mixture, or a number out of
            range.
    """
    check_number("--count", count, 2, 20)
    check_seed(seed)
    state = run.read_checkpoint()
    config, model, guide = run.load_from(state, device, fitted=sampler == "mixture")
    given = _conditions(config, None, lambda: run.data_of(state, data_root, data_path).training)
    with evaluating(model, guide, seed):
        prior = model.prior_distribution()
        if not isinstance(prior, TiltedMixture):
            raise InputError(
                f"the prior of {run.folder} is no mixture: fit one with nbvae fit-prior, then use --sampler mixture"
            )
        weights, chosen = prior.component_logits.softmax(-1).sort(descending=True)
        chosen = chosen[:count]
        ends = zip(chosen.tolist(), chosen.roll(-1).tolist(), strict=True)
        pictures = {"components": prior.sample_given(chosen.repeat_interleave(count))}
        if len(chosen) > 1:
            pictures["paths"] = torch.cat([prior.path(first, last, count) for first, last in ends])
        rows = [f"{weight:.1%}" for weight in weights[: len(chosen)].tolist()]
        whose = "fitted mixture" if sampler == "mixture" else "prior"
        names = {
            "components": f"samples of components of the {whose}, and their weights",
            "paths": f"paths from each component of the {whose} to the next",
        }
        written = []
        for name, z in pictures.items():
            own = [{k: v.to(z) for k, v in drawn_rows(given, len(part)).items()} for part in z.split(BATCH)]
            parts = zip(z.split(BATCH), own, strict=True)
            means = torch.cat([model.observation(part, **conditions).mean for part, conditions in parts]).cpu()
            path = run.folder / f"{name}{'-mixture' * (sampler == 'mixture')}.png"
            title = f"{config.title}: {names[name]}"
            if is_image_shape(model.event_shape):
                plot_images(means, path, title=title, columns=count, rows=rows, limits=state.get("limits"))
            else:
                plot_lines({"": means}, path, title=title, rows=rows)
            written.append(path)
    return written


def read_observations(path: str | Path) -> Tensor:
    """Read observations (N, *event_shape) from a .npy file; images are floats in [0, 1] or uint8.

    Raises:
        InputError: for a file that does not contain such an array.
    """
    if Path(path).suffix == ".npz":
        raise InputError(f"--input {path}: a .npy file is needed; nbvae predict takes a .npz file")
    return to_floats(*as_tensors(Path(path), {"array": read_npy(Path(path))}))


def reconstruct(
    run: Run,
    *,
    input: str | Path | None = None,
    count: int = 16,
    seed: int = 0,
    device: str = "auto",
    data_root: str | None = None,
    data_path: str | None = None,
) -> Path:
    """Write ``reconstructions.png``: originals and their reconstructions, from one exact sample each.

    Args:
        run: a trained run.
        input: a .npy file (see :func:`read_observations`). Default: the held-out data of the run's data set.
        count: number of observations, from the beginning of the data.
        seed: random seed.
        device: auto (CUDA if available) or a PyTorch device string.
        data_root: folder of the data sets, if it is not the one of the training.
        data_path: where the data of the training are now, if they have moved.

    Returns:
        Path of the plot.

    Raises:
        InputError: for data whose shape or range does not match the run, and for data that have changed since the
            training.
    """
    check_number("--count", count, 1, MOST_SHOWN)
    check_seed(seed)
    state = run.read_checkpoint()
    config, model, guide = run.load_from(state, device)
    if input is None:
        batch = run.data_of(state, data_root, data_path).held_out[:count].floats()
    else:
        if given := [name for name in config.given if name != "mask"]:
            raise InputError(f"--input has no {given[0]}, which this run needs: use nbvae predict with a .npz file")
        batch = Recording(read_observations(input)[:count])
        model.check_support(batch, f"observations of {input}")
    again = reconstructions(model, guide, batch, seed=seed)
    x = batch.x
    if batch.mask is not None:  # nothing is shown where nothing was observed
        x = x.masked_fill(~batch.mask, float("nan"))
    path = run.folder / "reconstructions.png"
    title = f"{config.title}: originals and reconstructions"
    if is_image_shape(model.event_shape):
        plot_pairs(x, again, path, title=title, limits=value_range(x))
    else:
        _plot_values(model, {"originals": x, "reconstructions": again}, path, title)
    return path
