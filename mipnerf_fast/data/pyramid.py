"""The downscaling of the multi-scale benchmark: 2 x 2 means of straight-alpha images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mipnerf_fast.errors import InputError


def downsample2(rgba: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean of each 2 x 2 block of pixels, every channel by itself (straight alpha, as the benchmark has it).

    The four pixels are added from left to right, then downwards: the order of numpy's own mean over a
    [H/2, 2, W/2, 2, C] view, so the levels are those of the official script to the last bit.

    Args:
        rgba: float32 [H, W, C], H and W even.

    Returns:
        float32 [H/2, W/2, C].

    Raises:
        ValueError: H or W is odd, or the array has no three dimensions.

    Example:
        >>> downsample2(np.float32([[[0], [1]], [[2], [3]]]))[0, 0, 0]
        np.float32(1.5)

    Source: algorithm 1.9 (google/mipnerf, scripts/convert_blender_data.py).
    """
    if rgba.ndim != 3 or rgba.shape[0] % 2 or rgba.shape[1] % 2:
        raise ValueError(f"downsample2: expected [H, W, C] with even H and W, got {list(rgba.shape)}")
    mean = rgba[0::2, 0::2] + rgba[0::2, 1::2]
    mean += rgba[1::2, 0::2]
    mean += rgba[1::2, 1::2]
    mean *= np.float32(0.25)
    return mean


def pyramid(pixels: NDArray[np.uint8], first: int, levels: int) -> Iterator[NDArray[np.uint8]]:
    """Levels first, first + 1, ... of an 8-bit image, each 2^level times smaller than the image.

    Every level is the 2 x 2 mean of the unrounded one before; only what is returned is cut to 8 bits by
    uint8(255 x), which truncates.

    Args:
        pixels: uint8 [H, W, C], H and W divisible by 2^(first + levels - 1).
        first: the first level wanted, 0 for the image itself.
        levels: how many.

    Yields:
        uint8 [H / 2^k, W / 2^k, C] for k = first, ..., first + levels - 1.

    Source: algorithm 1.9.
    """
    image = pixels.astype(np.float32) / np.float32(255)
    for level in range(first + levels):
        if level:
            image = downsample2(image)
        if level >= first:
            yield (image * np.float32(255)).astype(np.uint8)


def level_of(factor: int, argument: str) -> int:
    """log2 of a downscale factor; InputError unless it is a power of two."""
    if not isinstance(factor, int) or isinstance(factor, bool) or factor < 1 or factor & (factor - 1):
        raise InputError(f"{argument} is {factor!r}; expected a power of two: 1, 2, 4, 8, ...")
    return factor.bit_length() - 1
