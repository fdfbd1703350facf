"""Pools that run the cells of a grid: processes on this machine, or a cluster through submitit.

A pool is a context manager that stops its remaining jobs at the end. ``submit(function, *arguments)`` calls
``function(*arguments, device)`` in a worker and returns a job with ``done()`` and ``exception()``.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, get_args

from pyro_nbvae.errors import InputError
from pyro_nbvae.study.scales import ClusterName

# Executors of submitit that --cluster takes; None runs on this machine.
CLUSTERS = (None, *get_args(ClusterName))
_KILLED = "its process was killed"


class JobError(RuntimeError):
    """Error of a job, with a one-line message."""


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _work(sender: Connection, threads: int, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    """Main function of a worker process: call the function, then send None or the error message."""
    import torch
    from threadpoolctl import threadpool_limits
    from tqdm.auto import tqdm

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    tqdm.set_lock(threading.RLock())  # the default lock is shared between processes and stays locked if one is killed
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):  # for NumPy and SciPy, whose threads would compete for the cores
            function(*arguments)
        sender.send(None)
    except Exception as error:
        sender.send(one_line(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class LocalProcesses(AbstractContextManager["LocalProcesses"]):
    """Pool that runs every job in a separate process, so that a killed process does not affect the others.

    Args:
        jobs: number of parallel jobs.
        preload: modules to import once, before the processes are forked.
        device: device of all jobs; ``auto`` distributes the GPUs or, without one, the CPU cores.
    """

    def __init__(self, jobs: int, device: str = "auto", *, preload: Sequence[str] = ()) -> None:
        import torch

        gpus = torch.cuda.device_count() if device == "auto" else 0
        self._free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for slot in range(jobs):
            self._free.put(f"cuda:{slot % gpus}" if gpus else "cpu" if device == "auto" else device)
        self._threads = max(1, torch.get_num_threads() // jobs)
        # A fork server with all imports makes it cheap to start a process.
        self._context: Any = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
        if os.name != "nt":
            self._context.set_forkserver_preload(list(preload))
        self._waiting = ThreadPoolExecutor(jobs)
        self._running: set[BaseProcess] = set()
        # Starting a process also collects the exit codes of finished ones. Each code can be read only once, so only one
        # thread may do this at a time.
        self._one_at_a_time = threading.Lock()
        self._ending = False

    def __exit__(self, *reason: object) -> None:
        self._waiting.shutdown(wait=False, cancel_futures=True)
        with self._one_at_a_time:
            self._ending = True
            for process in list(self._running):
                process.terminate()
        self._waiting.shutdown()

    def submit(self, function: Callable[..., None], *arguments: object) -> Future[None]:
        """Submit ``function(*arguments, device)``. The function and its arguments must be picklable."""
        return self._waiting.submit(self._run, function, arguments)

    def _run(self, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
        device = self._free.get()
        receiver, sender = self._context.Pipe(duplex=False)
        work = (sender, self._threads, function, (*arguments, device))
        process = self._context.Process(target=_work, args=work, daemon=True)
        try:
            with self._one_at_a_time:
                if self._ending:
                    raise JobError("the grid was stopped before this job began")
                process.start()
                self._running.add(process)
            sender.close()
            try:
                failure = receiver.recv()
            except EOFError:
                failure = _KILLED
            with self._one_at_a_time:
                process.join()
            if failure is not None:
                raise JobError(f"{failure} (exit code {process.exitcode})" if failure == _KILLED else failure)
        finally:
            self._running.discard(process)
            self._free.put(device)


class Cluster(AbstractContextManager["Cluster"]):
    """Pool that submits every job to a cluster through submitit.

    Args:
        name: executor of submitit, ``slurm`` or ``local``.
        folder: folder for the logs and pickles of submitit; all nodes must have access to it and to the run folders.
        options: parameters of submitit as ``key=value``, such as ``timeout_min=600``.
        device: device on the node.

    Raises:
        InputError: if submitit is not installed, or for an executor or a parameter that it does not accept.
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

    def __exit__(self, *reason: object) -> None:
        for job in self._jobs:
            if not job.done():
                job.cancel()

    def submit(self, function: Callable[..., None], *arguments: object) -> Any:
        """Submit ``function(*arguments, device)`` to the cluster."""
        self._jobs.append(self._executor.submit(function, *arguments, self._device))
        return self._jobs[-1]
