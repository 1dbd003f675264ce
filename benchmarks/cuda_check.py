"""Compiles every CUDA kernel for every architecture, without a GPU, and fails on what would make it slow.

``make cuda-check``. Each operation's ``csrc/<op>/<op>_launch.cu`` (free of torch, it instantiates all that the
extension launches) goes through nvcc to a cubin per architecture. From ptxas come registers, shared memory, stack
and spills; from the disassembly the instructions. A kernel fails that spills, that keeps anything in local memory,
or whose instructions are not what ``EXPECTED`` says. Beside them the C++ that calls cuBLASLt is compiled to an
object, by the compiler and with the flags of the extension, against NVIDIA's header where there is one (in the
toolkit, beside torch, or fetched by ``--fetch-cublas``) and otherwise against the declarations that the tests run it
over. Results: ``benchmarks/results/cuda_check.{md,json}``, with the time that the check took and a fingerprint of
what was compiled, which the tests compare with today's sources.

The disassembler comes from the CUDA toolkit where it has one and otherwise from inside the triton wheel, which is
fetched once into ``.cache/cuda_tools`` (286 MB).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cuda_check_cxx import CheckError, CxxSource, compile_cxx, fetch_cublas

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SELF_TEST = ROOT / "tests" / "cuda_check"
TOOLS = ROOT / ".cache" / "cuda_tools"
# nvcc 13.0 leaves host code out of a cubin, so -Xcompiler and the like have nothing to say here.
NVCC_FLAGS = ["-O3", "-Xptxas=-v", "-cubin", f"-I{CSRC}"]
# What the whole check may take on two cores; longer is said, and no failure: machines differ.
MINUTES = 12


@dataclass(frozen=True)
class Expectation:
    """What the instructions of the kernels whose readable name matches `kernel` must and must not contain.

    Instructions are regular expressions, matched at the start of an opcode with its modifiers. `architectures`, a
    regular expression, restricts a row to some.
    """

    kernel: str
    must: tuple[str, ...] = ()
    must_not: tuple[str, ...] = ()
    registers: int = (
        255  # at most, for as many threads to be on a multiprocessor as the kernel is designed for
    )
    architectures: str = ""


# What no kernel may contain: accesses to local memory, and double arithmetic, which consumer GPUs have 1/64 of.
NEVER = {"LDL": "local memory", "STL": "local memory", "D(?:ADD|MUL|FMA|SETP|MNMX)": "double arithmetic"}
LOAD_128, STORE_128 = r"LDG\.E\.128", r"STG\.E\.128"
STREAM_128 = r"STG\.E\.EF\.128"
LOAD_64, STORE_64 = r"LDG\.E\.64", r"STG\.E\.64"
# Additions in global memory that return nothing: any, one float at a time, two, four.
ADD, ADD_1 = r"(?:RED|REDG)\.E\.ADD", r"(?:RED|REDG)\.E\.ADD\.F32\.FTZ"
ADD_2, ADD_4 = r"REDG\.E\.ADD\.F32x2", r"REDG\.E\.ADD\.F32x4"
VECTOR_ADDS = "9|1"  # architectures from 9.0 on
ADD_64, MAX = r"(?:RED|REDG)\.E\.ADD\.64", r"(?:RED|REDG)\.E\.MAX"
EXP2 = r"MUFU\.EX2"
COPY_BULK, COPY_MULTICAST = r"UBLKCP\.S\.G", r"UBLKCP\.S\.G\.MULTICAST"
SHARE_REGISTERS = r"USETMAXREG\.TRY_ALLOC"
HMMA = r"HMMA\.16816\.F32"
HMMA_TF32 = r"HMMA\.1688\.F32\.TF32"
TENSOR_CORES = (
    "(?!7)"  # architectures from 8.0 on; those before compile the kernels in TF32 but never launch them
)
LDSM, LDSM_TRANSPOSED = r"LDSM\.16\.M88\.4", r"LDSM\.16\.MT88\.4"
COPY_128 = r"LDGSTS\.E\.BYPASS(\.LTC128B)?\.128"


def hgmma(columns: int) -> str:
    """A warpgroup's product with sums in float: 64 rows, so many columns, 16 to sum over."""
    return rf"HGMMA\.64x{columns}x16\.F32"


