"""The steps of the fast model's training in plain PyTorch: under the names and signatures that they have in `ops`.

What `FastTrainer` runs on the backend "reference", and what the fused operators are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .cameras import pixel_rays
from .counter_rng import FAST_RAYS, OCCUPANCY, counter_uint32
from .ops.fast_step import (
    FastFields,
    FastGradients,
    MarchRays,
    NetworkGradients,
    PixelSource,
    StepStatistics,
    TableMoments,
)
from .ops.finite import check_finite, is_checking, reports_non_finite

# The fused step marches a ray by so many samples before it looks whether anything is left to see.
_SAMPLES_PER_ROUND = 8


def _unit(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Uniform in [0, 1) from 32-bit words; exact in float32."""
    return (words >> 8).to(dtype) * 2.0**-24


def choose_pixels(source: PixelSource, words: Tensor) -> tuple[Tensor, Tensor]:
    """The images of rays and the row-major pixels in them, int64 [B] each, by their random words [B, 8]."""
    group = torch.searchsorted(source.group_shares, _unit(words[:, 0], source.group_shares.dtype), right=True)
    group = group.clamp(max=len(source.group_shares) - 1)
    first = torch.cat([source.group_ends.new_zeros(1), source.group_ends[:-1]])
    sizes = source.group_ends - first
    image = source.order[first[group] + (words[:, 1] * sizes[group] >> 32)]
    return image, words[:, 2] * (source.heights[image] * source.widths[image]) >> 32


def describe_ray(source: PixelSource, names: Sequence[str], seed: int, step: int, ray: int) -> str:
    """Which pixel a ray of a step's batch goes through, in words.

    Args:
        source, seed, step: as of `draw_rays`. names: of the images.
    """
    row = torch.tensor([ray], device=source.pixels.device)
    image, pixel = (int(chosen) for chosen in choose_pixels(source, _ray_words(seed, step, row)))
    y, x = divmod(pixel, int(source.widths[image]))
    return f"pixel ({x}, {y}) of image {names[image]}"


def _ray_words(seed: int, step: int, rows: Tensor) -> Tensor:
    return counter_uint32(seed, step, FAST_RAYS, rows, 8)


def draw_rays(
    source: PixelSource, seed: int, step: int, count: int, random_background: bool, background: float
) -> tuple[MarchRays, Tensor]:
    """The rays of a training step and their colours: see `ops.draw_rays`."""
    dtype = source.c2w.dtype
    words = _ray_words(seed, step, torch.arange(count, device=source.pixels.device))
    image, pixel = choose_pixels(source, words)
    width, height = source.widths[image], source.heights[image]
    rays = pixel_rays(
        source.c2w[image],
        height,
        width,
        source.focals[image],
        pixel % width,
        torch.div(pixel, width, rounding_mode="floor"),
        source.nears[image],
        source.fars[image],
        torch.ones_like(source.focals[image]),
    )
    colour = source.pixels[source.offsets[image] + pixel].to(dtype) / 255
    alpha = colour[:, 3:] if colour.shape[1] == 4 else torch.ones_like(colour[:, :1])
    behind = _unit(words[:, 4:7], dtype) if random_background else torch.full_like(colour[:, :3], background)
    target = colour[:, :3] * alpha + (1 - alpha) * behind
    marched = MarchRays(
        rays.origins, rays.directions, rays.radii, rays.near, rays.far, _unit(words[:, 3:4], dtype), behind
    )
    return marched, target


