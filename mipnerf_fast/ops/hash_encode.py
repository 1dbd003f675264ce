"""The operator `hash_encode`: Gaussians to features of a multiresolution hash grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native, reference
from ..reference import HashGrid
from .arguments import check_float, check_like, check_shape, require
from .finite import reports_non_finite
from .implementations import takes_kernel
from .registration import register_differentiable

_FEATURES = (2, 4)  # of the kernel
_MAX_LEVELS = 16
# Of csrc/hash_encode/hash_encode_math.h: the raw operators take numbers, because torch's stable interface leaks a copy
# of every string argument.
ATTENUATION_CODES = {"none": 0, "gaussian": 1, "erf": 2}


@reports_non_finite("hash_encode", "features", rows="samples")
def hash_encode(
    points: Tensor,
    scales: Tensor,
    tables: Tensor,
    grid: HashGrid,
    kind: str = "gaussian",
    cutoff: float = 0.02,
) -> Tensor:
    """Features of Gaussians in a multiresolution hash grid whose levels fade with the Gaussian's width.

    feature_l = attenuation_l(s) sum over the 8 corners of the cell of x n_l of their trilinear weight times their
    entry (Mueller et al. 2022, equation 4); the attenuation exp(-2 s^2 n_l^2) does what exp(-variance / 2) does in
    integrated positional encoding (mip-NeRF, equation 14).

    Args:
        points: [S, 3] in [0, 1], float32 or float64: means, in units of the grid's side.
        scales: [S], standard deviations in the same units.
        tables: [entries, F].
        grid: see `reference.hash_grid`; the kernel takes up to 16 levels of 2 or 4 features.
        kind: "gaussian", "erf" (erf(1 / (sqrt(8) s n))) or "none" (1).
        cutoff: levels attenuated below this are skipped.

    Returns:
        [S, L F], level-major; differentiable once in points (within cells), scales and tables. On a GPU the sums of the
        tables' gradient differ in their last bits from run to run, unless torch.use_deterministic_algorithms is on.

    Errors: ValueError naming the argument, what was wanted and what was given; RuntimeError where the backend
    "native" is forced and the kernel cannot run, and for a second derivative of the kernel.

    Example:
        >>> grid = reference.hash_grid(levels=4, coarsest=8, finest=64, table_size=2**12)
        >>> tables = torch.randn(grid.entries, 4)
        >>> hash_encode(torch.rand(10, 3), torch.full((10,), 0.01), tables, grid).shape
        torch.Size([10, 16])

    Source: Mueller et al. 2022, section 3; Barron et al. 2021, equation 14.
    """
    name = "hash_encode"
    if points.dim() != 2 or points.shape[1] != 3:
        require(False, name, "points", "of shape [S, 3]", list(points.shape))
    check_float(name, "points", points)
    check_shape(name, "scales", scales, (points.shape[0],), "[S]")
    check_like(name, "scales", scales, "points", points)
    check_like(name, "tables", tables, "points", points)
    require(kind in ATTENUATION_CODES, name, "kind", '"gaussian", "erf" or "none"', repr(kind))
    require(
        tables.dim() == 2 and tables.shape[0] == grid.entries,
        name,
        "tables",
        f"of shape [{grid.entries}, F]",
        list(tables.shape),
    )
    unsupported = ""
    if tables.shape[1] not in _FEATURES:
        unsupported = f"the kernel takes 2 or 4 features, not {tables.shape[1]}"
    elif len(grid.resolutions) > _MAX_LEVELS:
        unsupported = f"the kernel takes up to {_MAX_LEVELS} levels, not {len(grid.resolutions)}"
    if not takes_kernel(name, points, unsupported):
        return reference.hash_encode(points, scales, tables, grid, kind, cutoff)
    features: Tensor = torch.ops.mipnerf_fast.hash_encode_forward(
        points, scales, tables, list(grid.resolutions), grid.table_size, ATTENUATION_CODES[kind], cutoff
    )
    return features


# ------------------------------------------------------------------------- the raw operators, as torch sees them


def _forward_fake(
    points: Tensor,
    scales: Tensor,
    tables: Tensor,
    resolutions: list[int],
    table_size: int,
    attenuation: int,
    cutoff: float,
) -> Tensor:
    return points.new_empty((points.shape[0], len(resolutions) * tables.shape[1]))


def _backward_fake(
    grad_features: Tensor,
    points: Tensor,
    scales: Tensor,
    tables: Tensor,
    resolutions: list[int],
    table_size: int,
    attenuation: int,
    cutoff: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return points.new_empty(points.shape), scales.new_empty(scales.shape), tables.new_empty(tables.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _differentiate(ctx: Any, grad_features: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.mipnerf_fast.hash_encode_backward(
        grad_features, *ctx.saved_tensors, *ctx.options, torch.are_deterministic_algorithms_enabled()
    )
    return (*grads, None, None, None, None)


if _native.available():
    register_differentiable("hash_encode", _forward_fake, _backward_fake, _differentiate, _save)
