"""The operator `packed_composite`: samples that lie one after the other to pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native, reference
from ..reference import PackedComposite
from .arguments import check_float, check_like, check_shape, require
from .finite import reports_non_finite
from .implementations import takes_kernel
from .registration import register_differentiable


@reports_non_finite("packed_composite", rows="pixels", others={"weights": "samples"})
def packed_composite(
    rgb: Tensor,
    density: Tensor,
    lengths: Tensor,
    middles: Tensor,
    ray_starts: Tensor,
    background: Tensor,
    near: Tensor,
) -> PackedComposite:
    """Composite packed samples, a varying number per ray, over a background colour.

    depth_i = density_i length_i, T_0 = 1, T_{i+1} = T_i exp(-depth_i), w_i = T_i (1 - exp(-depth_i)); a sample counts
    where T_i >= 0.001: rgb = sum w_i c_i + T_end background, acc = 1 - T_end, distance = sum w_i m_i / acc.

    Args:
        rgb: [S, 3], float32 or float64. density, lengths, middles: [S].
        ray_starts: int64 [B + 1], ascending from 0 to S.
        background: [B, 3]. near: [B, 1], the distance of a ray without opacity.

    Returns:
        PackedComposite; differentiable once in rgb, density, lengths and background from all four fields.

    Errors: ValueError naming the argument, what was wanted and what was given; RuntimeError where the backend
    "native" is forced and the kernel cannot run, and for a second derivative of the kernel.

    Example:
        >>> starts = torch.tensor([0, 2, 5])
        >>> one = torch.ones(5)
        >>> packed_composite(torch.rand(5, 3), one, one, one, starts, torch.ones(2, 3), torch.ones(2, 1)).acc.shape
        torch.Size([2])

    Source: Barron et al. 2021, equations 3 and 5; early termination: Mueller et al. 2022.
    """
    name = "packed_composite"
    if density.dim() != 1:
        require(False, name, "density", "of shape [S]", list(density.shape))
    check_float(name, "density", density)
    require(
        ray_starts.dim() == 1 and ray_starts.dtype == torch.int64 and ray_starts.shape[0] >= 1,
        name,
        "ray_starts",
        "int64 of shape [B + 1]",
        f"{ray_starts.dtype} {list(ray_starts.shape)}",
    )
    samples, rays = density.shape[0], ray_starts.shape[0] - 1
    for argument, tensor, shape, meaning in (
        ("rgb", rgb, (samples, 3), "[S, 3]"),
        ("lengths", lengths, (samples,), "[S]"),
        ("middles", middles, (samples,), "[S]"),
        ("background", background, (rays, 3), "[B, 3]"),
        ("near", near, (rays, 1), "[B, 1]"),
    ):
        check_shape(name, argument, tensor, shape, meaning)
        check_like(name, argument, tensor, "density", density)
    inputs = (rgb, density, lengths, middles, ray_starts, background, near)
    if not takes_kernel(name, density):
        return reference.packed_composite(*inputs)
    return PackedComposite(*torch.ops.mipnerf_fast.packed_composite_forward(*inputs))


# ------------------------------------------------------------------------- the raw operators, as torch sees them


def _forward_fake(
    rgb: Tensor,
    density: Tensor,
    lengths: Tensor,
    middles: Tensor,
    ray_starts: Tensor,
    background: Tensor,
    near: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rays = background.shape[0]
    return (
        density.new_empty((rays, 3)),
        density.new_empty((rays,)),
        density.new_empty((rays,)),
        density.new_empty(density.shape),
    )


def _backward_fake(
    grad_rgb: Tensor,
    grad_distance: Tensor,
    grad_acc: Tensor,
    grad_weights: Tensor,
    rgb: Tensor,
    density: Tensor,
    lengths: Tensor,
    middles: Tensor,
    ray_starts: Tensor,
    background: Tensor,
    near: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        density.new_empty((density.shape[0], 3)),
        density.new_empty(density.shape),
        density.new_empty(density.shape),
        density.new_empty((background.shape[0], 3)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    rgb, density, lengths, background = torch.ops.mipnerf_fast.packed_composite_backward(
        *grads, *ctx.saved_tensors
    )
    return rgb, density, lengths, None, None, background, None


if _native.available():
    register_differentiable("packed_composite", _forward_fake, _backward_fake, _differentiate, _save)
