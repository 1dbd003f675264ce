"""The occupancy grid of the fast model: from densities to masks of bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

PYRAMID_LEVELS = 5


class MaskLayout(NamedTuple):
    """One mask: cells per side, cells per side of the four times coarser one, offsets of both in 32-bit words."""

    cells: int
    skip_cells: int
    words: int
    skip_words: int


def occupancy_layout(resolution: int) -> list[MaskLayout]:
    """Where the masks of a grid of resolution^3 cells lie: mask 0, then the levels of the dilated pyramid."""
    layout, words = [], 0
    for level in [0, *range(PYRAMID_LEVELS)]:
        cells = resolution >> level
        skip = cells // 4 if cells % 4 == 0 else 1
        skip_at = words + (cells**3 + 31) // 32
        layout.append(MaskLayout(cells, skip, words, skip_at))
        words = skip_at + (skip**3 + 31) // 32
    return layout


def occupancy_words(resolution: int) -> int:
    """Length of the masks of a grid, in 32-bit words."""
    last = occupancy_layout(resolution)[-1]
    return last.skip_words + (last.skip_cells**3 + 31) // 32


def occupancy_threshold(densities: Tensor, max_threshold: float) -> Tensor:
    """The density above which a cell is occupied: min(max_threshold, mean of min(density, 4 max_threshold))."""
    return torch.clamp(torch.clamp(densities, max=4 * max_threshold).mean(), max=max_threshold)


def occupancy_masks(densities: Tensor, threshold: Tensor | float) -> list[tuple[Tensor, Tensor]]:
    """The masks of a grid and, beside each, the coarser one with which empty space is skipped.

    Mask 0 is density > threshold; mask 1 + l is that max-pooled by 2^l and dilated by one cell in every direction.

    Args:
        densities: [R, R, R], z first, x last.

    Returns:
        Six pairs of boolean tensors.
    """
    occupied = densities > threshold
    pooled = [occupied[None, None].float()]
    for _ in range(PYRAMID_LEVELS - 1):
        pooled.append(functional.max_pool3d(pooled[-1], 2))
    masks = [pooled[0]] + [functional.max_pool3d(level, 3, stride=1, padding=1) for level in pooled]
    pairs = []
    for mask, layout in zip(masks, occupancy_layout(densities.shape[0]), strict=True):
        skip = functional.max_pool3d(mask, layout.cells // layout.skip_cells)
        pairs.append((mask[0, 0] > 0, skip[0, 0] > 0))
    return pairs


def pack_masks(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The masks as int32 words, bit i of word w being cell 32 w + i: [words]."""
    words = []
    for mask in (mask for pair in pairs for mask in pair):
        bits = mask.reshape(-1).to(torch.int64)
        bits = functional.pad(bits, (0, -bits.shape[0] % 32)).reshape(-1, 32)
        word = (bits << torch.arange(32, device=bits.device)).sum(-1)
        words.append(torch.where(word >= 2**31, word - 2**32, word).to(torch.int32))
    return torch.cat(words)


def unpack_masks(words: Tensor, resolution: int) -> list[tuple[Tensor, Tensor]]:
    """The inverse of `pack_masks`."""

    def unpack(first: int, cells: int) -> Tensor:
        part = words[first : first + (cells**3 + 31) // 32].to(torch.int64)
        bits = (part[:, None] >> torch.arange(32, device=words.device)) & 1
        return bits.reshape(-1)[: cells**3].reshape(cells, cells, cells) > 0

    return [
        (unpack(mask.words, mask.cells), unpack(mask.skip_words, mask.skip_cells))
        for mask in occupancy_layout(resolution)
    ]
