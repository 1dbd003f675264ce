"""Marching cones through an occupancy grid: from rays to samples that lie one after the other."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .frustum import frustum_gaussians

_PYRAMID_LEVELS = 5


class PackedSamples(NamedTuple):
    """The samples of a batch of rays, ray by ray, from the front.

    ray_starts: int64 [B + 1], ray b has the samples ray_starts[b] to ray_starts[b + 1]. rays: int64 [S], the ray of
    each. t0, t1: [S], its interval. means: [S, 3], of its Gaussian, in units of the box, the box being [0, 1]^3.
    scales: [S], the Gaussian's standard deviation across the ray, in units of the box's side.
    """

    ray_starts: Tensor
    rays: Tensor
    t0: Tensor
    t1: Tensor
    means: Tensor
    scales: Tensor


def box_interval(
    origins: Tensor, directions: Tensor, near: Tensor, far: Tensor, box_half: float
) -> tuple[Tensor, Tensor]:
    """The range of t within near and far in which a ray is inside the cube [-box_half, box_half]^3: [B] each."""
    side = 2 * box_half
    o, d = (origins + box_half) / side, directions / side
    is_parallel = d == 0
    safe = torch.where(is_parallel, torch.ones_like(d), d)
    a, b = -o / safe, (1 - o) / safe
    first = torch.where(is_parallel, -math.inf, torch.minimum(a, b)).amax(-1)
    last = torch.where(is_parallel, math.inf, torch.maximum(a, b)).amin(-1)
    enter, leave = torch.maximum(near[:, 0], first), torch.minimum(far[:, 0], last)
    misses = (is_parallel & ((o < 0) | (o > 1))).any(-1)
    return enter, torch.where(misses, enter, leave)


def mask_for_width(width: Tensor, resolution: int) -> Tensor:
    """Which mask of `occupancy_masks` a cone looks into: the first whose cells are at least half as large.

    0 where the width (of a pixel, in units of the box's side) is below 3/4 of a cell; else 1 + the level.
    """
    cell = 1.0 / resolution
    level = torch.zeros_like(width, dtype=torch.int64)
    for k in range(_PYRAMID_LEVELS - 1):
        level = torch.where((cell * 2**k < 0.5 * width) & (level == k), k + 1, level)
    return torch.where(width < 0.75 * cell, 0, 1 + level)


def march(
    origins: Tensor,
    directions: Tensor,
    radii: Tensor,
    near: Tensor,
    far: Tensor,
    phase: Tensor,
    masks: list[tuple[Tensor, Tensor]],
    box_half: float = 1.5,
    step_scale: float = 1.0,
    min_step: float = 0.004,
    max_step: float = 0.03,
) -> PackedSamples:
    """The intervals of each ray whose middle lies in an occupied cell, with steps that grow with the cone.

    t_0 = enter + u dt(enter), t_{k+1} = t_k + dt(t_k), dt(t) = clamp(step_scale t p, min_step, max_step), where p is
    the width of a pixel at t = 1 (radius sqrt(3)).

    Args:
        origins, directions: [B, 3]; radii, near, far: [B, 1], as in `Rays`.
        phase: [B, 1] in [0, 1), the u of each ray.
        masks: of the occupancy grid, see `occupancy_masks`.
        box_half, step_scale, min_step, max_step: see `FastConfig`.

    Returns:
        The samples; no gradient.

    Source: Mueller et al. 2022, appendix E (marching); Barron et al. 2021, equation 7 (the Gaussians).
    """
    side = 2 * box_half
    enter, leave = box_interval(origins, directions, near, far, box_half)
    pixel = radii[:, 0] * math.sqrt(3.0)
    o, d = (origins + box_half) / side, directions / side
    which = mask_for_width(0.5 * (enter + leave) * pixel / side, masks[0][0].shape[0])

    def step(t: Tensor) -> Tensor:
        return torch.clamp(step_scale * pixel * t, min_step, max_step)

    t = enter + phase[:, 0] * step(enter)
    starts, ends, found = [], [], []
    while bool((t < leave).any()):
        t1 = t + step(t)
        x = o + (0.5 * (t + t1))[:, None] * d
        hit = (t < leave) & ((x >= 0) & (x < 1)).all(-1)
        for m, (mask, _) in enumerate(masks):
            cells = torch.clamp((x * mask.shape[0]).to(torch.int64), 0, mask.shape[0] - 1)
            i, j, k = cells.unbind(-1)
            hit = hit & ((which != m) | mask[k, j, i])
        starts.append(t)
        ends.append(t1)
        found.append(hit)
        t = t1
    if not starts:
        starts, ends, found = [t], [t], [torch.zeros_like(t, dtype=torch.bool)]
    hit = torch.stack(found, -1)
    rays = hit.nonzero()[:, 0]
    t0, t1 = torch.stack(starts, -1)[hit], torch.stack(ends, -1)[hit]
    counts = hit.sum(-1)
    ray_starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    means, scales = sample_gaussians(origins, directions, radii, rays, t0, t1, box_half)
    return PackedSamples(ray_starts, rays, t0, t1, means, scales)


def sample_gaussians(
    origins: Tensor,
    directions: Tensor,
    radii: Tensor,
    rays: Tensor,
    t0: Tensor,
    t1: Tensor,
    box_half: float,
) -> tuple[Tensor, Tensor]:
    """Mean [S, 3] and deviation across the ray [S] of each sample's frustum, in units of the box.

    The deviation is the square root of var_r (mip-NeRF, equation 7).
    """
    side = 2 * box_half
    # With a direction along x the variance along y is that across the ray.
    along = torch.zeros_like(directions[rays])
    along[:, 0] = 1
    fenceposts = torch.stack([t0, t1], -1)
    zero = torch.zeros_like(along)
    unit_means, variances = frustum_gaussians(fenceposts, zero, along, radii[rays])
    means = (origins[rays] + unit_means[:, 0, :1] * directions[rays] + box_half) / side
    return torch.clamp(means, 0, 1), torch.sqrt(variances[:, 0, 1]) / side
