"""Running compiled loops over many latents in several threads.

PyTorch splits every operation among threads, and waits for all of them at the end of the operation. Many small
operations mean many waits, and while other processes keep the cores busy each wait may last a scheduler's time slice,
which is milliseconds. Here each thread takes whole pieces of the latents through the entire computation, and there is
only one wait, at the end of all pieces.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from types import ModuleType

import torch
from torch import Tensor

# Latents in one piece. The draws depend on it, but not on the number of threads.
PIECE = 4096


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "pyro_nbvae")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


@functools.cache
def compiled() -> ModuleType:
    """Return the module of compiled loops, imported at the first call: the compiler takes half a second."""
    from pyro_nbvae.distributions import loops

    return loops


def is_compiled_for(x: Tensor) -> bool:
    """Whether the compiled loops can process this tensor: single or double precision on a CPU."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


_own = threading.local()


@contextlib.contextmanager
def unsplit() -> Iterator[None]:
    """Context in which PyTorch does not split this thread's operations, and :func:`in_pieces` still has all threads."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    _own.threads = before
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        del _own.threads


def in_pieces(loop: Callable[..., None], number: int, *arrays: Tensor, options: tuple[object, ...] = ()) -> None:
    """Call ``loop(piece, *arrays, *options)`` for all pieces, in as many threads as PyTorch has.

    Args:
        loop: a compiled loop that releases the GIL; ``piece`` is the number of the piece.
        number: number of latents.
        *arrays: (number, ...) each, contiguous, on a CPU; each call gets the slices of its piece.
        options: further arguments, the same in every call.
    """
    views = [a.detach().numpy() for a in arrays]
    starts = iter(range(0, number, PIECE))

    def run() -> None:
        for start in starts:  # next() of a range's iterator is atomic
            loop(start // PIECE, *(v[start : start + PIECE] for v in views), *options)

    threads = min(getattr(_own, "threads", torch.get_num_threads()), -(-number // PIECE))
    helpers = [_pool(threads - 1).submit(run) for _ in range(threads - 1)]
    try:
        run()
    finally:
        wait([helper for helper in helpers if not helper.cancel()])
    for helper in helpers:
        if not helper.cancelled():
            helper.result()
