"""What the fast model reaches in a given time: PSNR by scale, samples a second, memory, time of a view.

python benchmarks/bench_fast_quality.py --data path/to/lego --only single multi aliased speed full

Every part trains by the command line, as a user would, evaluates the test views, and writes a JSON file to
benchmarks/results; the tables fast_*_cpu.md are made anew from all of those that are there. Runs, and the multi-scale
scenes made for them, stay in --runs (fast_pictures.py draws from them).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mipnerf_fast.checkpoint import load_model
from mipnerf_fast.config import FastConfig, preset
from mipnerf_fast.cpu_setup import cpu_setup, usable_cores
from mipnerf_fast.data import load_dataset
from mipnerf_fast.environment import cpu_name, revision
from mipnerf_fast.fast_training import FastTrainer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ALIASED = ("--attenuation", "none", "--no-scale-input")
SPEED_SECONDS = 12.0


@dataclass(frozen=True)
class Part:
    """One training run: its name and title, the data it takes, its minutes, further flags of `train`."""

    name: str
    title: str
    downscale: int
    levels: int
    minutes: float
    flags: tuple[str, ...] = ()


PARTS = {
    part.name: part
    for part in (
        Part("single", "one scale, 100 x 100", 8, 1, 1.0),
        Part("multi", "four scales, 200 to 25 pixels", 4, 4, 2.5),
        Part("aliased", "four scales, 200 to 25 pixels, aliased", 4, 4, 2.5, ALIASED),
        Part("full", "four scales, 800 to 100 pixels", 1, 4, 10.0),
    )
}
# What the parts are held to: mean PSNR and PSNR of every scale, dB; peak memory, bytes.
WANTED_MEAN = {"single": 32.0, "multi": 32.0}
WANTED_EACH = {"multi": 31.0}
WANTED_GAIN, WANTED_MEMORY, WANTED_RATE, WANTED_VIEW = 3.0, 10**9, 0.5e6, 0.3


def _run(arguments: Sequence[str]) -> dict[str, float]:
    """Run the command line; its wall and CPU seconds, largest memory and the load before and after."""
    command = [sys.executable, "-m", "mipnerf_fast.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    load, start = os.getloadavg()[0], time.perf_counter()
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"failed with status {status}: {' '.join(command)}")
    return {
        "wall_seconds": time.perf_counter() - start,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": 1024 * used.ru_maxrss,
        "load_before": load,
        "load_after": os.getloadavg()[0],
    }


def _scene(data: Path, part: Part, runs: Path) -> tuple[Path, int]:
    """Where a part's data are, made if need be, and the downscale to load them with."""
    if part.levels == 1:
        return data, part.downscale
    folder = runs / f"{data.name}_{part.levels}_from_{part.downscale}"
    if not folder.exists():
        _run(
            [
                "convert",
                "--data",
                str(data),
                "--out",
                str(folder),
                "--downscale",
                str(part.downscale),
                "--levels",
                str(part.levels),
            ]
        )
    return folder, 1


def quality(part: Part, data: Path, runs: Path) -> dict[str, Any]:
    """Train a part and evaluate it on the test views."""
    scene, downscale = _scene(data, part, runs)
    run_dir = runs / part.name
    if run_dir.exists():
        raise SystemExit(f"--runs: {run_dir} exists; move it away")
    used = _run(
        [
            "train",
            "--preset",
            "fast",
            "--data",
            str(scene),
            "--downscale",
            str(downscale),
            "--max-minutes",
            f"{part.minutes:g}",
            "--run-dir",
            str(run_dir),
            "--device",
            "cpu",
            *part.flags,
        ]
    )
    _run(["eval", "--run-dir", str(run_dir), "--device", "cpu"])
    metrics = json.loads((run_dir / "eval" / "metrics.json").read_text(encoding="utf-8"))
    return {"part": part.name, "training": used, "scales": metrics["scales"], "mean": metrics["mean"]} | {
        "run": metrics["run"]
    }


