"""The README's table of what is known of every engine of the network, against what happens here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mlp_engines import SHAPES, Engine, evaluate, exact, inputs, plain, relative_errors

from benchmarks.readme import mlp_compiled, mlp_evidence
from benchmarks.readme_gpu import kernel_reports
from mipnerf_fast.ops import MLP_BACKENDS, MipMLP

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHAPE = SHAPES["64 wide"]
ROWS = {
    cells[0]: cells[1:]
    for cells in (re.split(r" \| ", line.strip("| ")) for line in mlp_evidence(RESULTS).splitlines()[2:])
}
DTYPES = {"reference": "auto", "folded": "fp32", "emulated": "bf16"}


def test_the_readme_has_the_table_of_every_engine() -> None:
    assert mlp_evidence(RESULTS) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert {row.split(",")[0] for row in ROWS} == set(MLP_BACKENDS) - {"auto"}


@pytest.mark.parametrize("engine", list(ROWS))
def test_on_a_cpu(engine: str) -> None:
    """ "executed" computes outputs and gradients within the bound of its precision; "not run" refuses to."""
    name = engine.split(",")[0]
    assert ROWS[engine][0].startswith("executed") == (name in DTYPES)
    if name not in DTYPES:
        assert ROWS[engine][0].startswith("not run")
        with pytest.raises((RuntimeError, ValueError)):
            MipMLP(*SHAPE, backend=name)(*inputs(SHAPE, 2, 3))
        return
    mlp = Engine(name, DTYPES[name], "cpu").build(SHAPE)
    assert mlp.implementation.engine == name
    given = inputs(SHAPE, 64, 64)
    want = exact(mlp, *given)
    dtype = torch.float32 if mlp.implementation.dtype == torch.float32 else torch.bfloat16
    found, allowed = (
        relative_errors(evaluate(mlp, *given), want),
        relative_errors(plain(mlp, *given, dtype), want),
    )
    for quantity in ("all outputs", "all gradients"):
        assert found[quantity] <= 2 * allowed[quantity] + 1e-6


def test_the_files_that_it_names_exist() -> None:
    named = re.findall(r"`(tests/\w+\.py)`", mlp_evidence(RESULTS))
    assert named and all((ROOT / path).is_file() for path in named)


def test_each_generation_of_the_kernels_names_its_own_tests() -> None:
    """Those that compile and run its namespace."""
    for row, source in ((MMA, "emulate_mlp.cpp"), (WGMMA, "emulate_mlp_hopper.cpp")):
        (named,) = re.findall(r"`(tests/\w+\.py)`", ROWS[row][1])
        program = source.removeprefix("emulate_").removesuffix(".cpp")
        assert f'"{program}"' in (ROOT / named).read_text(encoding="utf-8")
        assert (ROOT / "tests" / "cuda_emulation" / source).is_file()


def test_nothing_is_said_to_have_run_on_a_gpu_without_its_results(tmp_path: Path) -> None:
    if not kernel_reports(RESULTS, ("mlp",)):
        assert all(cells[2] in ("**not run**", "-") for cells in ROWS.values())
    rows = [{"variant": "fused bf16", "median": 1.0}, {"variant": "cublaslt bf16", "median": None}]
    for device, measured in (("NVIDIA H200", WGMMA), ("NVIDIA A100-SXM4-80GB", MMA)):
        facts = {"operation": "mlp", "environment": {"device": device}, "results": rows}
        (tmp_path / "mlp_cuda.json").write_text(json.dumps(facts))
        lines = mlp_evidence(tmp_path).splitlines()
        run = [line.split(" | ")[0].removeprefix("| ") for line in lines if "executed, measured" in line]
        assert run == [measured]


MMA, WGMMA = "fused, mma.sync (8.x, 10.0, 12.0)", "fused, wgmma (9.0)"
COMPILED = ", compiled by `make cuda-check`"
ABSENT = ", not in the table of `make cuda-check`"


def checked(*kernels: tuple[str, str, str]) -> dict[str, Any]:
    """cuda_check.json with kernels of these operations, names and architectures."""
    names = ("operation", "name", "architecture")
    return {"kernels": [{**dict(zip(names, kernel, strict=True)), "failures": []} for kernel in kernels]}


def test_compiled_is_what_cuda_check_says() -> None:
    """Of these kernels, on every architecture that runs them, none of them failing; of another operation nothing."""
    older = ("8.0", "8.6", "8.9", "10.0", "12.0")
    mma = [("mlp", "mlp_mma::mlp_forward_kernel<64, Half, false>", architecture) for architecture in older]
    wgmma = [("mlp", "mlp_hopper::mlp_forward_kernel<64, Half, false>", "9.0a")]
    everything = checked(*mma, *wgmma)
    assert mlp_compiled(everything, MMA) == mlp_compiled(everything, WGMMA) == COMPILED
    for left_out in range(len(older)):
        assert mlp_compiled(checked(*mma[:left_out], *mma[left_out + 1 :], *wgmma), MMA) == ABSENT
    assert mlp_compiled(checked(*mma), WGMMA) == ABSENT
    tiny = [("tiny_mlp", "tiny_mlp_forward_kernel<true>", architecture) for architecture in (*older, "9.0a")]
    assert mlp_compiled(checked(*tiny), MMA) == mlp_compiled(checked(*tiny), WGMMA) == ABSENT
    everything["kernels"][0]["failures"] = ["spills"]
    assert "**fails**" in mlp_compiled(everything, MMA)
    assert mlp_compiled(everything, WGMMA) == COMPILED
    assert mlp_compiled({}, MMA) == ABSENT


def test_cublaslts_cxx_is_compiled_if_cuda_check_says_so() -> None:
    source = {"source": "csrc/mlp/gemm_cublaslt.cpp", "header": "a header", "compiler": "c++", "failure": ""}
    said = mlp_compiled({"sources": [source]}, "cublaslt")
    assert said == ", compiled against a header by `make cuda-check`"
    for nothing in ({}, {"sources": []}, {"sources": [{**source, "failure": "does not compile"}]}):
        assert mlp_compiled(nothing, "cublaslt") == ", not compiled by `make cuda-check`"


def test_the_table_that_is_committed_has_all_six_architectures() -> None:
    """Of the network's own kernels, without a failure."""
    kernels = json.loads((RESULTS / "cuda_check.json").read_text(encoding="utf-8"))["kernels"]
    ours = [kernel for kernel in kernels if kernel["operation"] == "mlp"]
    assert {kernel["architecture"] for kernel in ours} == {"8.0", "8.6", "8.9", "9.0a", "10.0", "12.0"}
    assert not any(kernel["failures"] for kernel in ours)
    for row in (MMA, WGMMA):
        assert ROWS[row][1].endswith(COMPILED)
