"""Training by several processes, as torchrun starts them: each takes its share of every batch, gradients are averaged.

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

from pyro_nbvae.errors import InputError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """The processes that train together, seen from one of them. A single one communicates with nobody."""

    rank: int = 0
    number: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    def share(self, batch: Tensor) -> tuple[Tensor, int]:
        """This process's observations of a batch (N, ...), and how many of them count.

        Where there are fewer observations than processes, those that get none take one that does not count, so that
        all take part in the averaging.
        """
        share = batch[self.rank :: self.number]
        return (share, len(share)) if len(share) else (batch[:1], 0)

    def average_gradients(self, parameters: list[nn.Parameter], scale: float, *, counts: bool = True) -> None:
        """Gradients become ``scale`` times their sum over the processes, those that do not count left out."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient.mul_(scale) if counts else gradient.zero_()
        if self.number > 1:
            together = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(together)
            for gradient, part in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.number > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, item: Item) -> list[Item]:
        """Every process's item, by rank; all wait for each other."""
        items = [item] * self.number
        if self.number > 1:
            dist.all_gather_object(items, item)
        return items


def local_rank() -> int:
    """Local rank from torchrun, 0 otherwise."""
    return _from_torchrun("LOCAL_RANK", 0)


def _from_torchrun(name: str, default: int) -> int:
    """A number in the environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"the environment variable {name} must be a whole number, got {text!r}")
    return int(text)


def processes(device: torch.device) -> Processes:
    """The processes that torchrun started this one with; only this one without torchrun."""
    if _from_torchrun("WORLD_SIZE", 1) == 1:
        return Processes()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"WORLD_SIZE is set and {', '.join(missing)} is not: start with torchrun, or unset WORLD_SIZE")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)  # only at exit: torchrun's store allows one initialisation
    return Processes(dist.get_rank(), dist.get_world_size())
