"""What the fast model reaches in a given time: PSNR by scale, samples a second, memory, time of a view.

python benchmarks/bench_fast_quality.py --data path/to/lego [--device cuda] [--only single multi aliased speed full]

The parts of a device are those of fast_parts.py. Every part trains by the command line, as a user would, evaluates the
test views, and writes a JSON file to benchmarks/results; the tables there are made anew from all of those that are
there, which with --only and no name is all that happens. Runs, and the multi-scale scenes made for them, stay in --runs
(fast_pictures.py draws from them). All of it is of the revision at the start: results written meanwhile change nothing.
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
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fast_parts import PARTS, SPEED, USUAL, Part, result_file, write_tables
from benchmarks.harness import synchronize
from mipnerf_fast.checkpoint import load_model
from mipnerf_fast.config import FastConfig, preset
from mipnerf_fast.cpu_setup import cpu_setup, usable_cores
from mipnerf_fast.data import Dataset, load_dataset
from mipnerf_fast.environment import cpu_name, device_name, revision
from mipnerf_fast.fast_training import FastTrainer
from mipnerf_fast.rendering import render_image

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Long enough that the first 400 steps, with their larger updates of the occupancy grid, weigh as in a run of a minute.
SPEED_SECONDS = 60.0
# The runs that the CPU's rate is that of, each on its own data; a view is rendered by the last one's.
SPEED_PARTS = ("single", "multi")
# On a GPU: until the step is captured and the occupancy grid is no longer that of the first steps.
WARM_UP_STEPS = 1000


def _run(arguments: Sequence[str]) -> dict[str, float]:
    """Run the command line; its wall and CPU seconds, largest memory and the load before and after."""
    command = [sys.executable, "-m", "mipnerf_fast.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MIPNERF_FAST_REVISION": revision()}
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
        sizes = ["--downscale", str(part.downscale), "--levels", str(part.levels)]
        _run(["convert", "--data", str(data), "--out", str(folder), *sizes])
    return folder, 1


def quality(part: Part, data: Path, runs: Path, device: str) -> dict[str, Any]:
    """Train a part on a device and evaluate it on the test views."""
    scene, downscale = _scene(data, part, runs)
    run_dir = runs / part.name
    if run_dir.exists():
        raise SystemExit(f"--runs: {run_dir} exists; move it away")
    options = {
        "--preset": part.preset,
        "--data": str(scene),
        "--downscale": str(downscale),
        "--max-minutes": f"{part.minutes:g}",
        "--run-dir": str(run_dir),
        "--device": device,
    }
    used = _run(["train", *(word for pair in options.items() for word in pair), *part.flags])
    _run(["eval", "--run-dir", str(run_dir), "--device", device])
    metrics = json.loads((run_dir / "eval" / "metrics.json").read_text(encoding="utf-8"))
    return {
        "part": part.name,
        "scene": data.name,
        "training": used,
        "scales": metrics["scales"],
        "mean": metrics["mean"],
        "run": metrics["run"],
    }


def training_rate(part: Part, train: Dataset, device: torch.device, warm_up: int = 0) -> dict[str, float]:
    """Whole training steps by the second, as training launches them: a part's preset on its data for SPEED_SECONDS.

    Args:
        warm_up: steps that are not counted.
    """
    config = preset(part.preset)
    assert isinstance(config.model, FastConfig)
    sized = config.model.for_images(int(train.width.max()))
    trainer = FastTrainer(dataclasses.replace(config, model=sized), train, device, max_seconds=SPEED_SECONDS)
    while trainer.step < warm_up:
        trainer.launch_step()
    trainer.results(wait=True)
    synchronize(device)
    begin, steps, samples, rays = trainer.seconds, trainer.step, trainer.samples, 0
    before, start = time.process_time(), time.perf_counter()
    trainer.max_seconds = begin + SPEED_SECONDS
    while not trainer.is_done:
        trainer.launch_step()
        rays += sum(result.rays for result in trainer.results())
    rays += sum(result.rays for result in trainer.results(wait=True))
    synchronize(device)
    wall, spent = time.perf_counter() - start, time.process_time() - before
    steps, samples = trainer.step - steps, trainer.samples - samples
    return {
        "steps": steps,
        "samples": samples,
        "rays": rays,
        "wall_seconds": wall,
        "cpu_seconds": spent,
        "samples_per_second": samples / wall,
        "rays_per_second": rays / wall,
        "steps_per_second": steps / wall,
        "samples_per_cpu_second": samples / spent,
    }


def view_time(run_dir: Path, test: Dataset, device: torch.device) -> dict[str, Any]:
    """Seconds that the finest test views take, one by one, by a run's model; rays and colours stay on the device."""
    model = load_model(run_dir, device, "latest")[0].eval()
    views = [i for i in range(len(test)) if test.scale[i] == test.scale.min()]
    seconds = []
    for index in [views[0], *views]:  # the first one warms up
        rays = test.rays(index).map(lambda field: field.to(device))
        synchronize(device)
        start = time.perf_counter()
        render_image(model, rays, test.white_background)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    height, width = (int(size[views[0]]) for size in (test.height, test.width))
    return {
        "run": run_dir.name,
        "views": len(views),
        "height": height,
        "width": width,
        "pixels": height * width,
        "median_seconds": statistics.median(seconds[1:]),
        "slowest_seconds": max(seconds[1:]),
    }


