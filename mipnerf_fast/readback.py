"""Numbers of the device on their way to the host, while the device goes on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

# How often the host looks while it waits.
_PAUSE = 5e-5


class Readback:
    """A queue of copies of one small tensor, each taken at its place in the stream of work.

    On CUDA a copy goes to pinned memory and an event tells when it is there; on the CPU it is there at once.

    Args:
        source: the tensor to copy, the same one every time.
        depth: copies that may be on their way; that far the host may run ahead of the device.
    """

    def __init__(self, source: Tensor, depth: int) -> None:
        self._source, self.depth = source, depth
        on_cuda = source.is_cuda
        self._free = deque(
            torch.empty(source.shape, dtype=source.dtype, pin_memory=on_cuda) for _ in range(depth)
        )
        self._sent: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self._sent)

    @property
    def is_full(self) -> bool:
        """Whether one has to be received before the next is sent."""
        return not self._free

    def send(self) -> None:
        """Copy the source as it is when the work launched so far is done."""
        copy = self._free.popleft()
        copy.copy_(self._source, non_blocking=True)
        event = None
        if self._source.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._sent.append((copy, event))

    def receive(self, wait: bool, patience: Callable[[float], None] = lambda seconds: None) -> list[float]:
        """The oldest copy as numbers; empty where there is none, or none has arrived and wait is false.

        Args:
            wait: for it to arrive.
            patience: called with the seconds waited so far; may raise.
        """
        if not self._sent:
            return []
        copy, event = self._sent[0]
        start = time.monotonic()
        while event is not None and not event.query():
            if not wait:
                return []
            patience(time.monotonic() - start)
            time.sleep(_PAUSE)
        self._sent.popleft()
        numbers: list[float] = copy.tolist()
        self._free.append(copy)
        return numbers
