"""The benchmarks: every script imports, and the tables say what the numbers say."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_render, bench_train, row_tables, rows, run_all
from benchmarks.row_tables import put_table
from benchmarks.rows import (
    BF16,
    FP32,
    OURS,
    PYTORCH,
    Ceilings,
    Row,
    Variant,
    Work,
    error_bound,
    folded_multiply_adds,
    measure_rows,
    multiply_adds,
    network_shape,
    rendering_work,
    training_work,
)
from mipnerf_fast import InputError, MipNerf, MipNerfConfig, ops, preset, use_backend

SCRIPTS = sorted(path.stem for path in (Path(rows.__file__).parent).glob("*.py"))
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_can_be_imported(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    assert module.__doc__


# what a step is


def test_the_paper_s_network_is_counted_as_it_is_written() -> None:
    paper = MipNerfConfig()
    assert network_shape(paper) == MipNerf(paper).mlp.shape == ops.MlpShape()
    assert multiply_adds(ops.MlpShape()) == (610_304, 585_728)
    assert folded_multiply_adds(ops.MlpShape()) == (541_312, 492_160)
    step = training_work("paper", preset("paper"))
    assert (step.rays, step.samples) == (4096, 2**20)
    assert step.flops == 2 * 2**20 * (2 * 610_304 + 585_728)
    assert step.folded_flops == 2 * 2**20 * (2 * 541_312 + 492_160)
    frame = rendering_work("frame", paper, 640_000)
    assert frame.samples == 163_840_000
    assert frame.flops == 2.0 * 163_840_000 * 610_304
    # The coarse level: seven products of the trunk beside layer 0, and density.
    coarse = 24_576 + 262_144 + 90_112 + 131_072 + 256
    assert frame.folded_flops == 163_840_000 * (541_312 + coarse)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"net_depth": 6, "skip_layer": 2},
        {"use_viewdirs": False},
        {"net_depth_condition": 3},
        {"net_depth": 1},
    ],
)
def test_the_counts_are_those_of_the_products_that_torch_does(change: dict[str, Any]) -> None:
    config = MipNerfConfig(max_deg_point=4, net_width=32, net_width_condition=16, **change)
    torch.manual_seed(0)
    shape = network_shape(config)
    views = shape.view_features
    mlp = ops.MipMLP(*shape)
    features, directions = torch.rand(5, 6, 24), None if views is None else torch.rand(5, views)
    forward, to_inputs = multiply_adds(shape)
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        rgb, density = mlp(features, directions)
        assert counter.get_total_flops() == 2 * 30 * forward
        (rgb.sum() + density.sum()).backward()
    # Where the skip's columns are part of a layer, their gradient is computed with the others.
    assert counter.get_total_flops() == 2 * 30 * (2 * forward + to_inputs)
    folded, folded_inputs = folded_multiply_adds(shape)
    assert folded < forward or views is None
    assert folded_inputs < to_inputs or config.net_depth == 1 or views is None


# measuring


class Fake:
    """A row's computation that errs by a given amount."""

    repeats = 1

    def __init__(self, error: float) -> None:
        self.error, self.calls = error, 0

    def __call__(self) -> None:
        self.calls += 1

    def errors(self) -> dict[str, float]:
        return {"loss": self.error}


class Quiet:
    """A machine that is always the same, or never."""

    restless = False

    def __init__(self, device: torch.device) -> None:
        pass

    def __call__(self) -> float:
        return 1.0

    def moved(self, seconds: float) -> bool:
        return self.restless


def variant(name: str, family: str, error: float, operands: str = FP32, why_not: str = "") -> Variant:
    return Variant(name, family, operands, lambda: Fake(error), why_not)


