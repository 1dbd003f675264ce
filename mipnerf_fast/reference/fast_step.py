"""The fast model's rendering and training step, composed of its parts: the truth of the fused kernels."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .hash_encode import HashGrid, hash_encode, hash_grid_of, round_to_half, scale_inputs
from .march import PackedSamples, march
from .occupancy import unpack_masks
from .packed_composite import PackedComposite, packed_composite
from .tiny_mlp import TinyMlp, spherical_harmonics, tiny_mlp


class FieldsLike(Protocol):
    """A fast model: see `ops.fast_step.FastFields`."""

    @property
    def tables(self) -> Tensor: ...
    @property
    def density_in(self) -> Tensor: ...
    @property
    def density_out(self) -> Tensor: ...
    @property
    def colour_in(self) -> Tensor: ...
    @property
    def colour_hidden(self) -> Tensor | None: ...
    @property
    def colour_out(self) -> Tensor: ...
    @property
    def masks(self) -> Tensor: ...
    @property
    def resolutions(self) -> list[int]: ...
    @property
    def table_size(self) -> int: ...
    @property
    def attenuation(self) -> str: ...
    @property
    def cutoff(self) -> float: ...
    @property
    def scale_input(self) -> bool: ...
    @property
    def scale_low(self) -> float: ...
    @property
    def scale_high(self) -> float: ...
    @property
    def occupancy_resolution(self) -> int: ...
    @property
    def box_half(self) -> float: ...
    @property
    def step_scale(self) -> float: ...
    @property
    def min_step(self) -> float: ...
    @property
    def max_step(self) -> float: ...
    @property
    def tf32(self) -> bool: ...


def fast_query(
    means: Tensor,
    scales: Tensor,
    viewdirs: Tensor,
    rays: Tensor,
    fields: FieldsLike,
    half_features: bool = False,
) -> TinyMlp:
    """Colour and density of Gaussians.

    Args:
        means: [S, 3] in the unit box. scales: [S], deviations in units of its side.
        viewdirs: [B, 3], unit length. rays: int64 [S], which of them each Gaussian is seen along.
        fields: the model; its tables may be float16.
        half_features: round the encoding's features to float16, as it is done wherever the tables are: the kernels keep
            them so.
    """
    grid: HashGrid = hash_grid_of(fields.resolutions, fields.table_size)
    tables = fields.tables.to(means.dtype)
    encoded = hash_encode(means, scales, tables, grid, fields.attenuation, fields.cutoff)
    if half_features or fields.tables.dtype == torch.float16:
        encoded = round_to_half(encoded)
    extra = scale_inputs(scales, fields.scale_input, fields.scale_low, fields.scale_high)
    return tiny_mlp(
        torch.cat([encoded, extra], -1),
        spherical_harmonics(viewdirs),
        rays,
        fields.density_in,
        fields.density_out,
        fields.colour_in,
        fields.colour_hidden,
        fields.colour_out,
        tf32=fields.tf32,
    )


def fast_samples(
    origins: Tensor,
    directions: Tensor,
    radii: Tensor,
    near: Tensor,
    far: Tensor,
    phase: Tensor | None,
    fields: FieldsLike,
) -> PackedSamples:
    """The samples of rays: see `march`; without a phase, half a step."""
    return march(
        origins,
        directions,
        radii,
        near,
        far,
        torch.full_like(near, 0.5) if phase is None else phase,
        unpack_masks(fields.masks, fields.occupancy_resolution),
        fields.box_half,
        fields.step_scale,
        fields.min_step,
        fields.max_step,
    )


def fast_composite(
    samples: PackedSamples,
    directions: Tensor,
    near: Tensor,
    background: Tensor,
    fields: FieldsLike,
    half_features: bool = False,
) -> PackedComposite:
    """Evaluate and composite given samples; differentiable in the parameters. half_features: see `fast_query`."""
    norms = torch.linalg.vector_norm(directions, dim=-1)
    rgb, density = fast_query(
        samples.means, samples.scales, directions / norms[:, None], samples.rays, fields, half_features
    )
    return packed_composite(
        rgb,
        density,
        (samples.t1 - samples.t0) * norms[samples.rays],
        0.5 * (samples.t0 + samples.t1),
        samples.ray_starts,
        background,
        near,
    )


def fast_render(
    origins: Tensor,
    directions: Tensor,
    radii: Tensor,
    near: Tensor,
    far: Tensor,
    phase: Tensor | None,
    background: Tensor,
    fields: FieldsLike,
) -> tuple[Tensor, Tensor, Tensor]:
    """Colour [B, 3], expected distance [B] and opacity [B] of rays: march, query, composite.

    Arguments as in `ops.fast_step.MarchRays`; differentiable in the parameters.
    """
    samples = fast_samples(origins, directions, radii, near, far, phase, fields)
    result = fast_composite(samples, directions, near, background, fields)
    return result.rgb, result.distance, result.acc
