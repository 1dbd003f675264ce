"""Looking for NaN and infinity in what operators return, and in the gradients that come back to them; naming where.

Off by default, because looking at values waits for the GPU; a NaN then stays in its ray. MIPNERF_FAST_CHECK=1 turns it
on for the whole process, `checking` for a while.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

# A module global: torch.compile reads it once and guards on it.
_enabled = os.environ.get("MIPNERF_FAST_CHECK", "0") not in ("", "0")

Operator = TypeVar("Operator", bound=Callable[..., Any])
# What the first axes of a tensor count: rays [B] or rays and their samples [B, N, ...]; rays and channels [B, C];
# samples that lie one after the other [S, ...]; neither.
Rows = Literal["rays", "pixels", "samples", "none"]


class NonFiniteError(FloatingPointError):
    """A value is NaN or infinite; the message names operator, output, ray and sample.

    operator, output: whose. found: the value, None where it is not known which. ray, sample: its place; None where it
    has none.
    """

    def __init__(
        self,
        operator: str,
        output: str,
        found: float | None,
        ray: int | None,
        sample: int | None,
        details: str,
    ) -> None:
        self.operator, self.output, self.found, self.ray, self.sample = operator, output, found, ray, sample
        place = ", ".join(
            f"{word} {number}" for word, number in (("ray", ray), ("sample", sample)) if number is not None
        )
        value = "not finite" if found is None else found
        super().__init__(f"{operator}: {output} is {value}{f' at {place}' if place else ''}, {details}")

    def of_batch(self, ray: int, where: str) -> str:
        """The same of a part of a batch, in words: with the ray's number in the batch, and where it comes from."""
        sample = "" if self.sample is None else f", sample {self.sample}"
        return f"{self.operator}: {self.output} is {self.found} at ray {ray}{sample} of the batch, {where}"


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


def is_checking() -> bool:
    """Whether operators look at their values now."""
    return _enabled


def check_finite(operator: str, output: str, tensor: Tensor, rows: Rows = "rays") -> None:
    """Raise NonFiniteError at the first element that is not finite.

    Args:
        operator, output: what to call it.
        tensor: in any shape that rows describes.
        rows: see `Rows`.
    """
    bad = ~torch.isfinite(tensor.detach())
    if not bool(bad.any()):
        return
    first = [int(i) for i in bad.nonzero()[0]]
    count = int(bad.any(-1).sum()) if bad.dim() > 1 else int(bad.sum())
    # Packed samples know their rays, their values do not.
    ray = first[0] if rows in ("rays", "pixels") and first else None
    sample = first[0] if rows == "samples" else first[1] if rows == "rays" and len(first) > 1 else None
    raise NonFiniteError(
        operator,
        output,
        float(tensor.detach()[tuple(first)]),
        ray,
        sample,
        f"index {first} of shape {list(tensor.shape)} ({count} places in all)",
    )


def _check_gradient(operator: str, output: str, rows: Rows, gradient: Tensor | None) -> None:
    """As a hook: the gradient of an output that the loss does not depend on is None."""
    if gradient is not None:
        check_finite(operator, f"the gradient of {output}", gradient, rows)


def _named(outputs: tuple[str, ...], result: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(result, Tensor):
        yield outputs[0], result
    elif hasattr(result, "_asdict"):
        yield from result._asdict().items()
    else:
        for name, part in zip(outputs, result, strict=True):
            yield from _named((name,), part)


def reports_non_finite(
    operator: str, *outputs: str, rows: Rows = "rays", others: Mapping[str, Rows] | None = None
) -> Callable[[Operator], Operator]:
    """Decorate an operator so that, while checking is on, it looks at its outputs and at their gradients.

    Args:
        operator: its name in the message.
        outputs: names of what it returns; the fields of a named tuple name themselves.
        rows: of the outputs. others: of those outputs that differ.
    """
    rows_of = others or {}

    def decorate(function: Operator) -> Operator:
        @functools.wraps(function)
        def checked(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            if _enabled:
                for name, tensor in _named(outputs, result):
                    kind = rows_of.get(name, rows)
                    check_finite(operator, name, tensor, kind)
                    if tensor.requires_grad:
                        tensor.register_hook(functools.partial(_check_gradient, operator, name, kind))
            return result

        return checked  # type: ignore[return-value]

    return decorate
