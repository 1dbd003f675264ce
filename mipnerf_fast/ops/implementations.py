"""Which implementation each operation uses, and why: what `mipnerf-fast info` prints."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native
from ..backend import current_backend
from .mlp_backends import MLP_BACKENDS, MlpShape, choose_mlp, why_not
from .mlp_tcnn import why_not_tcnn

# Of the exact model and of the fast one; `backend_in_use` sums up either.
OPERATIONS = ("ray_batch", "frustum_ipe", "composite", "resample", "mlp")
FAST_OPERATIONS = (
    "draw_rays",
    "march",
    "hash_encode",
    "tiny_mlp",
    "packed_composite",
    "fast_step",
    "occupancy",
    "sparse_adam",
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Per operation the device types that have a native kernel and the dtypes it takes there. The network has several
# engines, of which `choose_mlp` knows.
_KERNELS: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "ray_batch": {"cpu": (torch.float32,), "cuda": (torch.float32,)},
    "frustum_ipe": {"cpu": (torch.float32, torch.float64), "cuda": (torch.float32,)},
    "composite": {"cpu": (*_FLOATS, torch.float64), "cuda": _FLOATS},
    "resample": {"cpu": (torch.float32, torch.float64), "cuda": (torch.float32,)},
    "hash_encode": {"cpu": (torch.float32, torch.float64), "cuda": (torch.float32,)},
    "march": {"cpu": (torch.float32, torch.float64), "cuda": (torch.float32,)},
    "tiny_mlp": {"cpu": (torch.float32, torch.float64), "cuda": (torch.float32,)},
    "packed_composite": {"cpu": (torch.float32, torch.float64), "cuda": (torch.float32,)},
    "draw_rays": {"cpu": (torch.float32,), "cuda": (torch.float32,)},
    "fast_step": {"cpu": (torch.float32,), "cuda": (torch.float32,)},
    "occupancy": {"cpu": (torch.float32,), "cuda": (torch.float32,)},
    "sparse_adam": {"cpu": (torch.float32,), "cuda": (torch.float32,)},
}

# Of the fast model, those whose products `FastConfig.mlp_dtype` decides.
_WITH_NETWORKS = ("fast_step", "occupancy")

# Of every engine of the network what it is good for; tcnn has no part in this network.
_GOOD_FOR = {
    "reference": "the layers one by one, on any device, in any dtype",
    "folded": "torch's products in float32",
    "cublaslt": "bfloat16 or float16 operands, layer by layer",
    "fused": "bfloat16 or float16 operands, one kernel",
    "emulated": "cublaslt's arithmetic on the CPU, slow, for checks",
}

# Decided when the package is imported: torch.compile can read module globals but not look for a library.
_WHY_NO_LIBRARY = _native.why_missing()
_WHY_NO_CUDA = "" if _native.build_info().get("cuda") else "the native library was built without CUDA kernels"


class Implementation(NamedTuple):
    """What computes one operation.

    operation: its name.
    used: "native" or "reference"; "unavailable" where the backend "native" is forced and cannot serve.
    why: one clause.
    """

    operation: str
    used: str
    why: str


class MlpEngine(NamedTuple):
    """An engine of the exact model's network.

    engine: its name. state: "used", "can serve" or "cannot serve". why: one clause.
    """

    engine: str
    state: str
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
    device = torch.device(device)
    return [
        _mlp(device, dtype) if name == "mlp" else _implementation(name, device, dtype)
        for name in (*OPERATIONS, *FAST_OPERATIONS)
    ]


def mlp_engines(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> list[MlpEngine]:
    """Every engine for the paper's 8 x 256 network, its parameters of this device and dtype, as the backend is set.

    Example:
        >>> [engine for engine, state, _ in ops.mlp_engines("cpu") if state == "used"]
        ['folded']
    """
    device, shape = torch.device(device), MlpShape()
    try:
        choice = choose_mlp(shape, device, dtype)
        used, why_used = choice.engine, choice.why
    except RuntimeError as error:
        used, why_used = "", str(error)
    engines = []
    for engine in MLP_BACKENDS[1:]:
        if engine == used:
            engines.append(MlpEngine(engine, "used", why_used))
            continue
        if engine == "reference":
            why = ""
        elif engine == "tcnn":
            why = why_not_tcnn(shape, device)
        else:
            why = why_not(
                engine, shape, device, dtype, torch.float32 if engine == "folded" else torch.bfloat16
            )
        first = f"; {used} goes first" if used else f"; {why_used}"
        engines.append(
            MlpEngine(engine, "cannot serve", why)
            if why
            else MlpEngine(engine, "can serve", _GOOD_FOR[engine] + first)
        )
    return engines


def takes_kernel(operation: str, tensor: Tensor, unsupported: str = "") -> bool:
    """Whether an operator runs its native kernel on tensors like this one, under the backend in force.

    `unsupported` says what about this call the kernel does not do; empty where it does everything.

    Errors: RuntimeError, saying why, where the backend "native" is forced and the kernel cannot run.
    """
    backend = current_backend()
    if backend == "reference":
        return False
    missing = unsupported or why_no_kernel(operation, tensor.device.type, tensor.dtype)
    if missing and backend == "native":
        raise RuntimeError(f"{operation}: the backend is set to native, but {missing}")
    return not missing


def why_no_kernel(operation: str, device_type: str, dtype: torch.dtype) -> str:
    """Why an operation has no native kernel for a device and dtype; empty where it has one."""
    kernels = _KERNELS[operation]
    if device_type not in kernels:
        return f"there is no native kernel for {device_type}, only for {' and '.join(kernels)}"
    if dtype not in kernels[device_type]:
        return f"the native kernel for {device_type} does not take {dtype}"
    if _WHY_NO_LIBRARY:
        return _WHY_NO_LIBRARY
    return _WHY_NO_CUDA if device_type == "cuda" else ""


def why_no_tf32(device: torch.device) -> str:
    """Why the kernels of the fast model's networks have no products in TF32 for a device; empty where they have."""
    if device.type != "cuda":
        return f"products in TF32 are of CUDA devices, not of {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"products in TF32 need compute capability 8.0, the GPU has {major}.{minor}"


