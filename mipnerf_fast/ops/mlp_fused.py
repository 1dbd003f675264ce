"""The fused network: one kernel forward, two backward, over the same function folded as the kernels take it.

The bottleneck has no activation, so it is one matrix with the layer above it; the encoded direction is the same for all
samples of a ray, so its part is one bias per ray. The kernels (csrc/mlp) are handed the folded parameters as one array
and give the gradients as one; what is here is the way there and back.

What training keeps are the activations in 16 bits, and the masks of their ReLUs beside them, a bit each, of values
before rounding. There is no mode that keeps masks alone: the gradient of a weight is a product with the activations,
so the whole forward pass would be done again, estimated at 1.4 ms for 2^20 samples on an H200, to spare about 1.1 ms of
writing that the products hide (`performance` 3.2 and 3.4; not measured).

The sources are two generations: mlp_mma (mma.sync, capability 8.0 and higher) and mlp_hopper (wgmma, 9.0a alone), which
no one file compiles for both. The first has two translation units, packing with the forward pass and the backward pass;
the second three, with dgrad and wgrad apart: every one is some minutes of compiling, shared by two cores. Template
parameters are the width, the operands' type and, of the forward pass, kComposites: compositing takes barriers, shared
memory and registers that the others would pay for. All else about a network is looked up at run time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import Composite
from . import mlp_fused_network
from .arguments import DENSITY_ACTIVATIONS, RGB_ACTIVATIONS
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
from .mlp_fused_network import (
    HAS_KERNELS,
    TILE_ROWS,
    WHY_NO_KERNELS,
    FoldedNetwork,
    KeptNetworks,
    Sizes,
    folded_network,
)

_HALVES = (torch.bfloat16, torch.float16)
# Of the rows of the tiles that a ray's samples are computed in; with fewer of them filled, compositing is worth a
# launch of its own.
_FILLED = 0.9


class Frusta(NamedTuple):
    """What `ops.frustum_ipe` makes features of: t_vals [B, N+1], origins, directions [B, 3], radii [B, 1], float32."""

    t_vals: Tensor
    origins: Tensor
    directions: Tensor
    radii: Tensor


class Encoding(NamedTuple):
    """How; degrees min_deg to max_deg - 1."""

    min_deg: int = 0
    max_deg: int = 16
    cylinder: bool = False
    integrated: bool = True


def fused_mlp(
    features: Tensor,
    viewdirs_enc: Tensor | None,
    parameters: Sequence[Tensor],
    architecture: Architecture,
    dtype: torch.dtype,
    *,
    deterministic: bool = True,
    kept: KeptNetworks | None = None,
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
        deterministic: whether the gradients are the same in every run, as they also are under
            torch.use_deterministic_algorithms. Without, blocks add theirs to memory as they come, which should be
            faster: not measured.
        kept: where folded and packed parameters are kept from call to call, as long as they do not change.

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
    network = folded_network(parameters, architecture, viewdirs_enc is not None, kept)
    if training:
        passes = Passes(functools.partial(_forward, network), functools.partial(_backward, network))
        rgb, density = MlpFunction.apply(passes, options, *inputs)
        return rgb, density
    rgb, density, _ = _forward(network, features, viewdirs_enc, parameters, options, False)
    return rgb, density


@torch.no_grad()
def fused_mlp_encoded(
    frusta: Frusta,
    encoding: Encoding,
    viewdirs_enc: Tensor | None,
    parameters: Sequence[Tensor],
    architecture: Architecture,
    dtype: torch.dtype,
    *,
    kept: KeptNetworks | None = None,
) -> tuple[Tensor, Tensor]:
    """`frustum_ipe` and `fused_mlp` in one kernel, for inference: features never reach memory.

    Args: frusta, encoding: of `ops.frustum_ipe`; the others of `fused_mlp`.

    Returns:
        raw rgb [B, N, 3] and raw density [B, N, 1], float32; not differentiable.

    Source: Barron et al. 2021, equations 7, 8 and 14, then as `fused_mlp`.
    """
    rays, samples = frusta.t_vals.shape[0], frusta.t_vals.shape[1] - 1
    inputs = _encoded_inputs(frusta, encoding, viewdirs_enc, parameters, architecture, dtype, kept)
    rgb, density = mlp_fused_network.operators().encoded_forward(*inputs)
    return rgb.view(rays, samples, 3), density.view(rays, samples, 1)


@torch.no_grad()
def fused_mlp_composited(
    frusta: Frusta,
    encoding: Encoding,
    viewdirs_enc: Tensor | None,
    parameters: Sequence[Tensor],
    architecture: Architecture,
    dtype: torch.dtype,
    *,
    white_background: bool = True,
    density_activation: str | None = None,
    density_bias: float = 0.0,
    rgb_activation: str | None = None,
    rgb_padding: float = 0.0,
    kept: KeptNetworks | None = None,
) -> Composite:
    """`frustum_ipe`, `fused_mlp` and `composite` in one kernel, for inference: of samples only weights reach memory.

    Args: as of `fused_mlp_encoded` and of `ops.composite`.

    Returns:
        Composite of rgb [B, 3], distance [B], acc [B], weights [B, N], float32; not differentiable.

    Errors: ValueError for a network that `why_not_composited` names.

    Source: Barron et al. 2021, equations 3, 5, 7, 8 and 14. Kernels: csrc/mlp/mlp_composite.cuh.
    """
    inputs = _encoded_inputs(frusta, encoding, viewdirs_enc, parameters, architecture, dtype, kept)
    options = (
        white_background,
        DENSITY_ACTIVATIONS[density_activation],
        density_bias,
        RGB_ACTIVATIONS[rgb_activation],
        rgb_padding,
    )
    return Composite(*mlp_fused_network.operators().composited_forward(*inputs, *options))


def _encoded_inputs(
    frusta: Frusta,
    encoding: Encoding,
    viewdirs_enc: Tensor | None,
    parameters: Sequence[Tensor],
    architecture: Architecture,
    dtype: torch.dtype,
    kept: KeptNetworks | None,
) -> tuple[Any, ...]:
    with torch.autocast(frusta.t_vals.device.type, enabled=False):
        network = folded_network(parameters, architecture, viewdirs_enc is not None, kept)
        packed = network.packed(6 * (encoding.max_deg - encoding.min_deg), dtype)
        return (*frusta, network.ray_bias(viewdirs_enc), packed, *encoding, *network.sizes, dtype)


def why_not_composited(samples: int, architecture: Architecture, has_views: bool) -> str:
    """Why compositing `samples` a ray is left to a launch of its own; empty where the network's kernel does it."""
    last = architecture.net_depth - 1
    if not has_views and last > 0 and last % architecture.skip_layer == 0:
        return "the heads of a network without views read the features"
    rows = TILE_ROWS // samples * samples if samples <= TILE_ROWS else samples
    tiles = -(-rows // TILE_ROWS)
    if rows < _FILLED * tiles * TILE_ROWS:
        return f"rays of {samples} samples fill {rows} of the {tiles * TILE_ROWS} rows of their tiles"
    return ""


def why_not_fused(
    features: int, sizes: Sizes, device: torch.device, dtype: torch.dtype, operands: torch.dtype
) -> str:
    """Why the fused kernels cannot serve this network, these float parameters or this device; empty where they can."""
    if device.type != "cuda":
        return f"it runs on a GPU, and the parameters are on {device.type}"
    if not HAS_KERNELS:
        return WHY_NO_KERNELS
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


# ------------------------------------------------------------------------------------------------- autograd


def _forward(
    network: FoldedNetwork,
    features: Tensor,
    viewdirs_enc: Tensor | None,
    parameters: Sequence[Tensor],
    options: tuple[Any, ...],
    training: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """raw rgb, raw density, and with `training` what the backward pass needs: packed weights, activations, masks."""
    *_, dtype, _ = options
    rays, samples, columns = features.shape
    with torch.autocast(features.device.type, enabled=False):
        packed, ray_bias = network.packed(columns, dtype), network.ray_bias(viewdirs_enc)
        rgb, density, *stash = mlp_fused_network.operators().forward(
            _rows(features, dtype), ray_bias, packed, max(samples, 1), *network.sizes, training
        )
    return rgb.view(rays, samples, 3), density.view(rays, samples, 1), [packed, *stash] if training else []


def _rows(features: Tensor, dtype: torch.dtype) -> Tensor:
    return features.detach().flatten(0, 1).to(dtype)


def _backward(
    network: FoldedNetwork,
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
    *_, dtype, deterministic = options
    deterministic |= torch.are_deterministic_algorithms_enabled()
    rays, samples, columns = features.shape
    with torch.autocast(features.device.type, enabled=False):
        scale = loss_scale([grad for grad in (grad_rgb, grad_density) if grad is not None], dtype)

        def rows(grad: Tensor | None, *shape: int) -> Tensor | None:
            if grad is None:
                return None
            return grad.reshape(shape) if scale is None else grad.reshape(shape) * scale

        gradients, ray_sums, grad_features = mlp_fused_network.operators().backward(
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
        grads, grad_viewdirs = network.unfold(gradients, ray_sums, viewdirs_enc)
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
        network = folded_network(parameters, Architecture(*options[:3]), viewdirs_enc is not None)
        return _forward(network, features, viewdirs_enc, parameters, tuple(options[:-1]), options[-1])

    def backward(
        grad_rgb: Tensor | None,
        grad_density: Tensor | None,
        features: Tensor,
        viewdirs_enc: Tensor | None,
        parameters: list[Tensor],
        stash: list[Tensor],
        *options: Any,
    ) -> list[Tensor]:
        network = folded_network(parameters, Architecture(*options[:3]), viewdirs_enc is not None)
        inputs = (network, grad_rgb, grad_density, features, viewdirs_enc, parameters, stash)
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


_define()
