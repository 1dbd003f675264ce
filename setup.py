"""Builds the native library `mipnerf_fast/_C`; everything else about the package is in pyproject.toml.

The sources are found, not listed: `csrc/*.cpp` and every `csrc/**/*_cpu.cpp` always, every `csrc/**/*.cu`
where torch has CUDA and there is an nvcc of the same major version, `csrc/**/*_cublaslt.cpp` where there is cuBLASLt
besides. No GPU has to be visible.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError, LinkError

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
# The stable interface of the oldest torch served: the same binary then loads in every later release.
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# -fopenmp-simd honours `#pragma omp simd` without linking a second OpenMP runtime beside torch's. No -std
# (torch picks the one its headers need), no -march (the code dispatches at run time), no fast-math: without errno
# and traps, loops with comparisons vectorise; and no product is fused into a sum unless the source says so.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-psabi",  # vectors go by value only to functions that are always inlined
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    TARGET_VERSION,
]
# What torch's interface has for CUDA is declared only with this, to either compiler.
CUDA_MACRO = "-DUSE_CUDA"
NVCC_FLAGS = ["-O3", "-Xcompiler=-Wall,-fvisibility=hidden", CUDA_MACRO, TARGET_VERSION]
DEFAULT_ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0a", "10.0", "12.0+PTX"]
# Operations that need a newer GPU than the oldest in that list: csrc/<operation>/ and its lowest capability.
LOWEST_CAPABILITY = {"mlp": (8, 0)}
# Sources whose instructions exist on these architectures alone.
ONLY_ARCHITECTURES = {
    "mlp_hopper_launch.cu": ("9.0a",),
    "mlp_hopper_backward_launch.cu": ("9.0a",),
    "mlp_hopper_wgrad_launch.cu": ("9.0a",),
}
# Not the temporary folder that pip gives: objects are kept, so that every build compiles only what changed.
OBJECTS = Path("build") / f"native-{sys.implementation.cache_tag}"
# Half of what a small source takes to compile goes into these, so g++ reads them once for all sources.
SHARED_HEADERS = [
    "torch/csrc/stable/accelerator.h",
    "torch/csrc/stable/library.h",
    "torch/csrc/stable/ops.h",
    "torch/csrc/stable/tensor.h",
    "algorithm",
    "atomic",
    "optional",
    "sstream",
    "tuple",
    "vector",
]
# The vector units that the CPU's loops are compiled for, in the order of csrc/common/for_rays.h, and the processor's
# flags that each needs.
VECTOR_UNITS = {
    "baseline": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl"},
}


class BuildError(BaseError):
    """Why nothing can be built, in one sentence; setuptools prints it without a traceback."""


# -------------------------------------------------------------------------------------------- what is there


def find_compiler(environment: dict[str, str] | os._Environ[str] = os.environ) -> str:
    """The C++ compiler: $CXX, or the first of c++, g++ and clang++ on PATH."""
    wanted = environment.get("CXX", "").strip()
    path = environment.get("PATH")
    if wanted:
        if shutil.which(shlex.split(wanted)[0], path=path) is None:
            raise BuildError(f"the C++ compiler named by CXX, {wanted}, was not found on PATH")
        return wanted
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name, path=path):
            return name
    raise BuildError(
        "no C++ compiler was found on PATH (c++, g++ or clang++; on Debian: apt-get install g++)"
    )


def add_ninja_to_path() -> None:
    """Puts the ninja package's program on PATH where there is none, since torch looks for it there only."""
    if shutil.which("ninja") is None:
        try:
            import ninja
        except ImportError:
            return
        os.environ["PATH"] = f"{ninja.BIN_DIR}{os.pathsep}{os.environ.get('PATH', '')}"


def check_ninja() -> None:
    if shutil.which("ninja") is None:
        raise BuildError("ninja was not found (pip install ninja)")


def find_pybind11() -> str:
    """The include folder of the pybind11 package."""
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 was not found (pip install pybind11)") from None
    return str(pybind11.get_include())


def check_python_headers(include: str) -> None:
    """`include` must hold Python.h, which Debian keeps in a package of its own."""
    if not (Path(include) / "Python.h").is_file():
        raise BuildError(f"Python.h was not found in {include} (on Debian: apt-get install python3-dev)")


