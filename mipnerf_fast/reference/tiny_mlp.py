"""The two small networks of the fast model, and the rounding of their products' operands on tensor cores."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

DENSITY_BIAS, DENSITY_RANGE = -2.0, (-12.0, 9.0)
MAX_LOGIT, RGB_PADDING = 12.0, 0.001


def spherical_harmonics(directions: Tensor) -> Tensor:
    """The 16 real spherical harmonics of degrees 0 to 3: [..., 16] from unit vectors [..., 3].

    Source: Sloan 2008, "Stupid spherical harmonics tricks", appendix A2.
    """
    x, y, z = directions.unbind(-1)
    x2, y2, z2 = x * x, y * y, z * z
    return torch.stack(
        [
            torch.full_like(x, 0.28209479177387814),
            -0.48860251190291987 * y,
            0.48860251190291987 * z,
            -0.48860251190291987 * x,
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.94617469575755997 * z2 - 0.31539156525251999,
            -1.0925484305920792 * x * z,
            0.54627421529603959 * (x2 - y2),
            0.59004358992664352 * y * (y2 - 3 * x2),
            2.8906114426405538 * x * y * z,
            0.45704579946446572 * y * (1 - 5 * z2),
            0.3731763325901154 * z * (5 * z2 - 3),
            0.45704579946446572 * x * (1 - 5 * z2),
            1.4453057213202769 * z * (x2 - y2),
            0.59004358992664352 * x * (3 * y2 - x2),
        ],
        -1,
    )


def round_to_tf32(x: Tensor) -> Tensor:
    """To the nearest number of 10 fraction bits, ties away from zero, in x's own dtype, float32 or float64.

    The exponent's range is that of the dtype; NaN and infinity stay. Source: PTX ISA, cvt.rna.tf32.
    """
    of_bits, dropped = (torch.int64, 42) if x.dtype == torch.float64 else (torch.int32, 13)
    bits = x.view(of_bits) + (1 << dropped - 1) & -(1 << dropped)
    return torch.where(x.isfinite(), bits.view(x.dtype), x)


class _Tf32Linear(torch.autograd.Function):
    """x weight^T with both operands rounded, in the two products of the backward pass too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x, weight = round_to_tf32(x), round_to_tf32(weight)
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = round_to_tf32(grad)
        return grad @ weight, grad.T @ x


def linear(x: Tensor, weight: Tensor, tf32: bool = False) -> Tensor:
    """x weight^T [S, O] of x [S, I] and weight [O, I]; with tf32 the operands of every product are rounded to TF32.

    So it is on tensor cores: products and sums in the dtype, and no rounding of the result. Gradients pass the rounding
    as if it were not there; their products have rounded operands as well.
    """
    if not tf32:
        return x @ weight.T
    product: Tensor = _Tf32Linear.apply(x, weight)
    return product


def density_network(features: Tensor, density_in: Tensor, density_out: Tensor, tf32: bool = False) -> Tensor:
    """The 16 geometry features [S, 16] of encoded samples [S, I]: density_out relu(density_in f), without biases.

    Inputs that are missing at the end of f count as zero: the rows are padded to a multiple of 4.
    """
    hidden = torch.relu(linear(features, density_in[:, : features.shape[1]], tf32))
    return linear(hidden, density_out, tf32)


def fast_density(geometry: Tensor) -> Tensor:
    """Density [S] from the first geometry feature: exp(clamp(g_0 - 2, -12, 9)); no gradient passes the clamp."""
    return torch.exp(torch.clamp(geometry[:, 0] + DENSITY_BIAS, *DENSITY_RANGE))


def colour_network(
    geometry: Tensor,
    harmonics: Tensor,
    rays: Tensor,
    colour_in: Tensor,
    colour_hidden: Tensor | None,
    colour_out: Tensor,
    tf32: bool = False,
) -> Tensor:
    """Colours [S, 3] of samples; the view direction enters as one bias per ray.

    h = relu(W_g g + (W_v harmonics)[ray]), again relu(colour_hidden h) where there is a second layer, and
    rgb = sigmoid(clamp(colour_out h, -12, 12)) (1 + 2 padding) - padding.

    Args:
        geometry: [S, 16].
        harmonics: [B, 16], of each ray's direction.
        rays: int64 [S].
        colour_in: [H, 32], W_g and W_v side by side. colour_hidden: [H, H] or None. colour_out: [3, H].
    """
    if tf32:  # a gradient is rounded for every sample, not for every ray
        hidden = torch.relu(linear(torch.cat([geometry, harmonics[rays]], -1), colour_in, tf32))
    else:
        bias = harmonics @ colour_in[:, 16:].T
        hidden = torch.relu(geometry @ colour_in[:, :16].T + bias[rays])
    if colour_hidden is not None:
        hidden = torch.relu(linear(hidden, colour_hidden, tf32))
    logits = torch.clamp(linear(hidden, colour_out, tf32), -MAX_LOGIT, MAX_LOGIT)
    return torch.sigmoid(logits) * (1 + 2 * RGB_PADDING) - RGB_PADDING


class TinyMlp(NamedTuple):
    """Colours rgb [S, 3] and densities [S], per world unit, of samples."""

    rgb: Tensor
    density: Tensor


def tiny_mlp(
    features: Tensor,
    harmonics: Tensor,
    rays: Tensor,
    density_in: Tensor,
    density_out: Tensor,
    colour_in: Tensor,
    colour_hidden: Tensor | None,
    colour_out: Tensor,
    *,
    tf32: bool = False,
) -> TinyMlp:
    """Both networks, one after the other: from encoded samples to colours and densities.

    g = density_network(features), density = fast_density(g), rgb = colour_network(g, harmonics of the sample's ray).

    Args:
        features: [S, E], encoded samples with the scale inputs. harmonics: [B, 16], of each ray's direction.
        rays: int64 [S], in [0, B), the ray of each sample.
        density_in: [H, I], I at least E. density_out: [16, H]. colour_in: [H, 32]. colour_hidden: [H, H] or None.
        colour_out: [3, H].
        tf32: round the operands of every product, forward and backward: see `linear`.

    Returns:
        TinyMlp; differentiable in everything but rays.

    Source: Mueller et al. 2022, section 5.4 (the shape of the two networks).
    """
    geometry = density_network(features, density_in, density_out, tf32)
    rgb = colour_network(geometry, harmonics, rays, colour_in, colour_hidden, colour_out, tf32)
    return TinyMlp(rgb, fast_density(geometry))
