"""The network: encoded positions and view directions to raw colour and raw density (paper, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mip_mlp(
    features: Tensor,
    viewdirs_enc: Tensor | None,
    linears: Sequence[nn.Linear] | nn.ModuleList,
    net_depth: int = 8,
    net_depth_condition: int = 1,
    skip_layer: int = 4,
) -> tuple[Tensor, Tensor]:
    """The NeRF network with one skip connection, a linear bottleneck and a view branch.

    h_0 = features; h_{i+1} = relu(W_i h_i + b_i), and [h_{i+1}, features] after every layer index i > 0 that
    skip_layer divides (for 8 layers: after index 4). raw density = W h; with view directions, the bottleneck W h
    (no activation) and the encoded direction go through the view layers (ReLU) to the raw colour.

    Args:
        features: [B, N, F].
        viewdirs_enc: [B, V] encoded view directions, shared by the samples of a ray, or None.
        linears: net_depth trunk layers, density, then bottleneck, net_depth_condition view layers and rgb (with
            view directions), or rgb alone.
        net_depth, net_depth_condition, skip_layer: of the architecture.

    Returns:
        raw rgb [B, N, 3] and raw density [B, N, 1], in the layers' dtype; differentiable.

    Source: algorithm 1.5. The official code's last trunk layer never gets the skip (i = depth - 1 = 7 for the
    paper); where skip_layer divides depth - 1 the heads take the widened activation, as its code does.
    """
    x = _trunk(features, linears, net_depth, skip_layer)
    density = linears[net_depth](x)
    if viewdirs_enc is None:
        return linears[net_depth + 1](x), density
    x = linears[net_depth + 1](x)
    x = torch.cat([x, viewdirs_enc[..., None, :].expand(*x.shape[:-1], viewdirs_enc.shape[-1])], -1)
    for i in range(net_depth_condition):
        x = torch.relu(linears[net_depth + 2 + i](x))
    return linears[net_depth + 2 + net_depth_condition](x), density


def mip_mlp_density(
    features: Tensor,
    linears: Sequence[nn.Linear] | nn.ModuleList,
    net_depth: int = 8,
    skip_layer: int = 4,
) -> Tensor:
    """The raw density [B, N, 1] of `mip_mlp` alone; arguments as there.

    Source: algorithm 1.5.
    """
    density: Tensor = linears[net_depth](_trunk(features, linears, net_depth, skip_layer))
    return density


def _trunk(
    features: Tensor, linears: Sequence[nn.Linear] | nn.ModuleList, net_depth: int, skip_layer: int
) -> Tensor:
    x = features
    for i in range(net_depth):
        x = torch.relu(linears[i](x))
        if i % skip_layer == 0 and i > 0:
            x = torch.cat([x, features], -1)
    return x


def mip_mlp_shapes(
    in_features: int,
    view_features: int | None,
    net_depth: int = 8,
    net_width: int = 256,
    net_depth_condition: int = 1,
    net_width_condition: int = 128,
    skip_layer: int = 4,
) -> list[tuple[int, int]]:
    """(in, out) of every layer of `mip_mlp`, in its order; view_features None leaves out the view branch."""
    shapes, width = [], in_features
    for i in range(net_depth):
        shapes.append((width, net_width))
        width = net_width + (in_features if i % skip_layer == 0 and i > 0 else 0)
    shapes.append((width, 1))
    if view_features is None:
        return [*shapes, (width, 3)]
    shapes.append((width, net_width))
    width = net_width + view_features
    for _ in range(net_depth_condition):
        shapes.append((width, net_width_condition))
        width = net_width_condition
    return [*shapes, (width, 3)]
