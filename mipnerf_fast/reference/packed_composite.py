"""Compositing samples that lie one after the other, a varying number per ray."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MIN_TRANSMITTANCE = 1e-3


class PackedComposite(NamedTuple):
    """rgb [B, 3]; distance [B], expected t, the near end where acc is 0; acc [B], opacity; weights [S]."""

    rgb: Tensor
    distance: Tensor
    acc: Tensor
    weights: Tensor


def packed_composite(
    rgb: Tensor,
    density: Tensor,
    lengths: Tensor,
    middles: Tensor,
    ray_starts: Tensor,
    background: Tensor,
    near: Tensor,
    min_transmittance: float = MIN_TRANSMITTANCE,
) -> PackedComposite:
    """Composite packed samples over a background colour.

    depth_i = density_i length_i, T_0 = 1, T_{i+1} = T_i exp(-depth_i), w_i = T_i (1 - exp(-depth_i)); a sample counts
    where T_i >= min_transmittance, and the light behind the last that counts is the background's:
    rgb = sum w_i c_i + T_end background, acc = 1 - T_end, distance = sum w_i m_i / acc.

    Args:
        rgb: [S, 3].
        density, lengths, middles: [S], per world unit, world units, t.
        ray_starts: int64 [B + 1], see `PackedSamples`.
        background: [B, 3].
        near: [B, 1].
        min_transmittance: where a ray ends early; which samples count has no gradient.

    Returns:
        PackedComposite; differentiable in rgb, density, lengths and background.

    Source: Barron et al. 2021, equations 3 and 5; early termination: Mueller et al. 2022.
    """
    depth = density * lengths
    counts = ray_starts.diff()
    rays = torch.repeat_interleave(torch.arange(counts.shape[0], device=depth.device), counts)
    # Per ray and position, so that the cumulative sum restarts with every ray.
    position = torch.arange(depth.shape[0], device=depth.device) - ray_starts[rays]
    longest = int(counts.max()) if counts.numel() else 0
    table = depth.new_zeros(counts.shape[0], longest + 1).index_put((rays, position + 1), depth)
    before = torch.exp(-table.cumsum(-1)[rays, position]) if longest else depth
    counted = before.detach() >= min_transmittance
    weights = torch.where(counted, before * -torch.expm1(-depth), torch.zeros_like(depth))
    total = torch.zeros_like(background[:, 0]).index_add(0, rays, torch.where(counted, depth, 0 * depth))
    end = torch.exp(-total)
    colour = end[:, None] * background
    colour = colour.index_add(0, rays, weights[:, None] * rgb)
    acc = 1 - end
    weighted = torch.zeros_like(end).index_add(0, rays, weights * middles)
    is_empty = acc == 0
    distance = torch.where(is_empty, near[:, 0], weighted / torch.where(is_empty, torch.ones_like(acc), acc))
    return PackedComposite(colour, distance, acc, weights)
