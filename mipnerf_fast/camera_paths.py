"""Camera paths around what the cameras of a data set look at: its own views, a turntable, a spiral, a zoom."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .cameras import Rays, pinhole_rays
from .errors import InputError

if TYPE_CHECKING:
    from .data.dataset import Dataset

PATHS = ("test", "turntable", "spiral", "zoom")
DEFAULT_FRAMES = {"turntable": 60, "spiral": 90, "zoom": 60}
SPIRAL_TURNS = 2
ZOOM_FACTOR = 8.0
"""How much farther the last camera of the zoom is: three octaves, as between the multi-scale data's extremes."""


class Sphere(NamedTuple):
    """A ball in world units: centre [3], radius."""

    centre: Tensor
    radius: float


class Camera(NamedTuple):
    """One view to render.

    c2w: [3, 4], float32. height, width, focal: in pixels. near, far: range of t.
    bounds: rays are cut to this ball; None: near and far alone.
    """

    c2w: Tensor
    height: int
    width: int
    focal: float
    near: float
    far: float
    name: str
    bounds: Sphere | None = None

    def rays(self) -> Rays:
        """The rays of all pixels, [H, W, .]."""
        rays = pinhole_rays(self.c2w, self.height, self.width, self.focal, self.near, self.far)
        return rays if self.bounds is None else cut_to_sphere(rays, self.bounds)


class Surroundings(NamedTuple):
    """Where the cameras of a data set stand and what they look at.

    centre: [3], the point nearest to all optical axes. up: [3], unit length. distance: the median from the centre.
    elevations, azimuths: [n] of the cameras about the centre, radians. extent: radius around the centre within which
    nearly every camera sees everything.
    """

    centre: Tensor
    up: Tensor
    distance: float
    elevations: Tensor
    azimuths: Tensor
    extent: float


def cut_to_sphere(rays: Rays, sphere: Sphere) -> Rays:
    """Narrow near and far to where a ray is inside the sphere; a ray that misses it becomes an empty interval.

    The roots of ||o + t d - c||^2 = r^2 are t = (b -+ sqrt(b^2 - |d|^2 (|o - c|^2 - r^2))) / |d|^2 with
    b = d . (c - o).
    """
    centre = sphere.centre.to(rays.origins)
    offset = centre - rays.origins
    a = (rays.directions**2).sum(-1, keepdim=True)
    b = (rays.directions * offset).sum(-1, keepdim=True)
    root = torch.sqrt(torch.clamp(b**2 - a * ((offset**2).sum(-1, keepdim=True) - sphere.radius**2), min=0))
    near = torch.maximum((b - root) / a, rays.near)
    far = torch.maximum(torch.minimum((b + root) / a, rays.far), near)
    return rays._replace(near=near, far=far)


def surroundings(data: Dataset) -> Surroundings:
    """Work out where the cameras stand, for Blender-like data whose cameras look inwards.

    The up direction is the mean of the cameras' own, taken as a world axis where it is within 30 degrees of one.
    """
    c2w = data.c2w.double()
    positions, axes = c2w[:, :, 3], -torch.nn.functional.normalize(c2w[:, :, 2], dim=-1)
    near, far = float(data.near[0]), float(data.far[0])

    # The nearest point solves sum_i (I - d_i d_i^T) (p - o_i) = 0.
    away = torch.eye(3, dtype=torch.float64) - axes[:, :, None] * axes[:, None, :]
    matrix = away.mean(0)
    if torch.linalg.eigvalsh(matrix)[0] > 1e-3:
        centre = torch.linalg.solve(matrix, (away @ positions[:, :, None]).mean(0)[:, 0])
    else:  # a single camera, or all of them parallel: nothing meets, so look half-way
        centre = (positions + axes * (near + far) / 2).mean(0)

    up = torch.nn.functional.normalize(c2w[:, :, 1].mean(0), dim=0)
    axis = int(up.abs().argmax())
    if up[axis].abs() > math.cos(math.radians(30)):
        up = torch.nn.functional.one_hot(torch.tensor(axis), 3).to(up) * up[axis].sign()

    offsets = positions - centre
    distances = offsets.norm(dim=-1).clamp(min=1e-9)
    distance = float(distances.median())
    side, front = _level_axes(up)
    half_view = math.atan(0.5 * min(int(data.height[0]), int(data.width[0])) / float(data.focal[0]))
    return Surroundings(
        centre=centre,
        up=up,
        distance=distance,
        elevations=torch.asin(((offsets @ up) / distances).clamp(-1, 1)),
        azimuths=torch.atan2(offsets @ front, offsets @ side),
        extent=min((far - near) / 2, distance * math.tan(half_view)),
    )


