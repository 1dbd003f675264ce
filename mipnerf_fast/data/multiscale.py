"""The multi-scale Blender benchmark: its arithmetic, its layout on disk, and the conversion of scenes to it."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mipnerf_fast.data import blender, procedural
from mipnerf_fast.data.dataset import Dataset
from mipnerf_fast.data.frames import Frame, assemble, check_channels, check_divisible, run_all, unique_names
from mipnerf_fast.data.pyramid import downsample2, level_of, pyramid
from mipnerf_fast.data.scene_files import (
    SPLITS,
    camera,
    field,
    find_image,
    image_size,
    integer,
    list_field,
    matrix,
    number,
    read_image,
    read_json,
    string,
)
from mipnerf_fast.errors import InputError
from mipnerf_fast.progress import Progress

__all__ = ["convert", "downsample2", "load", "metadata_file", "read_frames"]

_COLUMNS = (
    "file_path",
    "cam2world",
    "width",
    "height",
    "focal",
    "label",
    "near",
    "far",
    "lossmult",
    "pix2cam",
)


def metadata_file(root: Path) -> Path:
    """Where the cameras of all splits are."""
    return root / "metadata.json"


def _pix2cam(focal: float, width: int, height: int) -> list[list[float]]:
    """From homogeneous pixel coordinates to directions in camera space (OpenGL axes)."""
    return [[1 / focal, 0.0, -0.5 * width / focal], [0.0, -1 / focal, 0.5 * height / focal], [0.0, 0.0, -1.0]]


# ---- loading ---------------------------------------------------------------------------------------------------


def read_frames(root: Path, split: str) -> list[Frame]:
    """The frames of a split, checked against each other and against their images, nothing decoded yet.

    Raises:
        InputError: what is wrong, by file and field; also a pix2cam that is not that of a pinhole camera with the
            stated focal length and its principal point in the middle.

    Source: algorithm 1.9 (the layout that the official script writes).
    """
    path = metadata_file(root)
    metadata = read_json(path)
    if split not in metadata:
        raise InputError(f"{path}: no split '{split}'; the splits here are {', '.join(metadata) or 'none'}")
    if not isinstance(metadata[split], dict):
        raise InputError(f"{path}: '{split}' is not an object; expected the columns {', '.join(_COLUMNS)}")
    where = f"{path}: {split}"
    columns = {key: list_field(metadata[split], key, where) for key in _COLUMNS}
    count = len(columns["file_path"])
    for key, column in columns.items():
        if len(column) != count:
            raise InputError(f"{where}.{key} has {len(column)} entries; expected {count}, as file_path has")
    rows = [{key: columns[key][i] for key in _COLUMNS} for i in range(count)]
    return [_frame(root, f"{where}, entry {i}", row) for i, row in enumerate(rows)]


def _frame(root: Path, where: str, row: dict[str, Any]) -> Frame:
    def value(key: str, above: float = -math.inf) -> float:
        return number(field(row, key, where), f"{where}.{key}", above=above)

    width, height = (integer(row[key], f"{where}.{key}", 1) for key in ("width", "height"))
    focal, near = value("focal", above=0), value("near")
    far, lossmult = value("far", above=near), value("lossmult", above=0)
    label = integer(row["label"], f"{where}.label", 0)
    c2w = camera(row["cam2world"], f"{where}.cam2world")
    expected = np.array(_pix2cam(focal, width, height))
    if not np.allclose(matrix(row["pix2cam"], 3, 3, f"{where}.pix2cam"), expected, rtol=1e-4, atol=1e-7):
        raise InputError(
            f"{where}.pix2cam is not that of a pinhole camera with focal {focal:.6g} and {width} x {height} "
            f"pixels, {expected.tolist()}; other cameras are not supported here"
        )
    file_path = string(row["file_path"], f"{where}.file_path")
    image = find_image(root, file_path, f"{where}.file_path")
    found_height, found_width, channels = image_size(image)
    if (found_height, found_width) != (height, width):
        raise InputError(
            f"{where}: width x height is {width} x {height}, but {image} is {found_width} x {found_height}"
        )
    return Frame(
        name=image.stem,
        where=f"{where} ({image.name})",
        c2w=c2w,
        focal=focal,
        height=height,
        width=width,
        channels=channels,
        read=partial(read_image, image),
        near=near,
        far=far,
        lossmult=lossmult,
        label=label,
    )


def load(root: Path, split: str, background: str, downscale: int) -> Dataset:
    """A split of a multi-scale scene, in the order of its metadata; a downscale applies to every image alike."""
    return assemble(read_frames(root, split), split, background, downscale)


# ---- converting ------------------------------------------------------------------------------------------------


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    downscale: int = 1,
    levels: int = 4,
    progress: bool = True,
) -> Path:
    """Write a Blender scene, or the built-in one, in the multi-scale layout or as a smaller ordinary scene.

    Level j of an image is its `downsample2` taken log2(downscale) + j times without rounding between, truncated to
    8 bits; all splits of the source are written. Images without alpha stay so: their three channels are averaged,
    background and all. The result appears under its name when it is complete and not before.

    Args:
        source: a folder with transforms_{split}.json, or "demo".
        out: the folder to make; it may exist if it is empty.
        downscale: a power of two; level 0 is so many times smaller than the source.
        levels: how many levels to write; 1 writes an ordinary Blender scene.
        progress: show a progress bar (plain lines where the output is no terminal).

    Returns:
        The folder written.

    Raises:
        InputError: a bad source or argument, a size that does not halve so often, or an `out` that is not empty.
        OSError: the folder cannot be written.

    Source: algorithm 1.9 (google/mipnerf, scripts/convert_blender_data.py).
    """
    first = level_of(downscale, "downscale")
    if not isinstance(levels, int) or levels < 1:
        raise InputError(f"levels is {levels!r}; expected a whole number of at least 1")
    target = Path(os.path.abspath(out))
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"{target} exists and is {'a file' if target.is_file() else 'not empty'}")
    scene = _source_frames(source)
    factor = downscale * 2 ** (levels - 1)
    for frames in scene.values():
        check_channels(frames)
        check_divisible(
            frames, factor, f"halved {first + levels - 1} times (downscale {downscale}, {levels} levels)"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial_folder = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial_folder.mkdir()
    try:
        write = _multiscale_tasks if levels > 1 else _blender_tasks
        tasks, documents = write(scene, partial_folder, first, levels)
        if progress:
            with Progress("converting", total=len(tasks), unit="images") as bar:
                run_all(tasks, bar)
        else:
            run_all(tasks)
        for name, document in documents.items():
            text = json.dumps(document, ensure_ascii=False, indent=4)
            (partial_folder / name).write_text(text, encoding="utf-8")
        if target.is_dir():
            target.rmdir()
        partial_folder.rename(target)
    except BaseException:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise
    return target


def _source_frames(source: str | os.PathLike[str]) -> dict[str, list[Frame]]:
    if os.fspath(source) == "demo":
        return {split: procedural.demo_frames(split) for split in SPLITS}
    root = Path(source)
    if not root.is_dir():
        raise InputError(f"{root} is no folder; expected a scene folder, or 'demo' for the built-in scene")
    found = blender.splits(root)
    if not found:
        reason = (
            "is a multi-scale scene already"
            if metadata_file(root).is_file()
            else "has no transforms_train.json"
        )
        raise InputError(f"{root} {reason}; expected a Blender scene with transforms_train.json")
    return {split: blender.read_frames(root, split) for split in found}


Tasks = list[Callable[[], None]]


def _write_levels(frame: Frame, first: int, paths: Sequence[Path]) -> None:
    for path, pixels in zip(paths, pyramid(frame.read(), first, len(paths)), strict=True):
        _write_png(path, pixels)


def _write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    Image.fromarray(pixels).save(path)


def _multiscale_tasks(
    scene: dict[str, list[Frame]], folder: Path, first: int, levels: int
) -> tuple[Tasks, dict[str, Any]]:
    """One task for each source image, and the metadata of all splits."""
    tasks: Tasks = []
    metadata: dict[str, Any] = {}
    for split, frames in scene.items():
        (folder / f"images_{split}").mkdir()
        columns: dict[str, list[Any]] = {key: [] for key in _COLUMNS}
        for i, frame in enumerate(frames):
            names = [f"images_{split}/{i:03d}_d{j}.png" for j in range(levels)]
            tasks.append(partial(_write_levels, frame, first, [folder / name for name in names]))
            for j, name in enumerate(names):
                width, height = frame.width >> (first + j), frame.height >> (first + j)
                focal = frame.focal / 2 ** (first + j)
                row = (
                    name,
                    frame.c2w.tolist(),
                    width,
                    height,
                    focal,
                    j,
                    frame.near,
                    frame.far,
                    4.0**j,
                    _pix2cam(focal, width, height),
                )
                for key, value in zip(_COLUMNS, row, strict=True):
                    columns[key].append(value)
        metadata[split] = columns
    return tasks, {"metadata.json": metadata}


def _blender_tasks(
    scene: dict[str, list[Frame]], folder: Path, first: int, levels: int
) -> tuple[Tasks, dict[str, Any]]:
    """One task for each source image, and the transforms of each split."""
    tasks: Tasks = []
    documents: dict[str, Any] = {}
    for split, frames in scene.items():
        (folder / split).mkdir()
        names = unique_names(frames)
        angles = [2 * math.atan(0.5 * frame.width / frame.focal) for frame in frames]
        entries: list[dict[str, Any]] = []
        for frame, name, angle in zip(frames, names, angles, strict=True):
            tasks.append(partial(_write_levels, frame, first, [folder / split / f"{name}.png"]))
            entry: dict[str, Any] = {"file_path": f"./{split}/{name}"}
            if angle != angles[0]:
                entry["camera_angle_x"] = angle
            entries.append(entry | {"transform_matrix": frame.c2w.tolist()})
        documents[f"transforms_{split}.json"] = {"camera_angle_x": angles[0], "frames": entries}
    return tasks, documents
