"""Cameras: geometry that can be checked by hand; the official values are in test_official.py."""

from __future__ import annotations

import math

import pytest
import torch

from mipnerf_fast import cameras


def pose(seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))
    return torch.cat([rotation, torch.randn(3, 1, generator=g, dtype=torch.float64)], 1)


def test_the_centre_looks_along_minus_z_and_up_is_up() -> None:
    rays = cameras.pinhole_rays(torch.eye(4, dtype=torch.float64), 5, 7, 10.0)
    assert rays.directions[2, 3].tolist() == [0.0, 0.0, -1.0]
    assert rays.directions[0, 3, 1] > 0 > rays.directions[4, 3, 1]
    assert rays.directions[2, 6, 0] > 0 > rays.directions[2, 0, 0]
    torch.testing.assert_close(rays.viewdirs.norm(dim=-1), torch.ones(5, 7, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(4, 6), (1, 1), (1, 5), (5, 1), (3, 4)])
def test_radii_are_row_distances_by_two_over_root_twelve(shape: tuple[int, int]) -> None:
    rays = cameras.pinhole_rays(pose(), *shape, 3.5)
    assert torch.allclose(rays.radii, torch.full_like(rays.radii, 2 / (math.sqrt(12) * 3.5)), rtol=1e-14)
    if shape[0] > 1:
        rows = (rays.directions[1:] - rays.directions[:-1]).norm(dim=-1, keepdim=True)
        torch.testing.assert_close(rays.radii[:-1], rows * 2 / math.sqrt(12), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixel_rays_are_the_rays_of_those_pixels(dtype: torch.dtype) -> None:
    sizes, focals = [(4, 6), (5, 3)], [5.5, 2.25]
    c2w = torch.stack([pose(0), pose(1)]).to(dtype)
    image = torch.tensor([0, 1, 1, 0, 0])
    x, y = torch.tensor([0, 2, 1, 5, 3]), torch.tensor([0, 4, 2, 3, 1])
    like = torch.tensor([[*size, focal] for size, focal in zip(sizes, focals, strict=True)], dtype=dtype)
    got = cameras.pixel_rays(
        c2w[image],
        like[image, 0].long(),
        like[image, 1].long(),
        like[image, 2],
        x,
        y,
        torch.full((5,), 2.0, dtype=dtype),
        torch.full((5,), 6.0, dtype=dtype),
        torch.ones(5, dtype=dtype),
    )
    for row in range(5):
        i = int(image[row])
        want = cameras.pinhole_rays(c2w[i], *sizes[i], focals[i]).map(lambda f, r=row: f[y[r], x[r]])
        for a, b in zip(got.map(lambda f, r=row: f[r]), want, strict=True):
            assert torch.equal(a, b)


def test_a_batch_of_cameras() -> None:
    c2w = torch.stack([pose(0), pose(1), pose(2)])
    rays = cameras.pinhole_rays(c2w, 3, 4, torch.tensor([2.0, 3.0, 4.0]).double())
    assert rays.batch_shape == (3, 3, 4)
    one = cameras.pinhole_rays(c2w[1], 3, 4, 3.0)
    for a, b in zip(rays, one, strict=True):
        assert torch.equal(a[1], b)


def test_ndc_maps_the_near_plane_and_infinity() -> None:
    rays = cameras.pinhole_rays(torch.eye(4, dtype=torch.float64), 4, 6, 5.0)
    origins, directions = cameras.ndc_rays(rays.origins, rays.directions, 5.0, 6, 4, near=1.0)
    torch.testing.assert_close(origins[..., 2], torch.full((4, 6), -1.0, dtype=torch.float64))
    torch.testing.assert_close((origins + directions)[..., 2], torch.ones(4, 6, dtype=torch.float64))
    # A point on the ray at depth 2, projected by hand.
    z = -2.0
    point = rays.directions * 2
    want = torch.stack(
        [-5 / 3 * point[..., 0] / z, -5 / 2 * point[..., 1] / z, torch.full((4, 6), 1 + 2 / z)], -1
    )
    t = (want[..., 2] - origins[..., 2]) / directions[..., 2]
    torch.testing.assert_close(origins + t[..., None] * directions, want)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"c2w must be .* got \[2, 2\]"):
        cameras.pinhole_rays(torch.eye(2), 3, 4, 1.0)
    with pytest.raises(ValueError, match="got 0 x 4"):
        cameras.pinhole_rays(torch.eye(4), 0, 4, 1.0)
