"""Times an operation beside its baselines: what every bench_<operation>.py shares.

A benchmark describes its cases; `main` measures them and writes benchmarks/results/<operation>_<device>.json and .md
(<operation>_large_<device> of the large ones).

* Variants of a case run in turn, one call each, round after round, on random inputs that change from call to call
  (together larger than the cache), with their outputs allocated inside the timed call. Reported are the median, the
  10th and 90th percentile and the minimum.
* A fixed matrix product, the control, is timed before and after every call. A call beside which it was more than 10%
  away from its median says something about the machine, not about the variant: it is discarded and repeated.
* Every variant's error against float64 stands beside its time. It may be twice that of the reference in the same
  precision plus a stated floor; without that there is no time.
* Peak memory is what torch holds at once during a call, outputs included: on a GPU its allocator's, on a CPU storages.
* On the CPU there are two tables: the allocator as it comes, where fresh pages can cost more than the arithmetic,
  and with malloc told to keep its pages (as the training engine does at its start), for every variant alike.
* On a GPU calls are timed by CUDA events, where asked for as replays of a captured graph.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.living_storages import PeakMemory
from mipnerf_fast import _native, environment
from mipnerf_fast.durable_files import write_durably

Inputs = dict[str, Tensor]
Outputs = dict[str, Tensor]

RESULTS = Path(__file__).resolve().parent / "results"
WARM_UP = 3
CONTROL_TOLERANCE = 0.10
AS_IT_COMES, PAGES_KEPT = "allocator as it comes", "page faults removed"


@dataclass(frozen=True)
class Case:
    """One measurement: an operation on inputs of one size and dtype.

    Args:
        name: such as "forward, 4096 x 64, float32".
        make_inputs: new random inputs on a device from a seed.
        variants: called after the number of threads is set (torch.compile fixes it); name to call, baseline first.
        truth: the outputs computed in float64.
        reference: the outputs of the reference in this precision; twice its error is allowed.
        floor: what is allowed on top, per output, with `floor_why`.
        moved_bytes: read plus written, by an implementation that touches every input and output once.
        flops: of the arithmetic, counting a special function as one.
        graph: on a GPU, time replays of a captured graph (for launch-bound sizes).
        items: how many samples a call works on, where that is how its speed is told; 0: it is not.
        references: by variant, the reference in the precision of that variant where it is another.
        error: of outputs against the truth; `largest_error` unless stated.
        folded_flops: of a cheaper form of the same function, to be shown beside `flops`; 0: there is none.
        product_flops: from a variant's name, FLOP/s of the large matrix product that it is held against, measured
            with the threads in force; None: the case is held against none.
        unchecked: variants that compute another function, and what it is: timed, without an error.
        not_run: variants that cannot run here, and why: a row that says so.
        large: takes seconds a call, and is measured only where --large asks for it.
    """

    name: str
    make_inputs: Callable[[int, torch.device], Inputs]
    variants: Callable[[], dict[str, Callable[[Inputs], Outputs]]]
    truth: Callable[[Inputs], Outputs]
    reference: Callable[[Inputs], Outputs]
    floor: float
    floor_why: str
    moved_bytes: int
    flops: int
    graph: bool = False
    items: int = 0
    references: dict[str, Callable[[Inputs], Outputs]] = field(default_factory=dict)
    error: Callable[[Outputs, Outputs], float] | None = None
    folded_flops: int = 0
    product_flops: Callable[[str], float] | None = None
    unchecked: dict[str, str] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    large: bool = False


@dataclass
class Result:
    """One row of a table; times in seconds, None where the error check failed or the machine was too busy.

    error, bound: None for another function and for what did not run. peak_share: of the first row's peak.
    """

    case: str
    variant: str
    threads: int
    allocator: str
    error: float | None
    bound: float | None
    median: float | None = None
    p10: float | None = None
    p90: float | None = None
    minimum: float | None = None
    kept: int = 0
    discarded: int = 0
    gigabytes_per_second: float | None = None
    gigaflops_per_second: float | None = None
    folded_gigaflops_per_second: float | None = None
    product_fraction: float | None = None
    folded_product_fraction: float | None = None
    copy_fraction: float | None = None
    items_per_second: float | None = None
    peak_bytes: int | None = None
    peak_share: float | None = None
    speedup_median: float | None = None
    speedup_minimum: float | None = None
    note: str = ""


# ------------------------------------------------------------------------------------------------- the machine


def keep_pages() -> None:
    """Tell glibc's malloc to keep freed pages: no fresh mapping per allocation, no trimming."""
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_threshold = -1, -3
    if not hasattr(libc, "mallopt"):
        raise RuntimeError("keep_pages: this C library has no mallopt (glibc is needed for this table)")
    # glibc refuses more than half of its largest heap as a threshold for mmap, 32 MB: then it is switched off.
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    if libc.mallopt(m_mmap_threshold, 2**30) == 0:
        m_mmap_max = -4
        libc.mallopt(m_mmap_max, 0)


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call; what it returns is freed after the clock has stopped."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return float(start.elapsed_time(end)) * 1e-3
    begin = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - begin
    del result
    return elapsed


