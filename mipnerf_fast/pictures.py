"""From tensors to 8-bit pictures and files: rounding, colour maps, PNG and mp4, each file whole or absent."""

from __future__ import annotations

import functools
import os
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .durable_files import write_durably

Picture = NDArray[np.uint8]


def to_uint8(colours: Tensor) -> Picture:
    """Colours in [0, 1] to 8 bits: clipped, then rounded to the nearest value.

    The official code truncates instead, which darkens every picture by half a level on average. No metric goes
    through here: those are computed on the unclipped floats.
    """
    return (colours.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


@functools.lru_cache(maxsize=8)
def _colour_table(name: str) -> Tensor:
    import matplotlib

    return torch.from_numpy(matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3].astype(np.float32))


def colour_map(values: Tensor, name: str = "turbo") -> Tensor:
    """Values in [0, 1] (clipped) to the colours of one of matplotlib's maps: [...] to [..., 3], on the CPU."""
    table = _colour_table(name)
    return table[(values.detach().float().cpu().nan_to_num(0.0).clamp(0, 1) * 255).round().long()]


def write_png(path: Path, picture: Picture) -> None:
    """Write a picture, [H, W, 3] or [H, W], as PNG, whole or not at all; the folder is made if need be."""
    import imageio.v3 as imageio

    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, imageio.imwrite("<bytes>", picture, extension=".png"))


class VideoUnavailableError(RuntimeError):
    """There is no ffmpeg to write a video with."""


class Video:
    """An mp4 (H.264) that grows by one picture at a time and appears under its name when closed.

    Args:
        path: ends in .mp4.
        frames_per_second: of the video.

    Errors: VideoUnavailableError, from the first picture on, without imageio-ffmpeg or its ffmpeg.
    """

    def __init__(self, path: Path, frames_per_second: float) -> None:
        self._path, self._rate = path, frames_per_second
        self._partial = path.with_name(f".{path.stem}.{os.getpid()}.partial.mp4")
        self._writer: Generator[None, Picture, None] | None = None

    def add(self, picture: Picture) -> None:
        """Append a picture [H, W, 3]; all must have the size of the first."""
        # H.264 with halved colour resolution takes even sizes only: repeat the last row or column.
        odd = picture.shape[0] % 2, picture.shape[1] % 2
        picture = np.ascontiguousarray(np.pad(picture, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge"))
        if self._writer is None:
            self._writer = self._start(picture.shape[1], picture.shape[0])
        self._writer.send(picture)

    def _start(self, width: int, height: int) -> Generator[None, Picture, None]:
        try:
            import imageio_ffmpeg

            imageio_ffmpeg.get_ffmpeg_exe()
        except (ImportError, RuntimeError) as error:
            raise VideoUnavailableError(f"no mp4 without imageio-ffmpeg and its ffmpeg ({error})") from None
        writer: Generator[None, Picture, None] = imageio_ffmpeg.write_frames(
            str(self._partial),
            (width, height),
            fps=self._rate,
            codec="libx264",
            quality=8,
            macro_block_size=2,
            ffmpeg_log_level="error",
        )
        writer.send(None)  # type: ignore[arg-type]
        return writer

    def close(self, keep: bool = True) -> None:
        """Finish the file, or drop it."""
        if self._writer is not None:
            self._writer.close()
        if keep and self._partial.exists():
            os.replace(self._partial, self._path)
        self._partial.unlink(missing_ok=True)
