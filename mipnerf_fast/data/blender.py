"""Scenes in the layout of the NeRF synthetic set: transforms_{split}.json and one image for each frame."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from mipnerf_fast.data.dataset import Dataset
from mipnerf_fast.data.frames import Frame, assemble
from mipnerf_fast.data.scene_files import (
    SPLITS,
    camera,
    field,
    find_image,
    image_size,
    integer,
    list_field,
    number,
    read_image,
    read_json,
    string,
)
from mipnerf_fast.errors import InputError


def transforms_file(root: Path, split: str) -> Path:
    """Where the cameras of a split are."""
    return root / f"transforms_{split}.json"


def splits(root: Path) -> list[str]:
    """The splits a folder has cameras for; empty when it is no Blender scene."""
    return [split for split in SPLITS if transforms_file(root, split).is_file()]


def read_frames(root: Path, split: str) -> list[Frame]:
    """The frames of a split, checked, with nothing decoded yet.

    focal = W / 2 / tan(camera_angle_x / 2) with the width W of the frame's own image; near 2, far 6. Widths and
    heights that the file states ("w" and "h", for all frames or in each) must be those of the images.

    Raises:
        InputError: what is wrong, by file and field.

    Source: algorithm 1.1.
    """
    path = transforms_file(root, split)
    if not path.is_file():
        raise InputError(f"{root}: no {path.name}; the splits here are {', '.join(splits(root))}")
    scene = read_json(path)
    frames: list[Frame] = []
    for index, entry in enumerate(list_field(scene, "frames", str(path))):
        where = f"{path}: frames[{index}]"
        if not isinstance(entry, dict):
            raise InputError(f"{where} is not an object; expected file_path and transform_matrix")
        angle_source = entry if "camera_angle_x" in entry else scene
        angle_where = where if angle_source is entry else str(path)
        angle = number(
            field(angle_source, "camera_angle_x", angle_where),
            f"{angle_where}: 'camera_angle_x'",
            above=0,
            below=math.pi,
        )
        c2w = camera(field(entry, "transform_matrix", where), f"{where}.transform_matrix")
        file_path = string(field(entry, "file_path", where), f"{where}.file_path")
        image = find_image(root, file_path, f"{where}.file_path")
        height, width, channels = image_size(image)
        for key, actual in (("w", width), ("h", height)):
            stated = entry.get(key, scene.get(key))
            if stated is not None and integer(stated, f"{where}.{key}", 1) != actual:
                raise InputError(
                    f"{where}: '{key}' is {stated}, but {image} is {width} x {height}; expected {actual}"
                )
        frames.append(
            Frame(
                name=image.stem,
                where=f"{where} ({image.name})",
                c2w=c2w,
                focal=0.5 * width / math.tan(0.5 * angle),
                height=height,
                width=width,
                channels=channels,
                read=partial(read_image, image),
            )
        )
    return frames


def load(root: Path, split: str, background: str, downscale: int) -> Dataset:
    """A split of a Blender scene; RGB images are taken to be over the stated background already."""
    return assemble(read_frames(root, split), split, background, downscale)