def training_rate(data: Path, runs: Path, threads: int) -> dict[str, float]:
    """Samples a second through whole training steps, on the four-scale set, from the first step on."""
    scene, _ = _scene(data, PARTS["multi"], runs)
    train = load_dataset(str(scene), "train")
    config = preset("fast")
    assert isinstance(config.model, FastConfig)
    sized = config.model.for_images(int(train.width.max()))
    with cpu_setup():
        torch.set_num_threads(threads)
        trainer = FastTrainer(dataclasses.replace(config, model=sized), train, max_seconds=SPEED_SECONDS)
        before = time.process_time()
        while not trainer.is_done:
            trainer.train_step()
        spent = time.process_time() - before
    return {
        "threads": threads,
        "steps": trainer.step,
        "samples": trainer.samples,
        "wall_seconds": trainer.seconds,
        "cpu_seconds": spent,
        "samples_per_second": trainer.samples / trainer.seconds,
        "samples_per_cpu_second": trainer.samples / spent,
    }


def view_time(data: Path, runs: Path, threads: int) -> dict[str, float]:
    """Seconds that the test views of 200 x 200 pixels take, one by one, by the run "multi"."""
    scene, _ = _scene(data, PARTS["multi"], runs)
    test = load_dataset(str(scene), "test")
    model, _, _ = load_model(runs / "multi", torch.device("cpu"), "latest")
    views = [i for i in range(len(test)) if test.scale[i] == 1]
    with cpu_setup(), torch.no_grad():
        torch.set_num_threads(threads)
        seconds = []
        for index in [views[0], *views]:  # the first one warms up
            rays = test.rays(index)
            start = time.perf_counter()
            model(rays)
            seconds.append(time.perf_counter() - start)
    return {
        "threads": threads,
        "views": len(views),
        "pixels": int(test.width[views[0]] * test.height[views[0]]),
        "median_seconds": statistics.median(seconds[1:]),
        "slowest_seconds": max(seconds[1:]),
    }


def speed(data: Path, runs: Path) -> dict[str, Any]:
    """Rates and times with one thread and with all."""
    counts = sorted({1, usable_cores()})
    load = os.getloadavg()[0]
    return {
        "part": "speed",
        "training": [training_rate(data, runs, threads) for threads in counts],
        "views": [view_time(data, runs, threads) for threads in counts],
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "run": {"device": cpu_name(), "torch": torch.__version__, "revision": revision()},
    }


# ---------------------------------------------------------------------------------------------------- the tables


def _load(name: str, results: Path) -> dict[str, Any] | None:
    path = results / f"fast_{name}_cpu.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _verdict(holds: bool) -> str:
    return "yes" if holds else "**no**"


def _note(found: dict[str, Any]) -> str:
    return f"; {found['note']}" if found.get("note") else ""


def quality_table(results: Path) -> str:
    """PSNR by scale of the parts that are there."""
    lines = [
        "| training | minutes | PSNR, dB, finest scale first | mean | CPU s of 2 x wall s "
        "| load average before, after |",
        "| --- | ---: | --- | ---: | ---: | --- |",
    ]
    facts = set()
    for name, part in PARTS.items():
        found = _load(name, results)
        if found is None:
            lines.append(f"| {part.title} | {part.minutes:g} | not measured | | | |")
            continue
        scales = [found["scales"][s]["psnr"] for s in sorted(found["scales"], key=int)]
        used = found["training"]
        cells = " / ".join(f"{psnr:.2f}" for psnr in scales)
        lines.append(
            f"| {part.title}{_note(found)} | {part.minutes:g} | {cells} | {found['mean']['psnr']:.2f} "
            f"| {used['cpu_seconds']:.0f} of {2 * used['wall_seconds']:.0f} "
            f"| {used['load_before']:.1f}, {used['load_after']:.1f} |"
        )
        run = found["run"]
        facts.add(f"{run['device']}, torch {run['torch']}, revision {run['revision']}")
    lines += [
        "",
        "Lego, white background, 25 test views (every 8th) a scale, one seed. CPU seconds beside twice the wall time, "
        "loading included, say how much of two cores the run had (the load average before counts "
        "what was paused for it). The settings are those of the design's prototype, "
        "which was tuned looking at these views; nothing was tuned on them since. "
        + "; ".join(sorted(facts))
        + ".",
    ]
    return "\n".join(lines) + "\n"


