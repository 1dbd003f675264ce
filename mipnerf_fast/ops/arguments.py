"""Checks of the operators' arguments: every message names operator, argument, what was wanted and what was given.

They look at shapes, dtypes and devices only; looking at values would wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# What the raw operators call them: csrc/composite/composite_math.h.
DENSITY_ACTIVATIONS: dict[str | None, int] = {None: 0, "softplus": 1, "relu": 2}
RGB_ACTIVATIONS: dict[str | None, int] = {None: 0, "sigmoid": 1}


def require(holds: bool, operator: str, argument: str, wanted: str, got: object) -> None:
    """Raises ValueError "operator: argument must be wanted, got got" unless `holds`."""
    if not holds:
        raise ValueError(f"{operator}: {argument} must be {wanted}, got {got}")


def check_shape(operator: str, argument: str, tensor: Tensor, wanted: Sequence[int], meaning: str) -> None:
    """`tensor` must have exactly the shape `wanted`; `meaning` says it in letters, such as "[B, 3]"."""
    shape = tensor.shape
    if len(shape) != len(wanted) or any(a != b for a, b in zip(shape, wanted, strict=True)):
        require(False, operator, argument, f"of shape {list(wanted)} ({meaning})", list(shape))


def check_float(operator: str, argument: str, tensor: Tensor) -> None:
    """`tensor` must hold real floating-point numbers."""
    if tensor.dtype not in FLOAT_DTYPES:
        require(False, operator, argument, "float32, float64, bfloat16 or float16", tensor.dtype)


def check_like(operator: str, argument: str, tensor: Tensor, other_argument: str, other: Tensor) -> None:
    """`tensor` must have the dtype and the device of `other`."""
    if tensor.dtype != other.dtype:
        require(False, operator, argument, f"{other.dtype} as {other_argument}", tensor.dtype)
    if tensor.device != other.device:
        require(False, operator, argument, f"on {other.device} as {other_argument}", tensor.device)
