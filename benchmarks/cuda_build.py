"""Builds the whole native library against a torch with CUDA and imports it; needs nvcc, no GPU.

``make cuda-build``. The environment (gigabytes, once) and a copy of the sources under ``build/cuda`` keep it away
from the library that the ordinary set-up built. TORCH_CUDA_ARCH_LIST restricts the architectures, as in any build.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "cuda"
COPIED = ["csrc", "mipnerf_fast", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]
NEEDED_BYTES = 8 << 30  # torch with its CUDA libraries takes 5

# What the built library must do where there is no GPU: load, know what it was built for, run on the CPU.
IMPORT = """
import json, torch
from mipnerf_fast import _native, ops, reference
assert torch.version.cuda, "this torch has no CUDA"
assert _native.available(), _native.why_missing()
info = _native.build_info()
assert info["architectures"], f"built without kernels: {info['reason']}"
t = torch.linspace(2, 6, 5).expand(3, 5).contiguous()
origins, directions, radii = torch.rand(3, 3), torch.rand(3, 3), torch.full((3, 1), 1e-3)
ours = ops.frustum_ipe(t, origins, directions, radii)
exact = reference.frustum_ipe(*(x.double() for x in (t, origins, directions, radii)))
# Features are at most 1 and a wrong one is off by about that; float32 rounding stays below 1e-6.
assert (ours - exact).abs().max() < 1e-5, "the CPU path of this library is wrong"
# The exact network has one path for each: ops/mlp_folded.py serves the CPU. On a GPU tables are moved by sparse_adam.
CPU_ONLY = {
    "mipnerf_fast::" + name
    for name in ("mlp_tiles_forward", "mlp_layer_backward", "mlp_unfold", "fast_train_update")
}
CUDA_ONLY = {
    "mipnerf_fast::" + name
    for name in (
        "mlp_pack",
        "mlp_forward",
        "mlp_encoded_forward",
        "mlp_composited_forward",
        "mlp_backward",
        "gemm_cublaslt",
    )
}
# A step that a CUDA graph captures has no counterpart on the CPU either.
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
# Those of ops/mlp_folded.py are Python for every device.
operators = [
    name
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("mipnerf_fast::") and not has_kernel(name, "CompositeExplicitAutograd")
]
for name in operators:
    for device in ("CPU", "CUDA"):
        if device == "CPU" and (name in CUDA_ONLY or name.endswith("_captured")):
            continue
        found = has_kernel(name, device)
        assert found == (device == "CPU" or name not in CPU_ONLY), f"{name} on {device}: a kernel, or none, too much"
on_cpu = sum(name not in CUDA_ONLY and not name.endswith("_captured") for name in operators)
print(f"{len(operators)} operators, {len(operators) - len(CPU_ONLY)} with a CUDA kernel, {on_cpu} with a CPU kernel")
print(json.dumps({key: info[key] for key in ("torch", "cuda", "architectures", "compilers")}))
"""


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    shown = [str(part) if "\n" not in str(part) else "'...'" for part in command]
    print("+", *shown, flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def copy_sources() -> None:
    """Copies what changed, with its times, so that ninja compiles only that."""
    wanted: set[Path] = set()
    for name in COPIED:
        top = ROOT / name
        files = [top] if top.is_file() else [path for path in top.rglob("*") if path.is_file()]
        for path in files:
            if path.suffix in (".so", ".pyc"):
                continue
            target = TREE / path.relative_to(ROOT)
            wanted.add(target)
            if not target.is_file() or target.stat().st_mtime_ns != path.stat().st_mtime_ns:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)
    for name in ("csrc", "mipnerf_fast"):
        for path in (TREE / name).rglob("*"):
            if path.is_file() and path not in wanted and path.suffix != ".so":
                path.unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--venv", type=Path, default=Path(".venv-cuda"), help="the environment, made when absent"
    )
    parser.add_argument("--torch", default="torch==2.11.*", help="what pip installs; must come with CUDA")
    options = parser.parse_args(arguments)
    python = ROOT / options.venv / "bin" / "python"
    try:
        if not python.is_file():
            free = shutil.disk_usage(ROOT).free
            if free < NEEDED_BYTES:
                print(
                    f"cuda-build: {free >> 30} GiB are free, {NEEDED_BYTES >> 30} are needed", file=sys.stderr
                )
                return 2
            run(sys.executable, "-m", "venv", ROOT / options.venv)
        run(
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            options.torch,
            "setuptools>=77",
            "ninja",
            "pybind11",
            "numpy",
        )
        copy_sources()
        started = time.perf_counter()
        run(python, "setup.py", "--quiet", "build_ext", "--inplace", cwd=TREE)
        print(f"cuda-build: compiled in {time.perf_counter() - started:.0f} s", flush=True)
        run(python, "-c", IMPORT, cwd=TREE)
    except subprocess.CalledProcessError as error:
        print(
            f"cuda-build: failed at {error.cmd[0]} {error.cmd[1]} (exit status {error.returncode})",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
