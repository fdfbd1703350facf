"""Running compiled loops over many elements in several threads.

PyTorch splits every operation among threads, and waits for all of them at the end of the operation. Many small
operations mean many waits, and while other processes keep the cores busy each wait may last a scheduler's time slice,
which is milliseconds. Here each thread takes whole chunks of elements through the entire computation, and there is
only one wait, at the end of all chunks.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor

# Elements in one chunk. The draws depend on it, but not on the number of threads.
CHUNK_ELEMENTS = 4096


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "pyro_nbvae")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


_own = threading.local()


@contextlib.contextmanager
def unsplit() -> Iterator[None]:
    """Context in which PyTorch does not split this thread's operations, and :func:`in_chunks` still has all threads."""
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


def in_chunks(loop: Callable[..., None], number: int, *arrays: Tensor, options: tuple[object, ...] = ()) -> None:
    """Call ``loop(chunk, *arrays, *options)`` for all chunks, in as many threads as PyTorch has.

    Args:
        loop: a compiled loop that releases the GIL; ``chunk`` is the number of the chunk.
        number: number of elements.
        *arrays: (number, ...) each, on a CPU, outputs contiguous; each call gets the slices of its chunk.
        options: further arguments, the same in every call.
    """
    views = [a.detach().contiguous().numpy() for a in arrays]
    starts = iter(range(0, number, CHUNK_ELEMENTS))

    def run() -> None:
        for start in starts:  # next() of a range's iterator is atomic
            loop(start // CHUNK_ELEMENTS, *(v[start : start + CHUNK_ELEMENTS] for v in views), *options)

    threads = min(getattr(_own, "threads", torch.get_num_threads()), -(-number // CHUNK_ELEMENTS))
    helpers = [_pool(threads - 1).submit(run) for _ in range(threads - 1)]
    try:
        run()
    finally:
        wait([helper for helper in helpers if not helper.cancel()])
    for helper in helpers:
        if not helper.cancelled():
            helper.result()
