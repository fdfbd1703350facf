"""Training: Adam on the negative ELBO per observation, with KL warm-up and an annealed temperature."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_nbvae.data import BATCH, Data, batches, full_name, load, to_floats
from pyro_nbvae.distributions.relaxations import DivergedError
from pyro_nbvae.errors import InputError, first_line
from pyro_nbvae.infer import SiteKL_ELBO
from pyro_nbvae.metrics import fano_factor, held_out
from pyro_nbvae.runs.build import build, choose_device, resolve, validate
from pyro_nbvae.runs.choice import choose, explain
from pyro_nbvae.runs.config import TrainConfig
from pyro_nbvae.runs.folder import Checkpoint, Run
from pyro_nbvae.runs.processes import Processes, processes
from pyro_nbvae.runs.provenance import provenance
from pyro_nbvae.vae import check_support, evaluating

# A resumed run may differ in these from the one it continues.
_MAY_CHANGE = {"epochs", "device", "data_root"}
# Held-out observations of which the log keeps figures after every epoch; nbvae evaluate measures all.
LOGGED = 2_000
# Figures of the log that are of held-out observations.
_HELD_OUT = ("log_likelihood", "kl", "elbo", "mse", "ssim", "fano")


def kl_weight(config: TrainConfig, epoch: float) -> float:
    """The KL's weight after so many epochs (a fraction counts): rises linearly from 0 to 1."""
    return min(1.0, epoch / config.kl_warmup) if config.kl_warmup else 1.0


def temperature(config: TrainConfig, epoch: float) -> float:
    """The relaxation's temperature after so many epochs: linear from ``temperature_start`` to ``temperature``."""
    assert config.temperature is not None and config.temperature_start is not None and config.anneal_epochs
    done = min(1.0, epoch / config.anneal_epochs)
    return config.temperature if done == 1 else (1 - done) * config.temperature_start + done * config.temperature


def differences(before: TrainConfig, now: TrainConfig) -> dict[str, tuple[object, object]]:
    """The fields in which a run may not differ from the one it continues, and does: what is there, what is here."""
    there, here = dataclasses.asdict(before), dataclasses.asdict(now)
    return {k: (there[k], here[k]) for k in here if k not in _MAY_CHANGE and there[k] != here[k]}


def check_same_run(run: Run, config: TrainConfig) -> None:
    """Raises InputError where a folder's configuration is another one."""
    changed = differences(run.config()[0], config)
    if changed:
        what = ", ".join(f"{k} {there} there, {here} here" for k, (there, here) in changed.items())
        raise InputError(f"{run.folder} holds another run ({what}): give the same flags, or name another --out")


