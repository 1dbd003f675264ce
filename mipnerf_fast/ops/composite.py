"""The operator `composite`: densities and colours along rays to pixels."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..reference import Composite


def composite(
    rgb: Tensor,
    density: Tensor,
    t_vals: Tensor,
    directions: Tensor,
    white_background: bool = True,
    *,
    density_activation: str | None = None,
    density_bias: float = 0.0,
    rgb_activation: str | None = None,
    rgb_padding: float = 0.0,
) -> Composite:
    """Composite the samples of every ray into one colour.

    Arguments, result and equations as in `mipnerf_fast.reference.composite`, which computes it on every backend:
    there is no native kernel yet.
    """
    return reference.composite(
        rgb,
        density,
        t_vals,
        directions,
        white_background,
        density_activation=density_activation,
        density_bias=density_bias,
        rgb_activation=rgb_activation,
        rgb_padding=rgb_padding,
    )


def composite_resample(
    rgb: Tensor,
    density: Tensor,
    t_vals: Tensor,
    directions: Tensor,
    white_background: bool = True,
    *,
    density_activation: str | None = None,
    density_bias: float = 0.0,
    rgb_activation: str | None = None,
    rgb_padding: float = 0.0,
    num_samples: int | None = None,
    u: Tensor | None = None,
    padding: float = 0.01,
) -> tuple[Composite, Tensor]:
    """Composite a coarse level and draw the fenceposts of the next one from its weights.

    `composite` and `resample` one after the other; the gradient is that of `composite`.
    """
    level = composite(
        rgb,
        density,
        t_vals,
        directions,
        white_background,
        density_activation=density_activation,
        density_bias=density_bias,
        rgb_activation=rgb_activation,
        rgb_padding=rgb_padding,
    )
    return level, reference.resample(t_vals, level.weights, num_samples, u, padding)
