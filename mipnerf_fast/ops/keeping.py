"""What a module makes of its parameters for its kernels, made once while they do not change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

Made = TypeVar("Made")


class KeepsWeights(nn.Module):
    """A module that makes something of its parameters: 16-bit copies, folded weights, numbers on the host."""

    def __init__(self) -> None:
        super().__init__()
        # None outside of `keeping_weights`.
        self._kept: dict[Any, Any] | None = None

    def keep(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returns; while weights are kept, what it returned for this key before."""
        if self._kept is None:
            return make()
        if key not in self._kept:
            self._kept[key] = make()
        made: Made = self._kept[key]
        return made


@contextmanager
def keeping_weights(module: nn.Module) -> Iterator[None]:
    """Within the context the parameters of every `KeepsWeights` in a module do not change.

    What they make of them is then made once, and kept: from chunk to chunk of a picture, or in one pass of a training
    step and the next.
    """
    keepers = [part for part in module.modules() if isinstance(part, KeepsWeights)]
    before = [keeper._kept for keeper in keepers]
    for keeper in keepers:
        keeper._kept = {} if keeper._kept is None else keeper._kept
    try:
        yield
    finally:
        for keeper, kept in zip(keepers, before, strict=True):
            keeper._kept = kept
