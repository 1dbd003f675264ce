"""bench_mlp.py: torch.compile's rows, what a row is held against, and why one is not run."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks import bench_mlp, harness, rows
from benchmarks.bench_mlp import MODES, PAPER, SMALL
from benchmarks.harness import Case, Inputs, Outputs
from benchmarks.rows import BF16, FP32, TF32
from mipnerf_fast.ops.mlp_backends import CPU_BF16

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
COMPILED = "compile max-autotune fp32"


def small_case(mode: str, compiled: bool = False) -> Case:
    return bench_mlp.case(CPU, SMALL, 1, mode, "3 x 64", compiled)


def test_the_row_of_torch_compile_says_its_mode_and_operands() -> None:
    assert bench_mlp.compile_label(CPU) == COMPILED
    assert bench_mlp.compile_label(CUDA) == "compile max-autotune bf16"
    # Graphs would be of fixed inputs, which those of a benchmark are not.
    assert bench_mlp.COMPILE_MODE == "max-autotune-no-cudagraphs"


def test_a_size_without_a_time_of_torch_compile_says_so() -> None:
    for mode in MODES:
        left_out = small_case(mode)
        assert COMPILED not in left_out.variants()
        assert ("--compile-sizes" in left_out.not_run[COMPILED]) == (mode != MODES[1])
    assert COMPILED not in small_case(MODES[0], compiled=True).not_run
    assert COMPILED in small_case(MODES[0], compiled=True).variants()


def test_every_case_has_a_row_of_torch_compile_or_its_absence() -> None:
    for case in bench_mlp.cases(META):
        variants = case.variants()
        assert (COMPILED in variants) != (COMPILED in case.not_run)
        measured = "2^12 " in case.name and not case.name.startswith("forward,")
        assert (COMPILED in variants) == measured
        assert not set(variants) & set(case.not_run)
        assert set(case.references) <= set(variants)


def test_the_sizes_that_are_compiled_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, bool]] = []

    def case(device: object, shape: object, rays: int, mode: str, name: str, compiled: bool) -> None:
        made.append(((rays * bench_mlp.SAMPLES).bit_length() - 1, compiled))

    monkeypatch.setattr(bench_mlp, "case", case)
    bench_mlp.cases(CUDA, [14, 20])
    # Each in two modes of three, after all that are not compiled.
    assert [exponent for exponent, compiled in made if compiled] == [14, 14, 20, 20]
    assert [exponent for exponent, _ in made[:9]] == [17, 17, 17, 18, 18, 18, 19, 19, 19]
    made.clear()
    bench_mlp.cases(CUDA, [])
    assert not any(compiled for _, compiled in made)
    with pytest.raises(SystemExit, match=r"--compile-sizes \[13\]: expected some of \[14, 17, 18, 19, 20\]"):
        bench_mlp.cases(CUDA, [13, 14])


def test_the_sizes_are_an_option_of_the_command_line() -> None:
    """Read beside those that every benchmark has: what is wrong with either is said in one line."""

    def said(*arguments: str) -> str:
        command = [sys.executable, bench_mlp.__file__, "--device", "cpu", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode != 0 and "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]

    assert "--only 'nothing': no case has that" in said("--compile-sizes", "8", "14", "--only", "nothing")
    assert said("--compile-sizes", "13").startswith(
        "--compile-sizes [13]: expected some of [8, 10, 12, 14, 17]"
    )


def test_a_row_is_held_against_the_product_of_its_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU; on a GPU against bf16, as far as it could get."""
    asked: list[int] = []

    def rates(device: torch.device, size: int) -> dict[str, float]:
        asked.append(size)
        return {FP32: 1.0 * torch.get_num_threads(), BF16: 10.0, TF32: 3.0}

    bench_mlp._product_rates.cache_clear()
    monkeypatch.setattr(bench_mlp, "product_rates", rates)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for variant, rate in (("eager fp32", 1.0), ("folded bf16", 10.0), ("eager bf16 autocast", 10.0)):
            assert bench_mlp.product_rate(CPU, variant) == rate
        torch.set_num_threads(2)
        assert bench_mlp.product_rate(CPU, COMPILED) == 2.0
        for variant in ("eager fp32", "eager TF32", "fused bf16", "tcnn"):
            assert bench_mlp.product_rate(CUDA, variant) == 10.0
    finally:
        torch.set_num_threads(threads)
        bench_mlp._product_rates.cache_clear()
    # Once for a device and a number of threads.
    assert asked == [2048, 2048, 8192]


