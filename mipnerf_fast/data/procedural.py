"""The built-in scene `demo`: cameras around the ray-traced world, supersampled, with straight alpha."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from mipnerf_fast.data.dataset import Dataset
from mipnerf_fast.data.demo_world import colours, meet, solids, sun_directions
from mipnerf_fast.data.frames import Frame, assemble
from mipnerf_fast.data.scene_files import SPLITS
from mipnerf_fast.errors import InputError
from mipnerf_fast.progress import Progress

CAMERA_ANGLE_X = 0.66  # horizontal field of view, radians
RADIUS = 4.0  # distance of the cameras from the origin
SIZE = 200  # default width and height, pixels
SUPERSAMPLE = 4  # default number of rays along each side of a pixel
VIEWS = {"train": 60, "val": 4, "test": 12}

_ROWS_AT_ONCE = 16  # of rays, whose numbers a processor's cache holds
_GOLDEN_TURN = math.pi * (3 - math.sqrt(5))


def camera_positions(split: str, views: int) -> NDArray[np.float64]:
    """Where the cameras stand: [views, 3], on the upper half of a sphere around the origin.

    Training views spread evenly over elevations 4 to 80 degrees (a Fibonacci lattice); validation views do so at
    other azimuths and heights; test views go once around, rising and falling between 15 and 40 degrees.
    """
    k = np.arange(0.5, views)
    if split == "test":
        azimuth = 2 * math.pi * k / views
        elevation = np.radians(27.5 - 12.5 * np.cos(2 * azimuth))
    else:
        azimuth = _GOLDEN_TURN * k + (0.0 if split == "train" else 1.0)
        low, high = math.sin(math.radians(4)), math.sin(math.radians(80))
        elevation = np.arcsin(low + (high - low) * k / views)
    flat = np.cos(elevation)
    return RADIUS * np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], -1)


def look_at_origin(position: NDArray[np.float64]) -> NDArray[np.float64]:
    """The camera-to-world matrix [4, 4] of a camera that looks at the origin, z up (OpenGL axes)."""
    back = position / np.linalg.norm(position)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    c2w = np.eye(4)
    c2w[:3] = np.stack([right, np.cross(back, right), back, position], -1)
    return c2w


def _candidates(c2w: NDArray[np.float64], focal: float, rays: int) -> list[NDArray[np.intp]]:
    """For each solid, the rays of a square picture that may meet it: those around its boxes as the camera sees them.

    rays: along each side of the picture; their numbers are those of its rows, one after the other.
    """
    corners = np.array(list(itertools.product((-1, 1), repeat=3))).T[:, None]  # [3, 1, 8]
    candidates = []
    for solid in solids():
        inside = np.zeros((rays, rays), bool)
        centres, extents = (numbers[:, :, None] for numbers in solid.boxes)
        x, y, z = np.einsum("ji,jbk->ibk", c2w[:3, :3], centres + extents * corners - c2w[:3, 3, None, None])
        depth = np.maximum(-z, 1e-3)
        # A ray passes through the middle of its row and column; one more on each side is for rounding.
        edges = [0.5 * rays + focal * at / depth for at in (-y, x)]
        low, high = ([f(edge, -1) for edge in edges] for f in (np.min, np.max))
        for box in range(x.shape[0]):
            if z[box].max() > -0.1:  # reaches behind the camera
                inside[:] = True
            rows, columns = (
                slice(max(0, math.floor(a[box]) - 1), max(0, math.ceil(b[box]) + 1))
                for a, b in zip(low, high, strict=True)
            )
            inside[rows, columns] = True
        candidates.append(np.flatnonzero(inside))
    return candidates


def _directions(c2w: NDArray[np.float64], focal: float, rays: int) -> NDArray[np.float32]:
    """The unit directions of the rays of a square picture: [3, rays * rays]."""
    right, up, back = c2w[:3, :3].T[:, :, None, None]
    x = (np.arange(rays) + 0.5 - 0.5 * rays) / focal
    directions = np.empty((3, rays, rays), np.float32)
    for top in range(0, rays, _ROWS_AT_ONCE):
        y = x[top : top + _ROWS_AT_ONCE, None]
        directions[:, top : top + _ROWS_AT_ONCE] = ((right * x - back) - up * y) / np.sqrt(x * x + y * y + 1)
    return directions.reshape(3, -1)


def render_view(c2w: NDArray[np.float64], size: int, supersample: int = SUPERSAMPLE) -> NDArray[np.uint8]:
    """Ray trace one square view.

    Every pixel is the mean over supersample^2 evenly spaced rays, taken of display colours, so that a view of half
    the size is the 2 x 2 mean of this one. Each of a pixel's rays is lit by its own point of the sun's disc, which
    makes shadows soft. Nothing is random.

    Args:
        c2w: [4, 4].
        size: width and height in pixels.
        supersample: rays along each side of a pixel.

    Returns:
        uint8 [size, size, 4]: the mean colour of the rays that meet something (straight alpha; 0 where none does)
        and the share of such rays.
    """
    rays, samples = size * supersample, supersample * supersample
    focal = 0.5 * rays / math.tan(0.5 * CAMERA_ANGLE_X)
    origin = c2w[:3, 3:].astype(np.float32)
    # neighbouring rays take far-apart points of the sun, so that shadows do not follow the pixel grid
    stride = next(s for s in range(max(1, int(0.382 * samples)), samples + 1) if math.gcd(s, samples) == 1)
    suns = sun_directions(samples)[:, np.arange(samples) * stride % samples]
    directions = _directions(c2w, focal, rays)
    seen, which, t = meet(origin, directions, _candidates(c2w, focal, rays))
    row, column = np.divmod(seen, rays)
    sun = suns[:, row % supersample * supersample + column % supersample]
    colour = colours(origin, directions[:, seen], which, t, sun)
    pixels = row // supersample * size + column // supersample
    hits = np.bincount(pixels, minlength=size * size)
    sums = [np.bincount(pixels, channel, minlength=size * size) / np.maximum(hits, 1) for channel in colour]
    mean = np.stack([*sums, hits / samples], -1).reshape(size, size, 4)
    image: NDArray[np.uint8] = np.rint(255 * mean).astype(np.uint8)
    return image


def demo_frames(
    split: str, size: int = SIZE, views: int | None = None, supersample: int = SUPERSAMPLE
) -> list[Frame]:
    """The frames of a split of the built-in scene; each is ray traced when it is read.

    Raises:
        InputError: an unknown split, or a size, number of views or supersampling below 1.
    """
    if split not in SPLITS:
        raise InputError(f"demo scene: split is {split!r}; expected one of {', '.join(SPLITS)}")
    views = VIEWS[split] if views is None else views
    for argument, value in (("size", size), ("views", views), ("supersample", supersample)):
        if value < 1:
            raise InputError(f"demo scene: {argument} is {value}; expected at least 1")
    cameras = [look_at_origin(position) for position in camera_positions(split, views)]
    return [
        Frame(
            name=f"r_{index}",
            where=f"demo scene, {split} view {index}",
            c2w=c2w,
            focal=0.5 * size / math.tan(0.5 * CAMERA_ANGLE_X),
            height=size,
            width=size,
            channels=4,
            read=partial(render_view, c2w, size, supersample),
        )
        for index, c2w in enumerate(cameras)
    ]


def demo_scene(
    split: str = "train", size: int = SIZE, views: int | None = None, supersample: int = SUPERSAMPLE
) -> Dataset:
    """Render the built-in scene.

    Args:
        split: "train", "val" or "test"; each has its own cameras.
        size: width and height in pixels.
        views: how many; None takes 60, 4 or 12.
        supersample: rays along each side of a pixel.

    Returns:
        RGBA images with straight alpha and a white background, near 2, far 6.

    Raises:
        InputError: an unknown split, or a number below 1.

    Example:
        >>> len(demo_scene("test", size=8, views=3, supersample=1))
        3
    """
    return assemble(demo_frames(split, size, views, supersample), split, "white")


@lru_cache(maxsize=len(SPLITS))
def _rendered(split: str) -> tuple[NDArray[np.uint8], ...]:
    """The views of a split at their default size, ray traced once per process (10 MB for training)."""
    frames = demo_frames(split)
    with Progress(f"ray tracing the built-in scene ({split})", total=len(frames), unit="views") as bar:
        return tuple(image.numpy() for image in assemble(frames, split, "white", done=bar).images)


def load(split: str, background: str, downscale: int) -> Dataset:
    """A split of the built-in scene at its default size, or made smaller from that."""
    images = _rendered(split)
    frames = [
        replace(frame, read=partial(images.__getitem__, i)) for i, frame in enumerate(demo_frames(split))
    ]
    return assemble(frames, split, background, downscale)
