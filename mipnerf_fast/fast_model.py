"""The fast model: a scale-aware hash grid, two small networks and an occupancy grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import fast_reference, ops, reference
from .backend import current_backend
from .cameras import Rays
from .config import FastConfig
from .counter_rng import Generator
from .errors import InputError
from .ops.fast_step import FastFields, MarchRays
from .reference import Composite

_HARMONICS, _GEOMETRY = 16, 16
# Half-width of the interval from which the tables start: large enough to be seen by the networks at once.
_TABLE_INIT = 1e-2


class FastModel(ops.KeepsWeights):
    """A radiance field in a hash grid whose levels fade with the width of the cone that looks at them.

    features_l = exp(-2 s^2 n_l^2) interpolate(tables_l, x), s the standard deviation of the sample's Gaussian across
    the ray and n_l the resolution of level l; with log s they go through a density network and, with spherical
    harmonics of the view direction, a colour network. An occupancy grid says where to look.

    Parameters: tables [entries, F], density_in [H, inputs], density_out [16, H], colour_in [H, 32], colour_hidden
    [H, H] (with two colour layers), colour_out [3, H]. Buffers: densities [R, R, R] and masks of the occupancy grid,
    scale_range [2], the widths s seen in training; samples_per_ray and skipped_steps of the training.

    Args:
        config: `FastConfig` whose fields are all set: see `FastConfig.for_images`.

    Errors: InputError where a field is still 0.

    Example:
        >>> model = FastModel(FastConfig().for_images(100))
        >>> rays = cameras.pinhole_rays(torch.eye(4)[:3], height=4, width=6, focal=5.0)
        >>> model.render_rays(rays).rgb.shape
        torch.Size([4, 6, 3])

    Source: Mueller et al. 2022; Barron et al. 2021, equation 14.
    """

    densities: Tensor
    masks: Tensor
    scale_range: Tensor
    samples_per_ray: Tensor
    skipped_steps: Tensor

    def __init__(self, config: FastConfig) -> None:
        super().__init__()
        for name in ("levels", "finest_resolution", "log2_table_size", "occupancy_resolution"):
            if getattr(config, name) == 0:
                raise InputError(
                    f"FastConfig.{name}: is 0; FastConfig.for_images chooses it for a width of images"
                )
        self.config = config
        self.grid = reference.hash_grid(
            config.levels, config.base_resolution, config.finest_resolution, 2**config.log2_table_size
        )
        inputs, width = reference.density_inputs(config.levels * config.features), config.net_width
        self.tables = nn.Parameter(torch.empty(self.grid.entries, config.features))
        self.density_in = nn.Parameter(torch.empty(width, inputs))
        self.density_out = nn.Parameter(torch.empty(_GEOMETRY, width))
        self.colour_in = nn.Parameter(torch.empty(width, _GEOMETRY + _HARMONICS))
        self.colour_hidden = nn.Parameter(torch.empty(width, width)) if config.colour_layers == 2 else None
        self.colour_out = nn.Parameter(torch.empty(3, width))
        cells = config.occupancy_resolution
        self.register_buffer("densities", torch.zeros(cells, cells, cells))
        words = reference.occupancy_words(cells)
        self.register_buffer("masks", torch.full((words,), -1, dtype=torch.int32))
        self.register_buffer("scale_range", torch.tensor([2.0**-14, 1.0]))
        self.register_buffer("samples_per_ray", torch.tensor([100.0], dtype=torch.float64))
        self.register_buffer("skipped_steps", torch.tensor([0]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew from torch's global generator: tables uniform, networks as He et al. 2015."""
        nn.init.uniform_(self.tables, -_TABLE_INIT, _TABLE_INIT)
        for weight in (
            self.density_in,
            self.density_out,
            self.colour_in,
            self.colour_hidden,
            self.colour_out,
        ):
            if weight is not None:
                bound = math.sqrt(6.0 / weight.shape[1])
                nn.init.uniform_(weight, -bound, bound)
        with torch.no_grad():
            self.colour_out.mul_(0.5)

    def uses_tf32(self) -> bool:
        """Whether the fused kernels take the networks' products in TF32 where the parameters are: config.mlp_dtype.

        Errors: InputError for "tf32" on a device that has no such products.
        """
        wanted = self.config.mlp_dtype
        missing = "" if wanted == "fp32" else ops.why_no_tf32(self.tables.device)
        if wanted == "tf32" and missing:
            raise InputError(f"FastConfig.mlp_dtype: is tf32, but {missing}; auto and fp32 run everywhere")
        return wanted == "tf32" or (wanted == "auto" and not missing and current_backend() != "reference")

    def check_width(self) -> None:
        """Refuse a network that the fused kernels have no room for where the parameters are.

        Errors: InputError.
        """
        device = self.tables.device
        widest = ops.widest_network(device)
        if self.config.net_width > widest and current_backend() != "reference":
            raise InputError(
                f"FastConfig.net_width: is {self.config.net_width}, but on {device.type} the kernels take up to "
                f"{widest}; on the CPU they take more"
            )

    @property
    def rendered_tables(self) -> torch.dtype:
        """What rendering reads the tables in: on a GPU float16, as they are trained there; see `CapturedStep`."""
        by_kernel = self.tables.is_cuda and current_backend() != "reference"
        return torch.float16 if by_kernel else self.tables.dtype

    @property
    def precision(self) -> str:
        """In words, what pictures are computed in where the parameters are: the masters, and what differs from them."""
        tables = self.rendered_tables
        masters = str(self.tables.dtype).removeprefix("torch.")
        others = [f"tables {str(tables).removeprefix('torch.')}"] if tables != self.tables.dtype else []
        others += ["products tf32"] if self.uses_tf32() else []
        return f"{masters}; {', '.join(others)}" if others else masters

    def fields(self) -> FastFields:
        """The model as the operators take it; shares the parameters' memory.

        Errors: as `uses_tf32`.
        """
        config = self.config
        low, high = self._scale_bounds()
        return FastFields(
            self.tables.detach(),
            self.density_in.detach(),
            self.density_out.detach(),
            self.colour_in.detach(),
            None if self.colour_hidden is None else self.colour_hidden.detach(),
            self.colour_out.detach(),
            self.masks,
            list(self.grid.resolutions),
            2**config.log2_table_size,
            config.attenuation,
            config.attenuation_cutoff,
            config.scale_input,
            low,
            high,
            config.occupancy_resolution,
            config.box_half,
            config.step_scale,
            config.min_step,
            config.max_step,
            self.uses_tf32(),
        )

    def _scale_bounds(self) -> tuple[float, float]:
        """`scale_range` on the host; on a GPU that waits for it."""

        def fetch() -> tuple[float, float]:
            low, high = self.scale_range.tolist()
            return low, high

        return self.keep("scale_range", fetch)

    def _rendered_fields(self) -> FastFields:
        """The model as it is rendered: with the tables in `rendered_tables`."""

        def make() -> FastFields:
            self.check_width()
            fields = self.fields()
            return fields._replace(tables=fields.tables.to(self.rendered_tables))

        return self.keep(("rendered", current_backend()), make)

    def render_rays(self, rays: Rays, white_background: bool = True) -> Composite:
        """Render rays, deterministically and without gradients.

        Args:
            rays: of any leading shape.
            white_background: white or black behind everything.

        Returns:
            Composite in the leading shape of rays, its weights empty: samples are not kept. The distance of an empty
            ray is its near end.

        Errors: InputError as of `uses_tf32` and `check_width`.
        """
        flat = rays.flatten().map(lambda field: field.to(torch.float32))
        background = torch.full_like(flat.origins, 1.0 if white_background else 0.0)
        marched = MarchRays(flat.origins, flat.directions, flat.radii, flat.near, flat.far, None, background)
        with torch.no_grad():
            render = fast_reference.fast_render if current_backend() == "reference" else ops.fast_render
            rendered = render(marched, self._rendered_fields())
        weights = background.new_zeros(background.shape[0], 0)
        return Composite(*rendered, weights).unflatten(rays.batch_shape)

    def forward(
        self,
        rays: Rays,
        randomized: bool = False,
        white_background: bool = True,
        generator: Generator = None,
    ) -> list[Composite]:
        """`render_rays` with the signature of `MipNerf`: one level.

        Errors: ValueError for randomized: training goes through `FastTrainer`.
        """
        if randomized:
            raise ValueError("FastModel: randomized rendering is part of training, see FastTrainer")
        return [self.render_rays(rays, white_background)]

    @torch.no_grad()
    def query(self, points: Tensor, viewdirs: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        """Colour and density in isotropic Gaussians, for grids and meshes.

        Args:
            points: [B, 3], world units.
            viewdirs: [B, 3], unit length.
            radius: standard deviation of the Gaussian along each axis, world units; 0 for a point.

        Returns:
            rgb [B, 3] and density [B], per world unit; the density is 0 outside the box.
        """
        half = self.config.box_half
        unit = (points + half) / (2 * half)
        inside = ((unit >= 0) & (unit <= 1)).all(-1)
        # The clamp of the network's input keeps a point's width, zero, out of its logarithm.
        scales = torch.full_like(points[:, 0], radius / (2 * half))
        rows = torch.arange(points.shape[0], device=points.device)
        rgb, density = ops.fast_query(unit.clamp(0, 1), scales, viewdirs, rows, self.fields())
        return rgb, torch.where(inside, density, torch.zeros_like(density))
