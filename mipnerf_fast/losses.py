"""The training loss: a per-channel penalty, weighted by the area that a ray stands for."""

from __future__ import annotations

import torch
from torch import Tensor

LOSSES = ("mse", "smooth_l1", "charbonnier")


def penalty(error: Tensor, kind: str = "mse", beta: float = 1.0) -> Tensor:
    """The penalty of a colour error e, element by element.

    mse: e^2. smooth_l1: e^2 / (2 beta) where |e| < beta, else |e| - beta/2. charbonnier: sqrt(e^2 + beta^2) - beta.

    At beta = 1 smooth L1 is exactly half the squared error on this data, where |e| <= 1.001: a robust loss needs
    a beta well below 1 (0.1, say).

    Source: algorithm 1.12; Charbonnier et al. 1994.
    """
    if beta <= 0:
        raise ValueError(f"penalty: beta must be positive, got {beta}")
    if kind == "mse":
        return error.square()
    if kind == "smooth_l1":
        size = error.abs()
        return torch.where(size < beta, error * error / (2 * beta), size - beta / 2)
    if kind == "charbonnier":
        return torch.sqrt(error * error + beta * beta) - beta
    raise ValueError(f"penalty: unknown loss {kind!r}, expected one of {', '.join(LOSSES)}")


def weighted_loss(
    rgb: Tensor,
    target: Tensor,
    lossmult: Tensor,
    kind: str = "mse",
    beta: float = 1.0,
    total_lossmult: Tensor | None = None,
) -> Tensor:
    """sum(lossmult * penalty(rgb - target)) / sum(lossmult): the official loss of one level.

    The numerator sums over three channels and the denominator over rays, so for the squared error this is three
    times the mean squared error (a PSNR computed from it would be 4.77 dB too low).

    Args:
        rgb, target: [B, 3].
        lossmult: [B, 1], the area weights.
        kind, beta: see `penalty`.
        total_lossmult: the denominator, where this is one chunk of a larger batch; None: the sum of lossmult.

    Returns:
        A scalar; differentiable in rgb.

    Source: algorithm 1.8.
    """
    total = lossmult.sum() if total_lossmult is None else total_lossmult
    return (lossmult * penalty(rgb - target, kind, beta)).sum() / total
