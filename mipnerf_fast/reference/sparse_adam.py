"""Adam on the entries that a step touched."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_adam(
    values: Tensor,
    gradient: Tensor,
    moment1: Tensor,
    moment2: Tensor,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """New values and moments: Adam where the gradient is not zero, unchanged elsewhere.

    m' = b1 m + (1 - b1) g, v' = b2 v + (1 - b2) g^2,
    value' = value - lr / (1 - b1^step) m' / (sqrt(v' / (1 - b2^step)) + eps).

    Args:
        values, gradient, moment1, moment2: of one shape.
        step: the number of this step, from 1.

    Source: Kingma and Ba 2015, algorithm 1.
    """
    m = beta1 * moment1 + (1 - beta1) * gradient
    v = beta2 * moment2 + (1 - beta2) * gradient * gradient
    root = torch.sqrt(v / (1 - beta2**step))
    updated = values - learning_rate / (1 - beta1**step) * m / (root + eps)
    touched = gradient != 0
    return (
        torch.where(touched, updated, values),
        torch.where(touched, m, moment1),
        torch.where(touched, v, moment2),
    )
