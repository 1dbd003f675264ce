"""What `make demo` runs: trains on the built-in scene, evaluates, and leaves pictures, a table and a video.

python benchmarks/demo.py --out outputs/demo --minutes 0.75
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

# So that the checkout is found without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mipnerf_fast.camera_paths import camera_path
from mipnerf_fast.checkpoint import load_model
from mipnerf_fast.config import preset
from mipnerf_fast.data import Dataset, load_dataset
from mipnerf_fast.environment import choose_device
from mipnerf_fast.errors import InputError
from mipnerf_fast.evaluation import evaluate, terminal_table, write_reports
from mipnerf_fast.plots import view_strip
from mipnerf_fast.rendering import render_path
from mipnerf_fast.training import run_training

DOWNSCALE = 1
# The video takes as many frames as can be rendered in this time, within limits, and lasts four seconds.
VIDEO_SECONDS_TO_RENDER, VIDEO_SECONDS = 25.0, 4.0
FEWEST_FRAMES, MOST_FRAMES = 16, 96


def frames_in(seconds: float, pixels: int, pixels_per_second: float) -> int:
    """Frames of so many pixels that take about so long, a multiple of 4."""
    frames = int(seconds * pixels_per_second / pixels)
    return max(FEWEST_FRAMES, min(MOST_FRAMES, frames)) // 4 * 4


def evenly(data: Dataset, count: int) -> list[int]:
    """Views spread evenly over a data set."""
    count = min(count, len(data))
    return [round((k + 0.5) * len(data) / count - 0.5) for k in range(count)]


def make_demo(folder: Path, minutes: float, downscale: int = DOWNSCALE, name: str = "fast") -> bool:
    """Train, evaluate and draw everything into a new folder; False where training was interrupted."""
    run_dir = folder / "run"
    result = run_training("demo", preset(name), name, run_dir, downscale=downscale, max_minutes=minutes)
    if result.interrupted:
        return False
    model, _, checkpoint = load_model(run_dir, choose_device())
    model.eval()
    test = load_dataset("demo", "test", downscale=downscale)

    start = time.monotonic()
    evaluation = evaluate(model, test, steps=checkpoint.step, seconds=checkpoint.seconds)
    rate = test.pixels.shape[0] / (time.monotonic() - start)
    write_reports(evaluation, folder)
    view_strip(model, test, evenly(test, 3), folder / "strip.png")

    frames = frames_in(VIDEO_SECONDS_TO_RENDER, int(test.height[0] * test.width[0]), rate)
    cameras = camera_path("turntable", test, frames)
    rate = max(1.0, frames / VIDEO_SECONDS)
    for line in render_path(model, cameras, run_dir / "render" / "turntable", frames_per_second=rate):
        if "skipped" in line:
            print(f"demo: {line}")
    for name, kind in (("turntable.mp4", "rgb"), ("turntable_depth.mp4", "depth")):
        video = run_dir / "render" / "turntable" / f"{kind}.mp4"
        if video.exists():
            shutil.copyfile(video, folder / name)
    shutil.copyfile(run_dir / "curves.png", folder / "curves.png")
    print(f"\n{terminal_table(evaluation)}\n")
    return True


def main(argv: list[str] | None = None) -> int:
    """Make the demo; the previous one stays until the new one is complete."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder to make or replace")
    parser.add_argument("--minutes", type=float, default=0.75, help="of training")
    parser.add_argument("--downscale", type=int, default=DOWNSCALE, help="of the scene's 200 x 200 views")
    parser.add_argument(
        "--preset", default="fast", help="fast, or demo: the exact network, slower and blurred"
    )
    arguments = parser.parse_args(argv)
    out: Path = arguments.out
    partial, previous = (out.with_name(f"{out.name}.{state}") for state in ("partial", "previous"))
    start = time.monotonic()
    try:
        for leftover in (partial, previous):
            if leftover.exists():
                shutil.rmtree(leftover)
        if not make_demo(partial, arguments.minutes, arguments.downscale, arguments.preset):
            print(f"demo: interrupted; what there is lies in {partial}", file=sys.stderr)
            return 130
        if out.exists():
            out.rename(previous)
        partial.rename(out)
        if previous.exists():
            shutil.rmtree(previous)
    except (InputError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    print(f"demo: done in {time.monotonic() - start:.0f} s; look at")
    for name, what in (
        ("strip.png", "ground truth, render, error, depth, normals"),
        ("turntable.mp4", "once around the scene"),
        ("turntable_depth.mp4", "the same as depth"),
        ("curves.png", "loss, PSNR and learning rate"),
        ("metrics.md", "the table above"),
        ("run", "the run folder, for every other verb"),
    ):
        if (out / name).exists():
            print(f"  {out / name}: {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