def _implementation(operation: str, device: torch.device, dtype: torch.dtype) -> Implementation:
    device_type = device.type
    backend = current_backend()
    if backend == "reference":
        return Implementation(operation, "reference", "the backend is set to reference")
    missing = why_no_kernel(operation, device_type, dtype)
    if not missing:
        why = f"kernel for {device_type}, {dtype}"
        if device_type == "cuda" and operation in _WITH_NETWORKS:
            missing = why_no_tf32(device)
            why += f", {missing}" if missing else ', products in TF32 unless mlp_dtype is "fp32"'
        return Implementation(operation, "native", why)
    return Implementation(operation, "unavailable" if backend == "native" else "reference", missing)


def _mlp(device: torch.device, dtype: torch.dtype) -> Implementation:
    """Of the paper's network, with the backend "auto"; `MipMLP.implementation` says it of any other."""
    try:
        choice = choose_mlp(MlpShape(), device, dtype)
    except RuntimeError as error:
        return Implementation("mlp", "unavailable", str(error))
    if choice.engine == "reference":
        return Implementation("mlp", "reference", choice.why)
    return Implementation("mlp", "native", f"{choice.engine}, {choice.why}; of the paper's 8 x 256 network")


def backend_in_use(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    operations: tuple[str, ...] = OPERATIONS,
) -> str:
    """The implementations of a model's operations (OPERATIONS of the exact one, FAST_OPERATIONS) in one word.

    "native", "reference", or "mixed" with those that are native.
    """
    entries = implementations(device, dtype)
    used = {entry.operation: entry.used for entry in entries if entry.operation in operations}
    native = [name for name, kind in used.items() if kind == "native"]
    if not native:
        return "reference"
    return "native" if len(native) == len(used) else f"mixed ({', '.join(native)} native)"