class Control:
    """A fixed matrix product whose time tells whether the machine is the same as a moment ago."""

    def __init__(self, device: torch.device) -> None:
        size = 512 if device.type == "cpu" else 4096
        self.matrix = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(1))
        self.product = torch.empty_like(self.matrix)
        self.device = device
        for _ in range(3):
            self()
        self.usual = statistics.median(self() for _ in range(21))

    def __call__(self) -> float:
        def run() -> None:
            torch.mm(self.matrix, self.matrix, out=self.product)

        # Warm first, and the best of three: what the call before has left in the caches is not the machine's doing.
        run()
        return min(time_once(run, self.device) for _ in range(3))

    def moved(self, seconds: float) -> bool:
        return abs(seconds / self.usual - 1) > CONTROL_TOLERANCE


def copy_bandwidth(device: torch.device, num_bytes: int = 256 << 20) -> float:
    """Bytes read plus written per second by a copy into memory that is already there; the best of 7."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * num_bytes / min(time_once(lambda: target.copy_(source), device) for _ in range(7))


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Memory one call needs on top of its inputs, its outputs included; None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before

    def resident(field_name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field_name))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = resident("VmRSS:")
        result = run()
        del result
        return resident("VmHWM:") - before
    except OSError:
        return None


def living_bytes(name: str, run: Callable[[], Any], device: torch.device) -> int | None:
    """The most that torch holds during one call, its outputs included; None for what compiled kernels hold on a CPU."""
    if device.type == "cuda":
        return peak_bytes(run, device)
    if "compile" in name:
        return None
    with PeakMemory() as memory:
        run()
    return int(memory.peak)


def machine(device: torch.device) -> dict[str, Any]:
    """What a number depends on: device, versions, revision."""
    return {
        "device": environment.cpu_name() if device.type == "cpu" else environment.device_name(device),
        "vectors": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "revision": environment.revision(),
        "library": _native.build_info().get("revision", "missing"),
    }


def library_warning(facts: dict[str, Any]) -> str:
    """A sentence where the library was not built from the sources that it was measured with, else empty."""
    if facts["library"] == facts["revision"]:
        return ""
    return (
        f"**Warning: the native library is of revision {facts['library']}, the sources are of {facts['revision']}: "
        "build it again and measure again.**"
    )


def _cache_bytes(device: torch.device) -> int:
    """The cache that inputs must not stay in: the GPU's second level, a core's own on a CPU."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))
    return 2 << 20


# ---------------------------------------------------------------------------------------------------- measuring


