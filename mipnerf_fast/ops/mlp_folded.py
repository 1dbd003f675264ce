"""The folded network: the same function with fewer products, and its exact gradients, over the products of `gemm`.

The bottleneck has no activation, so it is one matrix with the layer above it; the encoded direction is the same for all
samples of a ray, so its part is one bias per ray; nothing asks for a gradient to the encoding, so none is computed.
Written once: `gemm.TorchGemm` makes it the CPU's engine, `gemm.CublasLt` the GPU's, `gemm.CublasLtTwin` its check.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .mlp_autograd import (
    Architecture,
    MlpFunction,
    Passes,
    no_second_derivative,
    save_inputs,
    saved_inputs,
    wanted_of_inputs,
)
from .mlp_folded_backward import backward_pass
from .mlp_folded_network import CUBLASLT, TORCH, TWIN, Network, new_stash
from .mlp_folded_passes import forward_pass
from .registration import below_autograd

__all__ = ["CUBLASLT", "TORCH", "TWIN", "folded_mlp"]


class _Call:
    """Both passes of a call, as `Passes` describes them, over the same network."""

    network: Network

    def forward(
        self,
        features: Tensor,
        viewdirs_enc: Tensor | None,
        parameters: Sequence[Tensor],
        options: tuple[Any, ...],
        training: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        self.network = Network(features, viewdirs_enc, parameters, options)
        self.network.to_viewdirs = viewdirs_enc is not None and viewdirs_enc.requires_grad
        with below_autograd():
            results = forward_pass(self.network, features, viewdirs_enc, training)
        self.network.between_passes()
        return results

    def backward(
        self,
        grad_rgb: Tensor | None,
        grad_density: Tensor | None,
        features: Tensor,
        viewdirs_enc: Tensor | None,
        parameters: Sequence[Tensor],
        stash: list[Tensor],
        options: tuple[Any, ...],
        to_features: bool,
    ) -> list[Tensor]:
        inputs = grad_rgb, grad_density, features, viewdirs_enc, stash, to_features
        with below_autograd():
            return backward_pass(self.network, *inputs)


def folded_mlp(
    features: Tensor,
    viewdirs_enc: Tensor | None,
    parameters: Sequence[Tensor],
    architecture: Architecture,
    products: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`reference.mip_mlp` with the bottleneck folded into the layer above it.

    W_eff = W_view[:, :W] W_bottleneck and, for ray r, v_r = W_view[:, W:] d_r + W_view[:, :W] b_bottleneck + b_view:
    the view layer is relu(W_eff h + v_r). With G = sum(delta h^T) and s = sum(delta) over all samples the gradients of
    the factors are dW_view[:, :W] = G W_bottleneck^T + s b_bottleneck^T, dW_bottleneck = W_view[:, :W]^T G,
    db_bottleneck = W_view[:, :W]^T s, db_view = s, dW_view[:, W:] = sum over rays of (delta summed over the ray) d_r^T.

    Args:
        features: [B, N, F] of any float dtype; rounded to `dtype`.
        viewdirs_enc: [B, V], or None for a network without view directions.
        parameters: weight and bias of every layer in the order of `reference.mip_mlp`; float32 (float64 with `dtype`
            float64).
        architecture: of the network.
        products: TORCH, TWIN or CUBLASLT.
        dtype: of the operands: activations, weights, deltas.

    Returns:
        raw rgb [B, N, 3] and raw density [B, N, 1], of the parameters' dtype. Differentiable once in everything; the
        gradient to the features costs its products only where they require one.

    Errors: RuntimeError for a second derivative.

    Source: `performance` 1.2; the bottleneck is Barron et al. 2021, section 4 (the official code, models.py).
    """
    inputs = (features, viewdirs_enc, *parameters)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    options = (*architecture, products, dtype)
    if torch.compiler.is_compiling():
        rgb, density, _ = torch.ops.mipnerf_fast.mlp_folded_forward(
            features, viewdirs_enc, list(parameters), *options, training
        )
        return rgb, density
    if training:
        call = _Call()
        rgb, density = MlpFunction.apply(Passes(call.forward, call.backward), options, *inputs)
        return rgb, density
    network = Network(features, viewdirs_enc, parameters, options)
    with below_autograd():
        rgb, density, _ = forward_pass(network, features, viewdirs_enc, False)
    return rgb, density


