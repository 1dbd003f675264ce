"""What the engines of the network share around their passes: the autograd Function, and the scale of float16 deltas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The largest gradient that comes in is scaled to about 2^3; deltas may grow 2^12 times on their way down, and what is
# 2^-17 of the largest is still a normal number.
_FP16_EXPONENT = 3


class Architecture(NamedTuple):
    """What of `reference.mip_mlp`'s arguments the parameters' shapes do not tell."""

    net_depth: int
    net_depth_condition: int
    skip_layer: int


class Passes(NamedTuple):
    """An engine.

    forward: (features, viewdirs_enc, parameters, options, training) to rgb, density and the stash.
    backward: (grad_rgb, grad_density, features, viewdirs_enc, parameters, stash, options, to_features) to the gradients
    of features, viewdirs_enc and the parameters.
    """

    forward: Callable[..., tuple[Tensor, Tensor, list[Tensor]]]
    backward: Callable[..., list[Tensor]]


class MlpFunction(torch.autograd.Function):
    """apply(passes, options, features, viewdirs_enc, *parameters): differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        passes: Passes,
        options: tuple[Any, ...],
        features: Tensor,
        viewdirs_enc: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        rgb, density, stash = passes.forward(features, viewdirs_enc, parameters, options, True)
        ctx.passes = passes
        save_inputs(ctx, options, features, viewdirs_enc, parameters, stash)
        return rgb, density

    @staticmethod
    def backward(ctx: Any, grad_rgb: Tensor | None, grad_density: Tensor | None) -> tuple[Tensor | None, ...]:
        features, viewdirs_enc, parameters, stash = saved_inputs(ctx)
        # Nobody else holds the stash then, and the pass frees it on its way; not where the graph is to be kept.
        ctx.maybe_clear_saved_tensors()
        to_features, to_viewdirs = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        second = torch.is_grad_enabled()
        with torch.no_grad():
            of_features, of_viewdirs, *of_parameters = ctx.passes.backward(
                grad_rgb, grad_density, features, viewdirs_enc, parameters, stash, ctx.options, to_features
            )
        wanted = [
            *wanted_of_inputs(of_features, of_viewdirs, features, viewdirs_enc, to_features, to_viewdirs)
        ]
        wanted += of_parameters
        if second:
            tracked = [
                x for x in (grad_rgb, grad_density, features, viewdirs_enc, *parameters) if x is not None
            ]
            wanted = [grad if grad is None else _Once.apply(grad, *tracked) for grad in wanted]
        return (None, None, *wanted)


class _Once(torch.autograd.Function):
    """A gradient that remembers what it depends on, only to refuse a second derivative."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *tracked: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        no_second_derivative()


def no_second_derivative(*_: Any) -> None:
    """Raise RuntimeError."""
    raise RuntimeError("mlp: the second derivative is not implemented; use_backend('reference') has it")


def wanted_of_inputs(
    of_features: Tensor,
    of_viewdirs: Tensor,
    features: Tensor,
    viewdirs_enc: Tensor | None,
    to_features: bool,
    to_viewdirs: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients that are wanted, in the dtypes of what they are of."""
    return (
        of_features.to(features.dtype) if to_features else None,
        of_viewdirs.to(viewdirs_enc.dtype) if to_viewdirs and viewdirs_enc is not None else None,
    )


def save_inputs(
    ctx: Any,
    options: tuple[Any, ...],
    features: Tensor,
    viewdirs_enc: Tensor | None,
    parameters: Sequence[Tensor],
    stash: Sequence[Tensor],
) -> None:
    """Keep what the backward pass takes; `saved_inputs` returns it."""
    # An output that took no part in the loss has no gradient, instead of a tensor of zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features, viewdirs_enc, *parameters, *stash)
    ctx.options, ctx.num_parameters = options, len(parameters)


def saved_inputs(ctx: Any) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor]]:
    """features, viewdirs_enc, the parameters, the stash."""
    features, viewdirs_enc, *rest = ctx.saved_tensors
    return features, viewdirs_enc, rest[: ctx.num_parameters], rest[ctx.num_parameters :]


def loss_scale(grads: list[Tensor], dtype: torch.dtype) -> Tensor | None:
    """With float16 a power of two that keeps the deltas in its range; taken back in float32. No wait for the GPU."""
    grads = [grad for grad in grads if grad.numel()]
    if dtype != torch.float16 or not grads:
        return None
    largest = torch.stack([grad.detach().abs().amax() for grad in grads]).amax()
    return torch.exp2(torch.floor(_FP16_EXPONENT - torch.log2(largest)).clamp(-100, 100))
