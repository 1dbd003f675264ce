"""The learning rate: warm-up and log-linear decay."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def warm_up(step: int | float | Tensor, delay_steps: int, delay_mult: float) -> float | Tensor:
    """delay_mult + (1 - delay_mult) sin(pi/2 clip(step / delay_steps, 0, 1)); 1 where delay_steps is 0."""
    if delay_steps <= 0:
        return 1.0
    if isinstance(step, Tensor):
        return delay_mult + (1 - delay_mult) * torch.sin(
            0.5 * math.pi * torch.clamp(step / delay_steps, 0, 1)
        )
    return delay_mult + (1 - delay_mult) * math.sin(0.5 * math.pi * min(max(step / delay_steps, 0), 1))


def log_lerp(fraction: float | Tensor, start: float, end: float) -> float | Tensor:
    """exp((1 - f) ln start + f ln end) with f clipped to [0, 1]."""
    a, b = math.log(start), math.log(end)
    if isinstance(fraction, Tensor):
        return torch.exp(a + (b - a) * torch.clamp(fraction, 0, 1))
    return math.exp(a + (b - a) * min(max(fraction, 0.0), 1.0))


def learning_rate(
    step: int | Tensor,
    lr_init: float,
    lr_final: float,
    max_steps: int,
    delay_steps: int = 0,
    delay_mult: float = 1.0,
) -> float | Tensor:
    """The learning rate of a step: `log_lerp(step / max_steps) * warm_up(step)`.

    Args:
        step: an int, or a 0-d tensor (then the result is one too, in the default dtype unless step is floating).
        lr_init, lr_final: at the first and the last step.
        max_steps: of the decay.
        delay_steps, delay_mult: length of the warm-up, and the factor it starts from.

    Errors: ValueError where a rate or max_steps is not positive.

    Example:
        >>> learning_rate(2500, 5e-4, 5e-6, 1_000_000, 2500, 0.01)  # doctest: +ELLIPSIS
        0.000494...

    Source: algorithm 1.8.
    """
    if not (lr_init > 0 and lr_final > 0 and max_steps > 0):
        raise ValueError(
            "learning_rate: lr_init, lr_final and max_steps must be positive, "
            f"got {lr_init}, {lr_final} and {max_steps}"
        )
    return log_lerp(step / max_steps, lr_init, lr_final) * warm_up(step, delay_steps, delay_mult)
