"""Noise, and processing many latents in pieces that fit in a core's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Numbers in one piece of noise, which limits the memory at any rate. On a CPU, a few pieces fit in a core's cache.
PIECE = {"cpu": 1 << 16, "cuda": 1 << 22}

Noise = Callable[[int, Tensor], Tensor]


def unit_exponentials(width: int, like: Tensor) -> Tensor:
    """Draw Exponential(1) noise, (width, n), for the n latents of ``like``."""
    uniform = torch.rand(width, len(like), dtype=like.dtype, device=like.device)
    # rand returns multiples of eps / 2 in [0, 1); its 0 stands for all values below half of that.
    return uniform.clamp_(min=torch.finfo(like.dtype).eps / 4).log_().neg_()


def number_in_piece(width: int, device: torch.device) -> int:
    """Return how many latents are one piece of about PIECE numbers, ``width`` for each latent."""
    return max(1, PIECE.get(device.type, PIECE["cuda"]) // max(1, width))


def pieces(count: int, width: int, device: torch.device) -> Iterator[slice]:
    """Return slices of ``count`` latents, one piece each, with ``width`` numbers for each latent."""
    size = number_in_piece(width, device)
    return (slice(start, min(start + size, count)) for start in range(0, max(1, count), size))


def running_sum(x: Tensor) -> Tensor:
    """Cumulative sum along the first axis; in place if the axis is short, which is faster than a scan."""
    if (len(x) > 8 and x[0].numel() < 512) or len(x) > 64:
        return x.cumsum(0)
    for k in range(1, len(x)):
        x[k] += x[k - 1]
    return x


def take(x: Tensor, here: slice | Tensor) -> Tensor:
    """Return the rows of a slice, or of indices."""
    return x[here] if isinstance(here, slice) else x.index_select(0, here)


def put(x: Tensor, here: slice | Tensor, part: Tensor) -> None:
    """Overwrite the rows of a slice, or of indices."""
    if isinstance(here, slice):
        x[here] = part
    else:
        x.index_copy_(0, here, part)


def add(total: Tensor, here: slice | Tensor, part: Tensor) -> None:
    """Add to a total; the first round, which goes over all latents in slices, sets it instead."""
    if isinstance(here, slice):
        total[here] = part
    else:
        total.index_add_(0, here, part)
