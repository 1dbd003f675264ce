"""A training batch in one kernel: pixels drawn, their rays, colours and area weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native


class PosedImages(NamedTuple):
    """Images and their cameras as `ray_batch` takes them: n images of P pixels in all, on one device.

    pixels: uint8 [P, 3 or 4]. offsets: int64 [n + 1]. heights, widths: int64 [n]. c2w: float32 [n, 3, 4]. focals,
    nears, fars, lossmults: float32 [n]. common_size: the pixels of each image, or 0 where they differ. See `Dataset`.
    """

    pixels: Tensor
    offsets: Tensor
    heights: Tensor
    widths: Tensor
    c2w: Tensor
    focals: Tensor
    nears: Tensor
    fars: Tensor
    lossmults: Tensor
    common_size: int


def ray_batch(
    images: PosedImages, seed: int, step: Tensor, count: int, single_image: bool, white_background: bool
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The batch of a step by the native kernel; `RayBatches` calls it, and is the same in torch.

    Args:
        images: what is drawn from.
        seed: of the run, in [-2^63, 2^63).
        step: int64 [], on the images' device; it is not read on the host.
        count: B, how many rays.
        single_image: pixels of one image, else of all.
        white_background: what is behind transparent pixels, else black.

    Returns:
        The fields of `Rays`, [B, 3] and [B, 1], and colours [B, 3]; all float32 and without a gradient.

    Errors: RuntimeError naming the argument, for a wrong shape, dtype or device.

    Source: algorithm 1.1. Kernels: csrc/ray_batch.
    """
    *tensors, common_size = images
    *fields, target = torch.ops.mipnerf_fast.ray_batch.default(
        *tensors, seed, step, count, single_image, common_size, white_background
    )
    return tuple(fields), target


def _register() -> None:
    """What the raw operator needs beside its kernels: shapes for the compiler, and a refusal to differentiate."""

    def fake(*inputs: Any) -> tuple[Tensor, ...]:
        c2w, count = inputs[4], inputs[11]
        return tuple(c2w.new_empty(count, columns) for columns in (3, 3, 3, 1, 1, 1, 1, 3))

    def no_derivative(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(
            'ray_batch: the native kernel has no derivative; use_backend("reference") differentiates cameras'
        )

    torch.library.register_fake("mipnerf_fast::ray_batch", fake)
    torch.library.register_autograd("mipnerf_fast::ray_batch", no_derivative)


if _native.available():
    _register()
