"""The built-in scene: its geometry, its alpha, its cameras, and that two renders agree to the bit."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mipnerf_fast import InputError
from mipnerf_fast.data import demo_world, load_dataset, multiscale, procedural
from mipnerf_fast.data.demo_solids import Cylinder, Material, RoundedBox, Solid, Sphere, Torus
from mipnerf_fast.data.demo_textures import plain
from mipnerf_fast.data.demo_world import solids
from mipnerf_fast.data.procedural import camera_positions, demo_scene, look_at_origin, render_view
from mipnerf_fast.data.pyramid import pyramid


def test_two_renders_agree_however_points_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    c2w = look_at_origin(camera_positions("test", 5)[1])
    first = render_view(c2w, 36, 2)
    np.testing.assert_array_equal(render_view(c2w, 36, 2), first)
    # what is passed over must not change a picture; sums over rays may differ in their last bit
    for cube, points in ((0.03, 100), (3.0, 10**6)):
        monkeypatch.setattr(demo_world, "_CUBE", cube)
        monkeypatch.setattr(demo_world, "_POINTS_AT_ONCE", points)
        assert int(np.abs(render_view(c2w, 36, 2).astype(int) - first).max()) <= 1


def test_nothing_that_a_ray_meets_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    c2w = look_at_origin(camera_positions("train", 7)[2])
    first = render_view(c2w, 48, 2)
    everywhere = [np.arange(96 * 96) for _ in solids()]
    monkeypatch.setattr(procedural, "_candidates", lambda c2w, focal, rays: everywhere)
    monkeypatch.setattr(demo_world, "_CUBE", 3.0)
    for solid in solids():  # boxes that hold the world, and shadows of every solid on itself
        monkeypatch.setattr(solid, "boxes", (np.zeros((3, 1), np.float32), np.full((3, 1), 2, np.float32)))
        monkeypatch.setattr(solid, "is_convex", False)
    assert int(np.abs(render_view(c2w, 48, 2).astype(int) - first).max()) <= 1


def test_views_rendered_in_threads_are_those_rendered_one_by_one() -> None:
    images = demo_scene("val", size=40, views=6, supersample=2).images
    for image, position in zip(images, camera_positions("val", 6), strict=True):
        np.testing.assert_array_equal(image.numpy(), render_view(look_at_origin(position), 40, 2))


def test_dataset_follows_blender_conventions() -> None:
    dataset = demo_scene("train", size=40, views=8, supersample=2)
    assert len(dataset) == 8
    assert dataset.pixels.shape == (8 * 1600, 4)
    assert dataset.near.tolist() == [2.0] * 8
    assert dataset.far.tolist() == [6.0] * 8
    assert dataset.focal.tolist() == [20 / math.tan(0.5 * procedural.CAMERA_ANGLE_X)] * 8
    rotation, position = dataset.c2w[:, :, :3].double(), dataset.c2w[:, :, 3].double()
    identity = torch.eye(3, dtype=torch.float64).expand(8, 3, 3)
    torch.testing.assert_close(rotation @ rotation.mT, identity, rtol=0, atol=1e-6)
    assert bool((torch.linalg.det(rotation) > 0).all())
    # the camera stands at radius 4 above the ground, looks along -z at the origin, and its y points upwards
    torch.testing.assert_close(
        position.norm(dim=-1), torch.full((8,), 4.0, dtype=torch.float64), rtol=1e-6, atol=0
    )
    assert bool((position[:, 2] > 0).all())
    torch.testing.assert_close(
        position - 4 * rotation[:, :, 2], torch.zeros_like(position), rtol=0, atol=1e-5
    )
    assert bool((rotation[:, 2, 1] > 0).all())


def test_the_world_is_inside_its_box_and_inside_every_picture() -> None:
    dataset = demo_scene("train", size=48, views=12, supersample=1)
    for image in dataset.images:
        alpha = image[..., 3]
        assert not bool(alpha[0].any() or alpha[-1].any() or alpha[:, 0].any() or alpha[:, -1].any())
        assert 0.1 < float((alpha > 0).float().mean()) < 0.9
    for i in range(len(dataset)):
        rays = dataset.rays(i)
        t = _first_hit(rays.origins[0, 0].numpy(), rays.directions.reshape(-1, 3).numpy())
        seen = t < 1e8
        points = (
            rays.origins.reshape(-1, 3) + torch.from_numpy(t)[:, None] * rays.directions.reshape(-1, 3)
        )[seen]
        assert float(points.abs().max()) < 1.2
        # at one ray a pixel, alpha says exactly which rays meet something: images and cameras belong together
        np.testing.assert_array_equal(seen, dataset.images[i][..., 3].reshape(-1).numpy() == 255)
        assert float(t[seen].min()) > 2.0
        assert float(t[seen].max()) < 6.0


def _first_hit(origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(directions, axis=-1).astype(np.float32)
    unit = (directions / length[:, None]).T.astype(np.float32)
    return np.min([solid.hit(origin[:, None], unit) for solid in solids()], axis=0) / length


def test_alpha_is_coverage_and_colour_is_not_darkened_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sun = procedural.sun_directions(1)
    monkeypatch.setattr(procedural, "sun_directions", lambda count: np.repeat(sun, count, axis=1))
    c2w = look_at_origin(camera_positions("test", 3)[0])
    coarse, fine = render_view(c2w, 30, 4), render_view(c2w, 120, 1)  # the same rays, lit alike
    blocks = fine.reshape(30, 4, 30, 4, 4).astype(np.float64)
    covered = blocks[..., 3] / 255
    coverage = covered.mean((1, 3))
    assert int(((coverage > 0) & (coverage < 1)).sum()) > 50
    colour = (blocks[..., :3] * covered[..., None]).sum((1, 3)) / np.maximum(covered.sum((1, 3)), 1)[
        ..., None
    ]
    # rounding to 8 bits: at most 1/2 in what is compared, and 1/2 in each ray of the fine picture
    np.testing.assert_allclose(coarse[..., 3], 255 * coverage, rtol=0, atol=0.5 + 1e-3)
    np.testing.assert_allclose(coarse[..., :3], colour, rtol=0, atol=1.0 + 1e-3)
    assert not coarse[coverage == 0].any()


def test_the_picture_is_rich_and_fine() -> None:
    image = demo_scene("test", size=100, views=2, supersample=2).images[0].numpy()
    solid = image[image[..., 3] == 255][:, :3].astype(np.float64)
    assert len(np.unique(solid.astype(np.uint8) >> 4, axis=0)) > 150, "few colours"
    # texture near the pixel scale, so that the levels of a pyramid lose something
    small = next(pyramid(image, 1, 1)).astype(np.float64)
    back = small.repeat(2, 0).repeat(2, 1)
    assert float(np.abs(back - image)[image[..., 3] == 255][:, :3].mean()) > 8


def test_splits_have_their_own_cameras() -> None:
    positions = {split: camera_positions(split, views) for split, views in procedural.VIEWS.items()}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        gaps = np.linalg.norm(positions[a][:, None] - positions[b][None], axis=-1)
        assert float(gaps.min()) > 0.05
    turns = np.unwrap(np.arctan2(positions["test"][:, 1], positions["test"][:, 0]))
    np.testing.assert_allclose(np.diff(turns), 2 * math.pi / 12, rtol=1e-9)


def test_load_dataset_takes_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procedural, "VIEWS", {"train": 3, "val": 1, "test": 2})
    procedural._rendered.cache_clear()
    full, small = (
        load_dataset("demo", split="val"),
        load_dataset("demo", split="val", background="black", downscale=4),
    )
    procedural._rendered.cache_clear()
    assert tuple(full.images[0].shape) == (200, 200, 4)
    assert (small.background, small.scale.tolist()) == ("black", [4])
    np.testing.assert_array_equal(small.images[0].numpy(), next(pyramid(full.images[0].numpy(), 2, 1)))


def test_convert_writes_the_scene_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = demo_scene("train", size=32, views=2, supersample=1)
    monkeypatch.setattr(procedural, "VIEWS", {"train": 2, "val": 1, "test": 1})
    real = procedural.demo_frames
    monkeypatch.setattr(procedural, "demo_frames", lambda split: real(split, size=32, supersample=1))
    out = multiscale.convert("demo", tmp_path / "demo", levels=1, progress=False)
    got = load_dataset(out)
    np.testing.assert_array_equal(got.pixels.numpy(), want.pixels.numpy())
    np.testing.assert_allclose(got.focal.numpy(), want.focal.numpy(), rtol=16 * 2.0**-52)
    np.testing.assert_array_equal(got.c2w.numpy(), want.c2w.numpy())
    assert sorted(p.name for p in out.glob("*.json")) == [
        f"transforms_{s}.json" for s in ("test", "train", "val")
    ]


@pytest.mark.parametrize("argument", ["size", "views", "supersample"])
def test_numbers_below_one_are_refused(argument: str) -> None:
    with pytest.raises(InputError, match=f"{argument} is 0; expected at least 1"):
        demo_scene("train", **{argument: 0})


def test_unknown_split_is_refused() -> None:
    with pytest.raises(InputError, match="split is 'dev'; expected one of train, val, test"):
        demo_scene("dev")


# ---- intersections against brute force -------------------------------------------------------------------------

_GREY = Material(plain(0.5, 0.5, 0.5))
_SHAPES: list[tuple[Solid, str]] = [
    (Sphere((0.1, -0.2, 0.3), 0.5, _GREY), "sphere"),
    (Cylinder(0.2, 0.1, -0.3, 0.4, 0.35, _GREY), "cylinder"),
    (Torus((0.1, 0.0, -0.1), 0.5, 0.15, 0.7, 0.3, _GREY), "torus"),
    (RoundedBox((0.0, 0.1, 0.0), (0.4, 0.3, 0.2), 0.05, 0.6, _GREY), "box"),
]


def _inside(solid: Solid, points: np.ndarray) -> np.ndarray:
    """An implicit definition of each solid, written apart from the tracer's: [n] for points [n, 3]."""
    p = points - solid.centre[:, 0]
    if isinstance(solid, Sphere):
        return np.linalg.norm(p, axis=-1) < solid.bound
    if isinstance(solid, Cylinder):
        return (np.hypot(p[:, 0], p[:, 1]) < solid.radius) & (np.abs(p[:, 2]) < solid.half)
    assert isinstance(solid, (Torus, RoundedBox))
    q = p @ solid.axes.T
    if isinstance(solid, Torus):
        return (np.hypot(q[:, 0], q[:, 1]) - solid.major) ** 2 + q[:, 2] ** 2 < solid.minor**2
    outer = np.maximum(np.abs(q) - (solid.half[:, 0] - solid.bevel), 0)
    return np.linalg.norm(outer, axis=-1) < solid.bevel


