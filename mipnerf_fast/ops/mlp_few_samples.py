"""The network for few samples, where calls of torch cost more than products: plain layers, as few calls as they need.

What the folded network saves is a product for every sample; what it costs are three of matrices, and a backward pass in
Python. Below some hundreds of samples that is more. Here torch's own autograd goes back, and frees what it has used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from .mlp_autograd import Architecture

# Below so many outputs of a layer: 512 samples of the paper's network, 2048 of one of 64 columns (measured on one and
# on two threads).
_FEW = 1 << 17


def are_few(features: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether this is the faster way."""
    return features.shape[0] * features.shape[1] < few_of(parameters[0].shape[0])


def few_of(width: int) -> int:
    """Fewer samples than this are few for a network of this width."""
    return -(-_FEW // width)


def few_samples_mlp(
    features: Tensor,
    viewdirs_enc: Tensor | None,
    parameters: Sequence[Tensor],
    architecture: Architecture,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`reference.mip_mlp` over matrices, in place where nobody asks for what was there.

    Arguments and results as of `mlp_folded.folded_mlp`. Differentiable as torch's layers are: as often as wanted, and
    an output without a part in the loss gives its own layers no gradient instead of zeros.

    Source: algorithm 1.5.
    """
    if torch.is_autocast_enabled(features.device.type):
        with torch.autocast(features.device.type, enabled=False):
            return few_samples_mlp(features, viewdirs_enc, parameters, architecture, dtype)
    depth, view_depth, skip_layer = architecture
    rays, samples, num_features = features.shape
    raw_dtype = parameters[0].dtype
    # The heads' outputs are of the parameters' dtype.
    density_weight, density_bias = parameters[2 * depth : 2 * depth + 2]
    rgb_weight, rgb_bias = parameters[-2:]
    if raw_dtype != dtype:
        parameters = [parameter.to(dtype) for parameter in parameters]
    encoded = x = features.reshape(rays * samples, num_features).to(dtype)
    for number in range(depth):
        x = linear(x, parameters[2 * number], parameters[2 * number + 1]).relu_()
        if number > 0 and number % skip_layer == 0:
            x = torch.cat([x, encoded], 1)
    density = linear(x.to(raw_dtype), density_weight, density_bias)
    if viewdirs_enc is not None:
        x = linear(x, parameters[2 * depth + 2], parameters[2 * depth + 3]).view(rays, samples, -1)
        directions = viewdirs_enc.to(dtype)[:, None].expand(-1, samples, -1)
        x = torch.cat([x, directions], 2).flatten(0, 1)
        for number in range(depth + 2, depth + 2 + view_depth):
            x = linear(x, parameters[2 * number], parameters[2 * number + 1]).relu_()
    rgb = linear(x.to(raw_dtype), rgb_weight, rgb_bias)
    return rgb.view(rays, samples, 3), density.view(rays, samples, 1)
