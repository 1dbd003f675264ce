"""A function of the device alone, recorded once as a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Makes of a function one that does the same again; called once, it may run the function but changes nothing itself.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]
# Calls before the recording: libraries choose their kernels and take their workspaces in the first ones.
_CALLS_BEFORE = 3


class Captured:
    """Calls a function, at first as it is, then from a recording of what it launched.

    The function must read and write the same tensors every time and leave its results in them; whatever else it reads,
    a number of Python's for instance, is in every replay what it was in the recording.

    Args:
        function: without arguments.
        record: what records it: `cuda_graphs`.
    """

    def __init__(self, function: Callable[[], None], record: Recorder) -> None:
        self._function, self._record = function, record
        self._calls = 0
        self._replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        """Do it once, in the stream's order."""
        if self._calls < _CALLS_BEFORE:
            self._calls += 1
            self._function()
            return
        if self._replay is None:
            self._replay = self._record(self._function)
        self._replay()


def cuda_graphs(stream: torch.cuda.Stream) -> Recorder:
    """Record functions as CUDA graphs on a stream.

    All calls, whether recorded or not, go to this one stream: gradients are accumulated on the stream that they were
    first accumulated on, and a recording must not wait for another.
    """

    def record(function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # What other threads do with CUDA meanwhile (NCCL's, TensorBoard's) does not spoil the recording.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            function()
        return graph.replay

    return record