# Sums in fixed point, of the encoding alone and of the step.
FIXED_SUMS = (
    Expectation(r"^(hash_encode|step)_scatter_kernel<\d, FixedSums>", (ADD_64,), (ADD_1,)),
    Expectation(r"^(hash_encode|step)_largest_kernel<", (MAX, "SHFL")),
    Expectation(r"^add_sums_kernel<", (LOAD_128, STORE_128)),
)


def networks(kernel: str) -> tuple[Expectation, ...]:
    """Of a kernel with the fast model's networks, whose last template argument says whether in TF32."""
    return (
        Expectation(rf"{kernel}.*\bfalse>", (LOAD_128, r"LDS\.(?:U\.)?64"), ("HMMA",)),
        Expectation(rf"{kernel}.*\btrue>", (LOAD_128, "LDS", HMMA_TF32), architectures=TENSOR_CORES),
    )


# Every kernel must match at least one row of its operation; all rows that match apply.
EXPECTED: dict[str, tuple[Expectation, ...]] = {
    # <number type, whole packs of aligned rows[, ...]>: a lane owns four samples, so four floats make 128 bits and
    # four 16-bit numbers 64; what is float whatever the number type (weights) goes 128 bits at a time.
    "composite": (
        Expectation(r"^composite_(forward|resample)_kernel<float, true>", (LOAD_128, STORE_128)),
        Expectation(r"^composite_(forward|resample)_kernel<(Half|Bfloat16), true>", (LOAD_64, STORE_128)),
        Expectation(r"^composite_backward_kernel<float, true, ", (LOAD_128, STORE_128)),
        Expectation(r"^composite_backward_kernel<(Half|Bfloat16), true, ", (LOAD_128, LOAD_64, STORE_64)),
        Expectation(r"^composite_(forward|resample|backward)_kernel<\w+, false"),
    ),
    # The words of a row start anywhere; integer arithmetic hides their stores.
    "counter_words": (Expectation(r"^counter_words_kernel"),),
    # Features leave 128 bits at a time whatever their number type; the backward reads their gradients so.
    "frustum_ipe": (
        Expectation(r"^frustum_ipe::frustum_ipe_forward_", (STORE_128,)),
        Expectation(r"^frustum_ipe::frustum_ipe_forward_kernel<\w+, true>", (EXP2,)),
        Expectation(r"^frustum_ipe::frustum_ipe_backward_kernel<\w+, true>", (LOAD_128, EXP2)),
        Expectation(r"^frustum_ipe::frustum_ipe_backward_kernel<\w+, false>", (EXP2,)),
    ),
    # Products of 16 x 8 x 16, operands by ldmatrix (wgrad: transposed), weights and samples by asynchronous copies of
    # 16 bytes. Two blocks of 256 threads on a multiprocessor, one of width 256.
    "mlp": (
        Expectation(r"^mlp_mma::mlp_(forward|dgrad)_kernel<", (HMMA, LDSM, COPY_128)),
        # What composites (its last template argument) keeps nothing for a backward pass.
        Expectation(r"^mlp_mma::mlp_(dgrad_kernel<|forward_kernel<.*\bfalse>)", (STREAM_128,)),
        Expectation(r"^mlp_mma::mlp_(forward|dgrad)_kernel<(64|128), ", registers=128),
        Expectation(r"^mlp_mma::mlp_wgrad_kernel<", (HMMA, LDSM_TRANSPOSED, COPY_128), registers=128),
        Expectation(r"^mlp_mma::mlp_pack_kernel<", (STORE_128,)),
        Expectation(r"^mlp_mma::mlp_(sum_splits_kernel|ray_sums_kernel<)", (LOAD_128, STORE_128)),
        # 9.0a: warpgroup products of the right shape; 384 threads start with 168 registers each and share them anew.
        Expectation(
            r"^mlp_hopper::mlp_(forward|dgrad)_kernel<", (COPY_MULTICAST, SHARE_REGISTERS), registers=168
        ),
        Expectation(r"^mlp_hopper::mlp_wgrad_kernel<", (COPY_BULK, SHARE_REGISTERS), registers=168),
        *(
            Expectation(rf"^mlp_hopper::mlp_{kernel}_kernel<{width}, ", products)
            for width in (64, 128, 256)
            for kernel, products in {
                "forward": (hgmma(width), hgmma(width // 2 + 8), hgmma(8)),
                "dgrad": (hgmma(width),),
                "wgrad": (hgmma(32 if width == 64 else width), hgmma(8)),
            }.items()
        ),
        Expectation(r"^mlp_hopper::mlp_pack_kernel<", (STORE_128,)),
        Expectation(r"^mlp_hopper::mlp_reduce_kernel<", (LOAD_64,)),
        Expectation(r"^mlp_hopper::mlp_ray_sum_kernel<", (LOAD_128,)),
        Expectation(r"^mlp_hopper::mlp_clear_kernel"),
    ),
    "resample": (
        Expectation(r"^resample_kernel<true>", (LOAD_128,)),
        Expectation(r"^resample_kernel<false>"),
    ),
    # <features>: an entry of floats is gathered by one load; its gradient is added by one instruction from 9.0 on.
    "hash_encode": (
        Expectation(r"^hash_encode_(forward|backward)_kernel<4>", (LOAD_128,)),
        Expectation(r"^hash_encode_(forward|backward)_kernel<2>", (LOAD_64,)),
        Expectation(r"^hash_encode_forward_kernel<4>", (STORE_128,)),
        Expectation(r"^hash_encode_scatter_kernel<", (ADD,)),
        Expectation(
            r"^hash_encode_scatter_kernel<4, FloatSums>", (ADD_4,), (ADD_1,), architectures=VECTOR_ADDS
        ),
        Expectation(
            r"^hash_encode_scatter_kernel<2, FloatSums>", (ADD_2,), (ADD_1,), architectures=VECTOR_ADDS
        ),
        *FIXED_SUMS,
    ),
    "march": (
        Expectation(r"^(march_count|ray_starts)_kernel", ("SHFL",)),
        Expectation(r"^march_write_kernel"),
    ),
    "packed_composite": (Expectation(r"^packed_composite_(forward|backward)_kernel", ("SHFL",), ("BAR",)),),
    "sparse_adam": (
        Expectation(r"^sparse_adam_kernel<4>", (LOAD_128, STORE_128, STORE_64)),
        Expectation(r"^sparse_adam_kernel<1>"),
    ),
    # A thread's ray is three floats here, one there: nothing wide to expect, as of draw_rays.
    "ray_batch": (Expectation(r"^ray_batch_kernel"),),
    "draw_rays": (Expectation(r"^draw_rays_kernel"),),
    # <products in TF32>: weights come from global memory four at a time, samples from shared memory: see
    # tiny_mlp_products.cuh.
    "tiny_mlp": (
        *networks(r"^tiny_mlp_(forward|backward)_kernel<"),
        Expectation(r"^(pack_networks|sum_parts)_kernel"),
    ),
    # <number type of the tables, features, products in TF32>: entries of four halves are gathered by one load of 64
    # bits.
    "fast_step": (
        *networks(r"^(step_(density|colour|density_backward|colour_backward)|fast_render)_kernel<"),
        Expectation(r"^(step_density|fast_render)_kernel<Half, 4, ", (LOAD_64,), architectures=TENSOR_CORES),
        Expectation(r"^(step_density|fast_render)_kernel<Half, 4, false>", (LOAD_64,)),
        Expectation(r"^step_samples_kernel", (STORE_128,)),
        Expectation(r"^step_scatter_kernel<", (LOAD_128, ADD)),
        Expectation(r"^step_scatter_kernel<4, FloatSums>", (ADD_4,), (ADD_1,), architectures=VECTOR_ADDS),
        Expectation(r"^step_scatter_kernel<2, FloatSums>", (ADD_2,), (ADD_1,), architectures=VECTOR_ADDS),
        *FIXED_SUMS,
        Expectation(r"^step_(begin|scan|list|loss|finish|pace)_kernel"),
    ),
    "occupancy": (
        *networks(r"^occupancy_visit_kernel<"),
        Expectation(r"^occupancy_sum_kernel", (LOAD_128,)),
        Expectation(r"^occupancy_(bits|dilate|skip)_kernel", ("VOTE",)),
        Expectation(r"^occupancy_(threshold|summary|count)_kernel"),
    ),
}


@dataclass
class Kernel:
    """One kernel compiled for one architecture."""

    operation: str
    architecture: str
    symbol: str
    name: str = ""
    registers: int = 0
    shared_bytes: int = 0
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    # Of the compiler, on products that it serialises and registers that it does not share.
    remarks: list[str] = field(default_factory=list)
    instructions: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Effort:
    """What the check took: seconds on the clock and of the processor, compilers at a time, processors there are."""

    wall_seconds: float
    cpu_seconds: float
    jobs: int
    cores: int

    def sentence(self) -> str:
        """For the table; says so where it was too long."""
        said = (
            f"The check took {self.wall_seconds / 60:.1f} minutes, {self.cpu_seconds / 60:.1f} of the processor, with "
            f"{self.jobs} compilers at a time on {self.cores} cores"
        )
        if self.wall_seconds > 60 * MINUTES:
            return f"{said}: **more than the {MINUTES} minutes that it should take on two**."
        return f"{said}; it should take at most {MINUTES} on two."


def parse_ptxas(text: str) -> list[Kernel]:
    """The kernels that `ptxas -v` reports on, in its order; functions that are no kernels are left out."""
    kernels: dict[str, Kernel] = {}
    of_properties: Kernel | None = None
    latest: Kernel | None = None
    remarks: dict[str, list[str]] = {}
    for line in text.splitlines():
        # C7508: setmaxnreg is ignored; C7510 to C7520: warpgroup products wait for each other.
        if found := re.search(r"\((C75\d\d)\) (.*?) in (?:the )?function '(\S+)'", line):
            remarks.setdefault(found[3], []).append(f"{found[1]}: {found[2]}")
        elif found := re.search(r"Compiling entry function '(\S+)' for '(?:sm_)?(\S+)'", line):
            latest = kernels.setdefault(found[1], Kernel("", architecture_of(found[2]), found[1]))
        elif found := re.search(r"Function properties for (\S+)", line):
            of_properties = kernels.get(found[1])
        elif found := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            if of_properties is not None:
                of_properties.stack_bytes = int(found[1])
                of_properties.spill_store_bytes = int(found[2])
                of_properties.spill_load_bytes = int(found[3])
            elif latest is not None and any(int(number) for number in found.groups()):
                # A function that was not inlined: its stack is its caller's burden, and its kernel is at fault.
                latest.stack_bytes += int(found[1])
                latest.spill_store_bytes += int(found[2])
                latest.spill_load_bytes += int(found[3])
        elif (found := re.search(r"Used (\d+) registers", line)) and latest is not None:
            latest.registers = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            latest.shared_bytes = int(shared[1]) if shared else 0
    for symbol, kernel in kernels.items():
        kernel.remarks = remarks.get(symbol, [])
    return list(kernels.values())


def architecture_of(code: str) -> str:
    """sm_90a, written as in TORCH_CUDA_ARCH_LIST: 90a -> 9.0a, 120 -> 12.0."""
    digits = re.match(r"\d+", code)
    assert digits is not None, code
    return f"{digits[0][:-1]}.{digits[0][-1]}{code[digits.end() :]}"


def parse_sass(text: str) -> dict[str, Counter[str]]:
    """For each function of a `cuobjdump --dump-sass` listing, how often each opcode stands there."""
    functions: dict[str, Counter[str]] = {}
    current: Counter[str] | None = None
    for line in text.splitlines():
        if found := re.search(r"Function : (\S+)", line):
            current = functions.setdefault(found[1], Counter())
        elif current is not None and (
            found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", line)
        ):
            current[found[1]] += 1
    return functions


def count(instructions: dict[str, int] | Counter[str], pattern: str) -> int:
    return sum(
        number for opcode, number in instructions.items() if re.match(rf"(?:{pattern})(?![A-Z0-9])", opcode)
    )


def judge(kernel: Kernel, expected: Sequence[Expectation]) -> list[str]:
    """What is wrong with a kernel, each in a few words."""
    wrong = []
    if kernel.spill_store_bytes or kernel.spill_load_bytes:
        wrong.append(f"spills {kernel.spill_store_bytes} bytes out and {kernel.spill_load_bytes} in")
    if kernel.stack_bytes:
        wrong.append(f"has a stack frame of {kernel.stack_bytes} bytes in local memory")
    wrong += [f"is compiled with a remark, {remark}" for remark in kernel.remarks]
    if not kernel.instructions:
        wrong.append("is not in the disassembly")
        return wrong
    for opcode, what in NEVER.items():
        if number := count(kernel.instructions, opcode):
            wrong.append(f"has {number} {opcode} ({what})")
    rows = [row for row in expected if re.search(row.kernel, kernel.name)]
    if not rows:
        wrong.append("matches no row of EXPECTED in benchmarks/cuda_check.py")
    for row in (row for row in rows if re.match(row.architectures, kernel.architecture)):
        wrong += [f"has no {opcode}" for opcode in row.must if not count(kernel.instructions, opcode)]
        wrong += [f"has {opcode}" for opcode in row.must_not if count(kernel.instructions, opcode)]
        if kernel.registers > row.registers:
            wrong.append(f"takes {kernel.registers} registers of {row.registers}")
    return wrong


# -------------------------------------------------------------------------------------------------- the tools


def load_setup() -> ModuleType:
    """setup.py, which knows nvcc and the architectures that are built."""
    spec = importlib.util.spec_from_file_location("mipnerf_fast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def find_disassembler(nvcc_home: str) -> Path:
    """cuobjdump from the toolkit, from PATH, from an installed triton, or out of triton's wheel."""
    installed = importlib.util.find_spec("triton")
    folders = [Path(nvcc_home) / "bin", TOOLS]
    if installed is not None and installed.origin:
        folders.insert(1, Path(installed.origin).parent / "backends" / "nvidia" / "bin")
    on_path = shutil.which("cuobjdump")
    candidates = [Path(on_path)] if on_path else []
    candidates += [folder / "cuobjdump" for folder in folders]
    for path in candidates:
        if os.access(path, os.X_OK):
            return path
    return fetch_disassembler()


def fetch_disassembler() -> Path:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
            "triton",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(folder).glob("triton-*.whl"))
        if done.returncode != 0 or not wheels:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise CheckError(
                "no cuobjdump was found in the CUDA toolkit or on PATH, and the triton wheel, which holds one, "
                f"could not be downloaded: {last}"
            )
        TOOLS.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in ("nvdisasm", "cuobjdump"):
                member = f"triton/backends/nvidia/bin/{name}"
                if member not in wheel.namelist():
                    raise CheckError(f"{wheels[0].name} holds no {member}")
                partial = TOOLS / f"{name}.partial"
                partial.write_bytes(wheel.read(member))
                partial.chmod(0o755)
                partial.replace(TOOLS / name)
    return TOOLS / "cuobjdump"


def demangle(symbols: Sequence[str]) -> dict[str, str]:
    """Readable names without argument lists; the symbols themselves where there is no c++filt."""
    if not symbols or shutil.which("c++filt") is None:
        return dict(zip(symbols, symbols, strict=True))
    done = subprocess.run(["c++filt", "--no-params", *symbols], capture_output=True, text=True, check=True)
    return dict(zip(symbols, done.stdout.splitlines(), strict=True))


def compile_for(source: Path, architecture: str, nvcc: str, cuobjdump: Path) -> list[Kernel]:
    """The kernels of one source on one architecture, measured but not judged."""
    number = architecture.replace(".", "")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [
            nvcc,
            *NVCC_FLAGS,
            f"-gencode=arch=compute_{number},code=sm_{number}",
            str(source),
            "-o",
            str(cubin),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CheckError(
                f"{source.relative_to(ROOT)} does not compile for {architecture}:\n{done.stderr.strip()}"
            )
        kernels = parse_ptxas(done.stdout + done.stderr)
        environment = {**os.environ, "PATH": f"{cuobjdump.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        listing = subprocess.run(
            [str(cuobjdump), "--dump-sass", str(cubin)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        if listing.returncode != 0:
            raise CheckError(f"{cuobjdump} cannot read code for {architecture}: {listing.stderr.strip()}")
    if not kernels:
        raise CheckError(f"{source.relative_to(ROOT)} instantiates no kernel")
    instructions = parse_sass(listing.stdout)
    names = demangle([kernel.symbol for kernel in kernels])
    for kernel in kernels:
        kernel.operation = source.parent.name
        kernel.name = re.sub(r"\bmipnerf::|\(anonymous namespace\)::|^void ", "", names[kernel.symbol])
        kernel.instructions = dict(instructions.get(kernel.symbol, {}))
    return kernels


# ------------------------------------------------------------------------------------------------- the check


def find_sources() -> list[Path]:
    """One `<op>_launch.cu` for each `<op>_kernels.cuh`."""
    headers = sorted(CSRC.glob("*/*_kernels.cuh"))
    if not headers:
        raise CheckError("there are no kernels: csrc/*/*_kernels.cuh matches nothing")
    sources = []
    for header in headers:
        source = header.with_name(header.name.replace("_kernels.cuh", "_launch.cu"))
        if not source.is_file():
            raise CheckError(
                f"{header.relative_to(ROOT)} has no {source.name} beside it that instantiates its kernels"
            )
        sources.append(source)
    return sources


def find_cxx_sources() -> list[Path]:
    return sorted(CSRC.glob("*/*_cublaslt.cpp"))


def find_jobs(
    sources: Iterable[Path], architectures: Sequence[str], setup: ModuleType
) -> list[tuple[Path, str]]:
    """Every source with every architecture that its operation can use."""
    return [
        (source, architecture)
        for source in sources
        for architecture in architectures
        if setup.gencode_flags([architecture], source.as_posix())
    ]


def all_architectures(setup: ModuleType) -> list[str]:
    """What the extension is built for."""
    return [name.removesuffix("+PTX") for name in setup.DEFAULT_ARCHITECTURES]


_COMMENT_OR_LITERAL = re.compile(r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])'""", re.DOTALL)


def code_of(text: str) -> str:
    """A source without comments and how its lines are broken, which change nothing that is compiled."""
    bare = _COMMENT_OR_LITERAL.sub(lambda found: " " if found[0].startswith("/") else found[0], text)
    return " ".join(bare.split())


def with_headers(sources: Iterable[Path]) -> list[Path]:
    """Sources and all that they include of ours, directly or not, each once."""
    found: dict[Path, None] = {}
    waiting = list(sources)
    while waiting:
        path = waiting.pop().resolve()
        if path in found:
            continue
        found[path] = None
        names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
        for name in names:
            # What is in neither is of the emulation, which nvcc does not see; of anything else it says so itself.
            waiting += [folder / name for folder in (path.parent, CSRC) if (folder / name).is_file()][:1]
    return list(found)


def fingerprint(jobs: Iterable[tuple[Path, str]], cxx_sources: Iterable[Path], setup: ModuleType) -> str:
    """A hash of what the check compiles: the code of all sources and headers, architectures and flags.

    Of the code alone, with paths below csrc: the same on every machine and in every checkout. Compilers are no part.
    """
    jobs, cxx_sources = list(jobs), list(cxx_sources)
    files = with_headers([*(source for source, _ in jobs), *cxx_sources])
    top = CSRC.resolve()
    content = {
        "jobs": sorted([source.resolve().relative_to(top).as_posix(), name] for source, name in jobs),
        "c++": sorted(source.resolve().relative_to(top).as_posix() for source in cxx_sources),
        "flags": [[flag for flag in NVCC_FLAGS if not flag.startswith("-I")], setup.CXX_FLAGS],
        "files": {
            path.relative_to(top).as_posix(): code_of(path.read_text(encoding="utf-8")) for path in files
        },
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_the_check(architecture: str, nvcc: str, cuobjdump: Path) -> None:
    """Two kernels that are written to spill, and to keep an array in local memory, must fail."""
    expected = {"spilling_kernel": "spills", "local_array_kernel": "stack frame"}
    kernels = compile_for(SELF_TEST / "faulty_launch.cu", architecture, nvcc, cuobjdump)
    for name, fault in expected.items():
        said = [sentence for k in kernels if name in k.name for sentence in judge(k, [Expectation("")])]
        if not any(fault in sentence for sentence in said) or not any("LDL" in sentence for sentence in said):
            raise CheckError(f"the check does not work: about {name} in {SELF_TEST.name} it says only {said}")


def global_accesses(instructions: dict[str, int]) -> str:
    """Loads, stores and atomics of global memory, counted by width in bits."""
    shown = []
    for label, pattern in (("load", "LDG"), ("store", "STG"), ("atomic", "RED|REDG|ATOM|ATOMG")):
        widths: Counter[int] = Counter()
        for opcode, number in instructions.items():
            if re.match(rf"(?:{pattern})\b", opcode):
                width = re.search(r"\.[USF]?(8|16|64|128)\b", opcode)
                widths[int(width[1]) if width else 32] += number
        if widths:
            shown.append(
                f"{label} " + "+".join(f"{widths[width]}x{width}" for width in sorted(widths, reverse=True))
            )
    return ", ".join(shown)


def summarise(kernels: Iterable[Kernel]) -> list[str]:
    """Each failure once, with the architectures that it is true of."""
    found: dict[str, list[str]] = {}
    for kernel in kernels:
        for failure in kernel.failures:
            found.setdefault(failure, []).append(kernel.architecture)
    return [f"{failure} ({', '.join(architectures)})" for failure, architectures in found.items()]


def table(kernels: Iterable[Kernel]) -> str:
    """One row per kernel; a cell per architecture with the registers, and whatever is not as it should be."""
    rows: dict[tuple[str, str], dict[str, Kernel]] = {}
    for kernel in kernels:
        rows.setdefault((kernel.operation, kernel.name), {})[kernel.architecture] = kernel
    architectures = list(dict.fromkeys(architecture for row in rows.values() for architecture in row))

    def cell(kernel: Kernel | None) -> str:
        if kernel is None:
            return ""
        sizes = {
            "shared": kernel.shared_bytes,
            "stack": kernel.stack_bytes,
            "spilled": kernel.spill_store_bytes + kernel.spill_load_bytes,
        }
        unusual = [f"{name} {size}" for name, size in sizes.items() if size]
        return str(kernel.registers) + (f" ({', '.join(unusual)})" if unusual else "")

    head = ["kernel", *architectures, "MUFU", "global accesses (count x bits)", "verdict"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(architectures) + 1)} --- | --- |"]
    for (_, name), row in rows.items():
        newest = row[max(row, key=architectures.index)]
        verdict = "; ".join(summarise(row.values())).replace("|", "\\|") or "pass"
        cells = [name, *(cell(row.get(architecture)) for architecture in architectures)]
        cells += [str(count(newest.instructions, "MUFU")), global_accesses(newest.instructions)]
        lines.append(f"| {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines)


# Of the instructions, the JSON keeps memory, special functions, what lanes exchange, barriers and matrix products.
TOLD = r"LD[GSL]|ST[GSL]|RED|ATOM|MUFU|SHFL|VOTE|WARPSYNC|BAR|UBLKCP|SYNCS|.?H?MMA|.GMMA"
EXPLANATION = """\
Registers per thread for each architecture. Bytes of static shared memory, of stack in local memory and of spills
stand beside them where there are any; shared memory asked for at launch is not in the compiled code. Special-function
instructions (MUFU) and accesses to global memory are counted in the code for the newest architecture."""


def report(
    kernels: list[Kernel],
    sources: list[CxxSource],
    effort: Effort,
    nvcc_release: str,
    revision: str,
    compiled: str,
    folder: Path,
) -> None:
    """Write the tables; `compiled` is the fingerprint of what was."""
    folder.mkdir(parents=True, exist_ok=True)
    failed = sum(bool(kernel.failures) for kernel in kernels)
    verdict = f"{len(kernels)} compilations of kernels, " + (f"{failed} failed" if failed else "all pass")
    head = f"# Kernels as compiled\n\nnvcc {nvcc_release}, revision {revision}; compiled, not run: {verdict}."
    head += f" {effort.sentence()}"
    hosts = "".join(f"C++: {source.sentence()}.\n" for source in sources)
    (folder / "cuda_check.md").write_text(
        f"{head}\n\n{EXPLANATION}\n\n{table(kernels)}\n" + (f"\n{hosts}" if hosts else "")
    )
    facts = json.dumps(
        {
            "nvcc": nvcc_release,
            "revision": revision,
            "fingerprint": compiled,
            "verdict": verdict,
            "effort": asdict(effort),
            "sources": [asdict(source) for source in sources],
        }
    )
    rows = []
    for kernel in kernels:
        told = {op: number for op, number in sorted(kernel.instructions.items()) if re.match(TOLD, op)}
        rows.append(json.dumps({**asdict(kernel), "instructions": told}))  # a line each, to be read in a diff
    (folder / "cuda_check.json").write_text(facts[:-1] + ', "kernels": [\n' + ",\n".join(rows) + "\n]}\n")
    print(f"{table(kernels)}\n\nnvcc {nvcc_release}: {verdict}\n{hosts}{effort.sentence()}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--architectures", help="such as '8.0 9.0a' (default: all that the extension is built for)"
    )
    parser.add_argument("--operations", help="such as 'composite resample' (default: all)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the tables"
    )
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="compilers at a time")
    parser.add_argument(
        "--fetch-cublas", action="store_true", help="fetch the headers of cuBLAS first; they stay in .cache"
    )
    options = parser.parse_args(arguments)
    try:
        return check(options)
    except CheckError as error:
        print(f"cuda-check: {error}", file=sys.stderr)
        return 2


def processor_seconds() -> float:
    """Of this process and the compilers that it has waited for."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def check(options: argparse.Namespace) -> int:
    began, began_cpu = time.perf_counter(), processor_seconds()
    setup = load_setup()
    nvcc: Any = setup.find_nvcc()
    if nvcc is None:
        raise CheckError(
            "nvcc was not found (in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda); it comes with the CUDA toolkit"
        )
    architectures = all_architectures(setup)
    if options.architectures:
        architectures = options.architectures.split()
    if missing := [name for name in architectures if name.rstrip("af") not in nvcc.capabilities]:
        raise CheckError(f"nvcc {nvcc.release} at {nvcc.path} cannot compile for {', '.join(missing)}")
    sources, cxx_sources = find_sources(), find_cxx_sources()
    if options.operations:
        wanted = options.operations.split()
        sources = [source for source in sources if source.parent.name in wanted]
        if {source.parent.name for source in sources} != set(wanted):
            raise CheckError(f"of the operations {options.operations}, not all have kernels under csrc")
        cxx_sources = [source for source in cxx_sources if source.parent.name in wanted]
    if options.fetch_cublas:
        fetch_cublas(nvcc.release.split(".")[0], TOOLS / "include")
    cuobjdump = find_disassembler(nvcc.home)
    check_the_check(architectures[-1], nvcc.path, cuobjdump)

    jobs = find_jobs(sources, architectures, setup)
    # Before the compilers read them: what is changed meanwhile makes the table out of date.
    of_sources = fingerprint(jobs, cxx_sources, setup)
    with ThreadPoolExecutor(options.jobs) as pool:
        groups = [pool.submit(compile_for, *job, nvcc.path, cuobjdump) for job in jobs]
        objects = [pool.submit(compile_cxx, source, setup, nvcc, TOOLS / "include") for source in cxx_sources]
        kernels = [kernel for group in groups for kernel in group.result()]
    for kernel in kernels:
        kernel.failures = judge(kernel, EXPECTED.get(kernel.operation, ()))
    compiled = [source.result() for source in objects]
    effort = Effort(
        time.perf_counter() - began,
        processor_seconds() - began_cpu,
        options.jobs,
        len(os.sched_getaffinity(0)),
    )
    report(kernels, compiled, effort, nvcc.release, setup.source_revision(), of_sources, options.out)
    for source in compiled:
        if source.failure:
            print(f"cuda-check: {source.source} {source.failure}", file=sys.stderr)
    for name in dict.fromkeys(kernel.name for kernel in kernels):
        for sentence in summarise(kernel for kernel in kernels if kernel.name == name):
            print(f"cuda-check: {name} {sentence}", file=sys.stderr)
    is_bad = any(kernel.failures for kernel in kernels) or any(source.failure for source in compiled)
    return 1 if is_bad else 0


if __name__ == "__main__":
    sys.exit(main())
