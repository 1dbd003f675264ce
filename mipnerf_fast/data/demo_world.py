"""The world of the built-in scene: its solids, textures and light, ray traced analytically with numpy.

An orrery on a round plinth: a marble planet inside three rings, twelve coloured globes on thin rods, a wooden
box and a striped torus on a fine checkerboard. Everything lies in [-1.2, 1.2]^3. Vectors are float32 arrays
[3, n]; a ray is origin + t * direction with a unit direction.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mipnerf_fast.data.demo_textures import (
    BRASS,
    INK,
    Array,
    Texture,
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

_FAR = np.float32(1e9)  # the t of a ray that meets nothing
_OFFSET = np.float32(2e-3)  # how far shadow rays start above the surface


def _dot(a: Array, b: Array) -> Array:
    product: Array = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return product


def _unit(vector: Array) -> Array:
    return vector / np.sqrt(_dot(vector, vector))


@dataclass(frozen=True)
class Material:
    """How a solid looks: its texture (local point, world normal -> colour [3, n]) and its reflection."""

    texture: Texture
    gloss: float = 0.25  # strength of the sun's highlight
    sharpness: float = 60.0  # exponent of the highlight
    metal: float = 0.0  # share of the light that is tinted reflection of the surroundings


class Solid(ABC):
    """A closed surface with a bounding sphere; subclasses know their geometry."""

    def __init__(self, centre: Sequence[float], bound: float, material: Material) -> None:
        self.centre, self.bound, self.material = column(*centre), np.float32(bound), material

    @abstractmethod
    def hit(self, origin: Array, direction: Array) -> Array:
        """The smallest t > 0 at which each ray enters the solid, or 1e9: [n]."""

    @abstractmethod
    def normal(self, point: Array) -> Array:
        """Outward unit normals [3, n] at world points on the surface."""

    def local(self, point: Array) -> Array:
        """World points in the frame the texture is painted in."""
        return point - self.centre


class Sphere(Solid):
    """A ball."""

    def __init__(self, centre: Sequence[float], radius: float, material: Material) -> None:
        super().__init__(centre, radius, material)

    def hit(self, origin: Array, direction: Array) -> Array:
        """Entry of the ray, from its distance to the centre (stable for small balls far away)."""
        offset = self.centre - origin
        along = _dot(offset, direction)
        across = offset - along * direction
        inside = self.bound * self.bound - _dot(across, across)
        t = along - np.sqrt(np.maximum(inside, 0))
        return np.where((inside > 0) & (t > 0), t, _FAR)

    def normal(self, point: Array) -> Array:
        """Radial."""
        return _unit(point - self.centre)


class Cylinder(Solid):
    """An upright capped cylinder: the plinth, the stem and the thin rods."""

    def __init__(
        self, x: float, y: float, bottom: float, top: float, radius: float, material: Material
    ) -> None:
        half = 0.5 * (top - bottom)
        super().__init__((x, y, bottom + half), math.hypot(radius, half), material)
        self.radius, self.half = np.float32(radius), np.float32(half)

    def hit(self, origin: Array, direction: Array) -> Array:
        """The overlap of the t inside the infinite cylinder and the t inside the slab of its caps."""
        x, y, z = origin - self.centre
        dx, dy, dz = direction
        flat = dx * dx + dy * dy
        cross = x * dy - y * dx  # over sqrt(flat), how far the ray passes from the axis
        result = np.full(dx.shape, _FAR, np.float32)
        met = np.flatnonzero(cross * cross < self.radius * self.radius * flat)
        if met.size == 0:
            return result
        x, y, z = np.broadcast_to(origin - self.centre, direction.shape)[:, met]
        dx, dy, dz, flat, cross = dx[met], dy[met], dz[met], flat[met], cross[met]
        middle = -(x * dx + y * dy) / flat
        reach = np.sqrt(np.maximum(self.radius * self.radius - cross * cross / flat, 0) / flat)
        steep = 1 / np.where(np.abs(dz) < 1e-6, np.float32(1e-6), dz)
        slab_middle, slab_reach = -z * steep, self.half * np.abs(steep)
        enter = np.maximum(middle - reach, slab_middle - slab_reach)
        leave = np.minimum(middle + reach, slab_middle + slab_reach)
        result[met] = np.where((enter < leave) & (enter > 0), enter, _FAR)
        return result

    def normal(self, point: Array) -> Array:
        """Up or down on the caps, radial on the side."""
        x, y, z = point - self.centre
        cap = np.abs(z) > self.half - np.float32(1e-4)
        side = 1 / np.maximum(np.sqrt(x * x + y * y), np.float32(1e-9))
        return np.where(cap, np.stack([0 * x, 0 * y, np.sign(z)]), np.stack([x * side, y * side, 0 * z]))


class _Marched(Solid):
    """A solid found by steps of its distance function along the ray, within an interval in closed form."""

    steps = 64  # a ray that grazes a ring needs about 40, most need 5

    def __init__(self, centre: Sequence[float], bound: float, axes: Array, material: Material) -> None:
        super().__init__(centre, bound, material)
        self.axes = axes.astype(np.float32)

    def local(self, point: Array) -> Array:
        turned: Array = self.axes @ (point - self.centre)
        return turned

    @abstractmethod
    def interval(self, origin: Array, direction: Array) -> tuple[Array, Array]:
        """Where a ray in local coordinates may meet the solid: entry and exit t, empty when entry >= exit."""

    @abstractmethod
    def distance(self, x: Array, y: Array, z: Array) -> Array:
        """Signed distance of local points."""

    def hit(self, origin: Array, direction: Array) -> Array:
        origin, direction = self.axes @ (origin - self.centre), self.axes @ direction
        enter, leave = self.interval(origin, direction)
        enter = np.maximum(enter, 0)
        result = np.full(direction.shape[1], _FAR, np.float32)
        alive = np.flatnonzero(enter < leave)
        origin = np.broadcast_to(origin, direction.shape)[:, alive]
        direction, t, leave = direction[:, alive], enter[alive], leave[alive]
        for step in range(self.steps):
            if alive.size == 0:
                break
            gap = self.distance(*(origin + t * direction))
            near = gap < 2e-4
            if step and near.any():
                result[alive[near]] = t[near]
            elif not step:  # a ray that starts on the surface has left it
                near &= False
            t = t + np.maximum(gap, np.float32(2e-4))
            keep = ~near & (t < leave)
            if not keep.all():
                alive, t, leave = alive[keep], t[keep], leave[keep]
                origin, direction = origin[:, keep], direction[:, keep]
        return result


class Torus(_Marched):
    """A ring: radius `major` to the middle of a tube of radius `minor`, its axis tilted from z."""

    def __init__(
        self,
        centre: Sequence[float],
        major: float,
        minor: float,
        tilt: float,
        turn: float,
        material: Material,
    ) -> None:
        ct, st, cp, sp = math.cos(tilt), math.sin(tilt), math.cos(turn), math.sin(turn)
        axes = np.array([[ct * cp, ct * sp, -st], [-sp, cp, 0], [st * cp, st * sp, ct]])
        super().__init__(centre, major + minor, axes, material)
        self.major, self.minor = np.float32(major), np.float32(minor)

    def interval(self, origin: Array, direction: Array) -> tuple[Array, Array]:
        """The slab of the tube's thickness within the bounding sphere; nothing in the hole."""
        steep = 1 / np.where(np.abs(direction[2]) < 1e-6, np.float32(1e-6), direction[2])
        middle, reach = -origin[2] * steep, self.minor * np.abs(steep)
        along = -_dot(origin, direction)
        across = origin + along * direction
        chord = np.sqrt(np.maximum(self.bound * self.bound - _dot(across, across), 0))
        enter, leave = np.maximum(middle - reach, along - chord), np.minimum(middle + reach, along + chord)
        hole = (self.major - self.minor) ** 2
        # rho^2 is convex along a ray: when both ends of the interval are in the hole, all of it is
        ends = [
            (origin[0] + t * direction[0]) ** 2 + (origin[1] + t * direction[1]) ** 2 for t in (enter, leave)
        ]
        return enter, np.where((ends[0] < hole) & (ends[1] < hole), np.float32(-1), leave)

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        """||(rho - major, z)|| - minor."""
        ring = np.sqrt(x * x + y * y) - self.major
        gap: Array = np.sqrt(ring * ring + z * z) - self.minor
        return gap

    def normal(self, point: Array) -> Array:
        """From the middle of the tube."""
        x, y, z = self.local(point)
        scale = 1 - self.major / np.maximum(np.sqrt(x * x + y * y), np.float32(1e-9))
        return _unit(self.axes.T @ np.stack([x * scale, y * scale, z]))


