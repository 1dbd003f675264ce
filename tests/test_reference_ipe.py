"""Truth of the encodings: sampled expectations, limits, layout."""

from __future__ import annotations

import math

import pytest
import torch

from mipnerf_fast import reference

SAMPLES = 200_000


def test_ipe_is_the_expected_encoding() -> None:
    g = torch.Generator().manual_seed(1)
    mean = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)
    std = torch.tensor([0.2, 0.05, 0.6], dtype=torch.float64)
    x = mean + std * torch.randn(SAMPLES, 3, generator=g, dtype=torch.float64)
    encoded = reference.pos_enc(x, 0, 5, append_identity=False)
    want, spread = encoded.mean(0), encoded.std(0)
    got = reference.integrated_pos_enc(mean[None, None], (std**2)[None, None], 0, 5)[0, 0]
    assert ((got - want).abs() <= 6 * spread / SAMPLES**0.5).all()


def test_ipe_of_a_cone_is_the_expected_encoding_of_its_gaussian() -> None:
    g = torch.Generator().manual_seed(2)
    t_vals = torch.tensor([[2.0, 2.4]], dtype=torch.float64)
    o, d = torch.randn(2, 1, 3, generator=g, dtype=torch.float64)
    radii = torch.tensor([[0.05]], dtype=torch.float64)
    mean, cov = reference.frustum_gaussians(t_vals, o, d, radii, full_covariance=True)
    root = torch.linalg.cholesky(cov[0, 0])
    x = mean[0, 0] + torch.randn(SAMPLES, 3, generator=g, dtype=torch.float64) @ root.T
    encoded = reference.pos_enc(x, 0, 6, append_identity=False)
    got = reference.frustum_ipe(t_vals, o, d, radii, max_deg=6)[0, 0]
    assert ((got - encoded.mean(0)).abs() <= 6 * encoded.std(0) / SAMPLES**0.5).all()


def test_zero_variance_is_the_plain_encoding() -> None:
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    got = reference.integrated_pos_enc(x, torch.zeros_like(x), 0, 16)
    assert torch.equal(got, reference.pos_enc(x, 0, 16, append_identity=False))


def test_full_covariance_uses_its_diagonal() -> None:
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    a = torch.randn(4, 5, 3, 3, dtype=torch.float64)
    cov = a @ a.mT
    got = reference.integrated_pos_enc(x, cov, 1, 7)
    assert torch.equal(got, reference.integrated_pos_enc(x, torch.diagonal(cov, dim1=-2, dim2=-1), 1, 7))


def test_layout_is_degree_major_sines_then_cosines() -> None:
    x = torch.tensor([[[0.1, 0.2, 0.3]]], dtype=torch.float64)
    features = reference.integrated_pos_enc(x, torch.zeros_like(x), 2, 5)[0, 0]
    assert features.shape == (18,)
    for degree in range(3):
        for axis in range(3):
            y = 2 ** (degree + 2) * x[0, 0, axis].item()
            assert features[3 * degree + axis].item() == pytest.approx(math.sin(y), abs=1e-14)
            assert features[9 + 3 * degree + axis].item() == pytest.approx(math.cos(y), abs=1e-14)


def test_identity_comes_first_and_27_features_for_views() -> None:
    x = torch.randn(7, 3)
    encoded = reference.pos_enc(x, 0, 4)
    assert encoded.shape == (7, 27)
    assert torch.equal(encoded[:, :3], x)
    assert torch.equal(reference.pos_enc(x, 0, 0), x)


def test_cosine_is_a_cosine_in_float32() -> None:
    """The original's sin(y + pi/2) rounds y + pi/2 in float32; ours must not."""
    x = torch.full((1, 1, 3), 3.7)
    got = reference.integrated_pos_enc(x, torch.zeros_like(x), 15, 16)[0, 0, 3].item()
    y = x[0, 0, 0].double().item() * 2**15
    shifted = torch.sin(x[0, 0, 0] * 2**15 + torch.tensor(0.5 * math.pi)).item()
    assert abs(got - math.cos(y)) <= 2**-23
    assert abs(shifted - math.cos(y)) > 1e-4


@pytest.mark.parametrize(("low", "high"), [(-1, 4), (4, 4), (5, 4)])
def test_bad_degrees_are_named(low: int, high: int) -> None:
    x = torch.zeros(1, 1, 3)
    with pytest.raises(ValueError, match=f"got {low} and {high}"):
        reference.integrated_pos_enc(x, x, low, high)


def test_half_precision_output() -> None:
    rays = (torch.tensor([[2.0, 3.0]]), torch.zeros(1, 3), torch.ones(1, 3), torch.full((1, 1), 0.01))
    assert reference.frustum_ipe(*rays, out_dtype=torch.bfloat16).dtype == torch.bfloat16
