"""Training, on one page: data, model and guide, Adam on the negative ELBO, and what is written after each epoch."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from pyro_nbvae.arriving import Arriving
from pyro_nbvae.batching import BATCH, Recording, is_pixels, random_subset
from pyro_nbvae.distributions import CountDistribution, Tilted, TiltedMixture, check_family
from pyro_nbvae.distributions.relaxations import DivergedError
from pyro_nbvae.errors import InputError
from pyro_nbvae.infer import SiteKL_ELBO
from pyro_nbvae.infer.elbo import base_distribution
from pyro_nbvae.infer.rates import PRIOR_LR_MULTIPLIER
from pyro_nbvae.metrics import fano_factor, held_out, unit_information
from pyro_nbvae.metrics.held_out import COLLAPSED_NATS
from pyro_nbvae.sampling import posterior_samples, start_prior
from pyro_nbvae.study.build import build, choose_device, load_data, resolve, steps_per_epoch, validation_rows
from pyro_nbvae.study.choice import choose, explain
from pyro_nbvae.study.config import checked
from pyro_nbvae.study.data import Data
from pyro_nbvae.study.data.sources import unlabelled
from pyro_nbvae.study.errors import first_line
from pyro_nbvae.study.folder import Checkpoint, Run, ends_early, identity
from pyro_nbvae.study.processes import Processes, processes
from pyro_nbvae.study.provenance import provenance
from pyro_nbvae.study.tree import TrainConfig, options
from pyro_nbvae.vae import AmortizedGuide, GenerativeModel, evaluating

# Number of held-out observations, at random, that are evaluated for the log after each epoch; nbvae evaluate uses all.
LOGGED = 2_000
# Images in [0, 1] whose values do not reach this are probably on another range.
DIM = 0.1
# Variable that makes cuBLAS deterministic, and the values that do.
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_REPEATABLE = (":4096:8", ":16:8")
# Held-out metrics in the log.
_HELD_OUT = ("log_likelihood", "kl", "elbo", "mse", "ssim")
# Number of held-out observations whose posterior Fano factor is logged: it costs more than the others together.
DISPERSED = 64
# Number of held-out observations from which the number of units that are not collapsed is logged.
INFORMED = 256

_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
}


def train(
    config: TrainConfig[Any],
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
    on_epoch: Callable[[dict[str, float]], object] | None = None,
) -> Run:
    """Train a variant and write a run folder.

    The loss is the negative ELBO per observation, in nats; with ``loss="squared_error"`` it is multiplied by the
    model's ``loss_scale``, which gives squared error + beta * kl_weight * KL for a Gaussian likelihood.

    After each epoch the first 2,000 held-out observations are evaluated with integer counts, and the checkpoint and the
    log are written. On one machine the same configuration gives the same numbers, also if the run was interrupted and
    resumed. Under torchrun each process takes a part of every batch.

    Args:
        config: configuration of the run (:func:`~pyro_nbvae.study.config.configure`).
        out: the run folder: new, empty or, with ``resume``, that of a run with the same configuration.
        resume: continue from the last complete epoch; a finished run is not changed.
        progress: show a progress bar on standard error.
        on_epoch: called with the row of the log after each epoch; an exception ends the training.

    Returns:
        The run.

    Raises:
        InputError: for an invalid configuration, for data, a device or a folder that cannot be used, if training
            diverges, and as :func:`deterministic`.

    Example::

        >>> import tempfile
        >>> from pyro_nbvae.study.config import configure
        >>> config = configure(train_size=50, latents=3, encoder="linear", decoder="linear", epochs=1, device="cpu")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = train(config, folder, progress=False)
        ...     sorted(path.name for path in run.folder.glob("*.*") if path.suffix != ".lock")
        ['.lock', 'checkpoint.pt', 'config.json', 'log.csv']
    """
    config, run = checked(config), Run(out)
    if resume and run.checkpoint_path.exists():
        config = run.completed(config)
    device = choose_device(config.device)
    with deterministic(config.training.deterministic, device):
        group = processes(device)
        # rank 0 downloads and prepares missing data before the other processes load them
        data = load_data(config) if group.leads else None
        group.gather(None)
        if data is None:
            data = load_data(config)
        compared: list[dict[str, Any]] = []
        if getattr(config.relaxation, "kind", None) == "auto":
            config, compared = choose(config, data, device)
        config = resolve(config, data.event_shape, data)
        trainer = Trainer(run, config, data, device, group)
        trainer.try_out()
        with trainer.folder(resume) as state:
            if state is not None:
                trainer.restore(state)
            if group.leads:  # last, so that an earlier error leaves the folder unchanged
                if state is None:  # metrics of a run whose checkpoint is gone are not this run's
                    run.remove_metrics()
                run.write_config(config, data.event_shape)
                if compared:
                    run.write_json("relaxation.json", {"candidates": compared})
                    if progress:
                        tqdm.write(explain(compared), file=sys.stderr)
            trainer.fit(progress and group.leads, on_epoch)
            group.gather(None)  # no process goes on before the last checkpoint is written
    return run


@contextlib.contextmanager
def deterministic(chosen: bool, device: torch.device) -> Iterator[None]:
    """Context in which PyTorch uses only deterministic operations, if that is chosen; its settings are restored.

    cuBLAS reads its variable when it is first used: in a process that has used it before, set it at the start.

    Raises:
        InputError: on a GPU, if the variable has a value with which cuBLAS is not deterministic.
    """
    if not chosen:
        yield
        return
    given = os.environ.get(CUBLAS_WORKSPACE, _REPEATABLE[0])
    if device.type == "cuda" and given not in _REPEATABLE:
        raise InputError(
            f"deterministic training on a GPU needs {CUBLAS_WORKSPACE}={' or '.join(_REPEATABLE)}, got {given!r}: "
            "change or unset this environment variable"
        )
    cudnn = torch.backends.cudnn
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, workspace = cudnn.benchmark, os.environ.get(CUBLAS_WORKSPACE)
    try:
        torch.use_deterministic_algorithms(True)
        cudnn.benchmark = False
        os.environ.setdefault(CUBLAS_WORKSPACE, _REPEATABLE[0])
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop(CUBLAS_WORKSPACE, None)


def tensorboard_writer() -> Any:
    """Return the class of TensorBoard's writers."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs TensorBoard: pip install 'pyro-nbvae[tensorboard]'") from None
    return SummaryWriter