def train(config: TrainConfig, out: str | Path, *, resume: bool = False, progress: bool = True) -> Run:
    """Trains a variant and leaves a run folder.

    The loss is the negative ELBO per observation times the model's ``loss_scale``; under a Gaussian likelihood that is
    the squared error + beta * kl_weight * KL, up to a constant. After each epoch the first 2,000 held-out observations
    are evaluated with exact latents (integer counts), and the checkpoint and the log are written. On one machine the
    same configuration gives the same numbers, whether or not the run was interrupted and resumed. Under torchrun each
    process takes its share of every batch.

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
    if resume and run.checkpoint_path.exists():  # what is left open is as the run has it, not as a preset would now
        before = dataclasses.asdict(run.config()[0])
        config = dataclasses.replace(
            config, **{k: v for k, v in before.items() if getattr(config, k) in (None, "auto")}
        )
        check_same_run(run, dataclasses.replace(config, data=full_name(config.data)))
    device = choose_device(config.device)
    group = processes(device)
    # the leader downloads and prepares what is missing before the others look
    data = load(config.data, config.data_root) if group.leads else None
    group.gather(None)
    if data is None:
        data = load(config.data, config.data_root)
    compared: list[dict[str, Any]] = []
    if config.relaxation == "auto":
        config, compared = choose(config, data, device)
    config = resolve(config, data.event_shape)
    trainer = Trainer(run, config, data, device, group)
    trainer.try_out()
    with trainer.folder(resume) as state:
        if state is not None:
            trainer.resume(state)
        if group.leads:  # last: what failed before has changed nothing
            run.write_config(config, data.event_shape)
            if compared:
                run.write_json("relaxation.json", {"candidates": compared})
                if progress:
                    tqdm.write(explain(compared), file=sys.stderr)
        trainer.run_epochs(progress and group.leads)
    return run


class Trainer:
    """What is trained and how far it has come."""

    def __init__(self, run: Run, config: TrainConfig, data: Data, device: torch.device, group: Processes) -> None:
        self.run, self.config, self.data, self.device, self.group = run, config, data, device, group
        torch.manual_seed(config.seed)
        self.model, self.guide, self.elbo = build(config, data.event_shape)
        self.model.to(device)
        self.guide.to(device)
        for part, whole in (("training", data.train), ("held-out", data.test)):
            check_support(self.model, batches(whole, BATCH), f"{part} data of {data.name}")
        self.parameters = list(self.elbo(self.model, self.guide).parameters())
        prior = set(self.model.prior.parameters()) if config.prior_lr is not None else set()
        groups: list[dict[str, object]] = [{"params": [p for p in self.parameters if p not in prior]}]
        if prior:
            groups.append({"params": [p for p in self.parameters if p in prior], "lr": config.prior_lr})
        self.optimizer = torch.optim.Adam(groups, lr=config.lr)
        self.log: list[dict[str, float]] = []
        self.train_set = data.train[: config.train_size].to(device)
        self.test_set = data.test[:LOGGED].to(device)
        self.steps = math.ceil(len(self.train_set) / config.batch_size)
        # a stream for each process, none the initialisation's
        torch.manual_seed(config.seed + ((group.rank + 1) << 32))

    def try_out(self) -> None:
        """Runs the estimator once on two observations, so that what cannot work says so before anything is written.

        Raises:
            InputError: with the first line of what went wrong.
        """
        x = to_floats(self.train_set[:2])
        devices = [self.device] if self.device.type == "cuda" else []
        with pyro.get_param_store().scope(), pyro.validation_enabled(False), torch.random.fork_rng(devices):
            try:
                self.elbo.loss_and_grads(self.model, self.guide, x)  # type: ignore[attr-defined]
            except DivergedError:
                pass  # training says so, with its remedy
            except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
                kind = type(self.elbo).__name__
                raise InputError(f"{self.config.variant} with {kind} cannot be trained: {first_line(error)}") from error
        self.optimizer.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def folder(self, resume: bool) -> Iterator[Checkpoint | None]:
        """Holds the run folder while it is trained in; gives the checkpoint to continue, if there is one.

        A folder without a checkpoint is no run: what a failed or killed command left there is replaced.

        Raises:
            InputError: for a folder that holds something else, or a run that this configuration may not continue, and
                while another process trains there.
        """
        if self.run.holds_others():
            raise InputError(f"{self.run.folder} exists and holds no run: name a new or empty folder with --out")
        with self.run.locked() if self.group.leads else contextlib.nullcontext():
            state = self.checkpoint(resume) if self.run.checkpoint_path.exists() else None
            self.group.gather(None)  # nobody goes on before the folder is known to be this run's
            yield state

    def checkpoint(self, resume: bool) -> Checkpoint:
        """The checkpoint of the folder, which this configuration must continue."""
        folder = self.run.folder
        if not resume:
            raise InputError(f"{folder} already holds a run: continue it with --resume, or name another --out")
        check_same_run(self.run, self.config)  # again: what was left open there may be decided by now
        state = self.run.read_checkpoint()
        trained = len(state["log"])
        if trained > (self.config.epochs or 0):
            raise InputError(f"{folder} is trained for {trained} epochs already: --epochs must be at least that")
        return state

    def resume(self, state: Checkpoint) -> None:
        """Takes up from a checkpoint."""
        self.run.restore(self.model, self.guide, state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.log = state["log"]
        if self.group.leads:
            self.run.write_log(self.log)  # a kill may have come between the checkpoint and the log
        if self.group.rank < len(state["rng"]):
            rng, cuda_rng = state["rng"][self.group.rank]
            torch.set_rng_state(rng)
            if self.device.type == "cuda" and cuda_rng is not None:
                torch.cuda.set_rng_state(cuda_rng, self.device)

    def run_epochs(self, progress: bool) -> None:
        """Trains the epochs that are missing, and writes checkpoint and log after each."""
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
        # A parameter store of this run's own: parameters of another model of the same names stay out of it.
        with bar, pyro.get_param_store().scope(), pyro.validation_enabled(False):
            for epoch in range(len(self.log), self.config.epochs):
                row = self.train_epoch(epoch, bar)
                states = self.group.gather(self.random_state())
                if self.group.leads:
                    self.log.append(row | self.tested(epoch))
                    self.save(states)

    def tested(self, epoch: int) -> dict[str, float]:
        """The held-out figures of the log.

        Raises:
            InputError: where the parameters or a figure are not finite; the checkpoint is still the one before.
        """
        modules = (self.model, self.guide)
        if not all(bool(p.isfinite().all()) for module in modules for p in module.state_dict().values()):
            raise self.diverged(epoch, "parameters are not finite")
        try:
            found = held_out(self.model, self.guide, self.test_set, seed=self.config.seed)
        except (DivergedError, RuntimeError) as trouble:
            raise self.diverged(epoch, first_line(trouble)) from trouble
        figures = {f"test_{name}": getattr(found, name) for name in _HELD_OUT}
        known = {name: value for name, value in figures.items() if value is not None}
        wrong = next((name for name, value in known.items() if not math.isfinite(value)), None)
        if wrong:
            raise self.diverged(epoch, f"{wrong} is {known[wrong]}")
        return known

    def train_epoch(self, epoch: int, bar: tqdm[NoReturn]) -> dict[str, float]:
        """One pass over the training data; returns its row of the log."""
        began = time.perf_counter()
        totals = torch.zeros(3, device=self.device)  # of loss, log likelihood and KL
        self.model.train()
        self.guide.train()
        for step, x in enumerate(self.batches(epoch)):
            self.set_schedules(epoch + step / self.steps)
            try:
                totals += self.step(x)
            except DivergedError as trouble:  # Pyro adds lines about shapes
                raise self.diverged(epoch, first_line(trouble)) from trouble
            except RuntimeError as trouble:
                if "Poisson rate" not in str(trouble):  # PyTorch's word for a rate that is not a number
                    raise
                raise self.diverged(epoch, first_line(trouble)) from trouble
            bar.update()
            if not bar.disable and step % max(1, self.steps // 50) == 0:
                seen = min(len(self.train_set), (step + 1) * self.config.batch_size)
                self.show(bar, totals * self.group.number / seen, x)
        loss, likelihood, kl = (self.group.total(totals) / len(self.train_set)).tolist()
        if not math.isfinite(loss):
            raise self.diverged(epoch, "the loss is not finite")
        if kl < -self.model.latents:
            raise self.diverged(epoch, f"the sampled KL is {kl:.3g} nats, which no KL can be: its counts are cut off")
        row: dict[str, Any] = {"epoch": epoch + 1, "loss": loss}
        if isinstance(self.elbo, SiteKL_ELBO):
            row |= {"log_likelihood": likelihood, "kl": kl, "kl_weight": self.elbo.kl_weight}
        if self.config.temperature is not None:
            row["temperature"] = getattr(self.guide.relaxation, "temperature", None)
        return row | {"seconds": time.perf_counter() - began}

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """The batches of an epoch, in an order that depends on the seed and the epoch only."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train_set), generator=generator).to(self.device)
        return batches(self.train_set, self.config.batch_size, order)

    def set_schedules(self, epoch: float) -> None:
        """The KL's weight and the relaxation's temperature after so many epochs."""
        if isinstance(self.elbo, SiteKL_ELBO):
            self.elbo.kl_weight = kl_weight(self.config, epoch)
        if self.config.temperature is not None and self.guide.relaxation is not None:
            self.guide.relaxation = self.guide.relaxation.at(temperature(self.config, epoch))

    def step(self, x: Tensor) -> Tensor:
        """One step on a batch; returns this process's sums of the loss in nats, the log likelihood and the KL."""
        self.optimizer.zero_grad(set_to_none=True)
        share, counted = self.group.share(x)
        loss = self.backward(share)
        self.group.average_gradients(self.parameters, self.model.loss_scale / len(x), counts=counted > 0)
        assert self.config.clip is not None
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        if not counted:
            return torch.zeros(3, device=self.device)
        terms = self.elbo.terms if isinstance(self.elbo, SiteKL_ELBO) else (torch.zeros(()), torch.zeros(()))
        return torch.stack([torch.as_tensor(t, device=self.device) for t in (loss, *terms)])

    def backward(self, x: Tensor) -> Tensor | float:
        """The loss on a batch in nats; leaves its gradients with the parameters."""
        if not isinstance(self.elbo, SiteKL_ELBO):
            return self.elbo.loss_and_grads(self.model, self.guide, x)  # type: ignore[attr-defined]
        loss = self.elbo.differentiable_loss(self.model, self.guide, x)  # a tensor: a GPU is not waited for
        loss.backward()
        return loss.detach()

    def show(self, bar: tqdm[NoReturn], mean: Tensor, x: Tensor) -> None:
        """Sets the bar's figures, in nats per observation."""
        shown = dict(zip(("loss", "log p(x|z)", "KL"), mean.tolist(), strict=True))
        if not isinstance(self.elbo, SiteKL_ELBO):
            shown = {"loss": shown["loss"]}
        with evaluating(self.model, self.guide, self.config.seed):  # leaves training's random numbers alone
            fano = fano_factor(self.guide.posterior(x[:64]))
        if fano is not None:
            shown["Fano"] = float(fano.mean())
        bar.set_postfix({k: f"{v:.2f}" for k, v in shown.items()}, refresh=False)

    def random_state(self) -> tuple[Tensor, Tensor | None]:
        """The state of this process's generators."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return torch.get_rng_state(), cuda

    def save(self, states: list[tuple[Tensor, Tensor | None]]) -> None:
        """Writes the checkpoint, then the log."""
        self.run.write_checkpoint(
            {
                "model": self.model.state_dict(),
                "guide": self.guide.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "log": self.log,
                "rng": states,
                "made_by": provenance(self.device),
            }
        )
        self.run.write_log(self.log)

    def diverged(self, epoch: int, what: str) -> InputError:
        """The error of a run whose numbers are finite no more."""
        return InputError(
            f"training diverged in epoch {epoch + 1} ({what}): lower --lr (now {self.config.lr}); {self.run.folder} "
            "keeps the epochs before"
        )
