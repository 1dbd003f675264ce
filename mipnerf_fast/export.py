"""Export: a model's density as a voxel grid, and its surface as a mesh with vertex colours."""

from __future__ import annotations

import importlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .camera_paths import Surroundings
from .cameras import Rays
from .durable_files import write_durably
from .errors import InputError
from .model import Model
from .pictures import to_uint8
from .progress import Progress
from .rendering import render_image

FORMATS = ("ply", "glb", "npz")
CHUNK_POINTS = 2**15

# Densities are judged by the opacity of this share of the box's longest side.
_PROBE_SHARE = 0.1
# The standard deviation of a uniform distribution over one voxel, in voxels.
_VOXEL_DEVIATION = 1 / math.sqrt(12)


@dataclass(frozen=True)
class DensityGrid:
    """The density at the corners of a regular grid.

    density: float32 [X, Y, Z], per world unit. low, high: [3], the first and the last corner, world units.
    """

    density: NDArray[np.float32]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @property
    def spacing(self) -> NDArray[np.float64]:
        """[3], world units between neighbours."""
        return np.asarray((self.high - self.low) / (np.array(self.density.shape) - 1), np.float64)


@dataclass(frozen=True)
class Threshold:
    """The density at which the surface is drawn, and where it comes from."""

    value: float
    rule: str


@dataclass(frozen=True)
class Mesh:
    """A triangle mesh: vertices [V, 3] in world units, faces [F, 3], outward normals [V, 3], colours uint8 [V, 3]."""

    vertices: NDArray[np.float64]
    faces: NDArray[np.int64]
    normals: NDArray[np.float64]
    colours: NDArray[np.uint8]


def _optional(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"export needs {package} ({error}); install the extra: pip install 'mipnerf_fast[export]'"
        ) from None


def require_export_packages() -> None:
    """Fail before the work, not after it, where scikit-image or trimesh is missing."""
    _optional("skimage.measure", "scikit-image")
    _optional("trimesh", "trimesh")


