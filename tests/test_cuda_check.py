"""Reading what ptxas and the disassembler say about kernels, and failing where `make cuda-check` has to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import cuda_check, cuda_check_cxx
from benchmarks.cuda_check import Effort, Expectation, Kernel, judge, parse_ptxas, parse_sass
from benchmarks.cuda_check_cxx import CheckError, CxxSource

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5probeIN7mipnerf4HalfEEvPKfPT_l' for 'sm_90a'
ptxas info    : Function properties for _Z5probeIN7mipnerf4HalfEEvPKfPT_l
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 22 registers, used 0 barriers
ptxas info    : Compile time = 2.848 ms
ptxas info    : Compiling entry function '_Z15spilling_kernelPKfPf' for 'sm_90a'
ptxas info    : Function properties for _Z15spilling_kernelPKfPf
    2616 bytes stack frame, 3232 bytes spill stores, 4156 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 2616 bytes cumulative stack size, 1024 bytes smem, 368 bytes cmem[0]
"""

CALLING = """\
ptxas info    : Compiling entry function 'caller' for 'sm_75'
ptxas info    : Function properties for caller
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for not_inlined
    40 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 10 registers, 368 bytes cmem[0]
"""

SASS = """\
Fatbin elf code:
================
arch = sm_90a

	code for sm_90a
		Function : _Z5probeIN7mipnerf4HalfEEvPKfPT_l
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000fe20000000800 */
        /*0090*/               @P0 EXIT ;                                     /* 0x000000000000094d */
        /*00c0*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x0000000402047981 */
        /*00d0*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x10] ;
        /*00e0*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0110*/                   F2FP.F16.F32.PACK_AB R5, R7, R6 ;
        /*0120*/              @!P1 STG.E.U16 desc[UR4][R2.64], R4 ;
		Function : _Z15spilling_kernelPKfPf
        /*0010*/                   STL [R1+0x8], R4 ;
        /*0020*/                   LDL.LU R4, [R1+0x8] ;
        /*0030*/                   LDG.E R4, desc[UR4][R2.64] ;
"""


def test_parse_ptxas() -> None:
    probe, spilling = parse_ptxas(PTXAS)
    assert probe == Kernel("", "9.0a", "_Z5probeIN7mipnerf4HalfEEvPKfPT_l", registers=22)
    assert spilling.symbol == "_Z15spilling_kernelPKfPf"
    assert (spilling.registers, spilling.shared_bytes, spilling.stack_bytes) == (32, 1024, 2616)
    assert (spilling.spill_store_bytes, spilling.spill_load_bytes) == (3232, 4156)


def test_a_function_that_was_not_inlined_counts_against_its_kernel() -> None:
    (kernel,) = parse_ptxas(CALLING)
    assert (kernel.architecture, kernel.registers) == ("7.5", 10)
    assert (kernel.stack_bytes, kernel.spill_store_bytes, kernel.spill_load_bytes) == (40, 8, 12)


@pytest.mark.parametrize(
    ("code", "name"), [("75", "7.5"), ("90a", "9.0a"), ("100", "10.0"), ("120", "12.0"), ("103f", "10.3f")]
)
def test_architecture_names(code: str, name: str) -> None:
    assert cuda_check.architecture_of(code) == name


def test_what_ptxas_gave_up_on_is_a_failure() -> None:
    said = (
        "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
        "insufficient register resources for the wgmma pipeline in the function 'caller'\n"
    )
    (kernel,) = parse_ptxas(said + CALLING)
    assert any("C7511" in sentence for sentence in judge(kernel, [Expectation("")]))
    (kernel,) = parse_ptxas(said.replace("caller", "another") + CALLING)
    assert not kernel.remarks


def test_parse_sass() -> None:
    functions = parse_sass(SASS)
    assert functions["_Z5probeIN7mipnerf4HalfEEvPKfPT_l"] == {
        "LDC": 1,
        "EXIT": 1,
        "LDG.E.128.CONSTANT": 2,
        "UIADD3": 1,
        "F2FP.F16.F32.PACK_AB": 1,
        "STG.E.U16": 1,
    }
    assert functions["_Z15spilling_kernelPKfPf"] == {"STL": 1, "LDL.LU": 1, "LDG.E": 1}


