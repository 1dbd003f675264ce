"""Marching: the intervals, the masks, the Gaussians."""

from __future__ import annotations

import math

import pytest
import torch

from mipnerf_fast import ops, reference, use_backend

R = 32


def _masks(densities: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return reference.occupancy_masks(densities, 0.5)


def _axis_ray(radius: float = 1e-3) -> tuple[torch.Tensor, ...]:
    one = torch.ones(1, 1, dtype=torch.float64)
    origin = torch.tensor([[0.01, 0.02, 4.0]], dtype=torch.float64)
    direction = torch.tensor([[0.0, 0.0, -1.0]], dtype=torch.float64)
    return origin, direction, radius * one, 2 * one, 6 * one, 0.5 * one


def test_steps_grow_with_the_cone_between_their_bounds() -> None:
    rays = _axis_ray(radius=2e-3)
    samples = reference.march(
        *rays, _masks(torch.ones(R, R, R)), step_scale=1.0, min_step=0.01, max_step=0.014
    )
    steps = samples.t1 - samples.t0
    wanted = torch.clamp(samples.t0 * 2e-3 * math.sqrt(3.0), 0.01, 0.014)
    torch.testing.assert_close(steps, wanted, rtol=1e-12, atol=1e-12)
    assert abs(steps.min() - 0.01) < 1e-12 and abs(steps.max() - 0.014) < 1e-12
    # One after the other, through the whole box from t = 2.5 to 5.5.
    torch.testing.assert_close(samples.t1[:-1], samples.t0[1:])
    assert 2.5 <= samples.t0[0] < 2.52 and 5.48 < samples.t1[-1] < 5.52


def test_only_occupied_cells_are_sampled() -> None:
    densities = torch.zeros(R, R, R)
    densities[10, 16, 16] = 1  # z first
    samples = reference.march(*_axis_ray(), _masks(densities))
    side = 3.0
    z = (4.0 - 0.5 * (samples.t0 + samples.t1) + 1.5) / side
    assert len(z) > 5 and ((z * R).floor() == 10).all()


def test_wide_cones_look_into_a_coarser_dilated_mask() -> None:
    densities = torch.zeros(R, R, R)
    densities[10, 16, 16] = 1
    masks = _masks(densities)
    pixel_in_cells = torch.tensor([0.5, 0.8, 1.9, 2.1, 4.1, 1000.0])
    which = reference.mask_for_width(pixel_in_cells / R, R).tolist()
    assert which == [0, 1, 1, 2, 3, 5]
    for which_mask, (mask, skip) in enumerate(masks):
        cell = 2 ** max(0, which_mask - 1)
        assert mask[10 // cell, 16 // cell, 16 // cell]
        count = int(mask.sum())
        assert count == (1 if which_mask == 0 else min(27, mask.numel()))
        assert skip.any()


def test_rays_that_miss_or_run_along_a_face_have_no_samples() -> None:
    origins = torch.tensor([[5.0, 0, 4], [0, 2.0, 4], [0.0, 0, 4]], dtype=torch.float64)
    directions = torch.tensor([[0, 0, -1.0]] * 3, dtype=torch.float64)
    one = torch.ones(3, 1, dtype=torch.float64)
    samples = reference.march(
        origins, directions, 1e-3 * one, 2 * one, 6 * one, 0 * one, _masks(torch.ones(R, R, R))
    )
    assert samples.ray_starts.tolist()[:3] == [0, 0, 0] and samples.ray_starts[3] > 0
    assert samples.rays.eq(2).all()


def test_gaussians_are_those_of_the_frusta() -> None:
    rays = _axis_ray(radius=3e-3)
    samples = reference.march(*rays, _masks(torch.ones(R, R, R)))
    fenceposts = torch.stack([samples.t0, samples.t1], -1)
    count = len(samples.t0)
    means, variances = reference.frustum_gaussians(
        fenceposts, rays[0].expand(count, 3), rays[1].expand(count, 3), rays[2].expand(count, 1)
    )
    torch.testing.assert_close(samples.means, (means[:, 0] + 1.5) / 3, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(samples.scales, variances[:, 0, 0].sqrt() / 3, rtol=1e-12, atol=1e-15)


def test_masks_survive_packing() -> None:
    masks = _masks(torch.rand(R, R, R))
    words = reference.pack_masks(masks)
    assert len(words) == reference.occupancy_words(R)
    for (a, b), (c, d) in zip(masks, reference.unpack_masks(words, R), strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_the_kernel_in_float64_finds_the_same_samples(share: float) -> None:
    """The kernel skips empty cells of the coarser mask; no sample may be lost or gained by that."""
    count = 200
    origins = torch.tensor([0.0, 0.0, 4.0]).double() + 0.3 * torch.randn(count, 3).double()
    directions = torch.tensor([0.0, 0.0, -1.0]).double() + 0.4 * torch.randn(count, 3).double()
    directions[0] = torch.tensor([0.0, 0.0, -1.0])
    one = torch.ones(count, 1, dtype=torch.float64)
    radii = torch.logspace(-4, -1.2, count, dtype=torch.float64)[:, None]
    rays = (origins, directions, radii, 2 * one, 6 * one, torch.rand(count, 1, dtype=torch.float64))
    masks = reference.occupancy_masks(torch.rand(R, R, R), 1 - share)
    # Bounds that float32 holds exactly, as the kernel keeps them.
    bounds = {"step_scale": 1.0, "min_step": 2.0**-7, "max_step": 2.0**-5}
    wanted = reference.march(*rays, masks, **bounds)
    with use_backend("native"):
        found = ops.march(*rays, reference.pack_masks(masks), R, **bounds)
    assert len(wanted.rays) > 500
    assert torch.equal(found.ray_starts, wanted.ray_starts) and torch.equal(found.rays, wanted.rays)
    for name in ("t0", "t1", "means", "scales"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-11, atol=1e-12)


def test_wrong_arguments_are_named() -> None:
    rays = _axis_ray()
    words = reference.pack_masks(_masks(torch.ones(R, R, R)))
    with pytest.raises(ValueError, match="radii"):
        ops.march(rays[0], rays[1], torch.ones(2, 1).double(), *rays[3:], words, R)
    with pytest.raises(RuntimeError, match="masks must be"):
        ops.march(*rays, words[1:], R)
