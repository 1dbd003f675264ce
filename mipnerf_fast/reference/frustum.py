"""Conical frusta and cylinders as Gaussians (paper, section 3.1 and equations 7 and 8)."""

from __future__ import annotations

import torch
from torch import Tensor


def _cone_moments(t0: Tensor, t1: Tensor, radii: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance along the ray and variance across it, of a cone between t0 and t1 (equation 7)."""
    mu, hw = (t0 + t1) / 2, (t1 - t0) / 2
    hw2 = hw * hw
    denominator = 3 * mu * mu + hw2
    # At the apex (t0 = t1 = 0) the frustum is a point: everything is 0, and so is every gradient. Dividing by 1
    # there, instead of selecting after a division by 0, keeps NaN out of the backward pass too.
    is_point = denominator == 0
    q = hw2 / torch.where(is_point, torch.ones_like(denominator), denominator)
    # The paper writes hw^4 / D^2; as q^2 it cannot underflow to 0/0 in float32.
    t_mean = torch.where(is_point, torch.zeros_like(mu), mu + 2 * mu * q)
    t_var = hw2 / 3 - (4.0 / 15.0) * (q * q) * (12 * mu * mu - hw2)
    r_var = radii * radii * (mu * mu / 4 + (5.0 / 12.0) * hw2 - (4.0 / 15.0) * hw2 * q)
    return t_mean, t_var, r_var


def _cylinder_moments(t0: Tensor, t1: Tensor, radii: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a cylinder of constant radius."""
    t_var = (t1 - t0) ** 2 / 12
    return (t0 + t1) / 2, t_var, (radii * radii / 4).expand_as(t_var)


def frustum_gaussians(
    t_vals: Tensor,
    origins: Tensor,
    directions: Tensor,
    radii: Tensor,
    shape: str = "cone",
    full_covariance: bool = False,
) -> tuple[Tensor, Tensor]:
    """The Gaussian with the mean and covariance of each conical frustum between neighbouring fenceposts.

    With mu = (t0 + t1)/2, h = (t1 - t0)/2 and D = 3 mu^2 + h^2 (equation 7):
    mu_t = mu + 2 mu h^2 / D, var_t = h^2/3 - 4/15 h^4 (12 mu^2 - h^2) / D^2,
    var_r = r^2 (mu^2/4 + 5/12 h^2 - 4/15 h^4 / D); then (equation 8), with d not normalised,
    mean = o + mu_t d and covariance = var_t d d^T + var_r (I - d d^T / ||d||^2).

    Args:
        t_vals: [B, N+1] fenceposts, distances in multiples of the direction, ascending.
        origins, directions: [B, 3], world units.
        radii: [B, 1], world radius of the cone at t = 1 (of the cylinder everywhere).
        shape: "cone" or "cylinder".
        full_covariance: whether to return the full matrices.

    Returns:
        means [B, N, 3] and variances [B, N, 3] (the diagonal) or covariances [B, N, 3, 3]; differentiable in
        every input. Where t0 = t1 = 0 a cone's Gaussian is the origin with zero variance.

    Source: algorithm 1.3; Barron et al. 2021, equations 7, 8 and 16, and the appendix for the cylinder.
    """
    t0, t1 = t_vals[..., :-1], t_vals[..., 1:]
    if shape == "cone":
        t_mean, t_var, r_var = _cone_moments(t0, t1, radii)
    elif shape == "cylinder":
        t_mean, t_var, r_var = _cylinder_moments(t0, t1, radii)
    else:
        raise ValueError(f'frustum_gaussians: shape must be "cone" or "cylinder", got {shape!r}')
    d = directions[..., None, :]
    means = origins[..., None, :] + d * t_mean[..., None]
    norm2 = torch.clamp((d * d).sum(-1, keepdim=True), min=1e-10)
    if full_covariance:
        outer = d[..., :, None] * d[..., None, :]
        across = torch.eye(3, dtype=d.dtype, device=d.device) - outer / norm2[..., None]
        return means, t_var[..., None, None] * outer + r_var[..., None, None] * across
    return means, t_var[..., None] * (d * d) + r_var[..., None] * (1 - d * d / norm2)