def test_the_share_of_the_product_is_that_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.Control, "moved", lambda self, seconds: False)
    monkeypatch.setattr(bench_mlp, "product_rate", lambda device, variant: 2e9 if BF16 in variant else 1e9)
    case = small_case(MODES[0])
    written, folded = bench_mlp.flops(SMALL, False)
    found = {row.variant: row for row in harness.measure(case, CPU, 1, "as it comes", 2, 1e10)}
    for name in ("eager fp32", "folded fp32", *(["folded bf16"] if CPU_BF16 else [])):
        row, rate = found[name], 2e9 if BF16 in name else 1e9
        assert row.median
        assert row.product_fraction == pytest.approx(128 * written / row.median / rate)
        assert row.folded_product_fraction == pytest.approx(128 * folded / row.median / rate)
    assert found[COMPILED].median is None and found[COMPILED].note.startswith("not run (")


def test_operations_are_those_that_rows_counts() -> None:
    assert bench_mlp.flops(PAPER, False) == (2 * 610_304, 2 * 541_312)
    assert bench_mlp.flops(PAPER, True) == (2 * (2 * 610_304 + 585_728), 2 * (2 * 541_312 + 492_160))


def test_tf32_is_in_force_in_the_backward_pass_too() -> None:
    """And no longer than that."""
    seen: list[str] = []

    def run(inputs: Inputs) -> Outputs:
        x = torch.ones(2, requires_grad=True)
        y = 2 * x
        y.register_hook(lambda grad: seen.append(torch.get_float32_matmul_precision()))
        y.sum().backward()
        return {"x": x}

    before = torch.get_float32_matmul_precision()
    bench_mlp.in_tf32(run)({})
    assert seen == ["high"]
    assert torch.get_float32_matmul_precision() == before


def test_references_are_of_the_precision_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 has one of its own; on a CPU, where it does not run, none."""
    assert "eager TF32" not in small_case(MODES[0]).references
    assert "GPU" in small_case(MODES[0]).not_run["eager TF32"]
    monkeypatch.setattr(bench_mlp, "no_products", lambda device: {})
    references = small_case(MODES[0]).references
    assert references["eager TF32"] is not references["eager bf16 autocast"]
    others = {label: run for label, run in references.items() if label != "eager TF32"}
    assert set(others.values()) == {references["eager bf16 autocast"]}
    monkeypatch.setattr(bench_mlp, "no_products", lambda device: {TF32: "none", BF16: "none"})
    missing = small_case(MODES[0])
    assert missing.not_run["eager bf16 autocast"] == "none"
    assert "eager bf16 autocast" not in missing.references


def test_why_an_engine_does_not_run() -> None:
    def why(backend: str, dtype: str) -> str:
        return bench_mlp.why_no_engine(PAPER, CPU, backend, dtype)

    assert why("folded", "fp32") == ""
    assert (why("folded", "bf16") == "") == CPU_BF16
    for engine in ("cublaslt", "fused"):
        assert why(engine, "bf16") == "it runs on a GPU, and the parameters are on cpu"
    # Of the network that stands for the paper's, which it could not express.
    assert "it runs on a GPU" in why("tcnn", "fp16") and "wants" not in why("tcnn", "fp16")


def test_the_rates_of_products_are_those_of_the_ceilings() -> None:
    assert rows.product_size(CPU) == 2048 and rows.product_size(CUDA) == 8192
    assert set(rows.product_rates(CPU, 64)) == set(rows.ceilings(CPU, 64).products)