class RoundedBox(_Marched):
    """A box with rounded edges, turned around z."""

    def __init__(
        self, centre: Sequence[float], half: Sequence[float], bevel: float, turn: float, material: Material
    ) -> None:
        c, s = math.cos(turn), math.sin(turn)
        super().__init__(centre, math.hypot(*half), np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]), material)
        self.half, self.bevel = column(*half), np.float32(bevel)

    def interval(self, origin: Array, direction: Array) -> tuple[Array, Array]:
        """The slabs of the sharp box."""
        steep = 1 / np.where(np.abs(direction) < 1e-6, np.float32(1e-6), direction)
        middle, reach = -origin * steep, self.half * np.abs(steep)
        return (middle - reach).max(0), (middle + reach).min(0)

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        """Distance to the inner box, less the bevel."""
        q = np.abs(np.stack([x, y, z])) - (self.half - self.bevel)
        outer = np.maximum(q, 0)
        gap: Array = np.sqrt(_dot(outer, outer)) + np.minimum(q.max(0), 0) - self.bevel
        return gap

    def normal(self, point: Array) -> Array:
        """The direction from the inner box."""
        local = self.local(point)
        outer = np.maximum(np.abs(local) - (self.half - self.bevel), np.float32(1e-6))
        return _unit(self.axes.T @ (outer * np.sign(local)))


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

