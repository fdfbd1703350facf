"""Where the runs of a grid are done: in processes on this machine, or on a cluster through submitit.

A pool has ``submit(function, *arguments)``, which calls ``function(*arguments, device)`` somewhere and returns what has
``done()`` and ``exception()``, and is a context that leaves nothing running behind.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from pyro_nbvae.errors import InputError


class Job(Protocol):
    """Work that was submitted."""

    def done(self) -> bool:
        """Whether it has ended, well or badly."""

    def exception(self) -> BaseException | None:
        """Why it failed, or None."""


class Pool(Protocol):
    """Takes work."""

    def __enter__(self) -> Pool: ...

    def __exit__(self, *reason: object) -> None:
        """Ends what is still running."""

    def submit(self, function: Callable[..., None], *arguments: object) -> Job:
        """Has ``function(*arguments, device)`` called."""


class JobError(RuntimeError):
    """What went wrong in a job, in one line."""


def one_line(error: BaseException) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _work(sender: Connection, threads: int, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    """What a process does: calls the function and sends None, or why it failed."""
    import torch
    from threadpoolctl import threadpool_limits
    from tqdm.auto import tqdm

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    tqdm.set_lock(threading.RLock())  # its own is shared among processes, and left behind by one that is ended
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):  # of numpy and scipy, whose threads would fight over the cores
            function(*arguments)
        sender.send(None)
    except Exception as error:
        sender.send(one_line(error))


class LocalProcesses:
    """A process for every job, so that one that is killed takes no other with it; so many at a time.

    Args:
        jobs: how many side by side.
        preload: modules that every process finds imported.
        device: for all of them; ``auto`` deals out the GPUs, or is the CPU, whose cores are dealt out.

    Raises:
        InputError: for fewer than one job.
    """

    def __init__(self, jobs: int, device: str = "auto", *, preload: Sequence[str] = ()) -> None:
        import torch

        if jobs < 1:
            raise InputError(f"--jobs must be at least 1, got {jobs}")
        gpus = torch.cuda.device_count() if device == "auto" else 0
        self._free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for slot in range(jobs):
            self._free.put(f"cuda:{slot % gpus}" if gpus else "cpu" if device == "auto" else device)
        self._threads = max(1, torch.get_num_threads() // jobs)
        # A server that has everything imported forks each process: starting one costs next to nothing.
        context = multiprocessing.get_context
        self._context = context("spawn") if os.name == "nt" else context("forkserver")
        if os.name != "nt":
            self._context.set_forkserver_preload(list(preload))
        self._waiting = ThreadPoolExecutor(jobs)
        self._running: set[BaseProcess] = set()
        # Starting a process also collects the exit codes of finished ones. Each code can be read only once, so only one
        # thread may do this at a time.
        self._one_at_a_time = threading.Lock()
        self._ending = False

    def __enter__(self) -> LocalProcesses:
        return self

    def __exit__(self, *reason: object) -> None:
        self._waiting.shutdown(wait=False, cancel_futures=True)
        with self._one_at_a_time:
            self._ending = True
            for process in list(self._running):
                process.terminate()
        self._waiting.shutdown()

    def submit(self, function: Callable[..., None], *arguments: object) -> Future[None]:
        """Queues ``function(*arguments, device)``; module-level functions and what pickles, as ever."""
        return self._waiting.submit(self._run, function, arguments)

    def _run(self, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
        device = self._free.get()
        try:
            receiver, sender = self._context.Pipe(duplex=False)
            work = (sender, self._threads, function, (*arguments, device))
            process = self._context.Process(target=_work, args=work, daemon=True)
            with self._one_at_a_time:
                if self._ending:
                    raise JobError("the grid was ended before it began")
                process.start()
                self._running.add(process)
            sender.close()
            killed = False
            try:
                failure = receiver.recv()
            except EOFError:
                killed = True
            with self._one_at_a_time:
                process.join()
            self._running.discard(process)
            if killed:
                failure = f"its process was killed (exit code {process.exitcode})"
        finally:
            self._free.put(device)
        if failure is not None:
            raise JobError(failure)


class Cluster:
    """Jobs through submitit, each on a node of its own.

    Args:
        name: submitit's executor, ``slurm`` or ``local``.
        folder: for submitit's logs and pickles; every node must see it and the run folders.
        options: submitit's parameters as ``key=value``, such as ``timeout_min=600``.
        device: on the node.

    Raises:
        InputError: without submitit, and for an executor or a parameter that it does not take.
    """

    def __init__(self, name: str, folder: Path, options: tuple[str, ...] = (), device: str = "auto") -> None:
        try:
            import submitit
        except ImportError:
            raise InputError("--cluster needs submitit: pip install 'pyro-nbvae[cluster]'") from None
        self._device = device
        self._jobs: list[submitit.Job[None]] = []
        try:
            self._executor = submitit.AutoExecutor(folder, cluster=name)
            pairs = (option.partition("=")[::2] for option in options)
            self._executor.update_parameters(**{k: int(v) if v.isdigit() else v for k, v in pairs})
        except Exception as error:
            raise InputError(f"submitit refuses --cluster {name} {' '.join(options)}: {one_line(error)}") from None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *reason: object) -> None:
        for job in self._jobs:
            if not job.done():
                job.cancel()

    def submit(self, function: Callable[..., None], *arguments: object) -> Job:
        """Sends ``function(*arguments, device)`` to the cluster."""
        self._jobs.append(self._executor.submit(function, *arguments, self._device))
        return self._jobs[-1]