def targets_table(results: Path) -> str:
    """Each measure beside what it should be."""
    lines = ["| measure | wanted | measured | holds |", "| --- | ---: | ---: | --- |"]

    def row(name: str, wanted: str, found: str | None, holds: bool | None) -> None:
        verdict = "-" if found is None or holds is None else _verdict(holds)
        lines.append(f"| {name} | {wanted} | {found or 'not measured'} | {verdict} |")

    parts = {name: _load(name, results) for name in (*PARTS, "speed")}
    for name, wanted in WANTED_MEAN.items():
        found = parts[name]
        mean = found["mean"]["psnr"] if found else math.nan
        title = f"{PARTS[name].title}, {PARTS[name].minutes:g} min: mean PSNR"
        row(title, f"at least {wanted:g} dB", f"{mean:.2f} dB" if found else None, mean >= wanted)
    for name, wanted in WANTED_EACH.items():
        found = parts[name]
        least = min(s["psnr"] for s in found["scales"].values()) if found else math.nan
        row(
            "the same: worst scale",
            f"at least {wanted:g} dB",
            f"{least:.2f} dB" if found else None,
            least >= wanted,
        )
    aware, aliased = parts["multi"], parts["aliased"]
    gain = aware["scales"]["8"]["psnr"] - aliased["scales"]["8"]["psnr"] if aware and aliased else math.nan
    text = f"{gain:.2f} dB" if aware and aliased else None
    row(
        "25 x 25: gain over the aliased switch, equal time",
        f"at least {WANTED_GAIN:g} dB",
        text,
        gain >= WANTED_GAIN,
    )
    peaks = [p["training"]["peak_bytes"] for p in (parts["single"], parts["multi"]) if p]
    row(
        "peak memory of the training process",
        "below 1 GB",
        f"{max(peaks) / 1e9:.2f} GB" if peaks else None,
        bool(peaks) and max(peaks) < WANTED_MEMORY,
    )
    if parts["full"]:
        peak = parts["full"]["training"]["peak_bytes"] / 1e9
        row("the same, four scales from 800 x 800", "-", f"{peak:.2f} GB", None)
    found = parts["speed"]
    rate = found["training"][0]["samples_per_second"] if found else math.nan
    row(
        "whole training step, one thread",
        "at least 0.5 M samples/s",
        f"{rate / 1e6:.2f} M" if found else None,
        rate >= WANTED_RATE,
    )
    if found and len(found["training"]) > 1:
        many = found["training"][-1]
        row(
            f"the same, {many['threads']} threads",
            "-",
            f"{many['samples_per_second'] / 1e6:.2f} M",
            None,
        )
    for view in found["views"] if found else []:
        threads = f"{view['threads']} thread{'s' if view['threads'] > 1 else ''}"
        row(
            f"200 x 200 view, {threads}",
            "below 0.3 s",
            f"{view['median_seconds']:.3f} s",
            view["median_seconds"] < WANTED_VIEW,
        )
    if found:
        lines += [
            "",
            f"Speed: load average {found['load_before']:.1f} before, {found['load_after']:.1f} after; "
            f"{found['run']['device']}, torch {found['run']['torch']}, revision {found['run']['revision']}; views: the "
            "median over 25.",
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure the parts asked for, then write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="the lego scene, in Blender layout")
    parser.add_argument(
        "--only", nargs="*", choices=[*PARTS, "speed"], default=["single", "multi", "aliased", "speed"]
    )
    parser.add_argument("--runs", type=Path, default=Path("outputs/fast_quality"), help="where runs are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--note", default="", help="what a reader must know about this measurement")
    options = parser.parse_args()
    if options.only and options.data is None:
        parser.error("--data: needed, unless --only is empty and just the tables are written")
    options.runs.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        if name == "speed":
            found = speed(options.data, options.runs)
        else:
            found = quality(PARTS[name], options.data, options.runs)
        path = options.out / f"fast_{name}_cpu.json"
        path.write_text(json.dumps(found | {"note": options.note}, indent=1) + "\n", encoding="utf-8")
    for name, table in (("quality", quality_table), ("targets", targets_table)):
        text = table(options.out)
        (options.out / f"fast_{name}_cpu.md").write_text(text, encoding="utf-8")
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
