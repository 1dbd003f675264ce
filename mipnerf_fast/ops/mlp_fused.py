"""The fused network: one kernel forward, two backward, over the same function folded as the kernels take it.

The bottleneck has no activation, so it is one matrix with the layer above it; the encoded direction is the same for all
samples of a ray, so its part is one bias per ray. The kernels (csrc/mlp) are handed the folded parameters as one array
and give the gradients as one; what is here is the way there and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from .mlp_autograd import (
    Architecture,
    MlpFunction,
    Passes,
    loss_scale,
    no_second_derivative,
    save_inputs,
    saved_inputs,
    wanted_of_inputs,
)

_HALVES = (torch.bfloat16, torch.float16)
_TILE_ROWS = 128
_OPERATORS = ("mlp_pack", "mlp_forward", "mlp_encoded_forward", "mlp_backward")


class Sizes(NamedTuple):
    """The network as the operators take it; without views the last two are 0."""

    width: int
    depth: int
    skip_layer: int
    view_width: int
    view_depth: int


class Kernels(NamedTuple):
    """What packs, and goes forward and back: the raw operators."""

    pack: Callable[..., Tensor]
    forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def fused_mlp(
    features: Tensor,
    viewdirs_enc: Tensor | None,
    parameters: Sequence[Tensor],
    architecture: Architecture,
    dtype: torch.dtype,
    *,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """`reference.mip_mlp` in the fused kernels.

    W_eff = W_view[:, :W] W_bottleneck and, for ray r, v_r = W_view[:, W:] d_r + W_view[:, :W] b_bottleneck + b_view:
    the view layer is relu(W_eff h + v_r). With G = sum(delta h^T) and s = sum(delta) over all samples the gradients of
    the factors are dW_view[:, :W] = G W_bottleneck^T + s b_bottleneck^T, dW_bottleneck = W_view[:, :W]^T G,
    db_bottleneck = W_view[:, :W]^T s, db_view = s, dW_view[:, W:] = sum over rays of (delta summed over the ray) d_r^T.

    Args:
        features: [B, N, F] of any float dtype; rounded to `dtype`.
        viewdirs_enc: [B, V], or None for a network without view directions.
        parameters: weight and bias of every layer in the order of `reference.mip_mlp`; float32.
        architecture: of the network.
        dtype: of the operands: activations, weights, deltas; bfloat16 or float16 (scaled, and scaled back).
        deterministic: whether the gradients are the same in every run; without, their sums are a little faster.

    Returns:
        raw rgb [B, N, 3] and raw density [B, N, 1], float32. Differentiable once in everything; the gradient to the
        features costs its products only where they require one.

    Errors: RuntimeError for a second derivative.

    Source: `performance` 1.2 and 3.3; the bottleneck is Barron et al. 2021, section 4 (the official code, models.py).
    """
    inputs = (features, viewdirs_enc, *parameters)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    options = (*architecture, dtype, deterministic)
    if torch.compiler.is_compiling():
        rgb, density, _ = torch.ops.mipnerf_fast.mlp_fused_forward(
            features, viewdirs_enc, list(parameters), *options, training
        )
        return rgb, density
    if training:
        rgb, density = MlpFunction.apply(Passes(_forward, _backward), options, *inputs)
        return rgb, density
    rgb, density, _ = _forward(features, viewdirs_enc, parameters, options, False)
    return rgb, density


def fused_mlp_encoded(
    t_vals: Tensor,
    origins: Tensor,
    directions: Tensor,
    radii: Tensor,
    viewdirs_enc: Tensor | None,
    parameters: Sequence[Tensor],
    architecture: Architecture,
    dtype: torch.dtype,
    *,
    min_deg: int = 0,
    max_deg: int = 16,
    cylinder: bool = False,
    integrated: bool = True,
) -> tuple[Tensor, Tensor]:
    """`frustum_ipe` and `fused_mlp` in one kernel, for inference: features never reach memory.

    Args: of `ops.frustum_ipe` (t_vals [B, N+1], origins and directions [B, 3], radii [B, 1], float32) and of
        `fused_mlp`.

    Returns:
        raw rgb [B, N, 3] and raw density [B, N, 1], float32; not differentiable.

    Source: Barron et al. 2021, equations 7, 8 and 14, then as `fused_mlp`.
    """
    rays, samples = t_vals.shape[0], t_vals.shape[1] - 1
    with torch.no_grad(), torch.autocast(t_vals.device.type, enabled=False):
        network = _Folded(viewdirs_enc, parameters, architecture)
        packed = torch.ops.mipnerf_fast.mlp_pack(
            network.flat(), 6 * (max_deg - min_deg), *network.sizes, dtype
        )
        encoding = (min_deg, max_deg, cylinder, integrated)
        rgb, density = torch.ops.mipnerf_fast.mlp_encoded_forward(
            t_vals,
            origins,
            directions,
            radii,
            network.ray_bias,
            packed,
            *encoding,
            *network.sizes,
            dtype,
        )
    return rgb.view(rays, samples, 3), density.view(rays, samples, 1)


def why_not_fused(
    features: int, sizes: Sizes, device: torch.device, dtype: torch.dtype, operands: torch.dtype
) -> str:
    """Why the fused kernels cannot serve this network, these float parameters or this device; empty where they can."""
    if device.type != "cuda":
        return f"it runs on a GPU, and the parameters are on {device.type}"
    if not _HAS_KERNELS:
        return _WHY_NO_KERNELS
    if (gpu := torch.cuda.get_device_properties(device)).major < 8:
        return f"it needs compute capability 8.0, and {gpu.name} has {gpu.major}.{gpu.minor}"
    if operands not in _HALVES:
        return f"its operands are bfloat16 or float16, not {str(operands).removeprefix('torch.')}"
    if dtype != torch.float32:
        return f"its parameters must be float32, not {str(dtype).removeprefix('torch.')}"
    if features % 2 or not 2 <= features <= 128:
        return f"in_features must be even and at most 128, not {features}"
    if sizes.width not in (64, 128, 256):
        return f"net_width must be 64, 128 or 256, not {sizes.width}"
    if not 1 <= sizes.depth <= 8:
        return f"net_depth must be 1 to 8, not {sizes.depth}"
    if sizes.view_depth > 8:
        return f"net_depth_condition must be at most 8, not {sizes.view_depth}"
    if sizes.view_depth and (sizes.view_width % 16 or sizes.view_width > sizes.width):
        return f"net_width_condition must be a multiple of 16, at most net_width, not {sizes.view_width}"
    return ""


# ------------------------------------------------------------------------------------------------- folding


class _Folded:
    """The folded parameters of a network, and the way back for their gradients."""

    def __init__(
        self, viewdirs_enc: Tensor | None, parameters: Sequence[Tensor], architecture: Architecture
    ) -> None:
        depth, view_depth, skip_layer = architecture
        detached = [parameter.detach() for parameter in parameters]
        self.layers = list(zip(detached[0::2], detached[1::2], strict=True))
        self.depth = depth
        self.width = self.layers[0][0].shape[0]
        self.viewdirs_enc = None if viewdirs_enc is None else viewdirs_enc.detach().to(detached[0].dtype)
        self.ray_bias: Tensor | None = None
        if self.viewdirs_enc is None:
            self.sizes = Sizes(self.width, depth, skip_layer, 0, 0)
            self.matrices = self.layers
        else:
            bottleneck_weight, bottleneck_bias = self.layers[depth + 1]
            weight, bias = self.layers[depth + 2]
            self.sizes = Sizes(self.width, depth, skip_layer, len(weight), view_depth)
            from_bottleneck, from_views = weight[:, : self.width], weight[:, self.width :]
            folded = from_bottleneck @ bottleneck_weight
            self.ray_bias = self.viewdirs_enc @ from_views.t() + (bias + from_bottleneck @ bottleneck_bias)
            # In the place of the bias, which is each ray's, stands one that nobody reads.
            self.matrices = [*self.layers[: depth + 1], (folded, bias), *self.layers[depth + 3 :]]

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """The weights and biases in the array that the kernels know, each at a multiple of 4."""
        parts, at = [], 0
        for tensor in (tensor for matrix in self.matrices for tensor in matrix):
            parts.append(flat[at : at + tensor.numel()].view(tensor.shape))
            at += -(-tensor.numel() // 4) * 4
        return parts

    def flat(self) -> Tensor:
        tensors = [tensor for matrix in self.matrices for tensor in matrix]
        flat = tensors[0].new_empty(sum(-(-tensor.numel() // 4) * 4 for tensor in tensors))
        torch._foreach_copy_(self._parts(flat), tensors)
        return flat

    def unfold(self, gradients: Tensor, ray_sums: Tensor) -> tuple[list[Tensor], Tensor]:
        """Gradients of the parameters in their order, and of the encoded directions (empty without)."""
        parts = self._parts(gradients)
        if self.viewdirs_enc is None:
            return parts, gradients.new_empty(0)
        bottleneck_weight, bottleneck_bias = self.layers[self.depth + 1]
        weight, _ = self.layers[self.depth + 2]
        from_bottleneck, from_views = weight[:, : self.width], weight[:, self.width :]
        at = 2 * (self.depth + 1)
        grad, sums = parts[at : at + 2]
        of_bottleneck = torch.addr(grad @ bottleneck_weight.t(), sums, bottleneck_bias)
        of_weight = torch.cat([of_bottleneck, ray_sums.t() @ self.viewdirs_enc], 1)
        unfolded = [from_bottleneck.t() @ grad, from_bottleneck.t() @ sums, of_weight, sums]
        return [*parts[:at], *unfolded, *parts[at + 2 :]], ray_sums @ from_views


# ------------------------------------------------------------------------------------------------- autograd


def _forward(
    features: Tensor,
    viewdirs_enc: Tensor | None,
    parameters: Sequence[Tensor],
    options: tuple[Any, ...],
    training: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """raw rgb, raw density, and with `training` what the backward pass needs: packed weights, activations, masks."""
    *architecture, dtype, _ = options
    rays, samples, columns = features.shape
    kernels = operators()
    with torch.autocast(features.device.type, enabled=False):
        network = _Folded(viewdirs_enc, parameters, Architecture(*architecture))
        packed = kernels.pack(network.flat(), columns, *network.sizes, dtype)
        rgb, density, *stash = kernels.forward(
            _rows(features, dtype), network.ray_bias, packed, max(samples, 1), *network.sizes, training
        )
    return rgb.view(rays, samples, 3), density.view(rays, samples, 1), [packed, *stash] if training else []


def _rows(features: Tensor, dtype: torch.dtype) -> Tensor:
    return features.detach().flatten(0, 1).to(dtype)


def _backward(
    grad_rgb: Tensor | None,
    grad_density: Tensor | None,
    features: Tensor,
    viewdirs_enc: Tensor | None,
    parameters: Sequence[Tensor],
    stash: Sequence[Tensor],
    options: tuple[Any, ...],
    to_features: bool,
) -> list[Tensor]:
    """Gradients of features (empty unless wanted), viewdirs_enc (empty without) and the parameters."""
    *architecture, dtype, deterministic = options
    rays, samples, columns = features.shape
    with torch.autocast(features.device.type, enabled=False):
        network = _Folded(viewdirs_enc, parameters, Architecture(*architecture))
        scale = loss_scale([grad for grad in (grad_rgb, grad_density) if grad is not None], dtype)

        def rows(grad: Tensor | None, *shape: int) -> Tensor | None:
            if grad is None:
                return None
            return grad.reshape(shape) if scale is None else grad.reshape(shape) * scale

        gradients, ray_sums, grad_features = operators().backward(
            rows(grad_rgb, rays * samples, 3),
            rows(grad_density, rays * samples),
            _rows(features, dtype),
            *stash,
            max(samples, 1),
            *network.sizes,
            deterministic,
            to_features,
        )
        if scale is not None:
            gradients, ray_sums, grad_features = gradients / scale, ray_sums / scale, grad_features / scale
        grads, grad_viewdirs = network.unfold(gradients, ray_sums)
    shape = (rays if to_features else 0, samples, columns)
    return [grad_features.view(shape), grad_viewdirs, *grads]


def _define() -> None:
    """The same as operators, which torch.compile takes as they are."""
    options = "int net_depth, int net_depth_condition, int skip_layer, ScalarType dtype, bool deterministic"
    forward_schema = f"(Tensor features, Tensor? viewdirs_enc, Tensor[] parameters, {options}, bool training)"
    backward_schema = (
        "(Tensor? grad_rgb, Tensor? grad_density, Tensor features, Tensor? viewdirs_enc, Tensor[] parameters, "
        f"Tensor[] stash, {options}, bool to_features)"
    )

    def forward(
        features: Tensor, viewdirs_enc: Tensor | None, parameters: list[Tensor], *options: Any
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        return _forward(features, viewdirs_enc, parameters, tuple(options[:-1]), options[-1])

    def backward(
        grad_rgb: Tensor | None,
        grad_density: Tensor | None,
        features: Tensor,
        viewdirs_enc: Tensor | None,
        parameters: list[Tensor],
        stash: list[Tensor],
        *options: Any,
    ) -> list[Tensor]:
        inputs = (grad_rgb, grad_density, features, viewdirs_enc, parameters, stash)
        grads = _backward(*inputs, tuple(options[:-1]), options[-1])
        # An operator's outputs are tensors of their own, and those of the parameters are parts of one.
        return [*grads[:2], *[grad.clone() for grad in grads[2:]]]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        features, viewdirs_enc, parameters, *options, _ = inputs
        save_inputs(ctx, tuple(options), features, viewdirs_enc, parameters, output[2])

    def gradients(ctx: Any, grad_rgb: Tensor | None, grad_density: Tensor | None, _: Any) -> tuple[Any, ...]:
        features, viewdirs_enc, parameters, stash = saved_inputs(ctx)
        to_features, to_viewdirs = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        of_features, of_viewdirs, *of_parameters = torch.ops.mipnerf_fast.mlp_fused_backward(
            grad_rgb, grad_density, features, viewdirs_enc, parameters, stash, *ctx.options, to_features
        )
        wanted = wanted_of_inputs(of_features, of_viewdirs, features, viewdirs_enc, to_features, to_viewdirs)
        return (*wanted, of_parameters, *[None] * 6)

    library = torch.library
    name = "mipnerf_fast::mlp_fused_forward"
    schema = f"{forward_schema} -> (Tensor, Tensor, Tensor[])"
    operator = library.custom_op(name, forward, mutates_args=(), schema=schema)
    operator.register_fake(forward)  # the raw operators know the shapes of their results, so the whole does
    operator.register_autograd(gradients, setup_context=setup)
    name = "mipnerf_fast::mlp_fused_backward"
    operator = library.custom_op(name, backward, mutates_args=(), schema=f"{backward_schema} -> Tensor[]")
    operator.register_fake(backward)
    operator.register_autograd(no_second_derivative)


# ------------------------------------------------------------------------------------------------- operators


# Decided when the package is imported: torch.compile can read module globals, but not ask for them.
_HAS_KERNELS = _native.available() and all(
    torch._C._dispatch_has_kernel_for_dispatch_key(f"mipnerf_fast::{name}", "CUDA") for name in _OPERATORS
)
_HAS_HOPPER = "9.0a" in _native.build_info().get("architectures", [])
_WHY_NO_KERNELS = _native.why_missing() or "the native library was built without its CUDA kernels"


def operators() -> Kernels:
    """The raw operators; tests put twins in this function's place."""
    library = torch.ops.mipnerf_fast
    return Kernels(library.mlp_pack, library.mlp_forward, library.mlp_backward)


