"""Which engine computes the network, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import _native
from ..backend import current_backend
from .arguments import require
from .gemm import has_cublaslt
from .mlp_fused import why_not_fused
from .mlp_fused_network import Sizes

# auto: the fastest exact one. tcnn is another architecture, and emulated is for checks: neither is ever chosen by auto.
MLP_BACKENDS = ("auto", "reference", "folded", "cublaslt", "fused", "tcnn", "emulated")
# Of the operands of the products; auto: float32 on a CPU, bfloat16 on a GPU.
MLP_DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
_CHOSEN_HERE = tuple(backend for backend in MLP_BACKENDS if backend != "tcnn")
_HALVES = (torch.bfloat16, torch.float16)


def _cpu_multiplies_bf16() -> bool:
    """Whether the processor has instructions for it (AVX512_BF16 or AMX); without them torch converts, slowly."""
    tests = (
        getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return any(test is not None and test() for test in tests)


# Decided when the package is imported: torch.compile can read module globals, but not ask for them.
CPU_BF16 = _cpu_multiplies_bf16()
_WHY_NO_LIBRARY = _native.why_missing()
_HAS_CUBLASLT = has_cublaslt()


class MlpShape(NamedTuple):
    """The network's sizes: `MipMLP`'s arguments."""

    in_features: int = 96
    view_features: int | None = 27
    net_depth: int = 8
    net_width: int = 256
    net_depth_condition: int = 1
    net_width_condition: int = 128
    skip_layer: int = 4


class MlpChoice(NamedTuple):
    """What computes a network.

    engine: "reference", "folded", "cublaslt", "fused" or "emulated". dtype: of its operands. why: one clause.
    """

    engine: str
    dtype: torch.dtype
    why: str


def choose_mlp(
    shape: MlpShape,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    compute_dtype: str = "auto",
) -> MlpChoice:
    """The engine for parameters of this device and dtype, under the backend in force.

    `use_backend("reference")` goes before the network's own backend; "native" takes no reference where a kernel could
    serve. float64 is for checking and takes the reference always.

    Errors: RuntimeError, saying why, where the network's backend, or "native", cannot serve; ValueError for an unknown
    backend or compute_dtype, and for "tcnn", which is another network and not chosen here.
    """
    if backend not in _CHOSEN_HERE or compute_dtype not in MLP_DTYPES:
        other = "; tcnn is MipMLP's own" if backend == "tcnn" else ""
        require(
            backend in _CHOSEN_HERE,
            "mlp",
            "backend",
            f"one of {', '.join(_CHOSEN_HERE)}{other}",
            repr(backend),
        )
        require(False, "mlp", "compute_dtype", f"one of {', '.join(MLP_DTYPES)}", repr(compute_dtype))
    forced = current_backend()
    if forced == "reference":
        return MlpChoice("reference", dtype, "the backend is set to reference")
    wanted = MLP_DTYPES[compute_dtype]
    if backend == "reference":
        return MlpChoice("reference", dtype, 'mlp_backend is "reference"')
    if backend == "auto":
        return _fastest(shape, device, dtype, wanted, forced == "native")
    if dtype == torch.float64:
        return MlpChoice("reference", dtype, "float64 is for checking and takes the reference")
    operands = wanted or (torch.float32 if backend == "folded" else torch.bfloat16)
    why = _WHY_NOT[backend](shape, device, dtype, operands)
    if why:
        raise RuntimeError(f"mlp: the backend is set to {backend}, but {why}")
    return MlpChoice(backend, operands, f'mlp_backend is "{backend}", {_name(operands)} operands')


def _fastest(
    shape: MlpShape, device: torch.device, dtype: torch.dtype, wanted: torch.dtype | None, native: bool
) -> MlpChoice:
    if dtype == torch.float64:
        return MlpChoice("reference", dtype, "float64 is for checking and takes the reference")
    if torch.is_autocast_enabled(device.type):
        return MlpChoice("reference", dtype, "torch.autocast decides about the dtypes of plain layers")
    reasons: list[str] = []
    if device.type == "cuda" and wanted != torch.float32:
        operands = wanted or torch.bfloat16
        for engine in _fastest_first(device):
            why = _WHY_NOT[engine](shape, device, dtype, operands)
            if not why:
                return MlpChoice(engine, operands, "; ".join([*reasons, f"{_name(operands)} operands"]))
            reasons.append(f"not {engine}: {why}")
        if native:
            raise RuntimeError(f"mlp: the backend is set to native, but {'; '.join(reasons)}")
    operands = torch.float32
    if device.type == "cpu":
        reasons.append("not fused, not cublaslt: they run on a GPU")
    if device.type == "cpu" and wanted in _HALVES:
        if wanted == torch.bfloat16 and CPU_BF16:
            operands = torch.bfloat16
        else:
            reasons.append(f"not in {_name(wanted)}: {_why_not_cpu_dtype(wanted)}")
    why = _why_not_folded(shape, device, dtype, operands)
    if not why:
        faster = device.type == "cpu" and wanted is None and CPU_BF16
        hint = (
            " (--mlp-dtype bf16 may be faster on this processor, from thousands of samples on)"
            if faster
            else ""
        )
        reasons.append(f"{_name(operands)} operands{hint}")
        return MlpChoice("folded", operands, "; ".join(reasons))
    if native:
        raise RuntimeError(f"mlp: the backend is set to native, but {why}")
    return MlpChoice("reference", dtype, "; ".join([*reasons, f"not folded: {why}"]))


def why_not(
    engine: str, shape: MlpShape, device: torch.device, dtype: torch.dtype, operands: torch.dtype
) -> str:
    """Why "folded", "emulated", "cublaslt" or "fused" cannot serve a network; empty where it can."""
    why: str = _WHY_NOT[engine](shape, device, dtype, operands)
    return why


# Constants to torch.compile, which cannot ask for a GPU's capability.
@torch.compiler.assume_constant_result
def _fastest_first(device: torch.device) -> tuple[str, str]:
    """Estimated until measured: on Ampere and Ada (8.x) products layer by layer are bound by arithmetic already."""
    return ("cublaslt", "fused") if _capability(device)[0] == 8 else ("fused", "cublaslt")


def _capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; without one that of Hopper, so that a choice can be asked for anywhere."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _why_not_cpu_dtype(dtype: torch.dtype) -> str:
    if dtype == torch.bfloat16:
        return "this processor has no bfloat16 products"
    return "the CPU's engine multiplies float32, or bfloat16"


def _why_not_master(dtype: torch.dtype) -> str:
    return "" if dtype == torch.float32 else f"its parameters must be float32, not {_name(dtype)}"


def _why_not_folded(shape: MlpShape, device: torch.device, dtype: torch.dtype, operands: torch.dtype) -> str:
    if operands != torch.float32 and device.type != "cpu":
        return f"on {device.type} it multiplies float32, not {_name(operands)}"
    if operands == torch.float16 or (operands == torch.bfloat16 and not CPU_BF16):
        return _why_not_cpu_dtype(operands)
    return _why_not_master(dtype)


def _why_not_emulated(
    shape: MlpShape, device: torch.device, dtype: torch.dtype, operands: torch.dtype
) -> str:
    if device.type != "cpu":
        return f"it emulates a GPU on the CPU, and the parameters are on {device.type}"
    return _why_not_aligned(shape, operands) or _why_not_master(dtype)


def _why_not_aligned(shape: MlpShape, operands: torch.dtype) -> str:
    """What 16-byte loads of 16-bit numbers ask of the rows."""
    if operands not in _HALVES:
        return f"its operands are bfloat16 or float16, not {_name(operands)}"
    sizes = {
        "in_features": shape.in_features,
        "net_width": shape.net_width,
        "net_width_condition": shape.net_width_condition if shape.view_features is not None else 8,
    }
    for name, size in sizes.items():
        if size % 8:
            return f"{name} must be a multiple of 8, not {size}"
    return ""


@torch.compiler.assume_constant_result
def _why_not_cublaslt(
    shape: MlpShape, device: torch.device, dtype: torch.dtype, operands: torch.dtype
) -> str:
    if device.type != "cuda":
        return f"it runs on a GPU, and the parameters are on {device.type}"
    if not _HAS_CUBLASLT:
        return _WHY_NO_LIBRARY or "the native library was built without cuBLASLt"
    if _capability(device) < (8, 0):
        return f"it needs compute capability 8.0, and {torch.cuda.get_device_name(device)} is older"
    return _why_not_aligned(shape, operands) or _why_not_master(dtype)


@torch.compiler.assume_constant_result
def _why_not_fused(shape: MlpShape, device: torch.device, dtype: torch.dtype, operands: torch.dtype) -> str:
    has_views = shape.view_features is not None
    if has_views and shape.net_depth_condition < 1:
        return "net_depth_condition must be 1 to 8, not 0"
    view_width = shape.net_width_condition if has_views else 0
    view_depth = shape.net_depth_condition if has_views else 0
    sizes = Sizes(shape.net_width, shape.net_depth, shape.skip_layer, view_width, view_depth)
    return why_not_fused(shape.in_features, sizes, device, dtype, operands)


_WHY_NOT = {
    "folded": _why_not_folded,
    "emulated": _why_not_emulated,
    "cublaslt": _why_not_cublaslt,
    "fused": _why_not_fused,
}
