"""Export: density grids, thresholds and meshes of a ball."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from analytic_models import Ball
from tiny_scenes import dataset

from mipnerf_fast import InputError, MipNerfConfig, NerfConfig, build_model, export
from mipnerf_fast.camera_paths import surroundings

LOW, HIGH = np.full(3, -1.5), np.full(3, 1.5)


@pytest.fixture(scope="module")
def grid() -> export.DensityGrid:
    return export.density_grid(Ball(), LOW, HIGH, resolution=41)


@pytest.fixture(scope="module")
def mesh(grid: export.DensityGrid) -> export.Mesh:
    return export.extract_mesh(Ball(), grid, export.choose_threshold(grid))


@pytest.mark.parametrize(
    "config",
    [
        MipNerfConfig(net_depth=2, net_width=8, net_width_condition=8),
        NerfConfig(net_depth=2, net_width=8, net_width_condition=8),
    ],
    ids=["mipnerf", "nerf"],
)
def test_grid_holds_the_density_at_its_corners(config: MipNerfConfig | NerfConfig) -> None:
    model = build_model(config)
    low, high = np.array([-1.0, -0.5, 0.0]), np.array([1.0, 0.5, 0.4])
    grid = export.density_grid(model, low, high, resolution=11, chunk_points=7)
    assert grid.density.shape == (11, 6, 3)
    np.testing.assert_allclose(grid.spacing, 0.2)
    for index in ((0, 0, 0), (10, 5, 2), (3, 4, 1)):
        point = torch.tensor(low + grid.spacing * np.array(index)).float()[None]
        with torch.no_grad():
            want = model.query(point, torch.tensor([[0.0, 0.0, -1.0]]), 0.2 / math.sqrt(12))[1]
        # Positions agree to an ulp of 1; the encoding of these networks multiplies it by at most 2^15.
        assert grid.density[index] == pytest.approx(float(want), rel=0.02)
    whole = export.density_grid(model, low, high, resolution=11)
    # Chunks may only change the order of summation of a few hundred float32 products.
    np.testing.assert_allclose(grid.density, whole.density, rtol=1e-4)


def test_threshold_from_the_data_separates_the_ball(grid: export.DensityGrid) -> None:
    threshold = export.choose_threshold(grid)
    assert 0.01 < threshold.value < 90
    assert "Otsu" in threshold.rule
    assert export.choose_threshold(grid, 12.0) == export.Threshold(12.0, "given")


def test_threshold_is_never_mere_fog() -> None:
    """A faint cloud inside a fainter one: Otsu would part them, but nothing is solid."""
    fog = export.density_grid(Ball(inside=1.0, outside=0.1), LOW, HIGH, resolution=9)
    with pytest.raises(InputError, match=r"nothing solid.* 2\.31.*range from 0\.1 to 1 per world unit"):
        export.choose_threshold(fog)
    assert export.choose_threshold(fog, 0.5).value == 0.5


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_bad_thresholds(grid: export.DensityGrid, value: float) -> None:
    with pytest.raises(InputError, match="--threshold: must be positive"):
        export.choose_threshold(grid, value)


def test_an_empty_surface_names_the_range(grid: export.DensityGrid) -> None:
    with pytest.raises(
        InputError, match=r"no surface at the density 1000 \(given\).*-1\.5.*range from 0\.001.* to 100"
    ):
        export.choose_threshold(grid, 1000.0)
    nothing = export.DensityGrid(np.zeros((3, 3, 3), np.float32), LOW, HIGH)
    with pytest.raises(InputError, match=r"nothing solid.*range from 0 to 0"):
        export.choose_threshold(nothing)
    solid = export.DensityGrid(np.full((3, 3, 3), 50, np.float32), LOW, HIGH)
    with pytest.raises(InputError, match=r"fainter.*range from 50 to 50"):
        export.choose_threshold(solid)


def test_vertices_lie_on_the_ball_and_face_outwards(grid: export.DensityGrid, mesh: export.Mesh) -> None:
    threshold = export.choose_threshold(grid).value
    # Where sigmoid((1 - r) / 0.05) reaches the threshold; marching cubes is off by less than a voxel.
    share = (threshold - 1e-3) / (100 - 1e-3)
    radius = 1 - 0.05 * math.log(share / (1 - share))
    distance = np.linalg.norm(mesh.vertices, axis=-1)
    assert np.abs(distance - radius).max() < grid.spacing.max()
    assert len(mesh.vertices) > 1000
    outward = mesh.vertices / distance[:, None]
    assert (mesh.normals * outward).sum(-1).min() > 0.9
    solid = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    assert solid.is_watertight
    assert solid.volume > 0  # faces wind outwards
    inner, outer = (4 / 3 * math.pi * (radius + sign * grid.spacing.max()) ** 3 for sign in (-1, 1))
    assert inner < solid.volume < outer


def test_colours_are_seen_against_the_normals(grid: export.DensityGrid, mesh: export.Mesh) -> None:
    """A ray against the normal of a vertex meets the ball about where the vertex is."""
    want = 255 * (0.5 + 0.5 * mesh.vertices / np.linalg.norm(mesh.vertices, axis=-1, keepdims=True))
    # A normal that is off by an angle misses the radial direction by this at the distance of a voxel or two from
    # the ball: with normals within acos(0.9) that is at most 2 voxels x tan(acos(0.9)).
    bound = 255 * 0.5 * 2 * grid.spacing.max() * math.tan(math.acos(0.9))
    assert np.abs(mesh.colours - want).max() <= bound + 0.51


def test_chunks_do_not_matter(grid: export.DensityGrid, mesh: export.Mesh) -> None:
    again = export.extract_mesh(Ball(), grid, export.choose_threshold(grid), chunk_rays=100)
    assert np.array_equal(again.colours, mesh.colours)


def test_box_without_cubes() -> None:
    low, high = np.array([-1.5, -1.5, 0.0]), np.array([1.5, 1.5, 1.3])
    grid = export.density_grid(Ball(), low, high, resolution=31)
    mesh = export.extract_mesh(Ball(), grid, export.Threshold(50.0, "given"))
    # Half the ball: its surface is at the radius 1, all of it in the box.
    assert np.abs(np.linalg.norm(mesh.vertices, axis=-1) - 1).max() < grid.spacing.max()
    assert mesh.vertices[:, 2].min() >= 0


def test_grid_file(grid: export.DensityGrid, tmp_path: Path) -> None:
    export.write_grid(tmp_path / "density.npz", grid, export.choose_threshold(grid, 5.0))
    with np.load(tmp_path / "density.npz", allow_pickle=False) as found:
        assert np.array_equal(found["density"], grid.density)
        assert found["box"].tolist() == [[-1.5] * 3, [1.5] * 3]
        np.testing.assert_allclose(found["spacing"], 3 / 40)
        assert float(found["threshold"]) == 5.0
        assert str(found["threshold_rule"]) == "given"


def test_mesh_files(mesh: export.Mesh, tmp_path: Path) -> None:
    mesh = export.Mesh(mesh.vertices + np.array([0, 0, 5.0]), mesh.faces, mesh.normals, mesh.colours)
    for kind in ("ply", "glb"):
        export.write_mesh(tmp_path / f"mesh.{kind}", mesh)
    ply = trimesh.load(tmp_path / "mesh.ply", process=False)
    np.testing.assert_allclose(ply.vertices, mesh.vertices, atol=1e-5)
    assert np.array_equal(ply.faces, mesh.faces)
    assert np.array_equal(ply.visual.vertex_colors[:, :3], mesh.colours)
    glb = trimesh.load(tmp_path / "mesh.glb", process=False, force="mesh")
    # z up becomes y up: (x, y, z) to (x, z, -y).
    turned = np.stack([mesh.vertices[:, 0], mesh.vertices[:, 2], -mesh.vertices[:, 1]], -1)
    np.testing.assert_allclose(glb.vertices, turned, atol=1e-5)
    assert glb.volume > 0
    assert np.array_equal(glb.visual.vertex_colors[:, :3], mesh.colours)
    with pytest.raises(InputError, match=r"mesh\.obj.*\.ply or \.glb"):
        export.write_mesh(tmp_path / "mesh.obj", mesh)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mesh.glb", "mesh.ply"]


@pytest.mark.parametrize(("module", "package"), [("skimage.measure", "scikit-image"), ("trimesh", "trimesh")])
def test_a_missing_package_names_the_extra(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"{package}.*mipnerf_fast\[export\]"):
        export.require_export_packages()


@pytest.mark.parametrize(
    ("low", "high", "arguments", "message"),
    [
        (LOW, LOW, {}, "--box.*exceed"),
        (LOW, HIGH * math.nan, {}, "--box.*exceed"),
        (LOW, HIGH, {"resolution": 1}, "--resolution.*at least 2.*1"),
        (LOW, HIGH, {"chunk_points": 0}, "--chunk-points.*at least 1.*0"),
    ],
)
def test_bad_grids(low: np.ndarray, high: np.ndarray, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export.density_grid(Ball(), low, high, **arguments)


def test_default_box_is_what_the_cameras_see() -> None:
    low, high = export.default_box(surroundings(dataset([8] * 4, [1] * 4, Ball())))
    np.testing.assert_allclose(high, 4 * math.tan(0.35), rtol=1e-5)
    np.testing.assert_allclose(low, -high, atol=1e-5)
