"""The scale-aware hash encoding: the levels of a grid fade where a Gaussian is wider than their cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_PRIMES = (1, 2654435761, 805459861)
_MASK32 = 0xFFFFFFFF


class HashGrid(NamedTuple):
    """How the levels of a hash grid share one table.

    resolutions: cells per side of each level. offsets: each level's first entry. is_dense: whether every vertex has
    an entry of its own. table_size: entries of a hashed level, a power of two. entries: of all levels.
    """

    resolutions: tuple[int, ...]
    offsets: tuple[int, ...]
    is_dense: tuple[bool, ...]
    table_size: int
    entries: int


def hash_grid(levels: int, coarsest: int, finest: int, table_size: int) -> HashGrid:
    """The layout of a grid whose resolutions grow in geometric progression (Mueller et al. 2022, equation 2)."""
    steps = max(1, levels - 1)
    return hash_grid_of(
        [round(coarsest * (finest / coarsest) ** (level / steps)) for level in range(levels)], table_size
    )


def hash_grid_of(resolutions: Sequence[int], table_size: int) -> HashGrid:
    """The layout of a grid with these resolutions.

    A level is dense where its (n + 1)^3 vertices fit into table_size; it then takes that many entries, rounded up to
    a multiple of 8.
    """
    offsets, is_dense, entries = [], [], 0
    for n in resolutions:
        vertices = (n + 1) ** 3
        offsets.append(entries)
        is_dense.append(vertices <= table_size)
        entries += (vertices + 7) // 8 * 8 if vertices <= table_size else table_size
    return HashGrid(tuple(resolutions), tuple(offsets), tuple(is_dense), table_size, entries)


def attenuation(scale: Tensor, resolution: int, kind: str, cutoff: float = 0.02) -> Tensor:
    """What a Gaussian of standard deviation s leaves of a level's features, 0 where that is below cutoff.

    gaussian: exp(-2 s^2 n^2), as exp(-variance / 2) attenuates a frequency in integrated positional encoding
    (mip-NeRF, equation 14). erf: erf(1 / (sqrt(8) s n)). none: 1.

    Args:
        scale: s > 0, in units of the grid's side.
        resolution: n, cells per side.

    Returns:
        In the shape of scale; differentiable.
    """
    if kind == "none":
        return torch.ones_like(scale)
    x = scale * resolution
    if kind == "gaussian":
        kept = torch.exp(-2.0 * x * x)
    elif kind == "erf":
        kept = torch.erf(1.0 / (8.0**0.5 * x))
    else:
        raise ValueError(f'attenuation: kind must be "gaussian", "erf" or "none", got {kind!r}')
    return torch.where(kept < cutoff, torch.zeros_like(kept), kept)


def hash_encode(
    points: Tensor,
    scales: Tensor,
    tables: Tensor,
    grid: HashGrid,
    kind: str = "gaussian",
    cutoff: float = 0.02,
) -> Tensor:
    """Features of Gaussians in a multiresolution hash grid.

    feature_l = attenuation_l(s) sum over the 8 corners of the cell of x n_l of their trilinear weight times their
    entry; a corner's index is x + m (y + m z), m = n_l + 1, in a dense level and (x ^ 2654435761 y ^ 805459861 z) mod
    table_size in a hashed one (Mueller et al. 2022, equation 4).

    Args:
        points: [S, 3] in [0, 1], the means.
        scales: [S], standard deviations in units of the grid's side.
        tables: [entries, F].
        grid: see `hash_grid`.
        kind, cutoff: see `attenuation`.

    Returns:
        [S, L F], level-major; differentiable in points (within cells), scales and tables.

    Source: Mueller et al. 2022, section 3; the attenuation: Barron et al. 2021, equation 14, carried over.
    """
    features = []
    for n, offset, is_dense in zip(grid.resolutions, grid.offsets, grid.is_dense, strict=True):
        scaled = points * n
        corner = torch.clamp(scaled.detach().floor().to(torch.int64), 0, n - 1)
        fraction = scaled - corner
        value = torch.zeros(points.shape[0], tables.shape[1], dtype=tables.dtype, device=tables.device)
        for bits in range(8):
            step = torch.tensor([bits & 1, bits >> 1 & 1, bits >> 2 & 1], device=points.device)
            x, y, z = (corner + step).unbind(-1)
            if is_dense:
                index = x + (n + 1) * (y + (n + 1) * z)
            else:
                index = (x ^ (y * _PRIMES[1] & _MASK32) ^ (z * _PRIMES[2] & _MASK32)) & (grid.table_size - 1)
            weight = torch.where(step == 1, fraction, 1 - fraction).prod(-1)
            value = value + weight[:, None] * tables[offset + index]
        features.append(attenuation(scales, n, kind, cutoff)[:, None] * value)
    return torch.cat(features, -1)


def round_to_half(x: Tensor) -> Tensor:
    """To the nearest number of float16, ties to even, in x's own dtype; gradients pass as if it were not there."""
    own = x.detach()
    return x + (own.to(torch.float16).to(x.dtype) - own)


def scale_inputs(scales: Tensor, enabled: bool, low: float, high: float) -> Tensor:
    """[1, q, 0.3 q^2] with q = log2(512 s) / 2, s clamped to [low, high]; [1, 0, 0] where not enabled: [S, 3].

    The clamp keeps the networks within the widths that they were trained on.
    """
    one = torch.ones_like(scales)
    if not enabled:
        return torch.stack([one, torch.zeros_like(one), torch.zeros_like(one)], -1)
    q = 0.5 * torch.log2(512.0 * torch.clamp(scales, low, high))
    return torch.stack([one, q, 0.3 * q * q], -1)


def density_inputs(encoded: int) -> int:
    """Inputs of the density network for so many encoded features: three more, rounded up to a multiple of 4."""
    return (encoded + 3 + 3) // 4 * 4
