"""The fused operations of the fast model: a training step, rendering, the occupancy grid's update, Adam."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .. import _native, reference
from ..reference import TinyMlp
from .arguments import require
from .finite import NonFiniteError, check_finite, is_checking, reports_non_finite
from .hash_encode import ATTENUATION_CODES, hash_encode
from .tiny_mlp import tiny_mlp


class FastFields(NamedTuple):
    """A fast model as the native operators take it: its parameters, its masks, its numbers; see `FastConfig`.

    tf32: the networks' products with operands rounded to TF32, on tensor cores: see `reference.linear`. Of a CUDA
    device of compute capability 8.0 or higher; the native operators refuse it anywhere else.

    tables: of a CUDA device they may be float16. The encoding's features are then rounded to it too; sums and gradients
    are float32 as ever.
    """

    tables: Tensor
    density_in: Tensor
    density_out: Tensor
    colour_in: Tensor
    colour_hidden: Tensor | None
    colour_out: Tensor
    masks: Tensor
    resolutions: list[int]
    table_size: int
    attenuation: str
    cutoff: float
    scale_input: bool
    scale_low: float
    scale_high: float
    occupancy_resolution: int
    box_half: float
    step_scale: float
    min_step: float
    max_step: float
    tf32: bool = False


class FastGradients(NamedTuple):
    """Buffers like the parameters, to which `fast_train_step` adds."""

    tables: Tensor
    density_in: Tensor
    density_out: Tensor
    colour_in: Tensor
    colour_hidden: Tensor | None
    colour_out: Tensor


class NetworkGradients(NamedTuple):
    """Buffers like the networks' weights, to which `fast_train_update` adds."""

    density_in: Tensor
    density_out: Tensor
    colour_in: Tensor
    colour_hidden: Tensor | None
    colour_out: Tensor


class TableMoments(NamedTuple):
    """Adam's moments of the tables, of their shape."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


class MarchRays(NamedTuple):
    """Rays as they are marched: origins, directions [B, 3], radii, near, far, phase [B, 1], background [B, 3]."""

    origins: Tensor
    directions: Tensor
    radii: Tensor
    near: Tensor
    far: Tensor
    phase: Tensor | None
    background: Tensor


class StepStatistics(NamedTuple):
    """What a training step found: loss and mean squared error over channels, numbers of samples, finiteness."""

    loss: float
    squared_error: float
    samples: int
    counted: int
    is_finite: bool


def native_operators() -> Any:
    """The raw operators, or the sentence that says why there are none."""
    if not _native.available():
        raise RuntimeError(f"the fast model's fused step needs the native library: {_native.why_missing()}")
    return torch.ops.mipnerf_fast


def flat_fields(operator: str, fields: FastFields) -> tuple[Any, ...]:
    """The model in the order of the operators' schemas, the attenuation by its number."""
    kind = fields.attenuation
    require(kind in ATTENUATION_CODES, operator, "attenuation", '"gaussian", "erf" or "none"', repr(kind))
    at = FastFields._fields.index("attenuation")
    return (*fields[:at], ATTENUATION_CODES[kind], *fields[at + 1 :])


def fast_train_step(
    rays: MarchRays, target: Tensor, loss_beta: float, fields: FastFields, gradients: FastGradients
) -> StepStatistics:
    """March, encode, evaluate, composite and differentiate a batch of rays in one fused pass.

    The loss is the mean over rays and channels of smooth L1 with its bend at loss_beta. Gradients are added to
    `gradients` unless one of them is not finite; the sums are taken in a fixed order, so the result does not
    depend on the number of threads. On a GPU, unless torch.use_deterministic_algorithms is on, those of the tables'
    gradient are in no particular order and differ in their last bits from run to run.

    Args:
        rays: float32 on the model's device.
        target: [B, 3], colours over the rays' background.
        loss_beta: where the loss turns linear.
        fields: the model.
        gradients: where to add.

    Errors: RuntimeError naming the argument that is wrong, or why there is no native library; ValueError for an unknown
    attenuation; NonFiniteError under the finite check, where a colour or a gradient is not finite.
    """
    flat = flat_fields("fast_train_step", fields)
    is_fixed = fields.tables.is_cuda and torch.are_deterministic_algorithms_enabled()
    sums = table_sums(fields.tables) if is_fixed else None
    found = native_operators().fast_train_step(*rays, target, loss_beta, *flat, *gradients, sums)
    return _statistics("fast_train_step", rays, target, fields, found)


