"""Volume rendering: densities and colours along rays to pixels (paper, equations 3 and 5)."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn import functional


class Composite(NamedTuple):
    """What volume rendering gives for a batch of rays.

    rgb [B, 3]: the colour. distance [B]: expected t, in multiples of the direction. acc [B]: opacity.
    weights [B, N]: the share of every interval.
    """

    rgb: Tensor
    distance: Tensor
    acc: Tensor
    weights: Tensor

    def unflatten(self, shape: torch.Size) -> Composite:
        """The same with the leading dimension B replaced by a shape of B elements."""
        return Composite(*(field.reshape((*shape, *field.shape[1:])) for field in self))


class Activations(TypedDict, total=False):
    """How `composite` turns raw network outputs into density and colour; see its arguments."""

    density_activation: str | None
    density_bias: float
    rgb_activation: str | None
    rgb_padding: float


def activate_density(raw: Tensor, activation: str | None, bias: float = 0.0) -> Tensor:
    """Density from the network's raw output: softplus(raw + bias), relu(raw + bias), or raw as it is (None)."""
    if activation is None:
        return raw
    if activation == "softplus":
        return functional.softplus(raw + bias)
    if activation == "relu":
        return torch.relu(raw + bias)
    raise ValueError(f'density_activation must be None, "softplus" or "relu", got {activation!r}')


def activate_rgb(raw: Tensor, activation: str | None, padding: float = 0.0) -> Tensor:
    """Colour from the network's raw output: sigmoid(raw) (1 + 2 padding) - padding, or raw as it is (None)."""
    if activation is None:
        return raw
    if activation == "sigmoid":
        return torch.sigmoid(raw) * (1 + 2 * padding) - padding
    raise ValueError(f'rgb_activation must be None or "sigmoid", got {activation!r}')


def weights_from_density(density: Tensor, lengths: Tensor) -> Tensor:
    """The weight w_i = T_i (1 - exp(-density_i length_i)), T_i = exp(-sum_{j<i} density_j length_j) (equation 5).

    Args:
        density: [B, N], at least 0; +inf is opaque.
        lengths: [B, N], world units; an interval of length 0 contributes nothing whatever its density.

    Returns:
        [B, N]; differentiable in both.
    """
    # An infinite density counts as the largest finite number, whose transmittance is 0, and as a constant: no
    # inf * 0 = NaN in an empty interval, and no infinite gradient to its length.
    opaque = density == torch.inf
    largest = torch.finfo(density.dtype).max
    depth = torch.where(opaque, largest * lengths.detach(), torch.where(opaque, 0, density) * lengths)
    before = functional.pad(torch.cumsum(depth, -1)[..., :-1], (1, 0))
    return -torch.expm1(-depth) * torch.exp(-before)


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

    delta_i = (t_{i+1} - t_i) ||d||, w_i = T_i (1 - exp(-density_i delta_i)),
    T_i = exp(-sum_{j<i} density_j delta_j); rgb = sum_i w_i c_i (+ 1 - acc on white), acc = sum_i w_i,
    distance = sum_i w_i (t_i + t_{i+1}) / 2 / acc, clipped to [t_0, t_N] (equations 3 and 5).

    Args:
        rgb: [B, N, 3] colours, or the network's raw output with `rgb_activation`.
        density: [B, N, 1] or [B, N], per world unit, or raw with `density_activation`.
        t_vals: [B, N+1] fenceposts, distances in multiples of the direction.
        directions: [B, 3], world units.
        white_background: whether what is left of the transmittance is white (else black).
        density_activation, density_bias: None | "softplus" | "relu", applied to raw + bias.
        rgb_activation, rgb_padding: None | "sigmoid", widened by the padding at both ends.

    Returns:
        Composite. The distance of an empty ray (acc = 0) is the near end t_0, as the original computes it (its
        nan_to_num receives infinity as `copy`, so NaN becomes 0 and is clipped to t_0). Differentiable in rgb,
        density, t_vals and directions; through distance the gradient is zero where it is clipped or acc is 0.

    Source: algorithm 1.6; Barron et al. 2021, equations 3 and 5; Max 1995.
    """
    rgb = activate_rgb(rgb, rgb_activation, rgb_padding)
    density = activate_density(density, density_activation, density_bias)
    if density.dim() == t_vals.dim() + 1:
        density = density[..., 0]
    t0, t1 = t_vals[..., :-1], t_vals[..., 1:]
    lengths = (t1 - t0) * torch.linalg.vector_norm(directions, dim=-1, keepdim=True)
    weights = weights_from_density(density, lengths)
    acc = weights.sum(-1)
    colour = (weights[..., None] * rgb).sum(-2)
    if white_background:
        colour = colour + (1 - acc[..., None])
    return Composite(colour, expected_distance(weights, (t0 + t1) / 2, acc, t_vals), acc, weights)


def expected_distance(weights: Tensor, positions: Tensor, acc: Tensor, t_vals: Tensor) -> Tensor:
    """sum_i w_i position_i / acc, clipped to the range of t_vals; the near end where acc is 0: [B]."""
    is_empty = acc == 0
    mean = (weights * positions).sum(-1) / torch.where(is_empty, torch.ones_like(acc), acc)
    near, far = t_vals[..., 0].detach(), t_vals[..., -1].detach()
    clipped = torch.where(is_empty, near, torch.minimum(torch.maximum(mean.detach(), near), far))
    is_inside = ~is_empty & (mean >= near) & (mean <= far)
    return torch.where(is_inside, mean, clipped)
