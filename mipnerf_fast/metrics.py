"""Image quality: PSNR, SSIM and the average error of the mip-NeRF paper."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def _check_pair(name: str, a: Tensor, b: Tensor, at_least: int = 1) -> None:
    if a.shape != b.shape or a.dim() < 3 or a.shape[-1] != 3:
        raise ValueError(
            f"{name}: expected two tensors [..., H, W, 3], got {list(a.shape)} and {list(b.shape)}"
        )
    if min(a.shape[-3], a.shape[-2]) < at_least:
        raise ValueError(
            f"{name}: images must be at least {at_least} x {at_least}, got {a.shape[-3]} x {a.shape[-2]}"
        )


def mse_to_psnr(mse: Tensor) -> Tensor:
    """-10 log10(mse), for colours in [0, 1]."""
    return -10.0 / math.log(10.0) * torch.log(mse)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """The peak signal-to-noise ratio, -10 log10(mean (a - b)^2), one value per image.

    Args:
        a, b: [..., H, W, 3], nominally in [0, 1]; not clipped, as in the original.

    Returns:
        [...] in dB; +inf for equal images.

    Source: algorithm 1.11.
    """
    _check_pair("psnr", a, b)
    return mse_to_psnr(((a - b) ** 2).mean((-3, -2, -1)))


def ssim(a: Tensor, b: Tensor, filter_size: int = 11, filter_sigma: float = 1.5) -> Tensor:
    """The structural similarity with an 11-tap Gaussian window, valid windows only, mean over channels.

    With local means m, variances v >= 0 and covariance |c| <= sqrt(v_a v_b):
    (2 m_a m_b + 0.01^2)(2 c + 0.03^2) / ((m_a^2 + m_b^2 + 0.01^2)(v_a + v_b + 0.03^2)).

    Args:
        a, b: [..., H, W, 3] in [0, 1], at least filter_size pixels each way.

    Returns:
        [...], one value per image.

    Source: algorithm 1.11; Wang et al. 2004. Ports that pad the image report a different number.
    """
    _check_pair("ssim", a, b, filter_size)
    taps = torch.arange(filter_size, dtype=a.dtype, device=a.device) - (filter_size - 1) / 2
    window = torch.exp(-0.5 * (taps / filter_sigma) ** 2)
    window = window / window.sum()

    def blur(image: Tensor) -> Tensor:
        flat = image.movedim(-1, -3).reshape(-1, 1, *image.shape[-3:-1])
        flat = functional.conv2d(flat, window[None, None, :, None])
        return functional.conv2d(flat, window[None, None, None, :])

    mean_a, mean_b = blur(a), blur(b)
    var_a = torch.clamp(blur(a * a) - mean_a**2, min=0)
    var_b = torch.clamp(blur(b * b) - mean_b**2, min=0)
    limit = torch.sqrt(var_a * var_b)
    cov = torch.minimum(torch.maximum(blur(a * b) - mean_a * mean_b, -limit), limit)
    c1, c2 = 0.01**2, 0.03**2
    numerator = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    denominator = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return (numerator / denominator).mean((-3, -2, -1)).reshape(*a.shape[:-3], 3).mean(-1)


def average_error(psnr: float | Tensor, ssim: float | Tensor, lpips: float | Tensor) -> float:
    """The geometric mean of 10^(-PSNR/10), sqrt(1 - SSIM) and LPIPS, of metrics already averaged over images.

    Source: algorithm 1.11; Barron et al. 2021, section 5.
    """
    terms = [10 ** (-float(psnr) / 10), math.sqrt(1 - float(ssim)), float(lpips)]
    if min(terms) <= 0:
        return 0.0
    return math.exp(sum(math.log(term) for term in terms) / 3)