def _no_derivative(*_: Any) -> None:
    raise RuntimeError("mlp: the raw operators have no derivative of their own; ops.mlp_fused.fused_mlp has")


def _register() -> None:
    """What the raw operators need beside their kernels: shapes for the compiler, and derivatives."""

    def bytes_of(features: int, sizes: tuple[Any, ...], device: torch.device) -> dict[str, int]:
        module = _native.load()
        assert module is not None
        hopper = _HAS_HOPPER and device.type == "cuda" and torch.cuda.get_device_properties(device).major == 9
        return dict(module.mlp_sizes(features, *sizes, hopper))

    def fake_pack(parameters: Tensor, features: int, *options: Any) -> Tensor:
        return parameters.new_empty(
            bytes_of(features, options[:5], parameters.device)["packed"], dtype=torch.uint8
        )

    def fake_forward(
        features: Tensor, ray_bias: Tensor | None, packed: Tensor, samples_per_ray: int, *options: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *sizes, training = options
        count, columns = features.shape
        tiles = (count + _TILE_ROWS - 1) // _TILE_ROWS if training else 0
        per_tile = bytes_of(columns, tuple(sizes), features.device)
        rgb, density = (features.new_empty(shape, dtype=torch.float32) for shape in ((count, 3), (count,)))
        activations, masks = (
            features.new_empty(tiles * per_tile[name], dtype=torch.uint8) for name in ("activations", "masks")
        )
        return rgb, density, activations, masks

    def fake_encoded_forward(t_vals: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        count = t_vals.shape[0] * (t_vals.shape[1] - 1)
        return t_vals.new_empty(count, 3), t_vals.new_empty(count)

    def fake_backward(
        grad_rgb: Tensor | None, grad_density: Tensor | None, features: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        samples_per_ray, *sizes, _, to_features = rest[3:]
        count, columns = features.shape
        floats = bytes_of(columns, tuple(sizes), features.device)["gradients"]
        shapes = ((floats,), (count // samples_per_ray, sizes[3]), (count if to_features else 0, columns))
        gradients, ray_sums, grad_features = (
            features.new_empty(shape, dtype=torch.float32) for shape in shapes
        )
        return gradients, ray_sums, grad_features

    fakes: tuple[Callable[..., Any], ...] = (fake_pack, fake_forward, fake_encoded_forward, fake_backward)
    for name, fake in zip(_OPERATORS, fakes, strict=True):
        torch.library.register_fake(f"mipnerf_fast::{name}", fake)
        torch.library.register_autograd(f"mipnerf_fast::{name}", _no_derivative)


_define()
if _native.available():
    _register()
