"""Scenes: posed images from a folder or from the built-in world, and random batches of their rays."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError
from . import blender, multiscale, procedural
from .dataset import BACKGROUNDS, Dataset
from .pyramid import level_of
from .ray_batches import RayBatches
from .scene_files import SPLITS

__all__ = ["Dataset", "RayBatches", "load_dataset", "multiscale"]


def load_dataset(
    path: str | os.PathLike[str], split: str = "train", background: str = "white", downscale: int = 1
) -> Dataset:
    """Load a split of a scene, whatever its layout.

    Args:
        path: a folder with metadata.json (multi-scale Blender) or transforms_{split}.json (Blender), or "demo" for
            the built-in scene.
        split: "train", "val" or "test".
        background: "white" or "black", behind transparent pixels; images without alpha stay as they are.
        downscale: a power of two; images that many times smaller, with the arithmetic of `convert`.

    Returns:
        The images in one 8-bit buffer, with their cameras.

    Raises:
        InputError: what is wrong with the scene or the arguments, by file and field.

    Example:
        >>> dataset = load_dataset("demo", split="val", downscale=8)
        >>> tuple(dataset.target(0).shape)
        (25, 25, 3)
    """
    if split not in SPLITS:
        raise InputError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    if background not in BACKGROUNDS:
        raise InputError(f"background is {background!r}; expected one of {', '.join(BACKGROUNDS)}")
    level_of(downscale, "downscale")
    if os.fspath(path) == "demo":
        return procedural.load(split, background, downscale)
    root = Path(path)
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise InputError(f"{root} {found}; expected a scene folder, or 'demo' for the built-in scene")
    if multiscale.metadata_file(root).is_file():
        return multiscale.load(root, split, background, downscale)
    if blender.splits(root):
        return blender.load(root, split, background, downscale)
    raise InputError(
        f"{root} is no scene: it has neither metadata.json (multi-scale) nor transforms_train.json (Blender)"
    )
