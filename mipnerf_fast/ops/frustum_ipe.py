"""The operator `frustum_ipe`: fenceposts and rays to integrated positional encodings."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference


def frustum_ipe(
    t_vals: Tensor,
    origins: Tensor,
    directions: Tensor,
    radii: Tensor,
    min_deg: int = 0,
    max_deg: int = 16,
    shape: str = "cone",
    integrated: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The integrated positional encoding of every frustum along a batch of rays.

    Arguments, result and equations as in `mipnerf_fast.reference.frustum_ipe`, which computes it on every
    backend: there is no native kernel yet.
    """
    return reference.frustum_ipe(
        t_vals, origins, directions, radii, min_deg, max_deg, shape, integrated, out_dtype
    )
