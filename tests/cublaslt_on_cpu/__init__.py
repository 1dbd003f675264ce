"""The products over cuBLASLt, csrc/mlp/gemm_cublaslt.cpp itself, compiled over a cuBLASLt of the CPU (gemm_on_cpu.cpp).

`load` gives the operator and the library's handle; a compiler is needed, no CUDA.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache" / "cublaslt_on_cpu"
SOURCES = [
    *sorted(path for path in HERE.rglob("*") if path.suffix in (".h", ".cpp")),
    ROOT / "csrc" / "mlp" / "gemm_cublaslt.cpp",
    ROOT / "csrc" / "common" / "checks.h",
]


class CublasLtOnCpu(NamedTuple):
    """operator: `gemm_cublaslt` for CPU tensors. alive: descriptors not destroyed. refuse: a bit for each epilogue."""

    operator: Any
    alive: Any
    refuse: Any


@functools.cache
def load() -> CublasLtOnCpu:
    """Compiled where no library of these sources is there; registers the operator for the CPU in this process."""
    folders = [HERE / "include", ROOT / "csrc", *include_paths()]
    command = [
        *shlex.split(os.environ.get("CXX") or "g++"),
        *("-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
        *(
            "-Wno-unused-parameter",
            "-ffp-contract=off",
            "-DUSE_CUDA",
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
        ),
        *(f"-I{folder}" for folder in folders),
    ]
    libraries = [*(f"-L{folder}" for folder in library_paths()), "-ltorch", "-ltorch_cpu"]
    digest = hashlib.sha256("\0".join([torch.__version__, *command]).encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    library = CACHE / f"gemm-{digest.hexdigest()[:24]}.so"
    if not library.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder) / library.name
            done = subprocess.run(
                [*command, HERE / "gemm_on_cpu.cpp", *libraries, "-o", made],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-6000:]
            made.replace(library)
    torch.ops.load_library(str(library))
    handle = ctypes.CDLL(str(library))
    return CublasLtOnCpu(
        torch.ops.mipnerf_fast.gemm_cublaslt.default, handle.cublaslt_alive, handle.cublaslt_refuse
    )