def fast_train_step(
    rays: MarchRays, target: Tensor, loss_beta: float, fields: FastFields, gradients: FastGradients
) -> StepStatistics:
    """March, encode, evaluate, composite and differentiate a batch of rays by autograd: see `ops.fast_train_step`."""
    names = [name for name in FastGradients._fields if getattr(fields, name) is not None]
    # Tables in float16 have a gradient in float32.
    leaves = {name: getattr(fields, name).detach().to(target.dtype).requires_grad_() for name in names}
    in_half = fields.tables.dtype == torch.float16
    with torch.no_grad():
        samples = reference.fast_samples(*rays[:6], fields)
    with torch.enable_grad():
        found = reference.fast_composite(
            samples, rays.directions, rays.near, rays.background, fields._replace(**leaves), in_half
        )
        loss = torch.nn.functional.smooth_l1_loss(found.rgb, target, beta=loss_beta)
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    if is_checking():
        check_finite("fast_train_step", "rgb", found.rgb, "pixels")
        check_finite("fast_train_step", "target", target, "pixels")
        for name, grad in zip(names, grads, strict=True):
            check_finite("fast_train_step", f"the gradient of {name}", grad, "none")
    is_finite = bool(loss.isfinite()) and all(bool(grad.isfinite().all()) for grad in grads)
    if is_finite:
        for name, grad in zip(names, grads, strict=True):
            getattr(gradients, name).add_(grad)
    squared = float(((found.rgb.detach() - target) ** 2).mean())
    marched, counted = _marched_samples(samples.ray_starts, found.weights.detach())
    return StepStatistics(float(loss.detach()), squared, marched, counted, is_finite)


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
    """`fast_train_step`, and `sparse_adam` of the tables with the gradient it found: see `ops.fast_train_update`."""
    of_tables = torch.zeros_like(fields.tables)
    found = fast_train_step(rays, target, loss_beta, fields, FastGradients(of_tables, *gradients))
    if found.is_finite:
        sparse_adam(fields.tables, of_tables, *moments, learning_rate, beta1, beta2, eps, step)
    return found


@reports_non_finite("fast_render", "rgb", "distance", "acc", rows="pixels")
def fast_render(rays: MarchRays, fields: FastFields) -> tuple[Tensor, Tensor, Tensor]:
    """Colour, expected distance and opacity of rays: see `ops.fast_render`."""
    return reference.fast_render(*rays, fields)


def _marched_samples(ray_starts: Tensor, weights: Tensor) -> tuple[int, int]:
    """How many samples the fused step marches, which stops a ray that has ended, and how many of them count."""
    totals = ray_starts.diff()
    rays = torch.repeat_interleave(torch.arange(totals.shape[0], device=totals.device), totals)
    # Densities are at least exp(-12): a sample has no weight only where it does not count.
    counted = torch.zeros_like(totals).index_add(0, rays, (weights > 0).to(totals.dtype))
    rounds = torch.div(counted + _SAMPLES_PER_ROUND - 1, _SAMPLES_PER_ROUND, rounding_mode="floor")
    return int(torch.minimum(totals, rounds * _SAMPLES_PER_ROUND).sum()), int(counted.sum())


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
    """Visit one of every `stride` cells, and as many of the occupied ones: see `ops.occupancy_update`."""
    cells, flat = densities.shape[0], densities.reshape(-1)
    occupied = reference.unpack_masks(fields.masks, cells)[0][0].reshape(-1).nonzero()[:, 0]
    visits = math.ceil(flat.shape[0] / stride)
    everything = torch.arange(flat.shape[0], device=flat.device)
    for part, candidates in enumerate((everything, occupied)):
        if not len(candidates):
            continue
        every = math.ceil(len(candidates) / visits)
        strata = torch.arange(math.ceil(len(candidates) / every), device=flat.device)
        words = counter_uint32(seed, step, OCCUPANCY, strata, 4 * (part + 1))[:, 4 * part :]
        drawn = strata * every + (words[:, 0] * every >> 32)
        inside = drawn < len(candidates)
        visited = candidates[drawn[inside]]
        corner = torch.stack([visited % cells, visited // cells % cells, visited // cells**2], -1)
        points = (corner + _unit(words[inside, 1:], flat.dtype)) * (1 / cells)
        # The density does not depend on a direction; the colour that comes with it does.
        down = points.new_tensor([[0.0, 0.0, -1.0]])
        found = reference.fast_query(
            points, torch.full_like(points[:, 0], cell_scale), down, torch.zeros_like(visited), fields
        )
        flat[visited] = torch.maximum(flat[visited] * decay, found.density.to(flat.dtype))
    return occupancy_masks(densities, max_threshold, fields.masks)


def occupancy_masks(densities: Tensor, max_threshold: float, masks: Tensor) -> tuple[float, float]:
    """Write the masks of a grid of densities: see `ops.occupancy_masks`."""
    threshold = float(reference.occupancy_threshold(densities, max_threshold))
    pairs = reference.occupancy_masks(densities, threshold)
    masks.copy_(reference.pack_masks(pairs))
    return float(pairs[0][0].double().mean()), threshold


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
    """One step of Adam in place wherever the gradient is not zero; the gradient is zeroed: see `ops.sparse_adam`."""
    updated = reference.sparse_adam(
        values, gradient, moment1, moment2, learning_rate, beta1, beta2, eps, step
    )
    for old, new in zip((values, moment1, moment2), updated, strict=True):
        old.copy_(new)
    gradient.zero_()
