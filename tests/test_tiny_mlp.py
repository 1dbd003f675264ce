"""The fast model's networks."""

from __future__ import annotations

import math

import numpy as np
import torch

from mipnerf_fast import reference


def test_harmonics_are_orthonormal_on_the_sphere() -> None:
    # Gauss-Legendre in cos(theta), evenly spaced in phi: exact for the products' degree 6.
    z, weight = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(8))
    phi = torch.arange(16, dtype=torch.float64) * (2 * math.pi / 16)
    radius = torch.sqrt(1 - z * z)
    directions = torch.stack(
        [radius[:, None] * phi.cos(), radius[:, None] * phi.sin(), z[:, None].expand(8, 16)], -1
    ).reshape(-1, 3)
    weights = (weight[:, None] * (2 * math.pi / 16)).expand(8, 16).reshape(-1)
    harmonics = reference.spherical_harmonics(directions)
    gram = (harmonics * weights[:, None]).T @ harmonics
    torch.testing.assert_close(gram, torch.eye(16, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_the_view_part_is_one_bias_per_ray() -> None:
    geometry, harmonics = torch.randn(10, 16).double(), torch.randn(3, 16).double()
    rays = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 1, 2])
    first, second = torch.randn(24, 32).double(), torch.randn(24, 24).double()
    last = torch.randn(3, 24).double()
    for hidden in (None, second):
        found = reference.colour_network(geometry, harmonics, rays, first, hidden, last)
        h = torch.relu(torch.cat([geometry, harmonics[rays]], -1) @ first.T)
        h = h if hidden is None else torch.relu(h @ hidden.T)
        wanted = torch.sigmoid((h @ last.T).clamp(-12, 12)) * 1.002 - 0.001
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_extreme_outputs_stay_finite_and_pass_no_gradient() -> None:
    geometry = torch.zeros(3, 16, dtype=torch.float64)
    geometry[:, 0] = torch.tensor([-1e6, 0.0, 1e6])
    geometry.requires_grad_()
    density = reference.fast_density(geometry)
    density.sum().backward()
    assert torch.isfinite(density).all() and (density.diff() > 0).all()
    assert geometry.grad is not None
    assert geometry.grad[0, 0] == 0 and geometry.grad[2, 0] == 0 and geometry.grad[1, 0] > 0
