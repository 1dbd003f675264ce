"""Random batches of rays, computed from (image, pixel) on the training device: no array of all rays exists.

On the CPU and on CUDA one kernel makes a batch (csrc/ray_batch); `choose` and `gather` are the same in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mipnerf_fast.cameras import Rays, pixel_rays
from mipnerf_fast.counter_rng import IMAGES, PIXELS, as_int64, counter_index
from mipnerf_fast.data.dataset import Dataset, composite_pixels
from mipnerf_fast.ops.implementations import takes_kernel
from mipnerf_fast.ops.ray_batch import PosedImages, ray_batch

MODES = ("all_images", "single_image")


class RayBatches:
    """Draws pixels with replacement, with their rays and colours; nothing but (seed, step) decides which.

    Args:
        dataset: the images; its 8-bit pixels and cameras are copied to the device once.
        device: where batches are made.
        mode: "all_images" draws from all pixels of all images; "single_image" draws one image a step and then
            pixels of that image.

    Source: algorithm 1.1 (batching).
    """

    def __init__(
        self, dataset: Dataset, device: torch.device | str = "cpu", mode: str = "all_images"
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"RayBatches: mode is {mode!r}; expected one of {', '.join(MODES)}")
        self.mode, self.white_background, self.names = mode, dataset.white_background, dataset.names
        self.device = torch.device(device)
        self.pixels = dataset.pixels.to(device)
        self.c2w, self.focal = dataset.c2w.to(device), dataset.focal.to(device, dataset.c2w.dtype)
        self.height, self.width = dataset.height.to(device), dataset.width.to(device)
        self.near, self.far = dataset.near.to(device), dataset.far.to(device)
        self.lossmult, self.offsets = dataset.lossmult.to(device), dataset.offsets.to(device)
        self.count, self.total = len(dataset), dataset.pixels.shape[0]
        sizes = dataset.height * dataset.width
        self.common_size = int(sizes[0]) if bool((sizes == sizes[0]).all()) else 0
        self._images = PosedImages(
            self.pixels,
            self.offsets,
            self.height,
            self.width,
            self.c2w,
            self.focal,
            self.near,
            self.far,
            self.lossmult,
            self.common_size,
        )

    def draw(self, seed: int, step: int | Tensor, num_rays: int) -> tuple[Rays, Tensor]:
        """The batch of a step.

        Args:
            seed: of the run.
            step: of the optimiser; an int or a 0-d int64 tensor on the device.
            num_rays: B.

        Returns:
            Rays [B, .] and colours over the background, float32 [B, 3].
        """
        if not takes_kernel("ray_batch", self.c2w):
            return self.gather(*self.choose(seed, step, num_rays))
        number = torch.as_tensor(step, dtype=torch.int64, device=self.device)
        is_single = self.mode == "single_image"
        fields, target = ray_batch(
            self._images, as_int64(seed), number, num_rays, is_single, self.white_background
        )
        return Rays(*fields), target

    def choose(self, seed: int, step: int | Tensor, num_rays: int) -> tuple[Tensor, Tensor]:
        """The images and the row-major pixels within them of the batch of a step, int64 [B] each; as `draw`."""
        rows = torch.arange(num_rays, device=self.device)
        if self.mode == "single_image":
            image = counter_index(seed, step, IMAGES, torch.zeros_like(rows[:1]), self.count)
            image = image.expand(num_rays)
            pixel = self._pixel_within(seed, step, rows, image)
        else:
            index = counter_index(seed, step, PIXELS, rows, self.total)
            if self.common_size:
                image = torch.div(index, self.common_size, rounding_mode="floor")
            else:
                image = torch.searchsorted(self.offsets, index, right=True) - 1
            pixel = index - self.offsets[image]
        return image, pixel

    def _pixel_within(self, seed: int, step: int | Tensor, rows: Tensor, image: Tensor) -> Tensor:
        """A pixel of each row's image; a device-side size needs no transfer to the host."""
        if self.common_size:
            return counter_index(seed, step, PIXELS, rows, self.common_size)
        # 40 random bits modulo the image's size: biased by less than size / 2^40
        bits = counter_index(seed, step, PIXELS, rows, 2**40 - 1)
        return bits % (self.height * self.width)[image]

    def describe(self, seed: int, step: int, num_rays: int, ray: int) -> str:
        """Which pixel a ray of a step's batch goes through, in words."""
        image, pixel = (int(chosen[ray]) for chosen in self.choose(seed, step, num_rays))
        y, x = divmod(pixel, int(self.width[image]))
        return f"pixel ({x}, {y}) of image {self.names[image]}"

    def gather(self, image: Tensor, pixel: Tensor) -> tuple[Rays, Tensor]:
        """Rays and colours of given pixels.

        Args:
            image: int64 [B], image indices.
            pixel: int64 [B], row-major pixel indices within those images.

        Returns:
            Rays [B, .] and colours over the background, [B, 3], in the cameras' dtype (float32).
        """
        width = self.width[image]
        y = torch.div(pixel, width, rounding_mode="floor")
        rays = pixel_rays(
            self.c2w[image],
            self.height[image],
            width,
            self.focal[image],
            pixel - y * width,
            y,
            self.near[image],
            self.far[image],
            self.lossmult[image],
        )
        colours = self.pixels[self.offsets[image] + pixel]
        return rays, composite_pixels(colours, self.white_background, self.c2w.dtype)
