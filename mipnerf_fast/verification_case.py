"""What `verify` calls: one operation on given arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call of a public operator: its output tensors by name, from the arrays that it differentiates.

    operation, name: of the row. inputs: names of the arrays that are differentiated, and moved to find out how
    sensitive the result is. run: from the arrays and the output dtype wanted. make: the arrays, in float64 but holding
    what float32 holds; None: those of the exact model. unit: what a row of the first axis of an output is; None: a ray
    of samples. served: for an operation with several engines, why this one runs for a device, a dtype and an output
    dtype, or None where it does not; there is no row then.
    """

    operation: str
    name: str
    inputs: tuple[str, ...]
    run: Callable[[Tensors, torch.dtype | None], Tensors]
    differentiable: bool = True
    out_dtypes: tuple[torch.dtype | None, ...] = (None,)
    in_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    make: Callable[[torch.Generator], Tensors] | None = None
    unit: str | None = None
    served: Callable[[torch.device, torch.dtype, torch.dtype | None], str | None] | None = None