def import_torch() -> Any:
    """torch, or the sentence that says why it will not do."""
    if importlib.util.find_spec("torch") is None:
        raise BuildError(
            "torch was not found by the Python that builds, and the native library is built against it: "
            "pip install torch==2.13.0, then pip install --no-build-isolation . "
            "(without that option pip builds where torch is not installed)"
        )
    try:
        import torch
    except (ImportError, OSError) as error:
        raise BuildError(f"torch is installed but cannot be imported: {error}") from None
    check_torch_version(torch.__version__)
    return torch


def check_torch_version(version: str) -> None:
    """Refuses a torch whose stable interface is older than the one used."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST_TORCH:
        raise BuildError(
            f"torch {version} was found, and at least {'.'.join(map(str, OLDEST_TORCH))} is needed"
        )


def run_quietly(*command: str) -> str:
    """What `command` prints on either stream, or nothing where it cannot be run."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler: its path, its toolkit's folder, its release, the capabilities it compiles for."""

    path: str
    home: str
    release: str
    capabilities: tuple[str, ...]


def find_nvcc() -> Nvcc | None:
    """nvcc from $CUDA_HOME or $CUDA_PATH, else from PATH, else from /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [str(Path(home) / "bin" / "nvcc") if home else None for home in homes]
    candidates.insert(2, shutil.which("nvcc"))
    for path in candidates:
        release = re.search(r"release (\d+\.\d+)", run_quietly(path, "--version")) if path else None
        if path is None or release is None:
            continue
        # nvcc knows its toolkit even where a wrapper script or a link stands for it on PATH.
        top = re.search(
            r"^#\$ TOP=(.+)$", run_quietly(path, "--dryrun", "-x", "cu", "-E", os.devnull), re.MULTILINE
        )
        home = os.path.realpath(top.group(1)) if top else str(Path(path).resolve().parents[1])
        codes = re.findall(r"sm_(\d+)(\d)\b", run_quietly(path, "--list-gpu-code"))
        return Nvcc(path, home, release.group(1), tuple(f"{major}.{minor}" for major, minor in codes))
    return None


def find_sources(csrc: Path) -> tuple[list[str], list[str]]:
    """C++ and CUDA sources under `csrc`, sorted, as paths relative to the folder above it.

    What calls cuBLASLt is C++, but counts as CUDA.
    """
    cxx = [*csrc.glob("*.cpp"), *csrc.glob("**/*_cpu.cpp")]
    cuda = [*csrc.glob("**/*.cu"), *csrc.glob("**/*_cublaslt.cpp")]
    relative = [sorted({path.relative_to(csrc.parent).as_posix() for path in paths}) for paths in (cxx, cuda)]
    return relative[0], relative[1]


# -------------------------------------------------------------------------------------------- what is built


def choose_vector_units(requested: str, cpuinfo: str) -> list[str]:
    """All of them, or of "host" the best that this processor has: for a library that stays here.

    cpuinfo: what Linux says in /proc/cpuinfo.
    """
    if requested not in ("", "all", "host"):
        raise BuildError(f"MIPNERF_FAST_VECTOR_UNITS holds {requested!r}; expected all or host")
    if requested != "host":
        return list(VECTOR_UNITS)
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    has = set(flags.group(1).split()) if flags else set()
    return [unit for unit, needs in VECTOR_UNITS.items() if needs <= has][-1:]


def vector_flags(units: Sequence[str]) -> list[str]:
    """The compiler's, for these units."""
    return [] if len(units) > 1 else [f"-DMIPNERF_ONLY_VECTOR_UNIT={list(VECTOR_UNITS).index(units[0])}"]


def cuda_decision(
    torch_version: str, torch_cuda: str | None, nvcc: Nvcc | None, num_sources: int
) -> tuple[bool, str]:
    """Whether the CUDA sources are built, and why."""
    if torch_cuda is None:
        return False, f"CPU only: torch {torch_version} has no CUDA"
    if nvcc is None:
        return False, (
            f"CPU only: torch {torch_version} has CUDA {torch_cuda}, "
            "but no nvcc was found (in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda)"
        )
    if nvcc.release.split(".")[0] != torch_cuda.split(".")[0]:
        return False, (
            f"CPU only: torch {torch_version} has CUDA {torch_cuda}, but {nvcc.path} is of CUDA "
            f"{nvcc.release}; the major versions must agree"
        )
    if num_sources == 0:
        return False, "CPU only: there are no CUDA sources under csrc"
    return (
        True,
        f"CPU and CUDA: torch {torch_version} has CUDA {torch_cuda}, {nvcc.path} is of CUDA {nvcc.release}",
    )