def _grown(solid: Solid) -> Solid:
    """The same solid, larger by two steps of the brute-force search."""
    grown, extra = copy.copy(solid), np.float32(2e-3)
    for size in ("bound", "radius", "half", "minor", "bevel"):
        if size in vars(solid):
            setattr(grown, size, getattr(solid, size) + extra)
    return grown


@pytest.mark.parametrize("solid", [s for s, _ in _SHAPES], ids=[name for _, name in _SHAPES])
def test_a_solid_lies_in_its_boxes(solid: Solid) -> None:
    points = solid.centre.T + np.random.default_rng(5).uniform(-0.75, 0.75, (200_000, 3))
    points = points[_inside(solid, points)]
    centres, extents = (numbers.T[:, None] for numbers in solid.boxes)
    assert bool((np.abs(points - centres) < extents + 1e-6).all(-1).any(0).all())
    # and they are not much larger: some of it reaches to every side
    low, high = (centres - extents).min((0, 1)), (centres + extents).max((0, 1))
    np.testing.assert_allclose(points.min(0), low, atol=0.05)
    np.testing.assert_allclose(points.max(0), high, atol=0.05)


@pytest.mark.parametrize("solid", [s for s, _ in _SHAPES], ids=[name for _, name in _SHAPES])
def test_rays_enter_solids_where_brute_force_says(solid: Solid) -> None:
    rng = np.random.default_rng(3)
    origin = np.array([2.0, -2.5, 1.5])
    aim = rng.uniform(-0.9, 0.9, (300, 3))
    directions = (aim - origin) / np.linalg.norm(aim - origin, axis=-1, keepdims=True)
    got = solid.hit(np.float32(origin)[:, None], np.float32(directions).T)
    step = 1e-3
    t = np.arange(1.5, 6.0, step)
    points = origin + t[None, :, None] * directions[:, None]
    inside = _inside(solid, points.reshape(-1, 3)).reshape(300, -1)
    chord = inside.sum(1) * step
    first = np.where(inside.any(1), t[inside.argmax(1)], np.inf)
    hit = got < 1e8
    # the march sees a solid 2e-4 larger than it is: a ray that passes this close to one may be counted, none farther
    grown = _inside(_grown(solid), points.reshape(-1, 3)).reshape(300, -1).any(1)
    assert bool(grown[hit].all())
    # and a ray that is inside for longer than the steps of t must be counted
    long = chord > 5 * step
    assert int(long.sum()) > 30
    assert bool(hit[long].all())
    both = hit & long
    entry = origin + got[both, None] * directions[both]
    normal = solid.normal(np.float32(entry).T).T
    cosine = -(normal * directions[both]).sum(-1)
    assert float(cosine.min()) > 0, "a normal points along the ray that enters"
    # across the surface: the march stops at most 2e-4 early, brute force is at most one step late
    np.testing.assert_array_less(np.abs(got[both] - first[both]) * cosine, 2e-4 + step)
