"""Whole steps and frames in the README: a digest of bench_train.py's and bench_render.py's results, and their chart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

CHART = "steps.png"


def whole_reports(results: Path) -> list[dict[str, Any]]:
    """The reports of bench_train.py and bench_render.py that are there: those of gpu-check, then of the CPU."""
    found = []
    for name in ("steps", "training"):
        for path in sorted(results.glob(f"gpu/*/{name}.json")):
            commands = json.loads(path.read_text(encoding="utf-8"))["commands"]
            found += [
                c["result"] for c in commands if isinstance(c["result"], dict) and "tables" in c["result"]
            ]
    names = [f"{name}_{device}.json" for device in ("cuda", "cpu") for name in ("train", "render")]
    return found + [
        json.loads((results / n).read_text(encoding="utf-8")) for n in names if (results / n).is_file()
    ]


def steps(results: Path) -> str:
    """A digest of whole steps and frames: every row that was measured, beside eager fp32 and PyTorch's best; chart."""
    reports = whole_reports(results)
    if not reports:
        return "Not measured."
    lines = [
        "| what | how | ms | p10 - p90 | rays/s | against eager fp32 | against PyTorch's best |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for report in reports:
        for table in report["tables"]:
            rows = [row for row in table["rows"] if row["median"]]
            if not rows:
                lines.append(f"| {report['benchmark']}: {table['work']['title']} | | not measured | | | | |")
            eager = next((row["median"] for row in rows if row["name"] == "eager fp32"), None)
            best = min((row["median"] for row in rows if row["family"] == "PyTorch"), default=None)
            for k, row in enumerate(rows):
                what = f"{report['benchmark']}: {table['work']['title']}" if k == 0 else ""
                name = row["name"] if row["family"] == "PyTorch" else f"**{row['name']}**"
                median = row["median"]
                cells = [
                    what,
                    name,
                    f"{1e3 * median:.4g}",
                    f"{1e3 * row['p10']:.4g} - {1e3 * row['p90']:.4g}",
                ]
                cells.append(f"{table['work']['rays'] / median:,.0f}")
                cells += [f"{other / median:.2f} x" if other else "not measured" for other in (eager, best)]
                lines.append(f"| {' | '.join(cells)} |")
    # Which rows are whose, where not all are of one machine and revision.
    of_machines: dict[str, list[str]] = {}
    for report in reports:
        of_machines.setdefault(_machine(report), []).append(report["benchmark"])
    machines = [
        f"{', '.join(names)}: {machine}" if len(of_machines) > 1 else machine
        for machine, names in sorted(of_machines.items())
    ]
    measured = {"cuda" if report["environment"]["cuda"] else "cpu" for report in reports}
    gpu = "" if "cuda" in measured else " On a GPU: not measured."
    lines += [
        "",
        f"Medians; a row stands here only where its error against float64 allows. {'; '.join(machines)}.{gpu}",
    ]
    full = [
        f"[{n}](benchmarks/results/{n})" for n in ("train_cpu.md", "render_cpu.md") if (results / n).is_file()
    ]
    if full:
        lines[-1] += f" In full, with ceilings, memory, errors and why a row did not run: {', '.join(full)}."
    picture = f'<p align="center"><img src="benchmarks/results/{CHART}" width="90%"'
    lines += ["", picture, 'alt="Times of training steps and rendered frames, PyTorch\'s and ours"></p>']
    return "\n".join(lines)


def _machine(report: dict[str, Any]) -> str:
    facts = report["environment"]
    threads = f", {facts['threads']} threads" if facts.get("threads") else ""
    return f"{facts['device']}{threads}, torch {facts['torch']}, revision {facts['revision']}"


def chart_source(results: Path) -> str:
    """What the chart was drawn from, in one word that it carries in its metadata."""
    bars = [
        (table["work"]["title"], row["name"], row["median"])
        for report in whole_reports(results)
        for table in report["tables"]
        for row in table["rows"]
    ]
    return hashlib.sha256(json.dumps(bars).encode()).hexdigest()


def draw_steps(results: Path) -> None:
    """Draw the times of all tables as bars, PyTorch's grey and ours in colour, each panel naming its machine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        (report, table)
        for report in whole_reports(results)
        for table in report["tables"]
        if any(row["median"] for row in table["rows"])
    ]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(8, 2.1 * len(panels) + 0.4), dpi=130, squeeze=False
    )
    for axis, (report, table) in zip(axes[:, 0], panels, strict=True):
        rows = [row for row in table["rows"] if row["median"]][::-1]
        times = [1e3 * row["median"] for row in rows]
        spread = [[1e3 * abs(row["median"] - row[end]) for row in rows] for end in ("p10", "p90")]
        colours = ["#9aa0a6" if row["family"] == "PyTorch" else "#1a73e8" for row in rows]
        axis.barh(
            [row["name"] for row in rows],
            times,
            xerr=spread,
            color=colours,
            height=0.7,
            error_kw={"elinewidth": 0.8},
        )
        for y, value in enumerate(times):
            axis.text(0, y, f"  {value:.4g} ms", va="center", fontsize=7, color="white")
        axis.set_title(f"{report['benchmark']}: {table['work']['title']}\n{_machine(report)}", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_xlim(0, 1.2 * max(times))
        axis.set_xlabel("ms", fontsize=7)
    figure.tight_layout()
    figure.savefig(results / CHART, metadata={"Description": chart_source(results)})
    pyplot.close(figure)


def chart_is_current(results: Path) -> bool:
    """Whether the chart was drawn from the results that are there; true where there is nothing to draw."""
    if not whole_reports(results):
        return True
    from PIL import Image

    path = results / CHART
    if not path.is_file():
        return False
    with Image.open(path) as image:
        return bool(image.info.get("Description") == chart_source(results))
