"""Compiled loops over many latents, shared out among threads.

PyTorch splits every operation among threads, and waits for all of them at its end. Many small operations then wait
often, and where other processes keep the cores busy each wait may last a scheduler's turn, milliseconds. Here a thread
takes whole pieces of the latents through all of a computation, and only the end of all pieces is waited for.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

# Latents in one piece. What is drawn depends on it, and not on the number of threads.
PIECE = 4096


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "pyro_nbvae")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


@functools.cache
def compiled() -> Any:
    """The module of compiled loops, imported where it is first needed: the compiler takes half a second."""
    from pyro_nbvae.distributions import loops

    return loops


def is_compiled_for(x: Tensor) -> bool:
    """Whether the compiled loops take a tensor."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


_own = threading.local()


@contextlib.contextmanager
def unsplit() -> Iterator[None]:
    """Within this context PyTorch splits no operation of this thread, and :func:`in_pieces` has its threads still."""
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


def in_pieces(loop: Callable[..., None], number: int, *arrays: Tensor, options: tuple[Any, ...] = ()) -> None:
    """Calls ``loop(piece, *arrays, *options)`` for all pieces, in as many threads as PyTorch has.

    Args:
        loop: a compiled loop that holds no lock; ``piece`` is the number of the piece.
        number: of latents.
        *arrays: (number,) each, contiguous, on a CPU; each call gets its part of them.
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