# ------------------------------------------------------------------------------------------------- autograd


def _define() -> None:
    """The same as operators, which torch.compile takes as they are."""
    common = (
        "Tensor features, Tensor? viewdirs_enc, Tensor[] parameters, {}int net_depth, int net_depth_condition, "
        "int skip_layer, int products, ScalarType dtype, bool {}"
    )

    def forward(
        features: Tensor, viewdirs_enc: Tensor | None, parameters: list[Tensor], *options: Any
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        *options_, training = options
        network = Network(features, viewdirs_enc, parameters, tuple(options_))
        return forward_pass(network, features, viewdirs_enc, training)

    def backward(
        grad_rgb: Tensor | None,
        grad_density: Tensor | None,
        features: Tensor,
        viewdirs_enc: Tensor | None,
        parameters: list[Tensor],
        stash: list[Tensor],
        *options: Any,
    ) -> list[Tensor]:
        *options_, to_features = options
        network = Network(features, viewdirs_enc, parameters, tuple(options_))
        inputs = (grad_rgb, grad_density, features, viewdirs_enc, list(stash))
        return backward_pass(network, *inputs, to_features)

    def fake_forward(
        features: Tensor, viewdirs_enc: Tensor | None, parameters: list[Tensor], *options: Any
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        *options_, training = options
        rays, samples, _ = features.shape
        rgb, density = (parameters[0].new_empty(rays, samples, columns) for columns in (3, 1))
        stash = new_stash(features, viewdirs_enc, parameters, tuple(options_)) if training else []
        return rgb, density, stash

    def fake_backward(
        grad_rgb: Tensor | None,
        grad_density: Tensor | None,
        features: Tensor,
        viewdirs_enc: Tensor | None,
        parameters: list[Tensor],
        stash: list[Tensor],
        *options: Any,
    ) -> list[Tensor]:
        rays, samples, num_features = features.shape
        of_features = features.new_empty(rays if options[-1] else 0, samples, num_features)
        of_viewdirs = parameters[0].new_empty(0 if viewdirs_enc is None else viewdirs_enc.shape)
        return [of_features, of_viewdirs, *[parameter.new_empty(parameter.shape) for parameter in parameters]]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        features, viewdirs_enc, parameters, *options, _ = inputs
        save_inputs(ctx, tuple(options), features, viewdirs_enc, parameters, output[2])

    def gradients(ctx: Any, grad_rgb: Tensor | None, grad_density: Tensor | None, _: Any) -> tuple[Any, ...]:
        features, viewdirs_enc, parameters, stash = saved_inputs(ctx)
        to_features, to_viewdirs = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        of_features, of_viewdirs, *of_parameters = torch.ops.mipnerf_fast.mlp_folded_backward(
            grad_rgb, grad_density, features, viewdirs_enc, parameters, stash, *ctx.options, to_features
        )
        wanted = wanted_of_inputs(of_features, of_viewdirs, features, viewdirs_enc, to_features, to_viewdirs)
        return (*wanted, of_parameters, *[None] * 6)

    library = torch.library
    name = "mipnerf_fast::mlp_folded_forward"
    schema = f"({common.format('', 'training')}) -> (Tensor, Tensor, Tensor[])"
    operator = library.custom_op(name, forward, mutates_args=(), schema=schema)
    operator.register_fake(fake_forward)
    operator.register_autograd(gradients, setup_context=setup)
    name = "mipnerf_fast::mlp_folded_backward"
    outputs = "Tensor? grad_rgb, Tensor? grad_density, "
    schema = f"({outputs}{common.format('Tensor[] stash, ', 'to_features')}) -> Tensor[]"
    operator = library.custom_op(name, backward, mutates_args=(), schema=schema)
    operator.register_fake(fake_backward)
    operator.register_autograd(no_second_derivative)


_define()