def choose_architectures(requested: str | None, nvcc: Nvcc) -> tuple[list[str], str]:
    """The architectures to compile for, written as in `TORCH_CUDA_ARCH_LIST` (8.0 12.0+PTX), and why."""

    def compiles(architecture: str) -> bool:
        return architecture.removesuffix("+PTX").rstrip("af") in nvcc.capabilities

    if requested and requested.strip():
        chosen = re.split(r"[\s;,]+", requested.strip(" ;,\t\n"))
        for architecture in chosen:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", architecture):
                raise BuildError(
                    f"TORCH_CUDA_ARCH_LIST holds {architecture!r}; "
                    "expected compute capabilities such as 8.0, 9.0a or 12.0+PTX"
                )
            if not compiles(architecture):
                raise BuildError(
                    f"TORCH_CUDA_ARCH_LIST holds {architecture}, which nvcc {nvcc.release} cannot compile for"
                )
        return chosen, "as TORCH_CUDA_ARCH_LIST says"
    chosen = [architecture for architecture in DEFAULT_ARCHITECTURES if compiles(architecture)]
    left_out = [architecture for architecture in DEFAULT_ARCHITECTURES if not compiles(architecture)]
    if not left_out:
        return chosen, "the default list"
    return (
        chosen,
        f"the default list without {', '.join(left_out)}, which nvcc {nvcc.release} cannot compile for",
    )


