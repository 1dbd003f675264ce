"""The operators `composite` and `composite_resample`: densities and colours along rays to pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native, reference
from ..reference import Composite
from .arguments import DENSITY_ACTIVATIONS, RGB_ACTIVATIONS, check_float, check_like, check_shape, require
from .finite import reports_non_finite
from .implementations import takes_kernel
from .resample import check_resample, resample

# The longest ray of the CUDA kernels: 32 tiles of 128 samples, the sum before each of them kept by a lane of the warp.
MAX_CUDA_SAMPLES = 4096


@reports_non_finite("composite", "level")
def composite(
    rgb: Tensor,
    density: Tensor,
    t_vals: Tensor,
    directions: Tensor,
    white_background: bool = True,
    *,
    density_activation: str | None = None,
    density_bias: float = 0.0,
    rgb_activation: str | None = None,
    rgb_padding: float = 0.0,
) -> Composite:
    """Composite the samples of every ray into one colour.

    delta_i = (t_{i+1} - t_i) ||d||, w_i = T_i (1 - exp(-density_i delta_i)),
    T_i = exp(-sum_{j<i} density_j delta_j); rgb = sum_i w_i c_i (+ 1 - acc on white), acc = sum_i w_i,
    distance = sum_i w_i (t_i + t_{i+1}) / 2 / acc, clipped to [t_0, t_N] (equations 3 and 5).

    Args:
        rgb: [B, N, 3] colours, or the network's raw output with `rgb_activation`; float32, bfloat16 or float16
            (float64 on the CPU).
        density: [B, N, 1] or [B, N], per world unit, of the same dtype, or raw with `density_activation`; +inf is
            opaque, and an empty interval contributes nothing whatever its density.
        t_vals: [B, N+1] fenceposts, distances in multiples of the direction; float32 (float64 with float64 samples).
        directions: [B, 3], world units, of the dtype of t_vals.
        white_background: whether what is left of the transmittance is white (else black).
        density_activation, density_bias: None | "softplus" | "relu", applied to raw + bias.
        rgb_activation, rgb_padding: None | "sigmoid", widened by the padding at both ends.

    Returns:
        Composite of rgb [B, 3], distance [B] (t_0 where acc = 0), acc [B], weights [B, N], of the dtype of t_vals.
        Differentiable once in rgb, density, t_vals and directions from every output; through distance the gradient is
        zero where it is clipped or acc is 0. Only the inputs are kept for the backward pass.

    Errors: ValueError for a shape or device that does not fit, naming the argument; RuntimeError where the backend
    "native" is forced and cannot serve, and for a second derivative.

    Example:
        >>> t_vals = torch.linspace(2.0, 6.0, 9).expand(4, 9)
        >>> level = composite(torch.rand(4, 8, 3), torch.full((4, 8, 1), 2.0), t_vals, torch.ones(4, 3))
        >>> level.rgb.shape, level.weights.shape
        (torch.Size([4, 3]), torch.Size([4, 8]))

    Source: algorithm 1.6; Barron et al. 2021, equations 3 and 5; Max 1995. Kernels: csrc/composite.
    """
    check_composite("composite", rgb, density, t_vals, directions, density_activation, rgb_activation)
    if takes_kernel("composite", rgb, _unsupported(rgb, density, t_vals)):
        options = (
            DENSITY_ACTIVATIONS[density_activation],
            density_bias,
            RGB_ACTIVATIONS[rgb_activation],
            rgb_padding,
        )
        inputs = (rgb, density, t_vals, directions, white_background, *options)
        return Composite(*_apply(_Composite, _forward, inputs))
    return reference.composite(
        rgb,
        density,
        t_vals,
        directions,
        white_background,
        density_activation=density_activation,
        density_bias=density_bias,
        rgb_activation=rgb_activation,
        rgb_padding=rgb_padding,
    )


@reports_non_finite("composite_resample", "level", "t_vals")
def composite_resample(
    rgb: Tensor,
    density: Tensor,
    t_vals: Tensor,
    directions: Tensor,
    white_background: bool = True,
    *,
    density_activation: str | None = None,
    density_bias: float = 0.0,
    rgb_activation: str | None = None,
    rgb_padding: float = 0.0,
    num_samples: int | None = None,
    u: Tensor | None = None,
    padding: float = 0.01,
) -> tuple[Composite, Tensor]:
    """Composite a coarse level and draw the fenceposts of the next one from its weights, in one kernel.

    `composite` and `resample` one after the other; the gradient is that of `composite`, and the fenceposts carry none.

    Args: as of `composite` and `resample`.

    Returns:
        The Composite, and the new fenceposts [B, num_samples + 1], ascending and inside [t_0, t_N].

    Errors: as of `composite` and `resample`.

    Example:
        >>> t_vals = torch.linspace(2.0, 6.0, 9).expand(4, 9)
        >>> level, t_vals = composite_resample(torch.rand(4, 8, 3), torch.rand(4, 8, 1), t_vals, torch.ones(4, 3))
        >>> t_vals.shape
        torch.Size([4, 9])

    Source: algorithm 1.6 and 1.7. Kernels: csrc/composite and csrc/resample.
    """
    check_composite(
        "composite_resample", rgb, density, t_vals, directions, density_activation, rgb_activation
    )
    if num_samples is None:
        num_samples = t_vals.shape[1] - 1
    check_resample("composite_resample", t_vals, None, num_samples, u)
    unsupported = _unsupported(rgb, density, t_vals)
    if takes_kernel("composite", rgb, unsupported):
        options = (
            DENSITY_ACTIVATIONS[density_activation],
            density_bias,
            RGB_ACTIVATIONS[rgb_activation],
            rgb_padding,
        )
        inputs = (rgb, density, t_vals, directions, white_background, *options, num_samples, u, padding)
        *level, new_t_vals = _apply(_CompositeResample, _forward_resample, inputs)
        return Composite(*level), new_t_vals
    result = composite(
        rgb,
        density,
        t_vals,
        directions,
        white_background,
        density_activation=density_activation,
        density_bias=density_bias,
        rgb_activation=rgb_activation,
        rgb_padding=rgb_padding,
    )
    return result, resample(t_vals, result.weights, num_samples, u, padding)


def check_composite(
    name: str,
    rgb: Tensor,
    density: Tensor,
    t_vals: Tensor,
    directions: Tensor,
    density_activation: str | None,
    rgb_activation: str | None,
) -> None:
    """Raises ValueError, naming operation and argument, where shapes, dtypes or devices do not fit together."""
    if t_vals.dim() != 2 or t_vals.shape[1] < 2:
        require(False, name, "t_vals", "of shape [B, N+1] with N at least 1", list(t_vals.shape))
    rays, samples = t_vals.shape[0], t_vals.shape[1] - 1
    check_float(name, "t_vals", t_vals)
    check_shape(name, "rgb", rgb, (rays, samples, 3), "[B, N, 3]")
    if density.dim() == 2:
        check_shape(name, "density", density, (rays, samples), "[B, N]")
    else:
        check_shape(name, "density", density, (rays, samples, 1), "[B, N, 1]")
    check_shape(name, "directions", directions, (rays, 3), "[B, 3]")
    check_like(name, "directions", directions, "t_vals", t_vals)
    for argument, tensor in (("rgb", rgb), ("density", density)):
        check_float(name, argument, tensor)
        if tensor.device != t_vals.device:
            require(False, name, argument, f"on {t_vals.device} as t_vals", tensor.device)
    if density_activation not in DENSITY_ACTIVATIONS:
        require(False, name, "density_activation", 'None, "softplus" or "relu"', repr(density_activation))
    if rgb_activation not in RGB_ACTIVATIONS:
        require(False, name, "rgb_activation", 'None or "sigmoid"', repr(rgb_activation))


def _unsupported(rgb: Tensor, density: Tensor, t_vals: Tensor) -> str:
    """Why the kernels cannot take these dtypes or lengths together; empty where they can."""
    geometry = torch.float64 if rgb.dtype == torch.float64 else torch.float32
    if density.dtype != rgb.dtype:
        return f"the kernel takes density of the dtype of rgb, {rgb.dtype}, not {density.dtype}"
    if t_vals.dtype != geometry:
        return f"the kernel takes t_vals of {geometry} beside rgb of {rgb.dtype}, not {t_vals.dtype}"
    if t_vals.is_cuda and t_vals.shape[1] - 1 > MAX_CUDA_SAMPLES:
        return f"the CUDA kernel takes rays of at most {MAX_CUDA_SAMPLES} samples, not {t_vals.shape[1] - 1}"
    return ""


# --------------------------------------------------------------------------------- autograd over the raw operators


def _apply(function: type[torch.autograd.Function], operator: Any, inputs: tuple[Any, ...]) -> Any:
    """The autograd Function, or under torch.compile the raw operator, whose registered derivative is the same one.

    In eager mode the Function is quicker: the registered derivative goes through several layers of Python.
    """
    if torch.compiler.is_compiling():
        return operator(*inputs)
    return function.apply(*inputs)


def _call(operator: Any, *arguments: Any) -> Any:
    """Calls a raw operator from within an autograd Function, past the derivative registered for it.

    Not where gradients of gradients are recorded: there that derivative raises.
    """
    if torch.is_grad_enabled():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


# What the raw operators take: rgb, density, t_vals, directions, white_background and four options.
_NUM_INPUTS = 9

if _native.available():
    _forward = torch.ops.mipnerf_fast.composite_forward.default
    _backward = torch.ops.mipnerf_fast.composite_backward.default
    _forward_resample = torch.ops.mipnerf_fast.composite_resample_forward.default


def _save(ctx: Any, inputs: tuple[Any, ...]) -> None:
    # An output that took no part in the loss then has no gradient, instead of a tensor of zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:_NUM_INPUTS]
    ctx.num_inputs = len(inputs)


def _gradients(ctx: Any, grad_outputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    with_geometry = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    grads = _call(_backward, *grad_outputs, *ctx.saved_tensors, *ctx.options, with_geometry)
    if not with_geometry:
        grads = (*grads[:2], None, None)
    return (*grads, *[None] * (ctx.num_inputs - 4))


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        _save(ctx, inputs)
        return tuple(_call(_forward, *inputs))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_outputs)


class _CompositeResample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        _save(ctx, inputs)
        *level, new_t_vals = _call(_forward_resample, *inputs)
        ctx.mark_non_differentiable(new_t_vals)
        return (*level, new_t_vals)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_outputs[:4])


def _no_second_derivative(ctx: Any, *grad_outputs: Tensor | None) -> None:
    raise RuntimeError("composite: the second derivative is not implemented; use_backend('reference') has it")


def _register() -> None:
    """What the raw operators need beside their kernels: shapes for the compiler, and derivatives."""

    def fake_forward(rgb: Tensor, density: Tensor, t_vals: Tensor, *_: Any) -> tuple[Tensor, ...]:
        rays, samples = t_vals.shape[0], t_vals.shape[1] - 1
        shapes = ((rays, 3), (rays,), (rays,), (rays, samples))
        return tuple(t_vals.new_empty(shape) for shape in shapes)

    def fake_forward_resample(*inputs: Any) -> tuple[Tensor, ...]:
        t_vals, num_samples = inputs[2], inputs[_NUM_INPUTS]
        return (*fake_forward(*inputs), t_vals.new_empty(t_vals.shape[0], num_samples + 1))

    def fake_backward(*inputs: Any) -> tuple[Tensor, ...]:
        rgb, density, t_vals, with_geometry = inputs[4], inputs[5], inputs[6], inputs[-1]
        rays = t_vals.shape[0] if with_geometry else 0
        grads = (rgb.new_empty(rgb.shape), density.new_empty(density.shape))
        return (*grads, t_vals.new_empty(rays, t_vals.shape[1]), t_vals.new_empty(rays, 3))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs)
        if len(output) == 5:
            ctx.mark_non_differentiable(output[4])

    def gradients(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_outputs[:4])

    library = torch.library
    library.register_fake("mipnerf_fast::composite_forward", fake_forward)
    library.register_fake("mipnerf_fast::composite_resample_forward", fake_forward_resample)
    library.register_fake("mipnerf_fast::composite_backward", fake_backward)
    for name in ("composite_forward", "composite_resample_forward"):
        library.register_autograd(f"mipnerf_fast::{name}", gradients, setup_context=setup)
    library.register_autograd("mipnerf_fast::composite_backward", _no_second_derivative)


if _native.available():
    _register()
