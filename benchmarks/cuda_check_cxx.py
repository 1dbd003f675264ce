"""The C++ that calls cuBLASLt, compiled to an object without a GPU and without the library: part of cuda_check.py."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
# Of cuBLASLt, what csrc calls, as its documentation declares it.
DECLARATIONS = ROOT / "tests" / "cublaslt_on_cpu" / "include"


class CheckError(Exception):
    """Why the check cannot be made at all, in one sentence."""


@dataclass(frozen=True)
class CxxSource:
    """A C++ source that needs CUDA's headers, compiled to an object.

    source: below the repository's root. header: whose cublasLt.h. compiler: its version. failure: what the compiler
    said, or why it was not asked; empty where it compiled.
    """

    source: str
    header: str
    compiler: str
    failure: str = ""

    def sentence(self) -> str:
        """For the table."""
        if self.failure:
            return f"{self.source} {self.failure.splitlines()[0]}"
        return f"{self.source} compiles against {self.header} ({self.compiler})"


def fetch_cublas(major: str, target: Path) -> None:
    """cuBLAS's headers out of its wheel (hundreds of megabytes) into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        done = subprocess.run(
            [*command, f"nvidia-cublas=={major}.*"], capture_output=True, text=True, check=False
        )
        wheels = sorted(Path(folder).glob("nvidia_cublas-*.whl"))
        if done.returncode != 0 or not wheels:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise CheckError(f"the wheel of nvidia-cublas could not be downloaded: {last}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            for member in wheel.namelist():
                if re.search(r"/include/cublas\w*\.h$", member):
                    target.mkdir(parents=True, exist_ok=True)
                    (target / Path(member).name).write_bytes(wheel.read(member))


def find_cublas_header(nvcc_home: str, major: str, fetched: Path) -> tuple[Path, str]:
    """The folder of cublasLt.h, and whose it is: NVIDIA's with its release, or our declarations."""
    folders = [Path(nvcc_home) / "include", fetched]
    folders += [Path(entry) / "nvidia" / f"cu{major}" / "include" for entry in sys.path]
    for folder in folders:
        api = folder / "cublas_api.h"
        if (folder / "cublasLt.h").is_file() and api.is_file():
            text = api.read_text(encoding="utf-8", errors="replace")
            numbers = [
                re.search(rf"#define CUBLAS_VER_{part} (\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")
            ]
            release = ".".join(number[1] for number in numbers if number)
            return folder, f"NVIDIA's header of cuBLAS {release or 'an unknown release'}"
    return DECLARATIONS, "our declarations of cuBLASLt"


def compile_cxx(source: Path, setup: ModuleType, nvcc: Any, fetched: Path) -> CxxSource:
    """One C++ source to an object that nobody keeps, as the extension compiles it; `fetched` as of `fetch_cublas`."""
    name = source.relative_to(ROOT).as_posix()
    folder, header = find_cublas_header(nvcc.home, nvcc.release.split(".")[0], fetched)
    compiler = shlex.split(setup.find_compiler())
    version = setup.run_quietly(*compiler, "--version").split("\n")[0]
    torch = importlib.util.find_spec("torch")
    if torch is None or not torch.origin:
        return CxxSource(name, header, version, "not compiled: torch, whose headers it needs, is not here")
    include = Path(torch.origin).parent / "include"
    # As in setup.py the toolkit's headers go before those beside cublasLt.h.
    folders = [Path(nvcc.home) / "include", folder, include, include / "torch" / "csrc" / "api" / "include"]
    with tempfile.TemporaryDirectory() as scratch:
        command = [*compiler, *setup.CXX_FLAGS, "-std=c++20", setup.CUDA_MACRO, "-fPIC", f"-I{CSRC}"]
        command += [f"-isystem{path}" for path in folders]
        command += ["-c", str(source), "-o", str(Path(scratch, "object.o"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stderr.strip()
    return CxxSource(name, header, version, "" if done.returncode == 0 else f"does not compile: {said}")
