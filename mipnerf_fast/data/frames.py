"""Frames: cameras with images still to be read, and how a list of them becomes a data set."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mipnerf_fast.data.dataset import Dataset
from mipnerf_fast.data.pyramid import level_of, pyramid
from mipnerf_fast.errors import InputError


@dataclass(frozen=True)
class Frame:
    """One posed image before its pixels are read.

    name: the image's, without suffix; where: what errors call it.
    c2w: float64 [4, 4]; focal in pixels; height, width in pixels; channels 3 or 4.
    read: returns its pixels, uint8 [height, width, channels].
    label: log2 of how many times smaller it is than the scene's full resolution.
    """

    name: str
    where: str
    c2w: NDArray[np.float64]
    focal: float
    height: int
    width: int
    channels: int
    read: Callable[[], NDArray[np.uint8]]
    near: float = 2.0
    far: float = 6.0
    lossmult: float = 1.0
    label: int = 0


def worker_count() -> int:
    """Threads for reading, converting and rendering images."""
    return max(1, min(8, os.cpu_count() or 1))


def run_all(tasks: Sequence[Callable[[], None]], done: Callable[[], None] | None = None) -> None:
    """Run tasks in threads; `done` is called here after each; an error or Ctrl-C drops those not yet begun."""
    pool = ThreadPoolExecutor(worker_count())
    try:
        for future in as_completed([pool.submit(task) for task in tasks]):
            future.result()
            if done is not None:
                done()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def unique_names(frames: Sequence[Frame]) -> list[str]:
    """The frames' names; with their numbers in front where two share one (images of several folders)."""
    names = [frame.name for frame in frames]
    return names if len(set(names)) == len(names) else [f"{i:03d}_{name}" for i, name in enumerate(names)]


def check_divisible(frames: Sequence[Frame], factor: int, why: str) -> None:
    """InputError unless every frame's size is a multiple of the factor."""
    for frame in frames:
        if frame.height % factor or frame.width % factor:
            raise InputError(
                f"{frame.where}: {frame.width} x {frame.height} pixels cannot be {why}; "
                f"expected a width and a height divisible by {factor}"
            )


def check_channels(frames: Sequence[Frame]) -> int:
    """The number of channels that all frames share, or InputError."""
    first = frames[0]
    for frame in frames:
        if frame.channels != first.channels:
            raise InputError(
                f"{frame.where}: the image has {frame.channels} channels, but that of {first.where} has "
                f"{first.channels}; expected RGB or RGBA throughout a split"
            )
    return first.channels


def assemble(
    frames: Sequence[Frame],
    split: str,
    background: str,
    downscale: int = 1,
    done: Callable[[], None] | None = None,
) -> Dataset:
    """Read all frames, in threads, straight into the one pixel buffer of a data set.

    Args:
        frames: at least one.
        split, background: as in `Dataset`.
        downscale: a power of two; images are made so many times smaller by `pyramid`, focal lengths divided by it.
        done: called after each image.

    Returns:
        The data set; its `scale` is 2^label for frames that have one, else the downscale factor.

    Raises:
        InputError: sizes that the downscale does not divide, differing channels, a damaged image.
    """
    level = level_of(downscale, "downscale")
    channels = check_channels(frames)
    check_divisible(frames, downscale, f"made {downscale} times smaller")
    height = torch.tensor([frame.height // downscale for frame in frames])
    width = torch.tensor([frame.width // downscale for frame in frames])
    multiscale = any(frame.label for frame in frames)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32)

    dataset = Dataset(
        pixels=torch.empty(int((height * width).sum()), channels, dtype=torch.uint8),
        height=height,
        width=width,
        c2w=torch.from_numpy(np.stack([frame.c2w[:3] for frame in frames]).astype(np.float32)),
        focal=torch.tensor([frame.focal / downscale for frame in frames], dtype=torch.float64),
        near=column([frame.near for frame in frames]),
        far=column([frame.far for frame in frames]),
        lossmult=column([frame.lossmult for frame in frames]),
        scale=torch.tensor([2**frame.label if multiscale else downscale for frame in frames]),
        names=unique_names(frames),
        split=split,
        background=background,
    )

    def reader(frame: Frame, target: torch.Tensor) -> Callable[[], None]:
        def read() -> None:
            pixels = frame.read()
            target.numpy()[...] = next(pyramid(pixels, level, 1)) if level else pixels

        return read

    run_all([reader(frame, image) for frame, image in zip(frames, dataset.images, strict=True)], done)
    return dataset