def test_rows_are_timed_only_where_their_error_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "Control", Quiet)

    def broken() -> Fake:
        raise RuntimeError("no compiler\nfor this")

    found = measure_rows(
        [
            variant("eager fp32", PYTORCH, 1e-3),
            variant("eager bf16 autocast", PYTORCH, 1e-1, BF16),
            Variant("compiled", PYTORCH, FP32, broken, slow=True),
            variant("captured", PYTORCH, 0.0, BF16, "a CUDA graph needs a GPU"),
            variant("ours", OURS, 1.9e-3),
            variant("ours, wrong", OURS, 2.2e-3),
            variant("ours, NaN", OURS, math.nan),
            variant("ours bf16", OURS, 0.15, BF16),
            variant("ours tf32", OURS, 1e9, "tf32"),
        ],
        CPU,
        runs=3,
    )
    by_name = {row.name: row for row in found}
    assert [row.name for row in found][:3] == ["eager fp32", "eager bf16 autocast", "compiled"]
    for name in ("eager fp32", "eager bf16 autocast", "ours", "ours bf16"):
        row = by_name[name]
        assert row.median is not None and row.kept == 3 and not row.note
        assert row.p10 is not None and row.p90 is not None and 0 <= row.p10 <= row.median <= row.p90
    assert by_name["compiled"].note == "not run: RuntimeError: no compiler"
    assert by_name["captured"].note == "not run: a CUDA graph needs a GPU"
    assert by_name["ours, wrong"].note == "not timed: its loss is off by 2.2e-03, more than 2.1e-03"
    assert by_name["ours, NaN"].note == "not timed: its loss is off by nan"
    for name in ("compiled", "captured", "ours, wrong", "ours, NaN"):
        assert by_name[name].median is None
    # Nothing of PyTorch's to hold it against.
    assert error_bound("tf32", "loss", found) == math.inf


def test_torch_compile_has_a_row_of_each_mode_and_precision() -> None:
    def make(operands: str, mode: str) -> Fake:
        raise RuntimeError(f"{operands} {mode}")

    variants = rows.compiled_variants(make, {rows.TF32: "no GPU"})
    assert [v.name for v in variants][:3] == [f"torch.compile {x}" for x in ("fp32", "TF32", "bf16 autocast")]
    assert [v.name for v in variants][3:] == [
        f"torch.compile max-autotune {x}" for x in ("fp32", "TF32", "bf16 autocast")
    ]
    assert [v.why_not for v in variants] == ["", "no GPU", ""] * 2
    assert sorted(v.slow for v in variants) == [1, 2, 3, 4, 5, 6]
    # The one that ours is to be compared with comes first.
    assert min(variants, key=lambda v: v.slow).name == "torch.compile max-autotune bf16 autocast"
    with pytest.raises(RuntimeError, match="fp32 default"):
        variants[0].make()


def test_rows_that_take_minutes_are_last_and_may_be_left_out() -> None:
    made: list[str] = []

    def slow(name: str, order: int) -> Variant:
        def make() -> Fake:
            made.append(name)
            raise RuntimeError("no compiler")

        return Variant(name, PYTORCH, FP32, make, slow=order)

    measure_rows([slow("c", 3), slow("a", 0), slow("b", 1)], CPU, runs=1)
    assert made == ["a", "b", "c"]
    report = made_up()
    assert row_tables.leave_out_slow(report, 1)
    assert not row_tables.leave_out_slow(report, 2)
    waits = Row("torch.compile", PYTORCH, FP32, note=rows.NOT_MEASURED, slow=2)
    put_table(report, dataclasses.replace(WORK, title="other"), [waits])
    assert row_tables.leave_out_slow(report, 2)
    assert report["tables"][1]["rows"][0]["note"] == "not measured (out of time)"
    assert report["tables"][0]["rows"][2]["note"] == "not run: a CUDA graph needs a GPU"
    put_table(report, WORK, [dataclasses.replace(waits, slow=0)])
    assert not row_tables.leave_out_slow(report, 2)


ENDS = """
import os, signal, sys
from benchmarks.rows import told_to_end
def end():
    print("said", flush=True)
    return {complete}
with told_to_end(end):
    os.kill(os.getpid(), signal.SIGTERM)
    sys.exit(7)
"""


@pytest.mark.parametrize("complete", [True, False])
def test_a_benchmark_that_is_told_to_end_says_whether_it_is_complete(complete: bool) -> None:
    root = Path(rows.__file__).parents[1]
    code = ENDS.format(complete=complete)
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "said\n", done.stderr
    assert done.returncode == (0 if complete else 128 + signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_restless_machine_gives_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "Control", Quiet)
    monkeypatch.setattr(Quiet, "restless", True)
    (row,) = measure_rows([variant("eager fp32", PYTORCH, 0.0)], CPU, runs=3)
    assert row.median is None
    assert row.note == "not measured: the control moved beside 12 of 12 calls"


# the computations themselves, at a size for a test

STEP = dataclasses.replace(
    preset("small"),
    batch_size=24,
    model=MipNerfConfig(num_samples=8, max_deg_point=4, net_depth=2, net_width=16, net_width_condition=8),
)


@pytest.fixture(scope="module")
def problem() -> bench_train.Problem:
    return bench_train.Problem(STEP, bench_train.random_images(3, 10), CPU)


