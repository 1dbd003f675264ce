"""Operations on GPUs in the README: digests of what `make gpu-check` and the benchmarks themselves have left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NOT_MEASURED = "On a GPU: not measured."
_Cases = list[tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]]


def kernel_reports(results: Path, operations: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The reports of operations (all by default) on GPUs, of the stage `kernels` and of scripts run by themselves."""
    found = []
    for path in sorted(results.glob("gpu/*/kernels.json")):
        commands = json.loads(path.read_text(encoding="utf-8"))["commands"]
        found += [command["result"] for command in commands]
    found += [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*_cuda.json"))]
    reports = [report for report in found if isinstance(report, dict) and "operation" in report]
    return [report for report in reports if not operations or report["operation"] in operations]


def _cases(reports: Sequence[dict[str, Any]]) -> _Cases:
    """(report, a row, the rows of its case by variant) of all rows."""
    found: _Cases = []
    for report in reports:
        cases: dict[str, dict[str, dict[str, Any]]] = {}
        for row in report["results"]:
            cases.setdefault(row["case"], {})[row["variant"]] = row
        found += [(report, row, cases[row["case"]]) for row in report["results"]]
    return found


def _machines(reports: Sequence[dict[str, Any]]) -> str:
    """What the figures are of, and what is missing."""
    facts = [report["environment"] for report in reports]
    machines = dict.fromkeys(f"{f['device']}, torch {f['torch']}, revision {f['revision']}" for f in facts)
    parts = [f"{'; '.join(machines)}."]
    for report in reports:
        if report.get("to_come"):
            parts.append(f"Of {report['operation']} without {', '.join(report['to_come'])}: time was over.")
    return " ".join(parts)


def kernels(results: Path, operations: Sequence[str]) -> str:
    """A table of the native kernels beside eager and compiled PyTorch, or that they were not measured."""
    reports = kernel_reports(results, operations)
    lines = [
        "| operation on a GPU | case | native, ms | of a copy's bandwidth | M samples/s | against eager "
        "| against torch.compile |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for report, row, case in _cases(reports):
        if row["variant"] != "native":
            continue
        cells = [row["note"] or "not measured", "-", "-", "-", "-"]
        if row["median"] is not None:
            compiled = case.get("compile", {}).get("median")
            cells = [f"{1e3 * row['median']:.3f}", f"{row['copy_fraction']:.0%}"]
            cells.append(f"{1e-6 * row['items_per_second']:.1f}" if row["items_per_second"] else "-")
            cells.append(f"{row['speedup_median']:.1f} x" if row["speedup_median"] else "not measured")
            cells.append(f"{compiled / row['median']:.1f} x" if compiled else "-")
        lines.append(f"| {report['operation']} | {row['case']} | {' | '.join(cells)} |")
    if len(lines) == 2:
        return NOT_MEASURED
    return "\n".join([*lines, "", _machines(reports)])


def network(results: Path) -> str:
    """A table of every engine of the network beside PyTorch's own, or that they were not measured."""
    reports = kernel_reports(results, ("mlp",))
    lines = [
        "| case on a GPU | variant | ms | against eager | error | of a large product | peak MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for _, row, _ in _cases(reports):
        cells, variant = [row["note"] or "not measured", "-"], row["variant"]
        if row["median"] is not None:
            speedup = row["speedup_median"]
            cells = [f"{1e3 * row['median']:.3f}", f"{speedup:.2f} x" if speedup else "not measured"]
            variant += f" ({row['note']})" if row["note"] else ""
        share, peak = row["product_fraction"], row["peak_bytes"]
        cells.append("n/a" if row["error"] is None else f"{row['error']:.0e}")
        cells += [f"{share:.0%}" if share else "-", f"{peak / 2**20:.0f}" if peak else "-"]
        lines.append(f"| {row['case']} | {variant} | {' | '.join(cells)} |")
    if len(lines) == 2:
        return NOT_MEASURED
    return "\n".join([*lines, "", _machines(reports)])


def engines_measured(results: Path) -> dict[str, str]:
    """The engines of the network with a time on a GPU, and on which."""
    found: dict[str, list[str]] = {}
    for report in kernel_reports(results, ("mlp",)):
        for row in report["results"]:
            if row["median"] is not None:
                word = row["variant"].split()[0]
                found.setdefault("reference" if word == "eager" else word, []).append(
                    report["environment"]["device"]
                )
    return {engine: ", ".join(dict.fromkeys(devices)) for engine, devices in found.items()}