class Trainer:
    """A training run, in the order in which things happen.

    Args:
        run: the run folder.
        config: a resolved configuration.
        data: the data set.
        device: device of the training.
        group: the process group.
    """

    def __init__(self, run: Run, config: TrainConfig[Any], data: Data, device: torch.device, group: Processes) -> None:
        self.run, self.config, self.data, self.device, self.group = run, config, data, device, group
        self.options = config.training
        self.validated = self.options.validated

        # data
        x = data.training[: config.train_size]
        chosen = validation_rows(config, data)
        self.train_set, self.validation_set = x[~chosen].to(device), random_subset(x[chosen], LOGGED).to(device)
        self.test_set = random_subset(data.held_out, LOGGED).to(device)
        self.steps = steps_per_epoch(len(self.train_set), self.options.batch_size)

        # model, guide and estimator
        torch.manual_seed(config.seed)
        self.model, self.guide, self.elbo = build(config, data.event_shape)
        self.model.to(device)
        self.guide.to(device)
        self.guide.initialize(self.train_set)
        self.model.initialize(self.train_set)
        # the check goes to the data: to move the parameters is cheap, to move all data as floats is not
        self.model.to("cpu")
        for part, whole in (("training", data.training), ("held-out", data.held_out)):
            for batch in whole.split(BATCH):
                self.model.check_support(batch.floats(), f"{part} data of {data.name}")
        self.model.to(device)
        self.warn()

        # optimiser and learning rates
        self.parameters = list(self.elbo(self.model, self.guide).parameters())
        multiplier = options(config).get("prior_lr_multiplier", PRIOR_LR_MULTIPLIER)
        joint, likelihood = self.model.joint_prior, self.model.likelihood
        paces = [(multiplier, self.lr_factor, list(self.model.prior.parameters()))]
        if isinstance(likelihood, torch.nn.Module):
            paces.append((PRIOR_LR_MULTIPLIER, self.lr_factor, list(likelihood.parameters())))
        for each, own in joint.by_rate() if joint is not None else ():
            paces.append((each.lr_multiplier, self.decaying_lr_factor if each.lr_decays else self.lr_factor, own))
        apart = {p for *_, own in paces for p in own}
        paces = [(1.0, self.lr_factor, [p for p in self.parameters if p not in apart]), *(p for p in paces if p[2])]
        self.optimizer = torch.optim.Adam([{"params": own, "lr": m * self.options.lr} for m, _, own in paces])
        factors: list[Any] = [factor for _, factor, _ in paces]
        self.scheduler = LambdaLR(self.optimizer, factors)
        self.loss_scale = 1.0 if self.options.loss == "nats" else self.model.loss_scale

        # state
        self.board = tensorboard_writer() if self.options.tensorboard and group.leads else None
        self.log: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None
        # the noise of a process: another one for each, and not that of the initialisation; torch's generator for the
        # CPU reads 32 bits of a seed
        torch.manual_seed((int(np.random.SeedSequence(config.seed).generate_state(1)[0]) + group.rank) % 2**32)

    def warn(self) -> None:
        """Warn of data that another likelihood or another range would describe better."""
        data, images = self.data, self.data.images and self.data.limits == (0, 1)
        if not self.group.leads:
            return
        if self.config.likelihood.kind == "gaussian" and data.values == "counts":
            warnings.warn(
                f"{data.name} holds counts: a likelihood of counts describes them better than a Gaussian (--likelihood "
                "poisson, negative_binomial or com_poisson)",
                stacklevel=4,
            )
        never = int(self.train_set.never_observed.reshape(-1, data.event_shape[-1]).all(0).sum()) if data.counted else 0
        if never:
            warnings.warn(
                f"{never} of {data.event_shape[-1]} neurons of {data.name} are never observed in the training data: "
                "their rates are not learned",
                stacklevel=4,
            )
        if data.unused:
            warnings.warn(f"{data.name}: {unlabelled(data)}", stacklevel=4)
        largest = float(data.training.filled(0).max()) / (255 if is_pixels(data.train) else 1)
        if images and largest < DIM:
            warnings.warn(
                f"the images of {data.name} are nearly black: their largest value is {largest:.3g} of 1; save them "
                "divided by it",
                stacklevel=4,
            )

    def try_out(self) -> None:
        """Run the estimator once on two observations, to report errors before any file is written.

        Buffers, such as the moments of a batch normalisation, are restored.

        Raises:
            InputError: with the first line of the error.
        """
        batch = self.train_set[: min(2, self.options.batch_size)].floats()
        buffers = [(each, each.clone()) for module in (self.model, self.guide) for each in module.buffers()]
        devices = [self.device] if self.device.type == "cuda" else []
        what = f"{self.config.variant} with {type(self.elbo).__name__} cannot be trained"
        with pyro.get_param_store().scope(), pyro.validation_enabled(False), torch.random.fork_rng(devices):
            try:
                loss = self.elbo.loss_and_grads(self.model, self.guide, batch.x, **batch.given)  # type: ignore[attr-defined]
                check_families(self.model, self.guide, batch)
            except (ValueError, TypeError, NotImplementedError, RuntimeError, IndexError) as error:
                raise InputError(f"{what}: {first_line(error)}") from error
            if isinstance(loss, tuple) or math.isinf(float(loss)):  # if it is nan, training says so, with advice
                raise InputError(f"{what}: its loss is {loss}; choose an ELBO whose loss is a number")
        for buffer, before in buffers:
            buffer.copy_(before)
        self.optimizer.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def folder(self, resume: bool) -> Iterator[Checkpoint | None]:
        """Context that locks the run folder for training; yields the checkpoint to resume from, or None.

        A folder without a checkpoint does not count as a run: files that a killed command left there are replaced.

        Raises:
            InputError: for a folder with other files, for a run that this configuration cannot continue, while
                another process trains in it, and if the processes under torchrun do not see the same run.
        """
        run = self.run
        if run.holds_others():
            raise InputError(f"{run.folder} exists and holds no run: choose a new or empty folder with --out")
        with run.locked() if self.group.leads else contextlib.nullcontext():
            state = None
            if run.checkpoint_path.exists():
                if not resume:
                    raise InputError(
                        f"{run.folder} already holds a run: continue it with --resume, or choose another --out"
                    )
                run.check_same(self.config)  # again, now that all values are resolved
                state = run.read_checkpoint()
                run.check_data(state, self.data)
                if len(state["log"]) > (self.options.epochs or 0):
                    raise InputError(
                        f"{run.folder} is already trained for {len(state['log'])} epochs: the number of epochs must "
                        "not be smaller"
                    )
            # also waits until the folder is known to belong to this run
            trained = len(state["log"]) if state is not None else 0
            self.group.check_same({**identity(self.config), "data": self.data.fingerprint, "trained epochs": trained})
            yield state

    def restore(self, state: Checkpoint) -> None:
        """Continue from a checkpoint."""
        self.run.restore(self.model, self.guide, state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        each = (self.optimizer.param_groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas)
        for group, lr, factor in zip(*each, strict=True):
            # of this number of epochs, which may be another
            group["lr"] = lr * factor(self.scheduler.last_epoch)
        self.log, self.best = state["log"], state["best"]
        if self.group.leads:
            self.run.write_log(self.log)  # the process may have been killed between checkpoint and log
        if self.group.rank < len(state["rng"]):
            rng, cuda_rng = state["rng"][self.group.rank]
            torch.set_rng_state(rng)
            if self.device.type == "cuda" and cuda_rng is not None:
                torch.cuda.set_rng_state(cuda_rng, self.device)

    def fit(self, progress: bool, on_epoch: Callable[[dict[str, float]], object] | None = None) -> None:
        """Train the remaining epochs; write the checkpoint and the log after each."""
        epochs = self.options.epochs or 0
        bar = tqdm(
            total=epochs * self.steps,
            initial=len(self.log) * self.steps,
            desc=self.config.title,
            unit="step",
            disable=not progress,
            leave=None,
            smoothing=0.05,
        )
        board: Any = contextlib.nullcontext()
        if self.board is not None:
            board = self.board(str(self.run.folder / "tensorboard"), purge_step=len(self.log) + 1)
        # A separate parameter store, because another model may have parameters of the same names.
        with (
            bar,
            board as writer,
            pyro.get_param_store().scope(),
            pyro.validation_enabled(False),
        ):
            for epoch in range(len(self.log), epochs):
                if self.stopped():
                    break
                row, state = self.train_epoch(epoch, bar), self.random_state()
                if epoch == 0:
                    with self.finite(epoch):
                        self.start_joint_prior()
                rows, states = zip(*self.group.gather((row | self.tested(epoch), state)), strict=True)
                self.log.append(row := rows[0])
                if self.group.leads:
                    self.show(bar, row)
                    self.save(list(states))
                    if writer is not None:
                        for name, value in row.items():
                            writer.add_scalar(name, value, epoch + 1)
                if on_epoch is not None:
                    on_epoch(row)

    def train_epoch(self, epoch: int, bar: tqdm[NoReturn]) -> dict[str, float]:
        """Train for one epoch and return its row of the log.

        Raises:
            InputError: if training diverges.
        """
        began = time.perf_counter()
        totals = torch.zeros(3, device=self.device)  # loss, log likelihood and KL
        arriving: Arriving[float] = Arriving()  # totals for the bar, with the factor that makes them means
        self.model.train()
        self.guide.train()
        for step, batch in enumerate(self.batches(epoch)):
            self.anneal(epoch + step / self.steps)
            with self.finite(epoch):
                totals += self.step(batch)
            if bar.update() or (step == 0 and not bar.disable):  # when the bar is drawn
                seen = min(len(self.train_set), (step + 1) * self.options.batch_size)
                arriving.send(totals, self.group.number / seen)
                for values, factor in arriving.arrived()[-1:]:
                    self.show(bar, self.means(values * factor))
        row = self.means(self.group.total(totals) / len(self.train_set))
        if not math.isfinite(row["loss"]):
            raise self.diverged(epoch, "the loss is not finite")
        if row.get("kl", 0.0) < -self.model.latents:
            max_count = getattr(self.config.relaxation, "max_count", None)
            cut = "" if max_count is None else f": counts are truncated at {max_count}"
            raise self.diverged(epoch, f"the Monte Carlo KL is {row['kl']:.3g} nats, a KL is never negative{cut}")
        if isinstance(self.elbo, SiteKL_ELBO):
            row["kl_weight"] = self.elbo.kl_weight
        if hasattr(self.config.relaxation, "temperature_at"):
            row["temperature"] = self.guide.relaxation.temperature
        return {"epoch": epoch + 1, **row, "seconds": time.perf_counter() - began}

    def batches(self, epoch: int) -> Iterator[Recording]:
        """Iterate over the batches of an epoch, in an order that depends only on the seed and the epoch."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train_set), generator=generator).to(self.device)
        sizes = [self.options.batch_size] * (self.steps - 1)
        for chosen in order.split([*sizes, len(order) - sum(sizes)]):
            yield self.train_set[chosen].floats()

    def done(self, step: int) -> float:
        """Return the part of the whole training that is done at a step."""
        whole, part = divmod(step, self.steps)
        return (whole + part / self.steps) / (self.options.epochs or 1)

    def lr_factor(self, step: int) -> float:
        """Return the factor of the learning rates at a step."""
        return _SCHEDULES[self.options.lr_schedule](self.done(step))

    def decaying_lr_factor(self, step: int) -> float:
        """Return the factor of the learning rate of a prior's network, which falls to 0 on any schedule."""
        return _SCHEDULES["cosine"](self.done(step))

    def start_joint_prior(self) -> None:
        """Move a joint prior to the posteriors of training data; its optimiser begins again."""
        joint = self.model.joint_prior
        if joint is None or not joint.starts:
            return
        if self.group.leads:
            start_prior(self.model, self.guide, self.train_set, seed=self.config.seed)
        started = self.group.gather([p.detach().cpu() for p in joint.parameters()])[0]
        for parameter, values in zip(joint.parameters(), started, strict=True):
            parameter.data.copy_(values)
            self.optimizer.state.pop(parameter, None)

    def anneal(self, epoch: float) -> None:
        """Set the KL weight and the temperature for an epoch, not necessarily whole."""
        if isinstance(self.elbo, SiteKL_ELBO):
            warmup = self.config.vae.estimator.kl_warmup
            self.elbo.kl_weight = min(1.0, epoch / warmup) if warmup else 1.0
        if hasattr(self.config.relaxation, "temperature_at") and self.guide.relaxation is not None:
            self.guide.relaxation = self.guide.relaxation.at(self.config.relaxation.temperature_at(epoch))

    def step(self, batch: Recording) -> Tensor:
        """Take one optimiser step on a batch; return this process's sums of loss, log likelihood and KL, in nats."""
        self.optimizer.zero_grad(set_to_none=True)
        share, counted = self.group.share(batch)
        loss: Tensor | float
        if isinstance(self.elbo, SiteKL_ELBO):
            loss = self.elbo.differentiable_loss(
                self.model, self.guide, share.x, **share.given
            )  # a tensor: no wait for the GPU
            loss.backward()
            loss = loss.detach()
        else:
            loss = self.elbo.loss_and_grads(self.model, self.guide, share.x, **share.given)  # type: ignore[attr-defined]
        self.group.average_gradients(self.parameters, self.loss_scale / len(batch), counts=counted > 0)
        assert self.options.clip is not None
        torch.nn.utils.clip_grad_norm_(self.parameters, self.options.clip)
        self.optimizer.step()
        self.scheduler.step()
        if not counted:
            return torch.zeros(3, device=self.device)
        terms = self.elbo.terms if isinstance(self.elbo, SiteKL_ELBO) else (torch.zeros(()), torch.zeros(()))
        return torch.stack([torch.as_tensor(t, device=self.device) for t in (loss, *terms)])

    def tested(self, epoch: int) -> dict[str, float]:
        """Return the held-out metrics of the log, of rank 0; with validation also the ELBO on the held-out tenth.

        Raises:
            InputError: if a parameter or a metric is not finite, and as :func:`check_families`; the previous checkpoint
                is kept.
        """
        if not self.group.leads:
            return {}
        modules = (self.model, self.guide)
        if not all(bool(p.isfinite().all()) for module in modules for p in module.state_dict().values()):
            raise self.diverged(epoch, "parameters are not finite")
        with self.finite(epoch), evaluating(self.model, self.guide, self.config.seed):
            first, informing = (self.model.to_input(random_subset(self.test_set, n)) for n in (DISPERSED, INFORMED))
            check_families(self.model, self.guide, first[:8])
            fano = fano_factor(self.guide.posterior(first.x, **first.given))
            informed = unit_information(self.guide, informing)
            prior = self.model.prior_distribution()
            used = None
            if isinstance(prior, TiltedMixture):
                z = posterior_samples(self.model, self.guide, self.test_set, LOGGED)
                used = prior.responsibilities(z).argmax(-1).unique().numel()
        with self.finite(epoch):
            found = held_out(
                self.model, self.guide, self.test_set, units=False, limits=self.data.limits, seed=self.config.seed
            )
            values = {f"test_{name}": getattr(found, name) for name in _HELD_OUT}
            values["test_fano"] = None if fano is None else float(fano.mean())
            values["test_active_units"] = float((informed >= COLLAPSED_NATS).sum())
            values["test_components"] = used
            if self.validated:
                seed = self.config.seed
                values["validation_elbo"] = held_out(
                    self.model, self.guide, self.validation_set, units=False, seed=seed
                ).elbo
        known: dict[str, float] = {name: value for name, value in values.items() if value is not None}
        wrong = next((name for name, value in known.items() if not math.isfinite(value)), None)
        if wrong:
            raise self.diverged(epoch, f"{wrong} is {known[wrong]}")
        if self.validated and (self.best is None or known["validation_elbo"] > self.best["validation_elbo"]):
            states = {"model": self.model.state_dict(), "guide": self.guide.state_dict()}
            kept = {part: {k: v.clone() for k, v in state.items()} for part, state in states.items()}
            self.best = {"epoch": epoch + 1, "validation_elbo": known["validation_elbo"], **kept}
        return known

    def stopped(self) -> bool:
        """Whether the last epochs have brought no better objective."""
        return ends_early(self.log, self.options.patience)

    def means(self, values: Tensor) -> dict[str, float]:
        """Return loss, and for an estimator that has them log likelihood and KL, in nats per observation."""
        names = ("loss", "log_likelihood", "kl") if isinstance(self.elbo, SiteKL_ELBO) else ("loss",)
        return dict(zip(names, values.tolist(), strict=False))

    def show(self, bar: tqdm[NoReturn], row: dict[str, float]) -> None:
        """Update the values on the progress bar, in nats per observation; the Fano factor is the log's."""
        headings = {"loss": "loss", "log_likelihood": "log p(x|z)", "kl": "KL"}
        shown = {heading: row[name] for name, heading in headings.items() if name in row}
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
                "best": self.best,
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "log": self.log,
                "rng": states,
                "made_by": provenance(self.device),
                "data": self.data.fingerprint,
                "limits": self.data.limits,
                "never_observed": self.train_set.never_observed.cpu(),
            }
        )
        self.run.write_log(self.log)

    @contextlib.contextmanager
    def finite(self, epoch: int) -> Iterator[None]:
        """Context in which a distribution's error about its parameters is reported, if the model's are not finite."""
        try:
            yield
        except (ValueError, RuntimeError) as trouble:
            if not isinstance(trouble, DivergedError) and self.is_finite():
                raise
            raise self.diverged(epoch, first_line(trouble)) from trouble

    def is_finite(self) -> bool:
        """Whether parameters, encoder outputs and log masses of the prior are finite."""
        if not all(bool(p.isfinite().all()) for p in self.parameters):
            return False
        with evaluating(self.model, self.guide, self.config.seed):
            batch = self.model.to_input(self.test_set[:8])
            prior = self.model.prior_distribution()
            z = self.model.factorised_prior().sample(torch.Size([8])) if isinstance(prior, Tilted) else None
            found = [*self.guide.encode(batch.x, **batch.given), *([] if z is None else [prior.log_prob(z)])]
        return all(bool(each.isfinite().all()) for each in found)

    def diverged(self, epoch: int, what: str) -> InputError:
        """Return the error for a run that has diverged."""
        multiplier = options(self.config).get("prior_lr_multiplier", 1.0)
        or_prior = f" or --prior-lr-multiplier (now {multiplier:g})" if multiplier != 1 else ""
        return InputError(
            f"training diverged in epoch {epoch + 1} ({what}): lower --lr (now {self.options.lr:g}){or_prior}; "
            f"{self.run.folder} keeps the previous epochs"
        )


def check_families(model: GenerativeModel, guide: AmortizedGuide, batch: Recording) -> None:
    """Check the count families of all sites, as validation does; it is off in training.

    Raises:
        InputError: as :func:`~pyro_nbvae.distributions.check_family`.
    """
    for program in (model, guide):
        for site in poutine.trace(program).get_trace(batch.x, **batch.given).nodes.values():
            if site["type"] == "sample":
                distribution = base_distribution(cast(Distribution, site["fn"]))
                if isinstance(distribution, CountDistribution):
                    check_family(distribution)
