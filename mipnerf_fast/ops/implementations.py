"""Which implementation each operation uses, and why: what `mipnerf-fast info` prints."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import _native
from ..backend import current_backend

OPERATIONS = ("frustum_ipe", "composite", "resample", "mlp")

# Per operation: the device types that have a native kernel and the dtypes it takes there.
_KERNELS: dict[str, dict[str, tuple[torch.dtype, ...]]] = {name: {} for name in OPERATIONS}


class Implementation(NamedTuple):
    """What computes one operation.

    operation: its name.
    used: "native" or "reference"; "unavailable" where the backend "native" is forced and cannot serve.
    why: one clause.
    """

    operation: str
    used: str
    why: str


def implementations(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> list[Implementation]:
    """The implementation of every operation for tensors of this device and dtype under the backend in force.

    Example:
        >>> with use_backend("reference"):
        ...     {implementation.used for implementation in ops.implementations()}
        {'reference'}
    """
    return [_implementation(name, torch.device(device).type, dtype) for name in OPERATIONS]


def _implementation(operation: str, device_type: str, dtype: torch.dtype) -> Implementation:
    backend = current_backend()
    if backend == "reference":
        return Implementation(operation, "reference", "the backend is set to reference")
    kernels = _KERNELS[operation]
    if not kernels:
        # Also when "native" is forced: it takes the kernel wherever one is implemented.
        return Implementation(operation, "reference", "no native kernel is implemented yet")
    if device_type not in kernels:
        missing = f"no native kernel for {device_type}, only for {' and '.join(kernels)}"
    elif dtype not in kernels[device_type]:
        missing = f"the native kernel for {device_type} does not take {dtype}"
    elif not _native.available():
        missing = _native.why_missing()
    else:
        return Implementation(operation, "native", f"kernel for {device_type}, {dtype}")
    return Implementation(operation, "unavailable" if backend == "native" else "reference", missing)


def backend_in_use(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The implementations in one word: "native", "reference", or "mixed" with those that are native."""
    used = {entry.operation: entry.used for entry in implementations(device, dtype)}
    native = [name for name, kind in used.items() if kind == "native"]
    if not native:
        return "reference"
    return "native" if len(native) == len(used) else f"mixed ({', '.join(native)} native)"
