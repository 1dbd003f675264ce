"""PSNR against seconds: the table, the chart, and the curves of a scene for a test."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import write_scene

from benchmarks import bench_quality
from benchmarks.bench_quality import Backend


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_marks_end_with_the_time() -> None:
    times = bench_quality.marks(120.0)
    assert times[0] == pytest.approx(120 / 50)
    assert times[-1] == pytest.approx(120)
    ratios = [b / a for a, b in itertools.pairwise(times)]
    assert max(ratios) == pytest.approx(min(ratios))


def curve(name: str, *points: tuple[float, float]) -> dict[str, Any]:
    return {
        "backend": {"name": name},
        "points": [{"seconds": s, "step": int(10 * s), "psnr": p} for s, p in points],
        "steps": 100,
        "seconds": points[-1][0],
        "rays_per_second": 5120.0,
        "precision": f"precision of {name}",
        "test_psnr": points[-1][1],
        "test_ssim": None,
    }


def test_time_to_reach_a_psnr() -> None:
    points = curve("a", (1.0, 10.0), (2.0, 20.0), (4.0, 15.0), (8.0, 25.0))["points"]
    assert bench_quality.time_to_reach(points, 9) == 1.0
    assert bench_quality.time_to_reach(points, 15) == 1.5
    assert bench_quality.time_to_reach(points, 22.5) == 7.0
    assert bench_quality.time_to_reach(points, 26) is None


def test_the_table_and_chart_of_quality(tmp_path: Path) -> None:
    report = {
        "title": "lego at 1/8",
        "about": "lego at 1/8, white.",
        "environment": {"device": "A machine", "torch": "2.13.0", "revision": "abc"},
        "curves": [
            curve("PyTorch fp32", (1.0, 10.0), (2.0, 20.0)),
            curve("ours", (1.0, 15.0), (2.0, 22.4)),
            {"backend": {"name": "fused"}, "why": "it runs on a GPU"},
        ],
    }
    lines = bench_quality.markdown(report).splitlines()
    head = cells(lines[0])
    assert head[6:] == [f"s to {psnr} dB" for psnr in range(17, 23)]
    table = {cells(line)[0]: dict(zip(head, cells(line), strict=True)) for line in lines[2:5]}
    assert table["PyTorch fp32"]["s to 20 dB"] == "2.0"
    assert table["PyTorch fp32"]["s to 22 dB"] == "-"
    assert table["ours"]["test PSNR (dB)"] == "22.40"
    assert table["ours"]["test SSIM"] == "n/a"
    assert table["fused"]["steps"] == "not run: it runs on a GPU"
    assert table["ours"]["precision"] == "precision of ours"
    assert all(len(cells(line)) == len(head) for line in lines[1:5])
    assert lines[-1].startswith("lego at 1/8, white. A machine, torch 2.13.0")
    bench_quality.draw(report, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 5000


PLAIN = {"operations": "reference"}
CURVES = [
    Backend("eager", **PLAIN),
    Backend("autocast", **PLAIN, autocast=True),
    Backend("compiled", **PLAIN, autocast=True, compile=True),
    Backend("folded", "auto", "folded", "fp32"),
    Backend("fused", "auto", "fused", "bf16"),
]


def test_curves_of_a_scene(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything but the time: a few seconds of every kind of curve on a few small views."""
    monkeypatch.setattr(bench_quality, "backends", lambda device: CURVES)
    # A break in the graph is an error; compiling itself would take longer than the test.
    assert bench_quality._COMPILE["fullgraph"]
    monkeypatch.setattr(bench_quality, "_COMPILE", bench_quality._COMPILE | {"backend": "aot_eager"})
    scene = write_scene(tmp_path / "scene", views=2)
    out = tmp_path / "out"
    common = ["--device", "cpu", "--data", str(scene), "--out", str(out)]
    assert bench_quality.main([*common, "--minutes", "0.05", "--downscale", "1", "--preset", "small"]) == 0
    report = json.loads((out / "quality_cpu.json").read_text())
    by_name = {curve["backend"]["name"]: curve for curve in report["curves"]}
    assert list(by_name) == [backend.name for backend in CURVES]
    assert "fused" in by_name["fused"]["why"]
    for name, precision in (
        ("eager", "fp32"),
        ("autocast", "bf16 autocast"),
        ("compiled", "bf16 autocast"),
        ("folded", "fp32"),
    ):
        curve = by_name[name]
        assert curve.get("why") is None, curve
        assert curve["precision"] == precision
        assert curve["steps"] > 0 and curve["seconds"] >= 3
        points = curve["points"]
        assert points and points[-1]["step"] <= curve["steps"]
        assert [p["seconds"] for p in points] == sorted(p["seconds"] for p in points)
        # What is taken on the way and what is taken at the end are the same measure, on the same pixels.
        assert points[-1]["psnr"] == pytest.approx(curve["test_psnr"], abs=1.5)
        assert curve["test_psnr"] > 5
    text = (out / "quality_cpu.md").read_text()
    assert text == bench_quality.markdown(report)
    assert "2 training views, 2 views of the split test, white background, 512 rays a step" in text
    assert "scene at 1/1 (12 x 12), preset small, 0.05 min each" in text
    assert (out / "quality_cpu.png").stat().st_size > 5000
    capsys.readouterr()
    assert bench_quality.main([*common, "--minutes", "0"]) == 2
    assert bench_quality.main([*common, "--preset", "fast"]) == 2
    said = capsys.readouterr().err
    assert "--minutes: must be positive" in said and "--preset fast: its model is not mip-NeRF" in said


def test_the_autocast_model_computes_in_bfloat16_and_returns_float32() -> None:
    seen = []

    class Model(torch.nn.Module):
        def forward(self, rays: Any, scale: float) -> list[Any]:
            product = rays.origins @ torch.eye(3)
            seen.append(product.dtype)
            return [bench_quality.Composite(*(scale * product for _ in bench_quality.Composite._fields))]

    class Rays:
        origins = torch.ones(2, 3)

    (level,) = bench_quality.InAutocast(Model())(Rays(), scale=2.0)
    assert seen == [torch.bfloat16]
    assert all(field.dtype == torch.float32 for field in level)
    assert torch.equal(level.rgb, torch.full((2, 3), 2.0))


def test_the_curves_of_a_gpu() -> None:
    found = {backend.name: backend for backend in bench_quality.backends(torch.device("cuda"))}
    kinds = {(b.operations == "reference", b.precision, b.compile, b.capture) for b in found.values()}
    assert kinds >= {
        (True, "fp32", False, False),
        (True, "bf16 autocast", False, False),
        (True, "bf16 autocast", True, False),
        (False, "bf16", False, False),
        (False, "bf16", False, True),
    }
