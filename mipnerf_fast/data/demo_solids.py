"""The solids of the built-in scene: where rays meet them, their normals, and how they look.

Vectors are float32 arrays [3, n]; a ray is origin + t * direction with a unit direction.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mipnerf_fast.data.demo_textures import Array, Texture, column

FAR = np.float32(1e9)  # the t of a ray that meets nothing
# Few enough that the library of the matrix products starts no threads of its own.
_COLUMNS_OF_A_PRODUCT = 16384


def dot(a: Array, b: Array) -> Array:
    product: Array = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return product


def unit(vector: Array) -> Array:
    return vector / np.sqrt(dot(vector, vector))


def _turned(axes: Array, vectors: Array) -> Array:
    """axes @ vectors: [3, n]."""
    turned = np.empty_like(vectors)
    for begin in range(0, vectors.shape[1], _COLUMNS_OF_A_PRODUCT):
        some = slice(begin, begin + _COLUMNS_OF_A_PRODUCT)
        np.matmul(axes, vectors[:, some], out=turned[:, some])
    return turned


def _chosen(vectors: Array, which: Array) -> Array:
    """Some of the columns; the one column that all rays share stays as it is."""
    return vectors[:, which] if vectors.shape[1] > 1 else vectors


@dataclass(frozen=True)
class Material:
    """How a solid looks: its texture (local point, world normal -> colour [3, n]) and its reflection."""

    texture: Texture
    gloss: float = 0.25  # strength of the sun's highlight
    sharpness: float = 60.0  # exponent of the highlight
    metal: float = 0.0  # share of the light that is tinted reflection of the surroundings


class Solid(ABC):
    """A closed surface within a bounding sphere and one or more upright boxes; subclasses know their geometry."""

    is_convex = True  # then it throws no shadow on itself

    def __init__(
        self, centre: Sequence[float], bound: float, extent: Sequence[float], material: Material
    ) -> None:
        self.centre, self.bound, self.material = column(*centre), np.float32(bound), material
        # The middles of its boxes and half their sizes: [3, boxes] each.
        self.boxes = self.centre, column(*extent)

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
        super().__init__(centre, radius, (radius, radius, radius), material)

    def hit(self, origin: Array, direction: Array) -> Array:
        """Entry of the ray, from its distance to the centre (stable for small balls far away)."""
        offset = self.centre - origin
        along = dot(offset, direction)
        across = offset - along * direction
        inside = self.bound * self.bound - dot(across, across)
        t = along - np.sqrt(np.maximum(inside, 0))
        return np.where((inside > 0) & (t > 0), t, FAR)

    def normal(self, point: Array) -> Array:
        """Radial."""
        return unit(point - self.centre)


class Cylinder(Solid):
    """An upright capped cylinder: the plinth, the stem and the thin rods."""

    def __init__(
        self, x: float, y: float, bottom: float, top: float, radius: float, material: Material
    ) -> None:
        half = 0.5 * (top - bottom)
        super().__init__((x, y, bottom + half), math.hypot(radius, half), (radius, radius, half), material)
        self.radius, self.half = np.float32(radius), np.float32(half)

    def hit(self, origin: Array, direction: Array) -> Array:
        """The overlap of the t inside the infinite cylinder and the t inside the slab of its caps."""
        x, y, z = origin - self.centre
        dx, dy, dz = direction
        flat = dx * dx + dy * dy
        cross = x * dy - y * dx  # over sqrt(flat), how far the ray passes from the axis
        result = np.full(dx.shape, FAR, np.float32)
        met = np.flatnonzero(cross * cross < self.radius * self.radius * flat)
        if met.size == 0:
            return result
        x, y, z = _chosen(origin - self.centre, met)
        dx, dy, dz, flat, cross = dx[met], dy[met], dz[met], flat[met], cross[met]
        middle = -(x * dx + y * dy) / flat
        reach = np.sqrt(np.maximum(self.radius * self.radius - cross * cross / flat, 0) / flat)
        steep = 1 / np.where(np.abs(dz) < 1e-6, np.float32(1e-6), dz)
        slab_middle, slab_reach = -z * steep, self.half * np.abs(steep)
        enter = np.maximum(middle - reach, slab_middle - slab_reach)
        leave = np.minimum(middle + reach, slab_middle + slab_reach)
        result[met] = np.where((enter < leave) & (enter > 0), enter, FAR)
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

    def __init__(
        self, centre: Sequence[float], bound: float, extent: Sequence[float], axes: Array, material: Material
    ) -> None:
        super().__init__(centre, bound, extent, material)
        self.axes = axes.astype(np.float32)

    def local(self, point: Array) -> Array:
        return _turned(self.axes, point - self.centre)

    @abstractmethod
    def interval(self, origin: Array, direction: Array) -> tuple[Array, Array]:
        """Where a ray in local coordinates may meet the solid: entry and exit t, empty when entry >= exit."""

    @abstractmethod
    def distance(self, x: Array, y: Array, z: Array) -> Array:
        """Signed distance of local points."""

    def hit(self, origin: Array, direction: Array) -> Array:
        origin, direction = _turned(self.axes, origin - self.centre), _turned(self.axes, direction)
        enter, leave = self.interval(origin, direction)
        enter = np.maximum(enter, 0)
        result = np.full(direction.shape[1], FAR, np.float32)
        rays = np.flatnonzero(enter < leave)
        direction, t, leave = direction[:, rays], enter[rays], leave[rays]
        origin = _chosen(origin, rays)
        alive = rays.size
        for step in range(self.steps):
            if alive == 0:
                break
            gap = self.distance(*(origin + t * direction))
            if step:  # a ray that starts on the surface leaves it first
                met = np.flatnonzero((gap < 2e-4) & (t < leave))
                result[rays[met]] = t[met]
                leave[met] = 0
            t += np.maximum(gap, np.float32(2e-4))
            going = t < leave
            alive = int(np.count_nonzero(going))
            # Those that are through go along until a third are: leaving them out costs as much as a step.
            if alive < 0.67 * rays.size:
                kept = np.flatnonzero(going)
                rays, t, leave, direction = rays[kept], t[kept], leave[kept], direction[:, kept]
                origin = _chosen(origin, kept)
        return result


class Torus(_Marched):
    """A ring: radius `major` to the middle of a tube of radius `minor`, its axis tilted from z."""

    is_convex = False
    arcs = 24

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
        extent = minor + major * np.sqrt(1 - axes[2] ** 2)
        super().__init__(centre, major + minor, extent.tolist(), axes, material)
        self.major, self.minor = np.float32(major), np.float32(minor)
        # A box around every arc: the whole ring's would be mostly hole.
        step = math.pi / self.arcs
        angle = step * np.arange(1, 2 * self.arcs, 2)
        outward = np.outer(axes[0], np.cos(angle)) + np.outer(axes[1], np.sin(angle))
        onward = np.outer(axes[1], np.cos(angle)) - np.outer(axes[0], np.sin(angle))
        reach = math.sin(step) * np.abs(onward) + (1 - math.cos(step)) * np.abs(outward)
        self.boxes = (
            (self.centre + major * outward).astype(np.float32),
            (minor + major * reach).astype(np.float32),
        )

    def interval(self, origin: Array, direction: Array) -> tuple[Array, Array]:
        """The slab of the tube's thickness within the bounding sphere; nothing in the hole."""
        steep = 1 / np.where(np.abs(direction[2]) < 1e-6, np.float32(1e-6), direction[2])
        middle, reach = -origin[2] * steep, self.minor * np.abs(steep)
        along = -dot(origin, direction)
        across = origin + along * direction
        chord = np.sqrt(np.maximum(self.bound * self.bound - dot(across, across), 0))
        enter, leave = np.maximum(middle - reach, along - chord), np.minimum(middle + reach, along + chord)
        # rho^2 is convex along a ray: when both ends of the interval are in the hole, all of it is
        some = np.flatnonzero(enter < leave)
        x, y = _chosen(origin[:2], some)
        dx, dy = direction[:2, some]
        hole = (self.major - self.minor) ** 2
        first, last = ((x + t * dx) ** 2 + (y + t * dy) ** 2 < hole for t in (enter[some], leave[some]))
        leave[some[first & last]] = -1
        return enter, leave

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        """||(rho - major, z)|| - minor."""
        ring = np.sqrt(x * x + y * y) - self.major
        gap: Array = np.sqrt(ring * ring + z * z) - self.minor
        return gap

    def normal(self, point: Array) -> Array:
        """From the middle of the tube."""
        x, y, z = self.local(point)
        scale = 1 - self.major / np.maximum(np.sqrt(x * x + y * y), np.float32(1e-9))
        return unit(_turned(self.axes.T, np.stack([x * scale, y * scale, z])))


class RoundedBox(_Marched):
    """A box with rounded edges, turned around z."""

    def __init__(
        self, centre: Sequence[float], half: Sequence[float], bevel: float, turn: float, material: Material
    ) -> None:
        c, s = math.cos(turn), math.sin(turn)
        axes = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        super().__init__(centre, math.hypot(*half), np.abs(axes.T) @ half, axes, material)
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
        gap: Array = np.sqrt(dot(outer, outer)) + np.minimum(q.max(0), 0) - self.bevel
        return gap

    def normal(self, point: Array) -> Array:
        """The direction from the inner box."""
        local = self.local(point)
        outer = np.maximum(np.abs(local) - (self.half - self.bevel), np.float32(1e-6))
        return unit(_turned(self.axes.T, outer * np.sign(local)))