def test_accesses_by_width() -> None:
    accesses = {
        "LDG.E.128.CONSTANT": 2,
        "LDG.E": 3,
        "LDG.E.U8": 1,
        "STG.E.64": 4,
        "REDG.E.ADD.F64.RN": 1,
        "LDS": 9,
    }
    said = cuda_check.global_accesses(accesses)
    assert said == "load 2x128+3x32+1x8, store 4x64, atomic 1x64"


def compiled(**changes: object) -> Kernel:
    kernel = Kernel("op", "8.0", "symbol", "op_forward_kernel<float>", registers=20)
    kernel.instructions = {"LDG.E.128": 2, "STG.E.128": 1, "EXIT": 1}
    for name, value in changes.items():
        setattr(kernel, name, value)
    return kernel


ROW = Expectation(
    "^op_forward_kernel<", must=(r"LDG\.E\.128", r"STG\.E\.128"), must_not=(r"LDG\.E\.64", "BAR")
)


def test_a_good_kernel_passes() -> None:
    assert judge(compiled(), [ROW]) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spill_store_bytes": 8, "spill_load_bytes": 12}, "spills 8 bytes out and 12 in"),
        ({"stack_bytes": 16}, "stack frame of 16 bytes"),
        ({"instructions": {}}, "not in the disassembly"),
        ({"instructions": {"LDG.E.128": 1, "STG.E.128": 1, "LDL.LU": 3}}, "3 LDL"),
        ({"instructions": {"LDG.E.128": 1, "STG.E.128": 1, "STL.64": 1}}, "1 STL"),
        ({"instructions": {"LDG.E": 4, "STG.E.128": 1}}, "has no LDG"),
        ({"instructions": {"LDG.E.128": 1, "STG.E.128": 1, "BAR.SYNC.DEFER_BLOCKING": 1}}, "has BAR"),
        ({"instructions": {"LDG.E.128": 1, "STG.E.128": 1, "DFMA.RN": 1}}, "double arithmetic"),
        ({"name": "op_backward_kernel"}, "matches no row"),
    ],
)
def test_a_bad_kernel_is_told_why(changes: dict[str, object], said: str) -> None:
    (sentence,) = judge(compiled(**changes), [ROW])
    assert said in sentence


@pytest.mark.parametrize(
    ("operation", "kernel"),
    [
        ("tiny_mlp", "tiny_mlp_backward_kernel<{}>"),
        ("fast_step", "step_density_kernel<Half, 4, {}>"),
        ("fast_step", "step_density_backward_kernel<float, 2, {}>"),
        ("fast_step", "step_colour_kernel<{}>"),
        ("fast_step", "step_colour_backward_kernel<{}>"),
        ("fast_step", "fast_render_kernel<Half, 2, {}>"),
        ("occupancy", "occupancy_visit_kernel<Half, 4, {}>"),
    ],
)
def test_the_networks_in_tf32_are_on_tensor_cores(operation: str, kernel: str) -> None:
    expected = cuda_check.EXPECTED[operation]
    plain = {"LDG.E.128.CONSTANT": 1, "LDG.E.64.CONSTANT": 1, "LDS.64": 1, "FFMA": 64}
    on_tensor_cores = {**plain, "HMMA.1688.F32.TF32": 16}
    in_float32, in_tf32 = kernel.format("false"), kernel.format("true")
    assert judge(compiled(name=in_float32, instructions=plain), expected) == []
    assert judge(compiled(name=in_tf32, instructions=on_tensor_cores), expected) == []
    (said,) = judge(compiled(name=in_tf32, instructions=plain), expected)
    assert "has no HMMA" in said
    (said,) = judge(compiled(name=in_float32, instructions=on_tensor_cores), expected)
    assert "has HMMA" in said
    assert judge(compiled(name=in_tf32, instructions=plain, architecture="7.5"), expected) == []


def test_an_opcode_is_matched_as_a_whole_word() -> None:
    assert cuda_check.count({"LDGSTS.E.128": 1, "LDG.E": 2}, "LDG") == 2
    assert cuda_check.count({"LDG.E.128.CONSTANT": 1}, r"LDG\.E\.128") == 1


