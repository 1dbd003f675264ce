"""The operator `frustum_ipe`: fenceposts and rays to integrated positional encodings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native, reference
from .arguments import check_float, check_like, check_shape, require
from .finite import reports_non_finite
from .implementations import takes_kernel
from .registration import register_differentiable

_SHAPES = ("cone", "cylinder")
_MAX_DEGREE = 16  # of the kernel
_OUT_DTYPES = {
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.float64: (torch.float64,),
}


@reports_non_finite("frustum_ipe", "features")
def frustum_ipe(
    t_vals: Tensor,
    origins: Tensor,
    directions: Tensor,
    radii: Tensor,
    min_deg: int = 0,
    max_deg: int = 16,
    shape: str = "cone",
    integrated: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The integrated positional encoding of every frustum along a batch of rays, in one pass.

    Every interval of a ray becomes the Gaussian of its conical frustum (or cylinder), with mean m and variance v
    per coordinate (paper, equations 7, 8 and 16), and every octave l of it
    exp(-4^l v / 2) sin(2^l m) and exp(-4^l v / 2) cos(2^l m) (equation 14). The native kernel writes nothing but
    the features; it carries m and the range reduction in pairs of floats, so that in float32 the top octaves
    (arguments up to 2^15 m) are as accurate as the lowest, where plain float32 loses up to four digits.

    Args:
        t_vals: [B, N+1] fenceposts, float32 or float64, distances in multiples of the direction, ascending.
        origins, directions: [B, 3], world units; the direction is not normalised.
        radii: [B, 1], world radius of the cone at t = 1 (of the cylinder everywhere).
        min_deg, max_deg: the octaves l = min_deg ... max_deg - 1; the kernel goes up to max_deg 16.
        shape: "cone" or "cylinder".
        integrated: False leaves the attenuation out, as NeRF does (the paper's ablation).
        out_dtype: of the features: float32, bfloat16 or float16; None keeps the inputs' dtype.

    Returns:
        [B, N, 6 (max_deg - min_deg)]: all sines, octave-major with xyz inside, then all cosines. Differentiable once in
        t_vals, origins, directions and radii, with nothing but these inputs saved. Where t0 = t1 = 0 a cone's
        Gaussian is the origin with zero variance and no gradient to t_vals and radii.

    Errors: ValueError naming the argument, what was wanted and what was given; RuntimeError where the backend
    "native" is forced and the kernel cannot run, and for a second derivative of the kernel.

    Example:
        >>> t_vals = torch.linspace(2.0, 6.0, 129).expand(8, -1)
        >>> origins, directions = torch.zeros(8, 3), torch.randn(8, 3)
        >>> frustum_ipe(t_vals, origins, directions, torch.full((8, 1), 5e-4)).shape
        torch.Size([8, 128, 96])

    Source: algorithm 1.3 and 1.4; Barron et al. 2021, equations 7, 8, 14 and 16.
    """
    _check(t_vals, origins, directions, radii, min_deg, max_deg, shape, out_dtype)
    features_dtype = t_vals.dtype if out_dtype is None else out_dtype
    unsupported = ""
    if max_deg > _MAX_DEGREE:
        unsupported = f"the kernel goes up to max_deg {_MAX_DEGREE}, not {max_deg}"
    elif features_dtype not in _OUT_DTYPES.get(t_vals.dtype, (features_dtype,)):
        unsupported = f"the kernel does not make {features_dtype} features of {t_vals.dtype} inputs"
    if not takes_kernel("frustum_ipe", t_vals, unsupported):
        return reference.frustum_ipe(
            t_vals, origins, directions, radii, min_deg, max_deg, shape, integrated, out_dtype
        )
    features: Tensor = torch.ops.mipnerf_fast.frustum_ipe_forward(
        t_vals, origins, directions, radii, min_deg, max_deg, shape == "cylinder", integrated, features_dtype
    )
    return features


def _check(
    t_vals: Tensor,
    origins: Tensor,
    directions: Tensor,
    radii: Tensor,
    min_deg: int,
    max_deg: int,
    shape: str,
    out_dtype: torch.dtype | None,
) -> None:
    name = "frustum_ipe"
    if t_vals.dim() != 2 or t_vals.shape[1] < 2:
        require(False, name, "t_vals", "of shape [B, N+1] with N at least 1", list(t_vals.shape))
    check_float(name, "t_vals", t_vals)
    rays = t_vals.shape[0]
    for argument, tensor, width in (
        ("origins", origins, 3),
        ("directions", directions, 3),
        ("radii", radii, 1),
    ):
        check_shape(name, argument, tensor, (rays, width), f"[B, {width}]")
        check_like(name, argument, tensor, "t_vals", t_vals)
    require(min_deg >= 0, name, "min_deg", "0 or more", min_deg)
    require(max_deg > min_deg, name, "max_deg", f"greater than min_deg ({min_deg})", max_deg)
    require(shape in _SHAPES, name, "shape", '"cone" or "cylinder"', repr(shape))
    require(
        out_dtype is None or out_dtype.is_floating_point,
        name,
        "out_dtype",
        "a floating-point dtype",
        out_dtype,
    )


# ------------------------------------------------------------------------- the raw operators, as torch sees them


def _forward_fake(
    t_vals: Tensor,
    origins: Tensor,
    directions: Tensor,
    radii: Tensor,
    min_deg: int,
    max_deg: int,
    cylinder: bool,
    integrated: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    rays, fenceposts = t_vals.shape
    return t_vals.new_empty((rays, fenceposts - 1, 6 * (max_deg - min_deg)), dtype=out_dtype)


def _backward_fake(
    grad_features: Tensor,
    t_vals: Tensor,
    origins: Tensor,
    directions: Tensor,
    radii: Tensor,
    min_deg: int,
    max_deg: int,
    cylinder: bool,
    integrated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (t_vals, origins, directions, radii)
    grads = [x.new_empty(x.shape) for x in inputs]  # contiguous, whatever the input's strides
    return grads[0], grads[1], grads[2], grads[3]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:8]


def _differentiate(ctx: Any, grad_features: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.mipnerf_fast.frustum_ipe_backward(grad_features, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None, None, None)


if _native.available():
    register_differentiable("frustum_ipe", _forward_fake, _backward_fake, _differentiate, _save)