def test_every_row_of_a_step_is_the_same_step(problem: bench_train.Problem) -> None:
    eager = bench_train.ReferenceStep(problem, FP32)
    found = {"eager": eager.errors()}
    for engine in ("reference", "folded"):
        ours = bench_train.TrainerStep(problem, engine, "fp32")
        found[engine] = ours.errors()
        before = ours.trainer.step
        ours()
        assert ours.trainer.step == before + ours.repeats
    # Float32 sums of a few hundred products: far below the floor that the table itself allows.
    for errors in found.values():
        assert set(errors) == {"loss", "gradient"}
        assert errors["loss"] < 1e-5
        assert errors["gradient"] < rows.FLOOR
    rounded = bench_train.ReferenceStep(problem, BF16).errors()
    # Operands of eight bits: each is off by up to 2^-9, and so is the whole to within an order of magnitude.
    assert 2**-9 / 10 < rounded["gradient"] < 2**-9 * 50
    # A step changes the weights that the next one starts from.
    weights = [p.detach().clone() for p in eager.model.parameters()]
    eager()
    assert all(not torch.equal(a, b) for a, b in zip(weights, eager.model.parameters(), strict=True))


def test_a_step_that_is_another_one_is_found_out(problem: bench_train.Problem) -> None:
    other = bench_train.ReferenceStep(problem, FP32)
    other.initial = [2 * value for value in other.initial]
    assert other.errors()["gradient"] > 0.1
    trainer = bench_train.TrainerStep(problem, "folded", "fp32")
    with torch.no_grad():
        trainer.trainer.work.flat.values.mul_(1.1)
    assert trainer.errors()["gradient"] > 0.01


@pytest.fixture
def frame() -> bench_render.Frame:
    torch.manual_seed(0)
    assert isinstance(STEP.model, MipNerfConfig)
    view = bench_train.random_images(1, 12).rays(0)
    return bench_render.Frame(MipNerf(STEP.model), view, CPU, trained=True)


