"""Write the README's tables from the result files, so that no figure in it is typed by hand.

Every block between `<!-- results: NAME -->` and `<!-- end -->` in README.md is replaced by
benchmarks/results/NAME.md, or for NAME = speed, mlp_speed and fast_speed by digests of the benchmarks' JSON files
there (the exact model's operations, its network, the fast model's), for NAME = steps by one of whole steps and frames,
whose chart is drawn too, for NAME = mlp_evidence by what is known of every engine of the network. With --check nothing
is written and a difference is an error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import readme_gpu, readme_steps
from mipnerf_fast.ops import FAST_OPERATIONS, OPERATIONS

ROOT = Path(__file__).resolve().parents[1]
# One line per operation and setting; everything else is in the result files.
_DIGEST = (
    "4096 rays of 100 views",
    "forward, 4096 x 64, float32",
    "forward + backward, 4096 x 64, float32",
    "4096 x 64, stratified",
)
# The network has a table of its own.
_EXACT = tuple(name for name in OPERATIONS if name != "mlp")
_BLOCK = re.compile(
    r"(?P<begin><!-- results: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL
)


def speed(results: Path) -> str:
    """A digest of the exact model's kernel benchmarks: native against eager and compiled PyTorch; on GPUs a table more.

    Errors: FileNotFoundError where there is no result at all.
    """
    paths = {operation: results / f"{operation}_cpu.json" for operation in sorted(_EXACT)}
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths.values() if path.is_file()]
    missing = [operation for operation, path in paths.items() if not path.is_file()]
    if not reports:
        raise FileNotFoundError(
            f"README.md: the block 'speed' has no {paths['composite'].name} in {results.name}"
        )
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
    if missing:
        lines[-1] += f" Not measured: {', '.join(missing)}."
    return "\n".join([*lines, "", readme_gpu.kernels(results, _EXACT)])


def fast_speed(results: Path) -> str:
    """The same of the fast model's operations, with samples a second."""
    lines = [
        "| operation | case | threads | native, ms | M samples/s | against eager |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    facts, runs, missing = set(), [], []
    for operation in FAST_OPERATIONS:
        path = results / f"{operation}_cpu.json"
        if not path.is_file():
            missing.append(operation)
            continue
        report = json.loads(path.read_text(encoding="utf-8"))
        where = report["environment"]
        facts.add(f"{where['device']}, torch {where['torch']}, revision {where['revision']}")
        runs.append(report["runs"])
        for row in report["results"]:
            if row["variant"] != "native" or row["allocator"] != "allocator as it comes":
                continue
            cells = ["not measured", "-", "-"]
            if row["median"] is not None:
                cells = [f"{1e3 * row['median']:.2f}", f"{1e-6 * row['items_per_second']:.2f}"]
                cells.append(f"{row['speedup_median']:.1f} x" if row["speedup_median"] else "not measured")
            lines.append(f"| {operation} | {row['case']} | {row['threads']} | {' | '.join(cells)} |")
    lines += ["", f"As above, at least {min(runs, default=0)} calls. {'; '.join(sorted(facts))}."]
    if missing:
        lines[-1] += f" Not measured: {', '.join(missing)}."
    return "\n".join([*lines, "", readme_gpu.kernels(results, FAST_OPERATIONS)])


def mlp_speed(results: Path) -> str:
    """The network, on the CPU with pages kept as in training: every variant's time, error and peak memory.

    Errors: FileNotFoundError where there is no result.
    """
    path = results / "mlp_cpu.json"
    if not path.is_file():
        raise FileNotFoundError(f"README.md: the block 'mlp_speed' has no file {path.name} in {results.name}")
    report = json.loads(path.read_text(encoding="utf-8"))
    # What --large measures, in a run of its own.
    large_path = results / "mlp_large_cpu.json"
    large = json.loads(large_path.read_text(encoding="utf-8")) if large_path.is_file() else None
    # Results from before it was counted have no column of it.
    counted = "memory" in report
    columns = ["case", "threads", "variant", "ms", "against eager", "error"]
    columns += ["peak MiB", "of eager's"] if counted else []
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    sizes, digits = (("2^8", "2^14", "2^17"), 2) if counted else (("2^14",), 1)
    not_run: dict[str, str] = {}  # every variant once, not in every case
    for row in [*report["results"], *(large["results"] if large else [])]:
        if row["allocator"] != "page faults removed" or not any(size in row["case"] for size in sizes):
            continue
        if row["median"] is None and row["note"].startswith("not run"):
            not_run[row["variant"]] = row["note"].removeprefix("not run").strip()
            continue
        cells, variant = [row["note"] or "not measured", "-"], row["variant"]
        if row["median"] is not None:
            speedup = row["speedup_median"]
            cells = [f"{1e3 * row['median']:.{digits}f}", f"{speedup:.2f} x" if speedup else "not measured"]
            variant += f" ({row['note']})" if row["note"] else ""
        cells.append("n/a" if row["error"] is None else f"{row['error']:.0e}")
        if counted:
            peak, share = row["peak_bytes"], row["peak_share"]
            cells += [f"{peak / 2**20:.2f}" if peak else "-", f"{share:.0%}" if share else "-"]
        lines.append(f"| {row['case']} | {row['threads']} | {variant} | {' | '.join(cells)} |")
    facts = report["environment"]
    memory = f"; peak: {report['memory']}" if counted else ""
    lines += [
        "",
        f"Medians of at least {report['runs']} interleaved undisturbed calls, pages kept by malloc; error: "
        f"||got - want|| / ||want|| against float64{memory}. {facts['device']}, torch {facts['torch']}, revision "
        f"{facts['revision']}. More sizes in benchmarks/results/mlp_cpu.md.",
    ]
    speedups = [
        row["speedup_median"]
        for row in report["results"]
        if row["variant"] == "folded fp32" and row["speedup_median"]
    ]
    if speedups:
        range_of_all = f"{min(speedups):.2f} to {max(speedups):.2f}"
        lines[-1] += f" In all its rows `folded fp32` is {range_of_all} times as fast as eager."
    if large:
        facts = large["environment"]
        lines[-1] += (
            f" 2^17 samples: at least {large['runs']} calls, {facts['device']}, torch {facts['torch']}, revision "
            f"{facts['revision']}."
        )
    measured = {row["variant"] for row in report["results"] if row["median"] is not None}
    not_run = {name: why for name, why in not_run.items() if name not in measured}
    if not_run:
        lines[-1] += f" Not run here: {'; '.join(f'{name} {why}' for name, why in not_run.items())}."
    return "\n".join([*lines, "", readme_gpu.network(results)])


# Of every engine of the network: what stands for it on a CPU, and what its CUDA sources have been through.
_ENGINES = {
    "reference": ("executed", "-"),
    "folded": ("executed", "-"),
    "emulated": ("executed", "-"),
    "cublaslt": (
        "not run; its algebra and arithmetic are those of `emulated`",
        "C++ alone: executed over a cuBLASLt of the CPU (`tests/test_mlp_folded.py`)",
    ),
    "fused, mma.sync (8.x, 10.0, 12.0)": ("not run", "emulated (`tests/test_mlp_kernels.py`)"),
    "fused, wgmma (9.0)": ("not run", "emulated (`tests/test_mlp_hopper.py`)"),
    "tcnn, another architecture": ("not run; its adapter against a stand-in (`tests/test_tcnn.py`)", "-"),
}


# The generations of the fused kernels: their namespace in csrc/mlp, and the architectures that run it.
_GENERATIONS = {
    "fused, mma.sync (8.x, 10.0, 12.0)": ("mlp_mma", {"8.0", "8.6", "8.9", "10.0", "12.0"}),
    "fused, wgmma (9.0)": ("mlp_hopper", {"9.0a"}),
}


def mlp_compiled(checked: dict[str, Any], engine: str) -> str:
    """What cuda_check.json says of an engine's CUDA sources, to stand behind what else is known of them."""
    if engine == "cublaslt":
        for source in checked.get("sources", ()):
            if source["source"] == "csrc/mlp/gemm_cublaslt.cpp" and not source["failure"]:
                fetched = " ARGS=--fetch-cublas" if source["header"].startswith("NVIDIA") else ""
                return f", compiled against {source['header']} by `make cuda-check{fetched}`"
        return ", not compiled by `make cuda-check`"
    if engine not in _GENERATIONS:
        return ""
    namespace, architectures = _GENERATIONS[engine]
    kernels = [
        kernel
        for kernel in checked.get("kernels", ())
        if kernel["operation"] == "mlp" and kernel["name"].startswith(f"{namespace}::")
    ]
    if not {kernel["architecture"] for kernel in kernels} >= architectures:
        return ", not in the table of `make cuda-check`"
    if any(kernel["failures"] for kernel in kernels):
        return ", **fails** in `make cuda-check`"
    return ", compiled by `make cuda-check`"


def mlp_evidence(results: Path) -> str:
    """What is known of every engine of the network; tests/test_mlp_evidence.py holds it against what happens."""
    path = results / "cuda_check.json"
    checked = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    measured = readme_gpu.engines_measured(results)
    lines = ["| engine | on a CPU | CUDA sources | on a GPU |", "| --- | --- | --- | --- |"]
    for engine, (on_cpu, sources) in _ENGINES.items():
        sources += mlp_compiled(checked, engine)
        gpus = measured.get(engine.split(",")[0], "")
        if engine in _GENERATIONS:
            is_hopper = _GENERATIONS[engine][0] == "mlp_hopper"
            named = [gpu for gpu in gpus.split(", ") if gpu]
            gpus = ", ".join(gpu for gpu in named if bool(re.search(r"\bG?H\d00\b", gpu)) == is_hopper)
        on_gpu = f"executed, measured: {gpus}" if gpus else "**not run**"
        if engine == "emulated":
            on_gpu = "-"
        lines.append(f"| {engine} | {on_cpu} | {sources} | {on_gpu} |")
    return "\n".join(lines)


def filled(text: str, results: Path) -> str:
    """The text with every block replaced by its result file.

    Errors: FileNotFoundError naming the block whose file is missing.
    """

    def body(match: re.Match[str]) -> str:
        if match["name"] == "speed":
            return f"{match['begin']}{speed(results)}\n{match['end']}"
        if match["name"] == "steps":
            return f"{match['begin']}{readme_steps.steps(results)}\n{match['end']}"
        if match["name"] == "fast_speed":
            return f"{match['begin']}{fast_speed(results)}\n{match['end']}"
        if match["name"] == "mlp_speed":
            return f"{match['begin']}{mlp_speed(results)}\n{match['end']}"
        if match["name"] == "mlp_evidence":
            return f"{match['begin']}{mlp_evidence(results)}\n{match['end']}"
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
        drawn = readme_steps.chart_is_current(results)
        if not drawn:
            print("steps.png is not of these results; run python benchmarks/readme.py", file=sys.stderr)
        return int(after != before or not drawn)
    if not readme_steps.chart_is_current(results):
        readme_steps.draw_steps(results)
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