def largest_error(outputs: Outputs, truth: Outputs) -> float:
    """Largest absolute difference over all outputs; NaN where one is NaN that should not be, or of another shape."""
    worst = 0.0
    for name, want in truth.items():
        got = outputs[name].detach().double()
        if got.shape != want.shape:
            return math.nan
        error = float((got - want).abs().max())
        worst = error if math.isnan(error) else max(worst, error)
        if math.isnan(worst):
            return worst
    return worst


def _captured(run: Callable[[], Any], repeats: int) -> tuple[Callable[[], Any], int]:
    """A CUDA graph of `repeats` calls, to be replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run() for _ in range(repeats)]

    def replay() -> None:
        assert kept  # the outputs live as long as the graph that writes them
        graph.replay()

    return replay, repeats


def measure(
    case: Case, device: torch.device, threads: int, allocator: str, runs: int, bandwidth: float
) -> list[Result]:
    """All variants of one case, interleaved, with `runs` undisturbed calls each."""
    first = case.make_inputs(0, device)
    input_bytes = sum(tensor.numel() * tensor.element_size() for tensor in first.values())
    sets = max(2, min(32, math.ceil(3 * _cache_bytes(device) / input_bytes)))
    rotation = [first] + [case.make_inputs(seed, device) for seed in range(1, sets)]
    truth = case.truth(first)
    measured_error = case.error or largest_error
    bounds = {
        name: 2 * measured_error(run(first), truth) + case.floor
        for name, run in {"": case.reference, **case.references}.items()
    }

    results: list[Result] = []
    calls: dict[str, Callable[[Inputs], Outputs]] = {}
    for name, run in case.variants().items():
        row = Result(case.name, name, threads, allocator, None, None, note=case.unchecked.get(name, ""))
        results.append(row)
        if name not in case.unchecked:
            row.error, row.bound = measured_error(run(first), truth), bounds.get(name, bounds[""])
            if not row.error <= row.bound:
                row.note = "not timed: the error is above its bound"
                continue
        for number in range(WARM_UP):
            run(rotation[number % sets])
        row.peak_bytes = living_bytes(name, partial(run, first), device)
        calls[name] = run
    graphs = {name: _captured(partial(run, first), 20) for name, run in calls.items()} if case.graph else {}

    control = Control(device)
    rows = {row.variant: row for row in results if row.variant in calls}
    times: dict[str, list[float]] = {name: [] for name in calls}
    before = control()
    # A machine that never rests is not waited for endlessly.
    for number in range(10 * runs):
        if all(row.kept >= runs for row in rows.values()):
            break
        for name, run in calls.items():
            row, inputs = rows[name], rotation[number % sets]
            if name in graphs:
                replay, repeats = graphs[name]
                seconds = time_once(replay, device) / repeats
            else:
                seconds = time_once(partial(run, inputs), device)
            after = control()
            if control.moved(before) or control.moved(after):
                row.discarded += 1
            else:
                row.kept += 1
                times[name].append(seconds)
            before = after
    for name, row in rows.items():
        _summarise(row, times[name], case, runs, bandwidth)
    baseline = results[0]
    for row in results:
        if row.median and baseline.median and row.minimum and baseline.minimum:
            row.speedup_median = baseline.median / row.median
            row.speedup_minimum = baseline.minimum / row.minimum
        if row.peak_bytes and baseline.peak_bytes:
            row.peak_share = row.peak_bytes / baseline.peak_bytes
    for name, why in case.not_run.items():
        results.append(Result(case.name, name, threads, allocator, None, None, note=f"not run ({why})"))
    return results


def _summarise(row: Result, times: list[float], case: Case, runs: int, bandwidth: float) -> None:
    if row.kept < runs:
        row.note = (
            f"not measured: the control moved beside {row.discarded} of {row.kept + row.discarded} calls"
        )
        return
    ordered = sorted(times)
    row.median = statistics.median(ordered)
    row.minimum = ordered[0]
    row.p10, row.p90 = ordered[len(ordered) // 10], ordered[(9 * len(ordered)) // 10]
    row.gigabytes_per_second = case.moved_bytes / row.median * 1e-9
    row.gigaflops_per_second = case.flops / row.median * 1e-9
    row.copy_fraction = case.moved_bytes / row.median / bandwidth
    row.items_per_second = case.items / row.median if case.items else None
    if case.folded_flops:
        row.folded_gigaflops_per_second = case.folded_flops / row.median * 1e-9
    if case.product_flops:
        product = case.product_flops(row.variant)
        row.product_fraction = case.flops / row.median / product
        row.folded_product_fraction = case.folded_flops / row.median / product


# ---------------------------------------------------------------------------------------------------- reporting


def _cell(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


def markdown(operation: str, report: dict[str, Any]) -> str:
    """The tables of a report, one per allocator and number of threads."""
    facts = report["environment"]
    lines = [
        f"# {operation}",
        "",
        f"{facts['device']} {facts['vectors']}, torch {facts['torch']}, revision {facts['revision']} "
        f"(library {facts['library']}). Outputs allocated inside the timed call; times of {report['runs']} or more "
        f"interleaved calls beside which a fixed matrix product stayed within {CONTROL_TOLERANCE:.0%} of its median.",
        "",
        f"Error: {report.get('error', 'largest difference')} from float64; bound: {report['bound']}. Peak: "
        f"{report['memory']} (not counted: what an operator takes and frees inside, and compiled kernels on a CPU).",
    ]
    if report.get("notes"):
        lines += ["", report["notes"]]
    if warning := library_warning(facts):
        lines += ["", warning]
    if to_come := report.get("to_come"):
        lines += ["", f"**Not complete: it ended before {'; '.join(to_come)}.**"]
    tables = dict.fromkeys((row["allocator"], row["threads"]) for row in report["results"])
    for allocator, threads in tables:
        rows = [r for r in report["results"] if (r["allocator"], r["threads"]) == (allocator, threads)]
        copied = report["copy_bandwidth"][f"{allocator}, {threads}"]
        title = allocator if threads == 0 else f"{allocator}, {threads} thread{'s' if threads > 1 else ''}"
        folded = any(row.get("folded_gigaflops_per_second") for row in rows)
        more = ["folded GFLOP/s", "of product", "folded"] if folded else []
        lines += [
            "",
            f"## {title}",
            "",
            f"Copy bandwidth here: {copied * 1e-9:.1f} GB/s (read plus written).",
            "",
            "| case | variant | error | bound | median ms | p10 - p90 | min ms | GB/s | of copy | GFLOP/s "
            "| M samples/s | peak MiB | of the first | speed-up median | min |"
            + "".join(f" {name} |" for name in more),
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
            + " --- |" * len(more),
        ]
        for r in rows:
            # Another function has no error, and says what it is.
            other = f" ({r['note']})" if r["note"] and r["median"] is not None else ""
            error, bound = ("n/a" if r[key] is None else f"{r[key]:.1e}" for key in ("error", "bound"))
            head = f"| {r['case']} | {r['variant']}{other} | {error} | {bound} "
            if r["median"] is None:
                lines.append(head + f"| {r['note']} | | | | | | | | | | |" + " |" * len(more))
                continue
            lines.append(
                head + f"| {_cell(r['median'], '.3f', 1e3)} | {_cell(r['p10'], '.3f', 1e3)} - "
                f"{_cell(r['p90'], '.3f', 1e3)} | {_cell(r['minimum'], '.3f', 1e3)} "
                f"| {_cell(r['gigabytes_per_second'], '.1f')} | {_cell(r['copy_fraction'], '.0%')} "
                f"| {_cell(r['gigaflops_per_second'], '.1f')} | {_cell(r['items_per_second'], '.2f', 1e-6)} "
                f"| {_cell(r['peak_bytes'], '.2f', 2.0**-20)} | {_cell(r['peak_share'], '.0%')} "
                f"| {_cell(r['speedup_median'], '.1f')} | {_cell(r['speedup_minimum'], '.1f')} |"
                + (
                    f" {_cell(r['folded_gigaflops_per_second'], '.1f')} | {_cell(r['product_fraction'], '.0%')} "
                    f"| {_cell(r['folded_product_fraction'], '.0%')} |"
                    if folded
                    else ""
                )
            )
    return "\n".join(lines) + "\n"


def main(
    operation: str,
    cases: Callable[[torch.device], Sequence[Case]],
    description: str,
    error: str = "largest difference",
    notes: str = "",
    parents: Sequence[argparse.ArgumentParser] = (),
) -> None:
    """The command line of a benchmark: measure, print, write the JSON and the Markdown file after every case.

    Args:
        operation, cases, description: of the benchmark.
        error: what its errors are, as the tables' head says it.
        notes: a paragraph for that head.
        parents: parsers of options that the benchmark reads itself.
    """
    parser = argparse.ArgumentParser(description=description, parents=parents)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="on the CPU")
    parser.add_argument("--runs", type=int, default=20, help="undisturbed calls of each variant")
    parser.add_argument(
        "--allocators", nargs="+", default=[AS_IT_COMES, PAGES_KEPT], choices=[AS_IT_COMES, PAGES_KEPT]
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--large", action="store_true", help="the cases of seconds a call, and no others")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    if not _native.available():
        parser.error(_native.why_missing())
    chosen = [case for case in cases(device) if case.large == arguments.large and arguments.only in case.name]
    if not chosen:
        kind = "large case" if arguments.large else "case"
        parser.error(f"--only {arguments.only!r}: no {kind} has that in its name")

    settings = [("GPU", 0)]
    if device.type == "cpu":
        settings = [(allocator, n) for allocator in arguments.allocators for n in arguments.threads]
    report: dict[str, Any] = {
        "operation": operation,
        "environment": machine(device),
        "runs": arguments.runs,
        "error": error,
        "memory": "the most that torch holds at once during a call, its outputs included",
        "notes": notes,
        "bound": "; ".join(
            dict.fromkeys(f"twice the reference's error + {c.floor:.1e} ({c.floor_why})" for c in chosen)
        ),
        "copy_bandwidth": {},
        "to_come": [],
        "results": [],
    }
    to_come = [(setting, case) for setting in settings for case in chosen]

    def write() -> None:
        names = {
            setting: f"{setting[0]}, {setting[1]}: " if len(settings) > 1 else "" for setting in settings
        }
        report["to_come"] = [names[setting] + case.name for setting, case in to_come]
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_durably(stem.with_suffix(".md"), markdown(operation, report).encode())
        write_durably(stem.with_suffix(".json"), (json.dumps(report, indent=1) + "\n").encode())

    stem = arguments.out / f"{operation}{'_large' if arguments.large else ''}_{device.type}"
    kept = False
    for allocator, threads in settings:
        if allocator == PAGES_KEPT and not kept:
            keep_pages()
            kept = True
        if threads:
            torch.set_num_threads(threads)
            torch.compiler.reset()
        bandwidth = copy_bandwidth(device)
        report["copy_bandwidth"][f"{allocator}, {threads}"] = bandwidth
        for case in chosen:
            for row in measure(case, device, threads, allocator, arguments.runs, bandwidth):
                spent = "-" if row.median is None else f"{row.median * 1e3:9.3f} ms"
                error_of = "n/a" if row.error is None else f"{row.error:.1e}"
                print(
                    f"{allocator:22} {threads} {case.name:36} {row.variant:10} {spent} {error_of} {row.note}",
                    flush=True,
                )
                report["results"].append(asdict(row))
            del to_come[0]
            write()
    print(f"written: {stem}.json and .md")