def default_box(around: Surroundings) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The cube around what nearly every camera sees."""
    centre = around.centre.numpy()
    return centre - around.extent, centre + around.extent


@torch.no_grad()
def density_grid(
    model: Model,
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    resolution: int = 128,
    chunk_points: int = CHUNK_POINTS,
) -> DensityGrid:
    """Sample a model's density on a grid over a box.

    Every value is that of an isotropic Gaussian as wide as a voxel, so that mip-NeRF integrates over what a coarse
    grid would alias.

    Args:
        model: a trained model.
        low, high: [3], opposite corners in world units.
        resolution: values along the longest side, at least 2; the others follow, so that voxels are cubes as nearly
            as whole numbers allow.
        chunk_points: points at once.

    Errors: InputError for an empty box or a resolution below 2.
    """
    size = high - low
    if not (np.isfinite(size).all() and (size > 0).all()):
        raise InputError(
            f"--box: every upper bound must exceed its lower bound, got {list(low)} to {list(high)}"
        )
    if resolution < 2:
        raise InputError(f"--resolution: must be at least 2, got {resolution}")
    if chunk_points < 1:
        raise InputError(f"--chunk-points: must be at least 1, got {chunk_points}")
    like = next(model.parameters())
    voxel = float(size.max()) / (resolution - 1)
    counts = [max(2, 1 + round(float(side) / voxel)) for side in size]
    axes = [torch.linspace(float(a), float(b), n) for a, b, n in zip(low, high, counts, strict=True)]
    density = np.empty(math.prod(counts), np.float32)
    # Density does not depend on the view direction; the network wants one all the same.
    down = torch.tensor([0.0, 0.0, -1.0]).to(like)
    with Progress("density grid", density.size, "points") as progress:
        for start in range(0, density.size, chunk_points):
            index = torch.arange(start, min(start + chunk_points, density.size))
            z = index % counts[2]
            y = torch.div(index, counts[2], rounding_mode="floor") % counts[1]
            x = torch.div(index, counts[2] * counts[1], rounding_mode="floor")
            points = torch.stack([axes[0][x], axes[1][y], axes[2][z]], -1).to(like)
            values = model.query(points, down.expand_as(points), voxel * _VOXEL_DEVIATION)[1]
            density[start : start + len(index)] = values.float().cpu().numpy()
            progress(len(index))
    return DensityGrid(density.reshape(counts), low, high)


def choose_threshold(grid: DensityGrid, given: float | None = None) -> Threshold:
    """The density at which to draw the surface: as given, or from the data.

    From the data: Otsu's split into two classes of the opacity 1 - exp(-density l) that a piece of length l, a tenth
    of the box's longest side, would have. Densities span many decades, and opacity is what can be seen of them.

    Errors: InputError for a threshold that is not positive, or an empty surface: the threshold is outside the
    densities found, or, where none is given, not even the largest makes such a piece half opaque. It names the range
    found.
    """
    density = np.nan_to_num(grid.density.astype(np.float64))
    low, high = float(density.min()), float(density.max())
    where = f"in the box {np.round(grid.low, 3).tolist()} to {np.round(grid.high, 3).tolist()}"
    found = f"the densities {where} range from {low:.4g} to {high:.4g} per world unit"
    if given is not None:
        if not (math.isfinite(given) and given > 0):
            raise InputError(f"--threshold: must be positive, got {given}")
        threshold = Threshold(given, "given")
    else:
        length = _PROBE_SHARE * float((grid.high - grid.low).max())
        solid = math.log(2.0) / length
        if not low < high or high < solid:
            raise InputError(
                f"export: there is nothing solid to draw a surface of (that takes a density of {solid:.4g}, half "
                f"opaque across a tenth of the box, beside something fainter): {found}"
            )
        filters = _optional("skimage.filters", "scikit-image")
        split = float(filters.threshold_otsu(1 - np.exp(-density * length)))
        value = -math.log1p(-split) / length
        threshold = Threshold(value, "Otsu's method on the opacity of a tenth of the box")
    if not low < threshold.value < high:
        raise InputError(
            f"export: there is no surface at the density {threshold.value:.4g} ({threshold.rule}): {found}"
        )
    return threshold


def extract_mesh(
    model: Model, grid: DensityGrid, threshold: Threshold, chunk_rays: int | None = None
) -> Mesh:
    """The surface of a grid by marching cubes, coloured by the model.

    A vertex has the colour that a camera sees which looks at it against its normal, with a pixel as wide as a voxel:
    the composite of what lies within a tenth of the box behind a voxel before the vertex. (The network's colour at
    the vertex itself is that of the faint rim of the solid, which hardly shows in any picture and is badly trained.)

    Args:
        model: a trained model.
        grid: its density.
        threshold: of the surface.
        chunk_rays: see `render_image`.

    Errors: InputError where scikit-image is missing.
    """
    measure = _optional("skimage.measure", "scikit-image")
    spacing = grid.spacing
    # skimage calls "ascent" what winds the faces outwards where the inside has the larger values.
    vertices, faces, _, _ = measure.marching_cubes(
        np.nan_to_num(grid.density), threshold.value, spacing=tuple(spacing), gradient_direction="ascent"
    )
    vertices = vertices.astype(np.float64) + grid.low
    normals = _face_normals(vertices, faces)
    rays = _rays_against(normals, vertices, grid)
    with Progress("vertex colours", len(vertices), "vertices") as progress:
        seen = render_image(model, rays, False, chunk_rays, progress)
    # On black, colours are those of what is there times its opacity.
    colours = seen.rgb / seen.acc.clamp(min=1e-6)[..., None]
    return Mesh(vertices, faces.astype(np.int64), normals, to_uint8(colours))


def _rays_against(normals: NDArray[np.float64], vertices: NDArray[np.float64], grid: DensityGrid) -> Rays:
    """Rays towards vertices against their normals, from a box's length away, cut to just before and behind them."""
    longest, voxel = float((grid.high - grid.low).max()), float(grid.spacing.max())
    outward = torch.from_numpy(normals).float()
    column = torch.ones(len(vertices), 1)
    return Rays(
        origins=torch.from_numpy(vertices).float() + longest * outward,
        directions=-outward,
        viewdirs=-outward,
        # A cone's radius is 2/sqrt(12) pixel widths.
        radii=column * (2 * _VOXEL_DEVIATION * voxel / longest),
        near=column * (longest - voxel),
        far=column * (longest * (1 + _PROBE_SHARE)),
        lossmult=column,
    )


def _face_normals(vertices: NDArray[np.float64], faces: NDArray[Any]) -> NDArray[np.float64]:
    """Unit vertex normals: the mean of the normals of the faces around, by area."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    area = np.cross(b - a, c - a)
    normals = np.zeros_like(vertices)
    for corner in range(3):
        np.add.at(normals, faces[:, corner], area)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    return np.where(length > 0, normals / np.maximum(length, 1e-30), np.array([0.0, 0.0, 1.0]))


def write_grid(path: Path, grid: DensityGrid, threshold: Threshold) -> None:
    """Write an npz: density [X, Y, Z] float32, box [2, 3], spacing [3], threshold, threshold_rule."""
    data = io.BytesIO()
    np.savez_compressed(
        data,
        density=grid.density,
        box=np.stack([grid.low, grid.high]),
        spacing=grid.spacing,
        threshold=np.float64(threshold.value),
        threshold_rule=np.str_(threshold.rule),
    )
    write_durably(path, data.getvalue())


def write_mesh(path: Path, mesh: Mesh) -> None:
    """Write a mesh as .ply (world axes) or .glb (turned from z up to the y up that glTF demands).

    Errors: InputError for another suffix, or where trimesh is missing.
    """
    trimesh = _optional("trimesh", "trimesh")
    kind = path.suffix.removeprefix(".")
    if kind not in ("ply", "glb"):
        raise InputError(f"{path}: a mesh is written as .ply or .glb")
    vertices, normals = mesh.vertices, mesh.normals
    if kind == "glb":
        vertices, normals = (
            array[:, [0, 2, 1]] * np.array([1.0, 1.0, -1.0]) for array in (vertices, normals)
        )
    result = trimesh.Trimesh(
        vertices, mesh.faces, vertex_normals=normals, vertex_colors=mesh.colours, process=False
    )
    write_durably(path, result.export(file_type=kind))
