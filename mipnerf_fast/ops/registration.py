"""What a pair of raw operators needs beside its kernels: shapes for the compiler, and derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register_differentiable(
    operation: str,
    forward_fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
    differentiate: Callable[..., tuple[Tensor | None, ...]],
    save: Callable[[Any, tuple[Any, ...], Any], None],
) -> None:
    """Register fake kernels and derivatives of mipnerf_fast::<operation>_forward and _backward.

    A second derivative raises RuntimeError.

    Args:
        operation: its name.
        forward_fake, backward_fake: of the two operators' arguments, to empty outputs.
        differentiate, save: backward and setup_context of torch.library.register_autograd.
    """

    def no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(
            f"{operation}: the native kernel has no second derivative; "
            'use_backend("reference") differentiates any number of times'
        )

    forward, backward = f"mipnerf_fast::{operation}_forward", f"mipnerf_fast::{operation}_backward"
    torch.library.register_fake(forward, forward_fake)
    torch.library.register_fake(backward, backward_fake)
    torch.library.register_autograd(forward, differentiate, setup_context=save)
    torch.library.register_autograd(backward, no_second_derivative)
