"""The gradients of the bottleneck and of the layer above it from those of the one layer that they are folded into."""

from __future__ import annotations

import torch
from torch import Tensor


def unfold(
    grad_folded: Tensor,
    sums: Tensor,
    of_ray_biases: Tensor,
    viewdirs_enc: Tensor,
    view_weight: Tensor,
    bottleneck_weight: Tensor,
    bottleneck_bias: Tensor,
    to_viewdirs: bool = True,
) -> list[Tensor]:
    """Gradients of both layers' weights and biases, the formulas of `mlp_folded.folded_mlp`.

    Args:
        grad_folded: G [C, K], of the folded weight W_view[:, :W] W_bottleneck.
        sums: s [C], of the deltas over all samples.
        of_ray_biases: [B, C], of the deltas over each ray's.
        viewdirs_enc: [B, V], float32 or wider.
        view_weight: [C, W + V].
        bottleneck_weight, bottleneck_bias: [W, K], [W].
        to_viewdirs: whether anybody asks for the last.

    Returns: of the bottleneck's weight and bias, the view layer's weight and bias, and viewdirs_enc, the last [0, V]
    unless asked for; all of the parameters' dtype.
    """
    width = len(bottleneck_bias)
    from_bottleneck, from_views = view_weight[:, :width], view_weight[:, width:]
    of_view = torch.empty_like(view_weight)
    of_bottleneck, of_views = of_view.split([width, viewdirs_enc.shape[1]], 1)
    torch.mm(grad_folded, bottleneck_weight.t(), out=of_bottleneck).addr_(sums, bottleneck_bias)
    torch.mm(of_ray_biases.t(), viewdirs_enc, out=of_views)
    to_fold = from_bottleneck.t()
    of_viewdirs = of_ray_biases.new_empty(0, viewdirs_enc.shape[1])
    if to_viewdirs:
        of_viewdirs = torch.mm(of_ray_biases, from_views)
    return [torch.mm(to_fold, grad_folded), torch.mv(to_fold, sums), of_view, sums, of_viewdirs]
