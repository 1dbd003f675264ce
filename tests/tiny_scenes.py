"""Small scenes to load: in memory, or on disk as ordinary Blender folders."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mipnerf_fast.data import Dataset
from mipnerf_fast.rendering import render_image

ANGLE = 0.7


def orbit(count: int, elevation: float = 0.5, distance: float = 4.0) -> torch.Tensor:
    """Cameras once around the origin, looking at it, z up: [count, 4, 4]."""
    matrices = []
    for k in range(count):
        azimuth = 2 * math.pi * k / count
        back = np.array(
            [
                math.cos(azimuth) * math.cos(elevation),
                math.sin(azimuth) * math.cos(elevation),
                math.sin(elevation),
            ]
        )
        right = np.cross([0.0, 0.0, 1.0], back)
        right /= np.linalg.norm(right)
        matrix = np.eye(4)
        matrix[:3] = np.stack([right, np.cross(back, right), back, distance * back], 1)
        matrices.append(matrix)
    return torch.from_numpy(np.stack(matrices))


def dataset(
    sizes: list[int], scales: list[int], model: torch.nn.Module, background: str = "white"
) -> Dataset:
    """Square views of an analytic model, one of each size, with these scales; colours as 8-bit RGB."""
    count = len(sizes)
    data = Dataset(
        pixels=torch.zeros(sum(size * size for size in sizes), 3, dtype=torch.uint8),
        height=torch.tensor(sizes),
        width=torch.tensor(sizes),
        c2w=orbit(count)[:, :3].float(),
        focal=torch.tensor([0.5 * size / math.tan(0.5 * ANGLE) for size in sizes], dtype=torch.float64),
        near=torch.full((count,), 2.0),
        far=torch.full((count,), 6.0),
        lossmult=torch.ones(count),
        scale=torch.tensor(scales),
        names=[f"r_{i}" for i in range(count)],
        split="test",
        background=background,
    )
    for i, image in enumerate(data.images):
        rgb = render_image(model, data.rays(i), data.white_background).rgb
        image[...] = (rgb.clamp(0, 1) * 255).round().to(torch.uint8)
    return data


def write_blender(folder: Path, model: torch.nn.Module, size: int = 16, views: int = 4) -> Path:
    """An ordinary Blender scene of RGBA views of an analytic model: train, val and test."""
    for split in ("train", "val", "test"):
        (folder / split).mkdir(parents=True)
        data = dataset([size] * views, [1] * views, model)
        frames = []
        for i, image in enumerate(data.images):
            acc = render_image(model, data.rays(i)).acc
            rgba = torch.cat([image, (acc[..., None] * 255).to(torch.uint8)], -1)
            Image.fromarray(rgba.numpy()).save(folder / split / f"r_{i}.png")
            frames.append({"file_path": f"./{split}/r_{i}", "transform_matrix": orbit(views)[i].tolist()})
        scene = {"camera_angle_x": ANGLE, "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(scene))
    return folder
