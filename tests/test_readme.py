"""The README: its tables are those of the result files, its links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.readme import fast_speed, filled, mlp_evidence, mlp_speed, speed
from benchmarks.readme_steps import chart_is_current, draw_steps, steps

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_result_files() -> None:
    assert filled(README, ROOT / "benchmarks" / "results") == README


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", README) + re.findall(r'src="([^"]+)"', README)
    local = [target for target in targets if "://" not in target]
    assert local
    for target in local:
        assert (ROOT / target).exists(), target


def test_a_block_is_replaced_and_a_missing_file_named(tmp_path: Path) -> None:
    text = "a\n<!-- results: table -->\nold\n<!-- end -->\nb\n"
    with pytest.raises(FileNotFoundError, match=r"'table' has no file table.md"):
        filled(text, tmp_path)
    (tmp_path / "table.md").write_text("| new |\n")
    assert filled(text, tmp_path) == "a\n<!-- results: table -->\n| new |\n<!-- end -->\nb\n"


def report(median: float | None) -> dict[str, Any]:
    def row(name: str, family: str, seconds: float | None) -> dict[str, Any]:
        return {"name": name, "family": family, "median": seconds, "p10": seconds, "p90": seconds}

    rows = [row("eager fp32", "PyTorch", 0.2), row("compiled", "PyTorch", 0.1), row("ours", "ours", median)]
    facts = {"device": "A CPU", "threads": 2, "torch": "2.13.0", "cuda": "", "revision": "abc"}
    tables = [{"work": {"title": "small, 512 rays", "rays": 512}, "rows": rows}]
    return {"benchmark": "A training step", "environment": facts, "tables": tables}


def test_the_digest_of_steps_and_its_chart(tmp_path: Path) -> None:
    assert steps(tmp_path) == "Not measured."
    assert chart_is_current(tmp_path)
    (tmp_path / "train_cpu.json").write_text(json.dumps(report(0.05)))
    text = steps(tmp_path)
    assert (
        "| A training step: small, 512 rays | eager fp32 | 200 | 200 - 200 | 2,560 | 1.00 x | 0.50 x |"
        in text
    )
    assert "|  | **ours** | 50 | 50 - 50 | 10,240 | 4.00 x | 2.00 x |" in text
    assert "A CPU, 2 threads, torch 2.13.0, revision abc. On a GPU: not measured." in text
    assert not chart_is_current(tmp_path)
    draw_steps(tmp_path)
    assert chart_is_current(tmp_path)
    # What gpu-check left comes first, and is named.
    on_gpu = report(0.01)
    on_gpu["environment"] |= {"device": "NVIDIA A", "threads": 0, "cuda": "13.0"}
    (tmp_path / "gpu" / "A-abc").mkdir(parents=True)
    commands = [{"result": on_gpu}, {"result": None}, {"result": {"steps": 3}}]
    (tmp_path / "gpu" / "A-abc" / "steps.json").write_text(json.dumps({"commands": commands}))
    text = steps(tmp_path)
    assert text.index("| **ours** | 10 |") < text.index("| **ours** | 50 |")
    assert "NVIDIA A, torch 2.13.0, revision abc" in text and "not measured" not in text
    assert 'src="benchmarks/results/steps.png"' in text
    assert not chart_is_current(tmp_path)
    (tmp_path / "gpu" / "A-abc" / "steps.json").unlink()
    # Another time: the chart is out of date; no time: no row.
    (tmp_path / "train_cpu.json").write_text(json.dumps(report(None)))
    assert not chart_is_current(tmp_path)
    assert "**ours**" not in steps(tmp_path)


def kernel_report(operation: str, *rows: dict[str, Any], device: str = "NVIDIA A") -> dict[str, Any]:
    facts = {"device": device, "torch": "2.13.0", "cuda": "13.0", "revision": "abc"}
    return {"operation": operation, "environment": facts, "runs": 20, "results": list(rows)}


def kernel_row(case: str, variant: str, median: float | None, **more: Any) -> dict[str, Any]:
    known = {"error": 1e-6, "speedup_median": None, "copy_fraction": 0.5, "items_per_second": None}
    known |= {"product_fraction": None, "peak_bytes": None, "note": ""}
    return {"case": case, "variant": variant, "median": median} | known | more


def test_operations_on_a_gpu_stand_in_the_readme_where_they_were_measured(tmp_path: Path) -> None:
    committed = ROOT / "benchmarks" / "results"
    for path in committed.glob("*_cpu.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for digest in (speed, fast_speed, mlp_speed):
        assert digest(tmp_path).endswith("On a GPU: not measured.")
    assert mlp_evidence(tmp_path).count("| not run | emulated (") == 2
    # As gpu-check leaves them: a command each, of which one has nothing, and one was ended by its time.
    march = kernel_report(
        "march",
        kernel_row("2048 rays", "eager", 0.2),
        kernel_row("2048 rays", "native", 1e-4, speedup_median=2000.0, items_per_second=2e8),
    )
    composite = kernel_report(
        "composite",
        kernel_row("4096 x 128", "compile", 3e-4),
        kernel_row("4096 x 128", "native", 1e-4, speedup_median=7.5),
        kernel_row("64 x 64", "native", None, note="not timed: the error is above its bound"),
    )
    network = kernel_report(
        "mlp",
        kernel_row("forward, 2^19 samples", "eager fp32", 0.02, speedup_median=1.0),
        kernel_row("forward, 2^19 samples", "fused bf16", 0.002, speedup_median=10.0, product_fraction=0.6),
        kernel_row("forward, 2^19 samples", "cublaslt bf16", None, note="not timed: the error"),
    )
    network["to_come"] = ["forward + backward, 2^19 samples"]
    commands = [{"result": r} for r in (march, composite, network, None)]
    folder = tmp_path / "gpu" / "A-abc"
    folder.mkdir(parents=True)
    (folder / "kernels.json").write_text(json.dumps({"commands": commands}))
    text = fast_speed(tmp_path)
    assert "| march | 2048 rays | 0.100 | 50% | 200.0 | 2000.0 x | - |" in text
    assert text.endswith("NVIDIA A, torch 2.13.0, revision abc.") and "composite | 4096" not in text
    text = speed(tmp_path)
    assert "| composite | 4096 x 128 | 0.100 | 50% | - | 7.5 x | 3.0 x |" in text
    assert "| composite | 64 x 64 | not timed: the error is above its bound | - | - | - | - |" in text
    assert "march" not in text and "not measured." not in text.rpartition("GPU")[2]
    text = mlp_speed(tmp_path)
    assert "| forward, 2^19 samples | fused bf16 | 2.000 | 10.00 x | 1e-06 | 60% | - |" in text
    assert text.endswith("Of mlp without forward + backward, 2^19 samples: time was over.")
    evidence = mlp_evidence(tmp_path)
    of_gpu = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[3].strip("| ") for line in evidence.split("\n")
    }
    mma, wgmma = (name for name in of_gpu if name.startswith("fused, "))
    assert of_gpu[mma] == of_gpu["reference"] == "executed, measured: NVIDIA A"
    assert of_gpu["cublaslt"] == of_gpu["folded"] == of_gpu[wgmma] == "**not run**"
    # A script by itself on another GPU stands beside.
    again = kernel_report("march", kernel_row("2048 rays", "native", 2e-4), device="NVIDIA B")
    (tmp_path / "march_cuda.json").write_text(json.dumps(again))
    assert "NVIDIA A, torch 2.13.0, revision abc; NVIDIA B, torch" in fast_speed(tmp_path)


def test_the_chart_is_of_the_results() -> None:
    assert chart_is_current(ROOT / "benchmarks" / "results")