def camera_path(name: str, data: Dataset, frames: int | None = None) -> list[Camera]:
    """The cameras of a path.

    test: the views of `data`, at the finest scale it has; `frames` of them, evenly spread, when given.
    turntable: once around at the median distance and elevation of the cameras.
    spiral: twice around while rising from the 10th to the 90th percentile of their elevations.
    zoom: from the first turntable view straight back to 8 times the distance, so that a pixel covers 8 times as
    much and whatever does not integrate over it aliases. The rays are cut to the ball that the cameras see, since
    nothing outside it was ever trained.

    Args:
        name: one of the above.
        data: gives the cameras to go by, and size and focal length of the pictures (of its first finest view).
        frames: at least 1; None: all test views, or 60, 90 and 60.

    Errors: InputError for an unknown name or frames below 1.
    """
    if name not in PATHS:
        raise InputError(f"--path: unknown path {name!r}, expected one of {', '.join(PATHS)}")
    if frames is not None and frames < 1:
        raise InputError(f"--frames: must be at least 1, got {frames}")
    views = torch.nonzero(data.scale == data.scale.min())[:, 0].tolist()
    if name == "test":
        if frames is not None:
            count = min(frames, len(views))
            views = [views[round(k * len(views) / count)] for k in range(count)]
        return [_view(data, i) for i in views]
    first = _view(data, views[0])
    around = surroundings(data)
    count = DEFAULT_FRAMES[name] if frames is None else frames
    start = float(around.azimuths[views[0]])
    middle = float(around.elevations.median())
    if name == "turntable":
        return [
            _orbit(first, around, start + 2 * math.pi * k / count, middle, around.distance, f"{k:04d}")
            for k in range(count)
        ]
    fractions = [k / max(count - 1, 1) for k in range(count)]
    if name == "spiral":
        low, high = (float(around.elevations.quantile(q)) for q in (0.1, 0.9))
        return [
            _orbit(
                first,
                around,
                start + SPIRAL_TURNS * 2 * math.pi * f,
                low + (high - low) * f,
                around.distance,
                f"{k:04d}",
            )
            for k, f in enumerate(fractions)
        ]
    ball = Sphere(around.centre.float(), around.extent)
    distances = [around.distance * ZOOM_FACTOR**f for f in fractions]
    return [
        _orbit(first, around, start, middle, distance, f"{k:04d}")._replace(
            near=max(distance - around.extent, 0.0), far=distance + around.extent, bounds=ball
        )
        for k, distance in enumerate(distances)
    ]


def look_at(position: Tensor, target: Tensor, up: Tensor) -> Tensor:
    """The camera-to-world matrix [3, 4] of a camera at `position` looking at `target`, OpenGL axes."""
    back = torch.nn.functional.normalize(position - target, dim=0)
    right = torch.linalg.cross(up, back)
    if right.norm() < 1e-6:  # straight up or down: any horizontal direction will do
        right = _level_axes(up)[0]
    right = torch.nn.functional.normalize(right, dim=0)
    return torch.stack([right, torch.linalg.cross(back, right), back, position], 1).float()


def _orbit(
    like: Camera, around: Surroundings, azimuth: float, elevation: float, distance: float, name: str
) -> Camera:
    side, front = _level_axes(around.up)
    level = math.cos(azimuth) * side + math.sin(azimuth) * front
    offset = distance * (math.cos(elevation) * level + math.sin(elevation) * around.up)
    return like._replace(c2w=look_at(around.centre + offset, around.centre, around.up), name=name)


def _level_axes(up: Tensor) -> tuple[Tensor, Tensor]:
    """Two directions that are level and orthogonal; right-handed with up."""
    start = torch.zeros_like(up)
    start[int(up.abs().argmin())] = 1.0
    side = torch.nn.functional.normalize(start - (start @ up) * up, dim=0)
    return side, torch.linalg.cross(up, side)


def _view(data: Dataset, index: int) -> Camera:
    return Camera(
        data.c2w[index],
        int(data.height[index]),
        int(data.width[index]),
        float(data.focal[index]),
        float(data.near[index]),
        float(data.far[index]),
        data.names[index],
    )
