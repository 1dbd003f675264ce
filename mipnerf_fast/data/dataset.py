"""A set of posed images: 8-bit pixels in one buffer, a small camera for each image."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mipnerf_fast.cameras import Rays, pinhole_rays

BACKGROUNDS = ("white", "black")


def composite_pixels(pixels: Tensor, white_background: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Colours in [0, 1] over the background: rgb a + (1 - a) bg, or rgb where there is no alpha.

    Args:
        pixels: uint8 [..., 3 or 4], straight (not premultiplied) alpha.
        white_background: bg = 1, else 0.
        dtype: of the result.

    Returns:
        [..., 3] on pixels' device.

    Source: algorithm 1.1.
    """
    colours = pixels.to(dtype) / 255.0
    if pixels.shape[-1] == 3:
        return colours
    rgb, alpha = colours[..., :3], colours[..., 3:]
    return rgb * alpha + (1.0 - alpha) if white_background else rgb * alpha


@dataclass
class Dataset:
    """Images with their cameras.

    pixels: uint8 [P, C], all images row by row, one after the other; C = 4 (straight alpha) or 3.
    height, width: int64 [n], pixels.
    c2w: float32 [n, 3, 4], camera to world, OpenGL axes (x right, y up, looking along -z).
    focal: float64 [n], pixels.
    near, far, lossmult: float32 [n]; lossmult is 4^level in multi-scale data, else 1.
    scale: int64 [n], how many times smaller than the scene's full resolution: 2^label in multi-scale data, the
        downscale factor otherwise.
    names: one per image, unique.
    split: "train", "val" or "test".
    background: "white" or "black", behind transparent pixels.
    images: list of uint8 [H, W, C], views of `pixels`.
    offsets: int64 [n + 1], image i holds the rows offsets[i] to offsets[i + 1] of `pixels`.
    """

    pixels: Tensor
    height: Tensor
    width: Tensor
    c2w: Tensor
    focal: Tensor
    near: Tensor
    far: Tensor
    lossmult: Tensor
    scale: Tensor
    names: list[str]
    split: str
    background: str
    images: list[Tensor] = field(init=False)
    offsets: Tensor = field(init=False)

    def __post_init__(self) -> None:
        sizes = self.height * self.width
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        if self.pixels.shape[0] != int(self.offsets[-1]):
            raise ValueError(
                f"Dataset: pixels has {self.pixels.shape[0]} rows, the images have {int(self.offsets[-1])} pixels"
            )
        parts = self.pixels.split(sizes.tolist())
        shapes = zip(self.height.tolist(), self.width.tolist(), strict=True)
        self.images = [part.view(h, w, -1) for part, (h, w) in zip(parts, shapes, strict=True)]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def white_background(self) -> bool:
        """Whether what is transparent is white."""
        return self.background == "white"

    def rays(self, i: int, device: torch.device | str = "cpu") -> Rays:
        """The rays of all pixels of image i: [H, W, .], float32."""
        rays = pinhole_rays(
            self.c2w[i].to(device),
            int(self.height[i]),
            int(self.width[i]),
            float(self.focal[i]),
            float(self.near[i]),
            float(self.far[i]),
        )
        return rays._replace(lossmult=torch.full_like(rays.lossmult, float(self.lossmult[i])))

    def target(self, i: int, device: torch.device | str = "cpu") -> Tensor:
        """The colours of image i over the background: float32 [H, W, 3] in [0, 1]."""
        return composite_pixels(self.images[i].to(device), self.white_background)
