"""Training: Adam on -beta * ELBO per image, with KL warm-up and an annealed temperature."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from tqdm.auto import tqdm

from pyro_nbvae.config import TrainConfig
from pyro_nbvae.data import ImageData, batches, load
from pyro_nbvae.distributed import Processes, processes
from pyro_nbvae.distributions.samplers import DivergedError
from pyro_nbvae.errors import InputError
from pyro_nbvae.metrics import fano_factor, held_out
from pyro_nbvae.runs import Run, build, choose_device, resolve, validate

# A resumed run may differ in these from the one it continues.
_MAY_CHANGE = {"epochs", "device", "data_root"}
# Held-out images of which the log keeps figures after every epoch; nbvae evaluate measures all.
LOGGED = 2_000


def kl_weight(config: TrainConfig, epoch: float) -> float:
    """The KL's weight after so many epochs (a fraction counts): rises linearly from 0 to 1."""
    return min(1.0, epoch / config.kl_warmup) if config.kl_warmup else 1.0


def temperature(config: TrainConfig, epoch: float) -> float:
    """The relaxation's temperature after so many epochs: linear from ``temperature_start`` to ``temperature``."""
    assert config.temperature is not None and config.temperature_start is not None and config.anneal_epochs
    done = min(1.0, epoch / config.anneal_epochs)
    return config.temperature_start + (config.temperature - config.temperature_start) * done


