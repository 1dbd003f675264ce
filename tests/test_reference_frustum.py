"""Truth of the frustum Gaussians: Monte-Carlo moments, closed forms, degenerate intervals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mipnerf_fast import reference

SAMPLES = 400_000
# Standard errors of a mean over SAMPLES draws fall as 1/sqrt(SAMPLES); six of them fail once in 10^9 runs.
SIGMAS = 6.0


def sample_solid(shape: str, t0: float, t1: float, radius: float, d: Tensor, o: Tensor) -> Tensor:
    """Points uniform in the volume of a cone's frustum or a cylinder: [SAMPLES, 3]."""
    g = torch.Generator().manual_seed(7)
    u, v, angle = (torch.rand(SAMPLES, generator=g, dtype=torch.float64) for _ in range(3))
    if shape == "cone":
        # The density of t is proportional to the area of the disc, t^2.
        t = (t0**3 + u * (t1**3 - t0**3)) ** (1 / 3)
        disc = radius * t
    else:
        t = t0 + u * (t1 - t0)
        disc = torch.full_like(t, radius)
    r, angle = disc * torch.sqrt(v), 2 * math.pi * angle
    unit = d / d.norm()
    e1 = torch.linalg.cross(unit, torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64))
    e1 = e1 / e1.norm()
    e2 = torch.linalg.cross(unit, e1)
    return o + t[:, None] * d + (r * torch.cos(angle))[:, None] * e1 + (r * torch.sin(angle))[:, None] * e2


@pytest.mark.parametrize("shape", ["cone", "cylinder"])
@pytest.mark.parametrize(
    ("t0", "t1", "radius"), [(2.0, 2.5, 0.02), (0.0, 1.0, 0.5), (0.5, 6.0, 0.1), (3.0, 3.01, 0.3)]
)
def test_moments_match_monte_carlo(shape: str, t0: float, t1: float, radius: float) -> None:
    d = torch.tensor([0.6, -1.1, 0.4], dtype=torch.float64)
    o = torch.tensor([0.2, 0.3, -1.0], dtype=torch.float64)
    # Radii are world units at t = 1; the solid of the cone has that radius across a direction of any length.
    points = sample_solid(shape, t0, t1, radius, d, o)
    mean, cov = reference.frustum_gaussians(
        torch.tensor([[t0, t1]], dtype=torch.float64),
        o[None],
        d[None],
        torch.tensor([[radius]], dtype=torch.float64),
        shape=shape,
        full_covariance=True,
    )
    spread = points.std(0)
    assert ((points.mean(0) - mean[0, 0]).abs() <= SIGMAS * spread / SAMPLES**0.5).all()
    got = torch.cov(points.T)
    fourth = spread[:, None] * spread[None, :] * 3**0.5
    assert ((got - cov[0, 0]).abs() <= SIGMAS * fourth / SAMPLES**0.5).all()


@pytest.mark.parametrize("shape", ["cone", "cylinder"])
def test_diagonal_is_the_diagonal_of_the_full_covariance(shape: str) -> None:
    g = torch.Generator().manual_seed(0)
    t_vals = torch.sort(torch.rand(5, 9, generator=g, dtype=torch.float64) * 4, -1).values
    o, d = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    radii = torch.rand(5, 1, generator=g, dtype=torch.float64)
    means, variances = reference.frustum_gaussians(t_vals, o, d, radii, shape)
    means_full, full = reference.frustum_gaussians(t_vals, o, d, radii, shape, full_covariance=True)
    assert torch.equal(means, means_full)
    torch.testing.assert_close(variances, torch.diagonal(full, dim1=-2, dim2=-1), rtol=1e-12, atol=1e-15)


def test_stable_form_equals_the_direct_integrals() -> None:
    t0, t1, r = 1.5, 2.25, 0.25
    volume, first = (t1**3 - t0**3) / 3, (t1**4 - t0**4) / 4
    second = (t1**5 - t0**5) / 5
    t_mean, t_sq = first / volume, second / volume
    mean, cov = reference.frustum_gaussians(
        torch.tensor([[t0, t1]], dtype=torch.float64),
        torch.zeros(1, 3, dtype=torch.float64),
        torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64),
        torch.tensor([[r]], dtype=torch.float64),
    )
    assert mean[0, 0, 2].item() == pytest.approx(t_mean, rel=1e-12)
    assert cov[0, 0, 2].item() == pytest.approx(t_sq - t_mean**2, rel=1e-9)
    assert cov[0, 0, 0].item() == pytest.approx(r**2 / 4 * t_sq, rel=1e-12)


def test_scaling_the_world_scales_the_gaussian() -> None:
    t_vals = torch.tensor([[1.0, 1.7]], dtype=torch.float64)
    d = torch.tensor([[0.3, 0.4, -1.2]], dtype=torch.float64)
    o, radii = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([[0.1]], dtype=torch.float64)
    mean, cov = reference.frustum_gaussians(t_vals, o, d, radii, full_covariance=True)
    mean3, cov3 = reference.frustum_gaussians(t_vals, o, 3 * d, 3 * radii, full_covariance=True)
    torch.testing.assert_close(mean3, 3 * mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(cov3, 9 * cov, rtol=1e-12, atol=1e-15)


def test_rotating_the_ray_rotates_the_gaussian() -> None:
    g = torch.Generator().manual_seed(3)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))
    t_vals = torch.tensor([[1.0, 1.7, 2.0]], dtype=torch.float64)
    o, d = torch.randn(2, 1, 3, generator=g, dtype=torch.float64)
    radii = torch.tensor([[0.3]], dtype=torch.float64)
    mean, cov = reference.frustum_gaussians(t_vals, o, d, radii, full_covariance=True)
    mean_r, cov_r = reference.frustum_gaussians(
        t_vals, o @ rotation.T, d @ rotation.T, radii, full_covariance=True
    )
    torch.testing.assert_close(mean_r, mean @ rotation.T, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(cov_r, rotation @ cov @ rotation.T, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_apex_is_a_point_with_zero_gradient(dtype: torch.dtype) -> None:
    t_vals = torch.zeros(1, 2, dtype=dtype, requires_grad=True)
    radii = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    o, d = torch.full((1, 3), 0.5, dtype=dtype), torch.ones(1, 3, dtype=dtype)
    mean, variances = reference.frustum_gaussians(t_vals, o, d, radii)
    assert torch.equal(mean[0, 0], o[0])
    assert (variances == 0).all()
    grads = torch.autograd.grad(mean.sum() + variances.sum(), (t_vals, radii))
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("size", [1e-10, 1e-15, 1e-20, 1e-30, 1e-40])
def test_tiny_frusta_do_not_underflow_to_nan(size: float) -> None:
    t_vals = torch.tensor([[0.0, size, 2 * size]])
    o, d, radii = torch.zeros(1, 3), torch.ones(1, 3), torch.full((1, 1), 0.1)
    mean, variances = reference.frustum_gaussians(t_vals, o, d, radii)
    assert mean.isfinite().all() and variances.isfinite().all() and (variances >= 0).all()
    assert (mean <= 2 * size).all()


def test_unknown_shape_is_named() -> None:
    ray = torch.ones(1, 3)
    with pytest.raises(ValueError, match=r'"cone" or "cylinder".*box'):
        reference.frustum_gaussians(torch.ones(1, 2), ray, ray, torch.ones(1, 1), shape="box")
