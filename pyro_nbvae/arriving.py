"""Values of a GPU that are read on the host once they have arrived there, without a wait."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch
from torch import Tensor

About = TypeVar("About")


class Arriving(Generic[About]):
    """Values on their way from a device to the host, each with what is known about it there.

    Those on a CPU arrive at once. While a CUDA graph is captured nothing is sent and nothing arrives: the graph would
    copy to the same memory at each of its runs.

    Example::

        >>> arriving: Arriving[str] = Arriving()
        >>> arriving.send(torch.ones(2), "ones")
        >>> [(values.tolist(), about) for values, about in arriving.arrived()]
        [([1.0, 1.0], 'ones')]
        >>> arriving.arrived()
        []
    """

    def __init__(self) -> None:
        self._coming: deque[tuple[torch.cuda.Event | None, Tensor, About]] = deque()

    def send(self, values: Tensor, about: About) -> None:
        """Start a copy of values, which may be changed afterwards."""
        values = values.detach()
        if not values.is_cuda:
            if not values.is_meta:  # it has no values
                self._coming.append((None, values.to("cpu", copy=True), about))
        elif not torch.cuda.is_current_stream_capturing():
            # only a copy to pinned memory is asynchronous
            host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(values.device))
            self._coming.append((event, host, about))

    def arrived(self) -> list[tuple[Tensor, About]]:
        """Return what has arrived since the last call, in the order in which it was sent."""
        found: list[tuple[Tensor, About]] = []
        while True:
            try:
                first = self._coming.popleft()  # before it is looked at: another thread may do the same
            except IndexError:
                return found
            event, host, about = first
            if event is not None and (torch.cuda.is_current_stream_capturing() or not event.query()):
                self._coming.appendleft(first)
                return found
            found.append((host, about))
