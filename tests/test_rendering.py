"""Rendering, camera paths and pictures; the last two are made of numbers on the CPU, whatever rendered them."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from analytic_models import Ball
from hypothesis import given
from hypothesis import strategies as st
from tiny_scenes import dataset, orbit

from mipnerf_fast import InputError, MipNerfConfig, NerfConfig, build_model, cameras, preset
from mipnerf_fast.camera_paths import (
    PATHS,
    ZOOM_FACTOR,
    Sphere,
    camera_path,
    cut_to_sphere,
    look_at,
    surroundings,
)
from mipnerf_fast.data import Dataset
from mipnerf_fast.pictures import colour_map, to_uint8
from mipnerf_fast.rendering import (
    KINDS,
    distance_range,
    normals_from_distance,
    picture,
    rays_per_chunk,
    render_image,
    render_path,
)

TINY = MipNerfConfig(num_samples=6, net_depth=2, net_width=16, net_width_condition=8)
TINY_NERF = NerfConfig(num_coarse=6, num_fine=6, net_depth=2, net_width=16, net_width_condition=8)


@pytest.fixture
def data() -> Dataset:
    return dataset([24, 24, 24, 24, 24], [1] * 5, Ball())


def view(height: int = 7, width: int = 9) -> cameras.Rays:
    return cameras.pinhole_rays(orbit(1)[0, :3].float(), height, width, 10.0)


@pytest.mark.parametrize("config", [TINY, TINY_NERF], ids=["mipnerf", "nerf"])
@pytest.mark.parametrize("chunk", [1, 8, 63, 64, None])
def test_render_image_is_the_finest_level_whatever_the_chunks(
    config: MipNerfConfig | NerfConfig, chunk: int | None, device: torch.device
) -> None:
    # float64: chunks may only change the order of summation inside a matrix product, so 1e-12 is generous.
    model = build_model(config).double().to(device)
    rays = view().map(lambda field: field.double())
    want = model(rays.map(lambda field: field.to(device)))[-1]
    done: list[int] = []
    got = render_image(model, rays, chunk_rays=chunk, progress=done.append)
    for name in ("rgb", "distance", "acc"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-12, atol=1e-12)
    assert got.rgb.shape == (7, 9, 3)
    assert got.distance.shape == got.acc.shape == (7, 9)
    assert sum(done) == 63
    assert len(done) == math.ceil(63 / (chunk or 63))
    assert not got.rgb.requires_grad
    assert got.rgb.device.type == device.type


def test_render_image_is_deterministic_and_takes_the_background(device: torch.device) -> None:
    model = build_model(TINY).to(device)
    white, again = render_image(model, view()), render_image(model, view())
    black = render_image(model, view(), white_background=False)
    assert torch.equal(white.rgb, again.rgb)
    # Both backgrounds sum the same products; one addition of 1 - acc apart: three roundings of numbers below 2.
    torch.testing.assert_close(
        white.rgb - black.rgb, (1 - black.acc)[..., None].expand_as(white.rgb), rtol=0, atol=4e-7
    )


def test_render_image_of_no_rays(device: torch.device) -> None:
    rays = view().flatten().map(lambda field: field[:0])
    assert render_image(build_model(TINY).to(device), rays).rgb.shape == (0, 3)


def test_render_image_refuses_empty_chunks() -> None:
    with pytest.raises(ValueError, match=r"chunk_rays.*at least 1.*0"):
        render_image(build_model(TINY), view(), chunk_rays=0)


def test_larger_networks_get_smaller_chunks() -> None:
    cpu = torch.device("cpu")
    small, paper, nerf = (
        rays_per_chunk(build_model(preset(name).model), cpu) for name in ("small", "paper", "nerf")
    )
    assert small > paper >= 64
    assert nerf >= 64
    assert all(n & (n - 1) == 0 for n in (small, paper, nerf))


def test_normals_of_a_ball() -> None:
    """Central differences of a ball of radius 1: off by the order of (pixel / radius)^2, here 0.05^2 = 0.0025."""
    rays = cameras.pinhole_rays(orbit(1)[0, :3].float(), 80, 80, 80.0)
    rendering = render_image(Ball(), rays)
    points = rays.origins + rays.directions * rendering.distance[..., None]
    facing = -(points * rays.viewdirs).sum(-1)
    inner = (rendering.acc > 0) & (
        facing > 0.5
    )  # away from the rim, where a pixel covers much more of the ball
    assert int(inner.sum()) > 500
    normals = normals_from_distance(rays, rendering.distance)
    torch.testing.assert_close(normals[inner], points[inner], rtol=0, atol=10 * 0.0025)
    assert bool(((normals * rays.directions).sum(-1) <= 0).all())


def test_normals_need_two_pixels() -> None:
    with pytest.raises(ValueError, match="2 x 2"):
        normals_from_distance(view(1, 5), torch.ones(1, 5))


# camera paths


def test_surroundings_of_an_orbit(data: Dataset) -> None:
    around = surroundings(data)
    # The cameras are float32: the centre is off by a few of their roundings at distance 4.
    torch.testing.assert_close(around.centre, torch.zeros(3).double(), rtol=0, atol=1e-5)
    assert around.up.tolist() == [0, 0, 1]
    assert around.distance == pytest.approx(4, abs=1e-5)
    assert around.elevations.tolist() == pytest.approx([0.5] * 5, abs=1e-5)
    assert around.extent == pytest.approx(4 * math.tan(0.35), rel=1e-5)


def test_surroundings_of_parallel_cameras(data: Dataset) -> None:
    data.c2w = orbit(1)[:, :3].float().repeat(5, 1, 1)
    around = surroundings(data)
    torch.testing.assert_close(around.centre, torch.zeros(3).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("frames", [1, 3, 5])
def test_every_camera_of_a_path_looks_at_the_centre(data: Dataset, name: str, frames: int) -> None:
    path = camera_path(name, data, frames)
    assert len(path) == frames
    for camera in path:
        rotation, position = camera.c2w[:, :3], camera.c2w[:, 3]
        torch.testing.assert_close(rotation.T @ rotation, torch.eye(3), rtol=0, atol=1e-5)
        assert float(torch.linalg.det(rotation)) == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(-rotation[:, 2], -position / position.norm(), rtol=0, atol=1e-5)
        assert float(rotation[2, 1]) > 0  # upright
        assert (camera.height, camera.width, camera.focal) == (24, 24, float(data.focal[0]))


def test_turntable_goes_around_evenly(data: Dataset) -> None:
    path = camera_path("turntable", data, 8)
    positions = torch.stack([camera.c2w[:, 3] for camera in path])
    assert positions[:, 2].tolist() == pytest.approx([4 * math.sin(0.5)] * 8, abs=1e-4)
    azimuths = torch.atan2(positions[:, 1], positions[:, 0])
    steps = torch.remainder(azimuths.roll(-1) - azimuths, 2 * math.pi)
    assert steps.tolist() == pytest.approx([math.pi / 4] * 8, abs=1e-4)
    torch.testing.assert_close(path[0].c2w, data.c2w[0], rtol=0, atol=1e-4)


def test_spiral_rises(data: Dataset) -> None:
    data.c2w = torch.cat([orbit(3, 0.2), orbit(2, 0.9)])[:, :3].float()
    heights = [float(camera.c2w[2, 3]) for camera in camera_path("spiral", data, 6)]
    assert heights == sorted(heights)
    assert heights[-1] > heights[0] + 1


def test_zoom_moves_away_and_keeps_to_the_ball(data: Dataset) -> None:
    path = camera_path("zoom", data, 4)
    distances = [float(camera.c2w[:, 3].norm()) for camera in path]
    assert distances[0] == pytest.approx(4, abs=1e-4)
    assert distances[-1] == pytest.approx(4 * ZOOM_FACTOR, rel=1e-5)
    assert distances == sorted(distances)
    radius = surroundings(data).extent
    for camera in path:
        rays = camera.rays()
        assert bool((rays.far >= rays.near).all())
        inside = rays.far > rays.near
        for end in (rays.near, rays.far):
            points = rays.origins + end * rays.directions
            assert float(points.norm(dim=-1)[inside[..., 0]].max()) <= radius * (1 + 1e-3)
    # From far away most of the picture misses the ball.
    assert float(inside.float().mean()) < 0.2


@given(st.floats(0.1, 3.0), st.floats(-1, 1), st.floats(-1, 1))
def test_cut_to_sphere_ends_on_the_sphere(radius: float, x: float, y: float) -> None:
    rays = cameras.pinhole_rays(orbit(1)[0, :3], 5, 6, 8.0, 0.0, 100.0)
    sphere = Sphere(torch.tensor([x, y, 0.0]).double(), radius)
    cut = cut_to_sphere(rays, sphere)
    inside = (cut.far > cut.near)[..., 0]
    for end in (cut.near, cut.far):
        distance = (rays.origins + end * rays.directions - sphere.centre).norm(dim=-1)
        # float64; t solves a quadratic whose terms are below 100: the root of their rounding bounds the error.
        torch.testing.assert_close(
            distance[inside], torch.full_like(distance[inside], radius), rtol=0, atol=1e-6
        )


def test_test_path_is_the_views(data: Dataset) -> None:
    path = camera_path("test", data)
    assert [camera.name for camera in path] == data.names
    for i, camera in enumerate(path):
        for got, want in zip(camera.rays()[:6], data.rays(i)[:6], strict=True):
            assert torch.equal(got, want)
    assert [camera.name for camera in camera_path("test", data, 2)] == ["r_0", "r_2"]
    assert len(camera_path("test", data, 99)) == 5


def test_test_path_takes_the_finest_scale() -> None:
    data = dataset([16, 8, 16, 8], [1, 2, 1, 2], Ball())
    assert [camera.name for camera in camera_path("test", data)] == ["r_0", "r_2"]


def test_bad_paths(data: Dataset) -> None:
    with pytest.raises(InputError, match=r"--path.*'zum'.*turntable"):
        camera_path("zum", data)
    with pytest.raises(InputError, match=r"--frames.*at least 1.*0"):
        camera_path("turntable", data, 0)


def test_looking_straight_down() -> None:
    c2w = look_at(
        torch.tensor([0.0, 0.0, 3.0]).double(),
        torch.zeros(3).double(),
        torch.tensor([0.0, 0.0, 1.0]).double(),
    )
    torch.testing.assert_close(c2w[:, :3].T @ c2w[:, :3], torch.eye(3))


# pictures


def test_to_uint8_rounds_and_clips() -> None:
    values = torch.tensor([-1.0, 0.0, 0.49 / 255, 0.51 / 255, 127.4 / 255, 127.6 / 255, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 127, 128, 255, 255]


def test_colour_map_clips_and_takes_any_shape() -> None:
    colours = colour_map(torch.tensor([[-1.0, 0.0], [1.0, 9.0]]))
    assert colours.shape == (2, 2, 3)
    assert torch.equal(colours[0, 0], colours[0, 1])
    assert torch.equal(colours[1, 0], colours[1, 1])
    assert not torch.equal(colours[0, 0], colours[1, 0])
    assert bool(colour_map(torch.tensor(math.nan)).isfinite().all())


def test_pictures_of_a_ball(data: Dataset) -> None:
    camera = camera_path("turntable", data, 4)[0]
    rays = camera.rays()
    rendering = render_image(Ball(), rays)
    ends = distance_range(camera, rendering)
    pictures = {kind: picture(kind, camera, rays, rendering, ends) for kind in KINDS}
    for kind, image in pictures.items():
        assert image.shape == (24, 24, 3)
        assert image.dtype == np.uint8
        # A corner misses the ball: white everywhere but in the opacity.
        assert image[0, 0].tolist() == ([0, 0, 0] if kind == "opacity" else [255, 255, 255])
    assert pictures["opacity"][12, 12].tolist() == [255, 255, 255]
    # The middle of the ball is nearest: bluer than its rim.
    row = pictures["depth"][12].astype(int)
    seen = np.flatnonzero(pictures["opacity"][12, :, 0])
    assert row[12, 2] - row[12, 0] > row[seen[0], 2] - row[seen[0], 0]
    # Facing the camera, which stands at (cos, 0, sin) of 0.5.
    want = 255 * (0.5 + 0.5 * np.array([math.cos(0.5), 0.0, math.sin(0.5)]))
    np.testing.assert_allclose(pictures["normals"][11:13, 11:13].mean((0, 1)), want, atol=255 * 0.05)
    with pytest.raises(ValueError, match="unknown kind"):
        picture("colour", camera, rays, rendering, ends)


def test_depth_colours_of_an_empty_view(data: Dataset) -> None:
    camera = camera_path("turntable", data, 1)[0]
    rendering = render_image(Ball(radius=1e-3), camera.rays())
    assert distance_range(camera, rendering) == (0.0, 1.0)


# files


def test_render_path_writes_pictures_and_videos(tmp_path: Path, device: torch.device) -> None:
    data = dataset([23, 23, 23], [1] * 3, Ball())  # odd: the video is padded by a row and a column
    folder = tmp_path / "render" / "turntable"
    ball = Ball().to(device)
    render_path(ball, camera_path("turntable", data, 5), folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*KINDS, *(f"{kind}.mp4" for kind in KINDS)]
    )
    for kind in KINDS:
        frames = sorted((folder / kind).iterdir())
        assert [path.name for path in frames] == [f"{k:04d}.png" for k in range(5)]
        images = np.stack([imageio.imread(path) for path in frames])
        assert images.shape == (5, 23, 23, 3)
        assert images.std() > 5
        assert imageio.imread(folder / f"{kind}.mp4").shape == (5, 24, 24, 3)
    # A shorter run leaves nothing of the longer one.
    lines = render_path(ball, camera_path("turntable", data, 2), folder, kinds=["rgb"])
    assert sorted(path.name for path in folder.iterdir()) == ["rgb", "rgb.mp4"]
    assert len(list((folder / "rgb").iterdir())) == 2
    assert any("rgb.mp4" in line for line in lines)
    assert [path.name for path in folder.parent.iterdir()] == ["turntable"]


def test_an_interrupted_path_keeps_the_previous_one(tmp_path: Path, data: Dataset) -> None:
    folder = tmp_path / "spiral"
    render_path(Ball(), camera_path("spiral", data, 2), folder, kinds=["rgb"])
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}

    class Interrupted(Ball):
        calls = 0

        def forward(self, *args: object, **kwargs: object) -> list:
            Interrupted.calls += 1
            if Interrupted.calls > 1:
                raise KeyboardInterrupt
            return super().forward(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        render_path(Interrupted(), camera_path("spiral", data, 3), folder, kinds=["rgb"], chunk_rays=10_000)
    assert {path: path.read_bytes() for path in folder.rglob("*.png")} == before
    assert (folder / "rgb.mp4").exists()


def test_no_ffmpeg_skips_the_video_and_says_so(
    tmp_path: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    lines = render_path(Ball(), camera_path("test", data, 2), tmp_path / "test", kinds=["rgb"])
    assert any("mp4 skipped" in line and "imageio-ffmpeg" in line for line in lines)
    assert [path.name for path in (tmp_path / "test").iterdir()] == ["rgb"]


def test_views_of_different_sizes_make_no_video(tmp_path: Path) -> None:
    data = dataset([8, 12], [1, 1], Ball())
    lines = render_path(Ball(), camera_path("test", data), tmp_path / "test", kinds=["rgb"])
    assert any("mp4 skipped" in line and "size" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ["rgb", "colour"]}, "--kinds.*colour"),
        ({"kinds": []}, "--kinds.*none"),
        ({"frames_per_second": 0.0}, "--fps.*positive.*0"),
        ({"frames_per_second": math.nan}, "--fps.*positive.*nan"),
    ],
)
def test_render_path_refuses_before_writing(
    tmp_path: Path, data: Dataset, change: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        render_path(Ball(), camera_path("test", data, 1), tmp_path / "x", **change)
    assert not list(tmp_path.iterdir())
