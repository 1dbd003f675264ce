"""Where to sample along a ray: stratified fenceposts, and fenceposts drawn from weights (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# The gap below 1 in float32; the original subtracts it so that no position reaches the end of the last interval.
_EPSILON = 2.0**-23
# Weights are padded up to this sum, so that a ray of zeros has a distribution (uniform) at all.
_MIN_WEIGHT_SUM = 1e-5


def sample_t_vals(
    near: Tensor, far: Tensor, num_samples: int, u: Tensor | None = None, lindisp: bool = False
) -> Tensor:
    """Fenceposts between near and far, evenly spaced in distance or in disparity, optionally jittered.

    With s_k = k/N: t_k = near (1 - s_k) + far s_k, or 1 / ((1 - s_k)/near + s_k/far). With u, each fencepost is
    drawn between the midpoints to its neighbours (the ends: between themselves and the first midpoint).

    Args:
        near, far: [B, 1], in multiples of the direction.
        num_samples: N, the number of intervals.
        u: [B, N+1] in [0, 1), or None for the evenly spaced ones.
        lindisp: whether the spacing is even in disparity.

    Returns:
        [B, N+1], ascending.

    Source: algorithm 1.2.
    """
    if num_samples < 1:
        raise ValueError(f"sample_t_vals: num_samples must be at least 1, got {num_samples}")
    s = torch.linspace(0.0, 1.0, num_samples + 1, dtype=near.dtype, device=near.device)
    t_vals = 1 / ((1 - s) / near + s / far) if lindisp else near * (1 - s) + far * s
    if u is None:
        return t_vals
    mids = (t_vals[..., 1:] + t_vals[..., :-1]) / 2
    bounds = torch.cat([t_vals[..., :1], mids, t_vals[..., -1:]], -1)
    lower, upper = bounds[..., :-1], bounds[..., 1:]
    return lower + (upper - lower) * u


def blur_weights(weights: Tensor, padding: float) -> Tensor:
    """The weights as mip-NeRF resamples from them: 2-tap max, then 2-tap mean, then padding (equation 18).

    w'_k = (max(w_{k-1}, w_k) + max(w_k, w_{k+1})) / 2 + padding, with the ends repeated: [B, N].
    """
    padded = torch.cat([weights[..., :1], weights, weights[..., -1:]], -1)
    maxima = torch.maximum(padded[..., :-1], padded[..., 1:])
    return (maxima[..., :-1] + maxima[..., 1:]) / 2 + padding


def sample_piecewise_constant(
    t_vals: Tensor, weights: Tensor, num_fenceposts: int, u: Tensor | None = None
) -> Tensor:
    """Sorted samples of the piecewise-constant density that weights define over t_vals, by inverting its CDF.

    position_k = min(k/M + u_k (1/M - eps), 1 - eps) with eps = 2^-23 (stratified), or evenly spaced in
    [0, 1 - eps]; t_k = CDF^-1(position_k).

    Args:
        t_vals: [B, N+1] bin edges, ascending.
        weights: [B, N], at least 0; a ray of zeros is sampled uniformly over its bins.
        num_fenceposts: M.
        u: [B, M] in [0, 1), or None for evenly spaced positions.

    Returns:
        [B, M], ascending and inside [t_0, t_N]. No gradient.

    Source: algorithm 1.7; Barron et al. 2021, section 3.2.
    """
    if num_fenceposts < 1:
        raise ValueError(
            f"sample_piecewise_constant: num_fenceposts must be at least 1, got {num_fenceposts}"
        )
    t_vals, weights = t_vals.detach(), weights.detach()
    missing = torch.clamp(_MIN_WEIGHT_SUM - weights.sum(-1, keepdim=True), min=0)
    weights = weights + missing / weights.shape[-1]
    cdf = torch.cumsum(weights[..., :-1] / weights.sum(-1, keepdim=True), -1).clamp(max=1)
    cdf = functional.pad(cdf, (1, 0))
    cdf = functional.pad(cdf, (0, 1), value=1.0)

    m = num_fenceposts
    dtype, device = weights.dtype, weights.device
    if u is None:
        position = torch.linspace(0.0, 1.0 - _EPSILON, m, dtype=dtype, device=device).expand(
            *weights.shape[:-1], m
        )
    else:
        position = torch.arange(m, dtype=dtype, device=device) / m + u.detach() * (1.0 / m - _EPSILON)
        position = position.clamp(max=1.0 - _EPSILON)

    # The largest edge with cdf <= position; clamped because a NaN in the weights must stay in its ray.
    lower = torch.searchsorted(cdf, position.contiguous(), right=True) - 1
    lower = lower.clamp(0, weights.shape[-1] - 1)
    c0, c1 = cdf.gather(-1, lower), cdf.gather(-1, lower + 1)
    t0, t1 = t_vals.gather(-1, lower), t_vals.gather(-1, lower + 1)
    fraction = ((position - c0) / (c1 - c0)).clamp(0, 1)
    return torch.minimum(t0 + fraction * (t1 - t0), t1)


def resample(
    t_vals: Tensor,
    weights: Tensor,
    num_samples: int | None = None,
    u: Tensor | None = None,
    padding: float = 0.01,
) -> Tensor:
    """New fenceposts for the next level, drawn from the blurred and padded weights of this one.

    `sample_piecewise_constant(t_vals, blur_weights(weights, padding), num_samples + 1, u)` (equation 18).

    Args:
        t_vals: [B, N+1] fenceposts, distances in multiples of the direction.
        weights: [B, N] from compositing.
        num_samples: intervals wanted; None: as many as came in.
        u: [B, num_samples + 1] in [0, 1), or None for evenly spaced positions.
        padding: added to every blurred weight; the paper's alpha = 0.01.

    Returns:
        [B, num_samples + 1], ascending and inside [t_0, t_N]. No gradient (stop_level_grad).

    Source: algorithm 1.7; Barron et al. 2021, equation 18.
    """
    if num_samples is None:
        num_samples = weights.shape[-1]
    return sample_piecewise_constant(t_vals, blur_weights(weights.detach(), padding), num_samples + 1, u)
