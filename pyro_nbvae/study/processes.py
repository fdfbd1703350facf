"""Data-parallel training under torchrun: every process takes a part of each batch, and gradients are averaged.

Example::

    torchrun --nproc-per-node 2 --no-python nbvae train --variant EX-C --data mnist --out runs/a
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyro_nbvae.batching import Recording
from pyro_nbvae.errors import InputError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """The group of training processes, seen from one of them. A single process does not communicate.

    Args:
        rank: rank of this process.
        number: number of processes.
    """

    rank: int = 0
    number: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress (rank 0)."""
        return self.rank == 0

    def share(self, batch: Recording) -> tuple[Recording, int]:
        """Return this process's part of a batch (N, ...), and the number of observations in it.

        If there are fewer observations than processes, a process without any gets one observation and the number 0: it
        takes part in the communication, but its gradient is not used.
        """
        share = batch[self.rank :: self.number]
        return (share, len(share)) if len(share) else (batch[:1], 0)

    def average_gradients(self, parameters: list[nn.Parameter], scale: float, *, counts: bool = True) -> None:
        """Replace each gradient by ``scale`` times its sum over all processes.

        Args:
            parameters: the parameters, on every process in the same order.
            scale: factor of the sum.
            counts: whether the gradients of this process are included.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient.mul_(scale) if counts else gradient.zero_()
        if self.number > 1:
            together = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(together)
            for gradient, part in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes (in place)."""
        if self.number > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, item: Item) -> list[Item]:
        """Return the items of all processes, ordered by rank. Waits for all processes."""
        items = [item] * self.number
        if self.number > 1:
            dist.all_gather_object(items, item)
        return items

    def check_same(self, things: dict[str, object]) -> None:
        """Check that all processes have the same things. Waits for all processes.

        Raises:
            InputError: on all processes, if one differs: gradients of different models would be averaged.
        """
        first, *others = self.gather(things)
        for name, value in first.items():
            if any(other[name] != value for other in others):
                raise InputError(
                    f"the processes differ in their {name}: start all with the same command, with data and --out on a "
                    "disk that they share"
                )


def local_rank() -> int:
    """Return the local rank that torchrun set, or 0 without torchrun."""
    return _from_torchrun("LOCAL_RANK", 0)


def _from_torchrun(name: str, default: int) -> int:
    """Return an environment variable of torchrun as a whole number."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"the environment variable {name} must be a whole number, got {text!r}")
    return int(text)


def processes(device: torch.device) -> Processes:
    """Return the process group that torchrun started; without torchrun, this process alone.

    Raises:
        InputError: if an environment variable of torchrun is missing or is not a whole number.
    """
    if _from_torchrun("WORLD_SIZE", 1) == 1:
        return Processes()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"WORLD_SIZE is set and {', '.join(missing)} is not: start with torchrun, or unset WORLD_SIZE")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)  # only at exit: torchrun allows one initialisation per process
    return Processes(dist.get_rank(), dist.get_world_size())
