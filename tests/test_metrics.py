"""Image metrics; the official values are in test_official.py."""

from __future__ import annotations

import math

import pytest
import torch

from mipnerf_fast import metrics


def test_psnr_by_hand() -> None:
    a = torch.zeros(2, 4, 5, 3)
    b = torch.stack([torch.full((4, 5, 3), 0.1), torch.full((4, 5, 3), 0.01)])
    torch.testing.assert_close(metrics.psnr(a, b), torch.tensor([20.0, 40.0]))
    assert metrics.psnr(a, a).tolist() == [math.inf, math.inf]


def test_ssim_of_equal_images_is_one_and_of_noise_is_low() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 24, 20, 3, generator=g, dtype=torch.float64)
    assert metrics.ssim(a, a).item() == pytest.approx(1, abs=1e-12)
    assert abs(metrics.ssim(a, b).item()) < 0.2
    assert metrics.ssim(a.expand(2, 3, 24, 20, 3), b.expand(2, 3, 24, 20, 3)).shape == (2, 3)


def test_ssim_of_constant_images_is_the_luminance_term() -> None:
    a, b = torch.full((11, 11, 3), 0.3).double(), torch.full((11, 11, 3), 0.6).double()
    want = (2 * 0.3 * 0.6 + 1e-4) / (0.3**2 + 0.6**2 + 1e-4)
    assert metrics.ssim(a, b).item() == pytest.approx(want, rel=1e-9)


def test_average_error() -> None:
    want = (10**-3.0 * math.sqrt(0.1) * 0.05) ** (1 / 3)
    assert metrics.average_error(30.0, 0.9, 0.05) == pytest.approx(want)
    assert metrics.average_error(math.inf, 1.0, 0.0) == 0.0


def test_bad_images_are_named() -> None:
    with pytest.raises(ValueError, match=r"psnr: expected .* got \[4, 4, 3\] and \[4, 5, 3\]"):
        metrics.psnr(torch.zeros(4, 4, 3), torch.zeros(4, 5, 3))
    with pytest.raises(ValueError, match="at least 11 x 11, got 10 x 20"):
        metrics.ssim(torch.zeros(10, 20, 3), torch.zeros(10, 20, 3))
