"""The operator `resample`: weights to the fenceposts of the next level."""

from __future__ import annotations

from torch import Tensor

from .. import reference


def resample(
    t_vals: Tensor,
    weights: Tensor,
    num_samples: int | None = None,
    u: Tensor | None = None,
    padding: float = 0.01,
) -> Tensor:
    """New fenceposts for the next level, drawn from the blurred and padded weights of this one.

    Arguments, result and equations as in `mipnerf_fast.reference.resample`, which computes it on every backend:
    there is no native kernel yet.
    """
    return reference.resample(t_vals, weights, num_samples, u, padding)
