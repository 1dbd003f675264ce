"""What torch holds at once while something runs: the most bytes in storages made inside of it, its outputs included."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """A context that counts; `peak` is the most so far, in bytes.

    It sees what the operators of torch's dispatcher return, on every allocator and however freed pages are taken again;
    not what an operator takes and frees inside of itself, nor the buffers of torch.compile's kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then look at what lives."""
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                key = tensor.untyped_storage()._cdata
                if key not in self._alive:
                    self._known.add(key)
        result = func(*args, **(kwargs or {}))
        for key in [key for key, (reference, _) in self._alive.items() if reference.expired()]:
            del self._alive[key]
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result
