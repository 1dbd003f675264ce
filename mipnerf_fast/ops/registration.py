"""What raw operators need beside their kernels: shapes for the compiler, and derivatives, or to refuse them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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


# Holds the kernels that `register_without_derivative` adds: they live as long as it does.
_library = torch.library.Library("mipnerf_fast", "IMPL")


def register_without_derivative(operation: str, fake: Callable[..., Any], instead: str) -> None:
    """Register the fake kernel of mipnerf_fast::<operation>, and one that refuses to differentiate it.

    Args:
        operation: its name.
        fake: of its arguments, to empty outputs.
        instead: what has a derivative.
    """
    name = f"mipnerf_fast::{operation}"
    operator = getattr(torch.ops.mipnerf_fast, operation).default
    message = f"{operation}: the raw operator has no derivative of its own; {instead} has"

    def refuse(*_: Any) -> None:
        raise RuntimeError(message)

    torch.library.register_fake(name, fake)
    if not operator._schema.is_mutable:
        torch.library.register_autograd(name, refuse)
        return

    def without_grad(keys: Any, *arguments: Any) -> Any:
        # What it writes has no place in a graph: it is the call that is refused.
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors(arguments)):
            refuse()
        with below_autograd():
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    _library.impl(operation, without_grad, "Autograd", with_keyset=True)


def below_autograd() -> Any:
    """A context whose operators go past autograd to their kernels: what torch's own kernels and C++ Functions use.

    For passes that record no gradient and call many operators of few samples, where asking each costs.
    """
    return torch._C._AutoDispatchBelowAutograd()


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(argument)
