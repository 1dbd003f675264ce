"""Positional encodings: plain, and integrated over a Gaussian (paper, equations 9 to 14)."""

from __future__ import annotations

import torch
from torch import Tensor


def _check_degrees(name: str, min_deg: int, max_deg: int) -> None:
    if not 0 <= min_deg < max_deg:
        raise ValueError(f"{name}: degrees must satisfy 0 <= min_deg < max_deg, got {min_deg} and {max_deg}")


def _scales(x: Tensor, min_deg: int, max_deg: int) -> Tensor:
    """2^min_deg ... 2^(max_deg - 1), as a column that multiplies [..., 1, 3]."""
    return 2.0 ** torch.arange(min_deg, max_deg, dtype=x.dtype, device=x.device)[:, None]


def pos_enc(x: Tensor, min_deg: int, max_deg: int, append_identity: bool = True) -> Tensor:
    """The positional encoding [x, sin(2^i x), cos(2^i x)] for i = min_deg ... max_deg - 1 (equation 1).

    Args:
        x: [..., C].
        min_deg, max_deg: the octaves, max_deg excluded.
        append_identity: whether x itself comes first.

    Returns:
        [..., C (2 (max_deg - min_deg) + 1)] (without identity one C less): all sines, octave-major with the
        channels inside, then all cosines; differentiable.

    Source: algorithm 1.4. The original writes the cosine as sin(y + pi/2), which in float32 is off by up to
    |y| 2^-24; here it is a cosine.
    """
    if min_deg == max_deg and append_identity:
        return x
    _check_degrees("pos_enc", min_deg, max_deg)
    y = (x[..., None, :] * _scales(x, min_deg, max_deg)).flatten(-2)
    parts = [x] if append_identity else []
    return torch.cat([*parts, torch.sin(y), torch.cos(y)], -1)


def integrated_pos_enc(means: Tensor, variances: Tensor, min_deg: int, max_deg: int) -> Tensor:
    """The expected positional encoding of a Gaussian (equation 14).

    E[sin(2^i x)] = exp(-4^i var / 2) sin(2^i mean), the cosine alike, for i = min_deg ... max_deg - 1: octaves
    whose period is small against the Gaussian fade out.

    Args:
        means: [B, N, 3].
        variances: [B, N, 3], or covariances [B, N, 3, 3], of which the encoding uses the diagonal only.
        min_deg, max_deg: the octaves, max_deg excluded.

    Returns:
        [B, N, 6 (max_deg - min_deg)]: all sines, octave-major with xyz inside, then all cosines; differentiable.

    Source: algorithm 1.4; Barron et al. 2021, equations 9 to 14.
    """
    _check_degrees("integrated_pos_enc", min_deg, max_deg)
    if variances.dim() == means.dim() + 1:
        variances = torch.diagonal(variances, dim1=-2, dim2=-1)
    scales = _scales(means, min_deg, max_deg)
    y = (means[..., None, :] * scales).flatten(-2)
    attenuation = torch.exp(-0.5 * (variances[..., None, :] * scales**2).flatten(-2))
    return torch.cat([attenuation * torch.sin(y), attenuation * torch.cos(y)], -1)
