"""What sampling by a proposal needs beside resampling: a contraction of space, and the loss that teaches it."""

from __future__ import annotations

import torch
from torch import Tensor


def contract_gaussians(points: Tensor, scales: Tensor, half: float) -> tuple[Tensor, Tensor]:
    """All of space into the unit cube, and the width of a Gaussian there.

    With r = ||x|| / half: the ball r <= 1 keeps its shape, and what is outside goes to x / r (2 - 1/r), within r = 2
    (mip-NeRF 360, equation 10); then the ball of radius 2 half is scaled into [0, 1]^3. A deviation is multiplied by
    the cube root of the Jacobian's determinant, 1/r^2 ((2 - 1/r) / r)^2 outside, so that the Gaussian keeps its volume.

    Args:
        points: [..., 3], world units. scales: [...], standard deviations, world units.
        half: radius of the ball that keeps its shape.

    Returns:
        Points in [0, 1]^3 and scales in units of the cube's side; differentiable.

    Source: Barron et al. 2022, equation 10; Barron et al. 2023 (Zip-NeRF), section 2, for the scale.
    """
    x = points / half
    # Inside, and in the unused branch at the origin, r is 1: there is no division by 0 in the backward pass either.
    square = (x * x).sum(-1)
    r = torch.sqrt(torch.clamp(square, min=1.0))
    tangential = (2 - 1 / r) / r
    determinant = tangential * tangential / (r * r)
    side = 4 * half
    return x * tangential[..., None] / 4 + 0.5, scales * determinant ** (1 / 3) / side


def interlevel_loss(
    t_vals: Tensor, weights: Tensor, proposal_t_vals: Tensor, proposal_weights: Tensor, eps: float = 1e-7
) -> Tensor:
    """How much of the final weights the proposal's do not bound, as a loss for the proposal alone.

    With b_i the sum of the proposal's weights over the intervals that overlap interval i:
    mean over rays of sum_i max(0, w_i - b_i)^2 / (w_i + eps).

    Args:
        t_vals: [B, N+1], weights: [B, N], of the final level; no gradient reaches them.
        proposal_t_vals: [B, P+1], proposal_weights: [B, P].

    Returns:
        A scalar; differentiable in proposal_weights.

    Source: Barron et al. 2022, equations 11 to 13.
    """
    t_vals, weights = t_vals.detach().contiguous(), weights.detach()
    edges = proposal_t_vals.detach().contiguous()
    before = torch.nn.functional.pad(torch.cumsum(proposal_weights, -1), (1, 0))
    last = proposal_weights.shape[-1]
    first = (torch.searchsorted(edges, t_vals[..., :-1].contiguous(), right=True) - 1).clamp(0, last)
    end = torch.searchsorted(edges, t_vals[..., 1:].contiguous()).clamp(0, last)
    bound = before.gather(-1, torch.maximum(end, first)) - before.gather(-1, first)
    return (torch.clamp(weights - bound, min=0) ** 2 / (weights + eps)).sum(-1).mean()
