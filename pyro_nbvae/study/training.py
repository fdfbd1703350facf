"""Training: Adam on the negative ELBO per observation, with KL warm-up and an annealed temperature."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution
from tqdm.auto import tqdm

from pyro_nbvae.batching import BATCH, batches, is_pixels, to_floats
from pyro_nbvae.distributions import CountDistribution, check_family
from pyro_nbvae.distributions.relaxations import DivergedError
from pyro_nbvae.errors import InputError
from pyro_nbvae.infer import SiteKL_ELBO
from pyro_nbvae.infer.elbo import base_distribution
from pyro_nbvae.likelihoods import Gaussian
from pyro_nbvae.metrics import fano_factor, held_out
from pyro_nbvae.study.build import build, choose_device, resolve, steps_per_epoch, validate
from pyro_nbvae.study.choice import choose, explain
from pyro_nbvae.study.config import TrainConfig
from pyro_nbvae.study.data import Data, full_name, load
from pyro_nbvae.study.errors import first_line
from pyro_nbvae.study.folder import Checkpoint, Run
from pyro_nbvae.study.processes import Processes, processes
from pyro_nbvae.study.provenance import provenance
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, evaluating

# Options that may change when a run is resumed.
_MAY_CHANGE = {"epochs", "device", "data_root"}
# Number of held-out observations that are evaluated for the log after each epoch; nbvae evaluate uses all.
LOGGED = 2_000
# Images in [0, 1] whose values do not reach this are probably on another range.
DIM = 0.1
# Held-out metrics in the log.
_HELD_OUT = ("log_likelihood", "kl", "elbo", "mse", "ssim")
# Number of held-out observations whose posterior Fano factor is logged: it costs more than the others together.
DISPERSED = 64


def kl_weight(config: TrainConfig, epoch: float) -> float:
    """Return the KL weight at an epoch (not necessarily whole); it rises linearly from 0 to 1."""
    return min(1.0, epoch / config.kl_warmup) if config.kl_warmup else 1.0


def temperature(config: TrainConfig, epoch: float) -> float:
    """Return the temperature at an epoch; linear from ``temperature_start`` to ``temperature``."""
    assert config.temperature is not None and config.temperature_start is not None and config.anneal_epochs
    done = min(1.0, epoch / config.anneal_epochs)
    return config.temperature if done == 1 else (1 - done) * config.temperature_start + done * config.temperature


def lr_factor(config: TrainConfig, epoch: float) -> float:
    """Return the factor of the learning rates at an epoch: half a cosine from 1 to 0, or 1."""
    assert config.epochs is not None
    return 0.5 * (1 + math.cos(math.pi * epoch / config.epochs)) if config.lr_schedule == "cosine" else 1.0


def noise_seed(seed: int, rank: int) -> int:
    """Return the seed of the noise of one process: another one for each, and not that of the initialisation.

    It has 32 bits, of which torch's generator for the CPU reads no more.
    """
    return (int(np.random.SeedSequence(seed).generate_state(1)[0]) + rank) % 2**32


def differences(before: TrainConfig, now: TrainConfig) -> dict[str, tuple[object, object]]:
    """Return the fields that differ between two configurations of one run but may not, as {field: (before, now)}."""
    there, here = dataclasses.asdict(before), dataclasses.asdict(now)
    return {k: (there[k], here[k]) for k in here if k not in _MAY_CHANGE and there[k] != here[k]}


def check_same_run(run: Run, config: TrainConfig) -> None:
    """Raise InputError if the folder contains a run with another configuration.

    Its data may have moved: whether they are the same, their fingerprint tells.
    """
    changed = {k: both for k, both in differences(run.config()[0], config).items() if k != "data"}
    if changed:
        what = ", ".join(f"{k} {there} there, {here} here" for k, (there, here) in changed.items())
        raise InputError(f"{run.folder} holds another run ({what}): give the same flags, or choose another --out")


def train(config: TrainConfig, out: str | Path, *, resume: bool = False, progress: bool = True) -> Run:
    """Train a variant and write a run folder.

    The loss is the negative ELBO per observation, in nats; with the presets published and paper it is multiplied by the
    model's ``loss_scale``, which gives squared error + beta * kl_weight * KL for a Gaussian likelihood.

    After each epoch the first 2,000 held-out observations are evaluated with exact latents (integer counts), and the
    checkpoint and the log are written. On one machine the same configuration gives the same numbers, also if the run
    was interrupted and resumed. Under torchrun each process takes a part of every batch.

    Args:
        config: configuration of the run.
        out: the run folder: new, empty or, with ``resume``, that of a run with the same configuration.
        resume: continue from the last complete epoch; a finished run is not changed.
        progress: show a progress bar on standard error.

    Returns:
        The run.

    Raises:
        InputError: for an invalid configuration, for data, a device or a folder that cannot be used, and if training
            diverges.

    Example::

        >>> import tempfile
        >>> config = TrainConfig(train_size=50, latents=3, encoder="linear", decoder="linear", epochs=1, device="cpu")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = train(config, folder, progress=False)
        ...     sorted(path.name for path in run.folder.glob("*.*") if path.suffix != ".lock")
        ['.lock', 'checkpoint.pt', 'config.json', 'log.csv']
    """
    validate(config)
    run = Run(out)
    if resume and run.checkpoint_path.exists():  # open values are taken from the run, not from a preset
        config = run.renamed(config)
        before = dataclasses.asdict(run.config()[0])
        config = dataclasses.replace(
            config, **{k: v for k, v in before.items() if getattr(config, k) in (None, "auto")}
        )
        check_same_run(run, dataclasses.replace(config, data=full_name(config.data)))
    device = choose_device(config.device)
    group = processes(device)
    # rank 0 downloads and prepares missing data before the other processes load them
    data = load(config.data, config.data_root) if group.leads else None
    group.gather(None)
    if data is None:
        data = load(config.data, config.data_root)
    compared: list[dict[str, Any]] = []
    if config.relaxation == "auto":
        config, compared = choose(config, data, device)
    config = resolve(config, data.event_shape, data)
    trainer = Trainer(run, config, data, device, group)
    trainer.try_out()
    with trainer.folder(resume) as state:
        if state is not None:
            trainer.resume(state)
        if group.leads:  # last, so that an earlier error leaves the folder unchanged
            if state is None:  # metrics of a run whose checkpoint is gone are not this run's
                run.remove_metrics()
            run.write_config(config, data.event_shape)
            if compared:
                run.write_json("relaxation.json", {"candidates": compared})
                if progress:
                    tqdm.write(explain(compared), file=sys.stderr)
        trainer.run_epochs(progress and group.leads)
        group.gather(None)  # no process goes on before the last checkpoint is written
    return run


def check_families(model: GenerativeModel, guide: AmortizedGuide, x: Tensor) -> None:
    """Check the count families of all sites, as validation does; it is off in training.

    Raises:
        InputError: as :func:`~pyro_nbvae.distributions.check_family`.
    """
    for program in (model, guide):
        for site in poutine.trace(program).get_trace(x).nodes.values():
            if site["type"] == "sample":
                distribution = base_distribution(cast(Distribution, site["fn"]))
                if isinstance(distribution, CountDistribution):
                    check_family(distribution)


class Trainer:
    """State of a training run: model, guide, estimator, optimiser, data and log.

    Args:
        run: the run folder.
        config: a resolved configuration.
        data: the data set.
        device: device of the training.
        group: the process group.
    """

    def __init__(self, run: Run, config: TrainConfig, data: Data, device: torch.device, group: Processes) -> None:
        self.run, self.config, self.data, self.device, self.group = run, config, data, device, group
        torch.manual_seed(config.seed)
        self.model, self.guide, self.elbo = build(config, data.event_shape)
        self.model.to(device)
        self.guide.to(device)
        self.train_set = data.train[: config.train_size].to(device)
        self.test_set = data.test[:LOGGED].to(device)
        self.guide.initialize(self.train_set)
        self.model.initialize(self.train_set)
        for part, whole in (("training", data.train), ("held-out", data.test)):
            for x in batches(whole, BATCH):
                self.model.check_support(x, f"{part} data of {data.name}")
        if isinstance(self.model.likelihood, Gaussian) and group.leads and data.values == "counts":
            warnings.warn(
                f"{data.name} holds counts: --likelihood poisson or negative_binomial describes them better than "
                "gaussian",
                stacklevel=3,
            )
        largest = float(data.train.max()) / (255 if is_pixels(data.train) else 1)
        if group.leads and data.images and data.limits == (0, 1) and largest < DIM:
            warnings.warn(
                f"the images of {data.name} are nearly black: their largest value is {largest:.3g} of 1; save them "
                "divided by it",
                stacklevel=3,
            )
        self.parameters = list(self.elbo(self.model, self.guide).parameters())
        prior = set(self.model.prior.parameters()) if config.prior_lr is not None else set()
        assert config.lr is not None and config.batch_size is not None
        groups: list[dict[str, Any]] = [{"params": [p for p in self.parameters if p not in prior], "lr": config.lr}]
        if prior:
            groups.append({"params": [p for p in self.parameters if p in prior], "lr": config.prior_lr})
        self.batch_size: int = config.batch_size
        self.lrs = [group["lr"] for group in groups]
        self.optimizer = torch.optim.Adam(groups)
        # published runs have the gradients of squared errors, others of nats, whatever the units of the data
        self.loss_scale = 1.0 if config.preset == "default" else self.model.loss_scale
        self.log: list[dict[str, float]] = []
        self.steps = steps_per_epoch(len(self.train_set), self.batch_size)
        torch.manual_seed(noise_seed(config.seed, group.rank))

    def try_out(self) -> None:
        """Run the estimator once on two observations, to report errors before any file is written.

        Buffers, such as the moments of a batch normalisation, are restored.

        Raises:
            InputError: with the first line of the error.
        """
        x = to_floats(self.train_set[: min(2, self.batch_size)])
        buffers = [(each, each.clone()) for module in (self.model, self.guide) for each in module.buffers()]
        devices = [self.device] if self.device.type == "cuda" else []
        with pyro.get_param_store().scope(), pyro.validation_enabled(False), torch.random.fork_rng(devices):
            kind = type(self.elbo).__name__
            try:
                loss = self.elbo.loss_and_grads(self.model, self.guide, x)  # type: ignore[attr-defined]
                check_families(self.model, self.guide, x)
            except (ValueError, TypeError, NotImplementedError, RuntimeError, IndexError) as error:
                raise InputError(f"{self.config.variant} with {kind} cannot be trained: {first_line(error)}") from error
            if isinstance(loss, tuple) or math.isinf(float(loss)):  # if it is nan, training says so, with advice
                raise InputError(
                    f"{self.config.variant} with {kind} cannot be trained: its loss is {loss}; choose an ELBO whose "
                    "loss is a number"
                )
        for buffer, before in buffers:
            buffer.copy_(before)
        self.optimizer.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def folder(self, resume: bool) -> Iterator[Checkpoint | None]:
        """Context that locks the run folder for training; yields the checkpoint to resume from, or None.

        A folder without a checkpoint is not a run: files that a failed or killed command left there are replaced.

        Raises:
            InputError: for a folder with other files, for a run that this configuration cannot continue, while
                another process trains in it, and if the processes under torchrun do not see the same run.
        """
        if self.run.holds_others():
            raise InputError(f"{self.run.folder} exists and holds no run: choose a new or empty folder with --out")
        with self.run.locked() if self.group.leads else contextlib.nullcontext():
            state = self.checkpoint(resume) if self.run.checkpoint_path.exists() else None
            trained = len(state["log"]) if state is not None else 0
            # also waits until the folder is known to belong to this run
            flags = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in _MAY_CHANGE}
            self.group.check_same({**flags, "data": self.data.fingerprint, "trained epochs": trained})
            yield state

    def checkpoint(self, resume: bool) -> Checkpoint:
        """Return the checkpoint of the folder, after checking that this configuration can continue it."""
        folder = self.run.folder
        if not resume:
            raise InputError(f"{folder} already holds a run: continue it with --resume, or choose another --out")
        check_same_run(self.run, self.config)  # again, now that all values are resolved
        state = self.run.read_checkpoint()
        self.run.check_data(state, self.data)
        trained = len(state["log"])
        if trained > (self.config.epochs or 0):
            raise InputError(f"{folder} is already trained for {trained} epochs: --epochs must not be smaller")
        return state

    def resume(self, state: Checkpoint) -> None:
        """Continue from a checkpoint."""
        self.run.restore(self.model, self.guide, state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.log = state["log"]
        if self.group.leads:
            self.run.write_log(self.log)  # the process may have been killed between checkpoint and log
        if self.group.rank < len(state["rng"]):
            rng, cuda_rng = state["rng"][self.group.rank]
            torch.set_rng_state(rng)
            if self.device.type == "cuda" and cuda_rng is not None:
                torch.cuda.set_rng_state(cuda_rng, self.device)

    def run_epochs(self, progress: bool) -> None:
        """Train the remaining epochs; write the checkpoint and the log after each."""
        assert self.config.epochs is not None
        bar = tqdm(
            total=self.config.epochs * self.steps,
            initial=len(self.log) * self.steps,
            desc=self.config.title,
            unit="step",
            disable=not progress,
            leave=None,
            smoothing=0.05,
        )
        # A separate parameter store, because another model may have parameters of the same names.
        with bar, pyro.get_param_store().scope(), pyro.validation_enabled(False):
            for epoch in range(len(self.log), self.config.epochs):
                row = self.train_epoch(epoch, bar)
                states = self.group.gather(self.random_state())
                if self.group.leads:
                    self.log.append(row | self.tested(epoch))
                    self.show(bar, *(row.get(name, 0.0) for name in ("loss", "log_likelihood", "kl")))
                    self.save(states)

    def tested(self, epoch: int) -> dict[str, float]:
        """Return the held-out metrics of the log.

        Raises:
            InputError: if a parameter or a metric is not finite, and as :func:`check_families`; the previous checkpoint
                is kept.
        """
        modules = (self.model, self.guide)
        if not all(bool(p.isfinite().all()) for module in modules for p in module.state_dict().values()):
            raise self.diverged(epoch, "parameters are not finite")
        with evaluating(self.model, self.guide, self.config.seed):
            check_families(self.model, self.guide, to_floats(self.test_set[:8]))
            fano = fano_factor(self.guide.posterior(to_floats(self.test_set[:DISPERSED])))
        with self.finite(epoch):
            found = held_out(self.model, self.guide, self.test_set, units=False, seed=self.config.seed)
        figures = {f"test_{name}": getattr(found, name) for name in _HELD_OUT}
        figures["test_fano"] = None if fano is None else float(fano.mean())
        known = {name: value for name, value in figures.items() if value is not None}
        wrong = next((name for name, value in known.items() if not math.isfinite(value)), None)
        if wrong:
            raise self.diverged(epoch, f"{wrong} is {known[wrong]}")
        return known

    def train_epoch(self, epoch: int, bar: tqdm[NoReturn]) -> dict[str, float]:
        """Train for one epoch and return its row of the log.

        Raises:
            InputError: if training diverges.
        """
        began = time.perf_counter()
        totals = torch.zeros(3, device=self.device)  # loss, log likelihood and KL
        self.model.train()
        self.guide.train()
        for step, x in enumerate(self.batches(epoch)):
            self.set_schedules(epoch + step / self.steps)
            with self.finite(epoch):
                totals += self.step(x)
            if bar.update() or (step == 0 and not bar.disable):  # when the bar is drawn: reading totals waits for a GPU
                seen = min(len(self.train_set), (step + 1) * self.batch_size)
                self.show(bar, *(totals * self.group.number / seen).tolist())
        loss, likelihood, kl = (self.group.total(totals) / len(self.train_set)).tolist()
        if not math.isfinite(loss):
            raise self.diverged(epoch, "the loss is not finite")
        if kl < -self.model.latents:
            cut = f": counts are cut off at {self.config.max_count}" if self.config.max_count is not None else ""
            raise self.diverged(epoch, f"the sampled KL is {kl:.3g} nats, a KL is never negative{cut}")
        row: dict[str, Any] = {"epoch": epoch + 1, "loss": loss}
        if isinstance(self.elbo, SiteKL_ELBO):
            row |= {"log_likelihood": likelihood, "kl": kl, "kl_weight": self.elbo.kl_weight}
        if self.config.temperature is not None:
            row["temperature"] = getattr(self.guide.relaxation, "temperature", None)
        return row | {"seconds": time.perf_counter() - began}

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """Iterate over the batches of an epoch, in an order that depends only on the seed and the epoch."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train_set), generator=generator).to(self.device)
        sizes = [self.batch_size] * (self.steps - 1)
        for chosen in order.split([*sizes, len(order) - sum(sizes)]):
            yield to_floats(self.train_set[chosen])

    def set_schedules(self, epoch: float) -> None:
        """Set the learning rates, the KL weight and the temperature for an epoch (not necessarily whole)."""
        for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
            group["lr"] = lr * lr_factor(self.config, epoch)
        if isinstance(self.elbo, SiteKL_ELBO):
            self.elbo.kl_weight = kl_weight(self.config, epoch)
        if self.config.temperature is not None and self.guide.relaxation is not None:
            self.guide.relaxation = self.guide.relaxation.at(temperature(self.config, epoch))

    def step(self, x: Tensor) -> Tensor:
        """Take one optimiser step on a batch; return this process's sums of loss, log likelihood and KL, in nats."""
        self.optimizer.zero_grad(set_to_none=True)
        share, counted = self.group.share(x)
        loss = self.backward(share)
        self.group.average_gradients(self.parameters, self.loss_scale / len(x), counts=counted > 0)
        assert self.config.clip is not None
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        if not counted:
            return torch.zeros(3, device=self.device)
        terms = self.elbo.terms if isinstance(self.elbo, SiteKL_ELBO) else (torch.zeros(()), torch.zeros(()))
        return torch.stack([torch.as_tensor(t, device=self.device) for t in (loss, *terms)])

    def backward(self, x: Tensor) -> Tensor | float:
        """Compute the gradients of the loss on a batch, and return the loss in nats."""
        if not isinstance(self.elbo, SiteKL_ELBO):
            return self.elbo.loss_and_grads(self.model, self.guide, x)  # type: ignore[attr-defined]
        loss = self.elbo.differentiable_loss(self.model, self.guide, x)  # a tensor: no wait for the GPU
        loss.backward()
        return loss.detach()

    def show(self, bar: tqdm[NoReturn], loss: float, likelihood: float, kl: float) -> None:
        """Update the values on the progress bar, in nats per observation; the Fano factor is the log's."""
        shown = {"loss": loss}
        if isinstance(self.elbo, SiteKL_ELBO):
            shown |= {"log p(x|z)": likelihood, "KL": kl}
        if self.log and "test_fano" in self.log[-1]:
            shown["Fano"] = self.log[-1]["test_fano"]
        bar.set_postfix({k: f"{v:.2f}" for k, v in shown.items()}, refresh=False)

    def random_state(self) -> tuple[Tensor, Tensor | None]:
        """Return the random states of this process, of the CPU and of the GPU."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return torch.get_rng_state(), cuda

    def save(self, states: list[tuple[Tensor, Tensor | None]]) -> None:
        """Write the checkpoint, then the log."""
        self.run.write_checkpoint(
            {
                "model": self.model.state_dict(),
                "guide": self.guide.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "log": self.log,
                "rng": states,
                "made_by": provenance(self.device),
                "data": self.data.fingerprint,
                "limits": self.data.limits,
            }
        )
        self.run.write_log(self.log)

    @contextlib.contextmanager
    def finite(self, epoch: int) -> Iterator[None]:
        """Context in which a distribution's error about its parameters is reported, if the model's are not finite."""
        try:
            yield
        except (ValueError, RuntimeError) as trouble:
            if all(bool(p.isfinite().all()) for p in self.parameters) and not isinstance(trouble, DivergedError):
                raise
            raise self.diverged(epoch, first_line(trouble)) from trouble

    def diverged(self, epoch: int, what: str) -> InputError:
        """Return the error for a run that has diverged."""
        lr, prior_lr = self.config.lr, self.config.prior_lr
        or_prior = f" or --prior-lr (now {prior_lr:g})" if prior_lr else ""
        return InputError(
            f"training diverged in epoch {epoch + 1} ({what}): lower --lr (now {lr:g}){or_prior}; {self.run.folder} "
            "keeps the previous epochs"
        )
