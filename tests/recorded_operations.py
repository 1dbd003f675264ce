"""A stand-in for a CUDA graph on the CPU: what a function launches, recorded once and launched again in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mipnerf_fast.captured_step import Captured
from mipnerf_fast.trainer import Trainer


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _detached(values: Any) -> Any:
    """The same memory, none of autograd."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, values)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Recording(TorchDispatchMode):
    """Notes every operation with its arguments and where its outputs lie; keeps what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        # By place: storages that an operation has made, and those from before that one has written to, with a copy.
        self.made: dict[int, torch.UntypedStorage] = {}
        self.written: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._keep(argument, value)
        for argument in func._schema.arguments:
            self._keep(argument, kwargs.get(argument.name))
        inputs = _detached((args, kwargs))
        result = func(*args, **kwargs)
        outputs = _tensors(_detached(result))
        self.calls.append((func, *inputs, outputs))
        known = {_place(tensor) for tensor in _tensors(inputs)}
        for output in outputs:
            if _place(output) not in known:
                self.made[_place(output)] = output.untyped_storage()
        return result

    def _keep(self, argument: Any, value: Any) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for tensor in _tensors(value):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.made and storage._cdata not in self.written:
                self.written[storage._cdata] = (storage, storage.clone())

    @torch.no_grad()
    def replay(self) -> None:
        for storage in self.made.values():
            # NaN: whatever a replay reads it has written itself.
            storage.fill_(0xFF)
        for func, args, kwargs, outputs in self.calls:
            for old, new in zip(outputs, _tensors(func(*args, **kwargs)), strict=True):
                if _place(old) != _place(new):
                    old.copy_(new)


def record_operations(function: Callable[[], None]) -> Callable[[], None]:
    """Record a function of tensors on the CPU, as `captured_step.cuda_graphs` does on a GPU: a `Recorder`.

    A replay is the same operations on the same memory. What the function does beside them, every number of Python's
    included, is as it was in the recording. Unlike a CUDA graph it lets the function read values back.
    """
    recording = _Recording()
    with recording:
        function()
    # A capture on a GPU launches nothing.
    for storage, before in recording.written.values():
        storage.copy_(before)
    return recording.replay


def capture(trainer: Trainer) -> Trainer:
    """A trainer that replays its steps: on a GPU as it is, on the CPU with recorded operations."""
    if trainer.device.type == "cpu":
        trainer._halves = tuple(Captured(half, record_operations) for half in trainer._halves)
    assert all(isinstance(half, Captured) for half in trainer._halves)
    return trainer
