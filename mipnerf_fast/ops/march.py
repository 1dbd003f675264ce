"""The operator `march`: cones through an occupancy grid to packed samples."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..reference import PackedSamples
from .arguments import check_float, check_like, check_shape, require
from .finite import reports_non_finite
from .implementations import takes_kernel


@reports_non_finite("march", rows="samples")
def march(
    origins: Tensor,
    directions: Tensor,
    radii: Tensor,
    near: Tensor,
    far: Tensor,
    phase: Tensor,
    masks: Tensor,
    occupancy_resolution: int,
    box_half: float = 1.5,
    step_scale: float = 1.0,
    min_step: float = 0.004,
    max_step: float = 0.03,
) -> PackedSamples:
    """The intervals of each ray whose middle lies in an occupied cell, with steps that grow with the cone.

    t_0 = enter + u dt(enter), t_{k+1} = t_k + dt(t_k), dt(t) = clamp(step_scale t p, min_step, max_step), where p is
    the width of a pixel at t = 1; the mask is chosen by the cone's width.

    Args:
        origins, directions: [B, 3], float32 or float64; radii, near, far: [B, 1], as in `Rays`.
        phase: [B, 1] in [0, 1), the u of each ray.
        masks: int32 words, see `reference.pack_masks`; occupancy_resolution: cells per side of their grid.
        box_half, step_scale, min_step, max_step: see `FastConfig`.

    Returns:
        PackedSamples, as many as there are: the shapes depend on the values. No gradient.

    Errors: ValueError naming the argument, what was wanted and what was given; RuntimeError where the backend
    "native" is forced and the kernel cannot run.

    Source: Mueller et al. 2022, appendix E; Barron et al. 2021, equation 7.
    """
    name = "march"
    if origins.dim() != 2 or origins.shape[1] != 3:
        require(False, name, "origins", "of shape [B, 3]", list(origins.shape))
    check_float(name, "origins", origins)
    rays = origins.shape[0]
    for argument, tensor, width in (
        ("directions", directions, 3),
        ("radii", radii, 1),
        ("near", near, 1),
        ("far", far, 1),
        ("phase", phase, 1),
    ):
        check_shape(name, argument, tensor, (rays, width), f"[B, {width}]")
        check_like(name, argument, tensor, "origins", origins)
    numbers = (box_half, step_scale, min_step, max_step)
    with torch.no_grad():
        inputs = (origins, directions, radii, near, far, phase)
        if not takes_kernel(name, origins):
            return reference.march(*inputs, reference.unpack_masks(masks, occupancy_resolution), *numbers)
        return PackedSamples(*torch.ops.mipnerf_fast.march(*inputs, masks, occupancy_resolution, *numbers))
