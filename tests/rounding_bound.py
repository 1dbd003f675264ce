"""The bound of what kernels round on purpose, products in TF32 and features in float16: emulated, and on a GPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def within_rounding(
    found: Tensor | np.ndarray, rounded: Tensor, truth: Tensor, exact: Tensor, floor: float = 16 * 2.0**-23
) -> None:
    """The rule for operands rounded to TF32 or features to float16, by norms.

    truth: float64 with numbers rounded where the kernels round them; rounded: the same in float32; exact: float64
    without that rounding. Where a sum in float32 lands on the other side of a rounding's boundary, which happens to
    one number in a thousand, it differs by a whole unit: hence a share of what the rounding itself makes, far below
    what one number of them left out, or rounded twice or by cutting, makes.
    """
    size = max(truth.norm().item(), 1e-30)
    mine = torch.as_tensor(found).detach().cpu().double().reshape(truth.shape)
    error = (mine - truth.detach()).norm().item()
    of_float32 = (rounded.double() - truth).norm().item()
    of_rounding = (truth - exact).norm().item()
    allowed = 2 * of_float32 + of_rounding / 16 + floor * size
    assert error <= allowed, f"{error:.3e} from the truth, where {allowed:.3e} is allowed"
