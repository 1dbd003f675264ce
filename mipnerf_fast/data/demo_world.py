"""The world of the built-in scene: its solids, textures and light, ray traced analytically with numpy.

An orrery on a round plinth: a marble planet inside three rings, twelve coloured globes on thin rods, a wooden
box and a striped torus on a fine checkerboard. Everything lies in [-1.2, 1.2]^3. Vectors are float32 arrays
[3, n]; a ray is origin + t * direction with a unit direction.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mipnerf_fast.data.demo_solids import FAR, Cylinder, Material, RoundedBox, Solid, Sphere, Torus, dot, unit
from mipnerf_fast.data.demo_textures import (
    BRASS,
    INK,
    Array,
    board,
    candy,
    column,
    globe,
    graduated,
    mix,
    plain,
    planet,
    smoothstep,
    wood,
)

# ---- the scene --------------------------------------------------------------------------------

FLOOR = -0.46  # height of the board
_TRIM = Material(plain(*BRASS), gloss=0.9, sharpness=40, metal=0.65)


@lru_cache(maxsize=1)
def solids() -> tuple[Solid, ...]:
    """Every solid of the world."""
    world: list[Solid] = [
        Cylinder(0, 0, FLOOR - 0.115, FLOOR, 1.06, Material(board, gloss=0.04, sharpness=40)),
        Sphere((0, 0, 0.29), 0.43, Material(planet, gloss=0.45, sharpness=110)),
        Cylinder(0, 0, FLOOR, FLOOR + 0.05, 0.20, Material(wood, gloss=0.2)),
        Cylinder(0, 0, FLOOR + 0.05, FLOOR + 0.075, 0.15, _TRIM),
        Cylinder(0, 0, FLOOR + 0.05, -0.1, 0.045, _TRIM),
        Torus((0, 0, 0.29), 0.62, 0.017, 0.42, 0.6, _TRIM),
        Torus(
            (0, 0, 0.29),
            0.67,
            0.017,
            1.25,
            2.5,
            Material(graduated(72, 0.42, INK, (0.90, 0.86, 0.78)), gloss=0.5, sharpness=50),
        ),
        Torus((0, 0, 0.29), 0.72, 0.017, 1.35, 4.3, _TRIM),
        Torus((0.47, -0.40, FLOOR + 0.055), 0.135, 0.055, 0.0, 0.0, Material(candy, gloss=0.5, sharpness=90)),
        RoundedBox(
            (-0.47, -0.42, FLOOR + 0.125), (0.125, 0.125, 0.125), 0.025, 0.5, Material(wood, gloss=0.25)
        ),
        RoundedBox(
            (-0.30, 0.56, FLOOR + 0.07),
            (0.14, 0.09, 0.07),
            0.03,
            -0.4,
            Material(plain(0.10, 0.16, 0.42), gloss=0.4, sharpness=80),
        ),
        Sphere((0.46, 0.47, FLOOR + 0.11), 0.11, Material(plain(0.88, 0.85, 0.80), gloss=0.5, sharpness=140)),
    ]
    for k in range(12):
        angle = 2 * math.pi * (k + 0.5) / 12
        x, y = 0.87 * math.cos(angle), 0.87 * math.sin(angle)
        top = FLOOR + 0.38 + 0.13 * math.sin(3 * angle)
        world.append(Cylinder(x, y, FLOOR, top, 0.0095, _TRIM))
        world.append(
            Sphere((x, y, top), 0.072, Material(globe(k / 12, k % 2 == 1), gloss=0.6, sharpness=130))
        )
    return tuple(world)


# ---- light ------------------------------------------------------------------------------------

_SUN = unit(column(0.50, -0.42, 0.80))
_REACH = 1.2  # everything lies between -1.2 and 1.2
_CUBE = 0.15  # the side of the cubes of space by which points are grouped
_POINTS_AT_ONCE = 8192  # whose numbers a processor's cache holds
_OFFSET = np.float32(2e-3)  # how far shadow rays start above the surface
_SUN_RADIUS = 0.075  # tangent of the sun's angular radius: the width of penumbrae
_SUN_COLOUR = column(2.75, 2.45, 2.05)
_SKY, _HORIZON, _GROUND = column(0.60, 0.78, 1.12), column(0.95, 0.95, 0.95), column(0.42, 0.36, 0.30)


@lru_cache(maxsize=1)
def _sun_axes() -> Array:
    """Level, upwards, and towards the middle of the sun: the rows of a rotation [3, 3]."""
    side = unit(np.cross(_SUN[:, 0], [0, 0, 1]))
    axes: Array = np.stack([side, np.cross(side, _SUN[:, 0]), _SUN[:, 0]]).astype(np.float32)
    return axes


def sun_directions(count: int) -> Array:
    """Directions spread evenly over the sun's disc: [3, count]."""
    k = np.arange(count)
    radius, angle = _SUN_RADIUS * np.sqrt((k + 0.5) / count), k * math.pi * (3 - math.sqrt(5))
    side = unit(np.cross(_SUN[:, 0], [0, 0, 1])[:, None])
    up = np.cross(side[:, 0], _SUN[:, 0])[:, None]
    return unit(_SUN + radius * np.cos(angle) * side + radius * np.sin(angle) * up).astype(np.float32)


