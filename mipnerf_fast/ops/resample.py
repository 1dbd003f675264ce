"""The operator `resample`: weights to the fenceposts of the next level."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native, reference
from .arguments import check_float, check_like, check_shape, require
from .finite import reports_non_finite
from .implementations import takes_kernel

# The longest ray of the CUDA kernel, whose CDF lies in shared memory.
MAX_CUDA_SAMPLES = 4096


@reports_non_finite("resample", "t_vals")
def resample(
    t_vals: Tensor,
    weights: Tensor,
    num_samples: int | None = None,
    u: Tensor | None = None,
    padding: float = 0.01,
) -> Tensor:
    """New fenceposts for the next level, drawn from the blurred and padded weights of this one.

    w'_k = (max(w_{k-1}, w_k) + max(w_k, w_{k+1})) / 2 + padding (equation 18); t'_k = CDF^-1(p_k) with
    p_k = min(k/M + u_k (1/M - eps), 1 - eps), M = num_samples + 1, eps = 2^-23, or evenly spaced in [0, 1 - eps].

    Args:
        t_vals: [B, N+1] fenceposts, ascending, distances in multiples of the direction; float32 (float64 on the CPU).
        weights: [B, N] from compositing, at least 0, of the same dtype.
        num_samples: intervals wanted; None: as many as came in.
        u: [B, num_samples + 1] in [0, 1), of the same dtype, or None for evenly spaced positions.
        padding: added to every blurred weight; the paper's alpha = 0.01.

    Returns:
        [B, num_samples + 1], ascending and inside [t_0, t_N]. No gradient (stop_level_grad).

    Errors: ValueError for a shape or device that does not fit, naming the argument; RuntimeError where the backend
    "native" is forced and cannot serve.

    Example:
        >>> t_vals = torch.linspace(2.0, 6.0, 9).expand(4, 9)
        >>> resample(t_vals, torch.rand(4, 8), num_samples=16).shape
        torch.Size([4, 17])

    Source: algorithm 1.7; Barron et al. 2021, equation 18. Kernels: csrc/resample.
    """
    if num_samples is None:
        num_samples = weights.shape[-1]
    check_resample("resample", t_vals, weights, num_samples, u)
    unsupported = ""
    if t_vals.is_cuda and t_vals.shape[1] - 1 > MAX_CUDA_SAMPLES:
        unsupported = (
            f"the CUDA kernel takes rays of at most {MAX_CUDA_SAMPLES} samples, not {t_vals.shape[1] - 1}"
        )
    if takes_kernel("resample", t_vals, unsupported):
        arguments = (
            t_vals.detach(),
            weights.detach(),
            num_samples,
            None if u is None else u.detach(),
            padding,
        )
        result: Tensor = torch.ops.mipnerf_fast.resample.default(*arguments)
        return result
    return reference.resample(t_vals, weights, num_samples, u, padding)


def check_resample(
    name: str, t_vals: Tensor, weights: Tensor | None, num_samples: int, u: Tensor | None
) -> None:
    """Raises ValueError, naming operation and argument, where shapes, dtypes or devices do not fit together."""
    if t_vals.dim() != 2 or t_vals.shape[1] < 2:
        require(False, name, "t_vals", "of shape [B, N+1] with N at least 1", list(t_vals.shape))
    check_float(name, "t_vals", t_vals)
    rays, samples = t_vals.shape[0], t_vals.shape[1] - 1
    if weights is not None:
        check_shape(name, "weights", weights, (rays, samples), "[B, N]")
        check_like(name, "weights", weights, "t_vals", t_vals)
    if num_samples < 1:
        require(False, name, "num_samples", "at least 1", num_samples)
    if u is not None:
        check_shape(name, "u", u, (rays, num_samples + 1), "[B, num_samples + 1]")
        check_like(name, "u", u, "t_vals", t_vals)


def _register() -> None:
    """What the raw operator needs beside its kernels: shapes for the compiler, and a derivative of nothing."""

    def fake(t_vals: Tensor, weights: Tensor, num_samples: int, u: Tensor | None, padding: float) -> Tensor:
        return t_vals.new_empty(t_vals.shape[0], num_samples + 1)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    def gradients(ctx: Any, *grad_outputs: Tensor | None) -> tuple[None, ...]:
        return (None,) * 5

    torch.library.register_fake("mipnerf_fast::resample", fake)
    torch.library.register_autograd("mipnerf_fast::resample", gradients, setup_context=setup)


if _native.available():
    _register()