_SUN = _unit(column(0.50, -0.42, 0.80))
_SUN_RADIUS = 0.075  # tangent of the sun's angular radius: the width of penumbrae
_SUN_COLOUR = column(2.75, 2.45, 2.05)
_SKY, _HORIZON, _GROUND = column(0.60, 0.78, 1.12), column(0.95, 0.95, 0.95), column(0.42, 0.36, 0.30)


def sun_directions(count: int) -> Array:
    """Directions spread evenly over the sun's disc: [3, count]."""
    k = np.arange(count)
    radius, angle = _SUN_RADIUS * np.sqrt((k + 0.5) / count), k * math.pi * (3 - math.sqrt(5))
    side = _unit(np.cross(_SUN[:, 0], [0, 0, 1])[:, None])
    up = np.cross(side[:, 0], _SUN[:, 0])[:, None]
    return _unit(_SUN + radius * np.cos(angle) * side + radius * np.sin(angle) * up).astype(np.float32)


def _surroundings(direction: Array) -> Array:
    """Colour of the sky and the ground that metals reflect."""
    height = direction[2]
    above = mix(_HORIZON, _SKY, smoothstep(0.0, 0.7, height))
    return mix(_GROUND, above, smoothstep(-0.15, 0.10, height))


def _open_sky(point: Array, normal: Array, balls: Sequence[Solid]) -> Array:
    """Ambient occlusion in closed form: [n], the share of the sky that nothing hides.

    A ball of radius r at distance d hides cos(angle) r^2 / d^2; 1/25 less here, so nothing from 5 r on.
    """
    light = np.ones(point.shape[1], np.float32)
    low, high = point.min(1, keepdims=True), point.max(1, keepdims=True)
    middle, spread = 0.5 * (low + high), 0.5 * float(np.linalg.norm(high - low))
    for ball in balls:
        if float(np.linalg.norm(ball.centre - middle)) > spread + 5 * float(ball.bound):
            continue
        reach = ball.bound if isinstance(ball, Sphere) else np.float32(0.8) * ball.bound
        offset = ball.centre - point
        square = _dot(offset, offset)
        cosine = np.maximum(_dot(offset, normal), 0) / np.sqrt(square)
        hidden = cosine * np.maximum(reach * reach / square - np.float32(0.04), 0)
        light *= 1 - np.where(square > reach * reach * np.float32(1.0001), hidden, 0)
    return light


@lru_cache(maxsize=1)
def _bounds() -> tuple[Array, Array]:
    """Centres [3, solids] and radii [solids] of the bounding spheres."""
    return np.concatenate([s.centre for s in solids()], 1), np.array([s.bound for s in solids()], np.float32)


def _in_cone(origin: Array, directions: Array) -> list[int]:
    """The solids that a bundle of rays may meet, by the angle between its axis and their bounding spheres."""
    axis = _unit(directions.mean(1, keepdims=True))
    spread = np.arccos(np.minimum(1, _dot(axis, directions).min()))
    centres, radii = _bounds()
    offset = centres - origin
    distance = np.sqrt(_dot(offset, offset))
    angle = np.arccos(np.clip(_dot(axis, offset) / distance, -1, 1))
    width = np.arcsin(np.minimum(1, radii / distance))
    return np.flatnonzero((distance <= radii) | (angle <= spread + width + 1e-3)).tolist()