def _surroundings(direction: Array) -> Array:
    """Colour of the sky and the ground that metals reflect."""
    height = direction[2]
    above = mix(_HORIZON, _SKY, smoothstep(0.0, 0.7, height))
    return mix(_GROUND, above, smoothstep(-0.15, 0.10, height))


@dataclass(frozen=True)
class Patches:
    """Points [3, n] in groups that lie close together on one solid, so that most can be passed over as a whole.

    begin, count: where the points of each group begin and how many they are; owner: the number of its solid.
    """

    points: Array
    begin: NDArray[np.intp]
    count: NDArray[np.intp]
    owner: NDArray[np.intp]

    def bounds(self, coordinate: Array) -> tuple[Array, Array]:
        """The least and the largest of a number [n] of each point: [groups] each."""
        return np.minimum.reduceat(coordinate, self.begin), np.maximum.reduceat(coordinate, self.begin)

    def members(self, groups: NDArray[np.bool_]) -> NDArray[np.intp]:
        """The points of the groups that are marked."""
        begin, count = self.begin[groups], self.count[groups]
        before = np.cumsum(count) - count
        members: NDArray[np.intp] = np.arange(count.sum()) + np.repeat(begin - before, count)
        return members


def _patch_order(points: Array, owner: Array) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Sorts points by solid and, within one, by cubes of space: their order, and where each group begins in it."""
    x, y, z = np.floor((points + _REACH) / np.float32(_CUBE)).astype(np.int32)
    cubes = math.ceil(2 * _REACH / _CUBE)
    key = ((owner * cubes + x) * cubes + y) * cubes + z
    order = np.argsort(key, kind="stable")
    return order, np.flatnonzero(np.diff(key[order], prepend=-1))


def _open_sky(patches: Patches, normals: Array) -> Array:
    """Ambient occlusion in closed form: [n], the share of the sky that nothing hides.

    A ball of radius r at distance d hides cos(angle) r^2 / d^2; 1/25 less here, so nothing from 5 r on.
    """
    light = np.ones(normals.shape[1], np.float32)
    bounds = [patches.bounds(row) for row in patches.points]
    for index, ball in enumerate(solids()):
        # rods and rings are too thin to hide much of the sky, and the plinth is the ground itself
        if ball.bound >= 0.5 or isinstance(ball, Cylinder):
            continue
        reach = ball.bound if isinstance(ball, Sphere) else np.float32(0.8) * ball.bound
        # how far each group's box is from the middle of the ball
        gaps = [
            np.maximum(np.maximum(low - c, c - high), 0)
            for c, (low, high) in zip(ball.centre, bounds, strict=True)
        ]
        close = gaps[0] ** 2 + gaps[1] ** 2 + gaps[2] ** 2 < 25 * reach * reach
        some = patches.members(close & (patches.owner != index))
        offset = ball.centre - patches.points[:, some]
        square = dot(offset, offset)
        cosine = np.maximum(dot(offset, normals[:, some]), 0) / np.sqrt(square)
        hidden = cosine * np.maximum(reach * reach / square - np.float32(0.04), 0)
        light[some] *= 1 - np.where(square > reach * reach * np.float32(1.0001), hidden, 0)
    return light


def _shaded(patches: Patches, sun: Array) -> NDArray[np.bool_]:
    """Which points do not see the sun, each in its own direction; points on the side away from it are not asked."""
    dark = np.zeros(sun.shape[1], bool)
    axes = _sun_axes()
    bounds = [patches.bounds(dot(axis[:, None], patches.points)) for axis in axes]
    for index, solid in enumerate(solids()):
        # Its boxes as the sun sees them, wider by what the disc of the sun lets a ray stray on its way there.
        centres, extents = axes @ solid.boxes[0], np.abs(axes) @ solid.boxes[1]
        top = (centres + extents)[2][:, None]
        stray = 1.01 * _SUN_RADIUS * np.maximum(top - bounds[2][0], 0) + 1e-3
        close = bounds[2][0] < top
        for centre, extent, (low, high) in zip(
            centres[:2, :, None], extents[:2, :, None], bounds[:2], strict=True
        ):
            close &= (low < centre + extent + stray) & (high > centre - extent - stray)
        groups = close.any(0)
        if solid.is_convex:
            groups &= patches.owner != index
        some = patches.members(groups)
        some = some[~dark[some]]
        if some.size:
            dark[some] = solid.hit(patches.points[:, some], sun[:, some]) < FAR
    return dark


def meet(
    origin: Array, directions: Array, candidates: Sequence[NDArray[np.intp]]
) -> tuple[NDArray[np.intp], Array, Array]:
    """Which rays from one point meet a solid, which one first, and where.

    Args:
        origin: [3, 1].
        directions: [3, n], unit length.
        candidates: for each solid, the rays that may meet it.

    Returns:
        The numbers of the rays that meet one, of the solids they meet, and their t: [hits] each.
    """
    best = np.full(directions.shape[1], FAR, np.float32)
    which = np.full(directions.shape[1], -1, np.int32)
    for index, (solid, rays) in enumerate(zip(solids(), candidates, strict=True)):
        t = solid.hit(origin, directions[:, rays])
        closer = np.flatnonzero(t < best[rays])
        rays = rays[closer]
        best[rays], which[rays] = t[closer], index
    seen = np.flatnonzero(which >= 0)
    return seen, which[seen], best[seen]


def colours(origin: Array, directions: Array, which: Array, t: Array, sun: Array) -> Array:
    """What rays see where they meet solids: display colours in [0, 1], [3, n].

    Args:
        origin: [3, 1].
        directions: [3, n].
        which, t: [n], the number of the solid that each meets, and where.
        sun: [3, n], the direction towards the point of the sun that lights each ray.
    """
    points: Array = origin + t * directions
    seen: Array = np.empty_like(points)
    if not t.size:
        return seen
    order, begin = _patch_order(points, which)
    points, directions, which, sun = points[:, order], directions[:, order], which[order], sun[:, order]
    normals, paint = np.empty_like(points), np.empty_like(points)
    for mine in _pieces(np.flatnonzero(np.diff(which, prepend=-1)), which.size):
        solid = solids()[which[mine.start]]
        normal = solid.normal(points[:, mine])
        normals[:, mine] = normal
        paint[:, mine] = solid.material.texture(solid.local(points[:, mine]), normal)
    count = np.diff(begin, append=which.size)
    sky = _open_sky(Patches(points, begin, count, which[begin]), normals)
    sunlight = dot(normals, sun)
    raised = Patches(points + _OFFSET * normals, begin, count, which[begin])
    sunlight[_shaded(raised, sun) | (sunlight < 0)] = 0
    materials = [solid.material for solid in solids()]
    looks = np.array([[m.gloss, m.sharpness, m.metal] for m in materials], np.float32).T
    for some in _pieces(np.zeros(1, np.intp), which.size):
        gloss, sharpness, metal = looks[:, which[some]]
        surface = (paint[:, some], normals[:, some], sky[some], sunlight[some])
        seen[:, order[some]] = _lit(*surface, directions[:, some], sun[:, some], gloss, sharpness, metal)
    return seen


def _pieces(begin: NDArray[np.intp], end: int) -> Iterator[slice]:
    """Runs that begin at the numbers given, in pieces that a processor's cache holds."""
    for first, last in itertools.pairwise([*begin.tolist(), end]):
        for at in range(first, last, _POINTS_AT_ONCE):
            yield slice(at, min(at + _POINTS_AT_ONCE, last))