def test_every_operation_with_kernels_has_expectations() -> None:
    operations = {path.parent.name for path in cuda_check.CSRC.glob("*/*_kernels.cuh")}
    assert operations == set(cuda_check.EXPECTED)


def test_kernels_that_nothing_instantiates_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_check, "CSRC", tmp_path)
    monkeypatch.setattr(cuda_check, "ROOT", tmp_path)
    with pytest.raises(CheckError, match="there are no kernels"):
        cuda_check.find_sources()
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "op_kernels.cuh").touch()
    with pytest.raises(CheckError, match=r"op_kernels\.cuh has no op_launch\.cu beside it"):
        cuda_check.find_sources()
    (tmp_path / "op" / "op_launch.cu").touch()
    assert cuda_check.find_sources() == [tmp_path / "op" / "op_launch.cu"]


KERNELS = """\
#pragma once
#include "../common/device.cuh"  // what every kernel needs
#include <cstdint>

__device__ const char* kText = "// no comment";
/* of two
   lines */
"""


def sources_in(folder: Path) -> Path:
    """A csrc of one operation, whose header includes another, and that one a header of the emulation."""
    (folder / "op").mkdir(parents=True)
    (folder / "common").mkdir()
    (folder / "op" / "op_launch.cu").write_text('#include "op_kernels.cuh"\nvoid launch();\n')
    (folder / "op" / "op_kernels.cuh").write_text(KERNELS)
    (folder / "op" / "op_cublaslt.cpp").write_text("int host;\n")
    (folder / "common" / "device.cuh").write_text('#include "cuda_emulation.h"\nint device;\n')
    (folder / "common" / "of_others.h").write_text("int other;\n")
    return folder


def test_the_fingerprint_is_of_the_code_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it lies, whatever order its files come in, whatever its comments say."""
    setup = cuda_check.load_setup()

    def found(csrc: Path, architectures: Sequence[str] = ("8.0", "9.0a"), reverse: bool = False) -> str:
        monkeypatch.setattr(cuda_check, "CSRC", csrc)
        jobs = cuda_check.find_jobs(cuda_check.find_sources(), architectures, setup)
        step = -1 if reverse else 1
        return cuda_check.fingerprint(jobs[::step], cuda_check.find_cxx_sources(), setup)

    csrc, elsewhere = (sources_in(tmp_path / name / "csrc") for name in ("one", "two"))
    first = found(csrc)
    assert first == found(csrc, reverse=True) == found(elsewhere)
    assert found(csrc, ["8.0"]) != first
    header = elsewhere / "op" / "op_kernels.cuh"
    header.write_text(KERNELS.replace("what every kernel needs", "another").replace("two\n", "\n\n  two\n"))
    (elsewhere / "common" / "of_others.h").write_text("int another;\n")
    assert found(elsewhere) == first
    # The rest is code: in a header, in one that it includes, in text, in the C++; and the flags.
    changes = {
        "op/op_kernels.cuh": KERNELS.replace("no comment", "none"),
        "op/op_launch.cu": '#include "op_kernels.cuh"\nvoid launches();\n',
        "op/op_cublaslt.cpp": "long host;\n",
        "common/device.cuh": "long device;\n",
    }
    for name, text in changes.items():
        before = (csrc / name).read_text()
        (csrc / name).write_text(text)
        assert found(csrc) != first, name
        (csrc / name).write_text(before)
    assert found(csrc) == first
    monkeypatch.setattr(cuda_check, "NVCC_FLAGS", ["-O2", f"-I{csrc}"])
    assert found(csrc) != first


def test_the_committed_table_is_of_today_s_sources() -> None:
    setup = cuda_check.load_setup()
    jobs = cuda_check.find_jobs(cuda_check.find_sources(), cuda_check.all_architectures(setup), setup)
    today = cuda_check.fingerprint(jobs, cuda_check.find_cxx_sources(), setup)
    path = cuda_check.ROOT / "benchmarks" / "results" / "cuda_check.json"
    committed = json.loads(path.read_text(encoding="utf-8")).get("fingerprint")
    assert committed == today, f"{path.name} is of other sources or flags: run make cuda-check"


def test_without_nvcc_one_sentence_and_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = cuda_check.load_setup()
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    monkeypatch.setattr(cuda_check, "load_setup", lambda: setup)
    assert cuda_check.main([]) == 2
    assert capsys.readouterr().err.startswith("cuda-check: nvcc was not found")


def fake_tools(folder: Path, ptxas: str, sass: str) -> tuple[str, Path]:
    """An nvcc and a cuobjdump that say what they are told to."""
    for name, text in (("nvcc", ptxas), ("cuobjdump", sass)):
        (folder / f"{name}.txt").write_text(text)
        (folder / name).write_text(f"#!/bin/sh\ncat '{folder / name}.txt'\n")
        (folder / name).chmod(0o755)
    return str(folder / "nvcc"), folder / "cuobjdump"


FAULTY_PTXAS = """\
ptxas info    : Compiling entry function 'spilling_kernel' for 'sm_80'
ptxas info    : Function properties for spilling_kernel
    2616 bytes stack frame, 3232 bytes spill stores, 4156 bytes spill loads
