"""Building and running the emulated kernels from pytest.

``run("composite", arrays, outputs, scalars, seed)`` compiles ``emulate_composite.cpp`` (see ``program.h``) as
two programs and runs both on the same arrays: ``memory`` under AddressSanitizer and UBSan, ``races`` under the
race detector. Either stops at the first thing it finds, which arrives here as :class:`EmulationError` with its
sentence and the source lines. Binaries are kept in ``.cache/cuda_emulation``, named by the hash of everything
that went into them.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache" / "cuda_emulation"

# -g1: lines and functions for the messages; what else -g writes takes a quarter of the compiler's time.
COMMON_FLAGS = [
    "-std=c++17",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-unused-parameter",
]
# The float pairs of portable_math.h are exact only where no product is fused into a sum.
COMMON_FLAGS += [
    "-ffp-contract=off",
    "-DMIPNERF_CUDA_EMULATION",
    f"-I{HERE}",
    f"-I{ROOT / 'csrc'}",
    "-no-pie",
    "-fno-pie",
]
ADDRESS_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
RACE_FLAGS = ["-DMIPNERF_EMULATION_RACES"]
# Only the program itself is instrumented: for races, what -fsanitize=thread calls is in races.cpp, and what
# AddressSanitizer is to know of the runtime (stacks of fibers, guards around arrays) the runtime tells it. The check of
# memory is compiled without optimization: with it a program takes the compiler two to three times as long, for a tenth
# to a fifth of its own time. Checks of addresses are calls there, which compile in a fifth less time than code inline.
PROGRAM_FLAGS = {
    "memory": [*ADDRESS_FLAGS, "-O0", "--param", "asan-instrumentation-with-call-threshold=0"],
    "races": [*RACE_FLAGS, "-fsanitize=thread", "-O1"],
}
LINK_FLAGS = {"memory": ADDRESS_FLAGS, "races": []}
# The runtime: files that are the same for either check, and those that are not.
SHARED_RUNTIME = ["hopper_emulation.cpp", "program.cpp"]
RUNTIME_FLAGS = {"memory": ["-DMIPNERF_EMULATION_ADDRESSES", "-O2"], "races": [*RACE_FLAGS, "-O2"]}
RUNTIME_SOURCES = {
    "memory": ["emulation.cpp", "tensor_core.cpp"],
    "races": ["emulation.cpp", "tensor_core.cpp", "races.cpp"],
}
CHECKS = ("memory", "races")

RUN_SECONDS = 300
BUILD_SECONDS = 300


class EmulationError(AssertionError):
    """A kernel did what the emulation forbids, or could not be built; the message says what and where."""


def compiler() -> str:
    """The C++ compiler, as given by the environment variable CXX or g++."""
    return os.environ.get("CXX") or "g++"


def _call(command: Sequence[str | Path], what: str) -> str:
    try:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=BUILD_SECONDS
        )
    except FileNotFoundError:
        raise EmulationError(
            f"the CUDA emulation needs the C++ compiler {command[0]!s}, which is not on this machine: "
            "install g++"
        ) from None
    if done.returncode == 0:
        return done.stdout
    if re.search(r"(cannot find|no such file).*(asan|ubsan)", done.stderr, re.IGNORECASE):
        raise EmulationError(
            f"{command[0]} on this machine cannot link AddressSanitizer and UBSan, which the CUDA emulation "
            "needs: install libasan and libubsan (Debian and Ubuntu: they come with g++; Fedora: packages of "
            "these names)"
        )
    raise EmulationError(f"{what} failed:\n{done.stderr[-6000:]}")


@functools.cache
def _compiler_version(cxx: str) -> str:
    return _call([cxx, "--version"], "asking for the compiler's version")


@functools.cache
def _compile(source: Path, flags: tuple[str, ...]) -> Path:
    """The object file of one source, compiled unless an object of exactly these inputs is there."""
    command = [compiler(), *COMMON_FLAGS, *flags]
    listing = _call([*command, "-MM", source], f"preprocessing {source.name}")
    files = sorted(re.sub(r"\\\n", " ", listing).split(":", 1)[1].split())
    digest = hashlib.sha256("\0".join([_compiler_version(compiler()), *command]).encode())
    for file in files:
        digest.update(f"\0{file}\0".encode() + Path(file).read_bytes())
    kind = hashlib.sha256("\0".join(command).encode()).hexdigest()[:8]
    target = CACHE / f"{source.stem}-{kind}-{digest.hexdigest()[:24]}.o"
    _write_by(target, lambda path: _call([*command, "-c", source, "-o", path], f"compiling {source.name}"))
    os.utime(target)  # in use
    return target


def _write_by(target: Path, make: Callable[[Path], object]) -> None:
    """Lets ``make(path)`` write a file, unless it is there, that gets its name when complete.

    Of the processes that build one thing at the same time, as the workers of pytest-xdist do with what all programs
    share, one does and the others wait. Files of the same name but for the hash are left over from older sources;
    those an hour old go.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    kind = target.stem.rpartition("-")[0]
    with open(target.parent / f"{kind}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _write(target, kind, make)


def _write(target: Path, kind: str, make: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=target.suffix)
    os.close(handle)
    try:
        make(Path(name))
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
    for other in target.parent.glob(f"{kind}-*{target.suffix}"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if other.stat().st_mtime < time.time() - 3600:
                other.unlink()


@functools.cache
def _source_of(program: str | Path) -> Path:
    source = Path(program) if Path(program).suffix else HERE / f"emulate_{program}.cpp"
    if not source.exists():
        raise EmulationError(f"there is no emulation program {source}")
    return source.resolve()


@functools.cache
def build(program: str | Path, check: str = "memory", defines: tuple[str, ...] = ()) -> Path:
    """The executable of ``emulate_<program>.cpp`` (or of a source file) for one check (cached)."""
    # What only changes the runtime is told to those of its files that ask for it.
    of_runtime = [define for define in defines if define.startswith("MIPNERF_EMULATION_")]
    flags = [f"-D{define}" for define in defines if define not in of_runtime]
    parts = [(_source_of(program), (*PROGRAM_FLAGS[check], *flags))]
    parts += [(HERE / name, ("-O2",)) for name in SHARED_RUNTIME]
    for name in RUNTIME_SOURCES[check]:
        text = (HERE / name).read_text()
        flags = [f"-D{define}" for define in of_runtime if define in text]
        parts.append((HERE / name, (*RUNTIME_FLAGS[check], *flags)))
    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(lambda part: _compile(*part), parts))
    digest = hashlib.sha256("\0".join([check, *(path.name for path in objects)]).encode()).hexdigest()[:24]
    variant = hashlib.sha256("\0".join([str(_source_of(program)), *defines]).encode()).hexdigest()[:8]
    target = CACHE / f"{_source_of(program).stem}-{check}-{variant}-{digest}"
    link: list[str | Path] = [compiler(), *LINK_FLAGS[check], "-no-pie", *objects]

    def make(path: Path) -> None:
        _call([*link, "-o", path], f"linking {_source_of(program).name}")
        path.chmod(0o755)

    _write_by(target, make)
    return target


def _text(value: str) -> bytes:
    return struct.pack("<I", len(value.encode())) + value.encode()


def _record(
    kind: str, name: str, dtype: np.dtype, shape: Sequence[int], misalignment: int, values: bytes | None
) -> bytes:
    head = kind.encode() + _text(name) + _text(dtype.str) + struct.pack("<I", len(shape))
    head += struct.pack(f"<{len(shape)}q", *shape) + struct.pack("<II", misalignment, values is not None)
    return head + (values or b"")


def _read_records(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a file in the format of program.cpp."""
    arrays: dict[str, np.ndarray] = {}
    at = 0

    def numbers(form: str) -> tuple[Any, ...]:
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values

    def text() -> str:
        nonlocal at
        (length,) = numbers("I")
        at += length
        return data[at - length : at].decode()

    while data[at : at + 1] != b".":
        at += 1
        name, dtype = text(), np.dtype(text())
        (dimensions,) = numbers("I")
        shape = numbers(f"{dimensions}q")
        numbers("II")
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(data, dtype, count, at).reshape(shape).copy()
        at += count * dtype.itemsize
    return arrays


def run(
    program: str | Path,
    arrays: Mapping[str, np.ndarray | None],
    outputs: Mapping[str, tuple[Sequence[int], Any] | np.ndarray],
    scalars: Mapping[str, int | float | str] | None = None,
    seed: int = 0,
    *,
    checks: Sequence[str] = CHECKS,
    misalign: Mapping[str, int] | None = None,
    defines: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Runs an emulation program once per check and returns its outputs.

    arrays: inputs by name; None leaves one out (the program sees a null pointer). bfloat16 travels as uint16.
    outputs: (shape, dtype), which the program sees filled with 0xff bytes (NaN), or an array of first values.
    scalars: for Program::integer, number and text. seed: draws the order of threads and blocks.
    misalign: bytes past a 256-byte boundary at which an array starts (a view of a larger tensor).
    defines: macros of the build.
    Raises EmulationError when either check finds something.
    """
    misalign = dict(misalign or {})
    parts = []
    for name, array in arrays.items():
        if array is not None:
            array = np.asarray(array)
            parts.append(_record("A", name, array.dtype, array.shape, misalign.pop(name, 0), array.tobytes()))
    for name, wanted in outputs.items():
        if isinstance(wanted, np.ndarray):
            parts.append(
                _record("O", name, wanted.dtype, wanted.shape, misalign.pop(name, 0), wanted.tobytes())
            )
        else:
            parts.append(_record("O", name, np.dtype(wanted[1]), wanted[0], misalign.pop(name, 0), None))
    if misalign:
        raise ValueError(f"misalign names arrays that are not passed: {sorted(misalign)}")
    results: dict[str, np.ndarray] = {}
    with ThreadPoolExecutor(max_workers=len(CHECKS)) as pool:
        binaries = list(pool.map(lambda check: build(program, check, tuple(defines)), checks))
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in"), Path(folder, "out")
        source.write_bytes(b"".join(parts) + b".")
        for check, binary in zip(checks, binaries, strict=True):
            command = [str(binary), str(source), str(target), str(seed)]
            command += [
                f"{key}={value!r}" if isinstance(value, float) else f"{key}={value}"
                for key, value in (scalars or {}).items()
            ]
            environment = dict(os.environ)
            # Leaks: everything lives until the program ends. The checker would also not run under a debugger.
            environment["ASAN_OPTIONS"] = (
                "detect_leaks=0:abort_on_error=0:exitcode=71:detect_stack_use_after_return=0:symbolize=0"
            )
            environment["UBSAN_OPTIONS"] = "print_stacktrace=1:halt_on_error=1"
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=RUN_SECONDS, env=environment
            )
            if done.returncode != 0:
                message = (
                    _with_source_lines(binary, done.stderr[:6000])
                    or f"exit status {done.returncode}, no message"
                )
                raise EmulationError(f"{_source_of(program).stem} ({check} check, seed {seed}): {message}")
            results = results or _read_records(target.read_bytes())
    return results


def _with_source_lines(binary: Path, message: str) -> str:
    """Replaces the program counters of the race detector and of AddressSanitizer by functions and lines."""
    counter = re.compile(rf"place: (0x[0-9a-f]+)|\({re.escape(str(binary))}\+(0x[0-9a-f]+)\)")

    def before(match: re.Match[str]) -> int:
        return int(match[1] or match[2], 16) - 1  # the counters are those after the call

    places = _places(binary, [before(match) for match in counter.finditer(message)])
    return counter.sub(
        lambda match: f"place: {places[before(match)]}" if before(match) in places else match[0], message
    )


_known_places: dict[tuple[Path, int], str] = {}


def _places(binary: Path, addresses: Iterable[int]) -> dict[int, str]:
    """Function and line of each address, with what it is inlined into; of none where there are no binutils.

    addr2line reads all that the compiler wrote for debuggers, so it is started once for all addresses of a report,
    and not for those that an earlier report had: the seeds of one fault end at the same few.
    """
    wanted = dict.fromkeys(addresses)
    missing = [address for address in wanted if (binary, address) not in _known_places]
    if missing:
        command = ["addr2line", "-aCfsipe", str(binary), *(hex(address) for address in missing)]
        with contextlib.suppress(FileNotFoundError):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            # Each answer begins with its address; lines of what it is inlined into follow.
            for answer in re.split(r"^(?=0x)", done.stdout, flags=re.MULTILINE)[1:]:
                address, _, place = answer.strip().partition(": ")
                _known_places[binary, int(address, 16)] = place
    return {
        address: _known_places[binary, address] for address in wanted if (binary, address) in _known_places
    }


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits in uint16, rounded to nearest even (finite values and infinities)."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits in uint16 -> float32."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)
