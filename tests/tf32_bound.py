"""The bound that products in TF32 are held to: in the emulation, and on a GPU where there is one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def within_tf32(
    found: Tensor | np.ndarray, rounded: Tensor, truth: Tensor, exact: Tensor, floor: float = 16 * 2.0**-23
) -> None:
    """The rule for products in TF32, by norms.

    truth: float64 with operands rounded where the kernels round them; rounded: the same in float32; exact: float64
    without that rounding. Where a sum in float32 lands on the other side of a rounding's boundary, which happens to
    one operand in a thousand, an operand differs by a whole unit: hence a share of what the rounding itself makes, far
    below what one operand of them left out, or rounded twice or by cutting, makes.
    """
    size = max(truth.norm().item(), 1e-30)
    mine = torch.as_tensor(found).detach().cpu().double().reshape(truth.shape)
    error = (mine - truth.detach()).norm().item()
    of_float32 = (rounded.double() - truth).norm().item()
    of_rounding = (truth - exact).norm().item()
    assert error <= 2 * of_float32 + of_rounding / 16 + floor * size
