"""What scale awareness is for: the coarsest scale with and without it beside the truth, and a zoom of both.

python benchmarks/fast_pictures.py --runs outputs/fast_quality

Takes the runs "multi" and "aliased" of bench_fast_quality.py; writes the strip fast_aliasing.png and the animation
fast_zoom.webp (with scale awareness left, without it right) to benchmarks/results, and the animation as zoom.mp4 to the
folder of the runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mipnerf_fast.camera_paths import camera_path
from mipnerf_fast.checkpoint import load_model
from mipnerf_fast.data import Dataset, load_dataset
from mipnerf_fast.durable_files import write_durably
from mipnerf_fast.model import Model
from mipnerf_fast.pictures import Picture, Video, VideoUnavailableError, to_uint8, write_png
from mipnerf_fast.plots import ERROR_GAIN, error_picture, strip
from mipnerf_fast.rendering import render_image

RESULTS = Path(__file__).resolve().parent / "results"
RUNS = {"with scale awareness": "multi", "without": "aliased"}
_GAP = 4
_FRAMES_PER_SECOND = 15


def coarsest(models: dict[str, Model], data: Dataset, views: int, path: Path) -> None:
    """Write the strip of so many views of the coarsest scale, spread evenly over them."""
    indices = [i for i in range(len(data)) if data.scale[i] == data.scale.max()]
    chosen = [indices[(2 * k + 1) * len(indices) // (2 * views)] for k in range(views)]
    labels = ["truth"]
    for name in models:
        labels += [name, f"error x {ERROR_GAIN:g}"]
    rows = []
    for index in chosen:
        target = data.target(index)
        row = [to_uint8(target)]
        for model in models.values():
            rgb = render_image(model, data.rays(index), data.white_background).rgb
            row += [to_uint8(rgb), error_picture(rgb, target)]
        rows.append(row)
    write_png(path, strip(rows, labels))


def zoom(models: dict[str, Model], data: Dataset, frames: int) -> list[Picture]:
    """Pictures of a camera that moves back to eight times the distance, the models side by side."""
    rows = []
    for camera in camera_path("zoom", data, frames):
        rays = camera.rays()
        pictures = [
            to_uint8(render_image(model, rays, data.white_background).rgb) for model in models.values()
        ]
        gap = np.full((pictures[0].shape[0], _GAP, 3), 255, np.uint8)
        row = pictures[0]
        for picture in pictures[1:]:
            row = np.concatenate([row, gap, picture], 1)
        rows.append(row)
    return rows


def write_video(rows: list[Picture], path: Path) -> None:
    """As mp4, at twice the size.

    Errors: VideoUnavailableError.
    """
    video = Video(path, _FRAMES_PER_SECOND)
    for row in rows:
        video.add(row.repeat(2, 0).repeat(2, 1))
    video.close()


def write_animation(rows: list[Picture], path: Path) -> None:
    """As animated WebP, back and forth without end: what a web page shows without a player."""
    there_and_back = np.stack([*rows, *rows[-2:0:-1]])
    milliseconds = round(1000 / _FRAMES_PER_SECOND)
    encoded = imageio.imwrite(
        "<bytes>", there_and_back, extension=".webp", duration=milliseconds, loop=0, quality=80
    )
    write_durably(path, encoded)


def main() -> int:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("outputs/fast_quality"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--views", type=int, default=3, help="rows of the strip")
    parser.add_argument("--frames", type=int, default=60, help="of the animation; 0: none")
    options = parser.parse_args()
    models, data = {}, None
    for name, folder in RUNS.items():
        if not (options.runs / folder).is_dir():
            parser.error(f"--runs: there is no run {options.runs / folder}; bench_fast_quality.py makes it")
        model, run, _ = load_model(options.runs / folder, torch.device("cpu"), "latest")
        models[name] = model.eval()
        data = data or load_dataset(run["data"], "test", run["background"], run["downscale"])
    assert data is not None
    with torch.no_grad():
        coarsest(models, data, options.views, options.out / "fast_aliasing.png")
        print(f"written: {options.out / 'fast_aliasing.png'}")
        if options.frames:
            rows = zoom(models, data, options.frames)
            write_animation(rows, options.out / "fast_zoom.webp")
            print(f"written: {options.out / 'fast_zoom.webp'}")
            try:
                write_video(rows, options.runs / "zoom.mp4")
                print(f"written: {options.runs / 'zoom.mp4'}")
            except VideoUnavailableError as error:
                print(f"no video: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