@pytest.mark.parametrize("operands", [FP32, BF16])
def test_the_compiled_rows_are_one_graph_and_the_same(
    operands: str, problem: bench_train.Problem, frame: bench_render.Frame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is handed to torch.compile, with a back-end that compiles nothing: a break in the graph is an error."""
    compile_, asked = torch.compile, []

    def traced(function: Any, **options: Any) -> Any:
        asked.append(options)
        return compile_(function, fullgraph=options["fullgraph"], dynamic=False, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    step = bench_train.ReferenceStep(problem, operands, "default")
    eager = bench_train.ReferenceStep(problem, operands)
    whole = bench_render.ReferenceFrame(frame, operands, "max-autotune")
    assert [(options["fullgraph"], options["mode"]) for options in asked] == [
        (True, "default"),
        (True, "max-autotune"),
    ]
    # The rounding of the operands is that of the eager row; of float32 sums a few hundred products.
    allowed = {name: 1.5 * error + 1e-5 for name, error in eager.errors().items()}
    found = step.errors()
    assert set(found) == set(allowed)
    assert all(found[name] <= allowed[name] for name in found), (found, allowed)
    step()
    apart = bench_render.ReferenceFrame(frame, operands).errors()["colour"]
    assert whole.errors()["colour"] <= 1.5 * apart + 1e-5


def test_every_row_of_a_frame_is_the_same_frame(frame: bench_render.Frame) -> None:
    assert frame.count % frame.chunk == 0
    assert bench_render.chunk_of(640_000, 2**14) == 16_000
    for computation in (
        bench_render.ReferenceFrame(frame, FP32),
        bench_render.OurFrame(frame, "reference", "fp32"),
        bench_render.OurFrame(frame, "folded", "fp32"),
    ):
        assert computation.errors()["colour"] < 1e-5
        assert computation().rgb.shape == (144, 3)
    fast = bench_render.OurFrame(frame, "folded", "fp32", "fast").errors()
    # Where every ray is fog nothing is left out but what lies behind it.
    assert fast["PSNR to exact, dB"] > 40
    assert 0 <= fast["largest difference to exact"] < 0.01
    frame.state = {name: value + 0.1 for name, value in frame.state.items()}
    assert bench_render.OurFrame(frame, "folded", "fp32").errors()["colour"] > 1e-3


# tables


LIMITS = Ceilings(copy=2e10, products={BF16: 4e12, FP32: 1e12}, size=2048)
WORK = Work("small, 512 rays", 512, 32_768, 5e10, 4e10)


def made_up() -> dict[str, Any]:
    report = {
        "benchmark": "A training step",
        "about": "Medians.",
        "environment": {
            "device": "A machine",
            "vectors": "AVX512",
            "threads": 2,
            "torch": "2.13.0",
            "cuda": "",
            "revision": "abc",
            "library": "abc",
        },
        "ceilings": dataclasses.asdict(LIMITS),
        "tables": [],
    }
    table = [
        Row("eager fp32", PYTORCH, FP32, 0.2, 0.19, 0.21, 15, errors={"loss": 1e-6, "gradient": 2e-5}),
        Row("torch.compile", PYTORCH, FP32, 0.1, 0.09, 0.11, 15, errors={"loss": 1e-6}),
        Row("captured", PYTORCH, BF16, note="not run: a CUDA graph needs a GPU"),
        Row(
            "ours",
            OURS,
            FP32,
            0.05,
            0.04,
            0.06,
            15,
            launches=7,
            peak_bytes=3 << 20,
            errors={"loss": math.nan},
        ),
    ]
    put_table(report, WORK, table)
    return report


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_a_table_says_what_the_numbers_say() -> None:
    text = row_tables.markdown(made_up())
    lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    head = lines[0]
    assert all(len(line) == len(head) for line in lines)
    table = {line[0]: dict(zip(head, line, strict=True)) for line in lines[1:]}
    assert "ceiling: copy, 20 GB/s read plus written" in table
    assert table["ceiling: product of 2048 x 2048"]["TFLOP/s as written"] in ("4", "1")
    eager, ours = table["eager fp32"], table["**ours**"]
    assert (eager["ms"], eager["p10 - p90"], eager["rays/s"], eager["M samples/s"]) == (
        "200",
        "190 - 210",
        "2,560",
        "0.164",
    )
    assert (eager["TFLOP/s as written"], eager["folded"], eager["of its ceiling"]) == ("0.25", "0.2", "25%")
    assert eager["against eager fp32"] == "1.00 x"
    assert eager["against the best of PyTorch"] == "0.50 x"
    assert eager["error against float64"] == "loss 1.0e-06, gradient 2.0e-05"
    assert (ours["against eager fp32"], ours["against the best of PyTorch"]) == ("4.00 x", "2.00 x")
    assert (ours["launches"], ours["peak MiB"]) == ("7", "3")
    assert ours["error against float64"] == "loss nan"
    assert table["captured"]["ms"] == "not run: a CUDA graph needs a GPU"
    assert "A machine AVX512, 2 threads, torch 2.13.0, revision abc" in text


def test_a_report_is_written_whole_and_without_nan(tmp_path: Path) -> None:
    report = made_up()
    row_tables.write_report(report, tmp_path, "train_cpu")
    data = json.loads(
        (tmp_path / "train_cpu.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert data["tables"][0]["rows"][3]["errors"] == {"loss": "nan"}
    assert (tmp_path / "train_cpu.md").read_text() == row_tables.markdown(report)
    # The same table again takes the place of the first.
    put_table(report, WORK, [])
    put_table(report, dataclasses.replace(WORK, title="other"), [])
    assert [table["work"]["title"] for table in report["tables"]] == [WORK.title, "other"]


def test_what_a_reader_must_know_stands_above_the_tables(tmp_path: Path) -> None:
    report = made_up()
    assert "Warning" not in row_tables.markdown(report)
    report["environment"]["library"] = "old"
    slower = dataclasses.replace(LIMITS, products={BF16: 4e12, FP32: 0.7e12})
    put_table(report, dataclasses.replace(WORK, title="other"), [], slower)
    text = row_tables.markdown(report)
    above, _, _ = text.partition("## ")
    assert "**Warning: the native library is of revision old, the sources are of abc" in above
    assert "0.7 TFLOP/s beside 'other' and 1 beside 'small, 512 rays'" in above
    # A third less is no other machine.
    closer = dataclasses.replace(LIMITS, products={FP32: 0.76e12})
    put_table(report, dataclasses.replace(WORK, title="other"), [], closer)
    assert "TFLOP/s beside" not in row_tables.markdown(report)
    # The row's share is of the ceiling that was measured beside it.
    assert report["tables"][1]["ceilings"]["products"] == {FP32: 0.76e12}


def test_the_script_of_a_step_writes_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows, "Control", Quiet)
    monkeypatch.setattr(bench_train, "ceilings", lambda device: LIMITS)
    monkeypatch.setattr(bench_train, "preset", lambda name: STEP)
    images = bench_train.random_images(3, 10)
    monkeypatch.setattr(bench_train, "random_images", lambda views, size: images)
    before = signal.getsignal(signal.SIGTERM)
    command = ["--device", "cpu", "--sizes", "small:8", "--no-compile", "--runs", "1", "--out", str(tmp_path)]
    assert bench_train.main(command) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    report = json.loads((tmp_path / "train_cpu.json").read_text())
    (table,) = report["tables"]
    assert table["work"]["rays"] == 8 and table["ceilings"]["products"] == LIMITS.products
    by_name = {row["name"]: row for row in table["rows"]}
    assert by_name["eager fp32"]["median"] > 0 and by_name["ours, network folded fp32"]["median"] > 0
    compiled = [row for name, row in by_name.items() if name.startswith("torch.compile")]
    assert len(compiled) == 6 and all(row["note"].startswith("not run: ") for row in compiled)
    assert (tmp_path / "train_cpu.md").read_text() == capsys.readouterr().out.rstrip("\n") + "\n"


@pytest.mark.parametrize("has_bf16", [False, True])
def test_ceilings_of_this_machine(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No product that takes minutes because the processor has none like it."""
    monkeypatch.setattr(rows, "CPU_BF16", has_bf16)
    found = rows.ceilings(CPU, size=64)
    assert found.size == 64
    assert found.copy > 0
    assert set(found.products) == ({BF16, FP32} if has_bf16 else {FP32})
    assert (BF16 in rows.no_products(CPU)) == (not has_bf16)
    assert all(rate > 0 for rate in found.products.values())


def test_relative_error() -> None:
    want = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    got = [torch.tensor([3.0, 0.3]), torch.tensor([[4.4]])]
    assert rows.relative(got, want) == pytest.approx(0.1, rel=1e-6)
    assert math.isnan(rows.relative([torch.tensor([math.nan, 0.0]), want[1]], want))


# everything


SCRIPT = """
import argparse, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("--device"); parser.add_argument("--out", type=pathlib.Path)
options = parser.parse_args()
count = options.out / "{name}.count"
count.write_text(str(int(count.read_text()) + 1 if count.exists() else 1))
print("on", options.device)
sys.exit({status})
"""


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """Two scripts in a folder of their own; the result says how often one ran."""
    (tmp_path / "benchmarks").mkdir()
    for name, status in (("good", 0), ("bad", 3)):
        (tmp_path / "benchmarks" / f"bench_{name}.py").write_text(SCRIPT.format(name=name, status=status))
    monkeypatch.setattr(run_all, "ROOT", tmp_path)

    def count(name: str) -> int:
        path = tmp_path / "out" / f"{name}.count"
        return int(path.read_text()) if path.exists() else 0

    return count


def test_a_series_goes_on_where_it_stopped(tmp_path: Path, scripts: Callable[[str], int]) -> None:
    facts, out = {"device": "A machine", "torch": "2.13.0", "revision": "abc"}, tmp_path / "out"
    chosen = run_all.benchmarks(None)
    assert [benchmark.name for benchmark in chosen] == ["bad", "good"]
    state = run_all.run_all(chosen, out, "cpu", facts)
    assert state["benchmarks"]["good"]["state"] == "done"
    assert state["benchmarks"]["bad"]["why"] == "exit status 3: on cpu"
    assert json.loads((out / "run_all.json").read_text()) == state
    assert (scripts("good"), scripts("bad")) == (1, 1)
    # What failed is tried again, what is done is not.
    run_all.run_all(chosen, out, "cpu", facts)
    assert (scripts("good"), scripts("bad")) == (1, 2)
    run_all.run_all(chosen, out, "cpu", facts, again=["good"])
    assert scripts("good") == 2
    run_all.run_all(chosen, out, "cpu", facts | {"revision": "def"})
    assert scripts("good") == 3
    (out / "run_all.json").write_text("{}")
    with pytest.raises(InputError, match="not a file of run_all"):
        run_all.run_all(chosen, out, "cpu", facts)


def test_the_series_knows_every_benchmark(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = {benchmark.name for benchmark in run_all.benchmarks(tmp_path)}
    assert {f"bench_{name}" for name in names} == {name for name in SCRIPTS if name.startswith("bench_")}
    assert {"train", "render", "quality", "fast_quality", "composite"} <= names
    assert not any("quality" in benchmark.name for benchmark in run_all.benchmarks(None))
    assert run_all.main(["--out", str(tmp_path), "--device", "cpu", "--only", "nothing"]) == 2
    assert "no benchmark 'nothing' here" in capsys.readouterr().err