def differences(before: TrainConfig, now: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The fields in which a run may not differ from the one it continues, and does: what is there, what is here."""
    there, here = dataclasses.asdict(before), dataclasses.asdict(now)
    return {k: (there[k], here[k]) for k in here if k not in _MAY_CHANGE and there[k] != here[k]}


def _prepare(run: Run, config: TrainConfig, image_shape: tuple[int, int, int], resume: bool) -> None:
    """Makes the run folder, or checks that it is this configuration's."""
    if not run.config_path.exists():
        if run.folder.exists() and (not run.folder.is_dir() or any(run.folder.iterdir())):
            raise InputError(f"{run.folder} exists and holds no run: name a new or empty folder with --out")
        run.folder.mkdir(parents=True, exist_ok=True)
    elif not resume:
        raise InputError(f"{run.folder} already holds a run: continue it with --resume, or name another --out")
    else:
        changed = differences(run.config()[0], config)
        if changed:
            what = ", ".join(f"{k} {there} there, {here} here" for k, (there, here) in changed.items())
            raise InputError(f"{run.folder} holds another run ({what}): give the same flags, or name another --out")
    run.write_config(config, image_shape)


def _diverged(run: Run, config: TrainConfig, epoch: int, what: str) -> InputError:
    return InputError(
        f"training diverged in epoch {epoch + 1} ({what}): lower --lr (now {config.lr}); {run.folder} keeps the epochs "
        "before"
    )


def train(config: TrainConfig, out: str | Path, *, resume: bool = False, progress: bool = True) -> Run:
    """Trains a variant and leaves a run folder.

    The loss is -beta * ELBO per image without its constant, in units of squared error: squared error + beta *
    kl_weight * KL. After each epoch the first 2,000 held-out images are evaluated with exact latents (integer counts),
    and the checkpoint and the log are written. On one machine the same configuration gives the same numbers, whether or
    not the run was interrupted and resumed. Under torchrun each process takes its share of every batch.

    Args:
        config: what to train.
        out: the run folder, new, empty or (with ``resume``) of the same configuration.
        resume: continue from the last whole epoch; a run that is complete stays as it is.
        progress: show a progress bar on standard error.

    Raises:
        InputError: for data, a device or a folder that cannot be used, and for a loss that is not finite.
    """
    validate(config)
    run = Run(out)
    if resume and run.config_path.exists():  # what is left open is as the run has it, not as a preset would now
        before = dataclasses.asdict(run.config()[0])
        config = dataclasses.replace(config, **{k: v for k, v in before.items() if getattr(config, k) is None})
    data = load(config.data, config.data_root)
    config = resolve(config, data.image_shape)
    device = choose_device(config.device)
    group = processes(device)
    if group.leads:
        _prepare(run, config, data.image_shape, resume)
    group.gather(None)  # nobody looks into the folder before it is there
    _train(run, config, data, device, group, resume, progress and group.leads)
    return run


def _train(
    run: Run,
    config: TrainConfig,
    data: ImageData,
    device: torch.device,
    group: Processes,
    resume: bool,
    progress: bool,
) -> None:
    assert config.epochs is not None and config.beta is not None and config.clip is not None
    torch.manual_seed(config.seed)
    model, guide, elbo = build(config, data.image_shape)
    state = run.read_checkpoint() if resume and run.checkpoint_path.exists() else None
    if state is not None:
        run.restore(model, guide, state)
    loss_of = group.averaging(elbo(model, guide).to(device))
    parameters = list(loss_of.parameters())
    optimizer = torch.optim.Adam(parameters, lr=config.lr)
    rows: list[dict[str, float]] = []
    torch.manual_seed(config.seed + ((group.rank + 1) << 32))  # a stream for each process, none the initialisation's
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        rows = state["log"]
        if group.leads:
            run.write_log(rows)  # a kill may have come between the checkpoint and the log
        if group.rank < len(state["rng"]):
            rng, cuda_rng = state["rng"][group.rank]
            torch.set_rng_state(rng)
            if device.type == "cuda" and cuda_rng is not None:
                torch.cuda.set_rng_state(cuda_rng, device)

    images, test = data.train[: config.train_images].to(device), data.test[:LOGGED].to(device)
    steps = math.ceil(len(images) / config.batch_size)
    show_every = max(1, steps // 50)
    pixels = math.prod(data.image_shape)
    # log p(x | z) = -squared error / beta + this, per image
    constant = -pixels / 2 * math.log(math.pi * config.beta)
    bar = tqdm(
        total=config.epochs * steps,
        initial=len(rows) * steps,
        desc=f"{config.variant} {config.data}",
        unit="step",
        disable=not progress,
        leave=None,
        smoothing=0.05,
    )
    # A parameter store of this run's own: parameters of another model of the same names stay out of it.
    with bar, pyro.get_param_store().scope(), pyro.validation_enabled(False):
        for epoch in range(len(rows), config.epochs):
            began = time.perf_counter()
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
            order = torch.randperm(len(images), generator=generator).to(device)
            totals, seen = torch.zeros(3, device=device), 0
            loss_of.train()
            for step, x in enumerate(batches(images, config.batch_size, order)):
                at = epoch + step / steps
                elbo.kl_weight = kl_weight(config, at)
                guide.temperature = temperature(config, at)
                optimizer.zero_grad(set_to_none=True)
                mine, counted = group.share(x)
                try:
                    loss = loss_of(mine) * (config.beta * bool(counted))
                except DivergedError as trouble:
                    raise _diverged(run, config, epoch, str(trouble).splitlines()[0]) from trouble  # Pyro adds shapes
                (loss * (group.number / len(x))).backward()  # the average over processes is that over images
                torch.nn.utils.clip_grad_norm_(parameters, config.clip)
                optimizer.step()
                likelihood, kl = elbo.terms
                if counted:
                    error = (constant * counted - likelihood) * config.beta
                    totals += torch.stack([loss.detach() + config.beta * constant * counted, error, kl])
                    seen += counted
                bar.update()
                if progress and step % show_every == 0:
                    mean = (totals / seen).tolist()
                    shown = dict(zip(("loss", "error", "KL"), mean, strict=True))
                    with torch.no_grad():
                        fano = fano_factor(guide.posterior(x[:64]))
                    if fano is not None:
                        shown["Fano"] = float(fano.mean())
                    bar.set_postfix({k: f"{v:.2f}" for k, v in shown.items()}, refresh=False)
            seconds = time.perf_counter() - began
            mean = (group.total(totals) / len(images)).tolist()
            if not math.isfinite(mean[0]):
                raise _diverged(run, config, epoch, "the loss is not finite")
            states = group.gather(
                (torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)
            )
            if not group.leads:
                continue
            tested = held_out(model, guide, test, seed=config.seed)
            figures = {name: getattr(tested, name) for name in ("squared_error", "kl", "elbo", "mse", "ssim", "fano")}
            rows.append(
                {
                    "epoch": epoch + 1,
                    "loss": mean[0],
                    "squared_error": mean[1],
                    "kl": mean[2],
                    "kl_weight": elbo.kl_weight,
                    "temperature": guide.temperature,
                    "seconds": seconds,
                    **{f"test_{name}": value for name, value in figures.items() if value is not None},
                }
            )
            run.write_checkpoint(
                {
                    "model": model.state_dict(),
                    "guide": guide.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "log": rows,
                    "rng": states,
                }
            )
            run.write_log(rows)