ptxas info    : Used 32 registers
ptxas info    : Compiling entry function 'local_array_kernel' for 'sm_80'
ptxas info    : Function properties for local_array_kernel
    256 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 26 registers
"""
FAULTY_SASS = """\
\t\tFunction : spilling_kernel
        /*0010*/                   LDL R4, [R1+0x8] ;
\t\tFunction : local_array_kernel
        /*0010*/                   LDL.64 R4, [R1+0x8] ;
"""


def test_the_check_is_satisfied_with_itself(tmp_path: Path) -> None:
    cuda_check.check_the_check("8.0", *fake_tools(tmp_path, FAULTY_PTXAS, FAULTY_SASS))


@pytest.mark.parametrize(
    ("unseen", "instead"),
    [
        ("3232 bytes spill stores, 4156", "0 bytes spill stores, 0"),
        ("256 bytes stack", "0 bytes stack"),
        ("LDL R4", "NOP"),
        ("LDL.64", "LD.64"),
        ("local_array_kernel", "another_kernel"),
    ],
)
def test_the_check_notices_that_it_is_blind(tmp_path: Path, unseen: str, instead: str) -> None:
    ptxas, sass = FAULTY_PTXAS.replace(unseen, instead), FAULTY_SASS.replace(unseen, instead)
    assert (ptxas, sass) != (FAULTY_PTXAS, FAULTY_SASS)
    with pytest.raises(CheckError, match="the check does not work"):
        cuda_check.check_the_check("8.0", *fake_tools(tmp_path, ptxas, sass))


def test_tables_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, newer = compiled(), compiled(architecture="9.0a", registers=24)
    bad = compiled(name="op_bad_kernel", stack_bytes=8, spill_load_bytes=12, failures=["spills"])
    source = CxxSource("csrc/op/op_cublaslt.cpp", "a header", "a compiler")
    effort = Effort(660.4, 1250.6, 2, 2)
    cuda_check.report([good, newer, bad], [source], effort, "13.0", "abc", "0f1e", tmp_path)
    data = json.loads((tmp_path / "cuda_check.json").read_text())
    assert data["verdict"] == "3 compilations of kernels, 1 failed"
    assert data["fingerprint"] == "0f1e"
    assert [kernel["registers"] for kernel in data["kernels"]] == [20, 24, 20]
    assert data["kernels"][0]["instructions"]["LDG.E.128"] == 2
    assert data["effort"] == {"wall_seconds": 660.4, "cpu_seconds": 1250.6, "jobs": 2, "cores": 2}
    assert data["sources"] == [
        {
            "source": "csrc/op/op_cublaslt.cpp",
            "header": "a header",
            "compiler": "a compiler",
            "failure": "",
        }
    ]
    text = (tmp_path / "cuda_check.md").read_text()
    assert "| kernel | 8.0 | 9.0a | MUFU | global accesses (count x bits) | verdict |" in text
    assert "| op_forward_kernel<float> | 20 | 24 | 0 | load 2x128, store 1x128 | pass |" in text
    assert (
        "| op_bad_kernel | 20 (stack 8, spilled 12) |  | 0 | load 2x128, store 1x128 | spills (8.0) |" in text
    )
    assert "C++: csrc/op/op_cublaslt.cpp compiles against a header (a compiler).\n" in text
    took = "The check took 11.0 minutes, 20.8 of the processor, with 2 compilers at a time on 2 cores"
    assert f"{took}; it should take at most 12 on two." in text
    assert "1 failed" in capsys.readouterr().out


def test_a_check_that_took_too_long_says_so() -> None:
    """On whatever machine; it does not fail."""
    assert "**more than the 12 minutes" in Effort(12 * 60 + 1, 100.0, 2, 2).sentence()
    assert "more than" not in Effort(12 * 60, 100.0, 2, 2).sentence()


def test_time_of_compilers_is_counted() -> None:
    before = cuda_check.processor_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(3_000_000))"], check=True)
    assert cuda_check.processor_seconds() > before + 0.01


def host_setup(folder: Path, code: int) -> tuple[SimpleNamespace, SimpleNamespace]:
    """A setup.py whose compiler notes its arguments and what cublasLt.h it was given, and an nvcc without cuBLAS."""
    compiler = folder / "c++"
    compiler.write_text(
        "#!/bin/sh\n"
        f"printf '%s\\n' \"$@\" >'{folder}/arguments'\n"
        f"for argument; do case $argument in -isystem*) cat ${{argument#-isystem}}/cublasLt.h >>'{folder}/seen' "
        "2>/dev/null;; esac; done\n"
        f"echo 'that is no C++' >&2\nexit {code}\n"
    )
    compiler.chmod(0o755)
    setup = SimpleNamespace(
        CUDA_MACRO="-DUSE_CUDA",
        find_compiler=lambda: str(compiler),
        run_quietly=lambda *_: "c++ 1.0\nmore",
        CXX_FLAGS=["-O3", "-DFLAG"],
    )
    return setup, SimpleNamespace(home=str(folder / "toolkit"), release="13.0")


@pytest.mark.parametrize("code", [0, 1])
@pytest.mark.parametrize("fetched", [False, True])
def test_the_cxx_that_calls_cublaslt(
    code: int, fetched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled as the extension does, against NVIDIA's header or what the tests declare, and a failure is one."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    setup, nvcc = host_setup(tmp_path, code)
    headers = tmp_path / "fetched"
    if fetched:
        headers.mkdir()
        (headers / "cublasLt.h").write_text("// NVIDIA's\n")
        (headers / "cublas_api.h").write_text(
            "#define CUBLAS_VER_MAJOR 13\n#define CUBLAS_VER_MINOR 1\n#define CUBLAS_VER_PATCH 0\n"
        )
    (source,) = cuda_check.CSRC.glob("*/*_cublaslt.cpp")
    monkeypatch.setattr(
        cuda_check_cxx.importlib.util, "find_spec", lambda _: SimpleNamespace(origin="/torch/x.py")
    )
    found = cuda_check_cxx.compile_cxx(source, setup, nvcc, headers)  # type: ignore[arg-type]
    assert found.source == "csrc/mlp/gemm_cublaslt.cpp" and found.compiler == "c++ 1.0"
    whose = "NVIDIA's header of cuBLAS 13.1.0" if fetched else "our declarations of cuBLASLt"
    assert found.header == whose
    assert found.failure == ("does not compile: that is no C++" if code else "")
    assert ("// NVIDIA's" in (tmp_path / "seen").read_text()) == fetched
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert {"-O3", "-DFLAG", "-DUSE_CUDA", "-c", str(source), f"-I{cuda_check.CSRC}"} <= set(arguments)


def test_without_torch_the_cxx_is_not_said_to_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, nvcc = host_setup(tmp_path, 0)
    monkeypatch.setattr(cuda_check_cxx.importlib.util, "find_spec", lambda _: None)
    (source,) = cuda_check.CSRC.glob("*/*_cublaslt.cpp")
    found = cuda_check_cxx.compile_cxx(source, setup, nvcc, tmp_path)  # type: ignore[arg-type]
    assert found.failure.startswith("not compiled: torch") and "not compiled" in found.sentence()
    assert not (tmp_path / "arguments").exists()
