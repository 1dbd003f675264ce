"""The README: its tables are those of the result files, its links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.readme import filled
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


def test_the_chart_is_of_the_results() -> None:
    assert chart_is_current(ROOT / "benchmarks" / "results")
