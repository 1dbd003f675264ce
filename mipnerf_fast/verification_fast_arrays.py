"""The arrays of the fast model's operations for `verify`: on them rounding decides nothing but roundings.

Rays and points keep away from the faces of cells, where the last bit of a position decides what is found.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from .verification_case import Tensors

GRID = reference.hash_grid(levels=4, coarsest=4, finest=40, table_size=2**9)
CELLS, FEATURES, CUTOFF = 32, 4, 0.02
MARCH = {"box_half": 1.5, "step_scale": 1.0, "min_step": 0.01, "max_step": 0.05}
_WIDTH = 24
# How far, in cells, points and the middles of samples stay from the faces that matter. Positions in cells are at most
# 40 and are sums of some hundred steps: in float32 they are right to 100 x 40 x 2^-24 = 2.4e-4.
_MARGIN = 1e-3


def _rounded(arrays: Tensors) -> Tensors:
    """The values that float32 holds, in float64; integers as they are."""
    return {
        name: value.float().double() if value.is_floating_point() else value for name, value in arrays.items()
    }


def _rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def points(generator: torch.Generator, count: int = 600) -> Tensors:
    """Gaussians in the unit cube, and tables."""
    points, scales = _rand(generator, count, 3), 10 ** (-4 + 3.5 * _rand(generator, count))
    keep = torch.ones(count, dtype=torch.bool)
    for n in GRID.resolutions:
        keep &= ((points * n - (points * n).round()).abs() > _MARGIN).all(-1)
        for kind in ("gaussian", "erf"):
            keep &= (reference.attenuation(scales, n, kind, 0.0) - CUTOFF).abs() > _MARGIN * CUTOFF
    return _rounded(
        {
            "points": points[keep],
            "scales": scales[keep],
            "tables": _randn(generator, GRID.entries, FEATURES),
        }
    )


def _block() -> tuple[tuple[int, int], ...]:
    """The occupied cells along z, y, x."""
    return ((9, 22), (7, 25), (10, 20))


def _masks() -> list[tuple[Tensor, Tensor]]:
    densities = torch.zeros(CELLS, CELLS, CELLS)
    (z0, z1), (y0, y1), (x0, x1) = _block()
    densities[z0:z1, y0:y1, x0:x1] = 1
    return reference.occupancy_masks(densities, 0.5)


def rays(generator: torch.Generator, count: int = 300) -> Tensors:
    """Rays of many widths towards a block of occupied cells, those whose samples rounding could not move in or out."""
    origins = torch.tensor([0.0, 0.0, 4.0], dtype=torch.float64) + 0.1 * _randn(generator, count, 3)
    directions = torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64) + 0.2 * _randn(generator, count, 3)
    one = torch.ones(count, 1, dtype=torch.float64)
    arrays = _rounded(
        {
            "origins": origins,
            "directions": directions,
            "radii": 0.002 + 0.05 * _rand(generator, count, 1) ** 3,
            "near": 2 * one,
            "far": 6 * one,
            "phase": _rand(generator, count, 1),
            "background": _rand(generator, count, 3),
            "target": _rand(generator, count, 3),
        }
    )
    keep = _unambiguous(arrays)
    return {name: value[keep] for name, value in arrays.items()} | {"masks": reference.pack_masks(_masks())}


def _unambiguous(a: Tensors) -> Tensor:
    """Which rays keep their middles a margin away from the faces of every mask's block, and their number of steps."""
    side, pixel = 2 * MARCH["box_half"], a["radii"] * math.sqrt(3.0)
    enter, leave = reference.box_interval(
        a["origins"], a["directions"], a["near"], a["far"], MARCH["box_half"]
    )
    width = (0.5 * (enter + leave))[:, None] * pixel / side * CELLS
    edges = torch.tensor([0.75, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)  # of `reference.mask_for_width`
    keep = ((width - edges).abs() > _MARGIN).all(-1)

    def step(t: Tensor) -> Tensor:
        return torch.clamp(MARCH["step_scale"] * pixel[:, 0] * t, MARCH["min_step"], MARCH["max_step"])

    t = enter + a["phase"][:, 0] * step(enter)
    faces = [
        torch.tensor([face / mask.shape[0] for face in _faces(mask, axis)], dtype=torch.float64)
        for mask, _ in _masks()
        for axis in range(3)
    ]
    while bool((t < leave).any()):
        middle = t + 0.5 * step(t)
        x = (a["origins"] + middle[:, None] * a["directions"] + MARCH["box_half"]) / side
        for number, positions in enumerate(faces):
            apart = (x[:, number % 3, None] - positions).abs() * CELLS
            keep &= (apart > _MARGIN).all(-1)
        t = t + step(t)
        keep &= (t - leave).abs() > _MARGIN / CELLS
    return keep


def _faces(mask: Tensor, axis: int) -> list[int]:
    """Where a mask's occupied block begins and ends along an axis (0 is x, the mask's last); the box's sides too."""
    along = mask.amax(tuple(d for d in range(3) if d != 2 - axis)).nonzero()[:, 0]
    return [0, int(along[0]), int(along[-1]) + 1, mask.shape[0]]


def _networks(generator: torch.Generator, layers: int) -> Tensors:
    inputs = reference.density_inputs(len(GRID.resolutions) * FEATURES)
    arrays = {
        # Numbers of float16: tables in it hold the same.
        "tables": (0.5 * _randn(generator, GRID.entries, FEATURES)).half().double(),
        "density_in": _randn(generator, _WIDTH, inputs) * math.sqrt(2 / inputs),
        "density_out": _randn(generator, 16, _WIDTH) * math.sqrt(2 / _WIDTH),
        "colour_in": _randn(generator, _WIDTH, 32) * 0.25,
        "colour_out": _randn(generator, 3, _WIDTH) * math.sqrt(2 / _WIDTH),
    }
    if layers == 2:
        arrays["colour_hidden"] = _randn(generator, _WIDTH, _WIDTH) * math.sqrt(2 / _WIDTH)
    return arrays


def scene(layers: int, generator: torch.Generator) -> Tensors:
    """Rays and a model."""
    return rays(generator) | _rounded(_networks(generator, layers))


def occupancy(generator: torch.Generator) -> Tensors:
    """A model and the densities of its occupancy grid."""
    densities = (2 * _rand(generator, CELLS, CELLS, CELLS)).float().double()
    return scene(1, generator) | {"densities": densities}


def samples(layers: int, generator: torch.Generator) -> Tensors:
    """Inputs of the networks and their weights."""
    samples, rays = 333, 20
    directions = torch.nn.functional.normalize(_randn(generator, rays, 3), dim=-1)
    arrays = _networks(generator, layers)
    del arrays["tables"]
    return _rounded(
        arrays
        | {
            "features": _randn(generator, samples, len(GRID.resolutions) * FEATURES + 3),
            "harmonics": reference.spherical_harmonics(directions),
            "rays": torch.randint(rays, (samples,), generator=generator),
        }
    )


def packed(generator: torch.Generator) -> Tensors:
    """Samples of rays of many lengths, none and one among them."""
    counts = torch.randint(0, 60, (50,), generator=generator)
    counts[3], counts[4] = 0, 1
    samples = int(counts.sum())
    density = 20 * _rand(generator, samples) ** 2
    density[::7] = 0
    return _rounded(
        {
            "rgb": _rand(generator, samples, 3),
            "density": density,
            "lengths": 0.02 + 0.02 * _rand(generator, samples),
            "middles": 2 + 4 * _rand(generator, samples),
            "ray_starts": torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            "background": _rand(generator, 50, 3),
            "near": torch.full((50, 1), 2.0, dtype=torch.float64),
        }
    )


def source(generator: torch.Generator) -> Tensors:
    """Images of two scales with alpha, as `PixelSource` has them."""
    heights, widths = torch.tensor([6, 3, 6, 3]), torch.tensor([8, 4, 8, 4])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (heights * widths).cumsum(0)])
    return {
        "pixels": torch.randint(256, (int(offsets[-1]), 4), generator=generator, dtype=torch.uint8),
        "offsets": offsets,
        "heights": heights,
        "widths": widths,
        "c2w": _randn(generator, 4, 3, 4).float().double(),
        "focals": torch.tensor([10.0, 5.0, 10.0, 5.0], dtype=torch.float64),
        "nears": torch.full((4,), 2.0, dtype=torch.float64),
        "fars": torch.full((4,), 6.0, dtype=torch.float64),
        "order": torch.tensor([0, 2, 1, 3]),
        "group_ends": torch.tensor([2, 4]),
        "group_shares": torch.tensor([0.625, 1.0], dtype=torch.float64),
    }


def moments(generator: torch.Generator) -> Tensors:
    """The state of Adam."""
    count = 1003
    gradient = _randn(generator, count)
    gradient[::3] = 0
    return _rounded(
        {
            "values": _randn(generator, count),
            "gradient": gradient,
            "moment1": 0.1 * _randn(generator, count),
            "moment2": 0.01 * _rand(generator, count),
        }
    )