def _towards_sun(points: Array) -> list[int]:
    """The solids that may stand between a cloud of points and the sun."""
    low, high = points.min(1, keepdims=True), points.max(1, keepdims=True)
    spread = 0.5 * np.sqrt(((high - low) ** 2).sum())
    centres, radii = _bounds()
    offset = centres - 0.5 * (low + high)
    along = _dot(offset, _SUN)
    across = np.sqrt(np.maximum(_dot(offset, offset) - along * along, 0))
    reach = spread + radii
    penumbra = 1.2 * _SUN_RADIUS * np.maximum(along + spread, 0)
    return np.flatnonzero((along > -reach) & (across < reach + penumbra)).tolist()


def _shaded(points: Array, sun: Array) -> NDArray[np.bool_]:
    """Which points do not see the sun, each in its own direction."""
    dark = np.zeros(points.shape[1], bool)
    for index in _towards_sun(points):
        dark |= solids()[index].hit(points, sun) < _FAR
    return dark


def trace(origin: Array, directions: Array, sun: Array) -> tuple[NDArray[np.bool_], Array]:
    """What a bundle of rays from one point sees.

    Args:
        origin: [3, 1].
        directions: [3, n], unit length; a compact bundle, because solids outside of its cone are skipped.
        sun: [3, n], the direction towards the point of the sun that lights each ray.

    Returns:
        Which rays meet a solid [n], and the display colours in [0, 1] of those that do [3, hits].
    """
    best = np.full(directions.shape[1], _FAR, np.float32)
    which = np.full(directions.shape[1], -1, np.int32)
    world = solids()
    for index in _in_cone(origin, directions):
        t = world[index].hit(origin, directions)
        closer = t < best
        best[closer], which[closer] = t[closer], index
    seen = which >= 0
    if not seen.any():
        return seen, np.zeros((3, 0), np.float32)
    directions, sun, which = directions[:, seen], sun[:, seen], which[seen]
    points = origin + best[seen] * directions
    normals, colours = np.empty_like(points), np.empty_like(points)
    gloss, sharpness, metal = (np.empty(points.shape[1], np.float32) for _ in range(3))
    sky = np.empty(points.shape[1], np.float32)
    # rods and rings are too thin to hide much of the sky, and the plinth is the ground itself
    balls = [solid for solid in world if solid.bound < 0.5 and not isinstance(solid, Cylinder)]
    for index in np.unique(which):
        solid, mine = world[index], which == index
        p = points[:, mine]
        normal = solid.normal(p)
        normals[:, mine] = normal
        colours[:, mine] = solid.material.texture(solid.local(p), normal)
        gloss[mine], sharpness[mine] = solid.material.gloss, solid.material.sharpness
        metal[mine] = solid.material.metal
        sky[mine] = _open_sky(p, normal, [ball for ball in balls if ball is not solid])
    facing = _dot(normals, sun)
    lit = np.flatnonzero(facing > 0)
    sunlight = np.zeros(points.shape[1], np.float32)
    if lit.size:
        dark = _shaded(points[:, lit] + _OFFSET * normals[:, lit], sun[:, lit])
        sunlight[lit] = np.where(dark, 0, facing[lit])
    half = _unit(sun - directions)
    shine = np.maximum(_dot(normals, half), 0) ** sharpness * gloss * (sunlight > 0)
    mirror = directions - 2 * _dot(normals, directions) * normals
    facing_eye = np.clip(-_dot(normals, directions), 0, 1)
    fresnel = 0.03 + 0.5 * (1 - facing_eye) ** 5 * gloss
    up = 0.5 + 0.5 * normals[2]
    ambient = mix(_GROUND * 0.9, _SKY * 0.52, up) * sky
    diffuse = colours * (ambient + _SUN_COLOUR * (1 / math.pi) * 1.4 * sunlight)
    reflected = _surroundings(mirror) * sky
    light = diffuse * (1 - metal) + metal * colours * reflected * 1.1
    light += reflected * fresnel * (1 - metal)
    light += _SUN_COLOUR * shine * mix(np.ones((3, 1), np.float32), colours, metal)
    # exposure, a filmic curve and gamma 2
    light *= np.float32(0.74)
    light = light * (2.51 * light + 0.03) / (light * (2.43 * light + 0.59) + 0.14)
    return seen, np.sqrt(np.clip(light, 0, 1)).astype(np.float32)
