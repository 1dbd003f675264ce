"""Rays and fenceposts to features: the frustum Gaussians and their integrated encoding, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from .frustum import frustum_gaussians
from .ipe import integrated_pos_enc, pos_enc


def frustum_ipe(
    t_vals: Tensor,
    origins: Tensor,
    directions: Tensor,
    radii: Tensor,
    min_deg: int = 0,
    max_deg: int = 16,
    shape: str = "cone",
    integrated: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The integrated positional encoding of every frustum along a batch of rays.

    `integrated_pos_enc(*frustum_gaussians(t_vals, origins, directions, radii, shape), min_deg, max_deg)`.

    Args:
        t_vals: [B, N+1] fenceposts, distances in multiples of the direction.
        origins, directions: [B, 3], world units.
        radii: [B, 1], world radius at t = 1.
        min_deg, max_deg: the octaves, max_deg excluded.
        shape: "cone" or "cylinder".
        integrated: False encodes the mean alone, as NeRF does (the paper's ablation).
        out_dtype: of the features; None keeps the inputs' dtype.

    Returns:
        [B, N, 6 (max_deg - min_deg)]; differentiable in every input.

    Source: algorithm 1.3 and 1.4; Barron et al. 2021, equations 7, 8 and 14.
    """
    means, variances = frustum_gaussians(t_vals, origins, directions, radii, shape)
    if integrated:
        features = integrated_pos_enc(means, variances, min_deg, max_deg)
    else:
        features = pos_enc(means, min_deg, max_deg, append_identity=False)
    return features if out_dtype is None else features.to(out_dtype)