def product_rate() -> float:
    """Floating-point operations a second of one thread's product of 1024 x 1024, float32: what the core gives now."""
    torch.set_num_threads(1)
    a, best = torch.randn(1024, 1024), math.inf
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def speed(data: Path, runs: Path) -> dict[str, Any]:
    """Rates and times on the CPU, with one thread and with all, on the data of SPEED_PARTS."""
    cpu, sets = torch.device("cpu"), {}
    for name in SPEED_PARTS:
        scene, downscale = _scene(data, PARTS["cpu"][name], runs)
        sets[name] = [load_dataset(str(scene), split, downscale=downscale) for split in ("train", "test")]
    counts = sorted({1, usable_cores()})
    load = os.getloadavg()[0]
    training, views = [], []
    with cpu_setup():
        rates = [product_rate()]
        for name, (train, _) in sets.items():
            for threads in counts:
                torch.set_num_threads(threads)
                rate = training_rate(PARTS["cpu"][name], train, cpu)
                training.append({"part": name, "threads": threads} | rate)
        for threads in counts:
            torch.set_num_threads(threads)
            views.append({"threads": threads} | view_time(runs / name, sets[name][1], cpu))
        rates.append(product_rate())
    return {
        "part": SPEED,
        "scene": data.name,
        "product_rates": rates,
        "training": training,
        "views": views,
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "run": {"device": cpu_name(), "torch": torch.__version__, "revision": revision()},
    }


def speed_on_gpu(data: Path, runs: Path, device: torch.device) -> dict[str, Any]:
    """The captured step's rate, a frame's time and the device memory of both.

    Errors: SystemExit where none of the parts that train has left a run to render with.
    """
    trained = [part for part in PARTS["cuda"].values() if (runs / part.name).is_dir()]
    if not trained:
        raise SystemExit(f"--only {SPEED}: a frame needs a run in {runs}, of {' or '.join(PARTS['cuda'])}")
    part = trained[-1]
    scene, _ = _scene(data, part, runs)
    train, test = (load_dataset(str(scene), split) for split in ("train", "test"))
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    training = training_rate(part, train, device, WARM_UP_STEPS)
    view = view_time(runs / part.name, test, device)
    return {
        "part": SPEED,
        "scene": data.name,
        "preset": part.preset,
        "training": training,
        "view": view,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else 0,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if on_gpu else 0,
        "run": {"device": device_name(device), "torch": torch.__version__, "revision": revision()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the parts asked for, then write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--data", type=Path, help='the lego scene, in Blender layout; "demo": the built-in one'
    )
    parser.add_argument("--device", choices=list(PARTS), default="cpu")
    parser.add_argument(
        "--only",
        nargs="*",
        help="parts; on the CPU "
        + ", ".join(PARTS["cpu"])
        + f", {SPEED}; on a GPU "
        + ", ".join(PARTS["cuda"])
        + f", {SPEED}",
    )
    parser.add_argument("--runs", type=Path, default=Path("outputs/fast_quality"), help="where runs are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--note", default="", help="what a reader must know about this measurement")
    options = parser.parse_args(argv)
    parts = PARTS[options.device]
    chosen = USUAL[options.device] if options.only is None else options.only
    for name in chosen:
        if name not in (*parts, SPEED):
            parser.error(f"--only {name}: on {options.device} the parts are {', '.join((*parts, SPEED))}")
    if chosen and options.data is None:
        parser.error("--data: needed, unless --only is empty and just the tables are written")
    if chosen and options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no GPU")
    revision()  # of now: what is written below makes the checkout another one
    options.out.mkdir(parents=True, exist_ok=True)
    if chosen:
        options.runs.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        if name != SPEED:
            found = quality(parts[name], options.data, options.runs, options.device)
        elif options.device == "cpu":
            found = speed(options.data, options.runs)
        else:
            found = speed_on_gpu(options.data, options.runs, torch.device(options.device))
        path = options.out / result_file(name, options.device)
        path.write_text(json.dumps(found | {"note": options.note}, indent=1) + "\n", encoding="utf-8")
    for path in write_tables(options.out, options.device):
        print(f"{path.name}\n\n{path.read_text(encoding='utf-8')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
