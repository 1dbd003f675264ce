"""Picture strips: ground truth, render, error, depth and normals side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .camera_paths import camera_path
from .model import Model
from .pictures import Picture, colour_map, to_uint8, write_png
from .rendering import distance_range, picture, render_image

if TYPE_CHECKING:
    from .data.dataset import Dataset

ERROR_GAIN = 5.0
_GAP = 8
_LABEL_HEIGHT = 26
_PANEL = 240


def error_picture(prediction: torch.Tensor, target: torch.Tensor, gain: float = ERROR_GAIN) -> Picture:
    """The absolute colour error, averaged over channels and times `gain`, from black to bright; [H, W, 3]."""
    return to_uint8(colour_map((prediction - target).abs().mean(-1) * gain, "inferno"))


def strip(rows: Sequence[Sequence[Picture]], labels: Sequence[str]) -> Picture:
    """Pictures in a grid with a label above each column.

    Small pictures are enlarged by a whole factor to about 240 pixels, without smoothing, so that pixels stay pixels.

    Args:
        rows: each as many pictures [H, W, 3] as there are labels; all of one size.
        labels: one per column.

    Returns:
        uint8 [H', W', 3] on white.
    """
    shapes = {panel.shape for row in rows for panel in row}
    if len(shapes) != 1 or {len(row) for row in rows} != {len(labels)}:
        raise ValueError(
            f"strip: need {len(labels)} pictures of one size in every row, got sizes {sorted(shapes)}"
        )
    from PIL import Image, ImageDraw, ImageFont

    height, width, _ = shapes.pop()
    factor = max(1, round(_PANEL / max(height, width)))
    height, width = height * factor, width * factor
    canvas = np.full(
        (
            _LABEL_HEIGHT + len(rows) * (height + _GAP),
            _GAP + len(labels) * (width + _GAP),
            3,
        ),
        255,
        np.uint8,
    )
    for r, row in enumerate(rows):
        for c, panel in enumerate(row):
            top, left = _LABEL_HEIGHT + r * (height + _GAP), _GAP + c * (width + _GAP)
            large = panel.repeat(factor, 0).repeat(factor, 1)
            canvas[top : top + height, left : left + width] = large
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=15)
    for c, label in enumerate(labels):
        middle = _GAP + c * (width + _GAP) + width / 2
        draw.text((middle, _LABEL_HEIGHT / 2), label, fill=(40, 40, 40), font=font, anchor="mm")
    return np.asarray(image)


def view_strip(
    model: Model, data: Dataset, views: Sequence[int], path: Path, gain: float = ERROR_GAIN
) -> None:
    """Write a PNG with a row per view: ground truth, render, error x gain, depth, normals.

    Args:
        model: a trained model.
        data: gives the true pictures; the views must have one size.
        views: indices among the views of its finest scale.
        path: of the PNG.
        gain: of the error.
    """
    cameras = camera_path("test", data)
    rows = []
    for i in views:
        camera = cameras[i]
        rays = camera.rays()
        rendering = render_image(model, rays, data.white_background)
        target = data.target(data.names.index(camera.name))
        ends = distance_range(camera, rendering)
        rows.append(
            [
                to_uint8(target),
                picture("rgb", camera, rays, rendering, ends),
                error_picture(rendering.rgb.cpu(), target, gain),
                picture("depth", camera, rays, rendering, ends),
                picture("normals", camera, rays, rendering, ends),
            ]
        )
    write_png(path, strip(rows, ("ground truth", "render", f"error x {gain:g}", "depth", "normals")))