def fast_train_update(
    rays: MarchRays,
    target: Tensor,
    loss_beta: float,
    fields: FastFields,
    gradients: NetworkGradients,
    moments: TableMoments,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> StepStatistics:
    """`fast_train_step`, and `sparse_adam` of the tables with the gradient that it found.

    On the CPU the tables are moved part by part, each right after its gradient has been summed, while that is in the
    cache; the numbers are those of the two operators. On a GPU it is the two operators.

    Args:
        rays, target, loss_beta: as of `fast_train_step`.
        fields: the model; its tables, float32, are changed in place.
        gradients: where to add those of the networks.
        moments: of the tables, changed in place.
        learning_rate, beta1, beta2, eps, step: as of `sparse_adam`.

    Returns:
        What the step found; where that is not finite nothing has changed.

    Errors: as of `fast_train_step` and `sparse_adam`.
    """
    if fields.tables.is_cuda:
        of_tables = torch.zeros_like(fields.tables)
        found = fast_train_step(rays, target, loss_beta, fields, FastGradients(of_tables, *gradients))
        if found.is_finite:
            sparse_adam(fields.tables, of_tables, *moments, learning_rate, beta1, beta2, eps, step)
        return found
    flat = flat_fields("fast_train_update", fields)
    adam = (learning_rate, beta1, beta2, eps, step)
    values = native_operators().fast_train_update(
        *rays, target, loss_beta, *flat, *gradients, *moments, *adam
    )
    return _statistics("fast_train_update", rays, target, fields, values)


def _statistics(
    operator: str, rays: MarchRays, target: Tensor, fields: FastFields, found: Tensor
) -> StepStatistics:
    """What a step returned; raises NonFiniteError under the finite check."""
    values = found.tolist()
    if values[4] != 1.0 and is_checking():
        raise_non_finite(operator, rays, target, fields, values[0])
    return StepStatistics(values[0], values[1], int(values[2]), int(values[3]), values[4] == 1.0)


def raise_non_finite(
    operator: str, rays: MarchRays, target: Tensor, fields: FastFields, loss: float
) -> NoReturn:
    """Raise NonFiniteError for a step that was not finite: at the first colour of a ray, or else of the gradients."""
    rgb = native_operators().fast_render(*rays, *flat_fields(operator, fields))[0]
    check_finite(operator, "rgb", rgb, "pixels")
    check_finite(operator, "target", target, "pixels")
    details = f"every colour is finite and the loss is {loss:g}"
    raise NonFiniteError(operator, "the gradient", None, None, None, details)


def table_sums(tables: Tensor) -> Tensor:
    """Zeros in which a step on a GPU can sum the tables' gradient in fixed point; it leaves them as zeros."""
    return torch.zeros_like(tables, dtype=torch.int64)


@reports_non_finite("fast_render", "rgb", "distance", "acc", rows="pixels")
def fast_render(rays: MarchRays, fields: FastFields) -> tuple[Tensor, Tensor, Tensor]:
    """Colour [B, 3], expected distance [B] (near where the ray is empty) and opacity [B] of rays."""
    rgb, distance, acc = native_operators().fast_render(*rays, *flat_fields("fast_render", fields))
    return rgb, distance, acc


def fast_query(means: Tensor, scales: Tensor, viewdirs: Tensor, rays: Tensor, fields: FastFields) -> TinyMlp:
    """Colour and density of Gaussians, by the operators `hash_encode` and `tiny_mlp`; differentiable in the parameters.

    Args:
        means: [S, 3] in the unit box. scales: [S], deviations in units of its side.
        viewdirs: [B, 3], unit length. rays: int64 [S], which of them each Gaussian is seen along.
        fields: the model; tables float32.
    """
    grid = reference.hash_grid_of(fields.resolutions, fields.table_size)
    encoded = hash_encode(means, scales, fields.tables, grid, fields.attenuation, fields.cutoff)
    extra = reference.scale_inputs(scales, fields.scale_input, fields.scale_low, fields.scale_high)
    return tiny_mlp(
        torch.cat([encoded, extra], -1),
        reference.spherical_harmonics(viewdirs),
        rays,
        *(getattr(fields, name) for name in FastGradients._fields[1:]),
        tf32=fields.tf32,
    )


def occupancy_update(
    densities: Tensor,
    cell_scale: float,
    seed: int,
    step: int,
    stride: int,
    decay: float,
    max_threshold: float,
    fields: FastFields,
) -> tuple[float, float]:
    """Visit one of every `stride` cells, and as many of the occupied ones; make the masks anew.

    A visited cell becomes max(decay x its density, the density at a random point in it); the masks hold the cells
    above min(max_threshold, mean of the grid).

    Args:
        densities: [R, R, R], changed in place, as are fields.masks.
        cell_scale: standard deviation, in units of the box's side, with which the densities are taken.
        seed, step: of the random numbers.

    Returns:
        The share of occupied cells and the threshold.
    """
    flat = flat_fields("occupancy_update", fields)
    share, threshold = (
        native_operators()
        .occupancy_update(densities, cell_scale, seed, step, stride, decay, max_threshold, *flat)
        .tolist()
    )
    return share, threshold


def occupancy_masks(densities: Tensor, max_threshold: float, masks: Tensor) -> tuple[float, float]:
    """Write the masks of a grid of densities [R, R, R] into `masks`; see `occupancy_update` for the result."""
    share, threshold = native_operators().occupancy_masks(densities, max_threshold, masks).tolist()
    return share, threshold


def sparse_adam(
    values: Tensor,
    gradient: Tensor,
    moment1: Tensor,
    moment2: Tensor,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> None:
    """One step of Adam in place wherever the gradient is not zero; the gradient is zeroed.

    Source: Kingma and Ba 2015; entries without a gradient are left alone, as in Mueller et al. 2022.
    """
    native_operators().sparse_adam(values, gradient, moment1, moment2, learning_rate, beta1, beta2, eps, step)


class PixelSource(NamedTuple):
    """Posed images as `draw_rays` takes them; the first nine as in `Dataset`, images of one scale in one group."""

    pixels: Tensor
    offsets: Tensor
    heights: Tensor
    widths: Tensor
    c2w: Tensor
    focals: Tensor
    nears: Tensor
    fars: Tensor
    order: Tensor
    group_ends: Tensor
    group_shares: Tensor


def draw_rays(
    source: PixelSource, seed: int, step: int, count: int, random_background: bool, background: float
) -> tuple[MarchRays, Tensor]:
    """The rays of a training step and their colours; nothing but (seed, step) decides which.

    A scale is drawn by its share, then one of its images, then a pixel; where the images have alpha and
    random_background is set, every ray gets a background of its own.
    """
    *fields, target = native_operators().draw_rays(*source, seed, step, count, random_background, background)
    return MarchRays(*fields), target
