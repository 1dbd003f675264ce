"""The measurements of the fast model: what each part of bench_fast_quality.py trains, what it should reach, and the
tables made of what it reached.

A part's result is fast_PART_DEVICE.json (the speed of other processors, kept beside it, is fast_speed_cpu_NAME.json);
`write_tables` makes fast_quality_DEVICE.md and fast_targets_DEVICE.md of all
that there are. The CPU's table of targets holds every target, those of a GPU too, "not measured" where there is no
result.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Part:
    """One training run: its name and title, the data it takes, its minutes, the preset, further flags of `train`."""

    name: str
    title: str
    downscale: int
    levels: int
    minutes: float
    preset: str = "fast"
    flags: tuple[str, ...] = ()


_ALIASED = ("--attenuation", "none", "--no-scale-input")
_FULL = "four scales, 800 to 100 pixels"
# By device; beside these each has a part "speed".
PARTS: dict[str, dict[str, Part]] = {
    device: {part.name: part for part in parts}
    for device, parts in {
        "cpu": (
            Part("single", "one scale, 100 x 100", 8, 1, 1.0),
            Part("multi", "four scales, 200 to 25 pixels", 4, 4, 2.5),
            Part("aliased", "four scales, 200 to 25 pixels, aliased", 4, 4, 2.5, flags=_ALIASED),
            Part("full", _FULL, 1, 4, 10.0),
        ),
        "cuda": (
            Part("minute", _FULL, 1, 4, 1.0, "fast-gpu"),
            Part("five", _FULL, 1, 4, 5.0, "fast-gpu"),
        ),
    }.items()
}
SPEED = "speed"
# What runs where no part is named: on the CPU all but the long one.
USUAL = {"cpu": ("single", "multi", "aliased", SPEED), "cuda": ("minute", "five", SPEED)}
# The scene that the targets speak of, and the GPU.
SCENE, GPU = "lego", "H200"

# What the parts are held to: mean PSNR and PSNR of every scale, dB; peak memory, bytes; samples a second; seconds.
WANTED_MEAN = {"single": 32.0, "multi": 32.0, "minute": 35.0, "five": 36.0}
WANTED_EACH = {"multi": 31.0}
WANTED_GAIN, WANTED_MEMORY, WANTED_RATE, WANTED_VIEW, WANTED_FRAME = 3.0, 10**9, 0.5e6, 0.3, 5e-3


def result_file(name: str, device: str) -> str:
    """Of a part on a device."""
    return f"fast_{name}_{device}.json"


def _load(name: str, results: Path, device: str) -> dict[str, Any] | None:
    path = results / result_file(name, device)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _facts(run: dict[str, Any]) -> str:
    return f"{run['device']}, torch {run['torch']}, revision {run['revision']}"


def _note(found: dict[str, Any]) -> str:
    return f"; {found['note']}" if found.get("note") else ""


def _title(part: Part, found: dict[str, Any]) -> str:
    """Of a run; of another scene than the one that the part is named after, its name."""
    scene = found.get("scene", SCENE)
    if scene == SCENE:
        return part.title
    return f"scene {scene!r}, downscale {part.downscale}, {part.levels} level{'s' if part.levels > 1 else ''}"


# ------------------------------------------------------------------------------------------------------ quality


def quality_table(results: Path, device: str) -> str:
    """PSNR by scale of the parts that are there."""
    on_cpu = device == "cpu"
    lines = [
        "| training | minutes | PSNR, dB, finest scale first | mean "
        f"| {'CPU s of 2 x wall s' if on_cpu else 'steps'} | load average before, after |",
        "| --- | ---: | --- | ---: | ---: | --- |",
    ]
    facts = set()
    for name, part in PARTS[device].items():
        found = _load(name, results, device)
        if found is None:
            lines.append(f"| {part.title} | {part.minutes:g} | not measured | | | |")
            continue
        scales = [found["scales"][s]["psnr"] for s in sorted(found["scales"], key=int)]
        used = found["training"]
        spent = f"{used['cpu_seconds']:.0f} of {2 * used['wall_seconds']:.0f}"
        lines.append(
            f"| {_title(part, found)}{_note(found)} | {part.minutes:g} "
            f"| {' / '.join(f'{psnr:.2f}' for psnr in scales)} | {found['mean']['psnr']:.2f} "
            f"| {spent if on_cpu else format(found['run']['steps'], ',')} "
            f"| {used['load_before']:.1f}, {used['load_after']:.1f} |"
        )
        facts.add(_facts(found["run"]))
    if on_cpu:
        about = (
            "Lego, white background, 25 test views (every 8th) a scale, one seed. CPU seconds beside twice the wall "
            "time, loading included, say how much of two cores the run had (the load average before counts "
            "what was paused for it). The settings are those of the design's prototype, "
            "which was tuned looking at these views; nothing was tuned on them since."
        )
    else:
        about = (
            "White background, all test views that the scene's folder has, one seed; minutes are of training alone. "
            "The sizes of the preset fast-gpu come from the design's arithmetic: nothing was tuned on a GPU."
        )
    lines += ["", " ".join([about, *([f"{'; '.join(sorted(facts))}."] if facts else [])])]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------ targets


class _Table:
    """Rows of measure, target, reading and verdict."""

    def __init__(self) -> None:
        self.lines = ["| measure | wanted | measured | holds |", "| --- | ---: | ---: | --- |"]

    def row(self, name: str, wanted: str, found: str | None, holds: bool | None) -> None:
        """found: None where it was not measured. holds: None where there is nothing to hold."""
        verdict = "-" if found is None or holds is None else ("yes" if holds else "**no**")
        self.lines.append(f"| {name} | {wanted} | {found or 'not measured'} | {verdict} |")


def _mean_row(table: _Table, part: Part, found: dict[str, Any] | None, where: str, judges: bool) -> None:
    wanted = WANTED_MEAN[part.name]
    mean = found["mean"]["psnr"] if found else math.nan
    table.row(
        f"{where}{_title(part, found) if found else part.title}, {part.minutes:g} min: mean PSNR",
        f"at least {wanted:g} dB",
        f"{mean:.2f} dB" if found else None,
        mean >= wanted if judges else None,
    )


def _cpu_rows(table: _Table, results: Path) -> str:
    """The targets of two CPU cores; the facts of the speed."""
    parts = {name: _load(name, results, "cpu") for name in PARTS["cpu"]}
    for name in ("single", "multi"):
        _mean_row(table, PARTS["cpu"][name], parts[name], "", True)
    for name, wanted in WANTED_EACH.items():
        found = parts[name]
        least = min(s["psnr"] for s in found["scales"].values()) if found else math.nan
        text = f"{least:.2f} dB" if found else None
        table.row("the same: worst scale", f"at least {wanted:g} dB", text, least >= wanted)
    aware, aliased = parts["multi"], parts["aliased"]
    gain = aware["scales"]["8"]["psnr"] - aliased["scales"]["8"]["psnr"] if aware and aliased else math.nan
    table.row(
        "25 x 25: gain over the aliased switch, equal time",
        f"at least {WANTED_GAIN:g} dB",
        f"{gain:.2f} dB" if aware and aliased else None,
        gain >= WANTED_GAIN,
    )
    peaks = [p["training"]["peak_bytes"] for p in (parts["single"], parts["multi"]) if p]
    table.row(
        "peak memory of the training process, the runs of 1 and 2.5 min",
        "below 1 GB",
        f"{max(peaks) / 1e9:.2f} GB" if peaks else None,
        bool(peaks) and max(peaks) < WANTED_MEMORY,
    )
    if full := parts["full"]:
        table.row(
            "the same, four scales from 800 x 800, 10 min (the limit is for the other runs)",
            "-",
            f"{full['training']['peak_bytes'] / 1e9:.2f} GB",
            None,
        )
    speeds = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("fast_speed_cpu*.json"))
    ]
    if not speeds:
        table.row("whole training step, one thread", "at least 0.5 M samples/s", None, None)
        table.row("200 x 200 view", f"below {WANTED_VIEW:g} s", None, None)
    return " ".join(_speed_rows(table, found) for found in speeds)


def _speed_rows(table: _Table, found: dict[str, Any]) -> str:
    """The targets of speed on one processor, and its facts."""
    processor = found["run"]["device"]
    for training in found["training"]:
        # Results of before there were two parts are of the four scales.
        title = PARTS["cpu"][training.get("part", "multi")].title
        rate, threads = training["samples_per_second"], training["threads"]
        if threads == 1:
            table.row(
                f"{processor}: whole training step, one thread, {title}",
                "at least 0.5 M samples/s",
                f"{rate / 1e6:.2f} M",
                rate >= WANTED_RATE,
            )
        else:
            table.row(
                f"the same, {threads} threads (which may share a core: not the measure)",
                "-",
                f"{rate / 1e6:.2f} M, {rate / threads / 1e6:.2f} M a thread",
                None,
            )
    for view in found["views"]:
        threads = f"{view['threads']} thread{'s' if view['threads'] > 1 else ''}"
        seconds = view["median_seconds"]
        table.row(
            f"{processor}: 200 x 200 view, {threads}",
            f"below {WANTED_VIEW:g} s",
            f"{seconds:.3f} s",
            seconds < WANTED_VIEW,
        )
    products = ""
    if rates := found.get("product_rates"):
        before, after = (f"{rate / 1e9:.0f}" for rate in rates)
        products = f"a thread's float32 product of 1024 x 1024: {before} GFLOP/s before, {after} after; "
    return (
        f"Speed: load average {found['load_before']:.1f} before, {found['load_after']:.1f} after; {products}"
        f"{_facts(found['run'])}; views: the median over {found['views'][0]['views']}."
    )


def _gpu(found: dict[str, Any] | None) -> str:
    """The GPU of a result, or the one that is wanted."""
    return found["run"]["device"].removeprefix("NVIDIA ") if found else GPU


def _judges(found: dict[str, Any] | None) -> bool:
    """Whether a result is of the scene and the GPU that the targets speak of."""
    return found is not None and found.get("scene") == SCENE and GPU in found["run"]["device"]


def _gpu_rows(table: _Table, results: Path) -> str:
    """The targets of one H200, "not measured" without a result; what there is of another GPU is not judged."""
    facts: dict[str, None] = {}  # in order
    for name, part in PARTS["cuda"].items():
        if found := _load(name, results, "cuda"):
            facts[_facts(found["run"])] = None
        _mean_row(table, part, found, f"{_gpu(found)}, ", _judges(found))
    found = _load(SPEED, results, "cuda")
    gpu, view = _gpu(found), {"median_seconds": math.nan, "width": 800, "height": 800}
    rates = memory = None
    if found:
        view, training = found["view"], found["training"]
        rates = f"{training['samples_per_second'] / 1e6:.1f} M samples/s, "
        rates += f"{training['rays_per_second'] / 1e6:.2f} M rays/s, "
        rates += f"{training['steps_per_second']:.0f} steps/s"
        memory = f"{found['peak_allocated_bytes'] / 1e9:.2f} GB, "
        memory += f"{found['peak_reserved_bytes'] / 1e9:.2f} GB with what torch keeps"
    seconds = view["median_seconds"]
    table.row(
        f"{gpu}, {view['width']} x {view['height']} frame",
        f"at most {1e3 * WANTED_FRAME:g} ms",
        f"{1e3 * seconds:.2f} ms" if found else None,
        seconds <= WANTED_FRAME if _judges(found) else None,
    )
    table.row(f"{gpu}, whole training step as captured", "-", rates, None)
    table.row(f"{gpu}, peak device memory of training and rendering", "-", memory, None)
    if found is None:
        return f"On a GPU: {'; '.join(facts)}." if facts else ""
    facts[_facts(found["run"])] = None
    return (
        f"On a GPU: {'; '.join(facts)}. The frame: rays and colours on the device, the median over {view['views']} "
        f"test views by the run {view['run']!r}. Verdicts are of {SCENE} on an {GPU}."
    )


def targets_table(results: Path, device: str) -> str:
    """Each measure beside what it should be: on "cpu" those of the GPU too, on "cuda" these alone."""
    table = _Table()
    notes = [_cpu_rows(table, results)] if device == "cpu" else []
    notes.append(_gpu_rows(table, results))
    if text := " ".join(filter(None, notes)):
        table.lines += ["", text]
    return "\n".join(table.lines) + "\n"


def write_tables(results: Path, device: str) -> list[Path]:
    """Write the tables of a device, and those of the other one where there are any: the CPU's tell of the GPU."""
    paths = []
    for place in PARTS:
        if place != device and not (results / f"fast_targets_{place}.md").is_file():
            continue
        for name, table in (("quality", quality_table), ("targets", targets_table)):
            paths.append(results / f"fast_{name}_{place}.md")
            paths[-1].write_text(table(results, place), encoding="utf-8")
    return paths
