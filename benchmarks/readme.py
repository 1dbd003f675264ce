"""Write the README's tables from the result files, so that no figure in it is typed by hand.

Every block between `<!-- results: NAME -->` and `<!-- end -->` in README.md is replaced by
benchmarks/results/NAME.md, or for NAME = speed by a digest of the kernel benchmarks' JSON files there, and for
NAME = steps by one of bench_train.py's and bench_render.py's, whose times are drawn in steps.png. With --check nothing
is written and a difference is an error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# One line per operation and setting; everything else is in the result files.
_DIGEST = ("forward, 4096 x 64, float32", "forward + backward, 4096 x 64, float32", "4096 x 64, stratified")
_BLOCK = re.compile(
    r"(?P<begin><!-- results: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL
)


def speed(results: Path) -> str:
    """A digest of the kernel benchmarks on the CPU: native against eager and compiled PyTorch.

    Errors: FileNotFoundError where there is no result at all.
    """
    files = sorted(results.glob("*_cpu.json"))
    reports = [
        report
        for report in (json.loads(path.read_text(encoding="utf-8")) for path in files)
        if "runs" in report
    ]
    if not reports:
        raise FileNotFoundError(f"README.md: the block 'speed' has no *_cpu.json in {results.name}")
    lines = [
        "| operation | case | threads | allocator | native, ms | against eager | against torch.compile |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for report in reports:
        rows = {(r["case"], r["threads"], r["allocator"], r["variant"]): r for r in report["results"]}
        for (case, threads, allocator, variant), row in rows.items():
            if variant != "native" or case not in _DIGEST:
                continue
            compiled = rows.get((case, threads, allocator, "compile"), {}).get("median")
            cells = ["not measured", "-", "-"]
            if row["median"] is not None:
                cells[0] = f"{1e3 * row['median']:.2f}"
                cells[1] = f"{row['speedup_median']:.1f} x" if row["speedup_median"] else "not measured"
                cells[2] = f"{compiled / row['median']:.1f} x" if compiled else "not measured"
            lines.append(
                f"| {report['operation']} | {case} | {threads} | {allocator} | {' | '.join(cells)} |"
            )
    machines = {f"{r['environment']['device']}, torch {r['environment']['torch']}" for r in reports}
    revisions = sorted({r["environment"]["revision"] for r in reports})
    runs = min(report["runs"] for report in reports)
    lines += [
        "",
        f"Medians of at least {runs} interleaved undisturbed calls, outputs allocated inside, beside the straight "
        f"PyTorch port of the official lines. {'; '.join(sorted(machines))}; revision {', '.join(revisions)}.",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- steps and frames

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
    """A digest of whole steps and frames: every row that was measured, beside eager fp32 and PyTorch's best.

    Errors: FileNotFoundError where there is no result at all.
    """
    reports = whole_reports(results)
    if not reports:
        raise FileNotFoundError(f"README.md: the block 'steps' has no train_*.json in {results.name}")
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
    machines = sorted({_machine(report) for report in reports})
    measured = {"cuda" if report["environment"]["cuda"] else "cpu" for report in reports}
    gpu = "" if "cuda" in measured else " On a GPU: not measured."
    lines += [
        "",
        f"Medians; a row stands here only where its error against float64 allows. {'; '.join(machines)}.{gpu}",
    ]
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
        axis.barh([row["name"] for row in rows], times, xerr=spread, color=colours, height=0.7)
        for y, value in enumerate(times):
            axis.text(value, y, f"  {value:.4g} ms", va="center", fontsize=7)
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


_DIGESTS: dict[str, Callable[[Path], str]] = {"speed": speed, "steps": steps}


def filled(text: str, results: Path) -> str:
    """The text with every block replaced by its result file.

    Errors: FileNotFoundError naming the block whose file is missing.
    """

    def body(match: re.Match[str]) -> str:
        if match["name"] in _DIGESTS:
            return f"{match['begin']}{_DIGESTS[match['name']](results)}\n{match['end']}"
        path = results / f"{match['name']}.md"
        if not path.is_file():
            raise FileNotFoundError(
                f"README.md: the block {match['name']!r} has no file {path.name} in {results.name}"
            )
        return f"{match['begin']}{path.read_text(encoding='utf-8').strip()}\n{match['end']}"

    return _BLOCK.sub(body, text)


def main() -> int:
    """Fill README.md, or with --check say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where README.md is out of date"
    )
    options = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    results = ROOT / "benchmarks" / "results"
    try:
        after = filled(before, results)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    if options.check:
        if after != before:
            print(
                "README.md: a table differs from benchmarks/results; run python benchmarks/readme.py",
                file=sys.stderr,
            )
        drawn = chart_is_current(results)
        if not drawn:
            print(f"{CHART} is not of these results; run python benchmarks/readme.py", file=sys.stderr)
        return int(after != before or not drawn)
    if not chart_is_current(results):
        draw_steps(results)
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
