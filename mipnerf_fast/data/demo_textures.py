"""Procedural colours of the built-in scene: marble, wood, a checkerboard with a dial, stripes, graduations.

A texture takes points [3, n] in its solid's own frame and world normals [3, n], float32, and returns linear
colours [3, n].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # float32 throughout; numpy's own annotations lose that in arithmetic
Texture = Callable[[Array, Array], Array]


def column(*values: float) -> Array:
    """A colour or a vector that broadcasts against [3, n]."""
    return np.array(values, np.float32)[:, None]


def mix(a: Array, b: Array, weight: Array) -> Array:
    """a where weight is 0, b where it is 1."""
    mixture: Array = a + (b - a) * weight
    return mixture


def smoothstep(low: float, high: float, x: Array) -> Array:
    """0 below low, 1 above high, 3 s^2 - 2 s^3 between."""
    s: Array = np.clip((x - np.float32(low)) / np.float32(high - low), 0, 1)
    smooth: Array = s * s * (3 - 2 * s)
    return smooth


@lru_cache(maxsize=1)
def _lattice() -> Array:
    """Random values on a periodic 32^3 lattice, from an integer hash: the same everywhere."""
    x = np.arange(32**3, dtype=np.uint64) * np.uint64(0x9E3779B1) + np.uint64(1)
    mask = np.uint64(0xFFFFFFFF)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        x = ((x & mask) ^ ((x & mask) >> np.uint64(shift))) * np.uint64(factor)
    x &= mask
    return ((x ^ (x >> np.uint64(15))).astype(np.float64) / 2**31 - 1).astype(np.float32)


def _noise(point: Array) -> Array:
    """Smooth value noise in [-1, 1]: [n]."""
    table = _lattice()
    base = np.floor(point)
    f = point - base
    f = f * f * (3 - 2 * f)
    x0, y0, z0 = base.astype(np.int32) & 31
    x1, y1, z1 = (x0 + 1) & 31, (y0 + 1) & 31, (z0 + 1) & 31
    rows = []
    for x in (x0 * 1024, x1 * 1024):
        columns = []
        for y in (y0 * 32, y1 * 32):
            cell = x + y
            low = table[cell + z0]
            columns.append(low + (table[cell + z1] - low) * f[2])
        rows.append(columns[0] + (columns[1] - columns[0]) * f[1])
    value: Array = rows[0] + (rows[1] - rows[0]) * f[0]
    return value


def _fractal(point: Array, octaves: int) -> Array:
    total, weight = np.zeros(point.shape[1], np.float32), np.float32(0.5)
    for _ in range(octaves):
        total += weight * _noise(point)
        point, weight = point * np.float32(2.03) + np.float32(7.3), weight * np.float32(0.5)
    return total


def plain(*rgb: float) -> Texture:
    colour = column(*rgb)
    return lambda point, normal: np.broadcast_to(colour, point.shape).astype(np.float32)


def _palette(position: Array, stops: Sequence[tuple[float, ...]]) -> Array:
    """Piecewise linear colour ramp; position in [0, 1]."""
    at = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(position, at, [stop[c] for stop in stops]) for c in range(3)]).astype(
        np.float32
    )


def planet(point: Array, normal: Array) -> Array:
    """Bands of marble, stirred by noise."""
    p = point * np.float32(4.2)
    stir = np.stack([_fractal(p, 2), _fractal(p + np.float32(11.5), 2), _fractal(p - np.float32(5.1), 2)])
    swirl = _fractal(p + 2.4 * stir, 4)
    bands = 0.5 + 0.5 * np.sin(13 * point[2] + 5.0 * swirl + 1.5 * stir[0])
    return _palette(
        bands,
        [
            (0.010, 0.045, 0.130),
            (0.020, 0.190, 0.300),
            (0.120, 0.480, 0.500),
            (0.900, 0.780, 0.560),
            (0.760, 0.280, 0.080),
            (0.230, 0.040, 0.020),
        ],
    )


def wood(point: Array, normal: Array) -> Array:
    """Growth rings around a tilted axis, with grain."""
    x, y, z = point
    u, v = x + 0.35 * y + 0.23, z - 0.2 * y + 0.31
    wobble = _noise(point * column(5, 1.6, 5)) * np.float32(0.035)
    ring = np.sqrt(u * u + v * v) + wobble
    tooth = ring * 26 - np.floor(ring * 26)
    late = smoothstep(0.25, 0.95, tooth) * (1 - smoothstep(0.95, 1.0, tooth))
    grain = 0.88 + 0.12 * _noise(point * column(70, 6, 70))
    return mix(column(0.66, 0.35, 0.13), column(0.27, 0.095, 0.028), late) * grain


def candy(point: Array, normal: Array) -> Array:
    """Twelve spiral stripes around the tube of the torus lying on the board."""
    x, y, z = point
    around = np.arctan2(y, x)
    tube = np.arctan2(z, np.sqrt(x * x + y * y) - np.float32(0.135))
    stripe = np.sin(12 * around + 2 * tube) > 0
    return np.where(stripe, column(0.86, 0.83, 0.78), column(0.70, 0.035, 0.055))


def graduated(marks: int, share: float, dark: Sequence[float], light: Sequence[float]) -> Texture:
    """Marks around a ring: `share` of each division is dark."""

    def texture(point: Array, normal: Array) -> Array:
        turn = np.arctan2(point[1], point[0]) * np.float32(marks / (2 * math.pi))
        return np.where(turn - np.floor(turn) < share, column(*dark), column(*light))

    return texture


def globe(hue: float, striped: bool) -> Texture:
    """A saturated colour; every other globe has pale meridian stripes."""
    angle = 2 * math.pi * hue
    rgb = [0.42 + 0.42 * math.cos(angle - 2 * math.pi * k / 3) for k in range(3)]
    colour = column(*[0.02 + 0.86 * max(c, 0.0) ** 1.5 for c in rgb])

    def texture(point: Array, normal: Array) -> Array:
        if not striped:
            return np.broadcast_to(colour, point.shape).astype(np.float32)
        stripe = np.sin(np.arctan2(normal[1], normal[0]) * 8) > 0.55
        return np.where(stripe & (np.abs(normal[2]) < 0.8), column(0.88, 0.86, 0.80), colour)

    return texture


IVORY, INK, BRASS = (0.84, 0.77, 0.64), (0.018, 0.030, 0.042), (0.90, 0.52, 0.16)


def board(point: Array, normal: Array) -> Array:
    """The plinth: a checkerboard, a dial with 180 marks, a brass rim, and a fluted side."""
    x, y, _ = point
    rho = np.sqrt(x * x + y * y)
    turn = np.arctan2(y, x) * np.float32(1 / (2 * math.pi))
    cell = np.float32(1 / 0.088)
    odd = (np.floor(x * cell) + np.floor(y * cell)).astype(np.int32) & 1
    cloud = _fractal(np.stack([x, y, 0 * x]) * np.float32(6), 3)
    vein = np.clip(1 - np.abs(cloud) * 14, 0, 1)
    pale = column(*IVORY) * (1 - 0.22 * vein) * (1 + 0.10 * cloud)
    deep = mix(column(0.020, 0.085, 0.105), column(0.22, 0.36, 0.36), 0.6 * vein)
    colour = np.where(odd == 1, deep, pale)
    marks, fifths = turn * 180, turn * 36
    short = (np.abs(marks - np.rint(marks)) < 0.20) & (rho > 0.985)
    long = (np.abs(fifths - np.rint(fifths)) < 0.065) & (rho > 0.955)
    dial = np.where(short | long, column(*INK), column(0.90, 0.86, 0.76))
    colour = np.where(rho > 0.80, dial, colour)
    line = ((rho > 0.795) & (rho < 0.815)) | ((rho > 0.925) & (rho < 0.935)) | (rho > 1.035)
    colour = np.where(line, column(*BRASS) * 0.75, colour)
    band = (rho > 0.815) & (rho < 0.925)
    colour = np.where(band, column(0.045, 0.060, 0.075), colour)
    flute = 0.5 + 0.5 * np.cos(2 * math.pi * 96 * turn)
    walnut = mix(column(0.10, 0.035, 0.015), column(0.55, 0.27, 0.10), flute * flute)
    walnut = np.where(np.abs(point[2]) > 0.042, column(*BRASS) * 0.75, walnut)
    return np.where(np.abs(normal[2]) > 0.5, colour, walnut).astype(np.float32)
