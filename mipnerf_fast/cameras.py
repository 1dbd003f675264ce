"""Pinhole cameras and the rays through their pixels, with the cone radii of mip-NeRF."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# A pixel of unit width has the variance 1/12 of a box; a disc of radius r has r^2/4 along each axis. The cone
# therefore has the radius 2/sqrt(12) pixel widths, which makes the two variances equal (paper, section 3.1).
_RADIUS_PER_PIXEL = 2.0 / math.sqrt(12.0)


class Rays(NamedTuple):
    """A batch of cones: one per pixel.

    origins [..., 3]: world position of the camera centre.
    directions [..., 3]: un-normalised; t = 1 is the image plane at unit depth.
    viewdirs [..., 3]: directions / ||directions||.
    radii [..., 1]: world radius of the cone at t = 1 (pixel width x 2/sqrt(12)).
    near, far [..., 1]: the range of t.
    lossmult [..., 1]: weight in the loss (4^level for multi-scale data, else 1).
    """

    origins: Tensor
    directions: Tensor
    viewdirs: Tensor
    radii: Tensor
    near: Tensor
    far: Tensor
    lossmult: Tensor

    @property
    def batch_shape(self) -> torch.Size:
        """The leading dimensions, without the channels."""
        return self.origins.shape[:-1]

    def map(self, function: Callable[[Tensor], Tensor]) -> Rays:
        """Apply a function to every field."""
        return Rays(*(function(field) for field in self))

    def flatten(self) -> Rays:
        """All leading dimensions as one: fields of shape [B, 3] and [B, 1]."""
        return self.map(lambda field: field.reshape(-1, field.shape[-1]))


def _rays(
    c2w: Tensor, camera_directions: Tensor, focal: Tensor, near: Tensor, far: Tensor, mult: Tensor
) -> Rays:
    """Rays from camera-space directions [..., 3]; every other argument broadcasts against their leading shape."""
    rotation, origin = c2w[..., :3, :3], c2w[..., :3, 3]
    directions = (rotation * camera_directions[..., None, :]).sum(-1)
    viewdirs = directions / torch.linalg.vector_norm(directions, dim=-1, keepdim=True)
    # The official code measures the distance between the directions of vertically neighbouring pixels, which for
    # a pinhole is ||second column of the rotation|| / focal in every pixel, the last row included.
    radii = torch.linalg.vector_norm(rotation[..., :, 1], dim=-1) / focal * _RADIUS_PER_PIXEL

    def fill(value: Tensor) -> Tensor:
        return value[..., None].expand(*directions.shape[:-1], 1)

    return Rays(
        origin.expand_as(directions), directions, viewdirs, fill(radii), fill(near), fill(far), fill(mult)
    )


def pinhole_rays(
    c2w: Tensor, height: int, width: int, focal: float | Tensor, near: float = 2.0, far: float = 6.0
) -> Rays:
    """The rays through all pixel centres of a pinhole camera in OpenGL axes (x right, y up, looking along -z).

    direction = R [(x + 1/2 - W/2) / f, -(y + 1/2 - H/2) / f, -1], not normalised; origin = the last column of c2w;
    radius = ||R e_y|| / f * 2 / sqrt(12), the distance between neighbouring rows of directions in closed form.

    Args:
        c2w: [..., 3 or 4, 4] camera-to-world matrices.
        height, width: image size in pixels.
        focal: focal length in pixels, one number or a tensor of c2w's leading shape.
        near, far: range of t, in multiples of the un-normalised direction.

    Returns:
        Rays of shape [..., H, W, .] in c2w's dtype and device; differentiable in c2w and focal.

    Source: algorithm 1.1; Barron et al. 2021, section 3.1.
    """
    if c2w.shape[-2:] not in ((3, 4), (4, 4)):
        raise ValueError(f"pinhole_rays: c2w must be [..., 3, 4] or [..., 4, 4], got {list(c2w.shape)}")
    if height < 1 or width < 1:
        raise ValueError(f"pinhole_rays: height and width must be at least 1, got {height} x {width}")
    dtype, device = c2w.dtype, c2w.device
    focal_ = torch.as_tensor(focal, dtype=dtype, device=device)[..., None, None]
    x = torch.arange(width, dtype=dtype, device=device) + 0.5 - width / 2
    y = torch.arange(height, dtype=dtype, device=device)[:, None] + 0.5 - height / 2
    shape = torch.broadcast_shapes(focal_.shape, (height, width))
    one = torch.ones((), dtype=dtype, device=device)
    camera = torch.stack([(x / focal_).expand(shape), (-y / focal_).expand(shape), -one.expand(shape)], -1)
    return _rays(c2w[..., None, None, :, :], camera, focal_, near * one, far * one, one)


def pixel_rays(
    c2w: Tensor,
    height: Tensor,
    width: Tensor,
    focal: Tensor,
    x: Tensor,
    y: Tensor,
    near: Tensor,
    far: Tensor,
    lossmult: Tensor,
) -> Rays:
    """The ray through one pixel of one camera per row: `pinhole_rays` for a random batch.

    Args:
        c2w: [B, 3, 4] camera-to-world matrices.
        height, width: [B] image sizes in pixels.
        focal: [B] focal lengths in pixels.
        x, y: [B] integer pixel indices (column, row).
        near, far, lossmult: [B].

    Returns:
        Rays of shape [B, .], equal to the rays of `pinhole_rays` at those pixels.

    Source: algorithm 1.1.
    """
    camera = torch.stack(
        [(x + 0.5 - width / 2) / focal, -((y + 0.5 - height / 2) / focal), -torch.ones_like(focal)], -1
    )
    return _rays(c2w, camera.to(c2w.dtype), focal, near, far, lossmult)


def ndc_rays(
    origins: Tensor, directions: Tensor, focal: float, width: int, height: int, near: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Rays of a forward-facing camera in normalised device coordinates.

    The origin is first moved to the plane z = -near; then, with (ox, oy, oz) and (dx, dy, dz),
    o' = (-2f/W ox/oz, -2f/H oy/oz, 1 + 2 near/oz) and
    d' = (-2f/W (dx/dz - ox/oz), -2f/H (dy/dz - oy/oz), -2 near/oz): t in [0, 1] covers depth near to infinity.

    Args:
        origins, directions: [..., 3] in camera-aligned world units.
        focal, width, height: in pixels.
        near: distance of the near plane.

    Returns:
        NDC origins and directions, [..., 3] each; differentiable in both inputs.

    Source: algorithm 1.10; Mildenhall et al. 2020, appendix C.
    """
    t = -(near + origins[..., 2]) / directions[..., 2]
    origins = origins + t[..., None] * directions
    ox, oy, oz = origins.unbind(-1)
    dx, dy, dz = directions.unbind(-1)
    sx, sy = -2.0 * focal / width, -2.0 * focal / height
    ndc_origins = torch.stack([sx * ox / oz, sy * oy / oz, 1.0 + 2.0 * near / oz], -1)
    ndc_directions = torch.stack([sx * (dx / dz - ox / oz), sy * (dy / dz - oy / oz), -2.0 * near / oz], -1)
    return ndc_origins, ndc_directions