def gencode_flags(architectures: Sequence[str], source: str) -> list[str]:
    """nvcc's flags for one source; those architectures that its operation cannot use are left out."""
    lowest = LOWEST_CAPABILITY.get(Path(source).parent.name, (0, 0))
    only = ONLY_ARCHITECTURES.get(Path(source).name)
    flags = []
    for architecture in architectures:
        capability = architecture.removesuffix("+PTX")
        if only is not None and capability not in only:
            continue
        if tuple(int(part) for part in capability.rstrip("af").split(".")) < lowest:
            continue
        number = capability.replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def source_revision() -> str:
    """The revision of this checkout, with "-dirty" where tracked files differ; "none" outside a checkout.

    MIPNERF_FAST_REVISION goes before it, for a copy of the files without their history.
    """
    if given := os.environ.get("MIPNERF_FAST_REVISION", "").strip():
        return given
    top = run_quietly("git", "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != ROOT:
        return "none"
    return run_quietly("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


@dataclass(frozen=True)
class Plan:
    """What is built and why: printed before the build, and what `build_info()` of the library returns."""

    reason: str
    torch: str
    cuda: str | None
    architectures: list[str]
    architectures_reason: str
    compilers: dict[str, str]
    flags: dict[str, list[str]]
    sources: list[str]
    revision: str
    vector_units: list[str]

    def describe(self) -> str:
        lines = [f"mipnerf_fast: building the native library for {self.reason}"]
        if self.cuda:
            lines.append(f"  architectures: {' '.join(self.architectures)} ({self.architectures_reason})")
        lines += [
            f"  {name}: {version}, {shlex.join(self.flags[name])}" for name, version in self.compilers.items()
        ]
        lines.append(f"  vector units of the CPU's loops: {' '.join(self.vector_units)}")
        lines.append(f"  sources: {' '.join(self.sources)}")
        return "\n".join(lines)


def make_plan(torch_version: str, torch_cuda: str | None, compiler: str) -> tuple[Plan, Nvcc | None]:
    """Looks at csrc and at the machine and decides; the nvcc returned is None where CUDA is not built."""
    cxx_sources, cuda_sources = find_sources(ROOT / "csrc")
    nvcc = find_nvcc() if torch_cuda else None
    with_cuda, reason = cuda_decision(torch_version, torch_cuda, nvcc, len(cuda_sources))
    version = run_quietly(*shlex.split(compiler), "--version").split("\n")[0]
    cpuinfo = Path("/proc/cpuinfo")
    units = choose_vector_units(
        os.environ.get("MIPNERF_FAST_VECTOR_UNITS", "").strip(),
        cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else "",
    )
    compilers, flags = {"cxx": version or compiler}, {"cxx": [*CXX_FLAGS, *vector_flags(units)]}
    if not with_cuda or nvcc is None:
        return Plan(
            reason, torch_version, None, [], "", compilers, flags, cxx_sources, source_revision(), units
        ), None
    architectures, why = choose_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"), nvcc)
    compilers["nvcc"], flags["nvcc"] = f"nvcc {nvcc.release}", NVCC_FLAGS
    flags["cxx"].append(CUDA_MACRO)
    # A source without any architecture left cannot be compiled: its operation then has no CUDA kernel.
    sources = cxx_sources + [source for source in cuda_sources if gencode_flags(architectures, source)]
    if find_cublaslt(nvcc) is None:
        sources = [source for source in sources if not source.endswith("_cublaslt.cpp")]
        reason += "; without cublaslt, since cublasLt.h is neither in the toolkit nor beside torch"
    revision = source_revision()
    return Plan(
        reason, torch_version, torch_cuda, architectures, why, compilers, flags, sources, revision, units
    ), nvcc


def write_build_header(plan: Plan, folder: Path) -> None:
    """The plan as a C++ string literal, rewritten only when it changed, so that module.cpp waits for that."""
    literal = f'R"json({json.dumps(asdict(plan), indent=1)})json"'
    text = f"#pragma once\n\nconstexpr const char* kBuildInfo = {literal};\n"
    header = folder / "mipnerf_fast_build_info.h"
    if not header.is_file() or header.read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        header.write_text(text)


def precompiles_headers(compiler: str) -> bool:
    """Whether the compiler is g++: clang++ has another way to read headers once."""
    macros = run_quietly(*shlex.split(compiler), "-dM", "-E", "-x", "c++", os.devnull)
    return "#define __GNUC__ " in macros and "__clang__" not in macros


def write_shared_headers(folder: Path) -> tuple[Path, Path]:
    """A header with those that the sources share, and the same as a source; rewritten only when they changed."""
    text = "".join(f"#include <{name}>\n" for name in SHARED_HEADERS)
    header, source = folder / "mipnerf_fast_shared.h", folder / "mipnerf_fast_shared.cpp"
    for path in (header, source):
        if not path.is_file() or path.read_text() != text:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return header, source


def cuda_runtime(nvcc: Nvcc) -> tuple[str, str]:
    """Folder and file name of the CUDA runtime to link; the wheels beside torch have the numbered name."""
    major = nvcc.release.split(".")[0]
    folders = [Path(nvcc.home) / name for name in ("lib64", "lib")]
    folders += [Path(entry) / "nvidia" / f"cu{major}" / "lib" for entry in sys.path]
    for folder in folders:
        for name in ("libcudart.so", f"libcudart.so.{major}"):
            if (folder / name).is_file():
                return str(folder), name
    raise BuildError(
        f"libcudart.so was not found in {folders[0]}, nor beside torch; it comes with the CUDA toolkit"
    )


def find_cublaslt(nvcc: Nvcc) -> tuple[str, str, str] | None:
    """The folder of cublasLt.h, and folder and file name of its library: the toolkit's, or the wheels' beside torch."""
    major = nvcc.release.split(".")[0]
    homes = [Path(nvcc.home), *(Path(entry) / "nvidia" / f"cu{major}" for entry in sys.path)]
    for home in homes:
        if not (home / "include" / "cublasLt.h").is_file():
            continue
        for folder in (home / "lib64", home / "lib"):
            for name in ("libcublasLt.so", f"libcublasLt.so.{major}"):
                if (folder / name).is_file():
                    return str(home / "include"), str(folder), name
    return None


# ----------------------------------------------------------------------------------------- setuptools' part


def build_command(base: Any) -> Any:
    """A build_ext over `base`, which is torch's where there is a torch and setuptools' own otherwise.

    torch's always calls ninja, which knows what must be compiled again (headers included), and always links.
    """

    class NativeBuild(base):
        def run(self) -> None:
            compiler = find_compiler()
            torch = import_torch()
            check_ninja()
            pybind11_include = find_pybind11()
            check_python_headers(sysconfig.get_path("include"))
            plan, nvcc = make_plan(torch.__version__, torch.version.cuda, compiler)
            print(plan.describe(), flush=True)
            os.environ["CXX"] = compiler  # torch and setuptools would look for one each in their own way

            # Other flags make other objects: each kind keeps its own.
            objects = OBJECTS.with_name(OBJECTS.name + ("" if len(plan.vector_units) > 1 else "-host"))
            self.build_temp = str(objects)
            generated = ROOT / objects / "include"
            write_build_header(plan, generated)
            (extension,) = self.extensions
            extension.sources = plan.sources
            extension.include_dirs = [
                str(ROOT / "csrc"),
                str(generated),
                pybind11_include,
                *torch_includes(torch),
            ]
            extension.library_dirs = [str(Path(torch.__file__).parent / "lib")]
            extension.libraries = ["torch", "torch_cpu"]
            extension.extra_compile_args = {"cxx": list(plan.flags["cxx"]), "nvcc": []}
            if nvcc is not None:
                os.environ["PYTORCH_NVCC"] = nvcc.path
                torch.utils.cpp_extension.CUDA_HOME = (
                    nvcc.home
                )  # torch may have taken a wrapper's folder for it
                folder, name = cuda_runtime(nvcc)
                extension.library_dirs.append(folder)
                extension.libraries.append("torch_cuda")
                extension.extra_link_args = [f"-l:{name}"]
                cublaslt = find_cublaslt(nvcc)
                if cublaslt is not None:
                    include, folder, name = cublaslt
                    # The toolkit's headers first: the wheels' are of another release, and not all of them.
                    extension.include_dirs += [str(Path(nvcc.home) / "include"), include]
                    extension.library_dirs.append(folder)
                    extension.extra_link_args.append(f"-l:{name}")
                extension.extra_compile_args["nvcc"] = NVCC_FLAGS + gencode_flags(plan.architectures, "")
                if any(Path(source).name in ONLY_ARCHITECTURES for source in plan.sources):
                    extension.extra_compile_args["nvcc"].append("-DMIPNERF_HOPPER_KERNELS")
            self.architectures = plan.architectures
            self.shared_headers = write_shared_headers(generated) if precompiles_headers(compiler) else None
            super().run()

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except RuntimeError as error:  # such as a g++ newer than nvcc knows
                raise BuildError(f"torch refuses to build here: {' '.join(str(error).split())}") from None

        def build_extension(self, extension: Extension) -> None:
            compile_all = self.compiler.compile

            def compile_by_architecture(sources: Sequence[str], output_dir: str, **options: Any) -> list[str]:
                """One call of torch's compile for each list of architectures, since it knows only one."""
                groups: dict[tuple[str, ...], list[str]] = {}
                everywhere = tuple(gencode_flags(self.architectures, ""))
                for source in sources:
                    wanted = (
                        tuple(gencode_flags(self.architectures, source))
                        if source.endswith(".cu")
                        else everywhere
                    )
                    groups.setdefault(wanted, []).append(source)
                objects = []
                if self.shared_headers is not None:
                    options = precompile(*self.shared_headers, output_dir, **options)
                for wanted, group in groups.items():
                    # A folder of its own: ninja forgets what its file no longer names.
                    folder = output_dir if wanted == everywhere else f"{output_dir}/{Path(group[0]).stem}"
                    arguments = copy.deepcopy(options)
                    given = arguments["extra_postargs"]
                    given["nvcc"] = [flag for flag in given["nvcc"] if flag not in everywhere] + list(wanted)
                    objects += compile_all(group, output_dir=folder, **arguments)
                return objects

            def precompile(header: Path, source: Path, output_dir: str, **options: Any) -> dict[str, Any]:
                """Compiles the shared headers; returns the options of sources that begin with them.

                g++ finds the result by its name, and reads the header itself where it does not fit.
                """
                arguments = copy.deepcopy(options)
                arguments["extra_preargs"] = ["-x", "c++-header", *(options.get("extra_preargs") or [])]
                (compiled,) = compile_all(
                    [str(source.relative_to(ROOT))], output_dir=f"{output_dir}/shared", **arguments
                )
                link = header.with_name(f"{header.name}.gch")
                link.unlink(missing_ok=True)
                link.symlink_to(Path(compiled).resolve())
                with_header = copy.deepcopy(options)
                with_header["extra_postargs"]["cxx"] += ["-include", str(header)]
                return with_header

            self.compiler.compile = compile_by_architecture
            try:
                super().build_extension(extension)
            except (RuntimeError, CompileError):
                raise BuildError(
                    "the native library did not compile; the compiler's message is above"
                ) from None
            except LinkError:
                raise BuildError("the native library did not link; the linker's message is above") from None
            finally:
                self.compiler.compile = compile_all

    return NativeBuild


def torch_includes(torch: Any) -> list[str]:
    """torch's headers; those of its C++ front end are not used."""
    return [str(Path(torch.__file__).parent / "include")]


def torch_build_base() -> Any:
    """torch's build_ext; setuptools' own without torch, which `run` says before it builds anything."""
    try:
        from torch.utils.cpp_extension import BuildExtension
    except (ImportError, OSError):
        return build_ext
    return BuildExtension


if __name__ == "__main__":
    add_ninja_to_path()
    setup(
        # The sources are set when the build runs; naming them here puts them into the source distribution.
        ext_modules=[Extension("mipnerf_fast._C", find_sources(ROOT / "csrc")[0], language="c++")],
        cmdclass={"build_ext": build_command(torch_build_base())},
    )
