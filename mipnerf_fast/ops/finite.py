"""Looking for NaN and infinity in what operators return, and in the gradients that come back to them; naming where.

Off by default, because looking at values waits for the GPU; a NaN then stays in its ray. MIPNERF_FAST_CHECK=1 turns it
on for the whole process, `checking` for a while.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

# A module global: torch.compile reads it once and guards on it.
_enabled = os.environ.get("MIPNERF_FAST_CHECK", "0") not in ("", "0")

Operator = TypeVar("Operator", bound=Callable[..., Any])


class NonFiniteError(FloatingPointError):
    """A value is NaN or infinite; the message names operator, output, ray and sample.

    operator, output: whose. found: the value. ray, sample: its place; None where it has none.
    """

    def __init__(
        self, operator: str, output: str, found: float, ray: int | None, sample: int | None, details: str
    ) -> None:
        self.operator, self.output, self.found, self.ray, self.sample = operator, output, found, ray, sample
        place = ", ".join(
            f"{word} {number}" for word, number in (("ray", ray), ("sample", sample)) if number is not None
        )
        super().__init__(f"{operator}: {output} is {found}{f' at {place}' if place else ''}, {details}")


@contextmanager
def checking() -> Iterator[None]:
    """Within the context every operator raises NonFiniteError at the first value that is not finite.

    Values are looked at in the order in which they are computed, gradients on their way back included.
    """
    global _enabled
    previous, _enabled = _enabled, True
    try:
        yield
    finally:
        _enabled = previous


def check_finite(
    operator: str, output: str, tensor: Tensor, is_packed: bool = False, has_rays: bool = True
) -> None:
    """Raise NonFiniteError at the first element that is not finite.

    Args:
        operator, output: what to call it.
        tensor: of rays [B, ...]; of packed samples [S, ...] where is_packed; of neither where has_rays is false.
    """
    bad = ~torch.isfinite(tensor.detach())
    if not bool(bad.any()):
        return
    first = [int(i) for i in bad.nonzero()[0]]
    count = int(bad.any(-1).sum()) if bad.dim() > 1 else int(bad.sum())
    # Packed samples know their rays, their values do not.
    ray = first[0] if has_rays and not is_packed and first else None
    sample = first[0] if is_packed else first[1] if ray is not None and len(first) > 1 else None
    raise NonFiniteError(
        operator,
        output,
        float(tensor.detach()[tuple(first)]),
        ray,
        sample,
        f"index {first} of shape {list(tensor.shape)} ({count} places in all)",
    )


def _check_gradient(operator: str, output: str, is_packed: bool, gradient: Tensor | None) -> None:
    """As a hook: the gradient of an output that the loss does not depend on is None."""
    if gradient is not None:
        check_finite(operator, f"the gradient of {output}", gradient, is_packed)


def _named(outputs: tuple[str, ...], result: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(result, Tensor):
        yield outputs[0], result
    elif hasattr(result, "_asdict"):
        yield from result._asdict().items()
    else:
        for name, part in zip(outputs, result, strict=True):
            yield from _named((name,), part)


def reports_non_finite(
    operator: str, *outputs: str, is_packed: bool = False
) -> Callable[[Operator], Operator]:
    """Decorate an operator so that, while checking is on, it looks at its outputs and at their gradients.

    Args:
        operator: its name in the message.
        outputs: names of what it returns; the fields of a named tuple name themselves.
        is_packed: whether rows are samples that lie one after the other, not rays.
    """

    def decorate(function: Operator) -> Operator:
        @functools.wraps(function)
        def checked(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            if _enabled:
                for name, tensor in _named(outputs, result):
                    check_finite(operator, name, tensor, is_packed)
                    if tensor.requires_grad:
                        tensor.register_hook(functools.partial(_check_gradient, operator, name, is_packed))
            return result

        return checked  # type: ignore[return-value]

    return decorate
