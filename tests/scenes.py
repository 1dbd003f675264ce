"""Small scenes on disk for the data tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mipnerf_fast.data.procedural import look_at_origin

CAMERA_ANGLE_X = 0.7


def random_pixels(height: int, width: int, channels: int, seed: int) -> NDArray[np.uint8]:
    """Noise, so that no two pixels are likely to agree by chance."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def write_blender(
    root: Path,
    sizes: dict[str, list[tuple[int, int]]] | None = None,
    channels: int = 4,
    suffix: str = ".png",
    named_suffix: str = "",
) -> dict[str, list[NDArray[np.uint8]]]:
    """Write a Blender scene of noise and return its pixels by split; sizes are (height, width) for each frame."""
    sizes = {"train": [(16, 24), (16, 24), (16, 24)], "test": [(16, 24)]} if sizes is None else sizes
    written: dict[str, list[NDArray[np.uint8]]] = {}
    for split, shapes in sizes.items():
        (root / split).mkdir(parents=True)
        frames: list[dict[str, Any]] = []
        written[split] = []
        for i, (height, width) in enumerate(shapes):
            pixels = random_pixels(height, width, channels, seed=len(split) * 100 + i)
            image = Image.fromarray(pixels)
            path = root / split / f"r_{i}{suffix}"
            if suffix == ".webp":
                image.save(path, lossless=True, exact=True)
            else:
                image.save(path)
            written[split].append(pixels)
            c2w = look_at_origin(np.array([3.0 + i, 1.0 - i, 2.0]))
            frames.append({"file_path": f"./{split}/r_{i}{named_suffix}", "transform_matrix": c2w.tolist()})
        edit_json(root / f"transforms_{split}.json", {"camera_angle_x": CAMERA_ANGLE_X, "frames": frames})
    return written


def edit_json(path: Path, document: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(document))