def _lit(
    paint: Array,
    normals: Array,
    sky: Array,
    sunlight: Array,
    directions: Array,
    sun: Array,
    gloss: Array,
    sharpness: Array,
    metal: Array,
) -> Array:
    """Display colours of points: their own [3, n], and what of the sky [n] and of the sun [n] reaches them."""
    half = unit(sun - directions)
    shine = np.maximum(dot(normals, half), 0) ** sharpness * gloss * (sunlight > 0)
    away = dot(normals, directions)
    mirror = directions - 2 * away * normals
    facing_eye = np.clip(-away, 0, 1)
    fresnel = 0.03 + 0.5 * (1 - facing_eye) ** 5 * gloss
    up = 0.5 + 0.5 * normals[2]
    ambient = mix(_GROUND * 0.9, _SKY * 0.52, up) * sky
    diffuse = paint * (ambient + _SUN_COLOUR * (1 / math.pi) * 1.4 * sunlight)
    reflected = _surroundings(mirror) * sky
    light = diffuse * (1 - metal) + metal * paint * reflected * 1.1
    light += reflected * fresnel * (1 - metal)
    light += _SUN_COLOUR * shine * mix(np.ones((3, 1), np.float32), paint, metal)
    # exposure, a filmic curve and gamma 2
    light *= np.float32(0.74)
    light = light * (2.51 * light + 0.03) / (light * (2.43 * light + 0.59) + 0.14)
    display: Array = np.sqrt(np.clip(light, 0, 1)).astype(np.float32)
    return display
