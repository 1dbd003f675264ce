"""MIPNERF_FAST_CHECK=1: every operator looks for NaN and infinity in what it returns, and names where.

Off by default, because looking at values waits for the GPU; a NaN then stays in its ray.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

# Read once, when the package is imported: torch.compile sees plain operators unless it is set.
ENABLED = os.environ.get("MIPNERF_FAST_CHECK", "0") not in ("", "0")

Operator = TypeVar("Operator", bound=Callable[..., Any])


class NonFiniteError(FloatingPointError):
    """An operator returned NaN or infinity; the message names operator, output, ray and sample."""


def check_finite(operator: str, output: str, tensor: Tensor, is_packed: bool = False) -> None:
    """Raise NonFiniteError at the first element of [B, ...], or of packed samples [S, ...], that is not finite."""
    bad = ~torch.isfinite(tensor.detach())
    if not bool(bad.any()):
        return
    first = [int(i) for i in bad.nonzero()[0]]
    place = f"ray {first[0]}" + (f", sample {first[1]}" if tensor.dim() > 1 and len(first) > 1 else "")
    if is_packed:
        place = f"sample {first[0]}"
    value = float(tensor.detach()[tuple(first)])
    raise NonFiniteError(
        f"{operator}: {output} is {value} at {place}, index {first} of shape {list(tensor.shape)} "
        f"({int(bad.any(-1).sum()) if bad.dim() > 1 else int(bad.sum())} places in all)"
    )


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
    """Decorate an operator so that it checks its outputs where MIPNERF_FAST_CHECK is set; else leave it alone.

    Args:
        operator: its name in the message.
        outputs: names of what it returns; the fields of a named tuple name themselves.
        is_packed: whether rows are samples that lie one after the other, not rays.
    """

    def decorate(function: Operator) -> Operator:
        if not ENABLED:
            return function

        @functools.wraps(function)
        def checked(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            for name, tensor in _named(outputs, result):
                check_finite(operator, name, tensor, is_packed)
            return result

        return checked  # type: ignore[return-value]

    return decorate
