"""A function of the device alone, recorded once as a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Calls before the recording: libraries choose their kernels and take their workspaces in the first ones.
_CALLS_BEFORE = 3


class Captured:
    """Calls a function, at first as it is, then from a recording of what it launched.

    All calls, whether recorded or not, go to one stream of its own: gradients are accumulated on the stream that they
    were first accumulated on, and a recording must not wait for another. The function must read and write the same
    tensors every time and leave its results in them.

    Args:
        function: without arguments.
        stream: where it runs.
    """

    def __init__(self, function: Callable[[], None], stream: torch.cuda.Stream) -> None:
        self._function, self._stream = function, stream
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Do it once, in the stream's order."""
        if self._graph is None and self._calls < _CALLS_BEFORE:
            self._calls += 1
            self._function()
            return
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # What other threads do with CUDA meanwhile (NCCL's, TensorBoard's) does not spoil the recording.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._function()
            self._graph = graph
        self._graph.replay()
