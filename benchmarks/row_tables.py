"""Tables of the rows that rows.py measures, as JSON and as Markdown."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import library_warning, machine
from benchmarks.rows import BASELINE, FP32, NOT_MEASURED, PYTORCH, Ceilings, Row, Work
from mipnerf_fast.durable_files import write_durably

# Of the fp32 ceiling, between the tables of a report: by more than this share, and they do not compare.
DRIFT = 1 / 3


def new_report(benchmark: str, device: torch.device, limits: Ceilings, about: str) -> dict[str, Any]:
    """An empty report; tables are added to it."""
    facts = machine(device) | {"threads": torch.get_num_threads() if device.type == "cpu" else 0}
    return {
        "benchmark": benchmark,
        "about": about,
        "environment": facts,
        "ceilings": asdict(limits),
        "tables": [],
    }


def put_table(
    report: dict[str, Any], work: Work, rows: Sequence[Row], limits: Ceilings | None = None
) -> None:
    """Add a table of measured rows, or put it in the place of an earlier state of it.

    limits: the ceilings as they were beside these rows; by default those of the report.
    """
    table = {"work": asdict(work), "rows": [asdict(row) for row in rows]}
    table["ceilings"] = report["ceilings"] if limits is None else asdict(limits)
    others = [other for other in report["tables"] if other["work"]["title"] != work.title]
    report["tables"] = [*others, table]


def leave_out_slow(report: dict[str, Any], tables: int) -> bool:
    """Time is over: say so of the slow rows that are not measured. Whether all else of so many tables is there."""
    complete = len(report["tables"]) == tables
    for table in report["tables"]:
        for row in table["rows"]:
            if row["note"] == NOT_MEASURED:
                complete = complete and bool(row["slow"])
                row["note"] = f"{NOT_MEASURED} (out of time)"
    return complete


def warnings(report: dict[str, Any]) -> list[str]:
    """What a reader of the tables must know first: a library of other sources, a machine that was not the same."""
    found = [library_warning(report["environment"])]
    rates = {
        table["work"]["title"]: table["ceilings"]["products"][FP32]
        for table in report["tables"]
        if FP32 in table["ceilings"]["products"]
    }
    if rates:
        low, high = min(rates, key=lambda title: rates[title]), max(rates, key=lambda title: rates[title])
        if rates[high] > (1 + DRIFT) * rates[low]:
            found.append(
                f"**Warning: the machine was not the same for all tables: its fp32 product made "
                f"{rates[low] * 1e-12:.3g} TFLOP/s beside {low!r} and {rates[high] * 1e-12:.3g} beside {high!r}. "
                "Only rows of one table compare.**"
            )
    return [warning for warning in found if warning]


def best_pytorch(rows: Sequence[dict[str, Any]]) -> float | None:
    """The shortest median among PyTorch's rows, of any operands."""
    medians = [row["median"] for row in rows if row["family"] == PYTORCH and row["median"]]
    return min(medians, default=None)


_HEAD = (
    "row",
    "operands",
    "ms",
    "p10 - p90",
    "rays/s",
    "M samples/s",
    "TFLOP/s as written",
    "folded",
    "of its ceiling",
    "launches",
    "peak MiB",
    "error against float64",
    "against eager fp32",
    "against the best of PyTorch",
)


def _cell(value: float | None, form: str, scale: float = 1.0, unit: str = "") -> str:
    return "-" if value is None else f"{format(value * scale, form)}{unit}"


def table_lines(table: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    """One table as Markdown, the machine's ceilings first."""
    work, rows = table["work"], table["rows"]
    width = len(_HEAD)

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join([*cells, *[''] * (width - len(cells))])} |"

    lines = [line(_HEAD), line(["---"] * width)]
    lines.append(line([f"ceiling: copy, {limits['copy'] * 1e-9:.0f} GB/s read plus written"]))
    size = limits["size"]
    for name, rate in limits["products"].items():
        lines.append(
            line([f"ceiling: product of {size} x {size}", name, "", "", "", "", _cell(rate, ".3g", 1e-12)])
        )
    baseline = next((row["median"] for row in rows if row["name"] == BASELINE), None)
    best = best_pytorch(rows)
    for row in rows:
        label = row["name"] if row["family"] == PYTORCH else f"**{row['name']}**"
        median = row["median"]
        errors = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items()) or "-"
        if median is None:
            cells = [label, row["operands"], row["note"] or "not measured"]
            lines.append(line([*cells, *[""] * 8, errors]))
            continue
        ceiling = limits["products"].get(row["operands"])
        rate = work["flops"] / median
        lines.append(
            line(
                [
                    label,
                    row["operands"],
                    _cell(median, ".4g", 1e3),
                    f"{_cell(row['p10'], '.4g', 1e3)} - {_cell(row['p90'], '.4g', 1e3)}",
                    _cell(work["rays"] / median, ",.0f"),
                    _cell(work["samples"] / median, ".3g", 1e-6),
                    _cell(rate, ".3g", 1e-12),
                    _cell(work["folded_flops"] / median, ".3g", 1e-12),
                    _cell(rate / ceiling if ceiling else None, ".0%"),
                    _cell(row["launches"], ".0f"),
                    _cell(row["peak_bytes"], ",.0f", 2.0**-20),
                    errors,
                    _cell(baseline / median if baseline else None, ".2f", unit=" x"),
                    _cell(best / median if best else None, ".2f", unit=" x"),
                ]
            )
        )
    return lines


def markdown(report: dict[str, Any]) -> str:
    """A report as Markdown: what was measured where, then its tables."""
    facts = report["environment"]
    threads = f", {facts['threads']} threads" if facts.get("threads") else ""
    lines = [
        f"# {report['benchmark']}",
        "",
        f"{facts['device']} {facts['vectors']}{threads}, torch {facts['torch']}"
        f"{', CUDA ' + facts['cuda'] if facts['cuda'] else ''}, revision {facts['revision']} "
        f"(library {facts['library']}). {report['about']}",
    ]
    for warning in warnings(report):
        lines += ["", warning]
    for table in report["tables"]:
        lines += ["", f"## {table['work']['title']}", "", *table_lines(table, table["ceilings"])]
    return "\n".join(lines) + "\n"


def write_report(report: dict[str, Any], out: Path, stem: str) -> None:
    """Write the JSON and the Markdown file, each complete or not at all."""
    out.mkdir(parents=True, exist_ok=True)

    def plain(value: Any) -> Any:
        """NaN and infinity as words, which JSON has no numbers for."""
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    write_durably(out / f"{stem}.md", markdown(report).encode())
    write_durably(out / f"{stem}.json", (json.dumps(plain(report), indent=1) + "\n").encode())
